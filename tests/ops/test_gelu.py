"""gelu: what only this op must promise."""

import math

import _oracle
import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.cases.gelu import SUITE
from fastllm.ops._op import OPS


def test_compile_fullgraph():
    _oracle.check_compile(SUITE, SUITE.correct[3])
    _oracle.check_compile(SUITE, SUITE.correct[10])


@pytest.mark.parametrize("tanh", [False, True])
def test_opcheck(tanh):
    x = torch.randn(4, 66)[:, ::2]
    torch.library.opcheck(OPS["gelu"].raw, (x, tanh))
    torch.library.opcheck(OPS["gelu_backward"].raw, (torch.randn(4, 33), x, tanh))


def exact(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """In float64, also where 1 + erf(x) would cancel."""
    x = x.double()
    if approximate == "tanh":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return x * torch.special.erfc(-x / math.sqrt(2)) / 2


# by tanh the argument of the exponential is rounded, which costs its size in units of the last place
@pytest.mark.parametrize(("approximate", "from_", "to", "bound"), [
    ("none", -12, -1, 7), ("none", -1, 0, 3), ("none", 0, 12, 2), ("tanh", -5, 0, 40), ("tanh", 0, 12, 3),
])  # fmt: skip
def test_accuracy_in_units_of_the_last_place(approximate, from_, to, bound):
    """Also far into the tail, where 1 + erf(x) in fp32 has no digit left."""
    small = torch.logspace(-30, 0, 1001)
    x = torch.cat((torch.linspace(from_, to, 200_001), small if from_ >= 0 else -small if to <= 0 else small[:0]))
    x = x[(x >= from_) & (x <= to)]
    y, want = ops.gelu(x, approximate).double(), exact(x, approximate)
    normal = want.abs() > 1e-37
    ulp = 2.0 ** (want.abs().clamp_min(1e-37).log2().floor() - 23)
    rounded_twice = 10 if _C.isa() == "generic" else 1  # without an FMA what x * x loses is lost
    assert ((y - want).abs() / ulp)[normal].max() < bound * rounded_twice


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_and_nan(dtype, approximate):
    inf, large = math.inf, torch.finfo(dtype).max
    x = torch.tensor([-inf, -large, -200.0, 0.0, 200.0, large, inf, math.nan], dtype=dtype).requires_grad_()
    y = ops.gelu(x, approximate)
    assert y[:4].tolist() == [0, 0, 0, 0] and y[4:7].tolist() == [200, large, inf] and y[7].isnan()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx[:7].tolist() == [0, 0, 0, 0.5, 1, 1, 1] and dx[7].isnan()


def test_functorch_and_export():
    x = torch.randn(3, 40)
    torch.testing.assert_close(torch.func.vmap(ops.gelu)(x), ops.gelu(x))
    ours = torch.func.grad(lambda t: ops.gelu(t, "tanh").sin().sum())(x)
    plain = torch.func.grad(lambda t: torch.nn.functional.gelu(t, approximate="tanh").sin().sum())(x)
    torch.testing.assert_close(ours, plain)

    class Activation(torch.nn.Module):
        def forward(self, t):
            return ops.gelu(t)

    assert "fastllm.gelu" in torch.export.export(Activation(), (x,)).graph_module.code


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.tensor(1.0),), ValueError, "x is a scalar; it must be"),
        ((torch.randn(2).double(),), TypeError, "x is float64, allowed: float32, bfloat16"),
        ((torch.randn(2), "erf"), ValueError, "approximate is 'erf'; allowed: 'none'"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.gelu(*arguments)
