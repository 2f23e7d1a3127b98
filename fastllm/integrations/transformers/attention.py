"""Attention for transformers' AttentionInterface, and the mask that goes with it, both registered as "fastllm".

The mask is None where causal or full attention says it all, then the kernel skips what is not seen; else an additive
float32 mask [B, 1, Sq, Sk] of 0 and -inf, made once a forward. A sliding window that nothing else joins needs no mask.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from ... import ops
from ...ops._op import DTYPES
from ...ops.attention.dense import MAX_DIM

try:
    from transformers.utils.output_capturing import _active_collector as _collector
except ImportError:  # transformers 4 passes output_attentions to every attention
    _collector = None

NAME = "fastllm"
WEIGHTS = "a call that asks for attention weights or gives a head mask"
COMPILED_DROPOUT = "attention dropout under torch.compile"


def mask(*args: Any, local_size: int | None = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor | None:
    """What transformers' mask function for SDPA gives, additive; the arguments are its own."""
    queries, keys = kwargs.get("q_length"), kwargs["kv_length"]
    if queries is None:  # transformers 4
        queries = kwargs["cache_position"].shape[0]
    if allow_is_causal_skip and queries == keys:
        local_size = None  # the kernel has windows: no reason to make a mask
    seen = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
        *args, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, **kwargs
    )
    return None if seen is None else additive(seen)


def additive(seen: Tensor) -> Tensor:
    """A mask that may be added to scores: a bool one, True where a key is seen, becomes 0 and -inf."""
    if seen.dtype != torch.bool:
        return seen.float()
    return torch.zeros((), device=seen.device).where(seen, float("-inf"))


def _collected() -> bool:
    """Whether transformers collects attention weights from this forward: not every model passes the wish on."""
    if _collector is None:
        return False
    kept = _collector.global_var if torch.compiler.is_compiling() else _collector.get()
    return kept is not None and any("attentions" in key for key in kept)


@functools.lru_cache(maxsize=64)
def _spec(causal: bool, window: int | None, scale: float | None, softcap: float | None) -> ops.AttentionSpec:
    return ops.AttentionSpec(causal, window, scale, softcap)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    head_mask: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query [B, H, Sq, D], key and value [B, Hk, Sk, D] -> ([B, Sq, H, D], None), or with the weights [B, H, Sq, Sk] where
    a call asks for them.

    What the kernel does not do runs as plain torch: a head mask, weights, a dtype or head size that it has not, dropout
    while compiling.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    queries, keys = query.shape[2], key.shape[2]
    causal = causal and attention_mask is None and queries > 1
    if causal and queries < keys:  # the beginning of a static cache: what lies behind is empty
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    bias = position_bias
    if attention_mask is not None:
        bias = additive(attention_mask[..., :keys])
        bias = bias if position_bias is None else bias + position_bias
    window = sliding_window if causal else None
    kernel = (
        not (output_attentions or _collected())
        and head_mask is None
        and query.dtype in DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1] <= MAX_DIM
        and not (dropout and (dropout >= 1 or torch.compiler.is_compiling()))
    )
    if not kernel:
        return plain(query, key, value, bias, dropout, scaling, causal, window, softcap, s_aux, head_mask)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if bias is None and s_aux is None and not dropout:
        return ops.attention(q, k, v, _spec(causal, window, scaling, softcap)), None
    if bias is not None and bias.dtype not in (torch.float32, q.dtype):
        bias = bias.float()
    drop = ops.Dropout(dropout, int(torch.randint(2**63 - 1, ()))) if dropout else None
    spec = ops.AttentionSpec(causal, window, scaling, softcap, bias=bias, sinks=s_aux, dropout=drop)
    return ops.attention(q, k, v, spec), None


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    dropout: float,
    scaling: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    head_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same in torch, with the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if causal:
        row, column = (torch.arange(n, device=query.device) for n in scores.shape[2:])
        behind = row[:, None] - column + (scores.shape[3] - scores.shape[2])
        seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    blind = (scores == float("-inf")).all(-1, keepdim=True)  # rows of padding
    weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    weights = weights if sinks is None else weights[..., :-1]
    weights = nn.functional.dropout(weights.to(query.dtype), dropout)
    weights = weights if head_mask is None else weights * head_mask
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
