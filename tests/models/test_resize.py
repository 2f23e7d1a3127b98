"""Tables that grow with the vocabulary: old tokens keep their logits, new ones start at the mean, ties hold."""

import dataclasses

import _tiny
import pytest
import torch

from fastllm import models
from fastllm.models.decoder import Decoder
from fastllm.models.encoder import Encoder, EncoderConfig
from fastllm.models.resize import resize_vocab
from fastllm.models.seq2seq import Seq2Seq, Seq2SeqConfig

OLD, NEW = _tiny.CONFIG.vocab, _tiny.CONFIG.vocab + 7
IDS = torch.arange(12).view(2, 6)


def decoder(tied):
    model = Decoder(dataclasses.replace(_tiny.CONFIG, tied=tied))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def seq2seq(tied):
    return Seq2Seq(Seq2SeqConfig(OLD, 1, 1, 32, 64, 2, 16, head_bias=True, tied=tied))


def encoder(tied):
    model = Encoder(EncoderConfig(OLD, 1, 32, 64, 2, 16, head="mlm", tied=tied))
    torch.nn.init.normal_(model.head.words.bias)
    return model


CALLS = {decoder: lambda m: m(IDS), encoder: lambda m: m(IDS), seq2seq: lambda m: m(IDS, IDS)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("build", CALLS)
def test_growth(build, tied, tmp_path):
    model, call = build(tied), CALLS[build]
    before = call(model).detach()
    resize_vocab(model, NEW)
    head = model.head.words if build is encoder else model.head
    assert model.config.vocab == NEW and (head.weight is model.embedding.weight) == tied
    after = call(model)
    assert torch.equal(after[..., :OLD], before)
    torch.testing.assert_close(after[..., OLD:], before.mean(-1, keepdim=True).expand(*before.shape[:-1], 7))
    ids = torch.full((2, 6), NEW - 1)
    (model(ids, ids) if build is seq2seq else model(ids)).sum().backward()  # new rows are trained
    assert model.embedding.weight.grad[NEW - 1].abs().sum() > 0
    models.save(model, tmp_path / "grown")
    again = models.load(tmp_path / "grown")
    assert again.config.vocab == NEW and torch.equal(call(again), after)


def test_a_loaded_model_keeps_its_bits(tmp_path):
    model = models.load(_tiny.folder(tmp_path / "first"))
    want = model(IDS).detach()
    resize_vocab(model, NEW)
    models.save(model, tmp_path / "second")
    assert torch.equal(models.load(tmp_path / "second")(IDS)[..., :OLD], want)


def test_errors():
    with pytest.raises(ValueError, match=f"vocab={OLD - 1}, the model has {OLD} rows"):
        resize_vocab(decoder(True), OLD - 1)
    with pytest.raises(TypeError, match="packed for decoding"):
        resize_vocab(_tiny.decoder(), NEW)
    with pytest.raises(TypeError, match="Linear is none of"):
        resize_vocab(torch.nn.Linear(2, 2), NEW)
    plain = Encoder(EncoderConfig(OLD, 1, 32, 64, 2, 16, head="tokens", labels=3))
    resize_vocab(plain, NEW)
    assert plain.embedding.weight.shape == (NEW, 32) and plain.head.weight.shape == (3, 32)
