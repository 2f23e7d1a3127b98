"""quant_linear: y = norm(x) W^T + bias (+ residual, or silu(gate) * up) with weights of 4 or 8 bits, and its embedding.

x [..., K] float32, weight a `QWeight` [N, K], y [..., N] float32.
Arithmetic: within each 32 along K, x becomes s8, round(x * (127 / max|x|)), with scale max|x| / 127; a weight is
scale * (q - zero) or scale * q + minimum, with float16 scale and minimum per row and group of 32, 64 or 128 along K (the
last may be shorter). Integer sums of 32 are exact; the scaled sum runs over them ascending in float32 FMAs, so one row
alone and a thousand give the same bits, and larger groups those of groups of 32 that repeat their scales.
32 of x whose max|x| is below 1e-35 count as zeros; a NaN or an infinity makes its row NaN.

QWeight holds what the file holds, without loss: Q4_0 (4 bits, zero 8), Q4_1 (4 bits, minimum), Q8_0 (8 bits, zero 128
after the shift to unsigned). `QWeight.quantize` makes int4 and int8, symmetric or affine, from float weights.
Sources: GGUF's block formats; Dettmers et al. 2022 (arXiv 2208.07339) for row-wise activation scales.
On a GPU the weight keeps this layout (`QWeight.to`) and the arithmetic is the same, 32 by 32, on the tensor cores: the
integer sums and the chain over them have the CPU's bits; the norm before and silu after them have their own.
Backward: the weight is frozen; dx = dy W in float32 with the dequantised weight, as if x had not been rounded, a panel
of it dequantised at a time (on a GPU 16 million weights, for cuBLAS). A fused call that needs a gradient runs as the ops
that it fuses: the same bits.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import _C
from . import _cuda, _quant_gpu
from ._fused_linear import check_fusion, check_plain, check_rows_at, compose, must_compose
from ._op import Op, as_rows, check, check_dtype
from .linear import GATE_UP, SWIGLU, WHOLE, fields, product
from .rms_norm import rms_norm

GROUP = 32  # of x; and the least of a weight's
GROUPS = (32, 64, 128)
CUDA_ROWS = 8  # of a product in CUDA C++


@dataclass(frozen=True, eq=False)
class QWeight:
    """A quantised weight [N, K] in panels of 16 rows; the layout is the kernels' own (csrc/cpu/quant_linear.cpp).

    data: uint8 [panels, groups, bytes of a group]; bits 4 or 8; has_min: a float16 minimum per group, else a fixed zero
    point.
    """

    data: Tensor
    rows: int
    depth: int
    bits: int
    has_min: bool
    swiglu: bool = False

    @staticmethod
    def shape_for(
        rows: int, depth: int, bits: int, has_min: bool, swiglu: bool = False, group: int = GROUP
    ) -> tuple[int, int, int]:
        """The shape of `data`. Raises ValueError for another group than 32, 64 or 128."""
        check(group in GROUPS, lambda: f"QWeight: group={group!r}; allowed: 32, 64, 128")
        halves = 2 if swiglu else 1
        return halves * -(-rows // halves // 16), -(-depth // group), 2 * bits * group + (64 if has_min else 32)

    @classmethod
    def empty(
        cls, rows: int, depth: int, bits: int, has_min: bool, swiglu: bool = False, out: Tensor | None = None,
        group: int = GROUP,
    ) -> "QWeight":  # fmt: skip
        """Uninitialised panels, in `out` (uint8, flat, of `nbytes_for`) when given."""
        shape = cls.shape_for(rows, depth, bits, has_min, swiglu, group)
        data = torch.empty(shape, dtype=torch.uint8, device="cpu") if out is None else out.view(shape)
        return cls(data, rows, depth, bits, has_min, swiglu)

    @classmethod
    def nbytes_for(
        cls, rows: int, depth: int, bits: int, has_min: bool, swiglu: bool = False, group: int = GROUP
    ) -> int:
        return math.prod(cls.shape_for(rows, depth, bits, has_min, swiglu, group))

    def fill(self, first: int, blocks: Tensor, kind: str) -> int:
        """Rows [first, first + n) from blocks of a GGUF type in `STORED`, uint8 [n, K / 32 * block bytes]; first + n.

        A type of fewer bits, or without a minimum where this weight has one, is widened without loss. Raises
        ValueError for a type that does not fit in, or another shape.
        """
        bits, has_min, size = STORED[kind]
        if bits > self.bits or has_min > self.has_min:
            raise ValueError(f"QWeight.fill: {kind} blocks do not fit into {self.bits} bits, has_min={self.has_min}")
        if self.group != GROUP:
            raise ValueError(
                f"QWeight.fill: {kind} has a scale for {GROUP} of K, this weight one for {self.group}; make it with "
                f"group={GROUP}"
            )
        return self._pack(first, blocks, bits, has_min, size)

    def _pack(self, first: int, blocks: Tensor, bits: int, has_min: bool, size: int) -> int:
        """Blocks of this weight's group, as GGUF's are of 32 (csrc/records/quant_linear.h)."""
        groups = self.data.shape[1]
        if blocks.dim() != 2 or blocks.shape[1] != groups * size or not 0 <= first <= self.rows - blocks.shape[0]:
            raise ValueError(
                f"QWeight.fill: blocks {tuple(blocks.shape)} at row {first} do not fit weight {self.shape}"
            )
        blocks = blocks.contiguous()
        _C.pack_quants(
            self.data.data_ptr(), blocks.data_ptr(), first, blocks.shape[0], self.rows, groups, self.swiglu,
            self.bits, self.has_min, bits, has_min, self.group,
        )  # fmt: skip
        return first + blocks.shape[0]

    @classmethod
    def quantize(
        cls, weight: Tensor, bits: int, swiglu: bool = False, *, group: int = GROUP, affine: bool = False
    ) -> "QWeight":
        """int8 or int4 of a float [N, K], a scale for each 32, 64 or 128 of K; affine: a minimum too, so that a group's
        quants reach from its least to its largest weight. Raises ValueError for what does not fit."""
        if bits not in (4, 8):
            raise ValueError(f"QWeight.quantize: bits={bits!r}; allowed: 4, 8")
        if weight.dim() != 2 or weight.shape[1] % GROUP or (swiglu and weight.shape[0] % 2):
            raise ValueError(
                f"QWeight.quantize: weight {tuple(weight.shape)} must be [N, K], K a multiple of {GROUP}, "
                "N even for swiglu"
            )
        q = cls.empty(*weight.shape, bits, has_min=affine, swiglu=swiglu, group=group)
        q.data.zero_()  # rows that only pad a panel
        q.fill_quantized(0, weight, affine)
        return q

    def fill_quantized(self, first: int, weight: Tensor, affine: bool = False) -> int:
        """Quantises float rows into [first, first + n); returns first + n. In pieces: the float copies stay small.

        Raises ValueError for another K than this weight's, or affine where it has no minima.
        """
        if weight.shape[1] != self.depth or affine > self.has_min:
            raise ValueError(
                f"QWeight.fill_quantized: rows {tuple(weight.shape)}, affine={affine} do not fit weight {self.shape}, "
                f"has_min={self.has_min}"
            )
        for start in range(0, weight.shape[0], 1024):
            rows = weight[start : start + 1024].detach().float()
            blocks = quantize_rows(rows, self.bits, self.group, affine)
            first = self._pack(first, blocks, self.bits, affine, self.bits * self.group // 8 + (4 if affine else 2))
        return first

    def to(self, device: str | torch.device) -> "QWeight":
        """The same weight on another device."""
        return replace(self, data=self.data.to(device))

    def rows_at(self, ids: Tensor) -> Tensor:
        """Dequantised rows: ids int64 [...] -> float32 [..., K]. IndexError for an id outside [0, N)."""
        check_rows_at(ids, self.swiglu)
        return forward_embedding(ids, self.data, self.rows, self.depth, self.bits, self.has_min)

    def dequantize(self) -> Tensor:
        """float32 [N, K], exact."""
        ids, panels = torch.arange(self.rows, device=self.data.device), self.data.shape[0]
        if self.swiglu:
            half = self.rows // 2
            ids = ids % half // 16 * 32 + ids // half * 16 + ids % half % 16
        return forward_embedding(ids, self.data, panels * 16, self.depth, self.bits, self.has_min)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.depth

    @property
    def group(self) -> int:
        return group_of(self.data, self.bits, self.has_min)

    @property
    def nbytes(self) -> int:
        return self.data.numel()


def group_of(weight: Tensor, bits: int, has_min: bool) -> int:
    """How many k share a scale in these panels."""
    return (weight.shape[2] - (64 if has_min else 32)) // (2 * bits)


STORED = {
    "Q4_0": (4, False, 18),
    "Q4_1": (4, True, 20),
    "Q8_0": (8, False, 34),
}  # bits, minimum, bytes of a block of 32


def quantize_rows(weight: Tensor, bits: int, group: int = GROUP, affine: bool = False) -> Tensor:
    """Blocks of a group, uint8 [n, groups * block bytes], of float32 [n, K]: of 32 GGUF's Q8_0 or Q4_0, scale * q with
    q in +-127 or -8..7; affine as Q4_1, scale * q + minimum. They hold as many s8 or nibbles as a group has k."""
    missing = -weight.shape[1] % group
    if missing:  # a last group that is shorter: its scale and minimum are those of what it has
        weight = torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1)
    groups = weight.reshape(weight.shape[0], -1, group)
    head = []
    if affine:
        low, top = groups.aminmax(dim=-1, keepdim=True)
        scale, minimum = ((top - low) / (2**bits - 1)).half(), low.half()
        q = torch.where(scale > 0, (groups - minimum.float()) / scale.float(), 0).round().clamp(0, 2**bits - 1)
        head = [minimum]
    elif bits == 8:
        scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
        q = torch.where(scale > 0, groups / scale.float(), 0).round().clamp(-127, 127) + 128
    else:
        # The extreme value maps to -8 exactly, as in Q4_0. A scale of least squared error loses: large weights matter more
        # than their share of the error (benchmarks/LOG.md).
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        exact = extreme / -8
        q = torch.where(exact != 0, groups / exact, 0).add(0.5).floor().clamp(-8, 7) + 8
        scale = exact.half()
    head = [scale, *head]
    if not all(h.isfinite().all() for h in head):
        raise ValueError(
            "QWeight.quantize: the weight has NaN, infinite or huge entries, which float16 scales cannot hold"
        )
    quants = q.to(torch.uint8)
    if bits == 8:
        quants = quants ^ 128  # as s8
    else:
        low, high = quants.unflatten(-1, (-1, 2, GROUP // 2)).unbind(-2)
        quants = (low | high << 4).flatten(-2)
    return torch.cat([*(h.view(torch.uint8) for h in head), quants], -1).flatten(1)


# ---------------------------------------------------------------------------------------------------------- reference


def reference(x, weight, rows, depth, bits, has_min, bias, norm, eps, residual, halves) -> Tensor:
    """The quantised arithmetic in plain PyTorch. x is quantised in float32 whatever its dtype: where it is rounded is
    part of the meaning. The gradient is that of the dequantised weight, as if x were not rounded."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm
    q, s, m = (None if t is None else t.to(wide) for t in unpack_panels(weight, rows, bits, has_min, halves != WHOLE))
    groups = q.shape[1]
    xg = torch.nn.functional.pad(x, (0, groups * GROUP - depth)).unflatten(-1, (groups, GROUP))
    quants, scale = quantize_activations(xg.detach().float())
    quants, scale = quants.to(wide), scale.to(wide)  # [..., groups, 32] and [..., groups]
    integers = torch.einsum("...gk,ngk->...ng", quants, q)  # exact: below 2^24
    y = (integers * (s * scale.unsqueeze(-2))).sum(-1)
    if m is not None:
        y = y + (quants.sum(-1) * scale) @ m.t()
    if torch.is_grad_enabled() and x.requires_grad:
        w = (q * s.unsqueeze(-1) + (0 if m is None else m.unsqueeze(-1))).flatten(1)
        linear = xg.flatten(-2).to(wide) @ w.t()
        y = y + (linear - linear.detach())
    if bias is not None:
        y = y + bias
    if halves == SWIGLU:
        gate, up = y.chunk(2, -1)
        y = torch.nn.functional.silu(gate) * up
    if residual is not None:
        y = y + residual
    return y.to(x.dtype)


def reference_backward(dy, weight, rows, depth, bits, has_min, halves) -> Tensor:
    q, s, m = unpack_panels(weight, rows, bits, has_min, halves != WHOLE)
    w = q * s.unsqueeze(-1) + (0 if m is None else m.unsqueeze(-1))
    return dy @ w.flatten(1)[:, :depth].to(dy.dtype)


def quantize_activations(xg: Tensor) -> tuple[Tensor, Tensor]:
    """Groups [..., 32] as integers in +-127, and a scale [...] each."""
    top = xg.abs().amax(-1, keepdim=True)
    most = torch.full_like(top, 127)  # a tensor: torch divides a number as number * (1 / top), which rounds twice
    scale, inverse = torch.where(top < 1e-35, 0, top / most), torch.where(top < 1e-35, 0, most / top)
    finite = top.isfinite()
    quants = torch.where(finite, xg * inverse, 0).round()
    return quants, torch.where(finite, scale, torch.nan).squeeze(-1)


def unpack_panels(weight: Tensor, rows: int, bits: int, has_min: bool, swiglu: bool):
    """Signed quants [N, K / 32, 32], scales [N, K / 32] and minima of the panels; zero points subtracted."""
    group = group_of(weight, bits, has_min)
    size, parts, panels = 2 * bits * group, group // GROUP, weight.shape[0]
    body = weight[:, :, :size].reshape(panels, weight.shape[1] * parts, bits, 16, 4)
    if bits == 4:
        body = torch.stack([body & 15, body >> 4], 3).flatten(2, 3)
    q = body.permute(0, 3, 1, 2, 4).reshape(panels, 16, weight.shape[1] * parts, GROUP).float()
    halves = [
        weight[:, :, size + o : size + o + 32].contiguous().view(torch.float16).float() for o in (0, 32)[: 1 + has_min]
    ]
    s, *m = [h.permute(0, 2, 1).repeat_interleave(parts, -1) for h in halves]
    q = q if has_min else q - 2 ** (bits - 1)

    def order(t: Tensor) -> Tensor:
        parts = (t[0::2], t[1::2]) if swiglu else (t,)
        return torch.cat([p.flatten(0, 1)[: rows // len(parts)] for p in parts])

    return order(q), order(s), order(m[0]) if m else None


def reference_embedding(ids: Tensor, weight: Tensor, rows: int, depth: int, bits: int, has_min: bool) -> Tensor:
    q, s, m = unpack_panels(weight, weight.shape[0] * 16, bits, has_min, False)
    w = q[ids] * s[ids].unsqueeze(-1) + (0 if m is None else m[ids].unsqueeze(-1))
    return w.flatten(-2)[..., :depth]


# ----------------------------------------------------------------------------------------------------------- launchers


def _output(x: Tensor, rows: int, halves: int) -> Tensor:
    return torch.empty((*x.shape[:-1], rows // (1 + (halves == SWIGLU))), dtype=torch.float32, device=x.device)


def cpu(x, weight, rows, depth, bits, has_min, bias, norm, eps, residual, halves) -> Tensor:
    form, group = form_of(bits, has_min), group_of(weight, bits, has_min)
    return product(_output(x, rows, halves), x, weight, form, bias, norm, eps, residual, halves, _C.quant_linear, group)


def cpu_backward(dy, weight, rows, depth, bits, has_min, halves) -> Tensor:
    dx = torch.empty((*dy.shape[:-1], depth), dtype=torch.float32, device=dy.device)
    halves = GATE_UP if halves else WHOLE
    form, group = form_of(bits, has_min, across=True), group_of(weight, bits, has_min)
    return product(dx, dy, weight, form, halves=halves, group=group)


def form_of(bits: int, has_min: bool, across: bool = False) -> int:
    """The form of such a weight in csrc/records/linear.h, for x W^T or, across, for x W."""
    return 8 - 4 * across + 2 * (bits == 8) + has_min


def cpu_embedding(ids: Tensor, weight: Tensor, rows: int, depth: int, bits: int, has_min: bool) -> Tensor:
    y = torch.empty((*ids.shape, depth), dtype=torch.float32, device=ids.device)
    ids = ids.contiguous()
    group = group_of(weight, bits, has_min)
    if _C.quant_embedding(
        y.data_ptr(), ids.data_ptr(), weight.data_ptr(), ids.numel(), rows, depth, bits, has_min, group
    ):
        bad = ids[(ids < 0) | (ids >= rows)]
        raise IndexError(f"embedding: id {bad.flatten()[0].item()} is outside the vocabulary [0, {rows})")
    return y


def gpu(x, weight, rows, depth, bits, has_min, bias, norm, eps, residual, halves) -> Tensor:
    y, group = _output(x, rows, halves), group_of(weight, bits, has_min)
    return _quant_gpu.linear(y, x, weight, group, depth, bits, has_min, bias, norm, eps, residual, halves)


def cuda(x, weight, rows, depth, bits, has_min, bias, norm, eps, residual, halves) -> Tensor:
    """csrc/cuda/quant_linear.cu for few rows; more are Triton's."""
    if x.numel() > CUDA_ROWS * depth or weight.data_ptr() % 16:  # it loads 16 bytes at once
        return gpu(x, weight, rows, depth, bits, has_min, bias, norm, eps, residual, halves)
    if halves == SWIGLU:  # silu by the op: more rows have its bits too, in Triton's fused kernel
        form = (weight, rows, depth, bits, has_min)
        return compose(lambda v, wide: cuda(v, *form, bias, None, 0.0, None, GATE_UP), x, norm, eps, residual, True)
    y, group = _output(x, rows, halves), group_of(weight, bits, has_min)
    if not y.numel():
        return y
    flat = as_rows(x if norm is None else rms_norm(x, norm, eps))
    residual = None if residual is None else as_rows(residual)
    scratch = torch.empty(flat.shape[0] * -(-depth // GROUP), 44, dtype=torch.uint8, device=x.device)
    form = form_of(bits, has_min)
    record = fields(y, flat, weight, form, bias, residual=residual, halves=halves, group=group)
    _cuda.launch("quant_linear", record, scratch, x.device)
    return y


def gpu_backward(dy, weight, rows, depth, bits, has_min, halves) -> Tensor:
    return _quant_gpu.backward(dy, weight, group_of(weight, bits, has_min), rows, depth, bits, has_min, halves)


def gpu_rows(weight, rows, depth, bits, has_min, first: int, count: int) -> Tensor:
    """Dequantised rows [first, first + count) of a whole weight."""
    return _quant_gpu.dequantise(
        weight, group_of(weight, bits, has_min), first, count, rows, depth, bits, has_min, WHOLE
    )


def gpu_embedding(ids: Tensor, weight: Tensor, rows: int, depth: int, bits: int, has_min: bool) -> Tensor:
    y = torch.empty((*ids.shape, depth), dtype=torch.float32, device=ids.device)
    return _quant_gpu.embedding(y, ids, weight, group_of(weight, bits, has_min), rows, depth, bits, has_min)


# -------------------------------------------------------------------------------------------------------- registration


def _save(ctx, inputs, output) -> None:
    _, weight, *shape, _, norm, _, residual, halves = inputs
    ctx.plain = norm is None and residual is None and halves != SWIGLU
    ctx.shape = (*shape, halves)
    ctx.save_for_backward(weight)


def _backward(ctx, dy):
    check_plain(ctx.plain, "quant_linear")
    dx = backward(dy, *ctx.saved_tensors, *ctx.shape) if ctx.needs_input_grad[0] else None
    dbias = as_rows(dy).sum(0) if ctx.needs_input_grad[6] else None
    return dx, *[None] * 5, dbias, *[None] * 4


forward = Op(
    "quant_linear(Tensor x, Tensor weight, int rows, int depth, int bits, bool has_min, Tensor? bias, Tensor? norm,"
    " float eps, Tensor? residual, int halves) -> Tensor",
    reference=reference,
    fake=lambda x, weight, rows, depth, bits, has_min, bias, norm, eps, residual, halves: _output(x, rows, halves),
    cpu=cpu,
    triton=gpu,
    cuda=cuda,
    cuda_name=f"CUDA C++ (up to {CUDA_ROWS} rows, else Triton)",
    save=_save,
    backward=_backward,
)
backward = Op(
    "quant_linear_backward(Tensor dy, Tensor weight, int rows, int depth, int bits, bool has_min, int halves) -> Tensor",
    reference=reference_backward,
    fake=lambda dy, weight, rows, depth, bits, has_min, halves: dy.new_empty((*dy.shape[:-1], depth)),
    cpu=cpu_backward,
    triton=gpu_backward,
    triton_reason="the weight is dequantised in Triton and multiplied by cuBLAS",
)
forward_embedding = Op(
    "quant_embedding(Tensor ids, Tensor weight, int rows, int depth, int bits, bool has_min) -> Tensor",
    reference=reference_embedding,
    fake=lambda ids, weight, rows, depth, bits, has_min: weight.new_empty((*ids.shape, depth), dtype=torch.float32),
    cpu=cpu_embedding,
    triton=gpu_embedding,
)


def quant_linear(
    x: Tensor,
    weight: QWeight,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """norm(x) W^T + bias + residual (or swiglu), x float32 [..., K], weight QWeight [N, K] -> float32 [..., N].

    Raises ValueError for shapes and devices that do not fit, TypeError for dtypes. See the head of this file.
    """
    check_dtype("quant_linear", "x", x, (torch.float32,))
    if not isinstance(weight, QWeight):
        raise TypeError(f"quant_linear: weight is {type(weight).__name__}; make it with QWeight.quantize(weight, bits)")
    check_fusion("quant_linear", x, weight, bias, norm, residual, swiglu)
    form = (weight.data, weight.rows, weight.depth, weight.bits, weight.has_min)
    if must_compose(x, None, bias, norm, residual, swiglu):
        halves = GATE_UP if swiglu else WHOLE
        return compose(lambda v, wide: forward(v, *form, bias, None, 0.0, None, halves), x, norm, eps, residual, swiglu)
    return forward(x, *form, bias, norm, eps, residual, int(swiglu))
