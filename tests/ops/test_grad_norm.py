"""grad_norm: what only this op must promise."""

import math

import pytest
import torch

from fastllm import _C, ops
from fastllm.ops._op import OPS


def test_the_same_bits_with_one_thread_and_all():
    tensors = [torch.randn(n) for n in (40000, 3, 16384, 100_001, 0, 7)]
    previous = _C.set_thread_limit(1)
    try:
        alone = ops.grad_norm(tensors)
    finally:
        _C.set_thread_limit(previous)
    assert torch.equal(alone, ops.grad_norm(tensors))


def test_accuracy_does_not_fall_with_the_size():
    x = torch.randn(1_000_003)
    exact = x.double().square().sum().sqrt()
    assert abs(ops.grad_norm(x).double() - exact) <= 2**-23 * exact


def test_nan_infinity_overflow_and_nothing():
    x = torch.randn(50)
    for value, expected in ((math.nan, math.nan), (math.inf, math.inf), (-math.inf, math.inf), (1e30, math.inf)):
        x[7] = value
        norm = ops.grad_norm([torch.randn(3), x]).item()
        assert norm == expected or (math.isnan(norm) and math.isnan(expected))
    assert ops.grad_norm(torch.empty(0)) == 0


def test_gradient_runs_the_reference():
    x, y = torch.randn(5, 7, requires_grad=True), torch.randn(3, requires_grad=True)
    norm = ops.grad_norm([x, y])
    dx, dy = torch.autograd.grad(norm, (x, y))
    torch.testing.assert_close((dx, dy), ((x / norm).detach(), (y / norm).detach()))


def test_opcheck_and_compile():
    tensors = [torch.randn(5, 7), torch.randn(3)]
    torch.library.opcheck(OPS["grad_norm"].raw, (tensors,))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(ops.grad_norm, fullgraph=True)(tensors), ops.grad_norm(tensors))


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ([], ValueError, "tensors is an empty list"),
        (torch.randn(2).double(), TypeError, r"tensors\[0\] is float64, allowed: float32"),
        (
            [torch.randn(2), torch.randn(2).half()],
            TypeError,
            r"tensors\[1\] is torch.float16, tensors\[0\] torch.float32",
        ),
        ([torch.randn(2), torch.randn(2, device="meta")], ValueError, r"tensors\[1\] is on meta, tensors\[0\] on cpu"),
    ],
)
def test_errors(tensors, error, message):
    with pytest.raises(error, match=message):
        ops.grad_norm(tensors)
