"""softmax: what only this op must promise."""

import math

import _contract
import _oracle
import pytest
import torch

from fastllm import ops
from fastllm.bench.cases.softmax import SUITE
from fastllm.ops._op import OPS


def test_compile_fullgraph():
    _oracle.check_compile(SUITE, SUITE.correct[3])
    _oracle.check_compile(SUITE, SUITE.correct[8])


def test_opcheck():
    x = torch.randn(4, 66)[:, ::2]
    torch.library.opcheck(OPS["softmax"].raw, (x, 0.5))
    torch.library.opcheck(OPS["softmax_backward"].raw, (torch.randn(4, 33), x.softmax(-1), 0.5))


@_oracle.dtypes(SUITE)
@pytest.mark.parametrize("cols", [1, 7, 100, 576, 4097])
def test_bits_of_the_contract(cols, dtype):
    x = (3 * torch.randn(3, cols)).to(dtype)
    assert torch.equal(ops.softmax(x, 0.7), _contract.softmax(x, 0.7))


def test_rows_of_infinity_and_nan_stay_in_their_row():
    x = torch.randn(6, 40)
    x[0], x[1, 3], x[2, 5], x[4, ::2] = -math.inf, math.nan, math.inf, -math.inf
    x[3] = -math.inf
    x[3, 0] = math.nan
    x.requires_grad_()
    y = ops.softmax(x)
    assert (y[0] == 0).all() and y[1:4].isnan().all() and (y[4, ::2] == 0).all() and y[4:].isfinite().all()
    torch.testing.assert_close(y[4:].sum(-1), torch.ones(2))
    (dx,) = torch.autograd.grad(y, x, torch.randn(6, 40))
    assert (dx[0] == 0).all() and dx[1:4].isnan().all() and dx[4:].isfinite().all()


def test_a_cold_temperature_leaves_the_maximum_alone():
    x = torch.randn(5, 300)
    y = ops.softmax(x, 1e-6)
    assert torch.equal(y, torch.nn.functional.one_hot(x.argmax(-1), 300).float())
    torch.testing.assert_close(ops.softmax(x, 1e9), torch.full_like(x, 1 / 300))


def test_functorch_and_export():
    x = torch.randn(3, 40)
    torch.testing.assert_close(torch.func.vmap(ops.softmax)(x), x.softmax(-1))
    ours = torch.func.grad(lambda t: ops.softmax(t, 2.0).sin().sum())(x)
    torch.testing.assert_close(ours, torch.func.grad(lambda t: (t / 2).softmax(-1).sin().sum())(x))

    class Weights(torch.nn.Module):
        def forward(self, t):
            return ops.softmax(t)

    assert "fastllm.softmax" in torch.export.export(Weights(), (x,)).graph_module.code


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.tensor(1.0),), ValueError, "x is a scalar"),
        ((torch.randn(2).double(),), TypeError, "x is float64, allowed: float32, bfloat16"),
        *(
            ((torch.randn(2), t), ValueError, f"temperature is {t}; it must be positive and finite")
            for t in (0.0, -1.0, math.nan, math.inf)
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.softmax(*arguments)


def test_rows_are_alike_where_denormals_are_zero():
    """A mode of the thread that calls, which those that help it take over."""
    x = torch.zeros(4096, 64)
    x[:, 1:] = -95
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        y = ops.softmax(x)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y, y[:1].expand_as(y)) and not y[0, 1]
    y = ops.softmax(x)
    assert torch.equal(y, y[:1].expand_as(y)) and y[0, 1] > 0
