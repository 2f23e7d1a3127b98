"""Texts token by token: all that a stream tells is what the tokenizer makes of the whole, also where it continues a prompt."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import KINDS as TOKENIZERS
from test_tokenizer import PIECES, RUNS, byte_level
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from fastllm.data.tokenizer import Tokenizer


def unigram_of_bytes(*steps) -> Tokenizer:
    """Falls back to bytes, which the library joins."""
    pieces = ["<unk>", "</s>", "▁", "▁a", "b", *PIECES[3:]]
    backend = Backend(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Sequence(list(steps))
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {"eos": 1})


LLAMA = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
KINDS = TOKENIZERS | {
    "unigram of bytes": unigram_of_bytes(decoders.ByteFallback(), decoders.Metaspace()),
    "two spaces go": unigram_of_bytes(*LLAMA, decoders.Strip(" ", 2, 0)),
}


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@RUNS
@given(data=st.data())
def test_stream_adds_up(kind, skip, data):
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    stream = tokenizer.stream(skip_special_tokens=skip)
    for _ in range(2):  # flush makes it ready for another sequence
        parts = [stream.push(id) for id in ids]
        assert "".join([*parts, stream.flush()]) == tokenizer.decode(ids, skip_special_tokens=skip)
    if not kind.startswith("sentencepiece"):  # broken UTF-8 aside, the library's own decoding
        assert tokenizer.decode(ids, skip) == tokenizer.backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@RUNS
@given(data=st.data())
def test_a_stream_that_continues(kind, skip, data):
    """It tells what the text has more with it than without; ids that a padded model has more stand for nothing."""
    tokenizer = KINDS[kind]
    ids = st.lists(st.integers(0, len(tokenizer) - 1), max_size=9)
    if kind not in ("wordpiece", "unigram"):
        ids |= st.lists(st.sampled_from("▁ é你🎉 ")).map(lambda text: tokenizer.encode("".join(text), False))
    before, more = data.draw(ids), data.draw(ids)
    stream = tokenizer.stream(skip, after=[*before, len(tokenizer) + 5])
    told, whole = tokenizer.decode(before, skip), tokenizer.decode([*before, *more], skip)
    text = "".join([*map(stream.push, more), stream.flush()])
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(told, whole, strict=False))
    assert text == whole[len(list(same)) :]


def test_a_stream_of_bytes_tells_what_is_certain():
    tokenizer = KINDS["unigram of bytes"]
    stream, ids = tokenizer.stream(), tokenizer.encode("a é b")
    assert [stream.push(id) for id in ids] == ["a", " ", "", "", "é ", "b"] and stream.flush() == ""


def test_stream_waits_for_whole_characters():
    tokenizer, text = byte_level(merges=[]), "é🎉"
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    assert [stream.push(id) for id in ids] == ["", "é", "", "", "", "🎉"]
    assert stream.flush() == ""
    assert stream.push(ids[2]) == "" and stream.flush() == "\ufffd"
