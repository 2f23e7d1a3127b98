"""The tensors of decode steps, one row for each running sequence."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import ops
from ..models.blocks import Adapters, PagedBatch
from .adapters import Pools
from .cache import PAGE, KVCache, pages_for
from .scheduler import Sequence


class Rows:
    """The tensors of decode steps: row i is a sequence's next token, and where its keys and values go.

    A replayed step reads them and moves them on; Python writes to a row only when a sequence takes or leaves it. An
    empty row is padding: it sees no key, writes nowhere and draws nothing.
    """

    def __init__(self, cache: KVCache, count: int, capacity: int, eos_ids: Iterable[int]):
        self.cache, self._eos = cache, sorted(eos_ids)
        self.ids, self.position, self.slot = (torch.zeros(count, dtype=torch.int64) for _ in range(3))
        self.context_len = torch.zeros(count, dtype=torch.int32)
        self.block_table = torch.full((count, pages_for(capacity)), -1, dtype=torch.int32)
        self.who = torch.full((count,), -1, dtype=torch.int32)  # row of the sampler's state: the same, or nobody
        self.adapter = torch.full((count,), -1, dtype=torch.int64)
        self.state = ops.SampleState.create(count, history=capacity + 1, suppress=max(1, len(self._eos)))
        self._starts = torch.arange(count + 1, dtype=torch.int32)
        self.slot.fill_(-1)

    def seat(self, s: Sequence) -> None:
        """The row of `s` is about to read its last token and to draw the one after it."""
        ids, row = [*s.prompt, *s.tokens], s.row
        last = len(ids) - 1
        self.ids[row], self.position[row], self.context_len[row] = ids[last], last, len(ids)
        # the last token of a prompt may lie in a page that others read; then it is there, with the same bits
        self.slot[row] = s.pages[last // PAGE] * PAGE + last % PAGE if last >= s.known else -1
        self.block_table[row, : len(s.pages)] = torch.tensor(s.pages, dtype=torch.int32)
        self.who[row], self.adapter[row] = row, s.adapter.slot if s.adapter else -1
        self.state.set(row, s.params, index=s.index, seed=s.seed, prompt=ids, eos=self._eos)
        self.state.prompt_len[row] = len(s.prompt)

    def clear(self, row: int) -> None:
        self.ids[row] = self.position[row] = self.context_len[row] = 0
        self.slot[row] = self.who[row] = self.adapter[row] = -1

    def batch(self, rows: slice, pools: Pools | None = None) -> PagedBatch:
        """pools: of the adapters, where any row has one."""
        return PagedBatch(
            self.position[rows],
            self.slot[rows],
            self.block_table[rows],
            self.context_len[rows],
            self._starts[: rows.stop - rows.start + 1],
            self.cache.layers,
            None if pools is None else Adapters(self.adapter[rows], pools),
        )

    def draw(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(token, logprob, logits) of the rows; each token is put where the next step reads it."""
        state = self.state.with_rows(self.who[rows])
        token, logprob, *_ = ops.sample(logits, state, entropy=False)
        ops.advance(
            token, state, self.position[rows], self.context_len[rows], self.block_table[rows], self.slot[rows],
            next_ids=self.ids[rows],
        )  # fmt: skip
        return token, logprob, logits
