"""Text2Text: the tokens of beam search with their text, whatever stands beside a source; models and sources that are refused."""

import _tiny
import pytest
import torch
from _scores import TEXTS

from fastllm import LLM
from fastllm.data.corrupt import SENTINELS
from fastllm.data.tokenizer import Tokenizer
from fastllm.decode import beam, text2text
from fastllm.decode.beam import BeamParams
from fastllm.decode.text2text import Text2Text
from fastllm.models.seq2seq import Seq2Seq, Seq2SeqConfig

PARAMS = BeamParams(max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return _tiny.text2text(tmp_path_factory.mktemp("model"), TEXTS)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def model(folder):
    return Text2Text.load(folder)


def test_answers_are_those_of_beam_search(model, tokenizer):
    for params in (PARAMS, BeamParams(max_new_tokens=12, beams=3, n=2)):
        answers = model.generate(TEXTS[:6], params)
        for text, found in zip(TEXTS, answers, strict=False):
            ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_id]
            (wanted,) = beam.generate(model.model, torch.tensor([ids]), params=params)
            assert [a.token_ids for a in found] == [h.token_ids for h in wanted]
            assert [a.finish_reason for a in found] == [h.finish_reason for h in wanted]
            assert [a.text for a in found] == [tokenizer.decode(h.token_ids) for h in wanted]
            assert len(found) == params.n
    kinds = {a.finish_reason for found in answers for a in found}
    assert len({tuple(found[0].token_ids) for found in answers}) > 3 and kinds <= {"stop", "length"}


def test_a_source_alone_and_among_others(model, monkeypatch):
    together = model.generate(TEXTS[:9], PARAMS)
    monkeypatch.setattr(text2text, "TOKENS", 40)  # several parts
    assert model.generate(TEXTS[:9], PARAMS) == together == [model.generate(text, PARAMS)[0] for text in TEXTS[:9]]
    assert list(model.stream(TEXTS[:9], PARAMS)) == together
    assert not torch.is_inference_mode_enabled()


def test_ids_and_special_tokens(model, tokenizer):
    hole = f"The cat {SENTINELS[0]} mat"
    ids = tokenizer.encode(hole, add_special_tokens=False, parse_special=True)
    assert tokenizer.token_id(SENTINELS[0]) in ids
    read, spelled = model.generate(hole, PARAMS, parse_special=True), model.generate(hole, PARAMS)
    assert model.generate([ids], PARAMS) == read != spelled
    assert model.generate([], PARAMS) == [] and len(model.generate("", PARAMS)) == 1


def test_what_is_refused(model, tokenizer, folder):
    with pytest.raises(
        ValueError, match="is an encoder-decoder; `fastllm generate`, `fastllm eval` and decode.text2text"
    ):
        LLM(folder)
    with pytest.raises(TypeError, match="the model is a Linear; it must be a Seq2Seq"):
        Text2Text(torch.nn.Linear(2, 2), tokenizer)
    small = {"vocab": 60, "encoder_layers": 1, "decoder_layers": 1, "dim": 16, "ffn": 16, "heads": 2, "head_dim": 8}
    with pytest.raises(ValueError, match=f"the tokenizer has {len(tokenizer)} ids, the model 60"):
        Text2Text(Seq2Seq(Seq2SeqConfig(**small)), tokenizer)
    short = Text2Text(Seq2Seq(Seq2SeqConfig(**small | {"vocab": len(tokenizer), "max_position": 4})), tokenizer)
    with pytest.raises(ValueError, match="source 1 has 10 tokens, the model 4 positions; shorten it"):
        short.generate([[5, 5], [5] * 9])
    audio = Seq2Seq(Seq2SeqConfig(**small | {"vocab": 500, "bins": 8}))
    with pytest.raises(ValueError, match="the model reads audio"):
        Text2Text(audio, tokenizer)
    with pytest.raises(ValueError, match="Encoder, no encoder-decoder; LLM runs decoders"):
        Text2Text.load("minilm-l6")
