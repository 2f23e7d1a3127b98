"""TextEncoder: real vectors of MiniLM against transformers', batches that change no bit, texts that are refused."""

import json

import pytest
import torch
import transformers
from _assets import asset

from fastllm import LLM
from fastllm.data.tokenizer import Tokenizer
from fastllm.decode import embed
from fastllm.decode.embed import TextEncoder
from fastllm.models.encoder import Encoder, EncoderConfig

TEXTS = [
    "A man is eating food",
    "Someone is having a meal",
    "",
    "The quick brown fox jumps over the lazy dog. " * 20,
    "Kernels in C++ for the CPU, one source compiled for three instruction sets.",
]


@pytest.fixture(scope="module")
def folder():
    return asset("minilm-l6")


@pytest.fixture(scope="module")
def real(folder):
    return TextEncoder.load("minilm-l6")


def test_sentences_that_mean_the_same(real):
    """As transformers gives them, too; the full stops count."""
    for end, cosine in ((".", 0.689), ("", 0.672)):
        one, other = real.embed([text + end for text in TEXTS[:2]])
        assert round(float(one @ other), 3) == cosine


@torch.no_grad()
def test_vectors_equal_those_of_transformers(real, folder):
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    hidden, mask = theirs(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    wanted = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert (real.embed(TEXTS) - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize(("quantize", "least"), [("int8", 0.998), ("int4", 0.9)])
def test_quantised_vectors(real, quantize, least):
    rounded = TextEncoder.load("minilm-l6", quantize=quantize)
    vectors = rounded.embed(TEXTS)
    assert (vectors * real.embed(TEXTS)).sum(-1).min() >= least
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert torch.equal(rounded.embed(text)[0], vector)
    with pytest.raises(ValueError, match="quantize='int5'; allowed: None, 'int8', 'int4'"):
        TextEncoder.load("minilm-l6", quantize="int5")


def test_a_vector_does_not_depend_on_its_neighbours(real, monkeypatch):
    together = real.embed(TEXTS)
    for rows in (1, 40):
        monkeypatch.setattr(embed, "ROWS", rows)
        assert torch.equal(real.embed(TEXTS), together)
    for text, vector in zip(TEXTS, together, strict=True):
        assert torch.equal(real.embed(text)[0], vector)
    ids = real.tokenizer.encode(TEXTS[0])
    assert torch.equal(real.embed([ids]), together[:1])


def test_texts_that_are_too_long(real):
    with pytest.raises(ValueError, match="text 1 has 702 tokens, the model 512 positions; .* truncate=True"):
        real.embed(["a", "word " * 700])
    ids = real.tokenizer.encode("word " * 700)
    cut = real.embed("word " * 700, truncate=True)
    assert torch.equal(cut, real.embed([ids[:511] + ids[-1:]]))
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        real.embed([[101], []])
    assert real.embed([]).shape == (0, 384)


def test_pooling_as_a_folder_says(tmp_path, real):
    assert (real.how, real.normalize) == ("mean", True)
    assert embed._pooling(tmp_path) == ("mean", True)
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "a.Transformer"}, {"type": "a.Pooling"}]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True, "dim": 3}))
    assert embed._pooling(tmp_path) == ("cls", False)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="wants pooling_mode_max_tokens; one of"):
        embed._pooling(tmp_path)
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ValueError, match="modules.json cannot be read"):
        embed._pooling(tmp_path)


def test_what_is_no_encoder(real, folder):
    with pytest.raises(TypeError, match="the model is Linear; it must be an Encoder"):
        TextEncoder(torch.nn.Linear(2, 2), real.tokenizer)
    with pytest.raises(ValueError, match="how='max'; allowed"):
        TextEncoder(real.model, real.tokenizer, "max")
    small = Encoder(EncoderConfig(10, 1, 8, 8, 1, 8))
    with pytest.raises(ValueError, match="the tokenizer has 30522 ids, the model 10"):
        TextEncoder(small, Tokenizer.from_folder(folder))


def test_an_encoder_stays_on_the_cpu(folder, monkeypatch):
    monkeypatch.setattr("fastllm.llm.decoding_device", torch.device)
    with pytest.raises(ValueError, match=r"device='cuda', but .* is an encoder: `embed` runs on a CPU"):
        LLM(folder, device="cuda")


def test_llm_over_an_encoder_embeds_and_nothing_else(real, folder):
    llm = LLM(folder)
    texts = ["A man is eating food.", "Water boils at 100 degrees."]
    assert torch.equal(llm.embed(texts), real.embed(texts)) and torch.equal(llm.embed(texts[0])[0], llm.embed(texts)[0])
    for call in (llm.generate, llm.stream, llm.perplexity, llm.logprobs):
        with pytest.raises(ValueError, match="is an encoder"):
            call("A man")
    with pytest.raises(ValueError, match="is an encoder"):
        llm.chat([{"role": "user", "content": "Hi"}])
