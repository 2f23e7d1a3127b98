"""The engine: the contract over chunks, threads and cache contents; interrupted generations; what a step costs."""

import time
from dataclasses import replace

import _tiny
import pytest
import torch

from fastllm import SamplingParams, ops
from fastllm.decode.cache import SequenceCache
from fastllm.decode.engine import Engine, Timing

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=5)
PENALISED = replace(SAMPLED, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, min_new_tokens=8)
PROMPT = torch.randint(3, len(_tiny.TOKENS), (600,), generator=torch.Generator().manual_seed(1)).tolist()


def engine(**fields) -> Engine:
    torch.manual_seed(0)
    return Engine(_tiny.decoder(), **{"capacity": 700, "eos_ids": frozenset({0, 2})} | fields)


def steps(engine: Engine, prompt, params=GREEDY, count=24, index=0, timing=None) -> list[tuple[int, float]]:
    generation = engine.generate(prompt, params, index, 5, timing or Timing())
    return [(s.token, s.logprob) for _, s in zip(range(count), generation, strict=False)]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 257, 600])
def test_chunks_and_threads_change_no_bit(params, length):
    prompt = PROMPT[:length]
    expected = steps(engine(), prompt, params)
    for chunk in (1, 7, 64, 512):
        if length <= 64 or chunk >= 7:
            assert steps(engine(chunk=chunk), prompt, params) == expected, chunk
    for threads in (1, 2):
        assert steps(engine(threads=threads), prompt, params) == expected, threads


@pytest.mark.parametrize("chunk", [7, 64, 512])
def test_scores_are_what_decoding_reports(chunk):
    e = engine(chunk=chunk)
    made = steps(e, PROMPT[:100], SAMPLED, 60)
    scores = e.score(PROMPT[:100] + [token for token, _ in made])
    assert len(scores) == 159 and scores[99:].tolist() == [logprob for _, logprob in made]


def test_one_token_has_no_score():
    assert engine().score([4]).shape == (0,)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_the_cache_held_before_does_not_matter(value):
    e = engine()
    expected = [steps(e, PROMPT[:n], SAMPLED) for n in (3, 20, 260)]
    for n, made in zip((3, 20, 260), expected, strict=True):
        for k, v in e.cache.pages:
            k.fill_(value)
            v.fill_(value)
        assert steps(e, PROMPT[:n], SAMPLED) == made


@pytest.mark.parametrize("params", [GREEDY, PENALISED], ids=["greedy", "penalised"])
def test_generations_that_take_turns(params):
    """Each finds the engine as another one left it, reads its tokens in again, and goes on with the same bits."""
    e, prompts = engine(), [PROMPT[:5], PROMPT[5:40], PROMPT[:5]]
    expected = [steps(e, p, params, 12, index=i) for i, p in enumerate(prompts)]
    timings = [Timing() for _ in prompts]
    generations = [e.generate(p, params, i, 5, t) for i, (p, t) in enumerate(zip(prompts, timings, strict=True))]
    made = [[], [], []]
    for turn in (0, 1, 0, 0, 2, 1, 1, 1, 0, 2, 2, 1, 0, 0, 0, 1, 2):
        step = next(generations[turn])
        made[turn].append((step.token, step.logprob))
        if turn == 1:
            e.score(PROMPT[:3])
    assert made == [m[: len(n)] for m, n in zip(expected, made, strict=True)]
    assert timings[2].prompt_tokens == 5 + 6 + 8  # read in at the start, and when it came back with 1 and with 3 tokens


def test_a_prompt_is_read_once_for_all_its_completions(monkeypatch):
    e, read, prompt = engine(), [], PROMPT[:40]
    prefill = Engine.prefill
    monkeypatch.setattr(Engine, "prefill", lambda self, ids: read.append(len(ids)) or prefill(self, ids))
    timing = Timing()
    together = [steps(e, prompt, SAMPLED, 10, index, timing) for index in range(3)]
    assert read == [40] and timing.prompt_tokens == 40
    assert together == [steps(engine(), list(prompt), SAMPLED, 10, index) for index in range(3)]
    assert len({tuple(t for t, _ in made) for made in together}) == 3
    steps(e, list(prompt), SAMPLED, 1)  # the same ids of another request: nothing is kept between requests
    assert read.count(40) == 5


def test_min_new_tokens_keeps_the_end_out():
    e = engine(eos_ids=frozenset(range(3, 40)))
    never = [t for t, _ in steps(e, PROMPT[:4], replace(SAMPLED, min_new_tokens=40), 40)]
    assert not e.eos_ids & set(never)
    assert e.eos_ids & {t for t, _ in steps(e, PROMPT[:4], SAMPLED, 40)}


def test_top_logprobs_are_those_of_the_tokens():
    generation = engine().generate(PROMPT[:9], replace(GREEDY, logprobs=5), 0, 0, Timing())
    for _, step in zip(range(5), generation, strict=False):
        assert len(step.top) == 5 and step.top[0] == (step.token, step.logprob)
        assert [v for _, v in step.top] == sorted((v for _, v in step.top), reverse=True)
    top = next(engine().generate([3], replace(GREEDY, logprobs=20), 0, 0, Timing())).top
    assert len({t for t, _ in top}) == 20 and all(0 <= t < len(_tiny.TOKENS) for t, _ in top)


def test_not_a_number_ends_one_generation_only():
    e = engine()
    clean = steps(e, PROMPT[:6], count=30)
    token = clean[10][0]  # poisoned as an input: the replay that reads it finds no distribution
    first = next(i for i, (t, _) in enumerate(clean) if t == token)
    panels = e.model.embedding.weight.data
    good = panels[token // 16, :, token % 16].clone()
    panels[token // 16, :, token % 16] = torch.nan
    generation, made = e.generate(PROMPT[:6], GREEDY, 0, 0, Timing()), []
    with pytest.raises(ops.LogitsError, match="hold a NaN"):
        for step in generation:
            made.append((step.token, step.logprob))
    assert made == clean[: first + 1]
    panels[token // 16, :, token % 16] = good
    assert steps(e, PROMPT[:6], count=30) == clean


def test_a_full_context():
    e = engine(capacity=32)
    made = steps(e, PROMPT[:20], count=100)  # to the last place of the last page
    assert made == steps(engine(), PROMPT[:20], count=12)


def test_the_cache_takes_memory_as_it_fills():
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096  # noqa: E731, SIM115
    try:
        before = resident()
    except OSError:
        pytest.skip("needs /proc")
    config = replace(_tiny.CONFIG, max_position=1 << 16, layers=16)
    nbytes = SequenceCache.nbytes_for(config, 1 << 16)
    cache = SequenceCache(config, 1 << 16)
    assert nbytes > 200e6 and resident() - before < 20e6
    assert sum(k.nbytes + v.nbytes for k, v in cache.pages) == nbytes
    assert all(not k[0].any() and not v[-1].any() for k, v in cache.pages)


def step_seconds(e: Engine, enough: float, patience: float = 20.0) -> float:
    """The fastest of many decode steps, as `generate` yields them; stops when one is fast enough."""
    best, end = float("inf"), time.perf_counter() + patience
    while best > enough and time.perf_counter() < end:
        generation = e.generate([3, 4, 5], SAMPLED, 0, 0, Timing())
        next(generation), next(generation)
        for _ in range(300):
            begin = time.perf_counter()
            next(generation)
            best = min(best, time.perf_counter() - begin)
    return best


def test_overhead_of_a_step():
    """30 layers with hardly any weights: what is left is the engine, 183 kernels and their barriers."""
    config = replace(_tiny.CONFIG, layers=30, dim=16, ffn=16, heads=1, kv_heads=1, head_dim=16)
    e = Engine(_tiny.decoder(config), 400, frozenset({0}))
    assert step_seconds(e, enough=0.4e-3) <= 0.4e-3
