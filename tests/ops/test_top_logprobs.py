"""top_logprobs: order, ties, and the same bits as the sampler."""

import math

import _oracle
import pytest
import torch

from fastllm import ops
from fastllm.bench.cases.top_logprobs import SUITE
from fastllm.ops import LogitsError, SampleState
from fastllm.ops._op import OPS


def test_compile_and_opcheck():
    _oracle.check_compile(SUITE, SUITE.correct[2])
    torch.library.opcheck(OPS["top_logprobs"].raw, (torch.randn(3, 50), 4))


@pytest.mark.parametrize("vocab", [11, 40001])
def test_same_bits_as_the_sampler(vocab):
    logits = torch.randn(30, vocab) * 4
    token, logprob = ops.top_logprobs(logits, 5)
    sampled, own, *_ = ops.sample(logits, SampleState.create(30, top_k=5, seed=torch.arange(30)))
    assert torch.equal(own, logprob[token == sampled[:, None]])


def test_ties_infinities_and_missing_places():
    logits = torch.tensor([[1.0, 2.0, -0.0, 0.0, 1.0, -math.inf], [math.inf, 3.0, math.inf, 3.0, -math.inf, 1.0]])
    token, logprob = ops.top_logprobs(logits, 7)
    assert token.tolist() == [[1, 0, 4, 2, 3, -1, -1], [0, 2, 1, 3, 5, -1, -1]]
    assert (logprob[0, 5:] == -math.inf).all() and torch.equal(logprob[0, 1], logprob[0, 2])
    assert logprob[1, :2].tolist() == pytest.approx([-math.log(2)] * 2) and (logprob[1, 2:] == -math.inf).all()
    assert ops.top_logprobs(logits, 0)[0].shape == (2, 0)


def test_errors():
    logits = torch.randn(3, 9)
    logits[1, 2], logits[2] = math.nan, -math.inf
    with pytest.raises(LogitsError) as error:
        ops.top_logprobs(logits, 2)
    assert error.value.rows == [1, 2]
    with pytest.raises(ValueError, match="n is 21, allowed: 0 to 20"):
        ops.top_logprobs(logits, 21)
    with pytest.raises(TypeError, match="logits is float64"):
        ops.top_logprobs(logits.double(), 2)
