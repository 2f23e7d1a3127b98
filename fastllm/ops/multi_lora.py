"""multi_lora: y[t] = x[t] W^T + scale_i * x[t] A_i^T B_i^T + bias, i = adapter_id[t]: each row has its adapter, or none.

x [..., K], adapter_id int64 [...], -1: none; W [N, K], a tensor, `Panels` or `QWeight`; bias [N]; y [..., N]. The adapters
lie in an `AdapterPool`; their ranks may differ. Dtypes and rounding as in `lora_linear`, whose bits every row has, whatever
stands beside it and in whatever order (on a GPU where the pool is exact). Forward only: what serves. Asked for a gradient, the
reference runs.

A weight may stack parts (q, k and v): each part of an adapter has an A, a B, a rank and a scale of its own, or is absent.
Around it stand norm, residual and swiglu as in `linear` and `quant_linear`, with their bits: those of a row without an
adapter are those of the plain op. The adapter reads norm(x); swiglu is that of a pool made with swiglu=True.

An id outside [-1, slots) or of an empty slot raises IndexError on the CPU; on a GPU, where asking would wait for the
device, such a row has no adapter.

Sources: Chen et al. 2023 (Punica, arXiv 2310.18547) for the batching of adapters.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _C
from ._dot import accumulate
from ._fused_linear import check_fusion
from ._linear_exact import rank_block
from ._lora_gpu import EXACT_K, EXACT_ROWS
from ._op import DTYPES, Op, as_rows, check, pointer
from ._triton import tl, triton
from .linear import SWIGLU, WHOLE, Panels, fields, unit_stride
from .lora_linear import base_reference, check_base, code, gpu_base, group, height, split
from .quant_linear import QWeight
from .rms_norm import rms_norm
from .swiglu import swiglu as swiglu_op

Part = tuple[Tensor, Tensor, float]  # a [R, K], b [N of the part, R], scale


class AdapterPool:
    """Room for `slots` adapters of up to `max_rank`, for one weight [cols, depth] or one that stacks parts of `cols` rows.

    Memory, fixed when made (a captured step keeps its pointers, and `add` and `remove` change what they point to):
    a [slots, parts, ceil(max_rank / 16), depth, 16] and b [slots, panels, max_rank, 16] are panels of 16 rows of A and of
    B, [.., i, .., j] of row 16 i + j; with swiglu the panels of B's halves alternate, as the weight's do. rank int64
    [slots, parts], -1 in an empty slot, and scale float32 [slots, parts]; part int64 [panels], the part of a panel; gain
    float32 [slots, panels, 16] where the pool takes DoRA adapters (ones for the others). On a CPU a and b are float32.

    Parts that do not begin at a multiple of 16 rows are held as one part: A stacked, B block-wise, zeros elsewhere.
    """

    def __init__(
        self,
        cols: int | Sequence[int],
        depth: int,
        slots: int,
        max_rank: int,
        dora: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        swiglu: bool = False,
        exact: bool = False,
        take: Callable[[int], Tensor] | None = None,
    ) -> None:
        """exact: on a GPU too `multi_lora` holds the contract, as on a CPU it always does. take: gives a and b their memory, so
        many zero bytes; None: torch does.

        Raises ValueError for a size below one, parts that swiglu cannot have, or a dtype that the device does not read."""
        self.sizes = (cols,) if isinstance(cols, int) else tuple(cols)
        sizes = (("cols", min(self.sizes, default=0)), ("depth", depth), ("slots", slots), ("max_rank", max_rank))
        for name, size in sizes:
            check(size >= 1, lambda name=name, size=size: f"AdapterPool: {name} is {size}, allowed: 1 and more")
        cpu = torch.device(device).type == "cpu"
        check(
            dtype in DTYPES and (dtype == torch.float32 or not cpu),
            lambda: (
                f"AdapterPool: dtype is {dtype}; on a CPU the pool is float32, which holds bfloat16 and float16 too"
            ),
        )
        self.cols, self.depth, self.slots, self.max_rank, self.swiglu = sum(self.sizes), depth, slots, max_rank, swiglu
        self.exact = exact
        halves = 2 if swiglu else 1
        check(
            not swiglu or (self.cols % 2 == 0 and set(self.sizes) <= {self.cols, self.cols // 2}),
            lambda: f"AdapterPool: parts of {self.sizes} rows with swiglu; allowed: one of 2F rows, or two of F",
        )
        panels = -(-self.cols // halves // 16) * halves
        self._stacked = not swiglu and any(size % 16 for size in self.sizes[:-1])
        self.held = (self.cols,) if self._stacked else self.sizes
        if swiglu:
            part = [panel % len(self.held) for panel in range(panels)]
        else:
            part = [i for i, size in enumerate(self.held) for _ in range(-(-size // 16))]
        self.max_rank_of_part = max_rank
        if self._stacked:
            self.max_rank = max_rank = max_rank * len(self.sizes)
        place = {"dtype": dtype, "device": device}
        shapes = (slots, len(self.held), -(-max_rank // 16), depth, 16), (slots, panels, max_rank, 16)
        self.a, self.b = (
            torch.zeros(shape, **place)
            if take is None
            else take(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
            for shape in shapes
        )
        self.rank = torch.full((slots, len(self.held)), -1, dtype=torch.int64, device=device)
        self.scale = torch.zeros(slots, len(self.held), dtype=torch.float32, device=device)
        self.part = torch.tensor(part, dtype=torch.int64, device=device)
        self.gain = torch.ones(slots, panels, 16, dtype=torch.float32, device=device) if dora else None

    def add(self, a: Tensor, b: Tensor, scale: float, gain: Tensor | None = None, slot: int | None = None) -> int:
        """The id of an adapter a [R, depth], b [cols, R] from now on. gain [cols]: magnitude / norm of a DoRA adapter.

        Raises as `add_parts`.
        """
        return self.add_parts([(a, b, scale)], gain, slot)

    def add_parts(self, parts: Sequence[Part | None], gain: Tensor | None = None, slot: int | None = None) -> int:
        """The id of an adapter whose parts are (a [R, depth], b [size, R], scale), or None where it leaves one as it is;
        slot: the id that it is to have.

        Raises ValueError for shapes that do not fit or a rank above max_rank, RuntimeError when every slot is taken, or
        the one that is asked for.
        """
        check(
            len(parts) == len(self.sizes),
            lambda: f"AdapterPool.add: {len(parts)} parts; this pool's weight has {len(self.sizes)}",
        )
        given = [(part, size) for part, size in zip(parts, self.sizes, strict=True) if part is not None]
        for (a, b, _), size in given:
            rank, most = a.shape[0], self.max_rank_of_part
            check(
                a.dim() == 2 and b.dim() == 2 and a.shape[1] == self.depth and b.shape == (size, rank),
                lambda a=a, b=b, size=size: (
                    f"AdapterPool.add: a {tuple(a.shape)} and b {tuple(b.shape)} must be [R, {self.depth}] and "
                    f"[{size}, R]"
                ),
            )
            check(
                1 <= rank <= most,
                lambda rank=rank, most=most: (
                    f"AdapterPool.add: rank {rank}, allowed: 1 to {most}; make the pool with a larger max_rank"
                ),
            )
        check(
            gain is None or (self.gain is not None and gain.shape == (self.cols,)),
            lambda: f"AdapterPool.add: gain needs a pool made with dora=True, and the shape ({self.cols},)",
        )
        free = (self.rank[:, 0] < 0).nonzero().flatten().tolist()
        check(bool(free), lambda: f"AdapterPool.add: all {self.slots} slots are taken; remove one first", RuntimeError)
        check(
            slot is None or slot in free,
            lambda: f"AdapterPool.add: slot {slot} is taken or is none; free are {free}",
            RuntimeError,
        )
        self._put(free[0] if slot is None else slot, self._stack(parts) if self._stacked else parts, gain)
        return free[0] if slot is None else slot

    def _stack(self, parts: Sequence[Part | None]) -> list[Part | None]:
        given = [part for part in parts if part is not None]
        if not given:
            return [None]
        scale = given[0][2]
        none = given[0][1].new_zeros

        def its_b(part: Part | None, size: int) -> Tensor:
            if part is None:
                return none(size, 0)
            return part[1] if part[2] == scale else part[1] * (part[2] / scale)

        b = map(its_b, parts, self.sizes)
        return [(torch.cat([a for a, _, _ in given]), torch.block_diag(*b), scale)]

    def _put(self, slot: int, parts: Sequence[Part | None], gain: Tensor | None) -> None:
        whole, first = torch.zeros(self.cols, self.max_rank, dtype=torch.float32, device="cpu"), 0
        for i, (part, size) in enumerate(zip(parts, self.held, strict=True)):
            if part is not None:
                a, b, scale = part
                rows = torch.nn.functional.pad(a.detach().to(self.a), (0, 0, 0, -a.shape[0] % 16))
                self.a[slot, i, : rows.shape[0] // 16] = rows.unflatten(0, (-1, 16)).transpose(1, 2)
                whole[first : first + size, : a.shape[0]] = b.detach()
                self.scale[slot, i] = scale
            first += size
        self.b[slot] = self._to_panels(whole)
        if self.gain is not None:
            column = torch.ones(self.cols, 1, dtype=torch.float32, device="cpu")
            if gain is not None:
                column[:, 0] = gain.detach()
            self.gain[slot] = self._to_panels(column)[:, 0]
        ranks = [0 if part is None else part[0].shape[0] for part in parts]
        self.rank[slot] = torch.tensor(ranks, dtype=torch.int64, device="cpu")  # last: from here on the slot is in use

    def _to_panels(self, rows: Tensor) -> Tensor:
        """[cols, R] -> [panels, R, 16]"""
        halves = rows.unflatten(0, (1 + self.swiglu, -1))
        halves = torch.nn.functional.pad(halves, (0, 0, 0, -halves.shape[1] % 16)).unflatten(1, (-1, 16))
        return halves.transpose(0, 1).flatten(0, 1).transpose(1, 2)

    def remove(self, adapter: int) -> None:
        """Frees the slot of an adapter. IndexError where there is none."""
        self._check(adapter)
        self.rank[adapter] = -1

    def grown(
        self, slots: int, max_rank: int, dora: bool, take: Callable[[int], Tensor] | None = None
    ) -> "AdapterPool":
        """A larger pool that holds the same adapters under the same ids."""
        place = {
            "dtype": self.a.dtype,
            "device": self.a.device,
            "swiglu": self.swiglu,
            "exact": self.exact,
            "take": take,
        }
        pool = AdapterPool(self.sizes, self.depth, slots, max_rank, dora, **place)
        for slot in in_use(self.rank):
            pool.a[slot, :, : self.a.shape[2]] = self.a[slot]
            pool.b[slot, :, : self.max_rank] = self.b[slot]
        for name in ("rank", "scale") if self.gain is None else ("rank", "scale", "gain"):
            getattr(pool, name)[: self.slots] = getattr(self, name)
        return pool

    def get(self, adapter: int, part: int = 0) -> tuple[Tensor, Tensor, float, Tensor | None]:
        """a, b, scale and gain of a part of an adapter, copies. IndexError where there is none."""
        self._check(adapter)
        rank, first = int(self.rank[adapter, part]), sum(self.held[:part])
        rows = slice(first, first + self.held[part])
        gain = None if self.gain is None else from_panels(self.gain[adapter].unsqueeze(1), self.cols, self.swiglu)
        return (
            self.a[adapter, part].transpose(1, 2).flatten(0, 1)[:rank].clone(),
            from_panels(self.b[adapter], self.cols, self.swiglu)[rows, :rank].clone(),
            float(self.scale[adapter, part]),
            None if gain is None else gain[rows, 0].clone(),
        )

    def _check(self, adapter: int) -> None:
        if not 0 <= adapter < self.slots or int(self.rank[adapter, 0]) < 0:
            raise IndexError(
                f"AdapterPool: there is no adapter {adapter}; there are {in_use(self.rank)} in {self.slots} slots"
            )

    @property
    def nbytes(self) -> int:
        held = (self.a, self.b, self.rank, self.scale, self.part, self.gain)
        return sum(t.nbytes for t in held if t is not None)


def in_use(rank: Tensor) -> list[int]:
    """The slots that hold an adapter."""
    return (rank[:, 0] >= 0).nonzero().flatten().tolist()


def from_panels(panels: Tensor, cols: int, swiglu: bool) -> Tensor:
    """[panels, R, 16] -> [cols, R]"""
    halves = panels.transpose(1, 2).unflatten(0, (-1, 1 + swiglu)).transpose(0, 1).flatten(1, 2)
    return halves[:, : cols // (1 + swiglu)].flatten(0, 1)


# ---------------------------------------------------------------------------------------------------------- reference


def reference(
    x, weight, form, a, b, rank, scale, gain, part, adapter_id, bias, norm, eps, residual, swiglu, exact
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    v = x.to(wide)
    if norm is not None:
        v = (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * norm.to(wide)).to(x.dtype).to(wide)
    z, cols = base_reference(v.to(x.dtype), weight, form, swiglu), height(weight, form)
    for i in range(rank.shape[0]):
        with_it = z
        for p in range(rank.shape[1]):
            held = torch.arange(b.shape[2], device=b.device) < rank[i, p]  # a mask: a number would wait for the GPU
            low_a = torch.where(held[:, None], a[i, p].transpose(1, 2).flatten(0, 1)[: b.shape[2]].to(wide), 0)
            its = held[None, :, None] & (part == p)[:, None, None]
            low_b = from_panels(torch.where(its, b[i].to(wide), 0), cols, swiglu)
            with_it = with_it + (scale[i, p].to(wide) * (v @ low_a.t())) @ low_b.t()
        if gain is not None:
            with_it = with_it * from_panels(gain[i].unsqueeze(1), cols, swiglu)[:, 0].to(wide)
        z = torch.where(((adapter_id == i) & (rank[i, 0] >= 0)).unsqueeze(-1), with_it, z)
    if bias is not None:
        z = z + bias.to(wide)
    if swiglu:
        gate, up = z.chunk(2, -1)
        z = torch.nn.functional.silu(gate) * up
    if residual is not None:
        z = z + residual.to(wide)
    return z.to(x.dtype).contiguous()


# ------------------------------------------------------------------------------------------------------------- Triton

LARGEST_RANK = 256  # of the Triton kernel: s of 16 rows is held in registers; exact takes it in pieces


@triton.jit
def kernel(
    y, x, a, b, rank, scale, gain, part, adapter, rows, cols, depth, max_rank, x_stride, half,
    HAS_GAIN: tl.constexpr, PARTS: tl.constexpr, HALVES: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, PANELS: tl.constexpr, R: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    # Of M rows, those of one adapter: s = scale * x A^T once a part, then y = (y + s B^T) * gain for this program's panels.
    # Masks say yes or no to 16 neighbours at once, so that loads are as wide as they can be. WHOLE: so do those of y.
    # EXACT: y is float32, and its sum goes on, R of r at a time.
    slot = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    mine = tl.load(adapter + row, mask=row < rows, other=-1) == slot
    if tl.max(mine.to(tl.int32), 0) == 0:
        return
    count = tl.cdiv(half, 16) * HALVES
    lane = tl.arange(0, 16)
    for p in range(PARTS):
        its_rank = tl.load(rank + slot * PARTS + p)
        for chunk in range(CHUNKS):
            last = HAS_GAIN and (chunk == CHUNKS - 1) & (its_rank >= 0)  # an empty slot's gain is no adapter's
            r = chunk * R + tl.arange(0, R)
            if (chunk * R < its_rank) | last:
                its_a = a + ((slot * PARTS + p) * tl.cdiv(max_rank, 16) + r // 16) * depth * 16 + r % 16
                used = r // 16 < tl.cdiv(its_rank, 16)
                acc = tl.zeros((M, R), tl.float32)
                for start in range(0, depth, K):
                    k = start + tl.arange(0, K)
                    v = tl.load(
                        x + row[:, None] * x_stride + k[None, :], mask=mine[:, None] & (k < depth)[None, :], other=0.0
                    )
                    w = tl.load(its_a[None, :] + k[:, None] * 16, mask=(k < depth)[:, None] & used[None, :], other=0.0)
                    acc = accumulate(acc, v, w.to(v.dtype))
                acc *= tl.load(scale + slot * PARTS + p)
                s = tl.where((r < its_rank)[None, :], acc, 0.0).to(x.dtype.element_ty)
                for first in range(tl.program_id(2) * PANELS, count, tl.num_programs(2) * PANELS):
                    panel = first + tl.arange(0, PANELS)
                    its = tl.load(part + panel, mask=panel < count, other=-1) == p
                    if tl.max(its.to(tl.int32), 0) > 0:
                        at = ((slot * count + panel)[None, :] * max_rank + r[:, None]) * 16
                        inside = ((r < max_rank)[:, None] & its[None, :])[:, :, None] & (lane >= 0)[None, None, :]
                        w = tl.load(b + at[:, :, None] + lane[None, None, :], mask=inside, other=0.0)
                        w = tl.reshape(w.to(s.dtype), [R, PANELS * 16])
                        within = (panel // HALVES * 16)[:, None] + lane[None, :]  # its half
                        col, inside = within + (panel % HALVES * half)[:, None], its[:, None] & (lane >= 0)[None, :]
                        if not WHOLE:
                            inside = inside & (within < half)
                        out, inside = y + row[:, None, None] * cols + col[None], mine[:, None, None] & inside[None]
                        v = tl.load(out, mask=inside, other=0.0).to(tl.float32)
                        if EXACT:
                            v = tl.dot(s, w, tl.reshape(v, [M, PANELS * 16]), input_precision="ieee")
                            v = tl.reshape(v, [M, PANELS, 16])
                        else:
                            v += tl.reshape(tl.dot(s, w, input_precision="ieee"), [M, PANELS, 16])
                        if last:
                            its_gain = gain + (slot * count + panel)[:, None] * 16 + lane[None, :]
                            v = v * tl.load(its_gain, mask=its[:, None] & (lane >= 0)[None, :], other=0.0)[None]
                        tl.store(out, v.to(y.dtype.element_ty), mask=inside)
                if CHUNKS > 1:
                    tl.debug_barrier()  # the next one goes on from what other threads have written


TILE, COLS = 16, 1024  # rows and columns of a program
MOST_K, A_BYTES, MOST_PANELS, B_ROWS = 256, 1 << 13, 16, 256  # of A and B that it reads at once


def gpu(x, weight, form, a, b, rank, scale, gain, part, adapter_id, bias, norm, eps, residual, swiglu, exact) -> Tensor:
    max_rank, (slots, parts), halves = b.shape[2], rank.shape, 1 + swiglu
    if max_rank > LARGEST_RANK and not exact:
        around = bias, norm, eps, residual, swiglu, exact
        return reference(x, weight, form, a, b, rank, scale, gain, part, adapter_id, *around)
    rows = as_rows(x if norm is None else rms_norm(x, norm, eps))
    y = gpu_base(rows, weight, form, swiglu, exact)
    if y.numel():
        block, tile = max(16, triton.next_power_of_2(max_rank)), TILE
        k, panels = max(16, min(MOST_K, A_BYTES // (block * a.itemsize))), max(4, min(MOST_PANELS, B_ROWS // block))
        if exact:
            block, tile, k, panels = rank_block(max_rank), EXACT_ROWS[rows.itemsize], EXACT_K[rows.itemsize], 4
        blocks = triton.cdiv(rows.shape[0], tile)
        # Each share of the columns makes s anew: few of them where rows fill the device.
        shares = min(triton.cdiv(y.shape[1], COLS), max(4, 64 // blocks))
        kernel[(blocks, slots, shares)](
            y, rows, a, b, rank, scale, y if gain is None else gain, part, adapter_id.contiguous(),
            rows.shape[0], y.shape[1], rows.shape[1], max_rank, rows.stride(0), y.shape[1] // halves,
            HAS_GAIN=gain is not None, PARTS=parts, HALVES=halves, WHOLE=y.shape[1] // halves % 16 == 0, EXACT=exact, M=tile, K=k,
            PANELS=panels, R=block, CHUNKS=triton.cdiv(max_rank, block), num_warps=4,
        )  # fmt: skip
    if bias is not None:
        y += bias
    if swiglu:
        y = y.to(x.dtype) if residual is None else y.to(x.dtype).float()
        y = swiglu_op(*y.chunk(2, -1))
    y = y.view(*x.shape[:-1], y.shape[1])
    return (y if residual is None else y + residual).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------- launchers


def cpu(x, weight, form, a, b, rank, scale, gain, part, adapter_id, bias, norm, eps, residual, swiglu, exact) -> Tensor:
    y = torch.empty((*x.shape[:-1], height(weight, form) // (1 + swiglu)), dtype=x.dtype, device=x.device)
    if y.numel():
        ids, rows, weight = adapter_id.contiguous(), as_rows(x), weight if form else unit_stride(weight)
        other, halves = None if residual is None else as_rows(residual), SWIGLU if swiglu else WHOLE
        status = _C.multi_lora(
            *fields(y, rows, weight, code(form), bias, norm, eps, other, halves, group(weight, form)),
            a.data_ptr(), b.data_ptr(), pointer(gain), rank.data_ptr(), scale.data_ptr(), part.data_ptr(),
            ids.data_ptr(), *rank.shape, *b.shape[1:3],
        )  # fmt: skip
        if status:
            bad = (ids != -1) & ((ids < 0) | (ids >= a.shape[0]) | (rank[ids.clamp(0, a.shape[0] - 1), 0] < 0))
            at = bad.nonzero()[0].tolist()
            raise IndexError(
                f"multi_lora: adapter_id {ids[tuple(at)].item()} at position {tuple(at)} is no adapter of the pool; "
                f"there are {in_use(rank)}, and -1 for none"
            )
    return y


# -------------------------------------------------------------------------------------------------------- registration

forward = Op(
    "multi_lora(Tensor x, Tensor weight, int[] form, Tensor a, Tensor b, Tensor rank, Tensor scale, Tensor? gain,"
    " Tensor part, Tensor adapter_id, Tensor? bias, Tensor? norm, float eps, Tensor? residual, bool swiglu, bool exact)"
    " -> Tensor",
    reference=reference,
    fake=lambda x, weight, form, a, b, rank, scale, gain, part, adapter_id, bias, norm, eps, residual, swiglu, exact: (
        torch.empty((*x.shape[:-1], height(weight, form) // (1 + swiglu)), dtype=x.dtype, device=x.device)
    ),
    cpu=cpu,
    triton=gpu,
    triton_name="cuBLAS, Triton",
    triton_reason="the products with the weight by torch, what stands around them in Triton",
)


def multi_lora(
    x: Tensor,
    weight: Tensor | Panels | QWeight,
    pool: AdapterPool,
    adapter_id: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
) -> Tensor:
    """x [..., K] through W [N, K] and, row by row, the adapter adapter_id [...] of the pool (-1: none) -> [..., N].

    norm [K] and eps: of an RMS norm of x; residual [..., N]: added last; with a pool made with swiglu=True y is [..., N/2].
    Raises IndexError for an id that is no adapter of the pool, ValueError for shapes and devices that do not fit,
    TypeError for dtypes. See the head of this file.
    """
    check_base("multi_lora", x, weight, bias, pool.swiglu)
    check_fusion("multi_lora", x, weight, bias, norm, residual, pool.swiglu)
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
    return forward(
        x, *split(weight), pool.a, pool.b, pool.rank, pool.scale, pool.gain, pool.part, adapter_id, bias, norm, eps,
        residual, pool.swiglu, pool.exact,
    )  # fmt: skip
