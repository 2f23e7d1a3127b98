"""sample: the rules of truncation and penalties; the distribution; the arithmetic, bit for bit."""

import math
import pickle
from dataclasses import replace

import _oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastllm import _C, SamplingParams, ops
from fastllm.bench.cases.sample import PENALTIES, SUITE, USUAL
from fastllm.ops import LogitsError, SampleState
from fastllm.ops._op import OPS

INF, NAN = math.inf, math.nan


def test_compile_fullgraph():
    for case in (SUITE.correct[5], SUITE.correct[11]):
        inputs = _oracle.draw(SUITE, case, torch.float32)
        torch._dynamo.reset()
        compiled = torch.compile(ops.sample, fullgraph=True)
        for ours, eager in zip(compiled(**inputs), ops.sample(**inputs), strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("rows", [None, torch.tensor([2, -1, 0, 0], dtype=torch.int32)])
def test_opcheck(entropy, rows):
    s = SampleState.create(4, history=3, suppress=1, **USUAL)
    torch.library.opcheck(OPS["sample"].raw, (torch.randn(4, 300), s.settings, s.history, s.suppress, rows, entropy))


# ------------------------------------------------------------------------------------------------------------- rules


def log(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log().float()


def support(logits, draws: int = 400, **fields):
    """The tokens that come out over many draws, the reported size of the kept set, and the most common token."""
    state = SampleState.create(draws, position=torch.arange(draws), **fields)
    token, _, _, kept, _ = ops.sample(logits.expand(draws, -1), state)
    assert len(set(kept.tolist())) == 1
    return set(token.tolist()), int(kept[0])


@pytest.mark.parametrize(
    ("logits", "fields", "tokens"),
    [
        (log(0.5, 0.2, 0.3), {}, {0, 1, 2}),
        (log(0.5, 0.2, 0.3), {"temperature": 0.0}, {0}),
        (torch.tensor([[1.0, 3.0, 3.0, 2.0]]), {"temperature": 0.0}, {1}),  # lowest index among equals
        (torch.tensor([[-0.0, 0.0]]), {"temperature": 0.0}, {0}),
        (torch.zeros(1, 600), {"temperature": 0.0}, {0}),
        (log(0.5, 0.2, 0.3), {"top_k": 1}, {0}),
        (log(0.5, 0.2, 0.3), {"top_k": 2}, {0, 2}),
        (log(0.5, 0.2, 0.3), {"top_k": 3}, {0, 1, 2}),
        (log(0.5, 0.2, 0.3), {"top_k": 1000}, {0, 1, 2}),
        (log(0.5, 0.2, 0.3), {"top_k": -1}, {0, 1, 2}),
        (torch.tensor([[1.0, 2.0, 1.0, 1.0]]), {"top_k": 3}, {0, 1, 2}),  # exactly k, lowest index first
        (torch.tensor([[-0.0, 0.0, 0.0]]), {"top_k": 2}, {0, 1}),
        (torch.zeros(1, 700), {"top_k": 20}, set(range(20))),
        (log(0.5, 0.2, 0.3), {"top_p": 0.0}, {0}),
        (log(0.5, 0.2, 0.3), {"top_p": 0.4}, {0}),
        (log(0.5, 0.2, 0.3), {"top_p": 0.5}, {0}),
        (log(0.5, 0.2, 0.3), {"top_p": 0.51}, {0, 2}),
        (log(0.5, 0.2, 0.3), {"top_p": 0.8}, {0, 2}),
        (log(0.5, 0.2, 0.3), {"top_p": 0.81}, {0, 1, 2}),
        (log(0.5, 0.2, 0.3), {"top_p": 1.0}, {0, 1, 2}),
        # .2 + .1 is more than .3 in doubles and may be less in floats: the two are kept either way, and no third
        (log(0.2, *[0.07] * 10, 0.1), {"top_p": 0.3}, {0, 11}),
        (log(0.1, 0.2, 0.3, 0.4), {"top_p": 0.7}, {2, 3}),
        (log(0.25, 0.25, 0.25, 0.25), {"top_p": 0.5}, {0, 1}),  # ties: lowest index first
        (log(0.5, 0.2, 0.3), {"top_k": 2, "top_p": 0.625}, {0}),  # .5 / .8 after top-k
        (log(0.5, 0.2, 0.3), {"top_k": 2, "top_p": 0.63}, {0, 2}),
        (log(0.5, 0.25, 0.125, 0.125), {"min_p": 0.5}, {0, 1}),
        (log(0.5, 0.25, 0.125, 0.125), {"min_p": 0.51}, {0}),
        (log(0.5, 0.25, 0.125, 0.125), {"min_p": 1.0}, {0}),
        (log(0.5, 0.25, 0.125, 0.125), {"min_p": 0.2}, {0, 1, 2, 3}),
        (log(0.5, 0.25, 0.125, 0.125), {"min_p": 0.1, "top_k": 2}, {0, 1}),
        (log(0.4, 0.4, 0.1, 0.1), {"min_p": 0.3, "top_p": 0.85}, {0, 1}),
        (torch.tensor([[1.0, -INF, 1.0]]), {}, {0, 2}),
        (torch.tensor([[1.0, -INF, 1.0]]), {"top_k": 3, "top_p": 0.999}, {0, 2}),
        (torch.tensor([[1.0, INF, -INF, INF]]), {}, {1, 3}),
        (torch.tensor([[1.0, INF, -INF, INF]]), {"temperature": 0.0}, {1}),
        (torch.tensor([[1.0, INF, -INF, INF]]), {"top_k": 2, "min_p": 0.1}, {1, 3}),
        (torch.tensor([[1.0, INF, -INF, INF]]), {"top_p": 0.5}, {1}),
        (torch.tensor([[3.0, 3.0001, 2.9]]), {"temperature": 1e-6}, {1}),
        (torch.tensor([[3.0, 3.0001, 2.9]]), {"temperature": 1e-45}, {1}),
        (torch.tensor([[3.0, -300.0, 20.0]]), {"temperature": 1e6}, {0, 1, 2}),
        (torch.tensor([[3.0, -300.0, 20.0]]), {"temperature": INF, "top_p": 0.99}, {0, 1, 2}),
        (torch.tensor([[3.4e38, -3.4e38, 3.4e38]]), {"top_p": 0.9}, {0, 2}),
        (torch.tensor([[7.0]]), {**USUAL}, {0}),
    ],
)  # fmt: skip
def test_kept_tokens(logits, fields, tokens):
    found, kept = support(logits, **fields)
    assert found == tokens
    if not math.isinf(logits.max()) and fields.get("temperature", 1.0) > 1e-3:
        assert kept == len(tokens)


def random_settings(generator, count):
    pick = lambda values: torch.tensor(values)[torch.randint(len(values), (count,), generator=generator)]  # noqa: E731
    return {
        "temperature": pick([0.3, 0.8, 1.0, 1.7]), "top_k": pick([0, 1, 7, 50, 400]),
        "top_p": pick([0.2, 0.5, 0.9, 0.99, 1.0]), "min_p": pick([0.0, 0.0, 0.02, 0.3]),
    }  # fmt: skip


def kept_mask(logits, kept):
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(logits.shape[-1]).expand_as(order))
    return rank < kept[:, None]


@pytest.mark.parametrize("vocab", [5, 100, 3001, 50257])
def test_kept_set_equals_transformers(vocab):
    generator, count = torch.Generator().manual_seed(vocab), 60
    logits = (
        torch.randn(count, vocab, generator=generator) * torch.tensor([0.5, 2.0, 6.0])[torch.arange(count) % 3, None]
    )
    fields = random_settings(generator, count)
    token, _, truncated, kept, _ = ops.sample(logits, SampleState.create(count, seed=torch.arange(count), **fields))
    mine = kept_mask(logits, kept)
    for i in range(count):
        t, k, p, m = (v[i].item() for v in fields.values())
        scores = TemperatureLogitsWarper(t)(None, logits[i : i + 1].double())
        scores = TopKLogitsWarper(k)(None, scores) if k else scores
        scores = TopPLogitsWarper(p)(None, scores) if p < 1 else scores
        scores = MinPLogitsWarper(m)(None, scores) if m else scores
        assert torch.equal(mine[i], scores[0] > -INF), (i, t, k, p, m)
        assert mine[i, token[i]]
        assert truncated[i].item() == pytest.approx(scores[0].log_softmax(0)[token[i]].item(), abs=3e-6)


def test_penalties_equal_transformers_and_the_definition():
    generator, count, vocab = torch.Generator().manual_seed(3), 40, 50
    logits = torch.randn(count, vocab, generator=generator) * 3
    history = torch.randint(0, vocab, (count, 20), generator=generator, dtype=torch.int32)
    state = SampleState.create(
        count, history=30, seed=torch.arange(count), prompt_len=8, history_len=20,
        repetition_penalty=torch.linspace(0.5, 2, count), presence_penalty=0.7, frequency_penalty=-0.3,
    )  # fmt: skip
    state.history[:, :20] = history
    state.history[:, 20:] = torch.randint(0, vocab, (count, 10), dtype=torch.int32)  # not history: must not matter
    token, logprob, truncated, kept, _ = ops.sample(logits, state)
    for i in range(count):
        penalty = RepetitionPenaltyLogitsProcessor(float(state.repetition_penalty[i]))
        want = penalty(history[i : i + 1].long(), logits[i : i + 1].clone())[0].double()
        counts = torch.bincount(history[i, 8:], minlength=vocab)
        want = want - 0.7 * (counts > 0) + 0.3 * counts
        assert truncated[i].item() == pytest.approx(want.log_softmax(0)[token[i]].item(), abs=5e-6)
        assert logprob[i].item() == pytest.approx(logits[i].double().log_softmax(0)[token[i]].item(), abs=3e-6)
    assert (kept == vocab).all()
    greedy = SampleState(state.settings.clone(), state.history, state.suppress)
    greedy.temperature.fill_(0)
    assert (ops.sample(logits, greedy)[0] != logits.argmax(-1)).any()


def test_history_may_hold_ids_outside_the_vocabulary():
    logits = torch.randn(2, 30)
    state = SampleState.create(2, history=4, repetition_penalty=5.0, history_len=4)
    state.history.copy_(torch.tensor([[-1, 30, 2**31 - 1, 40]] * 2))
    for a, b in zip(ops.sample(logits, state), ops.sample(logits, SampleState.create(2)), strict=True):
        assert torch.equal(a, b)


def test_end_of_sequence_is_suppressed_until_min_new_tokens():
    logits = torch.zeros(1, 10)
    logits[0, [3, 8]] = 20.0
    state = SampleState.create(1, history=8, suppress=3)
    state.set(0, SamplingParams(min_new_tokens=2, temperature=0.0), prompt=[1, 2], eos=[3, 8])
    tokens = []
    for _ in range(4):
        token, logprob, *_ = ops.sample(logits, state)
        assert logprob.item() == pytest.approx(logits.log_softmax(-1)[0, token].item(), abs=1e-5)
        tokens.append(token.item())
        ops.advance(token, state)
    assert tokens == [0, 0, 3, 3]


def test_suppressing_everything_is_an_error():
    state = SampleState.create(1, suppress=2, min_new_tokens=1)
    state.suppress.copy_(torch.tensor([[0, 1]]))
    with pytest.raises(LogitsError, match="row 0"):
        ops.sample(torch.zeros(1, 2), state)


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0}, USUAL, {"top_p": 0.5}, PENALTIES])
@pytest.mark.parametrize("vocab", [9, 40000])
def test_rows_without_a_distribution(fields, vocab):
    logits = torch.randn(5, vocab)
    logits[1, 4], logits[3] = NAN, -INF
    logits[4, 0], logits[4, vocab - 1] = NAN, INF
    state = SampleState.create(5, history=12, **fields)
    with pytest.raises(LogitsError, match="row 1, 3, 4 hold a NaN") as error:
        ops.sample(logits, state)
    assert error.value.rows == [1, 3, 4]
    good = torch.tensor([0, 2], dtype=torch.int32)
    tokens = ops.sample(logits[[0, 2]], state.with_rows(good))[0]  # the advice of the documentation
    clean = torch.where(logits.isnan() | (logits == -INF), 0.0, logits)
    assert torch.equal(tokens, ops.sample(clean, state)[0][[0, 2]])


def test_an_error_that_is_pickled():
    """As between processes; with what was written to it."""
    error = LogitsError([3, 5], "token_logprobs")
    error.outputs = ["x"]
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.rows, again.outputs) == (str(error), [3, 5], ["x"])


def test_rows_that_are_left_out():
    logits = torch.randn(3, 100)
    logits[1] = NAN  # not looked at
    rows = torch.tensor([1, -1, 0], dtype=torch.int32)
    token, _, _, kept, _ = ops.sample(logits, SampleState.create(2, top_k=5).with_rows(rows))
    assert kept.tolist() == [5, 0, 5] and token[1] == 0
    with pytest.raises(IndexError, match="a record beyond the 2"):
        ops.sample(logits, SampleState.create(2).with_rows(torch.tensor([0, 2, 1], dtype=torch.int32)))


def test_seed_index_and_position_each_change_the_draws():
    logits = torch.zeros(8, 5000)
    base = ops.sample(logits, SampleState.create(8, position=torch.arange(8)))[0]
    for field in ("seed", "index", "position"):
        value = 9 if field != "position" else torch.arange(8) + 9
        fields = {"position": torch.arange(8), field: value}
        assert (ops.sample(logits, SampleState.create(8, **fields))[0] != base).all(), field


def test_state_and_logits_are_not_changed():
    inputs = _oracle.draw(SUITE, SUITE.correct[10], torch.float32)
    s = inputs["state"]
    before = [t.clone() for t in (inputs["logits"], s.settings, s.history, s.suppress)]
    ops.sample(**inputs)
    for b, a in zip(before, (inputs["logits"], s.settings, s.history, s.suppress), strict=True):
        assert torch.equal(a, b)


def test_worst_cases_stay_correct():
    vocab = 60000
    ramp = torch.arange(vocab).float()
    for row in (torch.zeros(vocab), ramp, -ramp, ramp % 2, torch.exp2(ramp % 250 - 125), -torch.exp2(ramp % 250 - 125)):
        for fields in (USUAL, {"top_p": 0.999}, {"top_k": 59000, "top_p": 0.7}, {"min_p": 1e-30}, {}):
            inputs = {"logits": row[None], "state": SampleState.create(1, seed=4, **fields)}
            for ours, plain in zip(ops.sample(**inputs), SUITE.reference(**inputs), strict=True):
                assert torch.allclose(ours.double(), plain.double(), rtol=2e-5, atol=2e-5), fields


# a plan replays the records while the state in memory moves on
def test_replayed_in_a_plan():
    logits, n = torch.randn(3, 20000) * 2, 6

    def fresh():
        state = SampleState.create(3, history=16, seed=torch.arange(3), repetition_penalty=1.5, **USUAL)
        return state, torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int32)

    eager, position, length = fresh()
    for _ in range(n):
        token = ops.sample(logits, eager)[0]
        ops.advance(token, eager, position, length)

    state, again, again_length = fresh()
    plan = _C.Plan()
    plan.begin()
    try:
        results = ops.sample(logits, state)
        ops.advance(results[0], state, again, again_length)
    finally:
        plan.end()
    assert plan.kernels() == ["sample", "advance"]
    assert plan.replay(times=n - 1) == 0
    assert torch.equal(state.history, eager.history) and torch.equal(state.settings, eager.settings)
    assert torch.equal(results[0], token) and torch.equal(again, position) and torch.equal(again_length, length)
    logits[1, 5] = NAN
    assert plan.replay() == 2
    assert results[3].tolist()[1] == 0 and results[1].isnan().tolist() == [False, True, False] and results[0][1] == 0


# -------------------------------------------------------------------------------------------------------- properties

finite = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(st.one_of(finite, st.sampled_from([-INF, 0.0, -0.0, 3e38, -3e38])), min_size=1, max_size=40),
    top=finite,
    temperature=st.sampled_from([0.0, 1e-6, 0.5, 1.0, 3.0, 1e6]),
    top_k=st.integers(-1, 50),
    top_p=st.floats(0, 1, width=32),
    min_p=st.floats(0, 1, width=32),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_properties(values, top, temperature, top_k, top_p, min_p, seed):
    logits = torch.tensor([[top, *values]])
    fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    token, logprob, truncated, kept, entropy = (
        o[0].item() for o in ops.sample(logits, SampleState.create(1, **fields))
    )
    order = torch.sort(logits[0], descending=True, stable=True).indices
    assert 1 <= kept <= int((logits > -INF).sum())
    assert token in order[:kept].tolist()
    assert kept <= max(top_k, 1) or top_k <= 0
    assert kept == 1 or top_p > 0
    assert logprob <= 0 and truncated <= 0 and 0 <= entropy <= math.log(logits.numel()) + 1e-5
    assert truncated >= -math.log(2**41) - 1e-3
    if temperature == 1 and top_k <= 0 and top_p == 1 and min_p == 0:
        assert truncated == logprob
    if kept == 1:
        assert truncated == 0 and token == order[0]


# ------------------------------------------------------------------------------------------------------------- guards


def test_state_from_sampling_params():
    params = SamplingParams(temperature=0.5, top_k=7, top_p=0.75, min_p=0.125, seed=2**62 + 1, repetition_penalty=1.5,
                            presence_penalty=0.25, frequency_penalty=-0.5, min_new_tokens=3)  # fmt: skip
    state = SampleState.create(2, history=6, suppress=2)
    state.set(1, params, index=4, prompt=[9, 8, 7], eos=[2])
    got = {n: getattr(state, n)[1].item() for n, v in vars(SampleState).items() if isinstance(v, property)}
    assert got == {
        "seed": 2**62 + 1, "index": 4, "position": 3, "temperature": 0.5, "top_p": 0.75, "min_p": 0.125,
        "repetition_penalty": 1.5, "presence_penalty": 0.25, "frequency_penalty": -0.5, "top_k": 7,
        "prompt_len": 3, "history_len": 3, "min_new_tokens": 3,
    }  # fmt: skip
    assert state.history[1].tolist() == [9, 8, 7, 0, 0, 0] and state.suppress[1].tolist() == [2, -1]
    assert torch.equal(state[:1].settings, SampleState.create(1).settings)
    drawn = [SampleState.create(1) for _ in range(2)]
    for s in drawn:
        s.set(0, SamplingParams())
    assert drawn[0].seed.item() != drawn[1].seed.item()
    before, exact = torch.get_default_dtype(), torch.tensor([0.77], dtype=torch.float32)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            drawn[0].set(0, SamplingParams(temperature=0.77, top_p=0.77))
            assert torch.equal(drawn[0].temperature, exact) and torch.equal(drawn[0].top_p, exact), dtype
    finally:
        torch.set_default_dtype(before)
    with pytest.raises(ValueError, match="prompt has 7 tokens, a history 6"):
        state.set(0, params, prompt=range(7))
    with pytest.raises(ValueError, match="3 ids to suppress, room for 2"):
        state.set(0, params, eos=[1, 2, 3])
    with pytest.raises(TypeError, match="no field 'topk'; the fields are seed, index"):
        SampleState.create(1, topk=5)


STATE = SampleState.create(2)


@pytest.mark.parametrize(
    ("logits", "state", "error", "message"),
    [
        (torch.zeros(2, 8).half(), STATE, TypeError, "logits is float16, allowed: float32"),
        (torch.zeros(8), STATE, ValueError, r"logits \(8,\) must be \[B, V\] with 1 <= V <= 8388608"),
        (torch.zeros(2, 0), STATE, ValueError, r"logits \(2, 0\) must be"),
        (torch.zeros(3, 8), STATE, ValueError, "3 rows, but 2 records in the state; set state.rows"),
        (torch.zeros(3, 8), STATE.with_rows(torch.zeros(2).int()), ValueError, "3 rows, but 2 in state.rows"),
        (torch.zeros(2, 8, device="meta"), STATE, ValueError, "the state is on cpu, the rows are on meta"),
    ],
)
def test_errors(logits, state, error, message):
    with pytest.raises(error, match=message):
        ops.sample(logits, state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.zeros(2).long()}, TypeError, "settings are int64; history, suppress and rows int32"),
        ({"settings": torch.zeros(2, 8)}, TypeError, "settings are int64"),
        ({"history": torch.zeros(1, 3).int()}, ValueError, r"must be \[N, 8\], \[N, H\], \[N, E\]"),
        ({"settings": torch.zeros(8, 2).long().t()}, ValueError, "must be contiguous"),
        ({"rows": torch.zeros(2, device="meta").int()}, ValueError, "on several devices"),
    ],
)
def test_a_state_is_checked_when_made(change, error, message):
    with pytest.raises(error, match=message):
        replace(STATE, **change)


def test_logits_that_require_grad():
    logits = torch.randn(2, 50)
    for a, b in zip(ops.sample(logits.clone().requires_grad_(), STATE), ops.sample(logits, STATE), strict=True):
        assert torch.equal(a, b) and not a.requires_grad


@pytest.mark.parametrize("top_p", [0.0, -0.5, -5.0, -math.inf])
def test_a_top_p_below_zero_keeps_one_token(top_p):
    """SamplingParams refuses it; a record is memory that anybody writes."""
    logits = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ops.sample(logits, SampleState.create(3, top_p=top_p))[0].long(), logits.argmax(1))
