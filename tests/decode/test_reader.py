"""Prompts that are read together: which ones, in how many forwards, and with the bits that each would have alone."""

import random

import pytest
import torch
from _engine import GREEDY, PROMPT, SAMPLED, Made, alone, engine
from _paged import check

from fastllm.decode import reader
from fastllm.decode.rows import Rows
from fastllm.decode.scheduler import Sequence


def counted(e, monkeypatch) -> list[list[int]]:
    """Of each forward of prompts that is to come, the tokens of its pieces; a step has time for all that may be read at once."""
    forwards, read = [], e.reader.read
    e.reader._rate = 1e9
    monkeypatch.setattr(e.reader, "took", lambda tokens, seconds: None)

    def count(pieces, pools):
        forwards.append([p.stop - p.start for p in pieces])
        return read(pieces, pools)

    monkeypatch.setattr(e.reader, "read", count)
    return forwards


def test_prompts_are_read_in_one_forward(monkeypatch):
    e, prompts = engine(), [PROMPT[:20], PROMPT[30:31], PROMPT[40:60], PROMPT[100:105]]
    forwards = counted(e, monkeypatch)
    sequences = [Made(p, SAMPLED) for p in prompts]
    e.run(sequences)
    assert forwards == [[19, 0, 19, 4]]
    assert all(s.made == alone(s) for s in sequences)
    check(e.cache)


def test_the_last_one_is_cut_off(monkeypatch):
    e = engine(chunk=48)
    forwards = counted(e, monkeypatch)
    sequences = [Made(p, SAMPLED) for p in (PROMPT[:31], PROMPT[100:141], PROMPT[200:210])]
    e.submit(sequences)
    e.step()
    assert forwards == [[30, 18]] and [len(s.prompt) - s.read for s in sequences] == [1, 23, 10]
    assert e.scheduler.running == sequences[:1] and list(e.scheduler.waiting) == sequences[1:]
    e.run([])
    e.wait(lambda: all(s.ended for s in sequences))
    assert forwards == [[30, 18], [22, 9]] and all(s.made == alone(s) for s in sequences)
    check(e.cache)


def test_no_more_are_read_than_can_run(monkeypatch):
    e = engine(max_num_seqs=3)
    forwards = counted(e, monkeypatch)
    sequences = [Made(PROMPT[10 * i : 10 * i + 5], count=3 + i) for i in range(7)]
    e.run(sequences)
    assert [len(f) for f in forwards] == [3, 1, 1, 1, 1] and all(s.made == alone(s) for s in sequences)


def test_texts_that_are_only_read_need_no_row(monkeypatch):
    e = engine(max_num_seqs=2)
    forwards = counted(e, monkeypatch)
    running = [Made(PROMPT[:5]), Made(PROMPT[10:15])]
    texts = [Sequence(PROMPT[50 * i : 50 * i + 9], hidden=lambda states: None) for i in range(4)]
    e.submit([*running, *texts])
    e.step()
    assert forwards == [[4, 4], [9, 9], [9, 9]] and e.scheduler.running == running and all(s.ended for s in texts)


def beginning(e, monkeypatch, prompts, **fields) -> tuple[list[list[int]], list[Made]]:
    forwards, sequences = counted(e, monkeypatch), [Made(p, SAMPLED, **fields) for p in prompts]
    e.run(sequences)
    assert all(s.made == alone(s) for s in sequences)
    check(e.cache)
    return forwards, sequences


def test_one_that_begins_alike_waits_for_the_beginning(monkeypatch):
    forwards, (first, second, third) = beginning(
        engine(), monkeypatch, [PROMPT[:40], PROMPT[:32] + PROMPT[50:60], PROMPT[100:110]]
    )
    assert forwards == [[39], [9, 9]] and (first.timing.cached, second.timing.cached, third.timing.cached) == (0, 32, 0)


def test_one_that_begins_alike_does_not_wait_for_what_is_known(monkeypatch):
    e = engine()
    e.run([Made(PROMPT[:33])])
    forwards, sequences = beginning(e, monkeypatch, [PROMPT[:32] + PROMPT[i : i + 10] for i in (50, 70, 90)])
    assert forwards == [[9, 9, 9]] and [s.timing.cached for s in sequences] == [32] * 3


@pytest.mark.parametrize("common", [15, 16, 17])
def test_only_whole_pages_are_waited_for(common, monkeypatch):
    forwards, _ = beginning(engine(), monkeypatch, [PROMPT[:common] + PROMPT[i : i + 20] for i in (50, 90)], count=3)
    assert [len(f) for f in forwards] == ([2] if common < 16 else [1, 1])


def test_without_a_prefix_cache_nobody_waits(monkeypatch):
    forwards, _ = beginning(engine(prefix_cache=False), monkeypatch, [PROMPT[:40], list(PROMPT[:40])])
    assert forwards == [[39, 39]]


def test_completions_of_one_prompt_read_it_once(monkeypatch):
    for cache in (True, False):
        e = engine(prefix_cache=cache)
        forwards = counted(e, monkeypatch)
        prompt = PROMPT[:9]
        sequences = [Made(prompt, SAMPLED, index=i) for i in range(3)]
        e.run([*sequences, other := Made(PROMPT[50:60], SAMPLED)])
        assert forwards == [[8], [0, 0, 9]], cache
        assert all(s.made == alone(s) for s in (*sequences, other))


# --------------------------------------------------------------------------------------------------------- captured


def captured(**fields):
    """An engine that captures forwards of prompts, as one on a GPU does."""
    e = engine(**fields)
    e.reader.captures = True
    return e


def test_captured_forwards_have_the_same_bits():
    e, draw = captured(max_num_seqs=8), random.Random(0)
    for _ in range(12):
        sequences = []
        for _ in range(draw.choice((1, 1, 2, 10))):
            begin, length = draw.randrange(500), draw.choice((1, 2, 9, 16, 17, 40, 90))
            sequences.append(Made(PROMPT[begin : begin + length], SAMPLED, draw.randint(1, 6)))
        e.run(sequences)
        assert all(s.made == alone(s) for s in sequences)
        check(e.cache)
    assert {16, 24, 32, 64, 96} <= set(e.reader._plans) and all(e.reader._plans.values())


def test_means_of_captured_forwards():
    texts = [PROMPT[:30], PROMPT[40:70], PROMPT[:300], PROMPT[300:330]]
    assert torch.equal(captured(chunk=64).embed(texts), engine().embed(texts))


def test_scores_of_captured_forwards():
    texts = [PROMPT[:30], PROMPT[40:70], PROMPT[:300], PROMPT[300:330]]
    for found, wanted in zip(captured(chunk=64).score(texts), engine().score(texts), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("error", [MemoryError("no more"), RuntimeError("operation not permitted")], ids=str)
def test_where_none_can_be_captured_it_is_said(error, monkeypatch):
    e = captured()

    def refuse(*arguments):
        raise error

    monkeypatch.setattr(reader, "capture", refuse)
    with pytest.warns(UserWarning, match=f"prompts of 24 tokens are read without a captured forward: {error}"):
        e.run([s := Made(PROMPT[:20], GREEDY)])
    assert s.made == alone(s)
    e.run([s := Made(PROMPT[50:70], GREEDY)])  # and said once
    assert s.made == alone(s)


@pytest.mark.parametrize(
    ("tokens", "size"),
    [(1, 16), (16, 16), (17, 24), (24, 24), (25, 32), (33, 48), (48, 48), (49, 64), (1000, 1024), (1025, 1536), (2048, 2048)],
)  # fmt: skip
def test_sizes(tokens, size):
    assert reader.padded_size(tokens) == size


def test_a_row_that_cannot_be_written_ends_its_own_request(monkeypatch):
    e, write = engine(), Rows.write
    first, bad, last = (Made(PROMPT[i : i + 20], SAMPLED) for i in (0, 50, 100))

    def refuse(self, s):
        if s is bad:
            raise ValueError("no such seed")
        return write(self, s)

    monkeypatch.setattr(Rows, "write", refuse)
    forwards = counted(e, monkeypatch)
    with pytest.raises(ValueError, match="no such seed"):
        e.run([first, bad, last])
    assert forwards == [[19, 19, 19]] and first.made == alone(first) and last.made == alone(last) and not bad.made
    check(e.cache)
