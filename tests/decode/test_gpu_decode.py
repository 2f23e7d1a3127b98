"""Decoding on an NVIDIA GPU: captured steps, many requests, and the CPU's answers."""

from dataclasses import replace

import _lora
import _tiny
import pytest
import torch
from _engine import KINDS, PROMPT, Made
from _exact import check_exact_adapters, check_exact_model

from fastllm import LLM, SamplingParams
from fastllm.decode.engine import Engine
from fastllm.models.weights import load_packed, to_device
from fastllm.ops._op import OPS

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)


def engine(path, dtype=torch.float32, quantize=None, **fields) -> Engine:
    model = to_device(load_packed(path, quantize), "cuda", dtype)
    kv_dtype = model.norm.weight.dtype
    return Engine(model, **{"capacity": 700, "eos_ids": frozenset(), "kv_dtype": kv_dtype, "max_num_seqs": 4} | fields)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return _tiny.gguf(tmp_path_factory.mktemp("gpu") / "tiny.gguf")


def close(ours, theirs, tolerance):
    """The tokens' log-probabilities up to where the drawn tokens part, if they do."""
    for (token, logprob), (other, wanted) in zip(ours, theirs, strict=True):
        if token != other:
            return
        assert logprob == pytest.approx(wanted, abs=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("quantize", "tolerance"), [(None, 1e-3), ("int8", 1e-3)])
def test_the_cpu_s_answer(path, kind, quantize, tolerance):
    ours, theirs = Made(PROMPT[:70], KINDS[kind]), Made(PROMPT[:70], KINDS[kind])
    engine(path, quantize=quantize).run([ours])
    Engine(load_packed(path, quantize), 700, frozenset(), max_num_seqs=1).run([theirs])
    assert len(ours.made) == len(theirs.made) == 24
    assert ours.made[0][1] == pytest.approx(theirs.made[0][1], abs=tolerance)
    close(ours.made, theirs.made, tolerance)


def test_replay_is_the_step(path):
    """A captured step and the same step run by the launchers: the same tokens, by the same draws."""
    sequences = [[Made(PROMPT[: 30 + i], KINDS["sampled"], seed=i) for i in range(3)] for _ in range(2)]
    e = engine(path, torch.bfloat16)
    e.run(sequences[0])  # captures, then replays
    e.run(sequences[1])  # replays alone
    assert [s.made for s in sequences[0]] == [s.made for s in sequences[1]]


def test_steps_that_are_launched_ahead(path):
    """Rows that come, leave early and are penalised: what a step at a time gives them."""
    made = []
    for ahead in (True, False):
        e = engine(path)
        assert e.goes_ahead
        e.goes_ahead = ahead
        kinds = [KINDS[kind] for kind in KINDS]
        sequences = [
            Made(PROMPT[i : i + 9 * i + 1], kinds[i % len(kinds)], 40, seed=i, stop=7 + 5 * i if i % 2 else None)
            for i in range(9)
        ]
        e.run(sequences)
        assert [len(s.made) for s in sequences] == [min(s.stop or 40, 40) for s in sequences]
        made.append([s.made for s in sequences])
    for ours, theirs in zip(*made, strict=True):
        assert ours[0][1] == pytest.approx(theirs[0][1], abs=1e-3)
        close(ours, theirs, 1e-3)


def test_prompts_are_read_in_captured_forwards(path):
    e, plain = engine(path), engine(path)
    plain.reader.captures = False
    for lengths in ((20, 1, 40), (90,), (300, 7, 12, 33)):  # several in one forward; in several
        made = []
        for one in (e, plain):
            sequences = [Made(PROMPT[i : i + n], KINDS["sampled"], seed=i) for i, n in enumerate(lengths)]
            one.run(sequences)
            made.append([s.made for s in sequences])
        for ours, theirs in zip(*made, strict=True):
            assert ours[0][1] == pytest.approx(theirs[0][1], abs=1e-3)
            close(ours, theirs, 1e-3)
    assert e.reader._plans and all(e.reader._plans.values()) and not plain.reader._plans


def test_linears_of_few_rows(path):
    """In one kernel each, with norms and residuals: as close to float32 as those of cuBLAS."""
    op, made = OPS["linear"], []
    for dtype, cuda in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        with op.using("cuda", op.gpu_kernel(cuda, "a test")):
            e = engine(path, dtype)
            sequences = [Made(PROMPT[i : i + n], count=8) for i, n in enumerate((9, 40, 1))]
            e.run(sequences)
            made.append([s.made for s in sequences])
    for wanted, others, ours in zip(*made, strict=True):
        assert ours[0][1] == pytest.approx(wanted[0][1], abs=0.05 + 2 * abs(others[0][1] - wanted[0][1]))
        close(ours, wanted, 0.15)


def test_rows_come_and_go(path):
    sequences = [Made(PROMPT[: 5 + 37 * i], KINDS["penalised"], count=5 + 7 * i, seed=i) for i in range(9)]
    engine(path, torch.bfloat16, max_num_seqs=3).run(sequences)
    assert [len(s.made) for s in sequences] == [5 + 7 * i for i in range(9)]
    assert all(logprob <= 0 for s in sequences for _, logprob in s.made)


def test_a_nan_fails_its_request_alone(path):
    e = engine(path)
    with torch.no_grad():
        e.model.embedding.weight[7].fill_(float("nan"))
    bad, good = Made([7] * 5), Made([9] * 5)
    with pytest.raises(ValueError, match="hold a NaN"):
        e.run([bad, good])
    assert len(good.made) == 24


def test_speculation_gives_the_same_tokens(path):
    loop = PROMPT[:12] * 6
    plain, guessed = Made(loop, count=40), Made(loop, count=40)
    engine(path).run([plain])
    engine(path, speculate=7).run([guessed])
    assert len(guessed.made) == 40 and guessed.made[0][1] == pytest.approx(plain.made[0][1], abs=1e-3)
    close(guessed.made, plain.made, 1e-3)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
def test_llm(path, kv_dtype):
    llm = LLM(path, device="cuda", kv_dtype=kv_dtype, max_model_len=256)
    assert llm.model.norm.weight.dtype == torch.bfloat16 and llm.engine.device.type == "cuda"
    out = llm.generate(["the in", [5, 6, 7]], GREEDY)
    assert all(len(o.token_ids) == 12 for o in out)
    scored = llm.logprobs([[5, 6, 7, *out[1].token_ids]], starts=3)[0]
    assert scored == pytest.approx(out[1].logprobs, abs=0.15)
    assert min(llm.perplexity([[5, 6, 7], [5, 6]])) > 1  # of the second, nothing lies between its beginning and its end
    cpu = LLM(path, device="cpu", max_model_len=256)
    assert cpu.logprobs([[5, 6, 7, 8]])[0] == pytest.approx(llm.logprobs([[5, 6, 7, 8]])[0], abs=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_exact_model_has_the_same_bits_however_a_text_is_cut(dtype):
    check_exact_model(dtype, "cuda", layers=2, tokens=300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_exact_model_has_the_same_bits_beside_any_adapters(dtype):
    check_exact_adapters(dtype, "cuda", layers=2, tokens=300)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_an_exact_llm(path, quantize):
    """What a request is given does not depend on others, and is what a forward of the whole text says."""
    llm = LLM(path, device="cuda", quantize=quantize, max_model_len=256, exact=True)
    llm.engine.load_adapter("one", _lora.draw(llm.model, seed=3))
    drawn = SamplingParams(temperature=0.8, top_k=20, seed=3, max_new_tokens=20)
    drawn = [replace(drawn, adapter=name) for name in (None, "one", None, "one")]
    prompts = [PROMPT[:40], PROMPT[5:12], PROMPT[60:200], PROMPT[3:4]]
    together = llm.generate(prompts, drawn)
    alone = [llm.generate([p], d)[0] for p, d in zip(prompts, drawn, strict=True)]
    for one, other, params in zip(together, alone, drawn, strict=True):
        assert one.token_ids == other.token_ids and one.logprobs == other.logprobs
        text, start = [*one.prompt_token_ids, *one.token_ids], len(one.prompt_token_ids)
        assert list(llm.logprobs([text], starts=start, adapter=params.adapter)[0]) == one.logprobs


def test_adapters(path):
    made = []
    for e in (engine(path), Engine(load_packed(path), 700, frozenset(), max_num_seqs=4)):
        e.load_adapter("one", _lora.draw(e.model, seed=3))
        sequences = [Made(PROMPT[:40], SamplingParams(temperature=0.0, adapter=name)) for name in ("one", None)]
        e.run(sequences)
        made.append([s.made for s in sequences])
    for ours, theirs in zip(*made, strict=True):
        assert ours[0][1] == pytest.approx(theirs[0][1], abs=1e-3)
        close(ours, theirs, 1e-3)
