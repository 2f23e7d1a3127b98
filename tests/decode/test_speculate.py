"""Speculative decoding: the bits of decoding without it; what is looked up; when drafts are made, and when no more."""

import contextlib
from dataclasses import replace

import _tiny
import pytest
from _engine import GREEDY, KINDS, PENALISED, PROMPT, SAMPLED, Made, alone, come_and_go, engine, forced, mixed
from _paged import check
from hypothesis import given, settings
from hypothesis import strategies as st
from test_failures import poisoned

from fastllm import LLM, SamplingParams, ops
from fastllm.decode.engine import Engine
from fastllm.decode.speculate import LONGEST, SHARE, SHORTEST, Lookup, Speculator
from fastllm.decode.steps import Steps


def speculating(**fields) -> Engine:
    """Drafts are forced upon it, right and wrong ones."""
    return forced(engine(**{"speculate": 7, "max_num_seqs": 3} | fields))


# ------------------------------------------------------------------------------------------------------------- lookup


def naive(ids: list[int]) -> tuple[int, int]:
    """(place of what followed, tokens that agree) of the longest n-gram at the end that stood before, where it did last."""
    for n in range(LONGEST, SHORTEST - 1, -1):
        for place in range(len(ids) - 1, n - 1, -1):
            if len(ids) > n and ids[place - n : place] == ids[-n:]:
                return place, n
    return 0, 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 60))
def test_lookup_is_the_naive_one(ids, known):
    lookup = Lookup(ids[:known])
    place, agreeing = naive(ids[:known])
    assert (lookup.at, lookup.agreeing) == (place, agreeing)
    for end in range(known, len(ids)):
        right = place and ids[place] == ids[end]
        lookup.append(ids[end])
        place, agreeing = (place + 1, agreeing + 1) if right else naive(ids[: end + 1])
        assert (lookup.at, lookup.agreeing) == (place, agreeing) and lookup.ids == ids[: end + 1]
        if place:
            assert ids[place - agreeing : place] == ids[end + 1 - agreeing : end + 1]
            text = ids[: end + 1]
            for guess in lookup.guesses(9):
                assert guess == text[place]
                text.append(guess)
                place += 1
            place = lookup.at


# --------------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 250, 600])
def test_one_sequence(params, threads, length):
    e = speculating(threads=threads, max_num_seqs=1, speculate=5)
    assert e.sizes == (1, 2, 4, 6)
    for count in (40, 40, 1, 2, 3):  # the second from the prefix cache
        s = Made(PROMPT[:length], params, count)
        e.run([s])
        assert s.made == alone(s)
        assert s.timing.accepted <= s.timing.drafted and (count < 40 or s.timing.accepted)
        check(e.cache)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("rows", [3, 7, 16])
def test_many_together(threads, prefix_cache, rows):
    e, sequences = speculating(threads=threads, prefix_cache=prefix_cache, max_num_seqs=rows, speculate=9), mixed(16)
    for s in sequences:
        s.room += 12
    e.run(sequences)
    assert [s.made for s in sequences] == [alone(s) for s in sequences]
    assert sum(s.timing.accepted for s in sequences) > 20
    assert e.rows.who.tolist() == [-1] * len(e.rows.who) == e.rows.slot.tolist()
    check(e.cache)
    known = sorted(tokens for _, tokens in e.cache._page_of)
    plain = engine(prefix_cache=prefix_cache, max_num_seqs=16)
    again = [Made(s.prompt, s.params, s.room, s.index, s.seed) for s in sequences]
    plain.run(again)
    assert known == sorted(tokens for _, tokens in plain.cache._page_of)  # no draft is taken for text


def test_the_real_choice_among_many():
    e, plain = circling(max_num_seqs=4, speculate=11), circling(max_num_seqs=1)
    sequences = [Made(PROMPT[i : 30 + i], GREEDY, 150) for i in range(7)] + mixed(6)
    e.run(sequences)
    expected = [Made(s.prompt, s.params, s.room, s.index, s.seed) for s in sequences]
    plain.run(expected)
    assert [s.made for s in sequences] == [s.made for s in expected]
    check(e.cache)


def test_those_who_join_late_and_those_who_leave():
    come_and_go(speculating(max_num_seqs=4), mixed(12))


def test_completions_of_one_prompt():
    e, prompt = speculating(), PROMPT[:40]
    sequences = [Made(prompt, PENALISED, 30, index) for index in range(3)]
    e.run(sequences)
    assert [s.made for s in sequences] == [alone(s) for s in sequences]
    check(e.cache)


def test_an_end_within_a_draft():
    e = speculating()
    for stop in range(1, 20):
        s = Made(PROMPT[:30], SAMPLED, 40, stop=stop)
        e.run([s])
        assert len(s.made) == stop and s.made == alone(s)
        check(e.cache)
    s = Made(PROMPT[:30], SAMPLED, 40)
    e.run([s])
    answer = Made([*PROMPT[:30], *s.tokens], SAMPLED, 20)  # over pages that drafts have written to
    e.run([answer])
    assert answer.timing.cached == 64 and answer.made == alone(answer)


def test_a_full_context():
    """To the last place of the last page; drafts never go beyond."""
    e = speculating(capacity=32, pages=2)
    for _ in range(4):
        s = Made(PROMPT[:20], count=12)
        e.run([s])
        assert s.made == alone(s)
        check(e.cache)


def test_alternatives():
    e, params = speculating(), replace(SAMPLED, logprobs=5)
    s, plain = Made(PROMPT[:30], params, 40), Made(PROMPT[:30], params, 40)
    e.run([s])
    engine().run([plain])
    assert s.steps == plain.steps and s.timing.accepted


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_drafts_touch_no_page_of_others(value):
    e = speculating()
    for k, v, _ in e.cache.layers:
        k.fill_(value)
        v.fill_(value)
    s = Made(PROMPT[:30], SAMPLED, 60)
    e.submit([s])
    while not s.ended:
        free = list(e.cache._free) if s.pages else []
        e.step()
        if s.pages:
            for k, v, _ in e.cache.layers:
                assert all(bool((x.isnan() if value != value else x == value).all()) for x in (k[free], v[free]))
    assert s.made == alone(s)


# ----------------------------------------------------------------------------------------------------------- failures


def test_a_wrong_guess_that_has_no_distribution():
    """The row that reads it finds NaN, and nobody is told."""
    e, s = speculating(), Made(PROMPT[:30], GREEDY, 40)
    used = {*s.prompt, *(t for t, _ in alone(s))}
    bad = next(t for t in range(3, len(_tiny.TOKENS)) if t not in used)
    poisoned(e, bad)
    choose = e.steps.speculator.choose

    def poison(running, plans):
        size, drafts = choose(running, plans)
        for draft in drafts:
            draft.tokens[-1] = bad
        return size, drafts

    e.steps.speculator.choose = poison
    e.run([s])
    assert s.made == alone(s) and s.timing.accepted
    check(e.cache)


def test_one_that_fails_touches_no_other():
    e = speculating()
    clean = Made(PROMPT[:6], GREEDY, 30)
    token = alone(clean)[10][0]
    last = next(i for i, (t, _) in enumerate(alone(clean)) if t == token)
    others = [s for s in (Made(PROMPT[i : i + 25], GREEDY, 25) for i in range(40)) if token not in s.prompt]
    others = [s for s in others if token not in [t for t, _ in alone(s)]][:2]
    undo = poisoned(e, token)
    with pytest.raises(ops.LogitsError, match="hold a NaN"):
        e.run([others[0], clean, others[1]])
    assert clean.made == alone(clean)[: last + 1]
    assert [s.made for s in others] == [alone(s) for s in others]
    check(e.cache)
    undo()
    again = Made(PROMPT[:6], GREEDY, 30)
    e.run([again])
    assert again.made == alone(again)


def test_an_interrupt_loses_nothing(monkeypatch):
    e, sequences = speculating(chunk=64), [Made(PROMPT[i : i + 150], PENALISED, 30) for i in range(3)]
    replay, left = Steps.replay, [3]

    def interrupted(self, *arguments):
        plan = replay(self, *arguments)
        if len(sequences[1].made) > 5 and left[0]:
            left[0] -= 1
            raise KeyboardInterrupt
        return plan

    monkeypatch.setattr(Steps, "replay", interrupted)
    e.submit(sequences)
    for s in sequences:
        while not s.ended:
            with contextlib.suppress(KeyboardInterrupt):
                e.wait(lambda s=s: s.ended)
    assert not left[0] and [s.made for s in sequences] == [alone(s) for s in sequences]
    check(e.cache)


# ------------------------------------------------------------------------------------------------------------- choice


def timeless(e: Engine) -> Engine:
    """What it decides does not depend on how fast this machine is."""
    e.steps.speculator.saw = lambda running, counts, drafts, seconds, captures: Speculator.saw(
        e.steps.speculator,
        running,
        counts,
        drafts,
        e.steps.speculator._times_of(len(running), len(running) + _rows(drafts))[0],
        False,
    )
    return e


def _rows(drafts) -> int:
    return sum(len(draft.tokens) for draft in drafts)


def circling(**fields) -> Engine:
    """A model that sees its last token alone, so that its greedy text goes round in circles."""
    e = engine(**fields)
    for layer in e.model.layers:
        layer.out.weight.data.zero_()
    return e


@pytest.mark.parametrize("params", [GREEDY, replace(SAMPLED, temperature=0.05)], ids=["greedy", "sampled"])
def test_text_that_repeats_is_drafted(params):
    e, plain, replays = timeless(circling(speculate=7, max_num_seqs=1)), circling(max_num_seqs=1), []
    s, expected = Made(PROMPT[:20], params, 400), Made(PROMPT[:20], params, 400)
    replay = e.steps.replay
    e.steps.replay = lambda *arguments: (replays.append(arguments), replay(*arguments))[1]
    e.run([s])
    plain.run([expected])
    assert s.made == expected.made
    assert s.timing.accepted > 200 and s.timing.accepted > 0.8 * s.timing.drafted
    assert s.timing.steps == len(replays) < 200 and s.timing.decoded <= 399
    assert expected.timing.steps == expected.timing.decoded == 399 and expected.timing.drafted == 0


def fake(ids, room=10_000) -> Made:
    s = Made(ids, count=room)
    s.tokens.append(ids[-1])
    return s


def play(most: int, draws, count: int, sequences: int = 1) -> tuple[list[Made], float]:
    """Speculator alone, beside a model that draws `draws(i, guess)` as token i where `guess` would be guessed; returns the
    sequences and the time, in steps without drafts."""
    sizes = tuple(1 << i for i in range((most + sequences - 1).bit_length() + 1))
    x, time = Speculator(most, sizes), 0.0
    running = [fake([*range(50), 7 + i, 8 + i]) for i in range(sequences)]
    for row, s in enumerate(running):
        s.row = row
    while len(running[0].tokens) < count:
        size, drafts = x.choose(running, sizes)
        guessed = {d.row: d.tokens for d in drafts}
        for d in drafts:
            running[d.row].timing.drafted += len(d.tokens)
        counts = []
        for row, s in enumerate(running):
            taken = 0
            for guess in [*guessed.get(row, []), None]:
                token = draws(row, len(s.tokens), guess)
                s.tokens.append(token)
                taken += 1
                if token != guess:
                    break
            counts.append(taken)
        seconds = (4 + size) / (4 + x.size(sequences))
        time += seconds
        x.saw(running, counts, drafts, seconds, False)
    return running, time


def test_one_whose_drafts_fail_stops_drafting():
    """It repeats itself wherever nobody guesses, and never where somebody does."""
    new = iter(range(1000, 10**9))
    (s,), time = play(15, lambda row, i, guess: i % 40 if guess is None else next(new), 2000)
    assert 0 < s.timing.drafted < 0.2 * len(s.tokens) and time <= (len(s.tokens) - 1) * (1 + SHARE)


def test_one_beside_another_hardly_waits():
    new = iter(range(1000, 10**9))
    sequences, time = play(7, lambda row, i, guess: i % 40 if row == 0 else next(new), 2000, sequences=2)
    assert len(sequences[0].tokens) > len(sequences[1].tokens) > 100
    assert time <= (len(sequences[1].tokens) - 1) * (1 + SHARE) and not sequences[1].timing.drafted


def test_one_that_repeats_is_soon_at_full_speed():
    _, time = play(7, lambda row, i, guess: i % 40, 600)
    assert time < (40 + 560 / 8 * 2.4) * 1.2


def test_what_is_right_later_is_tried_again():
    """After a long stretch in which nothing repeats."""
    new = iter(range(1000, 10**9))
    _, time = play(7, lambda row, i, guess: next(new) if i < 1000 else i % 40, 2000)
    assert time < 1000 + (40 + 960 / 8 * 2.4) * 1.2


def test_a_plan_is_captured_once_that_would_have_paid():
    x, s, steps = Speculator(7, (1, 2, 4, 8)), fake([*range(50), 7, 8]), 0
    x.saw([s], [1], [], 50.0, True)
    while x.choose([s], {1}) == (1, []):
        s.tokens.append(len(s.tokens) % 40)
        x.saw([s], [1], [], 1.0, False)
        steps += 1
    size, drafts = x.choose([s], {1})
    assert (size, drafts) == (8, []) and 40 + 50 / 3 < steps < 40 + 80
    assert x.choose([s], {1, 8})[1][0].tokens == [i % 40 for i in range(len(s.tokens), len(s.tokens) + 7)]


# ---------------------------------------------------------------------------------------------------------------- LLM

TEXT = "The theory of the rain in the other region. " * 3
PARAMS = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=11, max_new_tokens=48)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return _tiny.gguf(tmp_path_factory.mktemp("speculate") / "tiny.gguf")


@pytest.fixture(scope="module")
def llms(path):
    """Without drafts, and with drafts that are forced upon it, right and wrong ones."""
    plain, llm = LLM(path), LLM(path, speculate=7, max_num_seqs=3)
    known = {}

    def truth(s):
        key = tuple(s.prompt), s.params
        if key not in known:
            endless = replace(s.params, stop=(), stop_token_ids=(), ignore_eos=True)
            known[key] = [c.token_ids for c in plain.generate(s.prompt, endless)[0].outputs]
        return known[key][s.index]

    forced(llm.engine, truth=truth)
    return plain, llm


def same(llms, prompt, params):
    """The request's output, which is the same with drafts and without, however often it is asked for."""
    plain, llm = llms
    expected = plain.generate(prompt, params)[0]
    for _ in range(3):
        found = llm.generate(prompt, params)[0]
        assert found.outputs == expected.outputs
    assert "".join(llm.stream(prompt, replace(params, n=1))) == expected.text
    check(llm.engine.cache)
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.0},
        {"n": 3, "logprobs": 3},
        {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.1},
        {"min_new_tokens": 48, "temperature": 3.0},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"min_p": 0.05, "top_k": 0, "top_p": 1.0},
    ],
    ids=str,
)
def test_every_request(llms, fields):
    found = same(llms, TEXT, replace(PARAMS, **fields))
    assert bool(found.timing.accepted) == (found.params.max_new_tokens > 2)


def test_stop_strings_across_tokens(llms):
    text = llms[0].generate(TEXT, replace(PARAMS, ignore_eos=True))[0].text
    for start in range(0, len(text) - 3, 2):
        found = same(llms, TEXT, replace(PARAMS, ignore_eos=True, stop=(text[start : start + 3], "never")))
        assert found.finish_reason == "stop" and found.text == text[: text.find(text[start : start + 3])]


def test_an_end_of_sequence_within_a_draft(llms):
    ids = llms[0].generate(TEXT, replace(PARAMS, ignore_eos=True))[0].token_ids
    for end in range(12):
        found = same(llms, TEXT, replace(PARAMS, ignore_eos=True, stop_token_ids=(ids[end],)))
        assert found.finish_reason == "stop" and found.token_ids == ids[: ids.index(ids[end]) + 1]
    late = replace(PARAMS, ignore_eos=True, stop_token_ids=tuple(range(len(_tiny.TOKENS))), min_new_tokens=20)
    assert len(same(llms, TEXT, late).token_ids) == 21


def test_many_prompts(llms):
    plain, llm = llms
    prompts = [TEXT[: 3 + 7 * i] for i in range(12)]
    params = [replace(PARAMS, seed=i, max_new_tokens=10 + 3 * i, n=1 + (i == 4)) for i in range(12)]
    for found, expected in zip(llm.generate(prompts, params), plain.generate(prompts, params), strict=True):
        assert found.outputs == expected.outputs


def test_speculate_is_checked(path):
    for wrong in (-1, 64, True, 1.0, "7"):
        with pytest.raises(ValueError, match=r"speculate=.*; allowed: an integer in \[0, 63\]"):
            LLM(path, speculate=wrong)
    assert LLM(path).engine.sizes == (1, 2, 4, 8, 16) and LLM(path, speculate=20).engine.sizes[-1] == 21
