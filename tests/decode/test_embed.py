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
    # of its 512 positions, as sentence-transformers uses it
    assert real.longest == LLM("minilm-l6").max_model_len == 256
    with pytest.raises(ValueError, match="text 1 has 302 tokens, the model is used with at most 256; .* truncate=True"):
        real.embed(["a", "word " * 300])
    ids = real.tokenizer.encode("word " * 700)
    cut = real.embed("word " * 700, truncate=True)
    assert torch.equal(cut, real.embed([ids[:255] + ids[-1:]]))
    whole = TextEncoder(real.model, real.tokenizer)
    with pytest.raises(ValueError, match="text 0 has 702 tokens, the model 512 positions; .* truncate=True"):
        whole.embed("word " * 700)
    assert torch.equal(whole.embed("word " * 700, truncate=True), whole.embed([ids[:511] + ids[-1:]]))
    assert TextEncoder(real.model, real.tokenizer, longest=600).longest == 512
    with pytest.raises(ValueError, match="longest=1; allowed: 2 or more"):
        TextEncoder(real.model, real.tokenizer, longest=1)
    for wrong in (b"text", [b"text"], [[101, 1.5]], [[101, True]], [["a"]], [None], [7]):
        with pytest.raises(TypeError, match=r"a text is a str or a list of token ids \(integers\), got "):
            real.embed(wrong)
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        real.embed([[101], []])
    assert real.embed([]).shape == (0, 384)


def write(folder, modules=("Transformer", "Pooling", "Normalize"), **files):
    """The files of a sentence encoder: pooling, sentence_bert, tokenizer."""
    places = {"pooling": "1_Pooling/config", "sentence_bert": "sentence_bert_config", "tokenizer": "tokenizer_config"}
    files = {places[name]: content for name, content in files.items()}
    for name, content in ({"modules": [{"type": f"a.b.{module}"} for module in modules]} | files).items():
        (folder / f"{name}.json").parent.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("pooling, how", [
    ({}, "mean"),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
    ({"pooling_mode_mean_tokens": True}, "mean"),
    ({"pooling_mode": "cls", "embedding_dimension": 3, "include_prompt": True}, "cls"),
    ({"pooling_mode": ["mean"]}, "mean"),
    ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, "cls"),
    ({"pooling_mode_max_tokens": True}, "the pooling is max; supported: mean or cls"),
    ({"pooling_mode": "weightedmean"}, "the pooling is weightedmean; supported"),
    ({"pooling_mode": ["mean", "cls"]}, "the pooling is mean with cls; supported: mean or cls, one of the two"),
    ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "the pooling is mean with cls"),
    ([], "config.json cannot be read: it holds a list, expected a dict"),
])  # fmt: skip
def test_pooling_as_a_folder_says(tmp_path, pooling, how):
    write(tmp_path, pooling=pooling)
    if how in ("mean", "cls"):
        assert embed._pooling(tmp_path) == (how, True)
        write(tmp_path, ("Transformer", "Pooling"), pooling=pooling)
        assert embed._pooling(tmp_path) == (how, False)
    else:
        with pytest.raises(ValueError, match=how):
            embed._pooling(tmp_path)


def test_modules_as_a_folder_says(tmp_path, real):
    assert (real.how, real.normalize) == ("mean", True)
    assert embed._pooling(tmp_path) == ("mean", True)
    write(tmp_path, ("Transformer", "Pooling", "Dense", "Normalize"))
    with pytest.raises(ValueError, match=r"modules\.json has a Dense; supported: Transformer, Pooling, Normalize"):
        embed._pooling(tmp_path)
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ValueError, match="modules.json cannot be read"):
        embed._pooling(tmp_path)


@pytest.mark.parametrize("files, longest", [
    ({}, None),
    ({"sentence_bert": {"max_seq_length": 128}, "tokenizer": {"model_max_length": 512}}, 128),
    ({"sentence_bert": {"max_seq_length": None}, "tokenizer": {"model_max_length": 64}}, 64),
    ({"tokenizer": {"model_max_length": 10**30}}, 10**30),
    ({"sentence_bert": {"max_seq_length": "128"}}, "config.json: texts have at most '128' tokens; it must be a number"),
    ({"sentence_bert": {"max_seq_length": 1}}, "at most 1 tokens; it must be a number, 2 or more"),
])  # fmt: skip
def test_lengths_as_a_folder_says(tmp_path, files, longest):
    write(tmp_path, **files)
    if isinstance(longest, str):
        with pytest.raises(ValueError, match=longest):
            embed._longest(tmp_path)
    else:
        assert embed._longest(tmp_path) == longest
    (tmp_path / "modules.json").unlink()  # an encoder that is no sentence encoder has all its positions
    if "sentence_bert" not in files:
        assert embed._longest(tmp_path) is None


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
