"""Every family of decoders: parity with transformers on random weights, the contract of forward and step, folders both ways."""

import copy
import json
import shutil

import _families
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastllm import LLM
from fastllm.decode.graph import capture
from fastllm.models import load, save
from fastllm.models.blocks import Projection
from fastllm.models.decoder import PRESETS, Decoder, DecoderConfig
from fastllm.models.families import FAMILIES, read_config, write_config
from fastllm.models.weights import load_packed, stored_parts
from fastllm.ops import Panels, QWeight


@pytest.fixture(scope="module", params=_families.CONFIGS)
def pair(request, tmp_path_factory):
    """(transformers' model, the folder it was saved to)"""
    path = tmp_path_factory.mktemp("model")
    return _families.folder(path, request.param), path


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(131, shape)


def test_logits_and_hidden_equal_transformers(pair):
    theirs, path = pair
    ours, packed = load(path), load_packed(path)
    for shape in ((1, 1), (3, 2), (2, 17), (2, 70), (1, 300)):
        ids = random_ids(*shape)
        with torch.no_grad():
            logits, base = ours(ids), theirs.base_model(ids).last_hidden_state
            assert (logits - _families.logits(theirs, ids)).abs().max() <= 1e-4, shape
            assert (ours.norm(ours.hidden(ids)) - base).abs().max() <= 1e-4, shape
            assert torch.equal(packed(ids), logits), shape


def test_gradients_equal_transformers(pair):
    """Of every tensor of the file."""
    theirs, path = copy.deepcopy(pair[0]).requires_grad_(), pair[1]
    ours, ids = load(path), random_ids(2, 21)
    ours(ids).log_softmax(-1)[..., 0].sum().backward()
    theirs(ids).logits.log_softmax(-1)[..., 0].sum().backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    for parameter in ours.parameters():
        parameter.data, parameter.grad = parameter.grad, None
    found = {name: make() for name, _, make in stored_parts(ours)}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # where queries and keys see one another only through a softmax, a bias of the keys has no gradient but rounding
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def stepwise(model: Decoder, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """Logits [S, V] of one sequence through the paged cache, `chunk` tokens at a time."""
    pages, pieces = _families.Pages(model.config, 1, len(ids)), []
    for start in range(0, len(ids), chunk):
        stop = min(start + chunk, len(ids))
        pieces.append(model.logits(model.step(ids[start:stop], pages.batch((0, start, stop)))))
    return torch.cat(pieces)


@pytest.mark.parametrize("form", ["parameters", "float32", "int8", "int4"])
def test_decoding_gives_the_bits_of_the_forward(pair, form):
    """Over more than one tile of keys: 256. And a sequence does not depend on its batch."""
    path = pair[1]
    model = load(path) if form == "parameters" else load_packed(path, None if form == "float32" else form)
    ids = random_ids(2, 290)
    with torch.no_grad():
        whole = model(ids)
        assert torch.equal(model(ids[1:])[0], whole[1]) and torch.equal(model(ids[:, :33]), whole[:, :33])
        for chunk in (7, 64, 290):
            assert torch.equal(stepwise(model, ids[0], chunk), whole[0]), chunk
        assert torch.equal(stepwise(model, ids[1, :40], 1), whole[1, :40])


@pytest.mark.parametrize("form", ["parameters", "int8"])
def test_a_captured_step_of_two_sequences(pair, form):
    """Nothing but our kernels runs in a step, also where rows of different sequences stand side by side."""
    model = load(pair[1]).requires_grad_(False) if form == "parameters" else load_packed(pair[1], form)
    ids, pages = random_ids(2, 40), _families.Pages(model.config, 2, 40)
    with torch.no_grad():
        model.step(torch.cat((ids[0, :39], ids[1, :24])), pages.batch((0, 0, 39), (1, 0, 24)))
        batch, tokens = pages.batch((1, 24, 25), (0, 39, 40)), torch.stack((ids[1, 24], ids[0, 39]))
        captured = capture(lambda: model.logits(model.step(tokens, batch)))
        captured.outputs.zero_()
        captured.replay()
        assert torch.equal(captured.outputs[0], model(ids[1:, :25])[0, 24])
        assert torch.equal(captured.outputs[1], model(ids[:1])[0, 39])


def test_quantised_weights_hold_what_quantising_gives(pair):
    model, exact = load_packed(pair[1], quantize="int8"), load(pair[1])
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), QWeight):
            wanted = exact.get_submodule(name).weight
            assert torch.equal(module.weight.dequantize(), QWeight.quantize(wanted, 8).dequantize()), name
        elif isinstance(module, Projection):
            pytest.fail(f"{name} is not quantised")


# ------------------------------------------------------------------------------------------------------------- save


def tensors(path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(pair, tmp_path, dtype):
    """What is loaded and saved again has the same bits, and transformers reads it as the same model."""
    theirs = copy.deepcopy(pair[0]).to(dtype)
    theirs.save_pretrained(tmp_path / "a")
    ours = load(tmp_path / "a")
    save(ours, tmp_path / "b", dtype=dtype)
    assert_same(tensors(tmp_path / "b"), tensors(tmp_path / "a"))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert read_config(json.loads((tmp_path / "b" / "config.json").read_text()), "b") == read_config(config, "a")
    attention = pair[0].config._attn_implementation
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", attn_implementation=attention)
    assert type(again) is type(theirs) and again.dtype == dtype
    again, ids = again.eval().float(), random_ids(2, 40)
    assert torch.equal(_families.logits(again, ids), _families.logits(pair[0].eval(), ids)) or dtype != torch.float32


@pytest.mark.parametrize("name", ["smollm", "llama1", "gpt2", "bloom", "gemma3"])
def test_shards(tmp_path, name):
    theirs = _families.build(name)
    theirs.save_pretrained(tmp_path / "a", max_shard_size="60KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    save(load(tmp_path / "a"), tmp_path / "b", shard_bytes=60_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    assert_same(tensors(tmp_path / "b"), tensors(tmp_path / "a"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", attn_implementation="eager").eval()
    ids = random_ids(1, 30)
    assert torch.equal(_families.logits(again, ids), _families.logits(theirs, ids))
    save(load(tmp_path / "b"), tmp_path / "b", more={"eos_token_id": 7})  # over itself, in one file
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == names
    assert_same(tensors(tmp_path / "b"), tensors(tmp_path / "a"))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["eos_token_id"] == 7


@pytest.mark.parametrize("name", ["gpt2", "bloom", "smollm"])
def test_a_folder_without_the_prefix(tmp_path, name):
    """As GPT-2 and BLOOM lie on the Hub; GPT-2 with its masks."""
    theirs = _families.folder(tmp_path, name)
    base = {"gpt2": "transformer.", "bloom": "transformer.", "smollm": "model."}[name]
    held = {n.removeprefix(base): t for n, t in tensors(tmp_path).items()}
    if name == "gpt2":
        held |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    ids = random_ids(1, 20)
    with torch.no_grad():
        assert (load(tmp_path)(ids) - _families.logits(theirs, ids)).abs().max() <= 1e-4


TIED = {"smollm": "model.embed_tokens", "gemma3": "model.embed_tokens", "gpt2": "transformer.wte",
        "bloom": "transformer.word_embeddings"}  # fmt: skip


@pytest.mark.parametrize("name", TIED)
def test_a_head_of_its_own_that_the_config_calls_tied(tmp_path, name):
    """transformers goes by the weights then; a head that is the same is tied."""
    theirs = _families.folder(tmp_path / "a", name)
    held, ids = tensors(tmp_path / "a"), random_ids(2, 20)
    held["lm_head.weight"] = held[f"{TIED[name]}.weight"].clone()
    save_file(held, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    same = load(tmp_path / "a")
    assert same.config.tied and same.head.weight is same.embedding.weight
    held["lm_head.weight"][-1, -1] += 1  # the last one that is compared
    save_file(held, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    attention = theirs.config._attn_implementation
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", attn_implementation=attention).eval()
    ours = load(tmp_path / "a")
    with torch.no_grad():
        logits = ours(ids)
        assert not ours.config.tied and (logits - same(ids)).abs().max() > 1e-2
        assert (logits - _families.logits(theirs, ids)).abs().max() <= 1e-4
        assert torch.equal(load_packed(tmp_path / "a")(ids), logits)
    save(ours, tmp_path / "b")
    assert_same(tensors(tmp_path / "b"), held)
    assert torch.equal(load(tmp_path / "b")(ids), logits)


@pytest.mark.parametrize("name", TIED)
def test_of_two_that_are_tied_the_head_alone_is_stored(tmp_path, name):
    theirs = _families.folder(tmp_path / "a", name)
    held, ids = tensors(tmp_path / "a"), random_ids(2, 20)
    wanted = load(tmp_path / "a")
    save(wanted, tmp_path / "b")
    held["lm_head.weight"] = held.pop(f"{TIED[name]}.weight")
    save_file(held, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    ours = load(tmp_path / "a")
    with torch.no_grad():
        assert ours.config == wanted.config and torch.equal(ours(ids), wanted(ids))
        assert torch.equal(load_packed(tmp_path / "a")(ids), wanted(ids))
    attention = theirs.config._attn_implementation
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", attn_implementation=attention).eval()
    assert torch.equal(_families.logits(again, ids), _families.logits(theirs, ids))
    save(ours, tmp_path / "c")
    assert_same(tensors(tmp_path / "c"), tensors(tmp_path / "b"))


def test_a_file_beside_an_index_of_what_stood_there(tmp_path):
    """transformers, too, reads model.safetensors then, and does not miss the shards."""
    for seed, size in ((0, "60KB"), (1, "1GB")):
        theirs = _families.build("smollm", seed)
        theirs.save_pretrained(tmp_path / f"{seed}", max_shard_size=size)
    for file in (tmp_path / "1").iterdir():
        shutil.copy(file, tmp_path / "0")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "0", attn_implementation="eager")
    ids = random_ids(1, 20)
    for _ in range(2):
        assert (tmp_path / "0" / "model.safetensors.index.json").exists()
        with torch.no_grad():
            logits = load(tmp_path / "0")(ids)
            assert torch.equal(_families.logits(again, ids), _families.logits(theirs, ids))
            assert (logits - _families.logits(theirs, ids)).abs().max() <= 1e-4
        for shard in (tmp_path / "0").glob("model-*.safetensors"):
            shard.unlink()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_a_config_of_transformers(name, tmp_path):
    hf = write_config(PRESETS[name])
    assert read_config(hf, name) == PRESETS[name]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.num_hidden_layers == PRESETS[name].layers and theirs.hidden_size == PRESETS[name].dim
    theirs.save_pretrained(tmp_path / "again")
    assert read_config(json.loads((tmp_path / "again" / "config.json").read_text()), name) == PRESETS[name]
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(theirs).parameters())
        assert sum(p.numel() for p in Decoder(PRESETS[name]).parameters()) == size


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "model"
    _families.folder(path, "smollm")
    with pytest.raises(TypeError, match="packed for decoding; load the model with fastllm.models.load"):
        save(load_packed(path), tmp_path / "b")
    small = dict(vocab=32, layers=1, dim=32, ffn=32, heads=2, kv_heads=2, head_dim=16, max_position=64)
    with pytest.raises(
        ValueError, match="LlamaForCausalLM cannot have window=5, qk_norm=True; give the config another"
    ):
        save(Decoder(DecoderConfig(**small, window=5, qk_norm=True)), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    _families.folder(tmp_path, "smollm")
    before, model = {p.name: p.read_bytes() for p in tmp_path.iterdir()}, load(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastllm.files.Replacing.write", full)
    with pytest.raises(OSError, match="No space left"):
        save(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# ---------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported; None is"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("qwen2", {"is_causal": False}, "is_causal=False is not supported; True is"),
        ("gemma3", {"hidden_activation": "relu"}, "hidden_activation 'relu' is not supported; supported: silu, gelu_py"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types .* must be 4 times"),
        ("gemma3", {"head_dim": 16}, r"q_proj.weight' has shape \(128, 64\), the config wants \(64, 64\)"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ("gpt2", {"n_positions": 513}, r"'transformer.wpe.weight' has shape \(512, 64\), the config wants \(513, 64\)"),
        ("gpt2", {"n_inner": 128}, r"c_fc.weight' has shape \(256, 64\), the config wants \(128, 64\)"),
        ("gpt2", {"n_layer": None}, "config.json lacks 'n_layer'; the file is incomplete"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm=True is not supported; False is"),
        ("mistral", {"sliding_window": 0}, "window=0; allowed: an int of at least 1, or None"),
        ("mistral", {"hidden_size": "64"}, "hidden_size is '64', wanted int"),
        ("llama3", {"rope_parameters": {"rope_type": "su"}}, "rope scaling .*su.* is not supported: .* allowed: linear"),
        ("llama3", {"rope_parameters": [1]}, "config.json cannot be read: TypeError"),
        ("qwen2", {"architectures": ["Qwen2MoeForCausalLM"]}, "'Qwen2MoeForCausalLM' is not .* nearest: Qwen2ForCausalLM, "),
        ("qwen3", {"architectures": ["Qwen2ForCausalLM"]}, "there is no tensor 'model.layers.0.self_attn.q_proj.bias'"),
        ("llama1", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported; 1.0 is"),
    ],
)  # fmt: skip
def test_refused(tmp_path, name, changes, message):
    _families.folder(tmp_path, name)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    for reader in (load, load_packed):
        with pytest.raises(ValueError, match=message):
            reader(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "qwen2"])
def test_a_missing_bias_is_named(tmp_path, name):
    _families.folder(tmp_path, name)
    held = tensors(tmp_path)
    gone = next(n for n in held if n.endswith("bias"))
    save_file({n: t for n, t in held.items() if n != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"there is no tensor '{gone}'"):
        load(tmp_path)


def test_a_truncated_shard_is_named(tmp_path):
    _families.build("gemma3").save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{shard.name} cannot be read: .*; fetch it again"):
        load(tmp_path)


def test_a_pickle_is_refused_with_the_reason(tmp_path):
    theirs = _families.folder(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    for reader in (load, load_packed, LLM):
        with pytest.raises(
            ValueError, match=r"pytorch_model.bin is a pickle, and loading one runs code .* safetensors"
        ):
            reader(tmp_path)


def test_every_architecture_is_tested():
    tested = {_families.CLASSES.get(k, ("", f"{k}ForCausalLM"))[1] for k, _ in _families.CONFIGS.values()}
    assert tested == set(FAMILIES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_stay_float32(tmp_path, dtype):
    """A model in half precision turns by the angles of the full one, and has its slopes."""
    for name in ("gemma3", "bloom"):
        _families.folder(tmp_path / name, name)
        model = load(tmp_path / name)
        tables = {n: b.clone() for n, b in model.named_buffers()}
        ids, wanted = random_ids(1, 20), None
        with torch.no_grad():
            wanted = model(ids)
            model = model.to(dtype)
            assert {n: b.dtype for n, b in model.named_buffers()} == dict.fromkeys(tables, torch.float32)
            assert all(torch.equal(b, tables[n]) for n, b in model.named_buffers())
            error = (model(ids).float() - wanted).norm() / wanted.norm()
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01)
    shutil.rmtree(tmp_path)


def test_a_norm_of_one_plus_weight_follows_its_weight(tmp_path):
    """What it multiplies by is made once, and again when the weight has changed."""
    _families.folder(tmp_path, "gemma3")
    model, ids = load(tmp_path), random_ids(1, 9)
    with torch.no_grad():
        before = model(ids)
        assert model.norm.gain is model.norm.gain
        model.norm.weight.add_(1.0)
        assert not torch.equal(model(ids), before)
        model.norm.weight.sub_(1.0)
        assert torch.allclose(model(ids), before, atol=1e-5)


def test_packed_kinds(tmp_path):
    """Positions are only looked up and stay rows; everything that is multiplied by is packed."""
    _families.folder(tmp_path, "gpt2")
    model = load_packed(tmp_path)
    assert isinstance(model.positions.weight, torch.Tensor) and isinstance(model.embedding.weight, Panels)
    assert model.head.weight is model.embedding.weight
