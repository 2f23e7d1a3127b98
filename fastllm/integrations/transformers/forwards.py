"""Forwards that take the place of a module's own, on that one instance.

Each is a function of the module, as if it stood in its class; it calls submodules as modules, so that quantised linears,
LoRA and hooks keep working, and reads weights when it runs, so that nothing is kept that training could outdate. A call
that the kernel does not fit (mixed dtypes, a DTensor) runs the class's own forward.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ... import ops
from ...ops._op import DTYPES
from ...ops.rope import reference as rope_reference
from .attention import attention

_CACHE_EXTRAS = "cache_kwargs" if "cache_kwargs" in inspect.signature(Cache.update).parameters else "kwargs"
_PLAIN = (Tensor, nn.Parameter)


def fits(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether a kernel takes x and its weights: one dtype that it has, one device, and no tensor of another kind."""
    if x.dtype not in DTYPES or type(x) not in _PLAIN:
        return False
    for w in weights:  # noqa: SIM110 (a generator costs every call a microsecond)
        if w is not None and (w.dtype != x.dtype or w.device != x.device or type(w) not in _PLAIN):
            return False
    return True


def bare(module: nn.Module) -> bool:
    """Whether nobody listens to a module: only then may its work be done inside another one's kernel."""
    m = module
    return not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def gated(act: nn.Module, gate: Tensor, up: Tensor) -> bool:
    """Whether a kernel takes an activation and its product with the other half."""
    return bare(act) and fits(gate, up)


# --------------------------------------------------------------------------------------------------------------- norms


def rms_norm(self, hidden_states: Tensor) -> Tensor:
    """LlamaRMSNorm and its like, T5LayerNorm."""
    if not fits(hidden_states, self.weight):
        return type(self).forward(self, hidden_states)
    return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def rms_norm_plus_one(self, x: Tensor) -> Tensor:
    """Gemma3RMSNorm: the weight is kept as its distance from one, and the product is made in float32."""
    if not fits(x, self.weight):
        return type(self).forward(self, x)
    return ops.rms_norm(x.float(), self.weight.float() + 1.0, self.eps).type_as(x)


def layer_norm(self, input: Tensor) -> Tensor:
    """nn.LayerNorm over the last dimension, with a weight."""
    if not fits(input, self.weight, self.bias):
        return type(self).forward(self, input)
    return ops.layer_norm(input, self.weight, self.bias, self.eps)


def add_and_layer_norm(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """BertSelfOutput, BertOutput: the sum is made inside the norm."""
    h, norm = self.dropout(self.dense(hidden_states)), self.LayerNorm
    if not bare(norm) or not fits(h, input_tensor, norm.weight, norm.bias):
        return norm(h + input_tensor)
    return ops.layer_norm(h, norm.weight, norm.bias, norm.eps, residual=input_tensor)[0]


# -------------------------------------------------------------------------------------------------------------- linears


def linear(self, input: Tensor) -> Tensor:
    """nn.Linear of float32 weights on a CPU, which lie as they did: torch's own is slower from 1 row to 1,000."""
    if not input.is_cpu or not fits(input, self.weight, self.bias) or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(input, self.weight, self.bias)
    return ops.linear(input, self.weight, self.bias)


# ----------------------------------------------------------------------------------------------------------------- MLPs


def swiglu_mlp(self, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x))."""
    gate, up = self.gate_proj(x), self.up_proj(x)
    return self.down_proj(ops.swiglu(gate, up) if gated(self.act_fn, gate, up) else self.act_fn(gate) * up)


def geglu_mlp(self, x: Tensor) -> Tensor:
    """down(gelu(gate(x)) * up(x)), gelu by the error function."""
    gate, up = self.gate_proj(x), self.up_proj(x)
    return self.down_proj(ops.geglu(gate, up) if gated(self.act_fn, gate, up) else self.act_fn(gate) * up)


def geglu_tanh_mlp(self, x: Tensor) -> Tensor:
    """The same, gelu by tanh."""
    gate, up = self.gate_proj(x), self.up_proj(x)
    return self.down_proj(ops.geglu(gate, up, "tanh") if gated(self.act_fn, gate, up) else self.act_fn(gate) * up)


def _t5_out(self, h: Tensor) -> Tensor:
    h = self.dropout(h)
    weight = self.wo.weight
    if isinstance(weight, Tensor) and weight.dtype != torch.int8:  # kept in float32 where all else is 16 bits wide
        h = h.to(weight.dtype)
    return self.wo(h)


def t5_swiglu(self, hidden_states: Tensor) -> Tensor:
    """T5DenseGatedActDense with silu."""
    gate, up = self.wi_0(hidden_states), self.wi_1(hidden_states)
    return _t5_out(self, ops.swiglu(gate, up) if gated(self.act, gate, up) else self.act(gate) * up)


def t5_geglu(self, hidden_states: Tensor) -> Tensor:
    """T5DenseGatedActDense with gelu by the error function."""
    gate, up = self.wi_0(hidden_states), self.wi_1(hidden_states)
    return _t5_out(self, ops.geglu(gate, up) if gated(self.act, gate, up) else self.act(gate) * up)


def t5_geglu_tanh(self, hidden_states: Tensor) -> Tensor:
    """T5DenseGatedActDense with gelu by tanh: T5 1.1, Flan-T5."""
    gate, up = self.wi_0(hidden_states), self.wi_1(hidden_states)
    return _t5_out(self, ops.geglu(gate, up, "tanh") if gated(self.act, gate, up) else self.act(gate) * up)


def gelu(self, input: Tensor) -> Tensor:
    """An activation module: gelu by the error function."""
    return ops.gelu(input) if fits(input) else type(self).forward(self, input)


def gelu_tanh(self, input: Tensor) -> Tensor:
    """An activation module: gelu by tanh."""
    return ops.gelu(input, "tanh") if fits(input) else type(self).forward(self, input)


# ------------------------------------------------------------------------------------------------- rotary and attention


def rotary_table(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The rotary embedding: what `rotary_attention` turns by. The class's own cosines and sines [B, S, R], each in both
    halves, become a table [B * S, R] in float32 and the rows of it [B, S]."""
    cos, sin = type(self).forward(self, *args, **kwargs)
    half = cos.shape[-1] // 2
    table = torch.cat((cos[..., :half], sin[..., :half]), -1).flatten(0, 1)
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    return table, torch.arange(table.shape[0], device=table.device).view(cos.shape[:2])


def rotary_attention(
    self,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
    past_key_values: Cache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention of Llama, Mistral, Qwen2, Qwen3 and Gemma3. `cache` is `past_key_values` in transformers 4."""
    cache = past_key_values if cache is None else cache
    shape = hidden_states.shape[:-1]
    heads = (*shape, -1, self.head_dim)
    q, k = self.q_proj(hidden_states).view(heads), self.k_proj(hidden_states).view(heads)
    value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    table, position = position_embeddings
    q, k = (ops.rope if fits(q, k) else rope_reference)(q, k, position.expand(shape), table)
    query, key = q.transpose(1, 2), k.transpose(1, 2)
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx, **{_CACHE_EXTRAS: kwargs})
    window = self.sliding_window if hasattr(self, "sliding_window") else getattr(self.config, "sliding_window", None)
    output, weights = attention(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        sliding_window=window,
        **kwargs,
    )
    return self.o_proj(output.reshape(*shape, -1)), weights


def prenorm_layer(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Decoder layer of Llama, Mistral, Qwen2 and Qwen3: the first sum is made inside the second norm."""
    if args:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    h, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    norm = self.post_attention_layernorm
    if not bare(norm) or not fits(h, hidden_states, norm.weight):
        total = hidden_states + h
        return total + self.mlp(norm(total))
    y, total = ops.rms_norm(h, norm.weight, norm.variance_epsilon, residual=hidden_states)
    return total + self.mlp(y)
