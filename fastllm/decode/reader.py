"""Reading prompts: pieces of several, as many as fit into the time that one step may give them, in one forward.

By the arithmetic contract a token has the same keys, values and hidden state whoever stands beside it, so that how prompts are
cut and put together is a matter of speed alone: a forward of a few tokens takes the time of reading all weights.

On a GPU it takes the time of launching its kernels. There it is captured, for 16, 24, 32, 48, 64, ... tokens of as many sequences
as run together; tokens beyond those that are read are padding: they belong to no sequence and go nowhere.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.blocks import Adapters, PagedBatch
from ..models.decoder import Decoder
from .adapters import Pools
from .cache import PAGE, KVCache, pages_for, pieces
from .graph import Captured, CapturedGraph, capture
from .scheduler import Scheduler, Sequence

# What a forward may take while others run, and while none does; and its tokens at least. Fewer than 16 take the time of so
# many; with fewer than 64, where nobody waits for its end, a slow model would read its weights too often.
PIECE_S, PIECE_ALONE_S = 0.1, 0.25
LEAST, LEAST_ALONE = 16, 64


class Piece(NamedTuple):
    """Tokens [start, stop) of a sequence's prompt."""

    sequence: Sequence
    start: int
    stop: int


@dataclass
class _Plan:
    """A captured forward, and what it reads."""

    ids: Tensor
    batch: PagedBatch
    captured: Captured | CapturedGraph


class Reader:
    """Reads into the cache, of at most `sequences` at once with at most `capacity` tokens each. captures: whether forwards are
    captured, as they are on a GPU."""

    def __init__(self, model: Decoder, cache: KVCache, sequences: int, capacity: int):
        self.model, self.cache, self.sequences = model, cache, sequences
        self.captures = cache.device.type == "cuda"
        self._rate = LEAST / PIECE_S  # prompt tokens a second, as the last forward had them
        self._table = sequences, pages_for(capacity)
        self._plans: dict[int, _Plan | None] = {}  # by number of tokens; None: it could not be made
        self._pool = None
        self._made = False  # a plan, by the last forward

    def budget(self, others: bool, most: int) -> int:
        """Tokens of one step, at most `most`. others: some run, and wait."""
        seconds, least = (PIECE_S, LEAST) if others else (PIECE_ALONE_S, LEAST_ALONE)
        return min(max(int(self._rate * seconds) // PAGE * PAGE, least), most)

    def gather(self, scheduler: Scheduler, budget: int) -> list[Piece]:
        """Those first in line that are read together; only the last one may be cut off before its end."""
        found: list[Piece] = []
        while budget > 0 and len(found) < self.sequences and (s := scheduler.next([p.sequence for p in found])):
            found.append(Piece(s, s.read, min(s.read + budget, s.to_read)))
            budget -= found[-1].stop - s.read
        return found

    def read(self, wanted: list[Piece], pools: Pools) -> list[Tensor]:
        """Hidden states [tokens, dim] of each piece, whose keys and values are in the cache then."""
        full, counts = [p for p in wanted if p.stop > p.start], [p.stop - p.start for p in wanted]
        self._made = False
        if not full:
            return [torch.empty(0)] * len(wanted)
        ids = torch.tensor([token for p in full for token in p.sequence.prompt[p.start : p.stop]])
        batch = pieces(self.cache, [(p.sequence.pages, p.start, p.stop) for p in full], _adapters(full, pools))
        plan = self._plan(len(ids)) if self.captures and batch.adapters is None else None
        if plan:
            hidden = self._replay(plan, ids, batch)
        else:
            hidden = self.model.step(ids.to(self.cache.device), batch.to(self.cache.device))
        return list(hidden.split(counts))

    def took(self, tokens: int, seconds: float) -> None:
        """What the last forward took, and what was made of it, decides how long the next one may be."""
        if tokens >= LEAST and not self._made:
            self._rate = tokens / seconds

    # ------------------------------------------------------------------------------------------------------- captured

    def _plan(self, tokens: int) -> _Plan | None:
        """The captured forward of at least so many tokens."""
        size = padded_size(tokens)
        if size not in self._plans:
            self._made = True
            try:
                self._plans[size] = self._make(size)
            except (MemoryError, RuntimeError) as error:  # the room that it keeps is the cache's, or others'
                self._plans[size] = None
                warnings.warn(f"prompts of {size} tokens are read without a captured forward: {error}", stacklevel=2)
        return self._plans[size]

    def _make(self, size: int) -> _Plan:
        device = self.cache.device
        rows, pages = self._table
        numbers = torch.zeros(2, size, dtype=torch.int64, device=device)
        batch = PagedBatch(
            position=numbers[0],
            slot=torch.full((size,), -1, dtype=torch.int64, device=device),
            block_table=torch.full((rows, pages), -1, dtype=torch.int32, device=device),
            context_len=torch.zeros(rows, dtype=torch.int32, device=device),
            cu_q=torch.zeros(rows + 1, dtype=torch.int32, device=device),
            pages=self.cache.layers,
        )
        if device.type == "cuda" and self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()  # forwards of all sizes: they run one after another
        captured = capture(lambda: (self.model.step(numbers[1], batch),), device, self._pool)
        return _Plan(numbers[1], batch, captured)

    def _replay(self, plan: _Plan, ids: Tensor, batch: PagedBatch) -> Tensor:
        to, tokens, rows = plan.batch, len(ids), len(batch.context_len)
        plan.ids[:tokens], to.position[:tokens], to.slot[:tokens] = ids, batch.position, batch.slot
        plan.ids[tokens:], to.position[tokens:], to.slot[tokens:] = 0, 0, -1
        to.block_table[:rows, : batch.block_table.shape[1]] = batch.block_table
        to.context_len[:rows], to.context_len[rows:] = batch.context_len, 0
        to.cu_q[: rows + 1], to.cu_q[rows + 1 :] = batch.cu_q, tokens
        if plan.captured.replay():
            raise IndexError("a forward of prompts found a row, a page or a position out of range")
        return plan.captured.outputs[0][:tokens].clone()  # the next replay writes there


def padded_size(tokens: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that holds so many."""
    size = 1 << max(4, (tokens - 1).bit_length())
    return size * 3 // 4 if size > LEAST and tokens <= size * 3 // 4 else size


def _adapters(wanted: Iterable[Piece], pools: Pools) -> Adapters | None:
    """Of each token; None where no sequence has any."""
    if not any(p.sequence.adapter for p in wanted):
        return None
    slots = [p.sequence.adapter.slot if p.sequence.adapter else -1 for p in wanted]
    counts = torch.tensor([p.stop - p.start for p in wanted])
    return Adapters(torch.tensor(slots).repeat_interleave(counts), pools)
