"""token_logprobs: the bits that the sampler reports."""

import math

import _oracle
import pytest
import torch

from fastllm import ops
from fastllm.bench.cases.token_logprobs import SUITE
from fastllm.ops import LogitsError, SampleState, _head
from fastllm.ops._op import OPS
from fastllm.ops.token_logprobs import reference


@pytest.fixture(params=[1 << 30, 1], ids=["one block", "blocks of 32 rows"])
def block(request, monkeypatch):
    monkeypatch.setattr(_head, "CPU_BYTES", request.param)


@_oracle.dtypes(SUITE)
@_oracle.cases(SUITE)
def test_forward_and_gradients_in_blocks_of_32_rows(case, dtype, monkeypatch):
    monkeypatch.setattr(_head, "CPU_BYTES", 1)
    _oracle.check_forward_and_gradients(SUITE, case, dtype)


def test_compile_fullgraph():
    _oracle.check_compile(SUITE, SUITE.correct[3])
    _oracle.check_compile(SUITE, next(c for c in SUITE.correct if "kept" in c.label))


@pytest.mark.parametrize("kept", [None, torch.tensor([1, 3, 20], dtype=torch.int32)])
def test_opcheck(kept):
    given = (torch.randn(3, 8), torch.randn(20, 8), torch.tensor([0, 19, 7]), kept, 0.8, False)
    torch.library.opcheck(OPS["token_logprobs"].raw, given)
    for needs in ([True, True], [True, False]):
        torch.library.opcheck(OPS["token_logprobs_backward"].raw, (torch.randn(3), torch.randn(3), *given, needs))


DRAWS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 2.0, "min_p": 0.01},
    {"temperature": 0.1, "top_k": 3},
    {"top_p": 0.9999},
]


@pytest.mark.parametrize("fields", DRAWS, ids=[",".join(f) or "plain" for f in DRAWS])
@pytest.mark.parametrize("vocab", [11, 256, 4099])
def test_same_bits_as_the_sampler(vocab, fields, block):
    """The trainer's numbers are the sampler's, whatever the draw: the claim on which RLHF without a second pass rests."""
    rows, depth = 40, 33
    x = torch.randn(rows, depth) * torch.tensor([0.0, 0.5, 2.0, 20.0]).repeat(10)[:, None]
    x[5], x[6, :] = x[4], 0.0  # ties, and rows that are one great tie
    weight = torch.randn(vocab, depth) / 4
    weight[vocab // 2] = weight[1]
    logits = ops.linear(x, weight)
    state = SampleState.create(rows, seed=torch.arange(rows), **fields)
    token, logprob, truncated, kept, entropy = ops.sample(logits, state)
    ours = ops.token_logprobs(x, weight, token)
    assert torch.equal(ours[0], logprob) and torch.equal(ours[1], entropy)
    assert torch.equal(ours[0], ops.target_logprobs(logits, token))
    assert torch.equal(ops.token_logprobs(x, weight, token, kept, fields.get("temperature", 1.0))[0], truncated)


def test_one_row_alone_and_among_many():
    x, weight, target = torch.randn(100, 40), torch.randn(515, 40), torch.randint(515, (100,))
    kept = torch.randint(1, 600, (100,), dtype=torch.int32)
    for k in (None, kept):
        whole = ops.token_logprobs(x, weight, target, k, 0.9)
        for rows in (1, 2, 33):
            part = ops.token_logprobs(x[:rows], weight, target[:rows], None if k is None else k[:rows], 0.9)
            assert all(torch.equal(p, w[:rows]) for p, w in zip(part, whole, strict=True))


def test_ties_are_kept_from_the_lowest_index_on():
    x = torch.ones(5, 1)
    weight = torch.tensor([[1.0], [2.0], [1.0], [2.0], [1.0]])
    target, kept = torch.arange(5), torch.full((5,), 3, dtype=torch.int32)
    logprob, _ = ops.token_logprobs(x, weight, target, kept)
    assert logprob.isfinite().tolist() == [True, True, False, True, False]  # 1, 3, then 0 of the three that tie
    torch.testing.assert_close(logprob[:2].exp(), torch.tensor([1.0, math.e]) / (1 + 2 * math.e))


@pytest.mark.parametrize("kept", [None, 4])
def test_gradient_equals_finite_differences(kept):
    x, weight = torch.randn(4, 7, requires_grad=True), torch.randn(13, 7, requires_grad=True)
    target = (x @ weight.t()).argmax(1)
    kept = None if kept is None else torch.full((4,), kept, dtype=torch.int32)
    up = torch.randn(2, 4)
    found = ops.token_logprobs(x, weight, target, kept, 0.8)
    ours = torch.autograd.grad(found, (x, weight), tuple(up))
    for place in range(2):
        direction = torch.randn_like((x, weight)[place]).double()

        def moved(step, place=place, direction=direction):
            a, b = (t.detach().double() + (step * direction if i == place else 0) for i, t in enumerate((x, weight)))
            logprob, entropy = reference(a, b, target, kept, 0.8)
            return (logprob * up[0].double() + entropy * up[1].double()).sum()

        numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6
        assert (ours[place].double() * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-4, abs=1e-5)


def test_gradient_of_one_result_and_of_one_input():
    x, weight = torch.randn(6, 9, requires_grad=True), torch.randn(40, 9, requires_grad=True)
    target = torch.randint(40, (6,))
    both = reference(x, weight, target, None, 1.0)
    for i in range(2):
        ours = torch.autograd.grad(ops.token_logprobs(x, weight, target)[i].sum(), (x, weight))
        theirs = torch.autograd.grad(both[i].sum(), (x, weight), retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    frozen = ops.token_logprobs(x, weight.detach(), target)[0].sum()
    torch.testing.assert_close(
        torch.autograd.grad(frozen, x), torch.autograd.grad(both[0].sum(), x), rtol=1e-4, atol=1e-5
    )


def test_a_token_that_cannot_come():
    """-inf: no mass, no gradient, no share in the entropy; outside the kept set the same."""
    x, weight = torch.ones(2, 1, requires_grad=True), torch.tensor([[0.0], [-math.inf], [0.0]])
    logprob, entropy = ops.token_logprobs(x, weight, torch.tensor([0, 1]))
    half = pytest.approx(-math.log(2))
    assert logprob.tolist() == [half, -math.inf] and entropy.tolist() == [pytest.approx(math.log(2))] * 2
    one = torch.ones(1, dtype=torch.int32)
    logprob, entropy = ops.token_logprobs(x[:1].detach(), torch.randn(9, 1), torch.tensor([0]), one)
    assert entropy == 0 and logprob in (0, -math.inf)


def test_never_holds_all_logits(monkeypatch):
    from fastllm.bench.harness import peak_memory

    rows, depth, vocab = 1024, 16, 4096
    monkeypatch.setattr(_head, "CPU_BYTES", 128 * vocab * 4)
    x, weight, target = torch.randn(rows, depth), torch.randn(vocab, depth), torch.randint(vocab, (rows,))
    assert peak_memory(lambda: ops.token_logprobs(x, weight, target), "cpu") < 128 * vocab * 4 + (1 << 20)


X, WEIGHT, TARGET = torch.randn(40, 8), torch.randn(9, 8), torch.zeros(40, dtype=torch.int64)
KEPT = torch.ones(40, dtype=torch.int32)


def changed(tensor, row, value):
    tensor = tensor.clone()
    tensor[row] = value
    return tensor


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, WEIGHT, changed(TARGET, 37, 9)), IndexError, r"target 9 of row 37 is outside \[0, 9\)"),
        ((X, WEIGHT, changed(TARGET, 3, -1)), IndexError, r"target -1 of row 3 is outside \[0, 9\)"),
        ((X, WEIGHT, TARGET, changed(KEPT, 36, 0)), IndexError, "kept is 0 in row 36"),
        ((changed(X, 35, math.nan), WEIGHT, TARGET), LogitsError, "token_logprobs: logits of row 35 hold a NaN"),
        ((X.double(), WEIGHT, TARGET), TypeError, "x is float64"),
        ((X, WEIGHT.half(), TARGET), TypeError, "weight is torch.float16"),
        ((X, WEIGHT.t(), TARGET), ValueError, r"weight \(8, 9\)"),
        ((X, WEIGHT, TARGET[:2]), ValueError, r"target \(2,\) must be \[40\]"),
        ((X, WEIGHT, TARGET, TARGET), TypeError, "kept is int64, allowed: int32"),
        ((X, WEIGHT, TARGET, KEPT[:2]), ValueError, r"kept \(2,\) on cpu must be like target, \(40,\)"),
        ((X, WEIGHT, TARGET, None, 0.0), ValueError, "temperature is 0.0, allowed: a positive number; a greedy choice"),
    ],
)
def test_errors(arguments, error, message, block):
    with pytest.raises(error, match=message):
        ops.token_logprobs(*arguments)
