"""The adapters of an engine: under which names they are loaded, who uses them, and the pools in which they lie.

A name stands for what was loaded under it last. A sequence keeps the adapter that its name stood for when it was put in
line: loading a name again, or unloading it, is for those who come later, and what is replaced goes when its last user has
left. Its pages of the cache go with it, and no other adapter ever finds them.

Every adapter has one slot, the same in all pools: of each projection that any adapter changes there is one. They have as many
slots as were ever needed at once, doubled when they do not suffice, and the largest rank of the projection. A pool that is
made larger is a new one, with new pointers: the plans of steps with adapters are captured anew. Slots take memory when they
are used, on huge pages; an adapter takes 4 bytes for each of its numbers. When the last adapter goes, the pools go.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models.arena import Arena
from ..models.decoder import Decoder
from ..ops import AdapterPool, Panels, QWeight
from ..ops.linear import unpack
from ..ops.lora_linear import row_norms
from ..ops.multi_lora import in_use
from ..peft.lora import Parts, Place

Pools = dict[Place, AdapterPool]
Size = tuple[int, int, bool]  # slots, the largest rank, whether there are magnitudes


@dataclass(eq=False)
class Adapter:
    """One that was loaded. slot: in the pools. root: of the cache. users: sequences that have not ended. retired: its name
    stands for another one, or for none."""

    name: str
    slot: int
    root: int
    users: set = field(default_factory=set)
    retired: bool = False


class AdapterTable:
    """The adapters of one model. Between two steps alone may it be changed, but for users, who come and go at any time."""

    def __init__(self, model: Decoder):
        self.model, self.named, self.pools = model, dict[str, Adapter](), Pools()
        stream = model.norm.weight  # of the dtype and on the device that the model computes in
        self.dtype, self.device = stream.dtype, stream.device
        self._held: dict[int, Adapter] = {}  # by slot, with those that are retired

    def find(self, name: str) -> Adapter:
        """ValueError for a name under which nothing is loaded."""
        if name not in self.named:
            loaded = f"loaded are {', '.join(map(repr, self.named))}" if self.named else "none is loaded"
            raise ValueError(f"adapter={name!r} is not loaded; {loaded}; load_adapter(name, path) loads one")
        return self.named[name]

    def load(self, name: str, parts: Mapping[Place, Parts], root: int) -> None:
        """Puts an adapter in under a name. `pools` is another dict where one of them is new. What fails changes no adapter."""
        self._make_room(parts)
        slot, done = next(i for i in range(len(self._held) + 1) if i not in self._held), []
        try:
            for place, pool in self.pools.items():
                given = parts.get(place) or (None,) * len(pool.sizes)
                triples = [None if part is None else (part[0].a, part[0].b, part[1]) for part in given]
                pool.add_parts(triples, _gain(self._weight(place), given, pool), slot)
                done.append(pool)
        except BaseException:
            self._empty(slot, done)
            raise
        self._held[slot] = self.named[name] = Adapter(name, slot, root)

    def free(self, adapter: Adapter) -> None:
        """Takes out one that is retired and has no user."""
        self._held.pop(adapter.slot, None)
        self._empty(adapter.slot, self.pools.values())

    def mend(self, sequences: Collection[Hashable]) -> None:
        """What an interrupt tore apart: a slot is held by an adapter that has a name, or a user among these, and by no other."""
        for adapter in list(self._held.values()):
            adapter.users.intersection_update(sequences)
            adapter.retired = self.named.get(adapter.name) is not adapter
            if adapter.retired and not adapter.users:
                del self._held[adapter.slot]
        for pool in self.pools.values():
            for slot in set(in_use(pool.rank)) - self._held.keys():
                pool.remove(slot)
        self._drop_pools()

    def _empty(self, slot: int, pools: Iterable[AdapterPool]) -> None:
        for pool in pools:
            pool.remove(slot)
        self._drop_pools()

    def _drop_pools(self) -> None:
        if not self._held:
            self.pools = Pools()

    def _make_room(self, parts: Mapping[Place, Parts]) -> None:
        """Pools for one more. What was there stays as it is until all are made."""
        slots = next((pool.slots for pool in self.pools.values()), 1)
        while slots <= len(self._held):
            slots *= 2
        wanted = {place: self._size(place, parts.get(place, ()), slots) for place in self.pools.keys() | parts.keys()}
        wanted = {place: size for place, size in wanted.items() if size != _size_of(self.pools.get(place))}
        if wanted:
            cpu = self.device.type == "cpu"
            take = Arena(sum(self._nbytes(place, *size) for place, size in wanted.items())).take if cpu else None
            made = {place: self._pool(place, size, len(parts.get(place, ())), take) for place, size in wanted.items()}
            self.pools = {**self.pools, **made}

    def _size(self, place: Place, given: Parts, slots: int) -> Size:
        """What the pool of a projection must be, to hold one more."""
        _, rank, dora = _size_of(self.pools.get(place)) or (0, 1, False)
        pairs = [part[0] for part in given if part is not None]
        rank = max([rank, *(pair.a.shape[0] for pair in pairs)])
        return slots, rank, dora or any(pair.magnitude is not None for pair in pairs)

    def _nbytes(self, place: Place, slots: int, rank: int, dora: bool) -> int:
        """At most."""
        rows, depth = self._weight(place).shape
        parts = len(self.model.config.stacks.get(place[1], (rows,)))
        rank = -(-rank * parts // 16) * 16
        return 4 * slots * (parts * rank * depth + (rows + 32) * rank) + 2 * 4096

    def _pool(self, place: Place, size: Size, count: int, take: Callable[[int], Tensor] | None) -> AdapterPool:
        if place in self.pools:
            return self.pools[place].grown(*size, take=take)
        rows, depth = self._weight(place).shape
        sizes = self.model.config.stacks[place[1]] if count > 1 else (rows,)
        swiglu = self.model.layers[place[0]].get_submodule(place[1]).swiglu
        where = {"dtype": self.dtype, "device": self.device, "exact": self.model.exact}
        pool = AdapterPool(sizes, depth, *size, swiglu=swiglu, take=take, **where)
        for slot in self._held:  # they leave this projection as it is
            pool.add_parts([None] * count, slot=slot)
        return pool

    def _weight(self, place: Place) -> Tensor | Panels | QWeight:
        return self.model.layers[place[0]].get_submodule(place[1]).weight


def _size_of(pool: AdapterPool | None) -> Size | None:
    return None if pool is None else (pool.slots, pool.max_rank_of_part, pool.gain is not None)


def _gain(weight: Tensor | Panels | QWeight, parts: Parts, pool: AdapterPool) -> Tensor | None:
    """magnitude / ||W + scale * B A|| of each row of a DoRA adapter (arXiv 2402.09353), ones where a part is none."""
    if not any(part is not None and part[0].magnitude is not None for part in parts):
        return None
    if isinstance(weight, QWeight):
        dense = weight.dequantize()
    elif isinstance(weight, Panels):
        dense = unpack(weight.data, weight.rows, weight.swiglu)
    else:  # as lora_linear takes it, on whose device the norms have their bits
        dense = weight.detach() if weight.is_cuda else weight.detach().float()
    gains = []
    for part, rows in zip(parts, dense.split(pool.sizes), strict=True):
        if part is None or part[0].magnitude is None:
            gains.append(torch.ones(rows.shape[0], device=rows.device))
        else:
            pair, scale = part
            a, b, magnitude = (t.to(rows) for t in (pair.a, pair.b, pair.magnitude))
            gains.append(magnitude.float() / row_norms(rows, a, b, scale))
    return torch.cat(gains)
