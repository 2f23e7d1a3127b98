"""Random Llamas made by transformers, and the same weights as a GGUF: what our models are checked against."""

import copy
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import LlamaConfig, LlamaForCausalLM

CONFIGS = {
    "grouped": dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2),
    "one kv head, wide heads": dict(
        hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=1, head_dim=32,
        tie_word_embeddings=True, rope_theta=1e6, vocab_size=131, rms_norm_eps=1e-3,
    ),
    "every head its own": dict(
        hidden_size=96, intermediate_size=128, num_attention_heads=3, num_key_value_heads=3, rope_theta=500.0,
        num_hidden_layers=3,
    ),
}  # fmt: skip
ODD = dict(
    hidden_size=40,
    intermediate_size=52,
    num_attention_heads=5,
    num_key_value_heads=5,
    vocab_size=37,
    tie_word_embeddings=True,
)
TENSORS = {  # of a layer: GGUF -> HF
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
Parts = tuple[dict, dict[str, tuple[np.ndarray, str]]]  # metadata; tensor name -> (stored data, type)


def build(seed: int = 0, **sizes) -> LlamaForCausalLM:
    """Weights large enough that a wrong one shows, norms that are not all ones."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 320, "num_hidden_layers": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "attn_implementation": "eager", **sizes,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(
            weight, 1.0 if weight.dim() == 1 else 0.0, 0.3 if weight.dim() == 1 else weight.shape[1] ** -0.5
        )
        if "embed" in name:
            torch.nn.init.normal_(weight, 0.0, 0.3)
    return model


def names(config: LlamaConfig) -> dict[str, str]:
    """GGUF -> HF, without the suffix `.weight`."""
    table = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    if not config.tie_word_embeddings:
        table["output"] = "lm_head"
    for i in range(config.num_hidden_layers):
        table |= {f"blk.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in TENSORS.items()}
    return table


def heads_of(name: str, config: LlamaConfig) -> int:
    """Of a tensor whose rows a GGUF orders for interleaved rope; 0 for the others."""
    if name.endswith("attn_q"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("attn_k") else 0


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: the halves of a head side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def deinterleave(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def to_gguf(model: LlamaForCausalLM, kind: Callable[[str], str]) -> tuple[Parts, LlamaForCausalLM]:
    """What a GGUF would hold, matrices stored as kind(name), and the model of those weights, dequantised."""
    config, exact, tensors = model.config, copy.deepcopy(model), {}
    state = exact.state_dict()
    for name, theirs in names(config).items():
        weight, heads = state[f"{theirs}.weight"], heads_of(name, config)
        values = weight.numpy()
        stored = "F32" if weight.dim() == 1 else kind(name)
        data = gguf.quants.quantize(
            np.ascontiguousarray(interleave(values, heads) if heads else values), GGMLQuantizationType[stored]
        )
        tensors[f"{name}.weight"] = (data, stored)
        back = gguf.quants.dequantize(data, GGMLQuantizationType[stored])
        weight.copy_(torch.from_numpy(deinterleave(back, heads) if heads else back))
    return (
        {
            "general.architecture": "llama",
            "llama.block_count": config.num_hidden_layers,
            "llama.embedding_length": config.hidden_size,
            "llama.feed_forward_length": config.intermediate_size,
            "llama.attention.head_count": config.num_attention_heads,
            "llama.attention.head_count_kv": config.num_key_value_heads,
            "llama.attention.key_length": config.head_dim,
            "llama.attention.value_length": config.head_dim,
            "llama.rope.dimension_count": config.head_dim,
            "llama.context_length": config.max_position_embeddings,
            "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
            "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        },
        tensors,
    ), exact


def write(path: Path, parts: Parts) -> Path:
    metadata, tensors = parts
    writer = gguf.GGUFWriter(str(path), metadata.get("general.architecture", "llama"))
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[
                type(value)
            ]
            add(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def rounding_inputs(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with the input of every linear rounded as quant_linear rounds it: groups of 32 to s8."""

    def rounded(module, inputs):
        (x,) = inputs
        groups = x.unflatten(-1, (-1, 32))
        scale = groups.abs().amax(-1, keepdim=True) / 127
        return (((groups / scale.clamp(min=1e-30)).round() * scale).flatten(-2),)

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)
    return model
