"""rms_norm: what only this op must promise."""

import _contract
import _oracle
import pytest
import torch

from fastllm import ops
from fastllm.bench.cases.rms_norm import SUITE
from fastllm.ops._op import OPS


def test_compile_fullgraph():
    _oracle.check_compile(SUITE, SUITE.correct[4])
    _oracle.check_compile(SUITE, SUITE.correct[10])


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(residual):
    x, weight = torch.randn(4, 33), torch.randn(33)
    r = torch.randn(4, 33) if residual else None
    torch.library.opcheck(OPS["rms_norm"].raw, (x, weight, 1e-6, r))
    y, s, rstd = OPS["rms_norm"].raw(x, weight, 1e-6, r)
    torch.library.opcheck(OPS["rms_norm_backward"].raw, (torch.randn_like(y), r, s if residual else x, weight, rstd))


@_oracle.dtypes(SUITE)
@pytest.mark.parametrize("cols", [1, 7, 100, 576, 4097])
def test_bits_of_the_contract(cols, dtype):
    x, w = torch.randn(3, cols).to(dtype), torch.randn(cols).to(dtype)
    assert torch.equal(ops.rms_norm(x, w), _contract.rms_norm(x, w))


def test_residual_equals_addition_then_norm():
    x, r, w = torch.randn(5, 300).bfloat16(), torch.randn(5, 300).bfloat16(), torch.randn(300).bfloat16()
    y, s = ops.rms_norm(x, w, residual=r)
    assert torch.equal(s, x + r) and torch.equal(y, ops.rms_norm(x + r, w))


def test_zero_nan_and_infinite_rows_stay_in_their_row():
    x = torch.randn(4, 40)
    x[0], x[1, 3], x[2, 5] = 0.0, float("nan"), float("inf")
    y = ops.rms_norm(x, torch.ones(40))
    assert (
        (y[0] == 0).all() and y[1].isnan().all() and y[2, 5].isnan() and (y[2, :5] == 0).all() and y[3].isfinite().all()
    )


def test_functorch_export_and_fake():
    x, w = torch.randn(4, 64), torch.randn(64)
    per_row = torch.func.vmap(lambda row: ops.rms_norm(row, w))(x)
    torch.testing.assert_close(per_row, ops.rms_norm(x, w))
    ours = torch.func.grad(lambda t: ops.rms_norm(t, w).sin().sum())(x)
    plain = torch.func.grad(lambda t: torch.nn.functional.rms_norm(t, (64,), w, 1e-6).sin().sum())(x)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)

    class Norm(torch.nn.Module):
        def forward(self, t, w):
            return ops.rms_norm(t, w)

    assert "fastllm.rms_norm" in torch.export.export(Norm(), (x, w)).graph_module.code
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert ops.rms_norm(torch.empty(4, 64), torch.empty(64)).shape == (4, 64)


def test_functorch_within_a_compiled_function():
    """Dynamo shows an op neither requires_grad nor the transform there: the gradient was zero, with no word."""
    x, w = torch.randn(4, 64), torch.randn(64)
    total = lambda t: ops.rms_norm(t * 2, w).sin().sum()  # noqa: E731
    step = lambda t: t + torch.func.grad(total)(t)  # noqa: E731
    compiled = torch.compile(step, backend="aot_eager")
    torch.testing.assert_close(compiled(x), step(x))
    torch.testing.assert_close(compiled(-x), step(-x))
    rows = torch.func.vmap(torch.func.grad(total))
    torch.testing.assert_close(torch.compile(rows, backend="aot_eager")(x), rows(x))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.compile(lambda t: torch.func.jvp(total, (t,), (t,)), backend="aot_eager")(x)
    torch._dynamo.reset()  # what was compiled with breaks would serve here too
    with pytest.raises(torch._dynamo.exc.Unsupported, match="cannot differentiate|disable"):
        torch.compile(torch.func.grad(total), backend="aot_eager", fullgraph=True)(x)
    whole = torch.compile(torch.func.vmap(lambda row: ops.rms_norm(row, w)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(x), ops.rms_norm(x, w))  # a batch is no derivative


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(2, 8), torch.randn(7)), ValueError, r"weight \(7,\) must be the last dimension of x \(2, 8\)"),
        ((torch.randn(2, 8).double(), torch.randn(8).double()), TypeError, "x is float64, allowed: float32, bfloat16"),
        ((torch.randn(2, 8), torch.randn(8).half()), TypeError, "weight is torch.float16, x is torch.float32"),
        ((torch.randn(2, 8), torch.randn(8), 1e-6, torch.randn(1, 8)), ValueError, r"residual \(1, 8\) != x \(2, 8\)"),
        ((torch.randn(2, 8), torch.randn(8, device="meta")), ValueError, "weight is on meta, x on cpu"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.rms_norm(*arguments)
