"""The engine: the contract over neighbours, pieces, threads and cache contents; failures; threads; what a step costs."""

import random
import time
from dataclasses import replace

import _tiny
import pytest
import torch
from _engine import (
    GREEDY,
    IN_EVERY_WAY,
    KINDS,
    PROMPT,
    SAMPLED,
    Made,
    alone,
    come_and_go,
    engine,
    mixed,
    run_together,
    steps,
)
from _paged import check

from fastllm.decode import engine as engine_module
from fastllm.decode.engine import Engine

# ------------------------------------------------------------------------------------------------------------ alone


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 257, 600])
def test_pieces_and_threads_change_no_bit(params, length):
    prompt = PROMPT[:length]
    expected = steps(engine(prefix_cache=False), prompt, params)
    assert len(expected) == 24
    for chunk in (1, 7, 64, 512):
        if length <= 64 or chunk >= 7:
            assert steps(engine(chunk=chunk), prompt, params) == expected, chunk
    for threads in (1, 2):
        e = engine(threads=threads)
        assert steps(e, prompt, params) == expected, threads
        assert steps(e, prompt, params) == expected, "from the prefix cache"


@pytest.mark.parametrize("chunk", [7, 64, 512])
def test_scores_are_what_decoding_reports(chunk):
    e = engine(chunk=chunk)
    made = steps(e, PROMPT[:100], SAMPLED, 60)
    (scores,) = e.score([PROMPT[:100] + [token for token, _ in made]])
    assert len(scores) == 159 and scores[99:].tolist() == [logprob for _, logprob in made]


@pytest.mark.parametrize("fields", [{}, {"chunk": 7}, {"prefix_cache": False}, {"pages": 5, "capacity": 80}], ids=str)
def test_scores_from_a_start_on(fields):
    """Texts that begin alike, in the order in which they come: what is found in the cache has the same bits."""
    e, draw = engine(**fields), random.Random(0)
    texts, starts = [], []
    for _ in range(60):
        n = draw.choice((2, 3, 15, 16, 17, 18, 31, 32, 33, 34, 50))
        texts.append(PROMPT[:n] + draw.choices(range(3, 9), k=draw.randint(0, 3)))
        starts.append(draw.randint(1, len(texts[-1])))
    whole = e.score(texts)
    e.cache.forget()
    found = e.score(texts, starts=starts)
    assert [s.tolist() for s in found] == [s[start - 1 :].tolist() for s, start in zip(whole, starts, strict=True)]
    check(e.cache)


def test_scores_of_short_and_of_no_texts():
    e = engine()
    assert [len(s) for s in e.score([[4], [4, 5], PROMPT[:40]])] == [0, 1, 39] and e.score([]) == []


def test_a_mean_does_not_depend_on_the_pieces():
    texts = [PROMPT[:1], PROMPT[:100], PROMPT]
    expected = engine().embed(texts)
    assert all(torch.equal(engine(chunk=chunk).embed(texts), expected) for chunk in (16, 33))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_the_cache_held_before_does_not_matter(value):
    e = engine()
    expected = [steps(e, PROMPT[:n], SAMPLED) for n in (3, 20, 260)]
    for n, made in zip((3, 20, 260), expected, strict=True):
        e.cache.forget()
        for k, v, _ in e.cache.layers:
            k.fill_(value)
            v.fill_(value)
        assert steps(e, PROMPT[:n], SAMPLED) == made


def test_min_new_tokens_keeps_the_end_out():
    e = engine(eos_ids=frozenset(range(3, 40)))
    never = [t for t, _ in steps(e, PROMPT[:4], replace(SAMPLED, min_new_tokens=40), 40)]
    assert not e.eos_ids & set(never)
    assert e.eos_ids & {t for t, _ in steps(e, PROMPT[:4], SAMPLED, 40)}


def test_top_logprobs_are_those_of_the_tokens():
    e = engine()
    many = [Made(PROMPT[:9], replace(GREEDY, logprobs=n), 5) for n in (5, None, 20)]
    e.run([many[0]])
    for step in many[0].steps:
        assert len(step.top) == 5 and step.top[0] == (step.token, step.logprob)
        assert [v for _, v in step.top] == sorted((v for _, v in step.top), reverse=True)
    e.run([Made(PROMPT[9:30]), *many[1:]])
    assert [s.top for s in many[1].steps] == [None] * 5
    assert [s.top[:5] for s in many[2].steps] == [s.top for s in many[0].steps]
    assert all(len({t for t, _ in s.top}) == 20 for s in many[2].steps)


def test_a_full_context():
    e = engine(capacity=32, pages=2)
    made = steps(e, PROMPT[:20], count=12)  # to the last place of the last page
    assert made == steps(engine(), PROMPT[:20], count=12)
    check(e.cache)


# --------------------------------------------------------------------------------------------------------- together


@IN_EVERY_WAY
def test_sixteen_together(fields):
    run_together(engine(**fields), mixed(), alone)


def test_those_who_join_late_and_those_who_leave():
    come_and_go(engine(max_num_seqs=8), mixed(12))


def test_every_number_of_rows():
    """Through all plans, with every number of padding rows, up and down."""
    e = engine(max_num_seqs=6)
    assert e.sizes == (1, 2, 4, 6)
    sequences = [Made(PROMPT[i : i + 9], SAMPLED, 4 + 2 * i) for i in range(6)]
    for s in sequences:
        e.submit([s])
        e.step()
    e.run([])
    for s in sequences:
        e.wait(lambda s=s: s.ended)
        assert s.made == alone(s)
    assert sorted(e.steps.plans) == [1, 2, 4, 6] and engine(max_num_seqs=1).sizes == (1,)


def test_padding_touches_nothing():
    e = engine(max_num_seqs=4)
    sequences = [Made(PROMPT[i : i + 20], count=30) for i in range(3)]
    e.submit(sequences)
    for _ in range(5):
        e.step()
    free = list(e.cache._free)
    for k, v, _ in e.cache.layers:
        k[free], v[free] = 7.0, 7.0
    e.run([])
    for s in sequences:
        e.wait(lambda s=s: s.ended)
    assert all((t[free] == 7).all() for pages in e.cache.layers for t in pages[:2])
    assert e.rows.who.tolist() == [-1] * 4 and e.rows.slot.tolist() == [-1] * 4


def test_completions_share_their_prompt():
    for length in (40, 48, 49, 1):
        e, prompt = engine(prefix_cache=False), PROMPT[:length]
        sequences = [Made(prompt, SAMPLED, 10, index) for index in range(3)]
        e.submit(sequences)
        while not all(s.tokens for s in sequences):
            e.step()
        shared = (length - 1) // 16
        assert all(s.pages[:shared] == sequences[0].pages[:shared] for s in sequences)
        own = [page for s in sequences for page in s.pages[shared:]]
        assert len(set(own)) == len(own) == 3 * (-(-(length + 10) // 16) - shared)
        assert [s.timing.prompt_tokens for s in sequences] == [length, 1, 1]
        assert [s.timing.cached for s in sequences] == [0, length - 1, length - 1]
        for s in sequences:
            e.wait(lambda s=s: s.ended)
            assert s.made == alone(s)
        assert len({tuple(s.tokens) for s in sequences}) == 3
        check(e.cache)


def test_a_known_beginning_is_not_read_again():
    e = engine()
    first = Made(PROMPT[:200], SAMPLED, 30)
    e.run([first])
    answer = Made([*PROMPT[:200], *first.tokens, 5, 6, 7], SAMPLED, 12)  # a chat goes on
    again = Made(PROMPT[:200], GREEDY, 12)
    e.run([answer, again])
    assert (first.timing.prompt_tokens, first.timing.cached) == (200, 0)
    assert (answer.timing.cached, answer.timing.prompt_tokens) == (224, 233 - 224)
    assert (again.timing.cached, again.timing.prompt_tokens) == (192, 8)
    assert answer.made == alone(answer) and again.made == alone(again)
    whole = Made(PROMPT[:192], GREEDY, 12)  # its last token lies in a page that is shared
    e.run([whole])
    assert (whole.timing.cached, whole.timing.prompt_tokens) == (191, 1) and whole.made == alone(whole)


def test_a_prompt_that_is_read_now_is_shared_by_the_next():
    e = engine()
    sequences = [Made([*PROMPT[:320], i], SAMPLED, 6) for i in range(3, 7)]
    e.run(sequences)
    assert [s.timing.prompt_tokens for s in sequences] == [321, 1, 1, 1]
    assert [s.made for s in sequences] == [alone(s) for s in sequences]


def test_memory_admits_and_makes_wait():
    """Room for two of the three; the third runs when one has left, and overtakes nobody."""
    e = engine(pages=8, prefix_cache=False)
    a, b, c, d = (Made(PROMPT[i : i + 40], SAMPLED, n) for i, n in enumerate((24, 10, 24, 4)))  # 4, 4, 4, 3 pages
    e.submit([a, b, c, d])
    while not b.tokens:
        e.step()
    assert e.scheduler.running == [a, b]
    while not c.tokens:
        assert not d.pages and bool(c.pages) == b.ended
        e.step()
    assert e.scheduler.running == [a, c] and not d.pages
    for s in (a, b, c, d):
        e.wait(lambda s=s: s.ended)
        assert s.made == alone(s)
    check(e.cache)


def test_known_pages_give_way_to_those_who_need_room():
    e = engine(pages=8, capacity=128)
    for i in range(6):
        s = Made(PROMPT[20 * i : 20 * i + 70], SAMPLED, 30)  # 7 of 8 pages each
        e.run([s])
        assert s.made == alone(s)
        check(e.cache)


def test_what_can_never_fit_is_refused_with_the_numbers():
    e = engine(pages=8, capacity=200)
    for prompt, room, message in (
        (PROMPT[:150], 51, r"201 tokens \(13 pages\) with 150 to read; allowed: 1 to 200 tokens, .* of 8 pages"),
        (PROMPT[:100], 29, r"129 tokens \(9 pages\)"),
        ([], 1, "with 0 to read"),
    ):
        with pytest.raises(ValueError, match=message):
            e.submit([Made(PROMPT[:3]), Made(prompt, count=room)])
    assert not e.scheduler.waiting


def test_pieces_are_short(monkeypatch):
    """While others run, a long prompt is read in pieces of about a tenth of a second, as measured, that end with a page."""
    e, read, clock = engine(chunk=512), [], [0.0]

    def step(ids, batch, step=e.model.step):
        clock[0] += len(ids) / 1000  # a model of 1,000 tokens a second
        if len(ids) > 2:
            read.append(len(ids))
        return step(ids, batch)

    e.model.step = step
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: clock[0])
    runs, long = Made(PROMPT[:2], SAMPLED, 60), Made(PROMPT, SAMPLED, 3)
    e.submit([runs])
    e.step(), e.step()
    e.submit([long])
    while not long.made:
        told = len(runs.made)
        e.step()
        assert len(runs.made) == told + 1  # a token of the other after every piece
    assert sum(read) == 599 and read[0] == 16 and set(read[1:-1]) == {96}


@pytest.mark.parametrize(("speed", "piece"), [(1000, 240), (50, 64), (10_000, 512)])
def test_pieces_of_a_prompt_alone(monkeypatch, speed, piece):
    """Where no other runs, a piece takes about a quarter of a second, but is not so small that weights are read too often."""
    e, read, clock = engine(chunk=512), [], [0.0]

    def step(ids, batch, step=e.model.step):
        clock[0] += len(ids) / speed
        read.append(len(ids))
        return step(ids, batch)

    e.model.step = step
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: clock[0])
    e.run([Made(PROMPT, SAMPLED, 1)])
    assert read[0] == 64 and read[1] == piece


# ------------------------------------------------------------------------------------------------------------ speed


def step_seconds(e: Engine, enough: float, patience: float = 20.0) -> float:
    """The fastest of many decode steps of one sequence; stops when one is fast enough."""
    best, end = float("inf"), time.perf_counter() + patience
    while best > enough and time.perf_counter() < end:
        s = Made([3, 4, 5], SAMPLED, 310)
        e.submit([s])
        while not s.ended:
            begin, told = time.perf_counter(), len(s.made) + 1
            e.wait(lambda s=s, told=told: len(s.made) == told)
            best = min(best, time.perf_counter() - begin)
    return best


def test_overhead_of_a_step():
    """30 layers with hardly any weights: what is left is the engine, 183 kernels and their barriers."""
    config = replace(_tiny.CONFIG, layers=30, dim=16, ffn=16, heads=1, kv_heads=1, head_dim=16)
    e = engine(config, capacity=400)
    assert step_seconds(e, enough=0.4e-3) <= 0.4e-3
