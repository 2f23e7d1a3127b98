"""Seq2Seq: parity with transformers and torch.nn.Transformer on random weights, padded and packed, with gradients; steps over a
cache give the bits of the whole forward; folders both ways."""

import contextlib
import copy
import dataclasses
import json
import math

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from fastllm import models
from fastllm.models import hf_seq2seq
from fastllm.models.layers import pack_weights
from fastllm.models.seq2seq import Seq2Seq, Seq2SeqConfig

T5 = dict(
    vocab_size=60, d_model=48, d_kv=8, num_heads=4, d_ff=80, num_layers=3, num_decoder_layers=2, dropout_rate=0.0,
    relative_attention_num_buckets=8, relative_attention_max_distance=20, decoder_start_token_id=0,
)  # fmt: skip
BART = dict(
    vocab_size=60, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=80, decoder_ffn_dim=80, dropout=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=2,
)  # fmt: skip
KINDS = {
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, T5),
    "flan": (
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, d_kv=16),
    ),
    "t5 with a head of its own": (
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        T5 | dict(feed_forward_proj="gated-silu", tie_word_embeddings=False, layer_norm_epsilon=1e-3),
    ),
    "marian": (
        hf.MarianMTModel,
        hf.MarianConfig,
        BART | dict(max_position_embeddings=40, activation_function="swish", scale_embedding=True, forced_eos_token_id=None),
    ),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig,
        BART | dict(num_mel_bins=6, max_source_positions=17, max_target_positions=24, suppress_tokens=None,
                    begin_suppress_tokens=None, bos_token_id=1, scale_embedding=True),  # which it makes nothing of
    ),
}  # fmt: skip


def build(kind: str) -> torch.nn.Module:
    """Weights large enough that a wrong one shows."""
    make, config, sizes = KINDS[kind]
    model = make(config(**sizes, attn_implementation="eager")).eval()
    if "own" in kind:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(60, 48))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            flat = weight.dim() == 1
            spread = 1.0 if "relative" in name else 0.3 if flat else weight[0].numel() ** -0.5
            if weight.requires_grad:
                torch.nn.init.normal_(weight, float(flat), spread)
        if kind == "marian":
            model.final_logits_bias.normal_()
    return model


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(transformers' model, the folder it was saved to)"""
    torch.manual_seed(0)
    theirs, folder = build(request.param), tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, folder


def inputs_of(theirs, side: str = "right"):
    """(source, mask or None, decoder_ids): four sources of different lengths in 34 columns, beyond max_distance."""
    targets = torch.randint(2, 60, (4, 23))
    targets[:, 0] = theirs.config.decoder_start_token_id
    if theirs.main_input_name == "input_features":
        return torch.randn(4, 6, 34), None, targets
    ids, mask = torch.randint(2, 60, (4, 34)), torch.ones(4, 34, dtype=torch.int64)
    for row, length in enumerate((34, 7, 1, 20)):
        mask[row, slice(length, None) if side == "right" else slice(0, 34 - length)] = 0
    ids[mask == 0] = 0
    return ids, mask, targets


def wanted(theirs, source, mask, targets) -> torch.Tensor:
    more = {} if mask is None else {"attention_mask": mask}
    return theirs(source, decoder_input_ids=targets, **more).logits


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_logits_equal_transformers(pair, side):
    theirs, folder = pair
    ours, (source, mask, targets) = models.load(folder), inputs_of(theirs, side)
    logits = ours(source, targets, mask)
    assert (logits - wanted(theirs, source, mask, targets)).abs().max() <= 1e-4
    assert torch.equal(ours.logits(ours.hidden(source, targets, mask)), logits)
    assert torch.equal(pack_weights(ours)(source, targets, mask), logits)


def test_gradients_equal_transformers(pair):
    theirs, folder = pair
    ours, (source, mask, targets) = models.load(folder), inputs_of(theirs)
    logits = ours(source, targets, mask)
    weight = torch.randn_like(logits)
    (logits * weight).mean().backward()
    theirs.zero_grad()
    (wanted(theirs, source, mask, targets) * weight).mean().backward()
    names = hf_seq2seq._names(ours.config, ours, hf_seq2seq._architecture(ours.config))
    named, seen = dict(theirs.named_parameters(remove_duplicate=False)), 0
    for name, parameter in ours.named_parameters():
        for theirs_name, part in zip(names.ours[name], parameter.grad.chunk(len(names.ours[name])), strict=True):
            hers = named.get((theirs_name or "").split("|")[0])
            if hers is not None and hers.requires_grad:
                torch.testing.assert_close(part.reshape(hers.shape), hers.grad, rtol=1e-3, atol=2e-6, msg=name)
                seen += 1
            elif theirs_name is None:  # a bias of keys, of which no output knows
                assert part.abs().max() < 1e-6
    assert seen > 30


def test_training_in_bfloat16(pair):
    """The error is not above that of transformers in the same dtype; both against float32."""
    theirs, folder = pair
    ours, (source, mask, targets) = models.load(folder), inputs_of(theirs)
    half = copy.deepcopy(theirs).bfloat16()
    source = source.bfloat16().float() if source.is_floating_point() else source

    def narrow(x):
        return x.bfloat16() if x.is_floating_point() else x

    with torch.no_grad():
        exact, rounded = ours(source, targets, mask), wanted(half, narrow(source), mask, targets)
    out = ours.bfloat16()(narrow(source), targets, mask)
    assert (out - exact).square().mean() <= 2 * (rounded - exact).square().mean()
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@torch.no_grad()
def test_quantised_steps_give_the_bits_of_the_forward(quantize):
    model = Seq2Seq(dataclasses.replace(ORIGINAL, dim=64, head_dim=16, ffn=96))
    source, targets = torch.randint(60, (3, 9)), torch.randint(60, (3, 7))
    exact = model(source, targets)
    memory = pack_weights(model, quantize).encode(source)
    whole, cache = model.logits(model.decode(targets, memory)), model.start(memory, 1, 7)
    assert (whole - exact).square().mean() < (0.001 if quantize == "int8" else 0.2) * exact.square().mean()
    for i in range(7):
        assert torch.equal(model.step(targets[:, i : i + 1], cache), whole[:, i])


@torch.no_grad()
def test_steps_give_the_bits_of_the_forward(pair):
    theirs, folder = pair
    ours, (source, mask, targets) = pack_weights(models.load(folder)), inputs_of(theirs)
    memory = ours.encode(source, mask)
    whole = ours.logits(ours.decode(targets, memory))
    cache = ours.start(memory, 1, 23)
    assert torch.equal(ours.step(targets[:, :5], cache), whole[:, 4])
    for i in range(5, 23):
        assert torch.equal(ours.step(targets[:, i : i + 1], cache), whole[:, i])


@torch.no_grad()
def test_rows_of_a_cache_that_move_and_leave(pair):
    """Two targets a source; then they change places, and sources give rows up."""
    theirs, folder = pair
    ours, (source, mask, targets) = models.load(folder), inputs_of(theirs)
    other = targets.roll(1, 0)
    memory = ours.encode(source, mask)
    expected = [ours.logits(ours.decode(t, memory)) for t in (targets, other)]
    both = torch.stack((targets, other), 1).flatten(0, 1)
    cache = ours.start(memory, 2, 23)
    ours.step(both[:, :3], cache)
    order = torch.tensor([1, 0, 2, 3, 5, 4, 6, 6])
    cache.reorder(order)
    ours.step(both[order, 3:4], cache)
    kept = torch.tensor([1, 4, 5])  # of the rows as they are now: sources 0, 2 and 2
    cache.reorder(kept, torch.tensor([1, 0, 2, 0], dtype=torch.int32))
    rows = order[kept]
    logits = ours.step(both[rows, 4:5], cache)
    for row, place in zip(logits, rows.tolist(), strict=True):
        assert torch.equal(row, expected[place % 2][place // 2, 4])


@torch.no_grad()
def test_a_source_does_not_depend_on_its_batch(pair):
    theirs, folder = pair
    ours, (source, mask, targets) = models.load(folder), inputs_of(theirs)
    whole = ours(source, targets, mask)
    for i in range(4):
        part = slice(i, i + 1)
        alone = source[part] if mask is None else source[part, : int(mask[i].sum())]
        assert torch.equal(ours(alone, targets[part])[0], whole[i])
    if mask is not None:
        rows = [ids[: int(m.sum())].tolist() for ids, m in zip(source, mask, strict=True)]
        assert torch.equal(ours.logits(ours.decode(targets, ours.encode_lists(rows))), whole)


def test_a_folder_comes_back_bit_for_bit(pair, tmp_path):
    theirs, folder = pair
    models.save(models.load(folder), tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    again, given = type(theirs).from_pretrained(tmp_path, attn_implementation="eager").eval(), inputs_of(theirs)
    with torch.no_grad():
        assert torch.equal(wanted(again, *given), wanted(theirs, *given))


# -------------------------------------------------------------------------------------------------- the original Transformer

ORIGINAL = Seq2SeqConfig(60, 2, 3, 48, 80, 4, 12, max_position=40, embed_scale=48**0.5)
PARTS = {  # ours -> torch's
    "attn_norm": "norm1",
    "qkv": "self_attn.in_proj_",
    "out": "self_attn.out_proj",
    "cross_norm": "norm2",
    "cross_out": "multihead_attn.out_proj",
    "up": "linear1",
    "down": "linear2",
}


def of_torch(ours: Seq2Seq) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch's encoder and decoder with our weights."""
    sizes = dict(d_model=48, nhead=4, dim_feedforward=80, dropout=0.0, batch_first=True, activation="relu")
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(**sizes), 2, enable_nested_tensor=False)
    decoder = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(**sizes), 3)
    for side, theirs in (("encoder", encoder), ("decoder", decoder)):
        state, last = {}, "norm2" if side == "encoder" else "norm3"
        for name, value in getattr(ours, side).state_dict().items():
            _, index, part, kind = name.split(".")
            if part in ("cross_q", "cross_kv"):
                continue
            target = (PARTS | {"mlp_norm": last})[part]
            state[f"layers.{index}.{target}{kind}" if target.endswith("_") else f"layers.{index}.{target}.{kind}"] = (
                value
            )
        for i, layer in enumerate(getattr(ours, side).layers if side == "decoder" else ()):
            for kind in ("weight", "bias"):
                both = [getattr(layer.cross_q, kind), getattr(layer.cross_kv, kind)]
                state[f"layers.{i}.multihead_attn.in_proj_{kind}"] = torch.cat(both)
        theirs.load_state_dict(state)
    return encoder.eval(), decoder.eval()


def sinusoids(length: int, dim: int) -> torch.Tensor:
    """PE(p, 2i) = sin(p / 10000^(2i/d)), PE(p, 2i + 1) = cos of the same; section 3.5 of the paper."""
    angles = [[p / 10000 ** (j // 2 * 2 / dim) for j in range(dim)] for p in range(length)]
    rows = [[math.cos(a) if j % 2 else math.sin(a) for j, a in enumerate(row)] for row in angles]
    return torch.tensor(rows, dtype=torch.float64).float()


def test_the_original_equals_that_of_torch():
    ours = Seq2Seq(ORIGINAL)
    for parameter in ours.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    encoder, decoder = of_torch(ours)
    ids, mask, targets = torch.randint(60, (3, 19)), torch.ones(3, 19, dtype=torch.bool), torch.randint(60, (3, 11))
    mask[1, 6:] = False
    mask[2, :4] = False
    table = ours.embedding.weight.detach().clone().requires_grad_()

    def embed(x):
        return table[x] * 48**0.5 + sinusoids(x.shape[1], 48)

    memory = encoder(embed(ids), src_key_padding_mask=~mask)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(11)
    hidden = decoder(embed(targets), memory, tgt_mask=causal, memory_key_padding_mask=~mask)
    expected, logits = hidden @ table.t(), ours(ids, targets, mask)
    assert (logits - expected).abs().max() <= 1e-4
    weight = torch.randn_like(logits)
    (logits * weight).mean().backward()
    (expected * weight).mean().backward()
    torch.testing.assert_close(ours.embedding.weight.grad, table.grad, rtol=1e-3, atol=1e-6)
    cross = decoder.layers[1].multihead_attn.in_proj_weight.grad
    layer = ours.decoder.layers[1]
    torch.testing.assert_close(
        torch.cat((layer.cross_q.weight.grad, layer.cross_kv.weight.grad)), cross, rtol=1e-3, atol=1e-6
    )
    up = encoder.layers[0].linear1.weight.grad
    torch.testing.assert_close(ours.encoder.layers[0].up.weight.grad, up, rtol=1e-3, atol=1e-6)


def test_the_original_comes_back_from_a_folder(tmp_path):
    ours = Seq2Seq(ORIGINAL)
    models.save(ours, tmp_path)
    again = models.load(tmp_path)
    assert again.config == ORIGINAL and again.head.weight is again.embedding.weight
    source, targets = torch.randint(60, (2, 9)), torch.randint(60, (2, 5))
    with torch.no_grad():
        assert torch.equal(again(source, targets), ours(source, targets))
    with pytest.raises(TypeError, match="save the model as it was before pack_weights"):
        models.save(pack_weights(again), tmp_path)
    with pytest.raises(TypeError, match="Linear cannot be saved; a Decoder, an Encoder or a Seq2Seq can"):
        models.save(torch.nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize(("kind", "scale"), [("whisper", 48**0.5), ("marian", 3.0), ("marian", 1.0)])
def test_a_scale_that_transformers_has_not(tmp_path, kind, scale):
    build(kind).save_pretrained(tmp_path / "a")
    ours = Seq2Seq(dataclasses.replace(models.load(tmp_path / "a").config, embed_scale=scale))
    models.save(ours, tmp_path / "b")
    again = models.load(tmp_path / "b")
    assert again.config == ours.config and torch.equal(again.head.weight, ours.head.weight)


HEADS = {
    "t5": ("lm_head", "shared"),
    "marian": ("lm_head", "model.shared"),
    "whisper": ("proj_out", "model.decoder.embed_tokens"),
}


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_a_head_of_its_own_that_the_config_calls_tied(tmp_path, kind):
    """transformers goes by the weights then."""
    theirs, (head, table) = build(kind), HEADS[kind]
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{head}.weight"] = tensors[f"{table}.weight"].clone()
    tensors[f"{head}.weight"][-1] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    again, given = type(theirs).from_pretrained(tmp_path, attn_implementation="eager").eval(), inputs_of(theirs)
    ours, expected = models.load(tmp_path), wanted(again, *given)
    source, mask, targets = given
    logits = ours(source, targets, mask)
    assert not ours.config.tied and (logits - expected).abs().max() <= 1e-4
    assert (expected - wanted(theirs, *given)).abs().max() > 1e-2
    models.save(ours, tmp_path / "saved")
    assert torch.equal(models.load(tmp_path / "saved")(source, targets, mask), logits)


@pytest.mark.parametrize(("kind", "side"), [("t5", "encoder"), ("marian", "model.decoder")])
def test_a_table_of_one_side(tmp_path, kind, side):
    build(kind).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{side}.embed_tokens.weight"] = tensors[f"{HEADS[kind][1]}.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    models.load(tmp_path)
    tensors[f"{side}.embed_tokens.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"'{side}.embed_tokens.weight' differs from .*not shared are not supported"):
        models.load(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- errors


def edit(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("t5", {"feed_forward_proj": "gated-relu"}, "feed_forward_proj 'gated-relu' is not supported"),
        ("t5", {"feed_forward_proj": "double-gelu"}, "feed_forward_proj 'double-gelu' is not supported"),
        ("t5", {"dense_act_fn": "silu"}, "'relu' means dense_act_fn='relu', and the file has 'silu'; correct"),
        ("t5", {"is_gated_act": True}, "'relu' means is_gated_act=False, and the file has True; correct"),
        ("t5", {"d_model": None}, "config.json lacks 'd_model'"),
        ("t5", {"num_layers": 4}, "there is no tensor 'encoder.block.3.layer.0.layer_norm.weight'"),
        ("t5", {"num_heads": 8}, r"has shape \(32, 48\), the config wants \(64, 48\)"),
        ("t5", {"architectures": ["T5EncoderModel"]}, "'T5EncoderModel' is not supported"),
        ("marian", {"decoder_ffn_dim": 64}, r"ffn_dim of encoder and decoder are \(80, 64\)"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "embeddings that are not shared"),
        ("whisper", {"num_mel_bins": 8}, r"has shape \(48, 6, 3\), the config wants \(48, 8, 3\)"),
    ],
)
def test_configs_that_are_refused(tmp_path, kind, changes, message):
    build(kind).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path)


@pytest.mark.parametrize("kind", ["t5", "marian", "whisper"])
def test_a_damaged_config_never_does_more_than_raise(tmp_path, kind):
    build(kind).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    for key in whole:
        for value in (0, -1, 10**9, 0.5, "x", [], [3], True):
            path.write_text(json.dumps(whole | {key: value}))
            with contextlib.suppress(ValueError):
                models.load(tmp_path)


def test_errors_of_a_forward():
    model = Seq2Seq(ORIGINAL)
    ids, targets = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="41 tokens, the model has 40 positions"):
        model(torch.zeros(2, 41, dtype=torch.int64), targets)
    with pytest.raises(ValueError, match="41 tokens, the model has 40 positions"):
        model(ids, torch.zeros(2, 41, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"decoder_ids have shape \(3, 5\); they must be \[2, n\]"):
        model(ids, torch.zeros(3, 5, dtype=torch.int64))
    memory = model.encode(ids)
    with pytest.raises(ValueError, match="41 tokens, the model has 40 positions; ask for fewer"):
        model.start(memory, 1, 41)
    cache = model.start(memory, 1, 3)
    model.step(targets, cache)
    with pytest.raises(ValueError, match="4 tokens, the cache holds 3"):
        model.step(targets[:, :1], cache)
    audio = Seq2Seq(Seq2SeqConfig(60, 1, 1, 16, 24, 2, 8, position="learned", bins=6, source_position=4))
    with pytest.raises(ValueError, match=r"features have shape \(2, 5, 8\); they must be \[B, 6, frames\]"):
        audio(torch.zeros(2, 5, 8), targets)
    with pytest.raises(ValueError, match="5 tokens, the model has 4 positions"):
        audio(torch.zeros(2, 6, 9), targets)
    with pytest.raises(ValueError, match="a mask is not for audio"):
        audio(torch.zeros(2, 6, 8), targets, torch.ones(2, 8))
    relative = Seq2Seq(Seq2SeqConfig(60, 1, 1, 16, 24, 2, 8, position="relative"))
    mask = torch.ones(2, 5)
    mask[1, 2] = 0
    with pytest.raises(ValueError, match="the mask has gaps within a sequence"):
        relative(ids, targets, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_layers": 0}, "every size must be at least 1"),
        ({"heads": 0}, "every size must be at least 1"),
        ({"position": "rope"}, "position='rope'; allowed: 'sinusoidal'"),
        ({"activation": "elu"}, "activation 'elu' is not supported; allowed: swiglu, geglu"),
        ({"norm": "batch"}, "norm 'batch' is not supported"),
        ({"norm": "rms"}, "give norm_first=True"),
        ({"max_position": 1 << 30}, "max_position=1073741824; allowed: up to 1048576"),
        ({"position": "relative", "buckets": 2}, "2 buckets up to a distance of 128; allowed: at least 4"),
        ({"position": "relative", "max_distance": 16}, "32 buckets up to a distance of 16"),
    ],
)
def test_errors_of_a_config(change, message):
    sizes = dict(vocab=60, encoder_layers=1, decoder_layers=1, dim=16, ffn=24, heads=2, head_dim=8)
    with pytest.raises(ValueError, match=message):
        Seq2SeqConfig(**sizes | change)
