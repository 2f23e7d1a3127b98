"""Random models of every family made by transformers, in folders: what our Decoder is checked against."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.gemma3.modeling_gemma3 import eager_attention_forward

from fastllm.models.blocks import PagedBatch
from fastllm.models.decoder import DecoderConfig
from fastllm.ops import PAGE, KVPages

_LLAMA = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
_ENDS = dict(bos_token_id=0, eos_token_id=0)
_BASE = dict(vocab_size=131, num_hidden_layers=2, max_position_embeddings=512)


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
_GEMMA = dict(
    head_dim=32, num_hidden_layers=4, sliding_window=9, query_pre_attn_scalar=24, tie_word_embeddings=True,
    layer_types=["sliding_attention", "full_attention"] * 2,
)  # fmt: skip
_SLIDING = dict(use_sliding_window=True, sliding_window=11, max_window_layers=1, num_hidden_layers=3)
# name -> (class of transformers, what its config gets)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm": ("Llama", _LLAMA | dict(tie_word_embeddings=True, rope_theta=1e5)),
    "llama1": ("Llama", _LLAMA | dict(num_key_value_heads=4, rms_norm_eps=1e-6)),
    "llama3": ("Llama", _LLAMA | _LLAMA3),
    "llama yarn": ("Llama", _LLAMA | _rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama linear": ("Llama", _LLAMA | _rope("linear", factor=2.0)),
    "llama dynamic": ("Llama", _LLAMA | _rope("dynamic", factor=2.0)),
    "llama with biases": ("Llama", _LLAMA | dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", _LLAMA | dict(sliding_window=9, head_dim=32)),
    "mistral, no window": ("Mistral", _LLAMA | dict(sliding_window=None)),
    "qwen2": ("Qwen2", _LLAMA | dict(rope_theta=1e6, tie_word_embeddings=True)),
    "qwen2 sliding": ("Qwen2", _LLAMA | _SLIDING),
    "qwen3": ("Qwen3", _LLAMA | dict(head_dim=32, rope_theta=1e6)),
    "qwen3 with biases": ("Qwen3", _LLAMA | dict(head_dim=16, attention_bias=True, tie_word_embeddings=True)),
    "gemma3": ("Gemma3", _LLAMA | _GEMMA),
    "gemma3 softcap, scaled": (
        "Gemma3",
        _LLAMA | _GEMMA | dict(attn_logit_softcapping=3.0, rope_scaling={"rope_type": "linear", "factor": 8.0}),
    ),
    "gpt2": ("GPT2", _ENDS | dict(n_embd=64, n_head=4, n_layer=2, n_positions=512)),
    "gpt2, exact gelu": (
        "GPT2",
        _ENDS | dict(n_embd=64, n_head=2, n_layer=3, n_positions=512, n_inner=160, activation_function="gelu"),
    ),
    "bloom": ("Bloom", dict(hidden_size=64, n_head=4, n_layer=2)),
    "bloom, 6 heads": ("Bloom", dict(hidden_size=96, n_head=6, n_layer=2)),
}  # fmt: skip
CLASSES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "GPT2": ("GPT2Config", "GPT2LMHeadModel")}


def _capped(module, *args: Any, **kwargs: Any):
    """transformers reads attn_logit_softcapping of Gemma 3 and does not pass it on; its attention can cap, as in Gemma 2."""
    return eager_attention_forward(module, *args, softcap=module.attn_logit_softcapping, **kwargs)


transformers.AttentionInterface.register("capped", _capped)
AttentionMaskInterface.register("capped", eager_mask)


def build(name: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """Weights large enough that a wrong one shows; norms and biases that are neither ones nor zeros."""
    kind, sizes = CONFIGS[name]
    config, model = CLASSES.get(kind, (f"{kind}Config", f"{kind}ForCausalLM"))
    base = _BASE if "hidden_size" in sizes and kind != "Bloom" else {"vocab_size": 131}
    torch.manual_seed(seed)
    settings = base | sizes | {"attn_implementation": implementation(name), **changes}
    made = getattr(transformers, model)(getattr(transformers, config)(**settings))
    for path, weight in made.eval().requires_grad_(False).named_parameters():
        if weight.dim() == 1:
            ones = path.endswith("weight") and kind != "Gemma3"
            torch.nn.init.normal_(weight, 1.0 if ones else 0.0, 0.3)
        else:
            lookup = any(part in path for part in ("embed", "wte", "wpe"))
            depth = weight.shape[0 if kind == "GPT2" else 1]
            torch.nn.init.normal_(weight, 0.0, 0.3 if lookup else depth**-0.5)
    return made


def implementation(name: str) -> str:
    """The attention of transformers that does what a config says."""
    return "capped" if "attn_logit_softcapping" in CONFIGS[name][1] else "eager"


def folder(path: Path, name: str, **changes: Any) -> transformers.PreTrainedModel:
    """The model, saved to `path`."""
    model = build(name, **changes)
    model.save_pretrained(path)
    return model


def logits(model: transformers.PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """[B, S, V] as transformers computes them."""
    with torch.no_grad():
        return model(ids).logits


class Pages:
    """The paged cache of some sequences of at most `capacity` tokens, without an engine; pages in any order."""

    def __init__(self, config: DecoderConfig, sequences: int, capacity: int):
        each = -(-capacity // PAGE)
        self.table = torch.randperm(sequences * each).int().view(sequences, each)
        self.layers = [KVPages.empty(sequences * each, config.kv_heads, config.head_dim) for _ in range(config.layers)]

    def batch(self, *parts: tuple[int, int, int]) -> PagedBatch:
        """Tokens [start, stop) of each (sequence, start, stop), one part after another."""
        rows = [row for row, _, _ in parts]
        position = torch.cat([torch.arange(start, stop) for _, start, stop in parts])
        owner = torch.cat([torch.full((stop - start,), row) for row, start, stop in parts])
        lengths = torch.tensor([0, *(stop - start for _, start, stop in parts)])
        return PagedBatch(
            position=position,
            slot=self.table[owner, position // PAGE].long() * PAGE + position % PAGE,
            block_table=self.table[rows],
            context_len=torch.tensor([stop for _, _, stop in parts], dtype=torch.int32),
            cu_q=lengths.cumsum(0).int(),
            pages=self.layers,
        )
