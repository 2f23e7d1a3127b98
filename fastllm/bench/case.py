"""A case is one call of an op; a suite is all that is known of an op from outside: how to call it, what it must equal,
where it must hold and what it costs. One record drives the tests, the contract and the benchmark."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]
LARGE = 1 << 22  # elements: a tensor above it is drawn on its own device, in time for a benchmark


@dataclass(frozen=True)
class Make:
    """Draws inputs: random, on one device, in one dtype, from one seed. On the device "meta" they are shapes alone."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        if self.device != "cpu" and math.prod(shape) > LARGE:
            seed = int(torch.randint(1 << 62, (), generator=self.generator))
            there = torch.Generator(self.device).manual_seed(seed)
            return torch.randn(shape, generator=there, dtype=dtype or self.dtype, device=self.device).mul_(scale)
        values = torch.randn(shape, generator=self.generator) * scale
        return values.to(dtype or self.dtype).to(self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randint(low, high, shape, generator=self.generator, dtype=dtype).to(self.device)


@dataclass(frozen=True)
class Case:
    """label: what tables print. inputs(make) -> keyword arguments of the op. bytes and flops: the fewest that the
    forward must move and compute, for elements of `itemsize` bytes; backward_bytes and backward_flops likewise.
    apart: whether a row of it alone is a call of the same meaning; not where the row's place counts, as for dropout.
    plain: whether a benchmark times plain PyTorch and its compiled form; not where they need more memory than there is."""

    label: str
    inputs: Callable[[Make], Inputs]
    bytes: Callable[[int], int] = lambda itemsize: 0
    flops: int = 0
    backward_bytes: Callable[[int], int] = lambda itemsize: 0
    backward_flops: int = 0
    apart: bool = True
    plain: bool = True


@dataclass(frozen=True)
class Suite:
    """op: its name. run(**inputs): the public op. reference(**inputs): plain PyTorch at the inputs' own dtype (float64
    makes it the oracle). peers: other implementations to time, name -> callable(**inputs).
    gpu: cases of a GPU's size, timed there in the place of `benchmark`, where there are some. gradients: names of the
    inputs that receive one. rows: names of the inputs whose first dimension is a batch of independent rows; the
    contract test cuts them. dtypes: what the CPU kernel takes. peak: what its flops run on and are compared with,
    "fma" (fp32) or "dot" (8-bit products). error: how many times plain PyTorch's error is allowed; more than 2 where
    the contract's order of additions costs accuracy; gradient_error: likewise of the gradients. cancelled: what a
    gradient may be off where terms of size one cancel (2^9 times it in 16 bits), as dout . v and rowsum(dout * out)
    do for a query that sees one key. copy: of the inputs, for calls that take turns with them; a deepcopy, unless
    their memory is of a special kind."""

    op: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    correct: tuple[Case, ...]
    benchmark: tuple[Case, ...]
    gpu: tuple[Case, ...] = ()
    gradients: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    peak: str = "fma"
    error: float = 2.0
    gradient_error: float = 2.0
    cancelled: float = 0.0
    copy: Callable[[Inputs], Inputs] = copy.deepcopy


def as_tuple(output: Any) -> tuple[torch.Tensor, ...]:
    """An op's outputs, however many, as a tuple."""
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)
