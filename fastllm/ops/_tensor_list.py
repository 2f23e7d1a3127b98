"""Many tensors in one call (csrc/records/tensor_list.h): a table of their pointers, each tensor cut in blocks of BLOCK
elements, and the blocks of all of them dealt out, to threads or to programs."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ._op import pointer
from ._triton import tl, triton

BLOCK = 16384  # elements; kListBlock


def blocks(tensors: Sequence[Tensor]) -> int:
    return sum(-(-t.numel() // BLOCK) for t in tensors)


Rows = tuple[tuple[int, ...], ...]


def rows(columns: Sequence[Sequence[Tensor | None]]) -> Rows:
    """For each tensor a pointer for each column (0 for None), and the number of elements."""
    return tuple((*map(pointer, row), row[0].numel()) for row in zip(*columns, strict=True))


def table(columns: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """[tensors, columns + 1] int64: the rows."""
    return torch.tensor(rows(columns), dtype=torch.int64, device="cpu")


def device_table(columns: Sequence[Sequence[Tensor | None]]) -> tuple[Tensor, Tensor, bool]:
    """(the table, for each block its tensor * 2^32 + its number in the tensor, whether every pointer is 16-aligned).

    Tables are kept: an optimizer's parameters stay where they are, and torch's allocator gives gradients the same places
    step after step, so that most calls copy nothing to the device. No copy waits for it either.
    """
    found, device = rows(columns), columns[0][0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    aligned = all(p % 16 == 0 for row in found for p in row[:-1])
    tensors, owner = _kept_table(found, device, stream), _kept_blocks(tuple(row[-1] for row in found), device, stream)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _CAPTURED.append((tensors, owner))
    return tensors, owner, aligned


_CAPTURED: list[tuple[Tensor, Tensor]] = []  # what a CUDA graph reads whenever it is replayed: never given back


@functools.lru_cache(maxsize=4096)
def _kept_table(found: Rows, device: torch.device, stream: int) -> Tensor:
    return torch.tensor(found, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


@functools.lru_cache(maxsize=256)
def _kept_blocks(lengths: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    counts = torch.tensor([-(-n // BLOCK) for n in lengths], dtype=torch.int64, device="cpu")
    tensor = torch.repeat_interleave(counts)
    number = torch.ones_like(tensor).cumsum(0) - 1 - (counts.cumsum(0) - counts)[tensor]
    return (tensor << 32 | number).to(device, non_blocking=True)


@triton.jit
def pointer_at(row, column: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer out of the table; vector loads need to know that it is aligned."""
    p = tl.load(row + column).to(tl.pointer_type(TYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


def element_type(dtype: torch.dtype):
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def check_lists(op: str, named: dict[str, Sequence[Tensor]]) -> None:
    """Every list as long as the first, its tensors of the first's shapes and device, and of one dtype within a list."""
    (first, tensors), *_ = named.items()
    if not tensors:
        raise ValueError(f"{op}: {first} is an empty list; pass at least one tensor")
    for name, others in named.items():
        if len(others) != len(tensors):
            raise ValueError(
                f"{op}: {len(others)} tensors in {name}, {len(tensors)} in {first}; one for each is needed"
            )
        for i, (t, o) in enumerate(zip(tensors, others, strict=True)):
            if o.shape != t.shape:
                raise ValueError(
                    f"{op}: {name}[{i}] is {tuple(o.shape)}, {first}[{i}] {tuple(t.shape)}; they must agree"
                )
            if o.device != tensors[0].device:
                raise ValueError(
                    f"{op}: {name}[{i}] is on {o.device}, {first}[0] on {tensors[0].device}; "
                    "make one call for each device"
                )
            if o.dtype != others[0].dtype:
                raise TypeError(
                    f"{op}: {name}[{i}] is {o.dtype}, {name}[0] {others[0].dtype}; make one call for each dtype"
                )
