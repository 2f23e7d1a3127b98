"""multi_lora: y[t] = x[t] W^T + scale_i * x[t] A_i^T B_i^T + bias, i = adapter_id[t]: each row has its adapter, or none.

x [..., K], adapter_id int64 [...], -1: none; W [N, K], a tensor, `Panels` or `QWeight`; bias [N]; y [..., N]. The adapters
lie in an `AdapterPool`; their ranks may differ. Dtypes and rounding as in `lora_linear`, whose bits every row has, whatever
stands beside it and in whatever order. Forward only: what serves. Asked for a gradient, the reference runs.

An id outside [-1, slots) or of an empty slot raises IndexError on the CPU; on a GPU, where asking would wait for the
device, such a row has no adapter.

Sources: Chen et al. 2023 (Punica, arXiv 2310.18547) for the batching of adapters.
"""

import torch
from torch import Tensor

from .. import _C
from ._op import DTYPES, Op, as_rows, check, pointer
from ._triton import tl, triton
from .linear import Panels, fields, unit_stride
from .lora_linear import base_reference, check_base, code, gpu_base, group, height, split
from .quant_linear import QWeight


class AdapterPool:
    """Room for `slots` adapters of up to `max_rank`, for one weight [cols, depth].

    Memory, fixed when made (a captured step keeps its pointers, and `add` and `remove` change what they point to):
    a [slots, ceil(max_rank / 16), depth, 16] and b [slots, ceil(cols / 16), max_rank, 16] are panels of 16 rows of A and
    of B, [.., i, .., j] of row 16 i + j; rank int64 [slots], 0 in an empty slot; scale float32 [slots]; gain float32
    [slots, cols] where the pool takes DoRA adapters (ones for the others). On a CPU a and b are float32.
    """

    def __init__(
        self,
        cols: int,
        depth: int,
        slots: int,
        max_rank: int,
        dora: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises ValueError for a size below one, or a dtype that the device does not read."""
        for name, size in (("cols", cols), ("depth", depth), ("slots", slots), ("max_rank", max_rank)):
            check(size >= 1, lambda name=name, size=size: f"AdapterPool: {name} is {size}, allowed: 1 and more")
        cpu = torch.device(device).type == "cpu"
        check(
            dtype in DTYPES and (dtype == torch.float32 or not cpu),
            lambda: (
                f"AdapterPool: dtype is {dtype}; on a CPU the pool is float32, which holds bfloat16 and float16 too"
            ),
        )
        self.cols, self.depth, self.slots, self.max_rank = cols, depth, slots, max_rank
        place = {"dtype": dtype, "device": device}
        self.a = torch.zeros(slots, -(-max_rank // 16), depth, 16, **place)
        self.b = torch.zeros(slots, -(-cols // 16), max_rank, 16, **place)
        self.rank = torch.zeros(slots, dtype=torch.int64, device=device)
        self.scale = torch.zeros(slots, dtype=torch.float32, device=device)
        self.gain = torch.ones(slots, cols, dtype=torch.float32, device=device) if dora else None

    def add(self, a: Tensor, b: Tensor, scale: float, gain: Tensor | None = None) -> int:
        """The id of an adapter a [R, depth], b [cols, R] from now on. gain [cols]: magnitude / norm of a DoRA adapter.

        Raises ValueError for shapes that do not fit or a rank above max_rank, RuntimeError when every slot is taken.
        """
        rank = a.shape[0]
        check(
            a.dim() == 2 and b.dim() == 2 and a.shape[1] == self.depth and b.shape == (self.cols, rank),
            lambda: (
                f"AdapterPool.add: a {tuple(a.shape)} and b {tuple(b.shape)} must be [R, {self.depth}] and "
                f"[{self.cols}, R]"
            ),
        )
        check(
            1 <= rank <= self.max_rank,
            lambda: (
                f"AdapterPool.add: rank {rank}, allowed: 1 to {self.max_rank}; make the pool with a larger max_rank"
            ),
        )
        check(
            gain is None or (self.gain is not None and gain.shape == (self.cols,)),
            lambda: f"AdapterPool.add: gain needs a pool made with dora=True, and the shape ({self.cols},)",
        )
        free = (self.rank == 0).nonzero()
        check(
            len(free) > 0, lambda: f"AdapterPool.add: all {self.slots} slots are taken; remove one first", RuntimeError
        )
        slot = int(free[0])
        for panels, matrix in ((self.a[slot], a), (self.b[slot], b)):
            rows = matrix.detach().to(panels.device, panels.dtype)
            rows = torch.nn.functional.pad(rows, (0, 0, 0, panels.shape[0] * 16 - rows.shape[0]))
            panels[:, : rows.shape[1]] = rows.view(panels.shape[0], 16, -1).transpose(1, 2)
        self.scale[slot] = scale
        if self.gain is not None:
            self.gain[slot] = 1.0 if gain is None else gain.detach().to(self.gain)
        self.rank[slot] = rank  # last: from here on the slot is in use
        return slot

    def remove(self, adapter: int) -> None:
        """Frees the slot of an adapter. IndexError where there is none."""
        self._check(adapter)
        self.rank[adapter] = 0

    def get(self, adapter: int) -> tuple[Tensor, Tensor, float, Tensor | None]:
        """a, b, scale and gain of an adapter, copies. IndexError where there is none."""
        self._check(adapter)
        rank, (a, b) = int(self.rank[adapter]), (self.a[adapter], self.b[adapter])
        return (
            a.transpose(1, 2).flatten(0, 1)[:rank].clone(),
            b[:, :rank].transpose(1, 2).flatten(0, 1)[: self.cols].clone(),
            float(self.scale[adapter]),
            None if self.gain is None else self.gain[adapter].clone(),
        )

    def _check(self, adapter: int) -> None:
        if not 0 <= adapter < self.slots or not int(self.rank[adapter]):
            used = self.rank.nonzero().flatten().tolist()
            raise IndexError(f"AdapterPool: there is no adapter {adapter}; there are {used} in {self.slots} slots")

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.a, self.b, self.rank, self.scale, self.gain) if t is not None)


# ---------------------------------------------------------------------------------------------------------- reference


def reference(x, weight, form, a, b, rank, scale, gain, adapter_id, bias) -> Tensor:
    z, cols = base_reference(x, weight, form), height(weight, form)
    for i in range(rank.shape[0]):
        r = int(rank[i])
        low_a = a[i].transpose(1, 2).flatten(0, 1)[:r].to(z.dtype)
        low_b = b[i, :, :r].transpose(1, 2).flatten(0, 1)[:cols].to(z.dtype)
        with_it = z + (scale[i].to(z.dtype) * (x.to(z.dtype) @ low_a.t())) @ low_b.t()
        if gain is not None:
            with_it = with_it * gain[i].to(z.dtype)
        z = torch.where(((adapter_id == i) & (rank[i] > 0)).unsqueeze(-1), with_it, z)
    if bias is not None:
        z = z + bias.to(z.dtype)
    return z.to(x.dtype).contiguous()


# ------------------------------------------------------------------------------------------------------------- Triton

LARGEST_RANK = 256  # of the Triton kernel: s of 16 rows is held in registers


@triton.jit
def kernel(
    y, x, a, b, rank, scale, gain, adapter, rows, cols, depth, max_rank, x_stride,
    HAS_GAIN: tl.constexpr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    # Of M rows, those of one adapter: s = scale * x A^T once, then y = (y + s B^T) * gain for this program's columns.
    slot = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    mine = tl.load(adapter + row, mask=row < rows, other=-1) == slot
    its_rank = tl.load(rank + slot)
    if (tl.max(mine.to(tl.int32), 0) > 0) & (its_rank > 0):
        r = tl.arange(0, R)
        acc = tl.zeros((M, R), tl.float32)
        panels = (slot * tl.cdiv(max_rank, 16) + r // 16) * depth * 16 + r % 16
        for start in range(0, depth, K):
            k = start + tl.arange(0, K)
            v = tl.load(x + row[:, None] * x_stride + k[None, :], mask=mine[:, None] & (k < depth)[None, :], other=0.0)
            w = tl.load(
                a + panels[None, :] + k[:, None] * 16, mask=(k < depth)[:, None] & (r < its_rank)[None, :], other=0.0
            )
            acc = tl.dot(v, w.to(v.dtype), acc, input_precision="ieee")
        s = (acc * tl.load(scale + slot)).to(y.dtype.element_ty)
        for first in range(tl.program_id(2) * N, cols, tl.num_programs(2) * N):
            n = first + tl.arange(0, N)
            at = ((slot * tl.cdiv(cols, 16) + n // 16)[None, :] * max_rank + r[:, None]) * 16 + (n % 16)[None, :]
            w = tl.load(b + at, mask=(r < its_rank)[:, None] & (n < cols)[None, :], other=0.0)
            out, inside = y + row[:, None] * cols + n[None, :], mine[:, None] & (n < cols)[None, :]
            low = tl.dot(s, w.to(s.dtype), input_precision="ieee")
            v = tl.load(out, mask=inside, other=0.0).to(tl.float32) + low
            if HAS_GAIN:
                v = v * tl.load(gain + slot * cols + n, mask=n < cols, other=0.0)[None, :]
            tl.store(out, v.to(y.dtype.element_ty), mask=inside)


def gpu(x, weight, form, a, b, rank, scale, gain, adapter_id, bias) -> Tensor:
    max_rank = b.shape[2]
    if max_rank > LARGEST_RANK:
        return reference(x, weight, form, a, b, rank, scale, gain, adapter_id, bias)
    rows = as_rows(x)
    y = gpu_base(rows, weight, form)
    if y.numel():
        block = max(16, triton.next_power_of_2(max_rank))
        kernel[(triton.cdiv(rows.shape[0], 16), a.shape[0], min(4, triton.cdiv(y.shape[1], 64)))](
            y, rows, a, b, rank, scale, y if gain is None else gain, adapter_id.contiguous(),
            rows.shape[0], y.shape[1], rows.shape[1], max_rank, rows.stride(0),
            HAS_GAIN=gain is not None, M=16, K=64 if block <= 64 else 32, N=64, R=block, num_warps=4,
        )  # fmt: skip
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], y.shape[1])


# ----------------------------------------------------------------------------------------------------------- launchers


def cpu(x, weight, form, a, b, rank, scale, gain, adapter_id, bias) -> Tensor:
    y = torch.empty((*x.shape[:-1], height(weight, form)), dtype=x.dtype)
    if y.numel():
        ids, rows, weight = adapter_id.contiguous(), as_rows(x), weight if form else unit_stride(weight)
        status = _C.multi_lora(
            *fields(y, rows, weight, code(form), bias, group=group(weight, form)),
            a.data_ptr(), b.data_ptr(), pointer(gain), rank.data_ptr(), scale.data_ptr(), ids.data_ptr(),
            a.shape[0], b.shape[2],
        )  # fmt: skip
        if status:
            bad = (ids != -1) & ((ids < 0) | (ids >= a.shape[0]) | (rank[ids.clamp(0, a.shape[0] - 1)] == 0))
            at = bad.nonzero()[0].tolist()
            raise IndexError(
                f"multi_lora: adapter_id {ids[tuple(at)].item()} at position {tuple(at)} is no adapter of the pool; "
                f"there are {rank.nonzero().flatten().tolist()}, and -1 for none"
            )
    return y


# -------------------------------------------------------------------------------------------------------- registration

forward = Op(
    "multi_lora(Tensor x, Tensor weight, int[] form, Tensor a, Tensor b, Tensor rank, Tensor scale, Tensor? gain,"
    " Tensor adapter_id, Tensor? bias) -> Tensor",
    reference=reference,
    fake=lambda x, weight, form, a, b, rank, scale, gain, adapter_id, bias: torch.empty(
        (*x.shape[:-1], height(weight, form)), dtype=x.dtype, device=x.device
    ),
    cpu=cpu,
    triton=gpu,
)


def multi_lora(
    x: Tensor, weight: Tensor | Panels | QWeight, pool: AdapterPool, adapter_id: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x [..., K] through W [N, K] and, row by row, the adapter adapter_id [...] of the pool (-1: none) -> [..., N].

    Raises IndexError for an id that is no adapter of the pool, ValueError for shapes and devices that do not fit,
    TypeError for dtypes. See the head of this file.
    """
    check_base("multi_lora", x, weight, bias)
    rows, depth = weight.shape
    check(
        (pool.cols, pool.depth) == (rows, depth),
        lambda: f"multi_lora: the pool is for weights {(pool.cols, pool.depth)}, this one is {(rows, depth)}",
    )
    check(
        pool.a.device == x.device == adapter_id.device,
        lambda: f"multi_lora: x is on {x.device}, the pool on {pool.a.device}, adapter_id on {adapter_id.device}",
    )
    check(
        adapter_id.dtype == torch.int64,
        lambda: f"multi_lora: adapter_id is {adapter_id.dtype}; convert it with .long()",
        TypeError,
    )
    check(
        adapter_id.shape == x.shape[:-1],
        lambda: (
            f"multi_lora: adapter_id has shape {tuple(adapter_id.shape)}, want {tuple(x.shape[:-1])}: one a row of x"
        ),
    )
    return forward(x, *split(weight), pool.a, pool.b, pool.rank, pool.scale, pool.gain, adapter_id, bias)
