"""Many tensors in one call (csrc/records/tensor_list.h): a table of their pointers, each tensor cut in blocks of BLOCK
elements, and the blocks of all of them dealt out, to threads or to programs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import tl, triton

BLOCK = 16384  # elements; kListBlock


def blocks(tensors: Sequence[Tensor]) -> int:
    return sum(-(-t.numel() // BLOCK) for t in tensors)


def table(columns: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """[tensors, columns + 1] int64: a pointer for each column (0 for None), and the number of elements."""
    rows = [[*(0 if t is None else t.data_ptr() for t in row), row[0].numel()] for row in zip(*columns, strict=True)]
    return torch.tensor(rows, dtype=torch.int64)


def device_table(columns: Sequence[Sequence[Tensor | None]]) -> tuple[Tensor, Tensor, bool]:
    """(the table, for each block its tensor * 2^32 + its number in the tensor, whether every pointer is 16-aligned); the
    first two are views of one tensor, which goes to the device in one copy."""
    rows = table(columns)
    counts = torch.tensor([-(-t.numel() // BLOCK) for t in columns[0]], dtype=torch.int64)
    tensor = torch.repeat_interleave(torch.arange(len(counts)), counts)
    number = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    whole = torch.cat((rows.flatten(), tensor << 32 | number)).to(columns[0][0].device)
    aligned = not (rows[:, :-1] % 16).any().item()
    return whole[: rows.numel()].view(rows.shape), whole[rows.numel() :], aligned


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
