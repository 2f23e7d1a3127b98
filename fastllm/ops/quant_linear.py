"""quant_linear: y = norm(x) W^T + bias (+ residual, or silu(gate) * up) with weights of 4 or 8 bits, and its embedding.

x [..., K] float32, weight a `QWeight` [N, K], y [..., N] float32.
Arithmetic: within each group of 32 along K, x becomes s8, round(x * (127 / max|x|)), with scale max|x| / 127; a weight
is scale * (q - zero) or scale * q + minimum, with float16 scale and minimum per row and group. Integer sums are exact;
the scaled sum runs over groups ascending in float32 FMAs, so one row alone and a thousand give the same bits.
A group whose max|x| is below 1e-35 counts as zeros; a NaN or an infinity makes its row NaN.

QWeight holds what the file holds, without loss: Q4_0 (4 bits, zero 8), Q4_1 (4 bits, minimum), Q8_0 (8 bits, zero 128
after the shift to unsigned). `QWeight.quantize(w, 4 | 8)` makes int4 and int8 with group 32 from float weights.
Sources: GGUF's block formats; Dettmers et al. 2022 (arXiv 2208.07339) for row-wise activation scales.
On a GPU the weight keeps this layout (`QWeight.to`) and the arithmetic is the same, group by group, on the tensor cores:
the integer sums and the chain over groups have the CPU's bits; the norm before and silu after them have their own.
Backward: the weight is frozen; dx = dy W in float32 with the dequantised weight, as if x had not been rounded, a panel
of it dequantised at a time. A fused call that needs a gradient runs as the ops that it fuses: the same bits.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import _C
from ._gated import silu
from ._op import Op, as_rows, check_dtype
from ._triton import tl, triton
from .linear import GATE_UP, SWIGLU, WHOLE, check_fusion, check_plain, check_rows_at, compose, must_compose, product
from .rms_norm import rms_norm

GROUP = 32


@dataclass(frozen=True)
class QWeight:
    """A quantised weight [N, K] in panels of 16 rows; the layout is the kernels' own (csrc/cpu/quant_linear.cpp).

    data: uint8 [panels, groups, bytes]; bits 4 or 8; has_min: a float16 minimum per group, else a fixed zero point.
    """

    data: Tensor
    rows: int
    depth: int
    bits: int
    has_min: bool
    swiglu: bool = False

    @staticmethod
    def block_bytes(bits: int, has_min: bool) -> int:
        return 16 * GROUP * bits // 8 + (64 if has_min else 32)

    @classmethod
    def empty(cls, rows: int, depth: int, bits: int, has_min: bool, swiglu: bool = False, out: Tensor | None = None):
        """Uninitialised panels, in `out` (uint8, flat, of `nbytes_for`) when given."""
        halves = 2 if swiglu else 1
        panels = halves * -(-rows // halves // 16)
        shape = (panels, -(-depth // GROUP), cls.block_bytes(bits, has_min))
        data = torch.empty(shape, dtype=torch.uint8) if out is None else out.view(shape)
        return cls(data, rows, depth, bits, has_min, swiglu)

    @classmethod
    def nbytes_for(cls, rows: int, depth: int, bits: int, has_min: bool, swiglu: bool = False) -> int:
        halves = 2 if swiglu else 1
        return halves * -(-rows // halves // 16) * -(-depth // GROUP) * cls.block_bytes(bits, has_min)

    def fill(self, first: int, blocks: Tensor, kind: str) -> int:
        """Rows [first, first + n) from blocks of a GGUF type in `STORED`, uint8 [n, K / 32 * block bytes]; first + n.

        A type of fewer bits, or without a minimum where this weight has one, is widened without loss. Raises
        ValueError for a type that does not fit in, or another shape.
        """
        bits, has_min, size = STORED[kind]
        if bits > self.bits or has_min > self.has_min:
            raise ValueError(f"QWeight.fill: {kind} blocks do not fit into {self.bits} bits, has_min={self.has_min}")
        groups = self.data.shape[1]
        if blocks.dim() != 2 or blocks.shape[1] != groups * size or not 0 <= first <= self.rows - blocks.shape[0]:
            raise ValueError(
                f"QWeight.fill: blocks {tuple(blocks.shape)} at row {first} do not fit weight {self.shape}"
            )
        blocks = blocks.contiguous()
        _C.pack_quants(
            self.data.data_ptr(), blocks.data_ptr(), first, blocks.shape[0], self.rows, groups, self.swiglu,
            self.bits, self.has_min, bits, has_min,
        )  # fmt: skip
        return first + blocks.shape[0]

    @classmethod
    def quantize(cls, weight: Tensor, bits: int, swiglu: bool = False) -> "QWeight":
        """Group-32 int8 or int4 of a float [N, K]."""
        if bits not in (4, 8):
            raise ValueError(f"QWeight.quantize: bits={bits!r}; allowed: 4, 8")
        if weight.dim() != 2 or weight.shape[1] % GROUP or (swiglu and weight.shape[0] % 2):
            raise ValueError(
                f"QWeight.quantize: weight {tuple(weight.shape)} must be [N, K], K a multiple of {GROUP}, "
                "N even for swiglu"
            )
        q = cls.empty(*weight.shape, bits, has_min=False, swiglu=swiglu)
        q.data.zero_()  # rows that only pad a panel
        q.fill_quantized(0, weight)
        return q

    def fill_quantized(self, first: int, weight: Tensor) -> int:
        """Quantises float rows into [first, first + n); returns first + n. In pieces: the float copies stay small."""
        for start in range(0, weight.shape[0], 1024):
            blocks = quantize_rows(weight[start : start + 1024].detach().float(), self.bits)
            first = self.fill(first, blocks, "Q4_0" if self.bits == 4 else "Q8_0")
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
    def nbytes(self) -> int:
        return self.data.numel()


STORED = {
    "Q4_0": (4, False, 18),
    "Q4_1": (4, True, 20),
    "Q8_0": (8, False, 34),
}  # bits, minimum, bytes of a block of 32


def quantize_rows(weight: Tensor, bits: int) -> Tensor:
    """Q8_0 or Q4_0 blocks, uint8 [n, K / 32 * block bytes], of float32 [n, K]: scale * q with q in +-127 or -8..7."""
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    if bits == 8:
        scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
        q = torch.where(scale > 0, groups / scale.float(), 0).round().clamp(-127, 127)
        quants = q.to(torch.int8).view(torch.uint8)
    else:
        # The extreme value maps to -8 exactly, as in Q4_0. A scale of least squared error loses: large weights matter more
        # than their share of the error (benchmarks/LOG.md).
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        exact = extreme / -8
        q = torch.where(exact != 0, groups / exact, 0).add(0.5).floor().clamp(-8, 7)
        scale = exact.half()
        low, high = (q + 8).to(torch.uint8).chunk(2, -1)
        quants = low | high << 4
    if not scale.isfinite().all():
        raise ValueError(
            "QWeight.quantize: the weight has NaN, infinite or huge entries, which float16 scales cannot hold"
        )
    return torch.cat([scale.view(torch.uint8), quants], -1).flatten(1)


# ---------------------------------------------------------------------------------------------------------- reference


def reference(x, weight, rows, depth, bits, has_min, bias, norm, eps, residual, halves) -> Tensor:
    """The quantised arithmetic in plain PyTorch. x is quantised in float32 whatever its dtype: where it is rounded is
    part of the meaning. The gradient is that of the dequantised weight, as if x were not rounded."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm
    groups = weight.shape[1]
    xg = torch.nn.functional.pad(x, (0, groups * GROUP - depth)).unflatten(-1, (groups, GROUP))
    q, s, m = (None if t is None else t.to(wide) for t in unpack_panels(weight, rows, bits, has_min, halves != WHOLE))
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
    """Signed quants [N, groups, 32], scales [N, groups] and minima of the panels; zero points subtracted."""
    size = 16 * GROUP * bits // 8
    body = weight[:, :, :size].reshape(*weight.shape[:2], size // 64, 16, 4)
    if bits == 4:
        body = torch.stack([body & 15, body >> 4], 3).flatten(2, 3)
    q = body.permute(0, 3, 1, 2, 4).reshape(weight.shape[0], 16, weight.shape[1], GROUP).float()
    halves = [
        weight[:, :, size + o : size + o + 32].contiguous().view(torch.float16).float() for o in (0, 32)[: 1 + has_min]
    ]
    s, *m = [h.permute(0, 2, 1) for h in halves]
    q = q if has_min else q - 2 ** (bits - 1)

    def order(t: Tensor) -> Tensor:
        parts = (t[0::2], t[1::2]) if swiglu else (t,)
        return torch.cat([p.flatten(0, 1)[: rows // len(parts)] for p in parts])

    return order(q), order(s), order(m[0]) if m else None


def reference_embedding(ids: Tensor, weight: Tensor, rows: int, depth: int, bits: int, has_min: bool) -> Tensor:
    q, s, m = unpack_panels(weight, weight.shape[0] * 16, bits, has_min, False)
    w = q[ids] * s[ids].unsqueeze(-1) + (0 if m is None else m[ids].unsqueeze(-1))
    return w.flatten(-2)[..., :depth]


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit(do_not_specialize=["depth", "groups", "x_stride"])
def quantise_kernel(
    quants, scales, sums, x, depth, groups, x_stride, BITS: tl.constexpr, HAS_MIN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rows of x as s8; beside each group its scale, and what multiplies the minimum (scale * sum) or the zero (sum)."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, 32)[None, :]
    column = group[:, None] * 32 + k
    v = tl.load(x + row * x_stride + column, mask=column < depth, other=0.0)
    finite = tl.max((tl.abs(v) < float("inf")).to(tl.int32) ^ 1, 1) == 0
    top = tl.max(tl.where(finite[:, None], tl.abs(v), 0.0), 1)
    plain = top >= 1e-35
    some = tl.where(plain, top, 1.0)
    scale = tl.where(plain, tl.div_rn(top, 127.0 + tl.zeros_like(top)), tl.where(finite, 0.0, float("nan")))
    inverse = tl.where(plain, tl.div_rn(127.0 + tl.zeros_like(top), some), 0.0)
    v = tl.where(plain[:, None], v, 0.0) * inverse[:, None] + 12582912.0  # 1.5 * 2^23: rounds to an integer
    q = v.to(tl.int32, bitcast=True) - 0x4B400000
    total = tl.sum(q, 1)
    place = k
    if BITS == 4:  # the order of a weight's nibbles
        place = k // 8 * 8 + k % 4 * 2 + k % 8 // 4
    inside = group < groups
    tl.store(quants + (row * groups + group[:, None]) * 32 + place, q.to(tl.int8), mask=inside[:, None])
    tl.store(scales + row * groups + group, scale, mask=inside)
    if HAS_MIN:
        tl.store(sums + row * groups + group, scale * total.to(tl.float32), mask=inside)


@triton.jit
def _weights(block, lane, inside, BITS: tl.constexpr, HAS_MIN: tl.constexpr):
    """One group of BN rows: quants s8 [BN, 32], scale and minimum [BN]. block: where the group of the row's panel is."""
    word = tl.arange(0, BITS)[None, :]
    words = tl.load(
        block.to(tl.pointer_type(tl.int32))[:, None] + word * 16 + lane[:, None], mask=inside[:, None], other=0
    )
    EACH: tl.constexpr = 32 // BITS  # quants a word
    q = words[:, :, None] >> (BITS * tl.arange(0, EACH))[None, None, :]
    if BITS == 4:
        q = q & 15
        if not HAS_MIN:
            q -= 8
    else:
        q = q ^ 128  # u8 less 128, in the low 8 bits
    q = tl.reshape(q.to(tl.int8), [block.shape[0], 32])
    half = block.to(tl.pointer_type(tl.float16)) + 32 * BITS + lane  # after 64 * BITS bytes of quants
    scale = tl.load(half, mask=inside, other=0.0).to(tl.float32)
    minimum = tl.load(half + 16, mask=inside, other=0.0).to(tl.float32) if HAS_MIN else scale
    return q, scale, minimum


@triton.jit
def _accumulate(acc, q, x, scale, x_scale, minimum, moment, BITS: tl.constexpr, HAS_MIN: tl.constexpr):
    """The next group joins the chain [BM, BN]."""
    product = tl.dot(x, tl.trans(q), out_dtype=tl.int32)
    if HAS_MIN and BITS == 8:
        product += 128 * tl.sum(x.to(tl.int32), 1)[:, None]
    acc = tl.fma(product.to(tl.float32), scale[None, :] * x_scale[:, None], acc)
    if HAS_MIN:
        acc = tl.fma(minimum[None, :] + tl.zeros_like(acc), moment[:, None] + tl.zeros_like(acc), acc)
    return acc


@triton.jit(do_not_specialize=["rows", "cols", "groups", "residual_stride"])
def linear_kernel(
    y, quants, scales, sums, weight, bias, residual, rows, cols, groups, residual_stride,
    BITS: tl.constexpr, HAS_MIN: tl.constexpr, HALVES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    panel, lane = n // 16, n % 16
    if HALVES == 1:  # SWIGLU: the gate's; the next is up's
        panel = panel * 2
    if HALVES == 2:  # GATE_UP: y is [gate, up]
        panel, lane = n % (cols // 2) // 16 * 2 + n // (cols // 2), n % (cols // 2) % 16
    held, inside = m < rows, n < cols
    block = weight + panel.to(tl.int64) * groups * BYTES
    up = block + groups.to(tl.int64) * BYTES
    acc = tl.zeros([BM, BN], tl.float32)
    above = acc
    for g in range(groups):
        at = m * groups + g
        x = tl.load(quants + at[:, None] * 32 + tl.arange(0, 32)[None, :], mask=held[:, None], other=0)
        x_scale = tl.load(scales + at, mask=held, other=0.0)
        moment = tl.load(sums + at, mask=held, other=0.0) if HAS_MIN else x_scale
        q, scale, minimum = _weights(block, lane, inside, BITS, HAS_MIN)
        acc = _accumulate(acc, q, x, scale, x_scale, minimum, moment, BITS, HAS_MIN)
        if HALVES == 1:
            q, scale, minimum = _weights(up, lane, inside, BITS, HAS_MIN)
            above = _accumulate(above, q, x, scale, x_scale, minimum, moment, BITS, HAS_MIN)
            up += BYTES
        block += BYTES
    mask = held[:, None] & (n < cols)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < cols, other=0.0)[None, :]
    if HALVES == 1:
        acc = silu(acc) * above
    if residual is not None:
        acc += tl.load(residual + m[:, None] * residual_stride + n[None, :], mask=mask, other=0.0)
    tl.store(y + m[:, None] * cols + n[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["rows", "depth", "groups"])
def embedding_kernel(
    y, ids, weight, rows, depth, groups, BITS: tl.constexpr, HAS_MIN: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + i)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = (row + 0 * k >= 0) & (row + 0 * k < rows)
    inside = known & (k < depth)
    block = weight + (row // 16 * groups + k // 32) * BYTES
    j, lane = k % 32, row % 16
    half = block.to(tl.pointer_type(tl.float16)) + 32 * BITS + lane
    scale = tl.load(half, mask=inside, other=0.0).to(tl.float32)
    EACH: tl.constexpr = 32 // BITS  # quants a word of four bytes
    q = tl.load(block + j // EACH * 64 + lane * 4 + j % 4, mask=inside, other=0).to(tl.int32)
    q = (q >> (j % EACH // 4 * 4)) & (2**BITS - 1)
    if HAS_MIN:
        v = q.to(tl.float32) * scale + tl.load(half + 16, mask=inside, other=0.0).to(tl.float32)
    else:
        v = (q - 2 ** (BITS - 1)).to(tl.float32) * scale + 0.0
    tl.store(y + i * depth + k, tl.where(known, v, float("nan")), mask=k < depth)


# ----------------------------------------------------------------------------------------------------------- launchers


def _output(x: Tensor, rows: int, halves: int) -> Tensor:
    return torch.empty((*x.shape[:-1], rows // (1 + (halves == SWIGLU))), dtype=torch.float32, device=x.device)


def cpu(x, weight, rows, depth, bits, has_min, bias, norm, eps, residual, halves) -> Tensor:
    form = form_of(bits, has_min)
    return product(_output(x, rows, halves), x, weight, form, bias, norm, eps, residual, halves, _C.quant_linear)


def cpu_backward(dy, weight, rows, depth, bits, has_min, halves) -> Tensor:
    dx = torch.empty((*dy.shape[:-1], depth))
    return product(dx, dy, weight, form_of(bits, has_min, across=True), halves=GATE_UP if halves else WHOLE)


def form_of(bits: int, has_min: bool, across: bool = False) -> int:
    """The form of such a weight in csrc/records/linear.h, for x W^T or, across, for x W."""
    return 8 - 4 * across + 2 * (bits == 8) + has_min


def cpu_embedding(ids: Tensor, weight: Tensor, rows: int, depth: int, bits: int, has_min: bool) -> Tensor:
    y = torch.empty((*ids.shape, depth), dtype=torch.float32)
    ids = ids.contiguous()
    if _C.quant_embedding(y.data_ptr(), ids.data_ptr(), weight.data_ptr(), ids.numel(), rows, depth, bits, has_min):
        bad = ids[(ids < 0) | (ids >= rows)]
        raise IndexError(f"embedding: id {bad.flatten()[0].item()} is outside the vocabulary [0, {rows})")
    return y


def gpu(x, weight, rows, depth, bits, has_min, bias, norm, eps, residual, halves) -> Tensor:
    y = _output(x, rows, halves)
    if not y.numel():
        return y
    if norm is not None:
        x = rms_norm(x, norm, eps)
    xr, other = as_rows(x), None if residual is None else as_rows(residual)
    count, groups, device = xr.shape[0], weight.shape[1], x.device
    quants = torch.empty(count, groups, GROUP, dtype=torch.int8, device=device)
    scales = torch.empty(count, groups, dtype=torch.float32, device=device)
    sums = torch.empty_like(scales) if has_min else scales
    exact = {"enable_fp_fusion": False}
    quantise_kernel[(count, triton.cdiv(groups, 32))](
        quants, scales, sums, xr, depth, groups, xr.stride(0), BITS=bits, HAS_MIN=has_min, BLOCK=32, num_warps=4, **exact
    )  # fmt: skip
    bm, bn = (16, 32) if count <= 16 else (64, 32 if halves == SWIGLU else 64)
    linear_kernel[(triton.cdiv(y.shape[-1], bn), triton.cdiv(count, bm))](
        y, quants, scales, sums, weight, bias, other, count, y.shape[-1], groups,
        0 if other is None else other.stride(0),
        BITS=bits, HAS_MIN=has_min, HALVES=halves, BM=bm, BN=bn, BYTES=weight.shape[2],
        num_warps=4, num_stages=4, **exact,
    )  # fmt: skip
    return y


def gpu_embedding(ids: Tensor, weight: Tensor, rows: int, depth: int, bits: int, has_min: bool) -> Tensor:
    """An id outside the vocabulary gives NaN: nothing waits for the device."""
    y = torch.empty((*ids.shape, depth), dtype=torch.float32, device=ids.device)
    if y.numel():
        embedding_kernel[(ids.numel(), triton.cdiv(depth, 512))](
            y, ids.contiguous(), weight, rows, depth, weight.shape[1],
            BITS=bits, HAS_MIN=has_min, BYTES=weight.shape[2], BLOCK=512, num_warps=4,
        )  # fmt: skip
    return y


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
    save=_save,
    backward=_backward,
)
backward = Op(
    "quant_linear_backward(Tensor dy, Tensor weight, int rows, int depth, int bits, bool has_min, int halves) -> Tensor",
    reference=reference_backward,
    fake=lambda dy, weight, rows, depth, bits, has_min, halves: dy.new_empty((*dy.shape[:-1], depth)),
    cpu=cpu_backward,
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
        return compose(lambda v, wide: forward(v, *form, bias, None, eps, None, halves), x, norm, eps, residual, swiglu)
    return forward(x, *form, bias, norm, eps, residual, int(swiglu))
