"""Encoder: parity with transformers on random weights, padded and packed, with gradients; folders both ways; MiniLM."""

import contextlib
import copy
import dataclasses
import json

import pytest
import torch
import transformers as hf
from _assets import asset
from safetensors.torch import load_file, save_file

from fastllm import models, ops
from fastllm.models.encoder import PRESETS, Encoder, EncoderConfig
from fastllm.models.layers import pack_weights

SIZES = dict(
    vocab_size=60, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
    max_position_embeddings=42, attn_implementation="eager", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
KINDS = {
    "BertModel": dict(layer_norm_eps=1e-12),
    "BertForMaskedLM": dict(hidden_act="gelu_new", layer_norm_eps=1e-3),
    "BertForSequenceClassification": dict(num_labels=3, pad_token_id=7),
    "BertForTokenClassification": dict(num_labels=5, hidden_act="relu", type_vocab_size=3),
    "RobertaModel": dict(pad_token_id=1),
    "RobertaForMaskedLM": dict(pad_token_id=1, type_vocab_size=1, hidden_act="relu"),
    "RobertaForSequenceClassification": dict(num_labels=2, pad_token_id=1, layer_norm_eps=1e-5),
    "RobertaForTokenClassification": dict(num_labels=4, pad_token_id=0),
    "untied": dict(tie_word_embeddings=False),
}


def build(kind: str) -> torch.nn.Module:
    """Weights large enough that a wrong one shows."""
    name = "BertForMaskedLM" if kind == "untied" else kind
    config = getattr(hf, name.split("For")[0].removesuffix("Model") + "Config")
    model = getattr(hf, name)(config(**SIZES | KINDS[kind])).eval()
    with torch.no_grad():
        for weight in model.parameters():
            flat = weight.dim() == 1
            torch.nn.init.normal_(weight, float(flat), 0.3 if flat else weight.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(transformers' model, the folder it was saved to)"""
    torch.manual_seed(0)
    theirs, folder = build(request.param), tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, folder


def batch(theirs, sides: str = "right") -> dict[str, torch.Tensor]:
    """Four sequences of different lengths in 17 columns; ids of padding are padding, and some tokens have another type."""
    c = theirs.config
    ids, mask = torch.randint(8, c.vocab_size, (4, 17)), torch.ones(4, 17, dtype=torch.int64)
    for row, length in enumerate((17, 5, 1, 11)):
        part = slice(length, None) if sides == "right" else slice(0, 17 - length)
        mask[row, part] = 0
    if sides == "gaps":
        mask = (torch.rand(4, 17) < 0.6).long()
        mask[:, 0] = 1
    ids[mask == 0] = c.pad_token_id
    types = torch.randint(c.type_vocab_size, (4, 17))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def wanted(theirs, inputs) -> torch.Tensor:
    out = theirs(**inputs)
    return out.last_hidden_state if "last_hidden_state" in out else out.logits


def ours_of(ours: Encoder, inputs) -> torch.Tensor:
    return ours(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])


def kept(x: torch.Tensor, inputs) -> torch.Tensor:
    return x[inputs["attention_mask"] != 0] if x.dim() == 3 else x


@pytest.mark.parametrize("sides", ["right", "left", "gaps"])
@torch.no_grad()
def test_outputs_equal_transformers(pair, sides):
    theirs, folder = pair
    ours, inputs = models.load(folder), batch(theirs, sides)
    if sides == "left" and ours.config.head == "classify":
        inputs["attention_mask"][:, 0] = 1  # what transformers takes for the first token is in column 0
    mine, expected = ours_of(ours, inputs), wanted(theirs, inputs)
    assert (kept(mine, inputs) - kept(expected, inputs)).abs().max() <= 1e-4
    if mine.dim() == 3:
        assert not mine[inputs["attention_mask"] == 0].any()
    assert torch.equal(ours_of(pack_weights(ours), inputs), mine)


def test_gradients_equal_transformers(pair):
    theirs, folder = pair
    ours, inputs = models.load(folder), batch(theirs)
    mine, expected = kept(ours_of(ours, inputs), inputs), kept(wanted(theirs, inputs), inputs)
    weight = torch.randn_like(mine)
    (mine * weight).mean().backward()
    theirs.zero_grad()
    (expected * weight).mean().backward()
    named = dict(theirs.named_parameters())
    base = next((f"{p}." for p in ("bert", "roberta") if hasattr(theirs, p)), "")
    checks = [
        ("embedding.weight", f"{base}embeddings.word_embeddings.weight"),
        ("positions.weight", f"{base}embeddings.position_embeddings.weight"),
        ("types.weight", f"{base}embeddings.token_type_embeddings.weight"),
        ("layers.0.mlp_norm.bias", f"{base}encoder.layer.0.output.LayerNorm.bias"),
        ("layers.1.up.weight", f"{base}encoder.layer.1.intermediate.dense.weight"),
        ("layers.1.out.bias", f"{base}encoder.layer.1.attention.output.dense.bias"),
    ]
    for mine, hers in checks:
        torch.testing.assert_close(ours.get_parameter(mine).grad, named[hers].grad, rtol=1e-3, atol=1e-6)
    qkv = [named[f"{base}encoder.layer.0.attention.self.{part}.weight"].grad for part in ("query", "key", "value")]
    torch.testing.assert_close(ours.layers[0].qkv.weight.grad, torch.cat(qkv), rtol=1e-3, atol=1e-6)
    if ours.config.head:
        assert all(p.grad is not None for p in ours.parameters())


@torch.no_grad()
def test_a_sequence_has_the_same_bits_alone_packed_and_padded(pair):
    theirs, folder = pair
    ours, inputs = models.load(folder), batch(theirs)
    rows = [ids[mask != 0].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    packed = ours.pack_lists(rows)
    hidden = ours.packed_hidden(packed)
    padded = ours.hidden(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(hidden, padded[inputs["attention_mask"] != 0])
    for how in ("mean", "cls", "pooler") if ours.pooler else ("mean", "cls"):
        together = ours.embed(packed, how)
        for row, ids in enumerate(rows):
            assert torch.equal(ours.embed(ours.pack_lists([ids]), how)[0], together[row])


def test_a_folder_comes_back_bit_for_bit(pair, tmp_path):
    theirs, folder = pair
    models.save(models.load(folder), tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert {n: t for n, t in after.items() if n not in before} == {}
    dropped = {n for n in before if n not in after}
    assert all("pooler" in n or n.endswith(("decoder.bias", "predictions.bias")) for n in dropped), dropped
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    again = type(theirs).from_pretrained(tmp_path, attn_implementation="eager").eval()
    inputs = batch(theirs)
    with torch.no_grad():
        assert torch.equal(kept(wanted(again, inputs), inputs), kept(wanted(theirs, inputs), inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_shards(tmp_path, dtype):
    theirs = build("BertForMaskedLM").to(dtype)
    theirs.save_pretrained(tmp_path / "a", max_shard_size="30KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    ours = models.load(tmp_path / "a")
    assert ours.norm.weight.dtype == torch.float32
    models.save(ours, tmp_path / "b", dtype, shard_bytes=30_000, more={"eos_token_id": 7})
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert torch.equal(models.load(tmp_path / "b").layers[1].up.weight, ours.layers[1].up.weight)
    models.save(ours, tmp_path / "b", dtype)  # over itself, in one file
    assert [p.name for p in sorted((tmp_path / "b").iterdir())] == ["config.json", "model.safetensors"]
    stored = load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(stored[n], t) for n, t in theirs.state_dict().items() if n in stored)
    assert stored["bert.embeddings.word_embeddings.weight"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_in_half_precision(pair, dtype):
    """The error is not above that of transformers in the same dtype; both against float32."""
    theirs, folder = pair
    inputs, ours, half = batch(theirs), models.load(folder), copy.deepcopy(theirs).to(dtype)
    with torch.no_grad():
        exact, rounded = kept(ours_of(ours, inputs), inputs), kept(wanted(half, inputs), inputs)
    out = kept(ours_of(ours.to(dtype), inputs), inputs)
    assert out.dtype == dtype
    assert (out - exact).square().mean() <= 2 * (rounded - exact).square().mean()
    out.float().square().mean().backward()
    used = [p for name, p in ours.named_parameters() if not name.startswith("pooler") or ours.config.head]
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in used)


@pytest.mark.parametrize("how", ["mean", "cls", "pooler"])
def test_pooling_has_a_gradient(how):
    model = Encoder(EncoderConfig(22, 1, 32, 64, 2, 12, pooler=True))
    batch, lengths = model.pack_lists([[1] * 3, [2], [3] * 7]), [3, 1, 7]
    x = torch.randn(11, 32, requires_grad=True)
    rows = [part.mean(0) if how == "mean" else part[0] for part in x.split(lengths)]
    wanted = torch.stack(rows)
    if how == "pooler":
        wanted = torch.tanh(wanted @ model.pooler.weight.t() + model.pooler.bias)
    pooled, weight = model.pool(x, batch, how), torch.randn(3, 32)
    torch.testing.assert_close(pooled, wanted)
    (expected,) = torch.autograd.grad((wanted * weight).sum(), x)
    (found,) = torch.autograd.grad((pooled * weight).sum(), x)
    torch.testing.assert_close(found, expected)


def test_masked_words_are_learnt():
    """Sequences count upwards, modulo 20, from anywhere; of 12 tokens three are masked. Lengths differ."""
    model, mask_id = Encoder(EncoderConfig(22, 1, 32, 64, 2, 12, head="mlm", pad_id=21)), 20
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=150)
    for _ in range(150):
        words = (torch.randint(20, (32, 1)) + torch.arange(12)) % 20
        seen = torch.arange(12) < torch.randint(6, 13, (32, 1))
        hidden = torch.rand(32, 12).argsort(1) < 3
        logits = model(torch.where(hidden, mask_id, words), seen)
        chosen = hidden & seen
        loss = ops.cross_entropy(logits[chosen], words[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert (logits[chosen].argmax(-1) == words[chosen]).float().mean() > 0.75  # by chance: 1 in 20


def test_spellings_of_2018(tmp_path):
    theirs = build("BertForMaskedLM")
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(60, (2, 9))
    with torch.no_grad():
        before = models.load(tmp_path)(ids)
        tensors = load_file(tmp_path / "model.safetensors")
        renamed = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in tensors.items()
        }
        renamed |= {
            "bert.embeddings.position_ids": torch.arange(42)[None],
            "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone(),
            "cls.seq_relationship.weight": torch.zeros(2, 48),
            "bert.pooler.dense.weight": torch.zeros(48, 48),
        }
        save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
        ours = models.load(tmp_path)
        assert torch.equal(ours(ids), before)
        assert ours.head.words.weight is ours.embedding.weight


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "RobertaForMaskedLM"])
@torch.no_grad()
def test_a_head_of_its_own_that_the_config_calls_tied(tmp_path, kind):
    """transformers goes by the weights then."""
    theirs = build(kind)
    theirs.save_pretrained(tmp_path)
    tensors, head = load_file(tmp_path / "model.safetensors"), "lm_head" if "Roberta" in kind else "cls.predictions"
    tensors[f"{head}.decoder.weight"] = theirs.get_input_embeddings().weight.clone()
    tensors[f"{head}.decoder.weight"][-1] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    again, inputs = type(theirs).from_pretrained(tmp_path, attn_implementation="eager").eval(), batch(theirs)
    mine, expected = ours_of(models.load(tmp_path), inputs), wanted(again, inputs)
    assert (kept(mine, inputs) - kept(expected, inputs)).abs().max() <= 1e-4
    assert (kept(expected, inputs) - kept(wanted(theirs, inputs), inputs)).abs().max() > 1e-2
    models.save(models.load(tmp_path), tmp_path / "saved")
    assert torch.equal(ours_of(models.load(tmp_path / "saved"), inputs), mine)
    saved = type(theirs).from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    assert torch.equal(kept(wanted(saved, inputs), inputs), kept(expected, inputs))


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "RobertaForTokenClassification"])
def test_names_of_labels(tmp_path, kind):
    theirs = build(kind)
    names = {i: name for i, name in enumerate(("PER", "LOC", "ORG", "O", "MISC")[: theirs.config.num_labels])}
    theirs.config.id2label, theirs.config.label2id = names, {name: i for i, name in names.items()}
    theirs.save_pretrained(tmp_path / "a")
    ours = models.load(tmp_path / "a")
    assert ours.config.label_names == tuple(names.values())
    models.save(ours, tmp_path / "b")
    assert models.load(tmp_path / "b").config == ours.config
    again = hf.AutoConfig.from_pretrained(tmp_path / "b")
    assert again.id2label == names and again.label2id == theirs.config.label2id
    models.save(Encoder(dataclasses.replace(ours.config, label_names=())), tmp_path / "c")
    assert set(hf.AutoConfig.from_pretrained(tmp_path / "c").label2id) == {f"LABEL_{i}" for i in names}
    for wrong in ({"0": "PER"}, ["PER"], {str(i): i for i in names}):
        edit(tmp_path / "a", id2label=wrong)
        with pytest.raises(ValueError, match=f"id2label is .*; wanted a name for each of 0 to {len(names) - 1}"):
            models.load(tmp_path / "a")


def test_an_alias():
    model = models.load(asset("minilm-l6"))
    assert model.config == PRESETS["minilm-l6"] and sum(p.numel() for p in model.parameters()) == 22_713_216


# ---------------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def folder(tmp_path):
    build("BertForMaskedLM").save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "selu"}, "activation 'selu' is not supported; supported: gelu, "),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"vocab_size": None}, "config.json lacks 'vocab_size'; the file is incomplete"),
        ({"vocab_size": "many"}, "vocab_size is 'many', wanted int"),
        ({"vocab_size": 61}, r"has shape \(60, 48\), the config wants \(61, 48\)"),
        ({"num_hidden_layers": 3}, "there is no tensor 'bert.encoder.layer.2.attention"),
        ({"num_hidden_layers": 1}, "the file holds 16 tensors that this model does not have, 'bert.encoder.layer.1"),
        ({"num_attention_heads": 5}, "dim=48 must be a multiple of heads=5"),
        ({"num_attention_heads": 0}, "every size must be at least 1"),
        ({"architectures": ["BertForMaskedLm"]}, "'BertForMaskedLm' is not supported; .* nearest: BertForMaskedLM"),
    ],
)
def test_configs_that_are_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        models.load(folder)


def test_a_damaged_config_never_does_more_than_raise(folder):
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    for key in whole:
        for value in (0, -1, 10**9, 0.5, "x", [], [3], True):
            path.write_text(json.dumps(whole | {key: value}))
            with contextlib.suppress(ValueError):
                models.load(folder)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle, and loading one runs code"):
        models.load(folder)


def test_damaged_files_are_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors cannot be read: .*; fetch it again"):
        models.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json cannot be read: it is no object"):
        models.load(folder)


def test_errors_of_a_forward():
    model = Encoder(EncoderConfig(60, 1, 16, 24, 2, 12, pooler=False))
    with pytest.raises(ValueError, match=r"ids have shape \(5,\); they must be \[B, S\]"):
        model(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="13 tokens, the model has 12 positions"):
        model(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="13 tokens, the model has 12 positions"):
        model.pack_lists([[1], [1] * 13])
    ids = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"the mask has shape \(2, 3\), the ids \(2, 4\)"):
        model(ids, ids[:, :3])
    with pytest.raises(ValueError, match=r"types have shape \(2, 3\), the ids \(2, 4\)"):
        model(ids, None, ids[:, :3])
    with pytest.raises(IndexError, match="60"):
        model(ids + 60)
    packed = model.pack_lists([[1, 2], []])
    hidden = model.packed_hidden(packed)
    with pytest.raises(ValueError, match="sequence 1 has no token"):
        model.pool(hidden, packed)
    with pytest.raises(ValueError, match="how='max'; allowed: 'mean', 'cls', 'pooler'"):
        model.pool(hidden, packed, "max")
    with pytest.raises(ValueError, match="this model has no pooler"):
        model.pool(hidden[:2], model.pack_lists([[1, 2]]), "pooler")
    with pytest.raises(ValueError, match="came as lists"):
        packed.unpack(hidden)
    assert model.packed_hidden(model.pack_lists([])).shape == model.embed(model.pack_lists([])).shape == (0, 16)
    assert model(ids[:, :0]).shape == (2, 0, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "every size must be at least 1"),
        ({"heads": 5}, "dim=16 must be a multiple of heads=5"),
        ({"head": "lm"}, "head='lm'; allowed: None, 'mlm', 'classify', 'tokens'"),
        ({"head": "tokens"}, "labels=0; heads of labels need one or more"),
        ({"head": "classify", "labels": 2}, "give pooler=True"),
        ({"head": "tokens", "labels": 2, "label_names": ("a",)}, "1 label_names for 2 labels; give as many, or none"),
    ],
)
def test_errors_of_a_config(change, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**dict(vocab=60, layers=1, dim=16, ffn=24, heads=2, max_position=12) | change)
