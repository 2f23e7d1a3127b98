"""The tensors of decode steps, one row for each running sequence."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..models.arena import available_memory
from ..models.blocks import Adapters, PagedBatch
from .adapters import Pools
from .cache import PAGE, KVCache, pages_for
from .scheduler import Sequence


class Rows:
    """The tensors of decode steps: row i is a sequence's next token, and where its keys and values go.

    A replayed step reads them and moves them on; Python writes to a row only when a sequence takes or leaves it, and for
    drafts. An empty row is padding: it sees no key, writes nowhere and draws nothing.
    """

    def __init__(
        self, cache: KVCache, count: int, capacity: int, eos_ids: Iterable[int], device: torch.device | None = None
    ):
        """MemoryError where they are more than the device has free: zeros are written, so the system need not refuse them."""
        self.cache, self._eos = cache, sorted(eos_ids)
        self.device = cache.device if device is None else device
        need, free = count * 4 * (capacity + pages_for(capacity) + 32), available_memory(self.device)
        if need > free:
            raise MemoryError(f"{need / 1e9:.2f} GB are asked for, {free / 1e9:.2f} GB are free")
        # Where a sequence takes a row of a GPU, it is written on the CPU first: a number there costs a launch.
        on_gpu = self.device.type == "cuda"
        self._staged = Rows(cache, count, capacity, self._eos, torch.device("cpu")) if on_gpu else None
        on = {"device": self.device}
        self.ids, self.position, self.slot = (torch.zeros(count, dtype=torch.int64, **on) for _ in range(3))
        self.context_len = torch.zeros(count, dtype=torch.int32, **on)
        self.block_table = torch.full((count, pages_for(capacity)), -1, dtype=torch.int32, **on)
        self.who = torch.full((count,), -1, dtype=torch.int32, **on)  # row of the sampler's state: the same, or nobody
        self.adapter = torch.full((count,), -1, dtype=torch.int64, **on)
        self.state = ops.SampleState.create(count, history=capacity + 1, suppress=max(1, len(self._eos)), **on)
        self.starts = torch.arange(count + 1, dtype=torch.int32, **on)  # rows that share a pass over their keys
        self.slot.fill_(-1)
        # The same memory, for drafts: on a CPU numpy writes a few numbers in a tenth of the time that torch takes.
        view = Tensor.numpy if self.device.type == "cpu" else Tensor.detach
        moved = self.ids, self.position, self.slot, self.context_len, self.state.settings
        self._ids, self._position, self._slot, self._context_len, self._settings = self._moved = [
            view(t) for t in moved
        ]
        self._counters = view(self.state.position), view(self.state.history_len)
        others = self.block_table, self.state.history, self.state.suppress, self.who, self.adapter, self.starts
        self._table, self._history, self._suppress, self._who, self._adapter, self._starts = (view(t) for t in others)
        self._count = view(torch.arange(count + 1, **on))

    def seat(self, *sequences: Sequence) -> None:
        """The row of each is about to read its last token and to draw the one after it."""
        for s in sequences:
            self.write(s)
        self.send(*sequences)

    def send(self, *sequences: Sequence) -> None:
        """What was written of these holds from now on, on a GPU too."""
        if self._staged and sequences:
            rows = sorted(s.row for s in sequences)
            runs = [slice(rows[0], rows[-1] + 1)] if rows[-1] - rows[0] < len(rows) else [slice(r, r + 1) for r in rows]
            tokens = max(len(s.prompt) + len(s.tokens) for s in sequences)
            for run in runs:
                self._copy(self._staged, run, tokens, max(len(s.pages) for s in sequences))

    def _copy(self, other: "Rows", rows: slice, tokens: int, pages: int) -> None:
        for name in ("ids", "position", "slot", "context_len", "who", "adapter"):
            getattr(self, name)[rows] = getattr(other, name)[rows]
        self.block_table[rows, :pages] = other.block_table[rows, :pages]
        ours, theirs = self.state, other.state
        ours.settings[rows], ours.suppress[rows] = theirs.settings[rows], theirs.suppress[rows]
        ours.history[rows, :tokens] = theirs.history[rows, :tokens]

    def write(self, s: Sequence) -> None:
        """Prepares the row of one that takes it; `send` follows."""
        if self._staged:
            return self._staged.write(s)
        ids, row = [*s.prompt, *s.tokens], s.row
        last = len(ids) - 1
        self.ids[row], self.position[row], self.context_len[row] = ids[last], last, len(ids)
        # the last token of a prompt may lie in a page that others read; then it is there, with the same bits
        self.slot[row] = s.pages[last // PAGE] * PAGE + last % PAGE if last >= s.known else -1
        self.block_table[row, : len(s.pages)] = torch.tensor(s.pages, dtype=torch.int32)
        self.who[row], self.adapter[row] = row, s.adapter.slot if s.adapter else -1
        self.state.set(row, s.params, index=s.index, seed=s.seed, prompt=ids, eos=self._eos)
        self.state.prompt_len[row] = len(s.prompt)

    def clear(self, first: int, stop: int) -> None:
        rows = slice(first, stop)
        self._ids[rows] = self._position[rows] = self._context_len[rows] = 0
        self._slot[rows] = self._who[rows] = self._adapter[rows] = -1
        self._starts[rows] = self._count[rows]

    def _row(self, values: list[int]) -> Any:
        """Numbers, for a slice of the views."""
        return values if self.device.type == "cpu" else torch.tensor(values, device=self.device)

    def draft(self, s: Sequence, first: int, tokens: list[int]) -> None:
        """Rows from `first` on read these tokens, each as if it were what the row before it draws.

        Their keys go to the sequence's own pages, past its end: rows up to there do not see them, and those that turn
        out wrong are written over before any row does."""
        row, stop, p = s.row, first + len(tokens), s.params
        rows, ahead = slice(first, stop), self._count[1 : 1 + len(tokens)]
        position = self._position[row] + ahead
        self._ids[rows], self._position[rows], self._context_len[rows] = self._row(tokens), position, position + 1
        self._table[rows, : len(s.pages)] = self._table[row, : len(s.pages)]
        self._slot[rows] = self._table[row, position // PAGE] * PAGE + position % PAGE
        self._who[rows], self._adapter[rows] = self._count[rows], self._adapter[row]
        # attention takes the rows from here on as queries of one sequence
        together = row if row + 1 == first else first
        self._starts[together + 1 : stop], self._context_len[together] = stop, position[-1] + 1
        self._settings[rows], self._suppress[rows] = self._settings[row], self._suppress[row]
        for counter in self._counters:
            counter[rows] += ahead
        if p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty:  # else nobody looks at histories
            length = int(position[0])
            self._history[rows, :length] = self._history[row, :length]
            self._history[rows, length : length + len(tokens)] = self._row(tokens)

    def go_on(self, s: Sequence, row: int, count: int) -> None:
        """`row` read the last draft that was right, if any: the sequence, which has taken `count` tokens, goes on there."""
        for values in self._moved:
            values[s.row] = values[row]
        length = int(self._position[row]) + 1
        self._context_len[s.row] = length
        self._history[s.row, length - count : length] = self._row(s.tokens[-count:])

    def batch(self, rows: slice, pools: Pools | None = None) -> PagedBatch:
        """pools: of the adapters, where any row has one."""
        return PagedBatch(
            self.position[rows],
            self.slot[rows],
            self.block_table[rows],
            self.context_len[rows],
            self.starts[: rows.stop - rows.start + 1],
            self.cache.layers,
            None if pools is None else Adapters(self.adapter[rows], pools),
        )

    def draw(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(token, logprob, logits) of the rows, logits float32; each token is put where the next step reads it."""
        state = self.state.with_rows(self.who[rows])
        token, logprob, *_ = ops.sample(logits, state, entropy=False)
        ops.advance(
            token, state, self.position[rows], self.context_len[rows], self.block_table[rows], self.slot[rows],
            next_ids=self.ids[rows],
        )  # fmt: skip
        return token, logprob, logits
