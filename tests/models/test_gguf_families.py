"""GGUF files of every architecture, named by the gguf package's own table and ordered as llama.cpp's converter orders them; and
the types that are held without loss, or not."""

from pathlib import Path

import _families
import _llama
import gguf
import numpy as np
import pytest
import torch

from fastllm.models import load, save
from fastllm.models.gguf import as_q8_0
from fastllm.models.weights import load_packed
from fastllm.ops import Panels, QWeight, RopeScaling

TYPES = gguf.GGMLQuantizationType
YARN = RopeScaling("yarn", 4.0, 32, beta_fast=8.0)
# name of _families -> architecture; what its loader knows without being told is told where a test wants another value
ARCHITECTURES = {
    "llama1": "llama",
    "llama with biases": "llama",
    "llama linear": "llama",
    "llama yarn": "llama",
    "llama3": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "gpt2": "gpt2",
    "bloom": "bloom",
    "bloom, 6 heads": "bloom",
}


def converted(name: str, values: torch.Tensor, config, arch: str) -> np.ndarray:
    """A tensor of transformers as llama.cpp's converter lays it."""
    heads = config.num_attention_heads
    if arch == "llama" and ("q_proj" in name or "k_proj" in name):
        count = heads if "q_proj" in name else config.num_key_value_heads
        flat = values if values.dim() == 2 else values[:, None]
        values = torch.from_numpy(_llama.interleave(flat.numpy(), count)).reshape(values.shape)
    if arch == "gemma3" and name.endswith("norm.weight"):
        values = values + 1
    if arch == "gpt2" and values.dim() == 2 and "wte" not in name and "wpe" not in name:
        values = values.t()
    if arch == "bloom" and "query_key_value" in name:
        whole = values.unflatten(0, (heads, 3, -1))
        values = torch.cat([whole[:, i].flatten(0, 1) for i in range(3)])
    return np.ascontiguousarray(values.numpy())


def metadata(config, arch: str) -> dict:
    c, norm = config, "layer_norm_epsilon" if arch in ("gpt2", "bloom") else "layer_norm_rms_epsilon"
    eps = c.layer_norm_epsilon if arch in ("gpt2", "bloom") else c.rms_norm_eps
    made = {
        "block_count": c.num_hidden_layers,
        "embedding_length": c.hidden_size,
        "feed_forward_length": getattr(c, "intermediate_size", 4 * c.hidden_size),
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": getattr(c, "num_key_value_heads", c.num_attention_heads),
        "context_length": getattr(c, "max_position_embeddings", 512),
        f"attention.{norm}": eps,
    }
    if getattr(c, "head_dim", None):
        made |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    rope = getattr(c, "rope_parameters", None)
    if rope:
        rope = rope.get("full_attention", rope)
        made["rope.freq_base"] = float(rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            made |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
        if rope["rope_type"] == "yarn":
            made["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if arch == "gemma3":
        made |= {"attention.sliding_window": c.sliding_window, "attention.sliding_window_pattern": 2}
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in made.items()}


def write(path: Path, model, arch: str, kind: str) -> Path:
    """The model as a GGUF whose matrices are stored as `kind`."""
    c, tensors = model.config, {}
    table = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), c.num_hidden_layers
    )
    for name, values in dict(model.named_parameters()).items():
        data, stored = converted(name, values.detach(), c, arch), "F32"
        if data.ndim == 2 and "wpe" not in name and kind != "F32":
            data, stored = gguf.quants.quantize(data, TYPES[kind]), kind
        name = name.removeprefix("transformer.") if arch == "bloom" else name
        tensors[table.get_name(name, try_suffixes=(".weight", ".bias"))] = (data, stored)
    rope = getattr(c, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        w, _ = frequencies(c)
        plain = rope["rope_theta"] ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
        tensors["rope_freqs.weight"] = ((plain / w).float().numpy(), "F32")
    return _llama.write(path, (metadata(c, arch), tensors))


def frequencies(config):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))


def model_for(name: str):
    """Without what a GGUF of the architecture cannot say: Gemma 3 divides by the root of its head size there."""
    return _families.build(name, **({"query_pre_attn_scalar": 32} if name == "gemma3" else {}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_gguf_is_the_model_it_was_made_from(name, tmp_path):
    theirs = model_for(name)
    path = write(tmp_path / "m.gguf", theirs, ARCHITECTURES[name], "F32")
    ours, ids = load(path), torch.randint(131, (2, 60))
    with torch.no_grad():
        assert (ours(ids) - _families.logits(theirs, ids)).abs().max() <= 1e-4
        assert torch.equal(load_packed(path)(ids), ours(ids))
    save(ours, tmp_path / "folder")
    with torch.no_grad():
        assert (load(tmp_path / "folder")(ids) - ours(ids)).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
@pytest.mark.parametrize("name", ["llama with biases", "qwen2", "gemma3", "gpt2", "bloom"])
def test_stored_types_are_held_without_loss(name, kind, tmp_path):
    path = write(tmp_path / "m.gguf", model_for(name), ARCHITECTURES[name], kind)
    packed, exact, held = load_packed(path), load(path), 0
    for module_name, module in packed.named_modules():
        if isinstance(getattr(module, "weight", None), QWeight):
            assert module.weight.bits == (4 if kind in ("Q4_0", "Q4_1") else 8)
            assert torch.equal(module.weight.dequantize(), exact.get_submodule(module_name).weight), module_name
            held += 1
    assert held == 1 + 4 * packed.config.layers + (not packed.config.tied or 1)
    assert not any(isinstance(getattr(m, "weight", None), Panels) for m in packed.modules())


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_types_are_dequantised_to_float_panels(kind, tmp_path):
    """Neither fits into groups of 32 with a float16 scale: nothing is rounded, the weights become float32."""
    theirs = _families.build("llama1", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    metadata_, tensors = metadata(theirs.config, "llama"), {}
    base = write(tmp_path / "f32.gguf", theirs, "llama", "F32")
    size = gguf.GGML_QUANT_SIZES[TYPES[kind]][1]
    random, wanted = np.random.default_rng(0), {}
    for tensor in gguf.GGUFReader(base).tensors:
        data, stored = np.array(tensor.data), "F32"
        if data.ndim == 2:
            data, stored = random.integers(0, 256, (len(data), size), dtype=np.uint8), kind
            scales = data[:, :4] if kind == "Q4_K" else data[:, -2:]
            scales.view(np.float16)[:] = random.uniform(1e-5, 1e-4, scales.view(np.float16).shape)
            wanted[tensor.name] = gguf.quants.dequantize(data, TYPES[kind])
        tensors[tensor.name] = (data, stored)
    path = _llama.write(tmp_path / "k.gguf", (metadata_, tensors))
    packed, exact = load_packed(path), load(path)
    assert isinstance(packed.layers[0].gate_up.weight, Panels) and isinstance(packed.embedding.weight, Panels)
    up_down = [wanted[f"blk.0.ffn_{part}.weight"] for part in ("gate", "up")]
    assert np.array_equal(exact.layers[0].gate_up.weight.detach(), np.concatenate(up_down))
    assert np.array_equal(exact.layers[0].down.weight.detach(), wanted["blk.0.ffn_down.weight"])
    q = _llama.deinterleave(wanted["blk.0.attn_q.weight"], theirs.config.num_attention_heads)
    assert np.array_equal(exact.layers[0].qkv.weight[: len(q)].detach(), q)
    ids = torch.randint(131, (2, 20))
    with torch.no_grad():
        assert torch.equal(packed(ids), exact(ids))
    assert load_packed(path, quantize="int8").layers[0].down.weight.bits == 8
    if kind == "Q4_K":
        with pytest.raises(ValueError, match="stored as Q4_K: quantising 5 bits or fewer again only loses quality"):
            load_packed(path, quantize="int4")


def test_q5_0_as_q8_0():
    """Every byte pattern of a block: the same values as the gguf package gives."""
    blocks = np.random.default_rng(0).integers(0, 256, (300, 3 * 22), dtype=np.uint8)
    blocks.reshape(-1, 22)[:, :2].view(np.float16)[:] = np.random.default_rng(1).standard_normal((900, 1))
    wide = as_q8_0(blocks)
    assert wide.shape == (300, 3 * 34)
    assert np.array_equal(gguf.quants.dequantize(wide, TYPES.Q8_0), gguf.quants.dequantize(blocks, TYPES.Q5_0))


def test_what_the_metadata_says(tmp_path):
    gemma = load(write(tmp_path / "g.gguf", model_for("gemma3"), "gemma3", "F32")).config
    assert (gemma.window, gemma.full_layers, gemma.rope_local_theta) == (9, (1, 3), 1e4)
    llama = load(write(tmp_path / "l.gguf", model_for("llama with biases"), "llama", "F32")).config
    assert llama.qkv_bias and llama.out_bias and llama.mlp_bias and not llama.tied
    yarn = load(write(tmp_path / "y.gguf", model_for("llama yarn"), "llama", "F32")).config
    assert yarn.rope_scaling == RopeScaling("yarn", 4.0, 128)
    assert load(write(tmp_path / "2.gguf", model_for("gpt2"), "gpt2", "F32")).config.tied


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"factor": 2.0, "type": "none"}, None),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 8.0}, YARN),
    ],
)
def test_what_the_metadata_says_of_rope(tmp_path, keys, scaling):
    values, tensors = _llama.to_gguf(_llama.build(**_llama.CONFIGS["grouped"]), lambda name: "F32")[0]
    values |= {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    assert load(_llama.write(tmp_path / "r.gguf", (values, tensors))).config.rope_scaling == scaling
    if keys == {"factor": 2.0}:  # as files of 2023 have it
        values = {("llama.rope.scale_linear" if k.endswith("scaling.factor") else k): v for k, v in values.items()}
        assert load(_llama.write(tmp_path / "o.gguf", (values, tensors))).config.rope_scaling == scaling
