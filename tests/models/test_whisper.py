"""Whisper from CTranslate2's format: random weights written so and read back, files that are refused, and the real one."""

import contextlib
import struct

import numpy as np
import pytest
import torch
import transformers as hf
from _assets import asset

from fastllm import models
from fastllm.decode.beam import BeamParams, generate
from fastllm.models import ctranslate2
from fastllm.models.layers import pack_weights
from fastllm.models.seq2seq import PRESETS, Seq2Seq, Seq2SeqConfig

CONFIG = Seq2SeqConfig(
    60, 2, 1, 48, 80, 4, 12, 24, "learned", norm_first=True, activation="gelu", bins=6, source_position=17,
    pad_id=50256, start_id=50257, eos_id=50256,
)  # fmt: skip


def text(name: str) -> bytes:
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


def variable(name: str, values: np.ndarray) -> bytes:
    kind = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}[values.dtype.name]
    head = text(name) + struct.pack("<B", values.ndim) + struct.pack(f"<{values.ndim}I", *values.shape)
    return head + struct.pack("<BI", kind, values.nbytes) + values.tobytes()


def contents(model: Seq2Seq) -> dict[str, np.ndarray]:
    """What a converter stores: float16, with settings."""
    names, values = ctranslate2.names(model.config), {}
    for ours, parameter in model.named_parameters():
        (theirs,) = names.ours[ours]
        values[theirs] = parameter.detach().reshape(names.shapes.get(ours, parameter.shape)).half().numpy()
    for side in ("encoder", "decoder"):
        values[f"{side}/num_heads"] = np.array(model.config.heads, np.int16)
    return values | {"decoder/pre_norm": np.array(1, np.int8), "decoder/alignment_heads": np.array(1, np.int16)}


def pack(values: dict[str, np.ndarray], version=6, spec="WhisperSpec", aliases=()) -> bytes:
    body = b"".join(variable(name, value) for name, value in values.items())
    ends = struct.pack("<I", len(aliases)) + b"".join(text(a) + text(b) for a, b in aliases)
    return struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(values)) + body + ends


@pytest.fixture(scope="module")
def model() -> Seq2Seq:
    torch.manual_seed(0)
    return Seq2Seq(CONFIG).half().float().requires_grad_(False).eval()


def test_what_was_written_is_read(model, tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(pack(contents(model), aliases=[("decoder/projection/weight", "decoder/embeddings/weight")]))
    (tmp_path / "config.json").write_text("{}")
    for read in (ctranslate2.load(path), models.load(tmp_path)):
        assert read.config == CONFIG and read.head.weight is read.embedding.weight
        assert read.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, read.state_dict()[name]) for name, value in model.state_dict().items())


def test_files_that_are_refused(model, tmp_path):
    path, values = tmp_path / "model.bin", contents(model)
    whole = pack(values)
    for length in (0, 3, 10, 30, 200, 5000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="model.bin is no CTranslate2 model"):
            ctranslate2.load(path)
    heads = "decoder/num_heads"
    for data, message in (
        (whole + b"x", "1 bytes follow its end"),
        (pack(values, version=5), "in version 5; WhisperSpec in 6 is read"),
        (pack(values, spec="TransformerSpec"), "'TransformerSpec', revision 3"),
        (pack({}), "it has no 'decoder/embeddings/weight'"),
        (pack(values | {heads: np.array(7, np.int16)}), "7 heads do not share 48 columns"),
        (pack(values | {heads: np.array(4, np.float32)}), "it has no number 'decoder/num_heads'"),
        (pack(values | {"decoder/embeddings/weight": np.zeros((60, 48), np.int8)}), "stored as torch.int8"),
        (pack(values, aliases=[("decoder/projection/weight", "other")]), "its head is not the table of its words"),
        (pack(values | {"encoder/lora": np.zeros(3, np.float16)}), "1 tensors that this model does not have"),
        (
            pack(values | {"encoder/conv1/bias": np.zeros(47, np.float16)}),
            r"has shape \(47,\), the config wants \(48,\)",
        ),
        (whole.replace(text(heads), text("decoder/num_hea\xff"[:-1] + "z")), "it has no number"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            ctranslate2.load(path)


def test_random_bytes_never_do_more_than_raise(model, tmp_path):
    path, whole, random = tmp_path / "model.bin", bytearray(pack(contents(model))), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in random.integers(0, 4000 if random.random() < 0.5 else len(whole), 3):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            ctranslate2.load(path)


# ------------------------------------------------------------------------------------------------------------------- real


@pytest.fixture(scope="module")
def real():
    """(our model, transformers' of the same weights)"""
    folder = asset("whisper-base")
    ours = models.load(folder)
    with torch.device("meta"):
        theirs = hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8, decoder_attention_heads=8,
                encoder_ffn_dim=2048, decoder_ffn_dim=2048, vocab_size=51865, attn_implementation="eager",
            )
        )  # fmt: skip
    theirs.load_state_dict(stored(folder), strict=False, assign=True)
    theirs.tie_weights()
    assert not [name for name, p in theirs.named_parameters() if p.is_meta]
    return ours, theirs.eval()


def stored(folder) -> dict[str, torch.Tensor]:
    """The file under transformers' names, by a table of its own."""
    file, state = ctranslate2.File(folder / "model.bin"), {}
    parts = {
        "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attention/linear_1": ("self_attn.out_proj",),
        "self_attention/layer_norm": ("self_attn_layer_norm",),
        "attention/linear_0": ("encoder_attn.q_proj",),
        "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
        "attention/linear_2": ("encoder_attn.out_proj",),
        "attention/layer_norm": ("encoder_attn_layer_norm",),
        "ffn/linear_0": ("fc1",),
        "ffn/linear_1": ("fc2",),
        "ffn/layer_norm": ("final_layer_norm",),
    }
    top = {"embeddings": "embed_tokens", "position_encodings": "embed_positions", "layer_norm": "layer_norm"}
    for name in file.where:
        side, *middle, kind = name.split("/")
        kind = {"gamma": "weight", "beta": "bias", "encodings": "weight"}.get(kind, kind)
        if not middle or kind not in ("weight", "bias"):
            continue
        if middle[0].startswith("layer_") and middle[0] != "layer_norm":
            targets = [f"layers.{middle[0][6:]}.{t}" for t in parts["/".join(middle[1:])]]
        else:
            targets = [top.get(middle[0], middle[0])]
        for target, value in zip(targets, file.read(name).chunk(len(targets)), strict=True):
            if target.endswith("k_proj") and kind == "bias":
                assert not value.any()
            else:
                state[f"model.{side}.{target}.{kind}"] = value
    return state


def test_real_sizes(real):
    assert real[0].config == PRESETS["whisper-base"]


@torch.no_grad()
def test_real_logits_equal_transformers(real):
    ours, theirs = real
    features, ids = torch.randn(1, 80, 3000), torch.tensor([[50258, 50259, 50359, 50363, 400, 370, 452]])
    out = theirs(features, decoder_input_ids=ids)
    memory = ours.encode(features)
    assert (memory.hidden - out.encoder_last_hidden_state[0]).abs().max() <= 1e-3
    assert (ours.logits(ours.decode(ids, memory)) - out.logits).abs().max() <= 1e-5 * out.logits.abs().max()


@torch.no_grad()
def test_real_tokens_equal_transformers(real):
    """Of a sound that is no speech: three notes."""
    ours, theirs = real
    time = np.arange(5 * 16000) / 16000
    sound = sum(np.sin(2 * np.pi * f * time) for f in (261.6, 329.6, 392.0)) * np.hanning(len(time)) / 4
    extract = hf.WhisperFeatureExtractor(feature_size=80)
    features = extract(sound.astype(np.float32), sampling_rate=16000, return_tensors="pt").input_features
    prompt = [50258, 50259, 50359, 50363]
    theirs.generation_config = hf.GenerationConfig(decoder_start_token_id=50258, eos_token_id=50257, pad_token_id=50257)
    found = generate(pack_weights(ours), features, params=BeamParams(max_new_tokens=12, prompt=prompt))
    ids, cached = torch.tensor([prompt]), theirs.model.encoder(features)
    for _ in range(len(found[0][0].token_ids)):
        logits = theirs(encoder_outputs=cached, decoder_input_ids=ids).logits[:, -1]
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    assert found[0][0].token_ids == ids[0, 4:].tolist()
