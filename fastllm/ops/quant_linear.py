"""quant_linear: y = norm(x) W^T + bias (+ residual, or silu(gate) * up) with weights of 4 or 8 bits, and its embedding.

x [..., K] float32, weight a `QWeight` [N, K], y [..., N] float32.
Arithmetic: within each group of 32 along K, x becomes s8 with scale max|x| / 127 (one per row and group); a weight is
scale * (q - zero) or scale * q + minimum, with float16 scale and minimum per row and group. Integer sums are exact; the scaled
sum runs over groups ascending in float32 FMAs, so one row alone and a thousand give the same bits.

QWeight holds what the file holds, without loss: Q4_0 (4 bits, zero 8), Q4_1 (4 bits, minimum), Q8_0 (8 bits, zero 128 after
the shift to unsigned). `QWeight.quantize(w, 4 | 8)` makes int4 and int8 with group 32 from float weights. Sources: GGUF's
block formats; Dettmers et al. 2022 (arXiv 2208.07339) for row-wise activation scales.
Inference only: asked for a gradient, the reference runs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ._op import Op, as_rows, check_dtype, pointer
from .linear import check_fusion

GROUP = 32


@dataclass(frozen=True)
class QWeight:
    """A quantised weight [N, K] in panels of 16 rows; the layout is the CPU kernel's own (csrc/cpu/quant_linear.cpp).

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

    def fill(self, first: int, quants: Tensor, scale: Tensor, minimum: Tensor | None = None) -> None:
        """Rows [first, first + n): quants uint8 [n, K] (K a multiple of 32), scale and minimum float16 [n, K / 32]."""
        half = self.rows // 2 if self.swiglu else self.rows
        count, groups = quants.shape[0], quants.shape[1] // GROUP
        rows = torch.arange(first, first + count)
        panel = rows % half // 16 * (2 if self.swiglu else 1) + rows // half if self.swiglu else rows // 16
        lane = rows % half % 16
        size = 16 * GROUP * self.bits // 8
        blocks = quants.reshape(count, groups, -1, 4)  # [n, groups, chunks of 4 k, 4]
        if self.bits == 4:
            blocks = blocks[:, :, 0::2] | blocks[:, :, 1::2] << 4
        body = self.data[:, :, :size].view(self.data.shape[0], groups, -1, 16, 4)
        body[panel, :, :, lane] = blocks
        self.data[:, :, size : size + 32].view(torch.float16)[panel, :, lane] = scale
        if self.has_min:
            self.data[:, :, size + 32 :].view(torch.float16)[panel, :, lane] = minimum

    @classmethod
    def quantize(cls, weight: Tensor, bits: int, swiglu: bool = False) -> "QWeight":
        """Group-32 int8 or int4 (round to nearest; int4 takes the scale of least squared error) of a float [N, K]."""
        if bits not in (4, 8):
            raise ValueError(f"QWeight.quantize: bits={bits!r}; allowed: 4, 8")
        if weight.dim() != 2 or weight.shape[1] % GROUP:
            raise ValueError(f"QWeight.quantize: weight {tuple(weight.shape)} must be [N, K] with K a multiple of {GROUP}")
        if not weight.isfinite().all():
            raise ValueError("QWeight.quantize: weight has NaN or infinite entries; quantised weights cannot hold them")
        q = cls.empty(*weight.shape, bits, has_min=False, swiglu=swiglu)
        q.data.zero_()  # rows that only pad a panel
        q.fill_quantized(0, weight)
        return q

    def fill_quantized(self, first: int, weight: Tensor) -> int:
        """Quantises float rows into [first, first + n); returns first + n. In pieces: the float copies stay small."""
        for start in range(0, weight.shape[0], 2048):
            self.fill(first + start, *quantize_rows(weight[start : start + 2048].float(), self.bits))
        return first + weight.shape[0]

    def widen(self, quants: Tensor, scale: Tensor, minimum: Tensor | None, bits: int):
        """Quants of a narrower stored format in this one, without loss: for weights whose parts are stored differently."""
        zero, own = 2 ** (bits - 1), 2 ** (self.bits - 1)
        if minimum is None and self.has_min:
            return quants, scale, scale * -zero  # a power of two: exact in float16
        return quants + (own - zero if minimum is None else 0), scale, minimum

    def rows_at(self, ids: Tensor) -> Tensor:
        """Dequantised rows: ids int64 [...] -> float32 [..., K]. IndexError for an id outside [0, N)."""
        return embedding_rows(ids, self)

    def dequantize(self, ids: Tensor | None = None) -> Tensor:
        """float32 [N, K], or the rows `ids`; exact."""
        if ids is None:
            ids = torch.arange(self.rows)
            if self.swiglu:
                half = self.rows // 2
                ids = ids % half // 16 * 32 + ids // half * 16 + ids % half % 16
        return embedding_rows(ids, self)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.depth

    @property
    def nbytes(self) -> int:
        return self.data.numel()


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Unsigned quants [n, K] and float16 scales [n, K / 32] of weight ~ scale * (q - 2^(bits-1))."""
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    top = 2 ** (bits - 1)
    if bits == 8:
        scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
        q = torch.where(scale > 0, groups / scale.float(), 0).round().clamp(-127, 127)
    else:
        # The extreme value maps to -8 exactly, as in Q4_0; shrinking the range a little often lowers the squared error.
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        best = torch.full_like(extreme, torch.inf)
        scale, q = extreme.half(), groups
        for steps in (-8.0, -7.6, -7.2, -8.4, -6.8, -9.0):
            s = (extreme / steps).half()
            candidate = torch.where(s != 0, groups / s.float(), 0).round().clamp(-top, top - 1)
            error = (candidate * s.float() - groups).square().sum(-1, keepdim=True)
            better = error < best
            best, scale, q = best.minimum(error), torch.where(better, s, scale), torch.where(better, candidate, q)
    return (q + top).to(torch.uint8).flatten(1), scale.squeeze(-1)


# ------------------------------------------------------------------------------------------------- the stored GGUF types

STORED = {"Q4_0": (4, False, 18), "Q4_1": (4, True, 20), "Q8_0": (8, False, 34)}  # bits, minimum, bytes of a block of 32


def unpack_stored(blocks: np.ndarray, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of GGUF blocks, uint8 [n, K / 32 * block bytes], as `QWeight.fill` takes them."""
    bits, has_min, size = STORED[kind]
    raw = np.ascontiguousarray(blocks).reshape(blocks.shape[0], -1, size)
    head = 4 if has_min else 2
    halves = np.ascontiguousarray(raw[:, :, :head]).view(np.float16)
    body = raw[:, :, head:]
    if bits == 4:
        quants = np.concatenate([body & 15, body >> 4], -1)
    else:
        quants = body + np.uint8(128)  # s8 to unsigned
    scale = torch.from_numpy(halves[:, :, 0].copy())
    minimum = torch.from_numpy(halves[:, :, 1].copy()) if has_min else None
    return torch.from_numpy(quants.reshape(blocks.shape[0], -1)), scale, minimum


# ---------------------------------------------------------------------------------------------------------- reference


def reference(x, weight, rows, depth, bits, has_min, bias, norm, eps, residual, swiglu) -> Tensor:
    """The quantised arithmetic in plain PyTorch: integer sums in float64, which holds them exactly."""
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm
    groups = weight.shape[1]
    xg = torch.nn.functional.pad(x, (0, groups * GROUP - depth)).reshape(*x.shape[:-1], groups, GROUP)
    scale = xg.abs().amax(-1, keepdim=True) / 127
    quants = torch.where(scale > 0, xg / scale, 0).round()
    q, s, m = unpack_panels(weight, rows, bits, has_min, swiglu)
    integers = torch.einsum("...gk,ngk->...ng", quants.double(), q.double())
    y = (integers * s.double() * scale.squeeze(-1).unsqueeze(-2).double()).sum(-1)
    if m is not None:
        y = y + ((quants.sum(-1, keepdim=True) * scale).squeeze(-1).unsqueeze(-2).double() * m.double()).sum(-1)
    y = y.to(x.dtype)
    if bias is not None:
        y = y + bias
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = torch.nn.functional.silu(gate) * up
    return y if residual is None else y + residual


def unpack_panels(weight: Tensor, rows: int, bits: int, has_min: bool, swiglu: bool):
    """Signed quants [N, groups, 32], scales [N, groups] and minima of the panels; zero points subtracted."""
    size = 16 * GROUP * bits // 8
    body = weight[:, :, :size].reshape(*weight.shape[:2], -1, 16, 4)
    if bits == 4:
        body = torch.stack([body & 15, body >> 4], 3).flatten(2, 3)
    q = body.permute(0, 3, 1, 2, 4).reshape(weight.shape[0], 16, weight.shape[1], GROUP).float()
    halves = [weight[:, :, size + o : size + o + 32].contiguous().view(torch.float16).float() for o in (0, 32)[: 1 + has_min]]
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


# ----------------------------------------------------------------------------------------------------------- launchers


def _output(x: Tensor, rows: int, swiglu: bool) -> Tensor:
    return torch.empty((*x.shape[:-1], rows // (1 + swiglu)), dtype=torch.float32, device=x.device)


def cpu(x, weight, rows, depth, bits, has_min, bias, norm, eps, residual, swiglu) -> Tensor:
    y = _output(x, rows, swiglu)
    if not y.numel():
        return y
    xr, other = as_rows(x), None if residual is None else as_rows(residual)
    _C.quant_linear(
        y.data_ptr(), xr.data_ptr(), weight.data_ptr(), pointer(bias), pointer(other), pointer(norm),
        xr.shape[0], y.shape[-1], depth, xr.stride(0), y.shape[-1], 0 if other is None else other.stride(0),
        swiglu, bits, has_min, eps,
    )  # fmt: skip
    return y


def cpu_embedding(ids: Tensor, weight: Tensor, rows: int, depth: int, bits: int, has_min: bool) -> Tensor:
    y = torch.empty((*ids.shape, depth), dtype=torch.float32)
    ids = ids.contiguous()
    if _C.quant_embedding(y.data_ptr(), ids.data_ptr(), weight.data_ptr(), ids.numel(), rows, depth, bits, has_min):
        bad = ids[(ids < 0) | (ids >= rows)]
        raise IndexError(f"embedding: id {bad.flatten()[0].item()} is outside the vocabulary [0, {rows})")
    return y


# -------------------------------------------------------------------------------------------------------- registration

forward = Op(
    "quant_linear(Tensor x, Tensor weight, int rows, int depth, int bits, bool has_min, Tensor? bias, Tensor? norm, float eps,"
    " Tensor? residual, bool swiglu) -> Tensor",
    reference=reference,
    fake=lambda x, weight, rows, depth, bits, has_min, bias, norm, eps, residual, swiglu: _output(x, rows, swiglu),
    cpu=cpu,
)
forward_embedding = Op(
    "quant_embedding(Tensor ids, Tensor weight, int rows, int depth, int bits, bool has_min) -> Tensor",
    reference=reference_embedding,
    fake=lambda ids, weight, rows, depth, bits, has_min: weight.new_empty((*ids.shape, depth), dtype=torch.float32),
    cpu=cpu_embedding,
)


def embedding_rows(ids: Tensor, weight: QWeight) -> Tensor:
    """Dequantised panel rows: ids int64 of any shape -> float32 [..., K]. IndexError for an id outside the panels."""
    if ids.dtype != torch.int64:
        raise TypeError(f"embedding: ids are {ids.dtype}; convert them with .long()")
    rows = weight.data.shape[0] * 16 if weight.swiglu else weight.rows
    return forward_embedding(ids, weight.data, rows, weight.depth, weight.bits, weight.has_min)


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
    check_fusion("quant_linear", x, weight.shape, bias, norm, residual, swiglu)
    if swiglu != weight.swiglu:
        raise ValueError(f"quant_linear: swiglu={swiglu}, but the weight was packed with swiglu={weight.swiglu}")
    return forward(
        x, weight.data, weight.rows, weight.depth, weight.bits, weight.has_min, bias, norm, eps, residual, swiglu
    )
