"""swiglu: what only this op must promise."""

import math

import _contract
import _oracle
import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.cases.swiglu import SUITE
from fastllm.ops._op import OPS


def test_compile_fullgraph():
    _oracle.check_compile(SUITE, SUITE.correct[3])


def test_opcheck():
    gate, up = torch.randn(4, 66).chunk(2, dim=-1)
    torch.library.opcheck(OPS["swiglu"].raw, (gate, up))
    torch.library.opcheck(OPS["swiglu_backward"].raw, (torch.randn(4, 33), gate, up))


@_oracle.dtypes(SUITE)
def test_bits_of_the_contract(dtype):
    gate, up = torch.linspace(-120, 120, 3001).to(dtype), torch.randn(3001).to(dtype)
    assert torch.equal(ops.swiglu(gate, up), _contract.swiglu(gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_and_nan(dtype):
    inf, large = math.inf, torch.finfo(dtype).max
    gate = torch.tensor([-inf, -large, -200.0, 0.0, 200.0, large, inf, math.nan], dtype=dtype).requires_grad_()
    up = torch.ones(8, dtype=dtype, requires_grad=True)
    y = ops.swiglu(gate, up)
    assert y[:4].tolist() == [0, 0, 0, 0] and y[4:7].tolist() == [200, large, inf] and y[7].isnan()
    dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    assert dgate[:7].tolist() == [0, 0, 0, 0.5, 1, 1, 1] and dgate[7].isnan()
    assert dup[:6].tolist() == y[:6].tolist() and dup[7].isnan()


def test_halves_of_one_tensor_are_not_copied():
    gate, up = torch.randn(2, 3, 66).chunk(2, dim=-1)
    plan = _C.Plan()
    plan.begin()
    y = ops.swiglu(gate, up)
    plan.end()
    gate.copy_(torch.randn(2, 3, 33))
    assert plan.replay() == 0
    assert torch.equal(y, ops.swiglu(gate, up))


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (torch.randn(2, 8), torch.randn(2, 7), ValueError, r"gate \(2, 8\) and up \(2, 7\) must be one shape"),
        (torch.tensor(1.0), torch.tensor(1.0), ValueError, r"must be one shape \[..., N\]"),
        (torch.randn(2).double(), torch.randn(2).double(), TypeError, "gate is float64, allowed: float32, bfloat16"),
        (torch.randn(2), torch.randn(2).half(), TypeError, "up is torch.float16, gate is torch.float32"),
        (torch.randn(2), torch.randn(2, device="meta"), ValueError, "up is on meta, gate on cpu"),
    ],
)
def test_errors(gate, up, error, message):
    with pytest.raises(error, match=message):
        ops.swiglu(gate, up)
