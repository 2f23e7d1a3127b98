"""LoRA in PEFT's files: what PEFT writes we read, with its logits; what we write PEFT reads; what is refused, and why."""

import json
import re
from dataclasses import replace

import _families
import _llama
import _lora
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fastllm import models
from fastllm.decode.adapters import AdapterTable
from fastllm.models.blocks import Adapters
from fastllm.models.weights import load_packed
from fastllm.peft import lora

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {  # name -> (model, what LoraConfig gets)
    "all linears": ("smollm", dict(r=4, target_modules=LINEARS)),
    "all-linear": ("llama3", dict(r=8, target_modules="all-linear")),
    "q and v, rank-stabilised": ("qwen3", dict(r=16, lora_alpha=24, use_rslora=True, target_modules=["q_proj", "v_proj"])),
    "patterns": (
        "qwen2",
        dict(
            r=8, target_modules=LINEARS, rank_pattern={"down_proj": 3, r"layers.0.self_attn.k_proj": 17},
            alpha_pattern={"up_proj": 5, "layers.1.mlp.gate_proj": 1},
        ),
    ),
    "a regular expression": ("mistral", dict(r=4, target_modules=r".*\.layers\.1\.(mlp\.up_proj|self_attn\.[qk]_proj)")),
    "one layer": ("llama with biases", dict(r=4, target_modules=LINEARS, layers_to_transform=[1])),
    "no layers, which are all": ("gpt2", dict(r=4, target_modules=["c_attn"], layers_to_transform=[], fan_in_fan_out=True)),
    "a whole name beside layers": (
        "smollm", dict(r=4, target_modules=["model.layers.0.mlp.up_proj", "q_proj"], layers_to_transform=[1]),
    ),
    "but for one": ("llama1", dict(r=4, target_modules=LINEARS, exclude_modules=["model.layers.0.mlp.up_proj"])),
    "dora": ("smollm", dict(r=4, use_dora=True, target_modules=LINEARS)),
    "dora of some": ("llama with biases", dict(r=4, use_dora=True, target_modules=["k_proj", "up_proj"])),
    "gemma": ("gemma3", dict(r=4, target_modules=LINEARS)),
    "gpt2": ("gpt2", dict(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2 dora": ("gpt2", dict(r=4, use_dora=True, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)),
    "bloom": ("bloom", dict(r=4, target_modules=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"])),
    "bloom dora": ("bloom", dict(r=4, use_dora=True, target_modules=["query_key_value"])),
}  # fmt: skip
IDS = torch.randint(0, 131, (2, 30), generator=torch.Generator().manual_seed(1))


def adapt(model, seed: int = 0, **fields) -> PeftModel:
    """PEFT's model, its B and magnitudes drawn: an adapter as training would leave it."""
    torch.manual_seed(seed)
    made = get_peft_model(
        model, LoraConfig(**{"task_type": "CAUSAL_LM", "lora_alpha": 16, "lora_dropout": 0.1} | fields)
    ).eval()
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, 0.0, 0.2)
        elif "magnitude" in name:
            weight.data *= torch.rand_like(weight) + 0.5
    return made


def logits(model, given: lora.Lora, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Ours, with the adapter on every row."""
    table = AdapterTable(model)
    table.load("it", lora.parts(given, model), 1)
    with torch.no_grad():
        return model(ids, Adapters(torch.zeros_like(ids), table.pools))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_writes(tmp_path, name):
    family, fields = CONFIGS[name]
    theirs = adapt(_families.folder(tmp_path / "base", family), **fields)
    wanted = _families.logits(theirs, IDS)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, given = models.load(tmp_path / "base"), lora.read(tmp_path / "adapter")
    assert (wanted - ours(IDS).detach()).abs().max() > 0.1  # it shows
    assert (logits(ours, given) - wanted).abs().max() <= 1e-4
    assert (logits(load_packed(tmp_path / "base"), given) - wanted).abs().max() <= 1e-4
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert (models.load(tmp_path / "merged")(IDS) - wanted).abs().max() <= 2e-4
    # and back
    lora.write(tmp_path / "again", given)
    again = PeftModel.from_pretrained(_families.build(family), tmp_path / "again").eval()
    assert torch.equal(_families.logits(again, IDS), wanted)
    second = lora.read(tmp_path / "again")
    assert second.pairs.keys() == given.pairs.keys()
    for key, pair in given.pairs.items():
        assert torch.equal(second.pairs[key].a, pair.a) and torch.equal(second.pairs[key].b, pair.b)
        assert second.scale(key) == given.scale(key)


def test_what_we_write(tmp_path):
    theirs = _families.folder(tmp_path / "base", "llama with biases")
    ours = models.load(tmp_path / "base")
    ranks = {"q_proj": 4, "v_proj": 3, "down_proj": 8}
    given = _lora.draw(ours, 1, lambda name: ranks.get(name.rsplit(".", 1)[1], 0), alpha_pattern={"q_proj": 3})
    lora.write(tmp_path / "adapter", given)
    wanted = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert (logits(ours, given) - _families.logits(wanted, IDS)).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_files(tmp_path, dtype):
    ours = models.load(_saved(tmp_path))
    given = _lora.draw(ours, 1)
    lora.write(tmp_path / "adapter", given, dtype)
    again = lora.read(tmp_path / "adapter")
    assert all(torch.equal(again.pairs[n].a, p.a.to(dtype).float()) for n, p in given.pairs.items())


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_a_gguf_of_the_same_weights(tmp_path, kind):
    """llama.cpp's files hold the rows of q and k in another order; the rows of B are transformers'."""
    parts_, exact = _llama.to_gguf(_llama.build(**_llama.CONFIGS["grouped"]), lambda name: kind)
    path, ids = _llama.write(tmp_path / "model.gguf", parts_), IDS + 20
    theirs = adapt(exact, r=4, target_modules=LINEARS)
    theirs.save_pretrained(tmp_path / "adapter")
    wanted, given = _llama.logits(theirs, ids), lora.read(tmp_path / "adapter")
    assert (logits(models.load(path), given, ids) - wanted).abs().max() <= 1e-4
    if kind == "F32":
        assert (logits(load_packed(path), given, ids) - wanted).abs().max() <= 1e-4
    else:  # its inputs are rounded to 8 bits for the base, not for the adapter
        loose = (_llama.logits(exact, ids) - _plain(load_packed(path), ids)).abs().max()
        assert (logits(load_packed(path), given, ids) - wanted).abs().max() <= 3 * loose


def _plain(model, ids):
    with torch.no_grad():
        return model(ids)


def test_an_adapter_of_the_bare_model(tmp_path):
    """PEFT around AutoModel: names without the prefix."""
    theirs = _families.folder(tmp_path / "base", "smollm")
    made = adapt(theirs.model, r=4, target_modules=["q_proj", "up_proj"], task_type=None)
    made.save_pretrained(tmp_path / "adapter")
    wanted = _families.logits(theirs, IDS)  # whose inner model has the adapter in place
    assert (logits(models.load(tmp_path / "base"), lora.read(tmp_path / "adapter")) - wanted).abs().max() <= 1e-4


# ----------------------------------------------------------------------------------------------------------- refused


def _saved(tmp_path):
    path = tmp_path / "base"
    _families.folder(path, "smollm")
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of PEFT."""
    path = tmp_path_factory.mktemp("written")
    adapt(_families.folder(path / "base", "smollm"), r=4, target_modules=["q_proj", "down_proj"]).save_pretrained(
        path / "adapter"
    )
    return path


@pytest.fixture
def files(written, tmp_path):
    """(folder, config, tensors), to be changed."""
    folder = written / "adapter"
    return (
        tmp_path,
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )


def put(files) -> lora.Lora:
    folder, config, tensors = files
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    return lora.read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; allowed: 'LORA'"),
        ({"peft_type": None}, "peft_type=None is not supported"),
        ({"bias": "all"}, "bias='all' is not supported; allowed: 'none'; a bias that was trained is part of the base"),
        (
            {"modules_to_save": ["lm_head"]},
            r"modules_to_save=\['lm_head'\] is not supported; allowed: None; .* merge them",
        ),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' .* path_initial_model_for_weight_conversion"),
        ({"lora_bias": True}, "lora_bias=True is not supported; allowed: None or False"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.* is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=.* is not supported"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"a_key_of_tomorrow": 1}, "a_key_of_tomorrow=1 is not supported; .* changes what the adapter computes"),
        ({"r": 0}, r"ranks are \[0\]; allowed: integers of at least 1"),
        ({"r": "4"}, "r is '4', of another type"),
        ({"rank_pattern": {"q_proj": 1.5}}, r"ranks are \[4, 1.5\]"),
        ({"lora_alpha": float("nan")}, "alphas are"),
        ({"r": 5}, r"has rank 4, adapter_config.json says 5; the two files do not belong together"),
        ({"target_modules": ["q_proj"]}, "holds an adapter of '.*down_proj', which target_modules .* does not name"),
    ],
)
def test_configs_that_are_refused(files, changes, message):
    files[1].update(changes)
    with pytest.raises(ValueError, match=message):
        put(files)


def test_a_key_that_is_off_is_no_matter(files):
    files[1].update({"a_key_of_tomorrow": None, "another": [], "one_more": False})
    put(files)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _set(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), "'model.layers.0.self_attn.q_proj' has no lora_A; fetch the adapter again"),
        (_set(KEY, torch.full((4, 64), float("nan"))), "q_proj' has NaN or infinite entries; its training has failed"),
        (_set(KEY, torch.zeros(3, 64)), r"lora_A \(3, 64\) and lora_B \(64, 4\) .* are no \[R, K\] and \[N, R\]"),
        (_set(KEY, torch.zeros(4, 64, dtype=torch.int32)), "is stored as I32; supported: F32, F16, BF16"),
        (
            _set("base_model.model.lm_head.weight", torch.zeros(4)),
            "lm_head.weight' is not supported; allowed: base_model",
        ),
        (_set(KEY.replace("lora_A", "lora_embedding_A"), torch.zeros(4)), "no adapters of the embedding"),
        (lambda t: t.clear(), "holds no adapter"),
        (_set(KEY.replace("lora_A.weight", "lora_magnitude_vector"), torch.zeros(4)), r"shape \(4,\), want \(64,\)"),
    ],
)
def test_tensors_that_are_refused(files, change, message):
    change(files[2])
    with pytest.raises(ValueError, match=message):
        put(files)


def test_files_that_are_refused(files):
    put(files)
    folder = files[0]
    whole = (folder / "adapter_model.safetensors").read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 100, 4, 0):
        (folder / "adapter_model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"adapter_model.safetensors cannot be read: .*; fetch the adapter again"):
            lora.read(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors; fetch the adapter again"):
        lora.read(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(
        ValueError, match=r"adapter_model.bin is a pickle, .* refused. .* save_pretrained writes safetensors"
    ):
        lora.read(folder)
    (folder / "adapter_config.json").write_text("{")
    (folder / "adapter_model.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match=r"adapter_config.json cannot be read"):
        lora.read(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_config.json; an adapter is a folder"):
        lora.read(folder)
    with pytest.raises(FileNotFoundError, match=r"is no folder; give a folder that PEFT's save_pretrained wrote"):
        lora.read(folder / "nowhere")


def test_another_base(files, tmp_path):
    given = put(files)
    for name, message in (
        (
            "gpt2",
            r"the adapter is for 'model.layers.0.* which no layer of this gpt2 has; allowed are attn.c_attn, .* of its 2",
        ),
        ("qwen3", r"is for a weight \(64, 64\), this model's is \(128, 64\); it was trained on another base"),
        ("llama yarn", None),
    ):
        model = models.load(_families.folder(tmp_path / name, name) and tmp_path / name)
        if message:
            with pytest.raises(ValueError, match=message):
                lora.parts(given, model)
        else:
            lora.parts(given, model)


def test_an_incomplete_file(files, written):
    for key in [k for k in files[2] if "layers.1.mlp.down_proj" in k]:
        del files[2][key]
    given = put(files)
    with pytest.raises(
        ValueError, match=r"incomplete: its config names 'model.layers.1.mlp.down_proj', its file does not"
    ):
        lora.parts(given, models.load(written / "base"))


def test_a_head_cannot_have_one(tmp_path):
    theirs = adapt(_families.folder(tmp_path / "base", "llama1"), r=4, target_modules=["q_proj", "lm_head"])
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(
        ValueError, match=r"lm_head.base_layer.weight' is not .* \(no adapters of the embedding or the head"
    ):
        lora.read(tmp_path / "adapter")
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"'lm_head', which no layer .* allowed are mlp.down_proj, .*self_attn.v_proj"):
        lora.parts(lora.read(tmp_path / "adapter"), models.load(tmp_path / "base"))


def test_writing_replaces_whole_files(tmp_path, monkeypatch):
    given = _lora.draw(models.load(_saved(tmp_path)), 1)
    lora.write(tmp_path / "adapter", given)
    before = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    monkeypatch.setattr("json.dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lora.write(tmp_path / "adapter", replace(given, r=9))
    assert {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()} == before
    assert not [n for n in before if re.search("part", n)]
