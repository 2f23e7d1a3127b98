"""attention in plain PyTorch, forward and backward, as its formula reads; every weight is in memory.

With i, j the positions of a query and a key and seen(i, j) the mask of the spec:

    score  = softcap * tanh(scale * q . k / softcap) + bias,  -inf where not seen
    weight = exp(score) / (sum over j of exp(score) + exp(sink))        kept = weight dropped out and scaled
    out    = sum over j of kept * v                                     lse  = log of the denominator

Backward, with dW = dropout(dout . v):
    dv = kept^T dout,  dS = weight * (dW - rowsum(dout * out)),  dbias = dS,  dsink = -sum(exp(sink - lse) * rowsum(dout * out))
    dT = dS * (1 - tanh^2),  dq = scale * dT k,  dk = scale * dT^T q
Gradients of broadcast dimensions are summed. Computed in float32, or in float64 for float64 inputs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._dropout import keep
from .spec import Settings


class Piece(NamedTuple):
    """Equally long sequences: all of a dense batch, or one sequence of a packed one. Slices of the batch, of the queries
    and of the keys; `row`: the dropout row of its first query."""

    batch: slice
    queries: slice
    keys: slice
    row: int


def _pieces(q: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Iterator[Piece]:
    if cu_q is None or cu_k is None:
        yield Piece(slice(None), slice(None), slice(None), 0)
        return
    begins_q, begins_k = cu_q.tolist(), cu_k.tolist()
    for b in range(len(begins_q) - 1):
        queries, keys = slice(*begins_q[b : b + 2]), slice(*begins_k[b : b + 2])
        yield Piece(slice(b, b + 1), queries, keys, queries.start * q.shape[2])


def _bias_index(bias: Tensor, piece: Piece, queries: int, keys: int) -> tuple[slice, ...]:
    batch = piece.batch if bias.shape[0] > 1 else slice(None)
    return batch, slice(None), slice(queries if bias.shape[2] > 1 else 1), slice(keys if bias.shape[3] > 1 else 1)


class Weights(NamedTuple):
    """tanh [B, H, Sq, Sk] (None without a cap), weight and what dropout keeps of it, and lse [B, H, Sq]."""

    tanh: Tensor | None
    weight: Tensor
    factor: Tensor | None
    lse: Tensor


def _weights(
    q: Tensor, k: Tensor, bias: Tensor | None, alibi: Tensor | None, sinks: Tensor | None, row: int, s: Settings
) -> Weights:
    """q, k [B, S, H, D] of one dtype and as many heads; bias broadcasts to [B, H, Sq, Sk]."""
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    scores, tanh = torch.einsum("bihd,bjhd->bhij", q, k) * s.scale, None
    if s.softcap:
        tanh = torch.tanh(scores / s.softcap)
        scores = s.softcap * tanh
    i = torch.arange(keys - queries, keys, device=q.device)[:, None]
    distance = i - torch.arange(keys, device=q.device)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if alibi is not None:
        scores = scores - alibi.to(scores.dtype)[:, None, None] * distance.abs()
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if s.causal:
        hidden |= distance < 0
    if s.window:
        hidden |= distance.abs() >= s.window
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(batch, heads, queries, 1)
        scores = torch.cat((scores, column), -1)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weight = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)[..., :keys]
    factor = None
    if s.p:
        rows = row + torch.arange(batch * heads * queries, device=q.device).view(batch, heads, queries, 1)
        mask = keep(rows, torch.arange(keys, device=q.device), s.p, s.seed, s.call)
        factor = mask.to(scores.dtype) / (1 - s.p)
    return Weights(tanh, weight, factor, torch.logsumexp(scores.detach(), -1))


def reference(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    bias: Tensor | None, alibi: Tensor | None, sinks: Tensor | None, *settings: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    s, wide, group = Settings(*settings), torch.promote_types(q.dtype, torch.float32), q.shape[2] // k.shape[2]
    outs, lses, done = [], [], 0
    for piece in _pieces(q, cu_q, cu_k):
        index = slice(None) if cu_q is None else slice(0, 1)
        rows = q[index, piece.queries].to(wide)
        keys, values = (t[index, piece.keys].to(wide).repeat_interleave(group, 2) for t in (k, v))
        part = None if bias is None else bias[_bias_index(bias, piece, rows.shape[1], keys.shape[1])]
        w = _weights(rows, keys, part, alibi, sinks, piece.row, s)
        kept = w.weight if w.factor is None else w.weight * w.factor
        if cu_q is not None:  # rows that no sequence claims
            gap = piece.queries.start - done
            (
                outs.append(q.new_zeros(1, gap, *q.shape[2:])),
                lses.append(w.lse.new_full((1, q.shape[2], gap), -torch.inf)),
            )
            done = piece.queries.stop
        outs.append(torch.einsum("bhij,bjhd->bihd", kept, values).to(q.dtype)), lses.append(w.lse)
    if cu_q is not None:
        gap = q.shape[1] - done
        outs.append(q.new_zeros(1, gap, *q.shape[2:]))
        lses.append(torch.full((1, q.shape[2], gap), -torch.inf, dtype=wide, device=q.device))
    out, lse = torch.cat(outs, 1), torch.cat(lses, 2)
    return out.contiguous(), lse.float().contiguous()


def reference_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, bias: Tensor | None, alibi: Tensor | None, sinks: Tensor | None,
    bias_gradient: bool, *settings: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    s, wide, group = Settings(*settings), torch.promote_types(q.dtype, torch.float32), q.shape[2] // k.shape[2]
    dq, dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (q, k, v))
    dbias = bias.new_zeros(bias.shape, dtype=wide) if bias is not None and bias_gradient else q.new_zeros(0)
    dsinks = sinks.new_zeros(sinks.shape, dtype=wide) if sinks is not None else q.new_zeros(0)
    for piece in _pieces(q, cu_q, cu_k):
        index = slice(None) if cu_q is None else slice(0, 1)
        rows, upstream = (t[index, piece.queries].to(wide) for t in (q, dout))
        keys, values = (t[index, piece.keys].to(wide).repeat_interleave(group, 2) for t in (k, v))
        at = None if bias is None else _bias_index(bias, piece, rows.shape[1], keys.shape[1])
        w = _weights(rows, keys, None if bias is None else bias[at], alibi, sinks, piece.row, s)
        kept, dweight = w.weight, torch.einsum("bihd,bjhd->bhij", upstream, values)
        if w.factor is not None:
            kept, dweight = w.weight * w.factor, dweight * w.factor
        delta = (kept * torch.einsum("bihd,bjhd->bhij", upstream, values)).sum(-1)
        dscore = w.weight * (dweight - delta[..., None])
        if bias is not None and bias_gradient:
            dbias[at] += dscore.sum_to_size(dbias[at].shape)
        if sinks is not None:
            share = torch.exp(sinks.to(wide)[:, None] - w.lse)
            dsinks -= (torch.where(w.lse == -torch.inf, 0.0, share) * delta).sum((0, 2))
        if w.tanh is not None:
            dscore = dscore * (1 - w.tanh.square())
        dq[index, piece.queries] = torch.einsum("bhij,bjhd->bihd", dscore, keys) * s.scale
        grouped = (len(rows), keys.shape[1], k.shape[2], group, k.shape[3])
        dk[index, piece.keys] = (torch.einsum("bhij,bihd->bjhd", dscore, rows) * s.scale).view(grouped).sum(3)
        dv[index, piece.keys] = torch.einsum("bhij,bihd->bjhd", kept, upstream).reshape(grouped).sum(3)
    like = (
        dbias.to(bias.dtype if bias is not None else q.dtype),
        dsinks.to(sinks.dtype if sinks is not None else q.dtype),
    )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *like
