"""A quantised KV cache: within it a request has the same bits whatever stands beside it, and text and scores stay close."""

from dataclasses import replace
from functools import cache

import _tiny
import pytest
import torch
from _assets import asset
from _engine import GREEDY, PROMPT, SAMPLED, Made, engine, mixed, steps
from _paged import check

from fastllm import LLM, SamplingParams
from fastllm.decode.cache import KVCache, page_bytes
from fastllm.decode.limits import KV_DTYPES, Limits

KINDS = pytest.mark.parametrize("kind", ["int8", "fp8"])


def quantised(kind: str, **fields):
    return engine(kv_dtype=KV_DTYPES[kind], **fields)


@KINDS
def test_sizes_and_places(kind):
    config, pages, dtype = _tiny.CONFIG, 5, KV_DTYPES[kind]
    pool = KVCache(config, pages, dtype=dtype)
    parts = [part for layer in pool.layers for part in layer]
    assert sum(t.nbytes for t in parts) == pages * page_bytes(config, dtype) < pages * page_bytes(config) / 2
    for i, part in enumerate(parts):  # none lies on another
        part.fill_(i + 1)
    assert all((part == i + 1).all() for i, part in enumerate(parts))
    pool.layers[1].scales[2] = 7.0
    pool.copy(2, 4)
    assert all((part[2] == part[4]).all() for part in parts) and (pool.layers[1].scales[4] == 7).all()


@KINDS
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [1, 17, 300])
def test_pieces_threads_and_known_prefixes_change_no_bit(params, length, kind):
    prompt = PROMPT[:length]
    expected = steps(quantised(kind, prefix_cache=False), prompt, params)
    for chunk in (7, 64):
        assert steps(quantised(kind, chunk=chunk), prompt, params) == expected, chunk
    for threads in (1, 2):
        e = quantised(kind, threads=threads)
        assert steps(e, prompt, params) == expected == steps(e, prompt, params), threads
    (scores,) = quantised(kind).score([[*prompt, *(token for token, _ in expected)]])
    assert scores[length - 1 :].tolist() == [logprob for _, logprob in expected]


@KINDS
def test_neighbours_change_no_bit(kind):
    e, lone, requests = quantised(kind), quantised(kind, max_num_seqs=1, prefix_cache=False), mixed()
    e.run(requests)
    for s in requests:
        again = Made(s.prompt, s.params, s.room, s.index, s.seed)
        lone.run([again])
        assert s.made == again.made
    check(e.cache)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.03), ("fp8", 0.12)])
def test_scores_stay_close(kind, bound):
    (exact,), (close,) = engine().score([PROMPT]), quantised(kind).score([PROMPT])
    difference = (exact - close).abs()
    assert 0 < difference.mean() < bound and difference.max() < 10 * bound


@KINDS
def test_arguments(tmp_path, kind):
    path = _tiny.folder(tmp_path / "model")
    with pytest.raises(ValueError, match="kv_dtype='int4'; allowed: 'auto', 'int8', 'fp8'"):
        LLM(path, kv_dtype="int4")
    with pytest.raises(
        ValueError, match=f"kv_dtype='{kind}' takes heads of a multiple of 16.* have 24; allowed: 'auto'"
    ):
        Limits(kv_dtype=kind).pages(replace(_tiny.CONFIG, head_dim=24), KV_DTYPES[kind], torch.device("cpu"))
    one = page_bytes(_tiny.CONFIG, KV_DTYPES[kind])
    assert LLM(path, kv_dtype=kind, kv_bytes=64 * one).engine.cache.pages == 64


@cache
def real(kv_dtype: str) -> LLM:
    path = asset()
    return LLM(path, kv_dtype=kv_dtype)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("fp8", 0.05)])
def test_a_real_model(kind, bound):
    """Keys and values of 8 bits with a scale a head cost little: the perplexity of what it writes, and what it writes."""
    out = real(kind).generate("The capital of France is", SamplingParams(max_new_tokens=24, temperature=0.0))[0]
    assert out.text.startswith(" Paris")
    ids = out.prompt_token_ids + out.token_ids
    assert real(kind).perplexity([ids])[0] == pytest.approx(real("auto").perplexity([ids])[0], rel=bound)
