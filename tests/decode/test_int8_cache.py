"""A KV cache of int8: within it a request has the same bits whatever stands beside it, and text and scores stay close."""

from functools import cache

import _tiny
import pytest
import torch
from _assets import asset
from _engine import GREEDY, PROMPT, SAMPLED, Made, engine, mixed, steps
from _paged import check

from fastllm import LLM, SamplingParams
from fastllm.decode.cache import KVCache, page_bytes

INT8 = {"kv_dtype": torch.int8}


def test_sizes_and_places():
    config, pages = _tiny.CONFIG, 5
    pool = KVCache(config, pages, dtype=torch.int8)
    parts = [part for layer in pool.layers for part in layer]
    assert sum(t.nbytes for t in parts) == pages * page_bytes(config, torch.int8) < pages * page_bytes(config) / 2
    for i, part in enumerate(parts):  # none lies on another
        part.fill_(i + 1)
    assert all((part == i + 1).all() for i, part in enumerate(parts))
    pool.layers[1].scales[2] = 7.0
    pool.copy(2, 4)
    assert all(torch.equal(part[2], part[4]) for part in parts) and (pool.layers[1].scales[4] == 7).all()


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [1, 17, 300])
def test_pieces_threads_and_known_prefixes_change_no_bit(params, length):
    prompt = PROMPT[:length]
    expected = steps(engine(prefix_cache=False, **INT8), prompt, params)
    for chunk in (7, 64):
        assert steps(engine(chunk=chunk, **INT8), prompt, params) == expected, chunk
    for threads in (1, 2):
        e = engine(threads=threads, **INT8)
        assert steps(e, prompt, params) == expected == steps(e, prompt, params), threads
    (scores,) = engine(**INT8).score([[*prompt, *(token for token, _ in expected)]])
    assert scores[length - 1 :].tolist() == [logprob for _, logprob in expected]


def test_neighbours_change_no_bit():
    e, lone, requests = engine(**INT8), engine(max_num_seqs=1, prefix_cache=False, **INT8), mixed()
    e.run(requests)
    for s in requests:
        again = Made(s.prompt, s.params, s.room, s.index, s.seed)
        lone.run([again])
        assert s.made == again.made
    check(e.cache)


def test_scores_stay_close():
    (exact,), (close,) = engine().score([PROMPT]), engine(**INT8).score([PROMPT])
    difference = (exact - close).abs()
    assert 0 < difference.mean() < 0.03 and difference.max() < 0.3


def test_arguments(tmp_path):
    path = _tiny.folder(tmp_path / "model")
    with pytest.raises(ValueError, match="kv_dtype='fp8'; allowed: 'auto', 'int8'"):
        LLM(path, kv_dtype="fp8")
    one = page_bytes(_tiny.CONFIG, torch.int8)
    assert LLM(path, kv_dtype="int8", kv_bytes=64 * one).engine.cache.pages == 64


@cache
def real(kv_dtype: str) -> LLM:
    path = asset()
    return LLM(path, kv_dtype=kv_dtype)


def test_a_real_model():
    """Keys and values of 8 bits with a scale a head cost little: the perplexity of what it writes, and what it writes."""
    out = real("int8").generate("The capital of France is", SamplingParams(max_new_tokens=24, temperature=0.0))[0]
    assert out.text.startswith(" Paris")
    ids = out.prompt_token_ids + out.token_ids
    assert real("int8").perplexity([ids])[0] == pytest.approx(real("auto").perplexity([ids])[0], rel=0.02)
