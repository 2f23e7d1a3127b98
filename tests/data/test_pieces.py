"""Long texts: encoded in pieces, with the tokens of the whole, or whole where a vocabulary does not allow a cut."""

import random

import pytest
from _assets import asset
from _scores import TEXTS

from fastllm.data import pieces as module
from fastllm.data import tokenizer as tokenizers
from fastllm.data.pieces import pieces
from fastllm.data.tokenizer import Tokenizer
from fastllm.models.text import read_text

SPACES = (" ", " ", " ", "  ", "\n", "\n\n ", "\t", " \u00a0", ", ", " <|im_end|> ")


def text(seed: int, words: int = 400) -> str:
    random_ = random.Random(seed)
    parts = [*" ".join(TEXTS).split(), "naïve", "12345", "你好世界", "a\u0301", "I'll", "x" * 90]
    return "".join(random_.choice(parts) + random_.choice(SPACES) for _ in range(words))


@pytest.fixture(params=["smollm2-135m", "minilm-l6", "trained"])
def tokenizer(request):
    if request.param == "trained":
        return Tokenizer.train(TEXTS, 400)
    return read_text(asset(request.param))[0]


@pytest.mark.parametrize("special", [False, True])
def test_the_tokens_are_those_of_the_whole(tokenizer, monkeypatch, special):
    for seed in range(20):
        given = text(seed)
        whole = tokenizer.encode(given, add_special_tokens=False, parse_special=special)
        with monkeypatch.context() as patch:
            patch.setattr(module, "LONG", 200)
            patch.setattr(tokenizers, "LONG", 200)
            patch.setattr(module, "AROUND", 24)
            made = pieces(given, lambda part: tokenizer.encode(part, add_special_tokens=False, parse_special=special))
            assert len(made) > 5 and "".join(made) == given
            found = tokenizer.encode_batch([given, "short"], add_special_tokens=False, parse_special=special)
        assert found == [whole, tokenizer.encode("short", add_special_tokens=False)]


def test_a_text_without_spaces_and_a_vocabulary_that_allows_no_cut(monkeypatch):
    monkeypatch.setattr(module, "LONG", 20)
    assert pieces("x" * 90, list) == ["x" * 90]
    assert pieces("ab " * 30, lambda part: [len(part)]) == ["ab " * 30]  # one token, however long
    assert len(pieces("ab " * 30, lambda part: [ord(c) for c in part])) == 5


def test_one_enormous_line(monkeypatch):
    """The library is never given all of it."""
    tokenizer, longest = Tokenizer.train(TEXTS, 400), []
    given = " ".join(TEXTS * (3 * module.LONG // len(" ".join(TEXTS))))
    backend = tokenizer.backend

    class Watched:
        model = backend.model

        def __setattr__(self, name, value):
            setattr(backend, name, value)

        def encode_batch_fast(self, texts, add_special_tokens):
            longest.append(max(map(len, texts), default=0))
            return backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    whole = backend.encode_batch_fast([given], add_special_tokens=False)[0].ids
    tokenizer.backend = Watched()
    short = [backend.encode_batch_fast([text], add_special_tokens=False)[0].ids for text in TEXTS[:2]]
    assert tokenizer.encode_batch([TEXTS[0], given, TEXTS[1]], add_special_tokens=False) == [short[0], whole, short[1]]
    assert max(longest) <= module.LONG < len(given)
