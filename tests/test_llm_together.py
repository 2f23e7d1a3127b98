"""LLM, many requests at once: prompts together, streams and calls of several threads, streams that are left, the cache."""

import gc
import subprocess
import sys
import threading
from dataclasses import replace

import _tiny
import numpy as np
import pytest
import torch
from _paged import check

from fastllm import LLM, SamplingParams, hub, ops
from fastllm.decode.cache import page_bytes

SAMPLED = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=11, max_new_tokens=24, ignore_eos=True)
TEXT = "The theory of the rain in the other region."


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    return _tiny.gguf(tmp_path_factory.mktemp("together") / "tiny.gguf")


@pytest.fixture(scope="session")
def llm(path):
    return LLM(path)


def outputs(request):
    return [(c.token_ids, c.logprobs, c.text) for c in request.outputs]


def test_a_stream_that_is_dropped_gives_back_its_pages(llm):
    streams = [llm.stream(TEXT, replace(SAMPLED, max_new_tokens=300, seed=i)) for i in range(5)]
    for stream in streams:
        next(stream)
    del streams, stream
    gc.collect()
    check(llm.engine.cache)
    assert not llm.engine.scheduler.running


SUSPENDED = """
import sys, threading, time
from fastllm import LLM, SamplingParams
llm, params = LLM(sys.argv[1]), SamplingParams(max_new_tokens=900, ignore_eos=True)
one, other = llm.stream("on the", params), llm.stream("in the", params)
next(one), next(other)
many = llm.run(llm.request("on the", SamplingParams(max_new_tokens=900, ignore_eos=True, n=200)))
threading.Thread(target=lambda: [*many], daemon=True).start()
while not all(s.tokens for s in llm.engine.scheduler.running) or len(llm.engine.scheduler.running) < 16:
    time.sleep(0.01)
print("here")
"""


def test_a_process_that_ends_with_suspended_streams_and_a_daemon(path):
    """Python ends a daemon's thread as it comes back from a step."""
    run = subprocess.run([sys.executable, "-c", SUSPENDED, path], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout, run.stderr) == (0, "here\n", "")


def test_a_model_that_is_made_in_inference_mode(path, llm):
    with torch.inference_mode():
        made = LLM(path)
    params = replace(SAMPLED, max_new_tokens=60)
    one, other = (made.run(made.request(text, params)) for text in (TEXT, "the rain"))
    first = next(one), next(other)
    one.close()  # whose row the other takes
    assert first[1] + "".join(other) == llm.generate("the rain", params)[0].text
    check(made.engine.cache)


def test_many_prompts_run_together(llm):
    """More than there are rows; each as if it were alone."""
    prompts = [TEXT[: 3 + 2 * i] for i in range(20)] + [TEXT * 3] * 2
    params = [replace(SAMPLED, seed=i, max_new_tokens=10 + i, n=1 + (i == 4)) for i in range(22)]
    together = llm.generate(prompts, params)
    assert [r.prompt_token_ids for r in together] == [llm.tokenizer.encode(p) for p in prompts]
    llm.engine.cache.forget()
    for request, prompt, each in zip(together, prompts, params, strict=True):
        assert outputs(request) == outputs(llm.generate(prompt, each)[0])
    check(llm.engine.cache)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("kind", ["F32", "Q4_1", "Q8_0"])
def test_every_form_of_weights(tmp_path, kind, quantize):
    if quantize and kind != "F32":
        pytest.skip("stored in few bits already")
    llm = LLM(_tiny.gguf(tmp_path / "tiny.gguf", kind), quantize=quantize, max_num_seqs=7)
    prompts = [TEXT[i : 5 * i + 9] for i in range(9)]
    alone = [outputs(llm.generate(p, SAMPLED)[0]) for p in prompts]
    for llm.engine.chunk in (512, 7):
        llm.engine.cache.forget()
        assert [outputs(r) for r in llm.generate(prompts, SAMPLED)] == alone


def test_a_request_that_fails_among_others(tmp_path):
    values = _tiny.weights()["token_embd"]
    values[5] = np.nan
    llm = LLM(_tiny.gguf(tmp_path / "nan.gguf", token_embd=values))
    params = SamplingParams(temperature=0.0, max_new_tokens=1)
    with pytest.raises(ops.LogitsError) as caught:
        llm.generate([[7, 8], [5, 9], [9, 11]], params)
    good, bad, other = caught.value.outputs
    assert (good.finish_reason, bad.finish_reason, other.finish_reason) == ("length", "abort", "length")
    assert good.token_ids == llm.generate([7, 8], params)[0].token_ids and bad.token_ids == []
    with pytest.raises(ops.LogitsError):
        list(llm.stream([5, 9], params))
    check(llm.engine.cache)


def test_threads(llm):
    """Streams and calls of several threads run in one batch, some streams are left, and every text is as it should be."""
    prompts = [TEXT, "in the rain", TEXT * 3, "on"]
    expected = [llm.generate(p, SAMPLED)[0].text for p in prompts]
    scores, found, most = llm.logprobs(prompts), {}, []
    step = llm.engine.step

    def watched():
        most.append(len(llm.engine.scheduler.running))
        step()

    def work(turn: int) -> None:
        ready.wait()
        order = prompts[turn % 4 :] + prompts[: turn % 4]
        texts = [r.text for r in llm.generate(order, SAMPLED)]
        for prompt in order:
            left = llm.stream(prompt, replace(SAMPLED, max_new_tokens=500))
            next(left)
            texts.append("".join(llm.stream(prompt, SAMPLED)))
            if turn % 2:
                left.close()
        found[turn] = dict(zip(order * 2, texts, strict=True)), texts[:4] == texts[4:], llm.logprobs(order[0])

    ready = threading.Barrier(6)
    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    llm.engine.step = watched
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
    finally:
        del llm.engine.step
    for turn in range(6):
        texts, same, scored = found[turn]
        assert same and texts == dict(zip(prompts, expected, strict=True)) and scored == [scores[turn % 4]]
    assert max(most) == 16  # as many as there are rows
    gc.collect()
    check(llm.engine.cache)


def test_a_stream_whose_consumer_fails(llm):
    with pytest.raises(ZeroDivisionError):
        for _ in llm.stream(TEXT, replace(SAMPLED, max_new_tokens=500)):
            1 / 0  # noqa: B018
    gc.collect()
    assert not llm.engine.scheduler.running
    check(llm.engine.cache)


def test_how_large_the_cache_is(path, monkeypatch):
    size = page_bytes(_tiny.CONFIG)
    for arguments, pages in (
        ({}, 16 * 64),  # all that may run at once
        ({"max_num_seqs": 2, "max_model_len": 40}, 2 * 3),
        ({"kv_bytes": 64 * size}, 64),
        ({"kv_bytes": 100 * size - 1}, 99),
        ({"kv_bytes": 5000 * size}, 5000),  # more than can run: more that is known
    ):
        assert LLM(path, **arguments).engine.cache.pages == pages, arguments
    monkeypatch.setattr("fastllm.decode.limits.KV_BYTES", 100 * size)
    assert LLM(path, max_model_len=160).engine.cache.pages == 100
    assert LLM(path).engine.cache.pages == 100
    assert LLM(path, max_model_len=1024 - 7).engine.cache.pages == 100
    monkeypatch.setattr("fastllm.decode.limits.KV_BYTES", 10 * size)
    assert LLM(path).engine.cache.pages == 64  # one of the longest, whatever the default


def test_real_requests_together():
    """16 of a real model, with and without the prefix cache, one and two threads: the bits of each alone."""
    try:
        llm = LLM(hub.resolve("smollm2-135m"))
    except hub.HubError as error:
        pytest.skip(f"asset smollm2-135m: {error}")
    prompts = [f"{start} {'in a land far away, ' * n}there was" for start in ("Once,", "Now,") for n in range(1, 9)]
    params = [replace(SAMPLED, seed=i, max_new_tokens=6 + i) for i in range(16)]
    alone = []
    for prompt, each in zip(prompts, params, strict=True):
        llm.engine.cache.forget()
        alone.append(outputs(llm.generate(prompt, each)[0]))
    engine, threads = llm.engine, llm.engine.threads
    try:
        for engine.threads in (1, 2):
            engine.cache.forget()
            for _ in range(2):
                assert [outputs(r) for r in llm.generate(prompts, params)] == alone
    finally:
        engine.threads = threads
    check(engine.cache)


def test_ids_of_a_padded_vocabulary_have_no_text(tmp_path):
    """Qwen's tables are padded: a drawn id past the tokenizer's is a token like others, and ends nothing."""
    config = replace(_tiny.CONFIG, vocab=len(_tiny.TOKENS) + 64)
    padded = LLM(_tiny.gguf(tmp_path / "padded.gguf", config=config))
    params = SamplingParams(temperature=5.0, seed=3, max_new_tokens=40, ignore_eos=True)
    out = padded.generate("the rain", params)[0]
    named = [token for token in out.token_ids if token < len(_tiny.TOKENS)]
    assert len(named) < len(out.token_ids) == 40
    assert out.text == padded.tokenizer.decode(named)
