"""layer_norm: what only this op must promise."""

import _contract
import _oracle
import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.cases.layer_norm import SUITE
from fastllm.ops._op import OPS


def test_compile_fullgraph():
    _oracle.check_compile(SUITE, SUITE.correct[3])
    _oracle.check_compile(SUITE, SUITE.correct[8])
    _oracle.check_compile(SUITE, SUITE.correct[11])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_opcheck(residual, has_bias):
    x, weight, bias = torch.randn(4, 33), torch.randn(33), torch.randn(33) if has_bias else None
    r = torch.randn(4, 33) if residual else None
    torch.library.opcheck(OPS["layer_norm"].raw, (x, weight, bias, 1e-5, r))
    y, s, mean, rstd = OPS["layer_norm"].raw(x, weight, bias, 1e-5, r)
    arguments = (torch.randn_like(y), r, s if residual else x, weight, mean, rstd, has_bias)
    torch.library.opcheck(OPS["layer_norm_backward"].raw, arguments)


@_oracle.dtypes(SUITE)
@pytest.mark.parametrize("cols", [1, 7, 100, 576, 4097])
def test_bits_of_the_contract(cols, dtype):
    x, w, b = torch.randn(3, cols).to(dtype) + 1, torch.randn(cols).to(dtype), torch.randn(cols).to(dtype)
    assert torch.equal(ops.layer_norm(x, w, b), _contract.layer_norm(x, w, b))


def test_residual_equals_addition_then_norm():
    x, r, w = torch.randn(5, 300).bfloat16(), torch.randn(5, 300).bfloat16(), torch.randn(300).bfloat16()
    y, s = ops.layer_norm(x, w, residual=r)
    assert torch.equal(s, x + r) and torch.equal(y, ops.layer_norm(x + r, w))


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_gradients_do_not_depend_on_the_number_of_threads(op):
    x, w, upstream = (
        torch.randn(150, 700, requires_grad=True),
        torch.randn(700, requires_grad=True),
        torch.randn(150, 700),
    )

    def gradients(limit):
        previous = _C.set_thread_limit(limit)
        try:
            return torch.autograd.grad(getattr(ops, op)(x, w), (x, w), upstream)
        finally:
            _C.set_thread_limit(previous)

    assert all(torch.equal(one, all_) for one, all_ in zip(gradients(1), gradients(0), strict=True))


def test_constant_nan_and_infinite_rows_stay_in_their_row():
    x, bias = torch.randn(5, 40), torch.randn(40)
    x[0], x[1, 3], x[2, 5], x[3] = 7.0, float("nan"), float("inf"), float("-inf")
    y = ops.layer_norm(x, torch.ones(40), bias)
    assert torch.equal(y[0], bias) and y[1:4].isnan().all() and y[4].isfinite().all()


@pytest.mark.parametrize("cols", [3, 100, 1023, 4096])
def test_a_constant_row_gives_the_bias(cols):
    x, bias = torch.randn(20, 1).mul(50).expand(20, cols), torch.randn(cols)
    assert torch.equal(ops.layer_norm(x, torch.randn(cols), bias), bias.expand(20, cols))


def test_a_large_mean_costs_no_accuracy():
    noise = torch.randn(2, 4096).round(decimals=2)
    x = 4096.0 + (noise * 1024).round() / 1024  # the addition is exact
    expected = torch.nn.functional.layer_norm(x.double(), (4096,)).float()
    torch.testing.assert_close(ops.layer_norm(x, torch.ones(4096)), expected, rtol=0, atol=2e-4)


def test_functorch_export_and_fake():
    x, w, b = torch.randn(4, 64), torch.randn(64), torch.randn(64)
    per_row = torch.func.vmap(lambda row: ops.layer_norm(row, w, b))(x)
    torch.testing.assert_close(per_row, ops.layer_norm(x, w, b))
    ours = torch.func.grad(lambda t: ops.layer_norm(x, w, t).sin().sum())(b)
    plain = torch.func.grad(lambda t: torch.nn.functional.layer_norm(x, (64,), w, t).sin().sum())(b)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)

    class Norm(torch.nn.Module):
        def forward(self, t, w, b):
            return ops.layer_norm(t, w, b)

    assert "fastllm.layer_norm" in torch.export.export(Norm(), (x, w, b)).graph_module.code
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert ops.layer_norm(torch.empty(4, 64), torch.empty(64)).shape == (4, 64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(2, 8), torch.randn(7)), ValueError, r"weight \(7,\) must be the last dimension of x \(2, 8\)"),
        ((torch.randn(2, 8), torch.randn(8), torch.randn(1, 8)), ValueError, r"bias \(1, 8\) must be the last"),
        ((torch.randn(2, 8).double(), torch.randn(8).double()), TypeError, "x is float64, allowed: float32, bfloat16"),
        ((torch.randn(2, 8), torch.randn(8), torch.randn(8).half()), TypeError, "bias is torch.float16, x is"),
        ((torch.randn(2, 8), torch.randn(8), None, 1e-6, torch.randn(1, 8)), ValueError, r"residual \(1, 8\) != x"),
        ((torch.randn(2, 8), torch.randn(8, device="meta")), ValueError, "weight is on meta, x on cpu"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.layer_norm(*arguments)


def test_gradients_of_a_row_far_from_zero():
    """A row all alike has none, and what lies beyond its end has no part in it."""
    x = torch.full((2, 17), 2.0**121, requires_grad=True)
    ops.layer_norm(x, torch.ones(17)).sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 17))
