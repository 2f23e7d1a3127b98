"""Sequences of different lengths laid one after another, so that nothing is computed for padding."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True)
class Packed:
    """B sequences, one after another, of T tokens together.

    ids int64 [T]; position int64 [T], the place in its sequence (of a padded batch: the column); cu int32 [B + 1], where each
    begins; longest: tokens of the longest. Of a padded batch also its shape (B, S), and rows int64 [T], the place of each
    token in it, None where it has no padding.
    """

    ids: Tensor
    position: Tensor
    cu: Tensor
    longest: int
    shape: tuple[int, int] | None = None
    rows: Tensor | None = None

    @property
    def count(self) -> int:
        """B"""
        return self.cu.shape[0] - 1

    @property
    def cu_keys(self) -> Tensor:
        """cu as the borders of keys beside those of queries: while it compiles another tensor, as Dynamo takes none twice."""
        return self.cu.clone() if torch.compiler.is_compiling() else self.cu

    @classmethod
    def of_lists(cls, sequences: Sequence[Sequence[int]], device: torch.device | str | None = None) -> "Packed":
        """Sequences of token ids."""
        lengths = [len(s) for s in sequences]
        ids = torch.tensor([i for s in sequences for i in s], dtype=torch.int64)
        position = torch.cat([torch.arange(n) for n in lengths]) if lengths else ids
        cu = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).int()
        return cls(ids.to(device), position.to(device), cu.to(device), max(lengths, default=0))

    @classmethod
    def of_arrays(cls, sequences: Sequence[np.ndarray]) -> "Packed":
        """Sequences of token ids int64, at least one."""
        lengths = [len(s) for s in sequences]
        ids, position = torch.from_numpy(np.concatenate(sequences)), torch.cat([torch.arange(n) for n in lengths])
        return cls(ids, position, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))

    @classmethod
    def of_padded(cls, ids: Tensor, mask: Tensor | None = None) -> "Packed":
        """ids int64 [B, S]; mask [B, S], true or not 0 where there is a token: anywhere, left, right or with gaps."""
        if ids.dim() != 2:
            raise ValueError(f"ids have shape {tuple(ids.shape)}; they must be [B, S]")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}, the ids {tuple(ids.shape)}; they must be the same"
            )
        batch, columns = shape = tuple(ids.shape)
        position = torch.arange(columns, device=ids.device).expand(shape).reshape(-1)
        if mask is None or bool((kept := mask != 0).all()):
            cu = torch.arange(0, batch * columns + 1, columns or 1, dtype=torch.int32, device=ids.device)
            return cls(ids.reshape(-1), position, cu if columns else cu.new_zeros(batch + 1), columns, shape)
        rows, lengths = kept.reshape(-1).nonzero()[:, 0], kept.sum(1)
        cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return cls(ids.reshape(-1)[rows], position[rows], cu, int(lengths.max()), shape, rows)

    def to(self, device: torch.device | str) -> "Packed":
        """The same elsewhere."""
        rows = None if self.rows is None else self.rows.to(device)
        ids, position, cu = (x.to(device) for x in (self.ids, self.position, self.cu))
        return Packed(ids, position, cu, self.longest, self.shape, rows)

    def select(self, padded: Tensor) -> Tensor:
        """What stands at the tokens in [B, S, ...]: [T, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self.rows is None else flat[self.rows]

    def unpack(self, x: Tensor) -> Tensor:
        """[T, ...] in the padded batch that it came from: [B, S, ...], zeros where there is no token."""
        if self.shape is None:
            raise ValueError("these sequences came as lists; they have no padded form")
        if self.rows is not None:
            x = x.new_zeros((self.shape[0] * self.shape[1], *x.shape[1:])).index_copy(0, self.rows, x)
        return x.unflatten(0, self.shape)

    def first(self, x: Tensor) -> Tensor:
        """The first token of each sequence: [T, N] -> [B, N]. ValueError for a sequence without one."""
        self._check_filled()
        return x[self.cu[:-1].long()]

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the tokens of each sequence: [T, N] -> [B, N]. ValueError for a sequence without one."""
        self._check_filled()
        # first to last, in float32, whatever stands beside it: the same bits in any batch
        return torch.segment_reduce(x.float(), "mean", lengths=self.cu.diff().long(), unsafe=True).to(x.dtype)

    def _check_filled(self) -> None:
        empty = (self.cu.diff() == 0).nonzero()
        if len(empty):
            raise ValueError(f"sequence {empty[0].item()} has no token; there is nothing to pool")


def in_parts(sequences: Iterable[Item], tokens: int, size: Callable[[Item], int] = len) -> Iterator[list[Item]]:
    """In order, parts of up to so many tokens, or of one longer sequence. size: how many a sequence has."""
    part: list[Item] = []
    total = 0
    for sequence in sequences:
        count = size(sequence)
        if part and total + count > tokens:
            yield part
            part, total = [], 0
        part.append(sequence)
        total += count
    if part:
        yield part
