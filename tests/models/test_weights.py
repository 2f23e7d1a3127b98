"""Weights from files: every stored type keeps its meaning, as Parameters and packed; and files that are refused."""

import copy
import json
import resource
import struct
import subprocess
import sys

import _llama
import gguf
import numpy as np
import pytest
import torch
from _assets import asset
from safetensors.torch import load_file, save_file

from fastllm.models import load
from fastllm.models.gguf import GGUFError
from fastllm.models.weights import load_packed
from fastllm.ops import Panels, QWeight

STORED = {"Q4_0": (4, False), "Q4_1": (4, True), "Q5_0": (8, False), "Q8_0": (8, False)}  # held without loss


def mixed(name: str) -> str:
    """As llama.cpp mixes: v, down and the table in more bits; gate and up differ too."""
    parts = {"attn_v": "Q8_0", "ffn_down": "Q8_0", "token_embd": "Q8_0", "ffn_up": "Q4_1", "attn_output": "F16"}
    return next((kind for part, kind in parts.items() if part in name), "Q4_0")


def with_floats(name: str) -> str:
    """A float part beside quantised ones: qkv becomes float32."""
    return {"attn_v": "F16", "ffn_up": "Q4_0", "ffn_gate": "Q8_0"}.get(name.split(".")[-1], "Q4_1")


KINDS = {k: (lambda name, k=k: k) for k in ("F32", "F16", "BF16", *STORED)} | {
    "mixed": mixed,
    "with floats": with_floats,
}


@pytest.fixture(scope="module", params=_llama.CONFIGS)
def theirs(request):
    return _llama.build(**_llama.CONFIGS[request.param])


@pytest.fixture(scope="module", params=KINDS)
def stored(request, theirs, tmp_path_factory):
    """(path of a GGUF, transformers' model of the weights in it, type of each tensor)"""
    kind = KINDS[request.param]
    parts, exact = _llama.to_gguf(theirs, kind)
    path = _llama.write(tmp_path_factory.mktemp("gguf") / "model.gguf", parts)
    return path, exact, {name: stored for name, (_, stored) in parts[1].items()}


def ids_for(model, *shape: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, shape or (2, 40))


def our_logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids)


def expected(exact) -> dict[str, torch.Tensor]:
    """Our names -> weights out of transformers' model."""
    wanted = {
        "embedding": exact.model.embed_tokens.weight,
        "norm": exact.model.norm.weight,
        "head": exact.lm_head.weight,
    }
    for i, layer in enumerate(exact.model.layers):
        a, m = layer.self_attn, layer.mlp
        wanted |= {
            f"layers.{i}.attn_norm": layer.input_layernorm.weight,
            f"layers.{i}.qkv": torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
            f"layers.{i}.out": a.o_proj.weight,
            f"layers.{i}.mlp_norm": layer.post_attention_layernorm.weight,
            f"layers.{i}.gate_up": torch.cat([m.gate_proj.weight, m.up_proj.weight]),
            f"layers.{i}.down": m.down_proj.weight,
        }
    return wanted


def held(weight) -> torch.Tensor:
    """What a weight means, row-major."""
    if isinstance(weight, QWeight):
        return weight.dequantize()
    if isinstance(weight, Panels):
        halves = (weight.data[0::2], weight.data[1::2]) if weight.swiglu else (weight.data,)
        rows = weight.rows // len(halves)
        return torch.cat([h.transpose(1, 2).reshape(-1, weight.shape[1])[:rows] for h in halves])
    return weight


def assert_holds(model, exact) -> None:
    for name, wanted in expected(exact).items():
        assert torch.equal(held(model.get_submodule(name).weight), wanted), name


def assert_rounds_activations(model, exact) -> None:
    """The logits are those of `exact` with the inputs of its linears rounded to s8. At a tie the two may round apart, and
    what follows in that sequence differs: so many short sequences, of which most agree."""
    ids = ids_for(exact, 60, 3)
    logits, rounded, plain = (
        our_logits(model, ids),
        _llama.logits(_llama.rounding_inputs(exact), ids),
        _llama.logits(exact, ids),
    )
    agree = (logits - rounded).abs().amax((1, 2)) <= 1e-4
    assert agree.float().mean() > 0.7, agree.float().mean()
    assert ((rounded - plain).abs().amax((1, 2)) > 1e-3).all()
    assert (logits - plain).norm() < 0.05 * plain.norm()


# ----------------------------------------------------------------------------------------------------------------- a GGUF


def test_gguf_as_parameters(stored):
    path, exact, _ = stored
    model, ids = load(path), ids_for(exact)
    assert_holds(model, exact)
    assert (our_logits(model, ids) - _llama.logits(exact, ids)).abs().max() <= 1e-4
    names = {name for name, _ in model.named_parameters()}
    assert ("head.weight" in names) != exact.config.tie_word_embeddings and not model.training


def test_gguf_as_float_panels(stored):
    path, exact, _ = stored
    model, ids = load_packed(path, as_float=True), ids_for(exact)
    assert_holds(model, exact)
    assert (our_logits(model, ids) - _llama.logits(exact, ids)).abs().max() <= 1e-4
    assert isinstance(model.layers[0].qkv.weight, Panels) and not next(model.parameters()).requires_grad


def test_gguf_as_stored(stored):
    """Not a bit of the weights is lost, and where all are quantised the logits are those of rounded activations."""
    path, exact, kinds = stored
    model, ids = load_packed(path), ids_for(exact)
    assert_holds(model, exact)
    parts = {"qkv": ("attn_q", "attn_k", "attn_v"), "gate_up": ("ffn_gate", "ffn_up"), "down": ("ffn_down",)}
    for ours, names in parts.items():
        own = [kinds[f"blk.0.{n}.weight"] for n in names]
        weight = getattr(model.layers[0], ours).weight
        if all(k in STORED for k in own):
            form = max(STORED[k][0] for k in own), any(STORED[k][1] for k in own)
            assert isinstance(weight, QWeight) and (weight.bits, weight.has_min) == form
        else:
            assert isinstance(weight, Panels)
    matrices = [kind for name, kind in kinds.items() if "norm" not in name]
    if all(k in STORED for k in matrices):
        assert_rounds_activations(model, exact)
    else:
        error, size = our_logits(model, ids) - _llama.logits(exact, ids), _llama.logits(exact, ids)
        assert error.abs().max() <= 1e-4 or (error.norm() < 0.05 * size.norm() and any(k in STORED for k in matrices))


def test_packed_weights_lie_in_the_arena_and_the_tied_head_shares_them(stored):
    path, exact, _ = stored
    model = load_packed(path)
    first, last = model.arena._free.data_ptr(), model.arena._free.data_ptr() + model.arena.nbytes
    weights = [model.get_submodule(name).weight for name in expected(exact) if "norm" not in name]
    assert all(first <= w.data.data_ptr() and w.data.data_ptr() + w.nbytes <= last for w in weights)
    assert (model.head.weight is model.embedding.weight) == exact.config.tie_word_embeddings
    assert sum({id(w): w.nbytes for w in weights}.values()) <= model.arena.used <= model.arena.nbytes


def test_int8_keeps_what_is_stored_so(theirs, tmp_path):
    """Q4_0 and Q8_0 go into int8 without loss; other types are quantised."""
    parts, exact = _llama.to_gguf(
        theirs, lambda name: {"ffn_down": "Q4_1", "ffn_up": "Q4_0"}.get(name.split(".")[-1], "Q8_0")
    )
    model, wanted = load_packed(_llama.write(tmp_path / "m.gguf", parts), quantize="int8"), expected(exact)
    for name in wanted:
        weight = model.get_submodule(name).weight
        if "norm" not in name:
            assert (weight.bits, weight.has_min) == (8, False)
            same = QWeight.quantize(wanted[name], 8).dequantize() if name.endswith("down") else wanted[name]
            assert torch.equal(weight.dequantize(), same), name


# ------------------------------------------------------------------------------------------------------------- a HF folder


@pytest.fixture
def folder(tmp_path):
    """A small model as transformers saves it."""
    model = _llama.build(**_llama.CONFIGS["grouped"])
    model.save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(folder, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_folder(theirs, tmp_path, dtype, shards):
    copy.deepcopy(theirs).to(dtype).save_pretrained(tmp_path, **({"max_shard_size": "60KB"} if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == shards
    theirs, ids = copy.deepcopy(theirs), ids_for(theirs)
    for weight in theirs.parameters():  # model.to(dtype).float() would round the rope's frequencies too
        weight.copy_(weight.to(dtype))
    for model in (load(tmp_path), load_packed(tmp_path)):
        assert_holds(model, theirs)
        assert (our_logits(model, ids) - _llama.logits(theirs, ids)).abs().max() <= 1e-4


@pytest.mark.parametrize(("quantize", "bits"), [("int8", 8), ("int4", 4)])
def test_folder_quantised(theirs, tmp_path, quantize, bits):
    theirs.save_pretrained(tmp_path)
    model, exact = load_packed(tmp_path, quantize=quantize), copy.deepcopy(theirs)
    for weight in exact.parameters():
        if weight.dim() == 2:
            weight.copy_(QWeight.quantize(weight, bits).dequantize())
    assert_holds(model, exact)
    assert_rounds_activations(model, exact)


def test_parameters_do_not_hang_on_the_file(folder):
    """A file that is overwritten, or gone, changes nothing in a model that was loaded."""
    model, ids = load(folder), torch.arange(20)[None]
    before = our_logits(model, ids)
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 10000)
    path.unlink()
    assert torch.equal(our_logits(model, ids), before)


def test_older_spellings_of_a_config(folder):
    """transformers 4: rope_theta at the top, rope_scaling null, no head_dim, no kv heads of its own."""
    ids = torch.arange(30)[None]
    edit(folder, rope_parameters=None, rope_theta=10000.0, head_dim=None)
    assert torch.equal(our_logits(load(folder), ids), our_logits(load(folder), ids))
    model = load(folder)
    assert model.config.rope_theta == 10000.0 and model.config.head_dim == 16


def test_what_a_folder_may_hold_beside_the_weights(folder):
    ids = torch.arange(30)[None]
    before = our_logits(load(folder), ids)
    save_file({"lora_A": torch.zeros(2)}, folder / "adapter_model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    assert torch.equal(our_logits(load(folder), ids), before)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    edit(folder, tie_word_embeddings=True)
    model = load(folder)
    assert model.config.tied and model.head.weight is model.embedding.weight


# ---------------------------------------------------------------------------------------------------------------- refused


def refused(path, message: str, error=ValueError, **options) -> None:
    for reader in (load, lambda p: load_packed(p, **options)):
        with pytest.raises(error, match=message):
            reader(path)


def gguf_parts(kind="F32", **sizes) -> _llama.Parts:
    return _llama.to_gguf(_llama.build(**{**_llama.CONFIGS["grouped"], **sizes}), KINDS[kind])[0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "lama", "'lama' is not supported; supported: llama, qwen2, .*; nearest: llama, "),
        ("general.architecture", "qwen2", "lacks qwen2.attention.head_count"),
        ("llama.block_count", None, "lacks llama.block_count; the file is incomplete"),
        ("llama.embedding_length", None, "lacks llama.embedding_length"),
        ("llama.attention.layer_norm_rms_epsilon", None, "lacks llama.attention.layer_norm_rms_epsilon"),
        ("llama.block_count", 3, "there is no tensor 'blk.2.attn_norm.weight'"),
        ("llama.block_count", 1, "holds 9 tensors that a plain llama does not have, 'blk.1.attn_norm.weight' first"),
        ("llama.feed_forward_length", 95, r"'blk.0.ffn_gate.weight' has shape \(96, 64\), the config wants \(95, 64\)"),
        ("llama.embedding_length", 32, r"'token_embd.weight' has shape \(320, 64\), the config wants \(320, 32\)"),
        ("llama.attention.head_count", 8, r"'blk.0.attn_q.weight' has shape \(64, 64\), the config wants \(128, 64\)"),
        (
            "llama.attention.head_count_kv",
            4,
            r"'blk.0.attn_k.weight' has shape \(32, 64\), the config wants \(64, 64\)",
        ),
        ("llama.attention.head_count_kv", 3, "heads=4 must be a multiple of kv_heads=3"),
        (
            "llama.attention.head_count_kv",
            [2, 2],
            r"llama.attention.head_count_kv is \[2, 2\]; one number for all layers",
        ),
        ("llama.attention.head_count", 0, "every size must be at least 1"),
        ("llama.attention.value_length", 8, "llama.attention.value_length is 8, not the head size 16; not supported"),
        ("llama.rope.dimension_count", 8, "llama.rope.dimension_count is 8, not the head size 16"),
        ("llama.rope.scaling.type", "yarn", "lacks llama.rope.scaling.original_context_length"),
        ("llama.rope.scaling.type", "longrope", "rope scaling 'longrope' is not supported; none, linear and yarn are"),
        ("llama.rope.scaling.attn_factor", 1.5, "llama.rope.scaling.attn_factor is 1.5; supported: 1.0"),
        ("llama.rope.scaling.yarn_ext_factor", 0.0, "llama.rope.scaling.yarn_ext_factor is 0.0; supported: 1.0"),
        ("llama.attention.causal", False, "llama.attention.causal is False; supported: True"),
        ("llama.attention.sliding_window", 9, "llama.attention.sliding_window is 9; a window is supported of gemma3"),
        ("llama.final_logit_softcapping", 30.0, "llama.final_logit_softcapping is 30.0; supported: 0.0"),
        ("llama.logit_scale", 0.5, "llama.logit_scale is 0.5; supported: 1.0"),
        ("split.count", 2, "is one of 2 parts of a split file; merge them"),
    ],
)
def test_gguf_metadata_refused(tmp_path, key, value, message):
    metadata, tensors = gguf_parts()
    metadata[key] = value
    refused(_llama.write(tmp_path / "m.gguf", ({k: v for k, v in metadata.items() if v is not None}, tensors)), message)


def as_f32(*shape: int) -> tuple[np.ndarray, str]:
    return np.ones(shape, np.float32), "F32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_embd.weight": None}, "there is no tensor 'token_embd.weight'; the file is incomplete"),
        ({"output_norm.weight": None}, "there is no tensor 'output_norm.weight'"),
        ({"blk.1.attn_v.weight": None}, "there is no tensor 'blk.1.attn_v.weight'"),
        ({"blk.1.ffn_norm.weight": as_f32(63)}, r"'blk.1.ffn_norm.weight' has shape \(63,\), the config wants \(64,\)"),
        ({"blk.1.attn_v.weight": as_f32(16, 64)}, r"'blk.1.attn_v.weight' has shape \(16, 64\), the config wants \(32, 64\)"),
        ({"blk.0.ffn_up.weight": as_f32(96, 32)}, r"'blk.0.ffn_up.weight' has shape \(96, 32\)"),
        ({"blk.0.ffn_down.weight": as_f32(96, 64)}, r"'blk.0.ffn_down.weight' has shape \(96, 64\), the config wants \(64, 96\)"),
        ({"output.weight": as_f32(319, 64)}, r"'output.weight' has shape \(319, 64\), the config wants \(320, 64\)"),
        ({"blk.0.attn_q.bias": as_f32(64)}, "there is no tensor 'blk.0.attn_k.bias'"),
        ({"blk.1.attn_q.bias": as_f32(64)}, "does not have, 'blk.1.attn_q.bias' first; it is another model"),
        ({"rope_freqs.weight": as_f32(8), "llama.rope.scale_linear": 2.0}, "rope scaling 'linear' beside rope_freqs.weight is"),
        ({"rope_freqs.weight": as_f32(4)}, "short_factor of longrope has 4 values; 16 dimensions take 8"),
        (
            {"blk.0.ffn_up.weight": (np.zeros((96, 66), np.uint8), "IQ2_XXS")},
            "'blk.0.ffn_up.weight' is stored as IQ2_XXS, which is not supported; supported: F32, F16, BF16, Q4_0",
        ),
    ],
)  # fmt: skip
def test_gguf_tensors_refused(tmp_path, changes, message):
    metadata, tensors = gguf_parts(hidden_size=256 if "IQ2" in message else 64)
    metadata |= {k: v for k, v in changes.items() if k.startswith("llama.")}
    tensors |= {k: v for k, v in changes.items() if k not in metadata}
    tensors = {k: v for k, v in tensors.items() if v is not None}
    refused(_llama.write(tmp_path / "m.gguf", (metadata, tensors)), message)


def test_damaged_gguf_refused(tmp_path):
    path = _llama.write(tmp_path / "m.gguf", gguf_parts("Q4_0"))
    whole = path.read_bytes()
    for length in (0, 20, 1000, len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:length])
        refused(path, "m.gguf", GGUFError)
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    refused(path, "not a GGUF file", GGUFError)
    refused(tmp_path / "none.gguf", "none.gguf", FileNotFoundError)


def test_quantising_few_bits_again_is_refused(tmp_path):
    for kind in ("Q4_0", "Q4_1", "Q5_0"):
        path = _llama.write(tmp_path / f"{kind}.gguf", gguf_parts(kind))
        with pytest.raises(
            ValueError, match=f"token_embd.weight is stored as {kind}: quantising 5 bits or fewer again only loses"
        ):
            load_packed(path, quantize="int4")
        assert load_packed(path, quantize="int8").layers[0].qkv.weight.bits == 8


def test_bad_options(folder):
    for wrong in ("int5", "Q4_0", 8, True, ""):
        with pytest.raises(ValueError, match="allowed: None, 'int8', 'int4'"):
            load_packed(folder, quantize=wrong)
    with pytest.raises(ValueError, match="quantize='int8' and float32 weights exclude each other"):
        load_packed(folder, quantize="int8", as_float=True)


def test_rows_that_cannot_be_quantised_are_refused(tmp_path):
    _llama.build(**_llama.ODD).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'int4': model.embed_tokens.weight has rows of 40, no multiple of 32"):
        load_packed(tmp_path, quantize="int4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLm"]}, "'LlamaForCausalLm' is not supported; .* nearest: LlamaForCausalLM"),
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supported"),
        ({"architectures": None}, r"architecture '\(none named\)' is not supported"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 9.0}},
            "rope scaling .*llama3.* is not supported: .* must be below high_freq_factor",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": -2.0}}, "factor is -2.0; it must be positive"),
        ({"attention_bias": True}, "there is no tensor 'model.layers.0.self_attn.q_proj.bias'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; supported: silu, "),
        ({"num_hidden_layers": 3}, "there is no tensor 'model.layers.2.input_layernorm.weight'; a shard is missing"),
        ({"num_hidden_layers": 1}, "holds 9 tensors that a plain llama does not have, 'model.layers.1"),
        ({"vocab_size": 321}, r"'model.embed_tokens.weight' has shape \(320, 64\), the config wants \(321, 64\)"),
        ({"intermediate_size": None}, "config.json lacks 'intermediate_size'; the file is incomplete"),
    ],
)  # fmt: skip
def test_folder_config_refused(folder, changes, message):
    edit(folder, **changes)
    refused(folder, message)


def test_folder_tensors_refused(folder):
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    refused(folder, "holds 1 tensors that a plain llama does not have, 'model.layers.0.self_attn.q_proj.bias' first")
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if "bias" not in k and k != "model.norm.weight"})
    refused(folder, "there is no tensor 'model.norm.weight'")
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}))
    refused(folder, "'model.norm.weight' is stored as I32; supported: F32, F16, BF16")


def test_damaged_folders_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", struct.pack("<Q", 1 << 60) + whole[8:]):
        path.write_bytes(damaged)
        refused(folder, "model.safetensors cannot be read: .*; fetch it again")
    path.unlink()
    refused(folder, r"has no \*?\.safetensors")
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin is a pickle, and loading one runs code")
    path.write_bytes(whole)
    (folder / "config.json").write_text("{")
    refused(folder, "config.json cannot be read")


def test_a_missing_shard_is_named(tmp_path):
    _llama.build(**_llama.CONFIGS["grouped"]).save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    refused(tmp_path, f"1 of {len(shards)} shards are missing: {shards[1].name}")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    refused(tmp_path, "index.json cannot be read")
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, "there is no tensor 'model.* a shard is missing")


# ------------------------------------------------------------------------------------------------------------------ memory

PEAK = """
import resource, sys
import gguf.quants, torch
from fastllm.models.weights import load_packed
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = load_packed(sys.argv[1])
print(peak() - before - model.arena.used)
"""


@pytest.mark.skipif(
    not hasattr(resource, "RUSAGE_SELF") or sys.platform != "linux", reason="ru_maxrss in KiB is Linux's"
)
def test_loading_holds_little_beside_the_weights():
    """The file's pages go as they are read: 61 MB of the real file are more than what may be left over."""
    path = asset()
    run = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 60e6


def test_types_that_are_dequantised_by_the_table_of_gguf():
    """The types that load() takes are those that the gguf package can dequantise here."""
    from fastllm.models.gguf import SUPPORTED

    for name in SUPPORTED:
        kind = gguf.GGMLQuantizationType[name]
        rows = np.zeros((2, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        assert gguf.quants.dequantize(rows, kind).shape == (2, gguf.GGML_QUANT_SIZES[kind][0])


def test_a_tensor_that_two_files_hold_is_named(tmp_path):
    _llama.build(**_llama.CONFIGS["grouped"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "two.safetensors")
    refused(tmp_path, "tensor 'model.norm.weight' is in one.safetensors and in two.safetensors; remove the one")
