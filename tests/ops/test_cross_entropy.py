"""cross_entropy: what only this op must promise."""

import math

import _oracle
import pytest
import torch

from fastllm import ops
from fastllm.bench.cases.cross_entropy import EVERY, SUITE, plain
from fastllm.ops import LossSpec
from fastllm.ops._op import OPS

NONE = LossSpec(reduction="none")


def test_compile_fullgraph():
    _oracle.check_compile(SUITE, SUITE.correct[3])
    _oracle.check_compile(SUITE, SUITE.correct[8])


def test_opcheck():
    logits, target, spec = torch.randn(4, 33), torch.tensor([1, -100, 32, 0]), (-100, 0.1, 5.0, 0.01)
    torch.library.opcheck(OPS["cross_entropy"].raw, (logits, target, *spec))
    loss, stats = OPS["cross_entropy"].raw(logits, target, *spec)
    torch.library.opcheck(OPS["cross_entropy_backward"].raw, (torch.randn_like(loss), logits, target, stats, *spec))


def test_gradient_equals_finite_differences():
    """Of the float64 formula, at every element, all options together."""
    spec = LossSpec(**EVERY)
    logits, target = (torch.randn(3, 11) * 2).double(), torch.tensor([4, -100, 0])
    step = 1e-6 * torch.eye(33, dtype=torch.float64).view(33, 3, 11)
    numeric = [(plain(logits + s, target, None, spec) - plain(logits - s, target, None, spec)) / 2e-6 for s in step]
    x = logits.float().requires_grad_()
    (ours,) = torch.autograd.grad(ops.cross_entropy(x, target, spec=spec), x)
    torch.testing.assert_close(ours.double(), torch.stack(numeric).view(3, 11), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", SUITE.dtypes)
def test_ignored_rows_are_not_looked_at(dtype):
    logits = torch.randn(4, 50).to(dtype)
    logits[1], logits[2] = math.nan, math.inf
    weight, target = torch.tensor([1.0, 1.0, 0.0, 2.0]), torch.tensor([3, 7, -5, 49])
    logits.requires_grad_()
    loss = ops.cross_entropy(logits, target, weight, LossSpec(ignore_index=7, reduction="none"))
    (d,) = torch.autograd.grad(loss.sum(), logits)
    assert loss[1:3].tolist() == [0, 0] and loss[::3].gt(0).all()
    assert (d[1:3] == 0).all() and d[::3].abs().sum(1).gt(0).all()


@pytest.mark.parametrize("weight", [None, torch.zeros(3)])
def test_the_mean_of_nothing_is_zero(weight):
    logits = torch.randn(3, 9, requires_grad=True)
    target = torch.full((3,), -100) if weight is None else torch.tensor([1, 2, 3])
    loss = ops.cross_entropy(logits, target, weight)
    (d,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and (d == 0).all()
    assert ops.cross_entropy(logits[:0], target[:0]) == 0


@pytest.mark.parametrize("dtype", SUITE.dtypes)
def test_infinite_and_nan_rows_stay_in_their_row(dtype):
    inf = math.inf
    logits = torch.randn(6, 1100).to(dtype)
    logits[0, 5], logits[1], logits[2, 1099], logits[3, 7], logits[4, 500:] = math.nan, -inf, inf, -inf, -inf
    logits[4, :300] = -inf
    logits.requires_grad_()
    target = torch.tensor([1, 1, 1, 7, 400, 3])
    loss = ops.cross_entropy(logits, target, spec=NONE)
    (d,) = torch.autograd.grad(loss.sum(), logits)
    assert loss[:3].isnan().all() and loss[3] == inf and loss[4:].isfinite().all()
    assert d[:3].isnan().all() and d[3:].isfinite().all() and (d[4, :300] == 0).all() and (d[4, 500:] == 0).all()
    capped = ops.cross_entropy(logits.detach(), target, spec=LossSpec(softcap=10.0, reduction="none"))
    assert capped[0].isnan() and capped[1] == pytest.approx(math.log(1100), rel=1e-5) and capped[2:].isfinite().all()


def test_upstream_gradient_reaches_each_row():
    logits, target, up = torch.randn(5, 70, requires_grad=True), torch.randint(70, (5,)), torch.randn(5)
    (ours,) = torch.autograd.grad(ops.cross_entropy(logits, target, spec=NONE), logits, up)
    for i in range(5):
        (one,) = torch.autograd.grad(ops.cross_entropy(logits[i : i + 1], target[i : i + 1]), logits)
        torch.testing.assert_close(ours[i], one[i] * up[i])


def test_memory_holds_one_gradient():
    from fastllm.bench.harness import peak_memory

    logits, target = torch.randn(64, 8192, requires_grad=True), torch.randint(8192, (64,))
    used = peak_memory(lambda: torch.autograd.grad(ops.cross_entropy(logits, target), logits), "cpu")
    assert used < 1.05 * logits.numel() * 4


def test_functorch_and_export():
    logits, target = torch.randn(4, 30), torch.randint(30, (4,))
    ours = torch.func.grad(lambda t: ops.cross_entropy(t, target).sin())(logits)
    torch.testing.assert_close(ours, torch.func.grad(lambda t: plain(t, target).sin())(logits))
    batched = torch.func.vmap(lambda t: ops.cross_entropy(t, target))(torch.stack((logits, -logits)))
    torch.testing.assert_close(batched, torch.stack((plain(logits, target), plain(-logits, target))))

    class Loss(torch.nn.Module):
        def forward(self, x, t):
            return ops.cross_entropy(x, t)

    assert "fastllm.cross_entropy" in torch.export.export(Loss(), (logits, target)).graph_module.code


@pytest.mark.parametrize("bad", [-1, 9, 2**40])
@pytest.mark.parametrize("spec", [LossSpec(), LossSpec(ignore_index=5)])
def test_targets_outside_errors(bad, spec):
    with pytest.raises(IndexError, match=rf"target {bad} of row 1 is outside \[0, 9\)"):
        ops.cross_entropy(torch.randn(3, 9), torch.tensor([spec.ignore_index, bad, 8]), spec=spec)


LOGITS, TARGET = torch.randn(3, 9), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.cross_entropy(LOGITS.double(), TARGET),
            TypeError,
            "logits is float64, allowed: float32, bfloat16",
        ),
        (lambda: ops.cross_entropy(LOGITS[0], TARGET), ValueError, r"logits \(9,\) must be \[T, V\]; flatten"),
        (lambda: ops.cross_entropy(LOGITS, TARGET.int()), TypeError, "target is int32, allowed: int64"),
        (lambda: ops.cross_entropy(LOGITS, TARGET[:2]), ValueError, r"target \(2,\) must be \[3\]"),
        (lambda: ops.cross_entropy(LOGITS, TARGET.to("meta")), ValueError, "target is on meta, logits on cpu"),
        (lambda: ops.cross_entropy(LOGITS, TARGET, torch.ones(2)), ValueError, r"token_weight \(2,\) on cpu must be"),
        (lambda: ops.cross_entropy(LOGITS, TARGET, TARGET), TypeError, "token_weight is int64, allowed: float32"),
        (
            lambda: ops.cross_entropy(LOGITS, TARGET, torch.ones(3, requires_grad=True)),
            ValueError,
            'token_weight gets no gradient here; take reduction="none"',
        ),
        (lambda: LossSpec(label_smoothing=1.5), ValueError, "label_smoothing is 1.5, allowed: 0 to 1"),
        (lambda: LossSpec(softcap=0.0), ValueError, "softcap is 0.0, allowed: a positive number"),
        (lambda: LossSpec(z_loss=-1.0), ValueError, "z_loss is -1.0, allowed: a number >= 0"),
        (lambda: LossSpec(reduction="max"), ValueError, "reduction is 'max', allowed: none, mean, sum"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
