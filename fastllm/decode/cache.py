"""The KV cache of one sequence: pages of 16 tokens for every layer, and the tensors that say where a token goes."""

import torch

from .. import ops
from ..models.arena import Arena
from ..models.blocks import PagedBatch
from ..models.decoder import DecoderConfig

PAGE = ops.PAGE


class SequenceCache:
    """Room for `capacity` tokens of one sequence.

    The pages are mapped at once and touched as they fill, so resident memory follows the longest sequence so far. The
    decode tensors (`ids`, `position`, `slot`, `context_len`) stay where they are: a replayed step reads and advances
    them. MemoryError when the system refuses the mapping.
    """

    def __init__(self, config: DecoderConfig, capacity: int):
        pages, c = -(-capacity // PAGE), config
        self.capacity = capacity
        # A page holds all layers, so that the first tokens of a sequence lie together on few huge pages of memory.
        size = self.nbytes_for(c, capacity)
        block = Arena(size).take(size).view(torch.float32).view(pages, c.layers, 2, c.kv_heads, c.head_dim, PAGE)
        self.pages = [
            ops.KVPages(block[:, i, 0], block[:, i, 1].view(pages, c.kv_heads, PAGE, c.head_dim))
            for i in range(c.layers)
        ]
        self.block_table = torch.arange(pages, dtype=torch.int32).unsqueeze(0)
        self.ids = torch.zeros(1, dtype=torch.int64)
        self.position = torch.zeros(1, dtype=torch.int64)
        self.slot = torch.zeros(1, dtype=torch.int64)
        self.context_len = torch.zeros(1, dtype=torch.int32)
        self._one = torch.tensor([0, 1], dtype=torch.int32)

    @staticmethod
    def nbytes_for(config: DecoderConfig, capacity: int) -> int:
        return -(-capacity // PAGE) * PAGE * config.layers * config.kv_heads * config.head_dim * 2 * 4

    def chunk(self, start: int, stop: int) -> PagedBatch:
        """The batch that appends tokens [start, stop)."""
        position = torch.arange(start, stop)
        return PagedBatch(
            position=position,
            slot=self.block_table[0, position // PAGE].long() * PAGE + position % PAGE,
            block_table=self.block_table,
            context_len=torch.tensor([stop], dtype=torch.int32),
            cu_q=torch.tensor([0, stop - start], dtype=torch.int32),
            pages=self.pages,
        )

    def next_token(self) -> PagedBatch:
        """The batch of one decode step; the same tensors every time."""
        return PagedBatch(self.position, self.slot, self.block_table, self.context_len, self._one, self.pages)

    def seek(self, length: int) -> None:
        """The next token to be advanced past is token `length - 1`: the state after a prefill of `length` tokens."""
        self.position.fill_(length - 1)
        self.context_len.fill_(length)
        page, offset = divmod(length - 1, PAGE)
        self.slot.fill_(int(self.block_table[0, page]) * PAGE + offset)
