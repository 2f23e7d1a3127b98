"""attention: softmax(scale * q k^T) v, for whole sequences: dense tensors, or packed ones of different lengths.

Shapes: q [B, Sq, H, D]; k, v [B, Sk, Hk, D], H a multiple of Hk (query head h reads KV head h // (H / Hk)); result
[B, Sq, H, D]. Sk != Sq is cross attention; positions are aligned to the end: query i stands at Sk - Sq + i.
Packed: q [Tq, H, D]; k, v [Tk, Hk, D]; cu_q, cu_k [B + 1] int32, where each sequence begins, and the end; a sequence may
be empty; rows of q that no sequence claims are zeros.
What scores are and which keys a query sees: AttentionSpec. Dtypes: float32, bfloat16, float16, one for q, k and v; scores
and sums are fp32, the result is rounded once. D from 1 to 256 (multiples of 16 are fast). Any strides: a copy is made
only where a head's elements are not contiguous, or a bias lies neither along its keys nor the same for all of them.

Arithmetic: keys are cut in tiles of 256 at absolute positions; in a tile a score is one FMA chain over D ascending,
times scale, then capped, plus the bias; the tile gives (highest, sum of exp(score - highest), FMA chain of the values
over keys ascending); tiles are folded left to right, a sink last. So a row has the same bits packed and dense and in
paged_attention, whatever the chunks, the batch and the threads. A row that sees no key, or only scores of -inf, is zeros
and has no gradient. A NaN or +inf score makes its row NaN. Keys out of a row's sight never reach it, NaN or not.
Dropout leaves the sum as it is, drops weights from the values' chain and multiplies the result by 1 / (1 - p).

On a GPU that arithmetic is the spec's `exact` mode, with matrix products for the chains; the default mode walks keys in one
run. A value of NaN or infinity also reaches rows that do not see its key, if their block of keys holds it.

Backward (Dao 2023, arXiv 2307.08691) computes the weights again from lse [B, H, Sq], the logarithm of each row's
denominator (packed: [1, H, Tq]); its formula is in reference.py. Every sum has one order: the same bits with any threads.
On a GPU cuDNN and CUDA C++ add up dq by atomics; under torch.use_deterministic_algorithms(True) Triton does, in one order.
"""

import torch
from torch import Tensor

from ... import _C
from .._dropout import threshold
from .._op import DTYPES, Op, check, check_dtype, check_like, pointer
from ..rope import unit_stride
from . import cudnn, hopper
from .reference import reference, reference_backward
from .spec import CAUSAL, AttentionSpec, extents
from .triton_backward import gpu_backward
from .triton_forward import gpu

MAX_DIM = 256  # csrc/records/attention.h: kMaxHeadDim

# ----------------------------------------------------------------------------------------------------------- launchers
# The raw ops know one form: q [B, Sq, H, D], where a packed batch is B = 1 with cu_q and cu_k.


def _outputs(q: Tensor, train: bool = True) -> tuple[Tensor, Tensor | None]:
    lse = None  # read by the backward alone
    if train:
        lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def _gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, bias_gradient: bool):
    """dq, dk, dv, dbias, dsinks, the last two with no element where there is nothing to give."""
    like = (q, k, v, bias if bias_gradient else None, sinks)
    return tuple(q.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like)


def _bias_arguments(bias: Tensor | None) -> tuple[Tensor | None, tuple[int, ...], int]:
    """The bias, copied if need be; its strides (0 where it is the same for all), rows and keys; its dtype."""
    if bias is None:
        return None, (0,) * 6, 0
    bias = unit_stride(bias)
    strides = (0 if n == 1 else stride for n, stride in zip(bias.shape, bias.stride(), strict=True))
    return bias, (*strides, *bias.shape[2:]), DTYPES[bias.dtype]


def as_float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _check_status(status: int, q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, bias: Tensor | None) -> None:
    if status:
        limits = "" if bias is None else f" and the bias {tuple(bias.shape)}"
        raise IndexError(
            f"attention_varlen: cu_q {cu_q.tolist()} and cu_k {cu_k.tolist()} must ascend within {q.shape[1]} rows of q "
            f"and {k.shape[1]} of k{limits}; one is out of range"
        )


def cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    bias: Tensor | None, alibi: Tensor | None, sinks: Tensor | None,
    causal: bool, window: int, scale: float, softcap: float, p: float, seed: int, call: int, exact: bool,
    train: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    out, lse = _outputs(q, train)
    if out.numel():
        q, k, v, alibi, sinks = unit_stride(q), unit_stride(k), unit_stride(v), as_float(alibi), as_float(sinks)
        added, bias_layout, bias_dtype = _bias_arguments(bias)
        status = _C.attention(
            out.data_ptr(), pointer(lse), q.data_ptr(), k.data_ptr(), v.data_ptr(), pointer(cu_q), pointer(cu_k),
            pointer(added), pointer(alibi), pointer(sinks), *extents(q, k, cu_q),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bias_layout,
            DTYPES[q.dtype], bias_dtype, causal, window, seed, call, threshold(p), scale, softcap, p,
        )  # fmt: skip
        _check_status(status, q, k, cu_q, cu_k, bias)
    return out, lse


def cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, bias: Tensor | None, alibi: Tensor | None, sinks: Tensor | None,
    bias_gradient: bool,
    causal: bool, window: int, scale: float, softcap: float, p: float, seed: int, call: int, exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, dbias, dsinks = _gradients(q, k, v, bias, sinks, bias_gradient)
    wide_bias = wide_sinks = None  # both are summed in fp32
    if bias is not None and bias_gradient:
        wide_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        if any(n > 1 and stride == 0 for n, stride in zip(bias.shape, bias.stride(), strict=True)):
            bias = bias.contiguous()  # the kernel takes a stride of 0 for one that is summed
    if sinks is not None:
        wide_sinks = torch.zeros(sinks.shape, dtype=torch.float32, device=sinks.device)
    if q.numel() or k.numel():
        dout, q, k, v = (unit_stride(t) for t in (dout, q, k, v))
        alibi, sinks = as_float(alibi), as_float(sinks)
        added, bias_layout, bias_dtype = _bias_arguments(bias)
        status = _C.attention_backward(
            dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), pointer(wide_bias), pointer(wide_sinks),
            dout.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(),
            pointer(cu_q), pointer(cu_k), pointer(added), pointer(alibi), pointer(sinks), *extents(q, k, cu_q),
            *dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bias_layout,
            DTYPES[q.dtype], bias_dtype, causal, window, seed, call, threshold(p), scale, softcap, p,
        )  # fmt: skip
        _check_status(status, q, k, cu_q, cu_k, bias)
    if wide_bias is not None:
        dbias = wide_bias.to(dbias.dtype)
    return dq, dk, dv, dbias, dsinks if wide_sinks is None else wide_sinks.to(dsinks.dtype)


# -------------------------------------------------------------------------------------------------------- registration


def _save(ctx, inputs, output) -> None:
    q, k, v, cu_q, cu_k, bias, alibi, sinks, *ctx.settings = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, bias, alibi, sinks)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    nothing = (None,) * len(ctx.settings)
    if dout is None:
        return (None,) * 8 + nothing
    bias_gradient = ctx.needs_input_grad[5]
    dq, dk, dv, dbias, dsinks = backward(dout, *ctx.saved_tensors, bias_gradient, *ctx.settings)
    return (
        dq,
        dk,
        dv,
        None,
        None,
        dbias if bias_gradient else None,
        None,
        dsinks if ctx.needs_input_grad[7] else None,
        *nothing,
    )


_SHAPERS = "Tensor? cu_q, Tensor? cu_k, Tensor? bias, Tensor? alibi, Tensor? sinks"
_SETTINGS = "bool causal, int window, float scale, float softcap, float p, SymInt seed, SymInt call, bool exact"

forward = Op(
    f"attention(Tensor q, Tensor k, Tensor v, {_SHAPERS}, {_SETTINGS}) -> (Tensor, Tensor)",
    reference=reference,
    fake=lambda q, *others: _outputs(q),
    cpu=cpu,
    triton=gpu,
    triton_reason=cudnn.REASON,
    cuda=hopper.cuda,
    cuda_name=hopper.NAME,
    save=_save,
    backward=_backward,
)
backward = Op(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SHAPERS}, bool bias_gradient, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda dout, q, k, v, out, lse, cu_q, cu_k, bias, alibi, sinks, bias_gradient, *settings: _gradients(
        q, k, v, bias, sinks, bias_gradient
    ),
    cpu=cpu_backward,
    triton=gpu_backward,
    triton_reason=cudnn.REASON,
    cuda=hopper.cuda_backward,
    cuda_name=hopper.NAME,
)

# ---------------------------------------------------------------------------------------------------------- validation


def check_heads(op: str, heads: int, kv_heads: int, dim: int) -> None:
    check(
        kv_heads > 0 and heads % kv_heads == 0,
        lambda: f"{op}: {heads} query heads over {kv_heads} KV heads; the first must be a multiple of the second",
    )
    check(1 <= dim <= MAX_DIM, lambda: f"{op}: head dim {dim}, allowed: 1 to {MAX_DIM}")


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: str) -> None:
    """`layout`: the letters of q's dimensions, "B Sq H D" or "Tq H D"."""
    check_dtype(op, "q", q)
    check_like(op, "k", k, "q", q)
    check_like(op, "v", v, "q", q)
    dims = len(layout.split())
    fits = q.dim() == dims and k.dim() == dims and k.shape == v.shape and q.shape[-1] == k.shape[-1]
    check(
        fits and (dims == 3 or q.shape[0] == k.shape[0]),
        lambda: (
            f"{op}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be [{layout.replace(' ', ', ')}] and "
            f"twice [{layout.replace('q', 'k').replace('H', 'Hk').replace(' ', ', ')}]"
        ),
    )
    check_heads(op, q.shape[-2], k.shape[-2], q.shape[-1])
    spec.check_tensors(op, q, q.shape[-2])


def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec = CAUSAL) -> Tensor:
    """softmax(scale * q k^T) v for q [B, Sq, H, D], k and v [B, Sk, Hk, D]: [B, Sq, H, D]. See the head of this file.

    Raises ValueError for shapes or head counts that do not fit, TypeError for dtypes.
    """
    _check("attention", q, k, v, spec, "B Sq H D")
    spec.check_bias("attention", q, q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return forward(q, k, v, None, None, spec.bias, spec.alibi, spec.sinks, *spec.settings(q.shape[3]))[0]


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, spec: AttentionSpec = CAUSAL
) -> Tensor:
    """The same for packed sequences: q [Tq, H, D], k and v [Tk, Hk, D], cu_q and cu_k [B + 1] int32: [Tq, H, D].

    A bias is [B, H, Sq, Sk] with Sq and Sk at least the longest sequence's (or 1). Raises ValueError for shapes or head
    counts that do not fit, TypeError for dtypes; on a CPU, IndexError for lengths that descend or leave q, k or the bias
    (a GPU does not wait to look at them).
    """
    op = "attention_varlen"
    _check(op, q, k, v, spec, "Tq H D")
    for name, tensor in (("cu_q", cu_q), ("cu_k", cu_k)):
        check_dtype(op, name, tensor, (torch.int32,))
        check(tensor.device == q.device, lambda n=name, t=tensor: f"{op}: {n} is on {t.device}, q on {q.device}")
    check(
        cu_q.dim() == 1 and cu_q.shape == cu_k.shape and cu_q.shape[0] >= 1,
        lambda: f"{op}: cu_q {tuple(cu_q.shape)} and cu_k {tuple(cu_k.shape)} must be [B + 1] both",
    )
    spec.check_bias(op, q, cu_q.shape[0] - 1, q.shape[1], None, None)
    packed = (q[None], k[None], v[None], cu_q.contiguous(), cu_k.contiguous())
    return forward(*packed, spec.bias, spec.alibi, spec.sinks, *spec.settings(q.shape[2]))[0][0]
