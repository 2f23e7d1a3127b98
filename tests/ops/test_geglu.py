"""geglu: what only this op must promise."""

import math

import _oracle
import pytest
import torch

from fastllm import ops
from fastllm.bench.cases.geglu import SUITE
from fastllm.ops._op import OPS


def test_compile_fullgraph():
    _oracle.check_compile(SUITE, SUITE.correct[2])
    _oracle.check_compile(SUITE, SUITE.correct[9])


@pytest.mark.parametrize("tanh", [False, True])
def test_opcheck(tanh):
    gate, up = torch.randn(4, 66).chunk(2, dim=-1)
    torch.library.opcheck(OPS["geglu"].raw, (gate, up, tanh))
    torch.library.opcheck(OPS["geglu_backward"].raw, (torch.randn(4, 33), gate, up, tanh))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_with_up_of_one_it_is_gelu(approximate):
    gate = torch.linspace(-40, 40, 5001)
    assert torch.equal(ops.geglu(gate, torch.ones_like(gate), approximate), ops.gelu(gate, approximate))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_limits_and_nan(approximate):
    gate = torch.tensor([-math.inf, -200.0, 0.0, 200.0, math.inf, math.nan], requires_grad=True)
    up = torch.ones(6, requires_grad=True)
    y = ops.geglu(gate, up, approximate)
    assert y[:5].tolist() == [0, 0, 0, 200, math.inf] and y[5].isnan()
    dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    assert dgate[:5].tolist() == [0, 0, 0.5, 1, 1] and dgate[5].isnan()
    assert dup[:4].tolist() == y[:4].tolist() and dup[5].isnan()


@pytest.mark.parametrize(
    ("gate", "up", "approximate", "error", "message"),
    [
        (torch.randn(2, 8), torch.randn(2, 7), "none", ValueError, r"gate \(2, 8\) and up \(2, 7\) must be one shape"),
        (torch.tensor(1.0), torch.tensor(1.0), "none", ValueError, r"must be one shape \[..., N\]"),
        (torch.randn(2).double(), torch.randn(2).double(), "none", TypeError, "gate is float64, allowed: float32"),
        (torch.randn(2), torch.randn(2).half(), "none", TypeError, "up is torch.float16, gate is torch.float32"),
        (torch.randn(2), torch.randn(2), "quick", ValueError, "geglu: approximate is 'quick'; allowed"),
    ],
)
def test_errors(gate, up, approximate, error, message):
    with pytest.raises(error, match=message):
        ops.geglu(gate, up, approximate)
