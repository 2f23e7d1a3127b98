"""target_logprobs: the bits that the sampler and top_logprobs report for the same token."""

import math

import _oracle
import pytest
import torch

from fastllm import ops
from fastllm.bench.cases.target_logprobs import SUITE
from fastllm.ops import LogitsError, SampleState
from fastllm.ops._op import OPS


def test_compile_and_opcheck():
    _oracle.check_compile(SUITE, SUITE.correct[2])
    torch.library.opcheck(OPS["target_logprobs"].raw, (torch.randn(3, 50), torch.tensor([0, 49, 7])))


@pytest.mark.parametrize("vocab", [1, 11, 256, 4099, 49152])
@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9}, {"temperature": 2.0, "min_p": 0.01}],
)
def test_same_bits_as_the_sampler(vocab, fields):
    """Whatever the draw was asked to do, its reported logprob is that of the untruncated row at temperature 1."""
    count = 12
    logits = torch.randn(count, vocab) * torch.tensor([0.0, 0.5, 3.0, 30.0]).repeat(3)[:, None]
    token, logprob, *_ = ops.sample(logits, SampleState.create(count, seed=torch.arange(count), **fields))
    assert torch.equal(ops.target_logprobs(logits, token), logprob)


@pytest.mark.parametrize("vocab", [20, 300, 33001])
def test_same_bits_as_top_logprobs(vocab):
    logits = torch.randn(7, vocab) * 4
    token, logprob = ops.top_logprobs(logits, 20)
    for place in range(20):
        assert torch.equal(ops.target_logprobs(logits, token[:, place]), logprob[:, place])


def test_a_row_does_not_depend_on_its_batch_or_its_strides():
    logits, target = torch.randn(300, 513) * 3, torch.randint(513, (300,))
    whole = ops.target_logprobs(logits, target)
    for count in (1, 2, 3, 7, 64):
        assert torch.equal(ops.target_logprobs(logits[:count], target[:count]), whole[:count])
    wide = torch.randn(300, 600)
    wide[:, 40:553] = logits
    assert torch.equal(ops.target_logprobs(wide[:, 40:553], target), whole)
    assert torch.equal(ops.target_logprobs(logits, target.repeat_interleave(2)[::2]), whole)


def test_probabilities_sum_to_one():
    logits = torch.randn(1, 700) * 5
    every = ops.target_logprobs(logits.expand(700, -1), torch.arange(700))
    assert every.double().exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_infinities():
    inf = math.inf
    logits = torch.tensor([[0.0, -inf, 0.0], [inf, 1.0, inf], [-inf, -5.0, -inf], [3e38, -3e38, 0.0]])
    ours = [ops.target_logprobs(logits, torch.full((4,), t)).tolist() for t in range(3)]
    by_row = [list(row) for row in zip(*ours, strict=True)]
    half = pytest.approx(-math.log(2))
    assert by_row[0] == [half, -inf, half] and by_row[1] == [half, -inf, half]
    assert by_row[2] == [-inf, 0, -inf] and by_row[3][0] == 0 and by_row[3][1] < -3e38


@pytest.mark.parametrize("bad", [-1, 9, 2**40, -(2**40)])
def test_targets_outside_errors(bad):
    logits, target = torch.randn(3, 9), torch.tensor([0, bad, 8])
    with pytest.raises(IndexError, match=rf"target {bad} of row 1 is outside \[0, 9\)"):
        ops.target_logprobs(logits, target)


def test_errors():
    logits, target = torch.randn(4, 9), torch.zeros(4, dtype=torch.int64)
    logits[1, 2], logits[3] = math.nan, -math.inf
    with pytest.raises(LogitsError) as error:
        ops.target_logprobs(logits, target)
    assert error.value.rows == [1, 3]
    logits = torch.randn(4, 9)
    for call, kind, message in (
        (lambda: ops.target_logprobs(logits.double(), target), TypeError, "logits is float64"),
        (lambda: ops.target_logprobs(logits, target.int()), TypeError, "target is int32, allowed: int64"),
        (lambda: ops.target_logprobs(logits, target[:3]), ValueError, r"target \(3,\) must be \[4\]"),
        (lambda: ops.target_logprobs(logits, target[:, None]), ValueError, r"target \(4, 1\) must be \[4\]"),
        (lambda: ops.target_logprobs(logits[0], target), ValueError, r"logits"),
    ):
        with pytest.raises(kind, match=message):
            call()
