"""LLM: the contract through the public door, texts and stops, scoring, turns, and how it refuses."""

import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import _tiny
import numpy as np
import pytest
import torch
from _engine import Made

from fastllm import LLM, SamplingParams, hub, ops
from fastllm.data.tokenizer import Tokenizer
from fastllm.decode.cache import page_bytes, pages_for
from fastllm.models.decoder import Decoder
from fastllm.models.initial import initialise
from fastllm.models.weights import load

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=11, max_new_tokens=24, ignore_eos=True)
TEXT = "The theory of the rain in the other region."
FORMS = {  # how weights are stored, and held
    "float32": ("F32", {}),
    "int8": ("F32", {"quantize": "int8"}),
    "int4": ("F32", {"quantize": "int4"}),
    "Q4_1": ("Q4_1", {}),
    "Q8_0": ("Q8_0", {}),
    "Q8_0 as float32": ("Q8_0", {"dtype": "float32"}),
}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """files(kind) -> a tiny GGUF."""
    path = tmp_path_factory.mktemp("tiny")
    return cache(lambda kind="F32": _tiny.gguf(path / f"{kind}.gguf", kind))


@pytest.fixture(scope="session")
def llm(files):
    return LLM(files())


def outputs(request):
    return [(c.token_ids, c.logprobs, c.text) for c in request.outputs]


# ------------------------------------------------------------------------------------------------------------- contract


def check_contract(llm: LLM, prompt, params: SamplingParams, chunks) -> None:
    """Tokens and log-probabilities to the bit: any chunk, 1 and 2 threads, and one forward over all of the text."""
    expected = llm.generate(prompt, params)[0]
    engine, (chunk, threads) = llm.engine, (llm.engine.chunk, llm.engine.threads)
    try:
        for engine.chunk in chunks:
            engine.cache.forget()
            assert outputs(llm.generate(prompt, params)[0]) == outputs(expected), f"chunk {engine.chunk}"
            assert outputs(llm.generate(prompt, params)[0]) == outputs(expected), "from the prefix cache"
        for engine.threads in (1, 2):
            engine.cache.forget()
            assert outputs(llm.generate(prompt, params)[0]) == outputs(expected), f"{engine.threads} threads"
    finally:
        engine.chunk, engine.threads = chunk, threads
    ids = expected.prompt_token_ids + expected.token_ids
    assert llm.logprobs([ids])[0][len(expected.prompt_token_ids) - 1 :] == expected.logprobs
    assert all(math.isfinite(v) and v <= 0 for v in expected.logprobs)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("form", FORMS)
def test_contract(files, form, params):
    kind, arguments = FORMS[form]
    llm = LLM(files(kind), **arguments)
    check_contract(llm, TEXT * 3, params, (1, 7, 64, 512))
    check_contract(llm, TEXT * 16, params, (300, 64))  # some 550 tokens: 512 at once, and the rest


def test_contract_of_a_folder(tmp_path):
    check_contract(LLM(_tiny.folder(tmp_path / "model"), num_threads=1), TEXT, SAMPLED, (5,))


@cache
def real(**arguments) -> LLM:
    try:
        path = hub.resolve("smollm2-135m")
    except hub.HubError as error:
        pytest.skip(f"asset smollm2-135m: {error}")
    return LLM(path, **arguments)


@pytest.mark.parametrize("arguments", [{}, {"quantize": "int8"}, {"dtype": "float32"}], ids=str)
def test_contract_of_a_real_model(arguments):
    llm = real(**arguments)
    check_contract(
        llm, "Once upon a time, in a land far away, there was a", replace(SAMPLED, max_new_tokens=12), (1, 7)
    )
    out = llm.generate("The capital of France is", replace(GREEDY, max_new_tokens=3))[0]
    assert out.text.startswith(" Paris")


def test_seeds(llm):
    assert len({llm.generate(TEXT, replace(SAMPLED, seed=s))[0].text for s in (0, 1, 1, 2**63 - 1)}) == 3
    drawn = llm.generate(TEXT, replace(SAMPLED, seed=None))[0]
    assert drawn.text != llm.generate(TEXT, replace(SAMPLED, seed=None))[0].text
    assert drawn.text == llm.generate(TEXT, replace(SAMPLED, seed=drawn.seed))[0].text


def test_completions_of_one_prompt(llm):
    together = llm.generate(TEXT, replace(SAMPLED, n=3))[0]
    count = len(together.prompt_token_ids)
    assert together.timing.prompt_tokens + together.timing.cached == 3 * count
    assert [c.index for c in together.outputs] == [0, 1, 2] and together.text == together.outputs[0].text
    for completion in together.outputs:
        alone = Made(together.prompt_token_ids, SAMPLED, 24, completion.index, SAMPLED.seed)
        llm.engine.run([alone])
        assert alone.made == list(zip(completion.token_ids, completion.logprobs, strict=True))
    assert len({c.text for c in together.outputs}) == 3
    assert llm.generate(TEXT, SAMPLED)[0].text == together.text


# ----------------------------------------------------------------------------------------------------- prompts and text


def test_forms_of_a_prompt(llm):
    ids = llm.tokenizer.encode(TEXT)
    expected = llm.generate(TEXT, SAMPLED)[0]
    for prompt in (ids, tuple(ids), torch.tensor(ids), np.array(ids), [np.int64(i) for i in ids]):
        assert outputs(llm.generate(prompt, SAMPLED)[0]) == outputs(expected)
    other = replace(SAMPLED, seed=3)
    several = llm.generate([TEXT, ids, "rain"], [SAMPLED, other, SAMPLED])
    assert [r.text for r in several] == [
        llm.generate(p, s)[0].text for p, s in ((TEXT, SAMPLED), (ids, other), ("rain", SAMPLED))
    ]
    assert [r.prompt_token_ids for r in llm.generate(torch.tensor([[4, 5], [6, 7]]), SAMPLED)] == [[4, 5], [6, 7]]
    assert llm.logprobs(TEXT) == llm.logprobs([ids]) == llm.logprobs(iter([TEXT]))


def test_a_stream_adds_up(llm):
    for params in (GREEDY, SAMPLED, replace(SAMPLED, stop="e", max_new_tokens=200), replace(SAMPLED, ignore_eos=False)):
        pieces = list(llm.stream(TEXT, params))
        assert "".join(pieces) == llm.generate(TEXT, params)[0].text and all(pieces)


def test_stop_strings(llm):
    whole = llm.generate(TEXT, replace(SAMPLED, max_new_tokens=60))[0]
    text = whole.text
    for begin, end in ((0, 1), (7, 8), (10, 13), (20, 29), (1, len(text))):
        stop = text[begin:end]
        params = replace(SAMPLED, max_new_tokens=60, stop=("\x00 never", stop))
        out = llm.generate(TEXT, params)[0]
        assert out.text == text[: text.find(stop)] and out.finish_reason == "stop"
        assert out.token_ids == whole.token_ids[: len(out.token_ids)]
        shown = ""
        for piece in llm.stream(TEXT, params):
            shown += piece
            assert out.text.startswith(shown)
    # the beginning of a stop that does not come is held back, and given out later
    stop = text[10:14] + "\x00"
    params = replace(SAMPLED, max_new_tokens=60, stop=stop)
    shown = ""
    for piece in llm.stream(TEXT, params):
        shown += piece
        assert not any(shown.endswith(stop[:k]) for k in range(1, len(stop))) or shown == text
    assert shown == text and llm.generate(TEXT, params)[0].finish_reason == "length"
    # the earliest of several
    assert (
        llm.generate(TEXT, replace(params, stop=(text[30:34], text[12:15])))[0].text == text[: text.find(text[12:15])]
    )


def test_a_prompt_far_too_long_is_not_encoded(llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "encode", None)
    for call in (llm.generate, llm.perplexity):
        with pytest.raises(ValueError, match=r"at least \d+ tokens, the context holds 1024; shorten it, or raise"):
            call("the rain " * 10_000)


def test_min_new_tokens_delays_stop_strings(llm):
    """One that lies within so many tokens is text as any; one that ends behind them ends the completion."""
    params = replace(SAMPLED, max_new_tokens=60)
    whole = llm.generate(TEXT, params)[0]
    for count in (5, 20, 59):
        begin = len("".join(map(llm.tokenizer.stream().push, whole.token_ids[:count])))
        for stop in (
            whole.text[begin - 3 : begin],
            whole.text[begin - 1 : begin + 1],
            whole.text[2:4],
            "the",
            "e",
        ):
            ends = (i for i in range(len(whole.text)) if whole.text[i:].startswith(stop) and i + len(stop) > begin)
            found = next(ends, len(whole.text))
            out = llm.generate(TEXT, replace(params, min_new_tokens=count, stop=[stop, stop + "\0"]))[0]
            assert stop and out.text == whole.text[:found]
            assert out.finish_reason == ("stop" if found < len(whole.text) else "length")


@pytest.fixture(scope="module")
def sentences():
    """SentencePiece, whose decoder drops the space that begins a text."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "▁Paris", "▁is", "i", "s", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    metadata = {
        "model": "llama", "tokens": pieces, "scores": [-float(i) for i in range(len(pieces))],
        "token_type": [2, 3, 3, *[1] * 6, *[6] * 256], "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    }  # fmt: skip
    stored = SimpleNamespace(
        path="m.gguf", metadata={f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    )
    model = Decoder(replace(_tiny.CONFIG, vocab=len(pieces)))
    return LLM.of(initialise(model, seed=0), Tokenizer.from_gguf(stored), max_num_seqs=8)


def test_a_completion_continues_its_prompt(sentences):
    """The text of both together is the prompt's and the completion's."""
    decode, ids = sentences.tokenizer.decode, [1, 5]
    params = SamplingParams(max_new_tokens=3, ignore_eos=True, n=64, seed=2)
    made = [out for out in sentences.generate(ids, params)[0].outputs if out.token_ids[0] in (3, 4, 5)]
    assert made and all(out.text == decode(ids + out.token_ids).removeprefix("is") for out in made)
    assert all(out.text.startswith(" ") for out in made)
    stopped = sentences.generate(ids, replace(params, stop=[" ", "\0"]))[0].outputs[made[0].index]
    assert (stopped.text, stopped.finish_reason, len(stopped.token_ids)) == ("", "stop", 1)
    alone = sentences.generate([1], params)[0].outputs  # of a prompt without a text it is the beginning
    assert all(out.text == decode(out.token_ids) for out in alone)


def test_ends(llm):
    free = llm.generate(TEXT, replace(SAMPLED, max_new_tokens=60))[0]
    token = free.token_ids[9]
    first = free.token_ids.index(token)
    out = llm.generate(TEXT, replace(SAMPLED, stop_token_ids=[token]))[0]
    assert out.finish_reason == "stop" and out.token_ids == free.token_ids[: first + 1]
    assert out.text == llm.tokenizer.decode(out.token_ids[:-1]) and len(out.logprobs) == len(out.token_ids)
    later = llm.generate(TEXT, replace(SAMPLED, stop_token_ids=[token], min_new_tokens=first + 2, max_new_tokens=60))[0]
    assert len(later.token_ids) >= first + 3
    assert llm.generate(TEXT, replace(SAMPLED, max_new_tokens=1))[0].finish_reason == "length"


def test_end_of_sequence(llm, monkeypatch):
    free = llm.generate(TEXT, SAMPLED)[0]
    end = free.token_ids[5]
    monkeypatch.setattr(llm.tokenizer, "eos_ids", frozenset({end}))
    out = llm.generate(TEXT, replace(SAMPLED, ignore_eos=False))[0]
    assert out.finish_reason == "stop" and out.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert llm.generate(TEXT, SAMPLED)[0].token_ids == free.token_ids


def test_context_limit(files):
    llm = LLM(files(), max_model_len=48)
    ids = llm.tokenizer.encode(TEXT)[:20]
    out = llm.generate(ids, replace(GREEDY, max_new_tokens=1000))[0]
    assert len(out.token_ids) == 28 and out.finish_reason == "length"
    assert len(llm.generate(list(range(3, 50)), replace(GREEDY, max_new_tokens=9))[0].token_ids) == 1
    assert len(llm.logprobs([list(range(3, 51))])[0]) == 47  # scoring needs no room


def test_top_logprobs(llm):
    out = llm.generate(TEXT, replace(SAMPLED, logprobs=5))[0]
    assert out.token_ids == llm.generate(TEXT, SAMPLED)[0].token_ids
    for token, logprob, top in zip(out.token_ids, out.logprobs, out.top_logprobs, strict=True):
        assert len(top) == 5 and [v for _, v in top] == sorted((v for _, v in top), reverse=True)
        assert dict(top).get(token, logprob) == logprob and (token in dict(top) or logprob <= top[-1][1])
    assert llm.generate(TEXT, SAMPLED)[0].top_logprobs is None
    assert llm.generate(TEXT, replace(SAMPLED, logprobs=0))[0].top_logprobs == [[]] * 24


def test_chat(llm, files):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = llm.tokenizer.encode(rendered, parse_special=True)
    out = llm.chat(messages, SAMPLED)
    assert out.prompt_token_ids == ids and ids.count(1) == 3 and ids.count(2) == 2
    assert outputs(out) == outputs(llm.generate(ids, SAMPLED)[0])
    assert "".join(llm.chat(messages, SAMPLED, stream=True)) == out.text
    typed = llm.chat([{"role": "user", "content": "hello"}], replace(GREEDY, max_new_tokens=2))
    assert len(typed.token_ids) == 2


# ------------------------------------------------------------------------------------------------------------- scoring


def test_perplexity(llm, files):
    model = load(files())
    for text in (TEXT, "in a", [7, 9, 7, 9, 7]):
        ids = text if isinstance(text, list) else llm.tokenizer.encode(text)
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, :-1].double()
        exact = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
        assert llm.perplexity([text])[0] == pytest.approx(exact.mean().neg().exp().item(), rel=1e-4)
        assert llm.logprobs([text])[0] == pytest.approx(exact[:, 0].tolist(), abs=1e-4)
    assert llm.perplexity(TEXT) == llm.perplexity([TEXT])


def test_embed(llm, files):
    model = load(files())
    texts = [TEXT, "in", TEXT * 14]
    found = llm.embed(texts)
    assert found.shape == (3, _tiny.CONFIG.dim) and found.dtype == torch.float32 and not found.is_inference()
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            pooled = model.norm(model.hidden(torch.tensor([llm.tokenizer.encode(text)])))[0].double().mean(0)
        assert torch.allclose(vector.double(), pooled / pooled.norm(), atol=1e-5)


# ----------------------------------------------------------------------------------------------- a caller's environment


def surroundings():
    return (
        torch.get_rng_state().sum(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


@pytest.mark.parametrize("threads", [None, 1])
def test_nothing_of_the_callers_is_touched(files, threads):
    before = surroundings()
    llm = LLM(files(), num_threads=threads)
    for _ in llm.stream(TEXT, replace(SAMPLED, seed=None)):
        assert surroundings() == before
    llm.generate(TEXT, SAMPLED)
    llm.embed([TEXT]), llm.logprobs([TEXT])
    assert surroundings() == before and torch.ones(1, requires_grad=True).exp().requires_grad


def test_a_stream_that_is_left(llm):
    expected = [llm.generate(p, SAMPLED)[0].text for p in (TEXT, "in the rain")]
    left = llm.stream("in the rain", SAMPLED)
    shown = next(left)
    assert llm.generate(TEXT, SAMPLED)[0].text == expected[0]  # while it is held by nobody
    shown += "".join(left)
    assert shown == expected[1]  # and it goes on as if nothing had happened
    closed = llm.stream(TEXT, SAMPLED)
    next(closed)
    closed.close()
    request = llm.request(TEXT, SAMPLED)
    run = llm.run(request)
    next(run), next(run)
    run.close()
    assert request.finish_reason == "abort" and len(request.token_ids) == 2
    assert llm.generate(TEXT, SAMPLED)[0].text == expected[0]


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "the prompt is empty; give at least one token"),
        ([], ValueError, "the prompt is empty"),
        ([[]], ValueError, "the prompt is empty"),
        ([3, -1], ValueError, r"token id -1 at place 1 is outside the vocabulary \[0, 109\); encode the text with"),
        ([3, 109], ValueError, r"token id 109 at place 1 is outside"),
        ([2**70], ValueError, r"token id 1180591620717411303424 at place 0 is outside"),
        ([True, False], TypeError, r"a prompt is a str or a list of token ids \(integers\), got bool True"),
        ([[3, True]], TypeError, r"got list \[3, True\]"),
        ([3.0, 4.0], TypeError, "got float 3.0"),
        (torch.tensor([3.5]), TypeError, "got float 3.5"),
        (b"bytes", TypeError, "got bytes b'bytes'"),
        (5, TypeError, "got int 5"),
        (None, TypeError, "got NoneType None"),
        ({"prompt": "a"}, TypeError, "got dict"),
        ([["a"]], TypeError, r"got list \['a'\]"),
        (list(range(3, 100)) * 11, ValueError, "1067 tokens, the context holds 1024 with at least one .* shorten it"),
        ([3] * 1024, ValueError, "has 1024 tokens, the context holds 1024 with at least one to generate"),
        (["fine", ""], ValueError, "the prompt is empty"),
        ("\ud800", ValueError, "lone surrogate"),
    ],
)  # fmt: skip
def test_bad_prompts(llm, monkeypatch, prompt, error, message):
    monkeypatch.setattr(llm.engine, "submit", lambda sequences: pytest.fail("something was run"))
    with pytest.raises(error, match=message):
        llm.generate(prompt)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate("a", {"top_k": 5}), TypeError, "params is dict; give a SamplingParams"),
        (lambda m: m.generate(["a", "b"], [GREEDY]), ValueError, "2 prompts, but 1 SamplingParams; give one"),
        (lambda m: m.generate("a", SamplingParams(adapter="x")), ValueError, "adapter='x' is not loaded"),
        (lambda m: m.generate("a", SamplingParams(stop_token_ids=[109])), ValueError, r"109, outside .*\[0, 109\)"),
        (lambda m: m.generate("a", SamplingParams(top_p=2)), ValueError, r"top_p=2.0, allowed: a number in \[0, 1\]"),
        (lambda m: m.stream("a", SamplingParams(n=2)), ValueError, "n=2; a stream is one completion, use generate"),
        (lambda m: m.stream(""), ValueError, "the prompt is empty"),  # at the call, not at the first piece
        (lambda m: m.chat([]), ValueError, "messages is empty"),
        (lambda m: m.chat("Hi"), TypeError, "messages is a list of"),
        (lambda m: m.perplexity([[3]]), ValueError, "1 token; it takes at least two"),
        (lambda m: m.logprobs([[3] * 1025]), ValueError, "has 1025 tokens, the context holds 1024; shorten it"),
        (lambda m: m.embed([""]), ValueError, "the prompt is empty"),
    ],
)  # fmt: skip
def test_bad_calls(llm, call, error, message):
    with pytest.raises(error, match=message):
        call(llm)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "device='gpu'; allowed: 'auto', 'cpu', 'cuda'"),
        ({"dtype": "float16"}, "dtype='float16'; allowed: 'auto', 'float32'"),
        ({"quantize": "int2"}, "quantize='int2'; allowed: None, 'int8', 'int4'"),
        ({"quantize": "int8", "dtype": "float32"}, "exclude each other"),
        ({"max_model_len": 1025}, "max_model_len=1025, but the model has 1024 positions"),
        ({"max_model_len": 0}, "max_model_len=0; allowed: an integer of at least 1"),
        ({"num_threads": True}, "num_threads=True; allowed"),
        ({"exact": 1}, "exact=1; allowed: True, False"),
        ({"max_num_seqs": 2.5}, "max_num_seqs=2.5; allowed"),
        ({"kv_bytes": 2e9}, "kv_bytes=2000000000.0; allowed: an integer of at least 1"),
        ({"kv_bytes": 100_000}, "1024 tokens need 524288 bytes of KV cache, kv_bytes=100000 allows 192 tokens; lower"),
        ({"revision": "main"}, "revision='main' applies to Hub ids"),
    ],
)
def test_bad_arguments(files, arguments, message):
    with pytest.raises(ValueError, match=message):
        LLM(files(), **arguments)


def test_bad_files(files, tmp_path):
    with pytest.raises(ValueError, match="unknown model 'smolm2-135m': did you mean 'smollm2-135m'"):
        LLM("smolm2-135m")
    with pytest.raises(FileNotFoundError, match="no such model file"):
        LLM(tmp_path / "absent.gguf")
    with pytest.raises(ValueError, match="holds no tokenizer; supported: gpt2, llama"):
        LLM(_tiny.gguf(tmp_path / "mute.gguf", tokenizer=False))
    whole = files().read_bytes()
    for share in (0.0001, 0.1, 0.9):
        cut = tmp_path / f"{share}.gguf"
        cut.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=f"{cut}: .*(shorter|truncated|past the end|end of the file|can hold)"):
            LLM(cut)
    with pytest.raises(ValueError, match="stored as Q4_1: .* leave quantize out"):
        LLM(files("Q4_1"), quantize="int4")
    few = np.ones((50, 64), np.float32)
    small = _tiny.gguf(tmp_path / "small.gguf", token_embd=few, output=few)
    with pytest.raises(ValueError, match="the tokenizer has 109 ids, the model 50"):
        LLM(small)


@pytest.mark.parametrize("form", ["float32", "int8", "int4"])
@pytest.mark.parametrize("tensor", ["token_embd", "output", "output_norm", "blk.0.attn_norm", "blk.1.ffn_down"])
def test_weights_that_are_no_numbers(tmp_path, form, tensor):
    """One NaN, and what depends on it says so; what does not is served, also by a cache full of NaNs."""
    values = _tiny.weights()[tensor]
    values[(5, 3)[: values.ndim]] = np.nan
    kind, arguments = FORMS[form]
    try:
        llm = LLM(_tiny.gguf(tmp_path / "nan.gguf", kind, **{tensor: values}), **arguments)
    except ValueError as error:  # a quantised weight need not be able to hold it
        assert "NaN" in str(error)
        return
    for _ in range(2):
        with pytest.raises(ops.LogitsError, match="hold a NaN .* look for an overflow in the model"):
            llm.generate([5] * 40, GREEDY)
    if tensor == "token_embd":
        clean = LLM(_tiny.gguf(tmp_path / "clean.gguf", kind), **arguments)
        assert llm.generate([7, 8], replace(GREEDY, max_new_tokens=1))[0].token_ids
        assert llm.logprobs([[7, 8, 9]]) == clean.logprobs([[7, 8, 9]])


# --------------------------------------------------------------------------------------------------------------- memory

MEMORY = """
import torch
def now(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
base = now("VmRSS")
from fastllm import LLM, SamplingParams
llm = LLM("smollm2-135m")
llm.generate("The capital of France is", SamplingParams(max_new_tokens=20, temperature=0.0, ignore_eos=True))
print(now("VmHWM") - base, llm.model.arena.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory():
    """Weights, the cache of 25 tokens, and no more than 150 MB for libraries, tokenizer and all else."""
    config = real().model.config
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    peak, weights = map(int, done.stdout.split())
    assert peak <= weights + pages_for(25) * page_bytes(config) + 150e6, f"{peak / 1e6:.0f} MB"
