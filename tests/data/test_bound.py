"""Bound: never more than a text has, and nothing where a tokenizer may make any text short."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_stream import KINDS
from test_tokenizer import ANY_TEXT, RUNS, TOKENS, byte_level
from tokenizers import AddedToken, Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fastllm.data.bound import Bound
from fastllm.data.tokenizer import Tokenizer

KEPT = [token for token in TOKENS if token not in ("Ā", "a")]
CERTAIN = {
    "byte level": KINDS["byte level"],
    "bytes that are left out": byte_level(tokens=KEPT, merges=[], token_type=[3] * 3 + [1] * (len(KEPT) - 3)),
    "sentencepiece": KINDS["sentencepiece"],
    "sentencepiece without prefix": KINDS["sentencepiece without prefix"],
}


@pytest.mark.parametrize("kind", CERTAIN)
@RUNS
@given(text=ANY_TEXT | st.text(st.sampled_from("▁ a\0é🎉th<0xE2>")))
def test_no_text_has_fewer(kind, text):
    tokenizer = CERTAIN[kind]
    assert Bound(tokenizer).least(text * 50) <= len(tokenizer.encode(text * 50))


@pytest.mark.parametrize("kind", CERTAIN)
def test_a_long_text_is_known_to_be_long(kind):
    longest = max(len(token.encode()) for token in CERTAIN[kind].backend.get_vocab())
    assert Bound(CERTAIN[kind]).least("the " * 10_000) >= 30_000 // longest


def changed(change) -> Tokenizer:
    backend = Backend.from_str(KINDS["byte level"].backend.to_str())
    change(backend)
    return Tokenizer(backend, {})


def drop(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" "), "removed"), pre_tokenizers.ByteLevel()]
    )


@pytest.mark.parametrize(
    "tokenizer",
    [
        KINDS["unigram"],
        KINDS["wordpiece"],
        KINDS["unigram of bytes"],
        byte_level("qwen2"),  # NFC
        changed(drop),
        changed(lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Whitespace())),
        changed(lambda backend: backend.add_tokens([AddedToken("<x>", lstrip=True)])),
    ],
)
def test_nothing_is_certain(tokenizer):
    assert Bound(tokenizer).least("the " * 1000) == 0
