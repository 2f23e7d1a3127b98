"""linear_cross_entropy: what only this op must promise."""

import math

import _oracle
import pytest
import torch

from fastllm import ops
from fastllm.bench.cases.linear_cross_entropy import EVERY, SUITE, plain
from fastllm.bench.harness import peak_memory
from fastllm.ops import LossSpec, _head
from fastllm.ops._op import OPS

NONE = LossSpec(reduction="none")


@pytest.fixture(params=[1 << 30, 1], ids=["one block", "blocks of 32 rows"])
def block(request, monkeypatch):
    """The same cases in one block of rows and in several."""
    monkeypatch.setattr(_head, "CPU_BYTES", request.param)


def draw(rows=70, depth=24, vocab=300, bias=False):
    x, weight = torch.randn(rows, depth, requires_grad=True), (torch.randn(vocab, depth) / 3).requires_grad_()
    return x, weight, torch.randint(vocab, (rows,)), torch.randn(vocab, requires_grad=True) if bias else None


@_oracle.dtypes(SUITE)
@_oracle.cases(SUITE)
def test_forward_and_gradients_in_blocks_of_32_rows(case, dtype, monkeypatch):
    """And dx in pieces of the vocabulary, each added to those before."""
    monkeypatch.setattr(_head, "CPU_BYTES", 1)
    monkeypatch.setattr(_head, "CPU_DEPTH", 24)
    _oracle.check_forward_and_gradients(SUITE, case, dtype)


@pytest.mark.parametrize("label", ["3x7 to 5", "9x48 to 1030 ignored reduction none"])
def test_compile_fullgraph(label):
    _oracle.check_compile(SUITE, next(c for c in SUITE.correct if c.label == label))


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, False]])
def test_opcheck(needs):
    x, weight, target, bias = (t if t is None else t.detach() for t in draw(5, 6, 20, bias=True))
    given = (x, weight, bias, target, -100, 0.1, 5.0, 0.01, False)
    torch.library.opcheck(OPS["linear_cross_entropy"].raw, given)
    torch.library.opcheck(OPS["linear_cross_entropy_gradients"].raw, (torch.rand(5), *given, needs))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_equals_finite_differences(reduction):
    """Of the float64 formula, along random directions of every input, all options together."""
    spec = LossSpec(**EVERY, reduction=reduction)
    x, weight, target, bias = draw(5, 7, 11, bias=True)
    target[2], up = -100, torch.randn(5) if reduction == "none" else torch.tensor(0.7)
    inputs = (x, weight, bias)
    loss = ops.linear_cross_entropy(x, weight, target, bias, spec=spec)
    ours = torch.autograd.grad(loss, inputs, up)
    for place in range(3):
        direction = torch.randn_like(inputs[place]).double()

        def moved(step, place=place, direction=direction):
            values = [t.detach().double() + (step * direction if i == place else 0) for i, t in enumerate(inputs)]
            return (plain(values[0], values[1], target, values[2], spec=spec) * up.double()).sum()

        numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert (ours[place].double() * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tied_weights(reduction, block):
    """One tensor as embedding and as head: its gradient is the sum of both, as without fusion."""
    spec, table, ids = LossSpec(reduction=reduction), torch.randn(50, 12, requires_grad=True), torch.randint(50, (90,))

    def gradient(loss):
        x = torch.nn.functional.embedding(ids, table).sin()
        return torch.autograd.grad(loss(x, table, ids.roll(-1), spec=spec).sum(), table)[0]

    torch.testing.assert_close(gradient(ops.linear_cross_entropy), gradient(plain))


def test_a_loss_has_the_bits_of_its_parts():
    """ops.linear, then cross_entropy on its logits; in any batch, with or without gradient."""
    x, weight, target, bias = draw(100, 40, 515, bias=True)
    with torch.no_grad():
        whole = ops.linear_cross_entropy(x, weight, target, bias, spec=NONE)
        assert torch.equal(whole, ops.cross_entropy(ops.linear(x, weight, bias), target, spec=NONE))
        for rows in (1, 2, 33):
            part = ops.linear_cross_entropy(x[:rows], weight, target[:rows], bias, spec=NONE)
            assert torch.equal(part, whole[:rows])
        mean = ops.linear_cross_entropy(x, weight, target, bias)
    assert torch.equal(mean, ops.linear_cross_entropy(x, weight, target, bias).detach())


def test_ignored_rows_are_not_looked_at(block):
    x, weight, target, _ = draw(80)
    with torch.no_grad():
        x[10:20] = math.nan
    target[10:20], token_weight = -100, torch.ones(80)
    target[40], token_weight[40] = 10**6, 0.0
    for spec in (LossSpec(), NONE):
        loss = ops.linear_cross_entropy(x, weight, target, token_weight=token_weight, spec=spec)
        dx, dw = torch.autograd.grad(loss.sum(), (x, weight))
        assert (dx[10:20] == 0).all() and (dx[40] == 0).all() and dx[41:].abs().sum(1).gt(0).all()
        assert dw.isfinite().all() and loss.isfinite().all()
    target[:] = -100
    loss = ops.linear_cross_entropy(x, weight, target)
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (x, weight)))


def test_a_nan_row_stays_in_its_row():
    x, weight, target, _ = draw(5)
    with torch.no_grad():
        x[3, 2] = math.nan
    loss = ops.linear_cross_entropy(x, weight, target, spec=NONE)
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isnan().tolist() == dx.isnan().any(1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_backward_again_and_retained(scale):
    """Nothing that is saved changes: a second backward, and gradients that the caller has changed meanwhile."""
    x, weight, target, _ = draw()
    expected = torch.autograd.grad(plain(x, weight, target) * scale, (x, weight))
    loss = ops.linear_cross_entropy(x, weight, target) * scale
    for _ in range(2):
        for ours, theirs in zip(torch.autograd.grad(loss, (x, weight), retain_graph=True), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    loss.backward()
    ops.linear_cross_entropy(x, weight, target).backward(torch.tensor(scale))
    torch.testing.assert_close(x.grad, 2 * expected[0])
    torch.testing.assert_close(weight.grad, 2 * expected[1])


def test_the_same_bits_again():
    x, weight, target, _ = draw(200)
    runs = [torch.autograd.grad(ops.linear_cross_entropy(x, weight, target), (x, weight)) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_memory(monkeypatch):
    """A block of logits beside the gradients; a frozen head costs no dW; inference keeps nothing."""
    rows, depth, vocab = 1024, 32, 4096
    monkeypatch.setattr(_head, "CPU_BYTES", 128 * vocab * 4)
    x, weight, target, _ = draw(rows, depth, vocab)
    block, slack = 128 * (vocab + 16) * 4, 1 << 19
    slack += max(2, torch.get_num_threads()) << 20  # a thread's panels that dx packs, or the block that dW transposes

    def used(inputs, frozen):
        return peak_memory(lambda: torch.autograd.grad(ops.linear_cross_entropy(x, frozen, target), inputs), "cpu")

    assert used((x, weight), weight) < block + (vocab + rows) * depth * 4 + slack
    assert used((x,), weight.detach()) < block + rows * depth * 4 + slack
    with torch.no_grad():
        assert peak_memory(lambda: ops.linear_cross_entropy(x, weight, target), "cpu") < block + slack


@pytest.mark.parametrize("rows", [1, 2, 3, 63, 64, 127, 128, 1000, 4096])
def test_a_gradient_is_rounded_within_its_own_memory(rows):
    wide = torch.randn(rows, 24)
    for dtype in (torch.bfloat16, torch.float16):
        expected, own = wide.to(dtype), wide.clone()
        narrow = _head.narrowed(own, dtype)
        assert torch.equal(narrow, expected) and narrow.is_contiguous() and narrow.data_ptr() == own.data_ptr()
    assert _head.narrowed(wide, torch.float32) is wide


def test_memory_of_a_gradient_of_16_bits(monkeypatch):
    """dW in fp32, and no second one of 16 bits beside it."""
    rows, depth, vocab = 128, 512, 4096
    monkeypatch.setattr(_head, "CPU_BYTES", 32 * vocab * 4)
    x, weight, target, _ = draw(rows, depth, vocab)
    half = weight.detach().bfloat16().requires_grad_()

    def used():
        loss = ops.linear_cross_entropy(x.detach().bfloat16(), half, target)
        torch.autograd.grad(loss, half)

    widened, block = vocab * depth * 4, 32 * (vocab + 16) * 4
    slack = max(2, torch.get_num_threads()) << 20
    assert peak_memory(used, "cpu") < widened + vocab * depth * 4 + block + slack


def test_float16_under_a_loss_scale():
    _oracle.check_float16_gradients()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_in_every_lane(reduction):
    """Eager, compiled and under functorch, with a loss scale that float16 does not hold."""
    x, weight, target, _ = (t if t is None else t.detach() for t in draw(9, 8, 30))
    x, weight, spec = x.half(), weight.half(), LossSpec(reduction=reduction)

    def value(w):
        return ops.linear_cross_entropy(x, w, target, spec=spec) * 65536.0 / (9 if reduction == "sum" else 1)

    leaf = weight.clone().requires_grad_()
    (eager,) = torch.autograd.grad(value(leaf), leaf)
    torch._dynamo.reset()
    (compiled,) = torch.autograd.grad(torch.compile(value, fullgraph=True)(leaf), leaf)
    traced = torch.func.grad(value)(weight)
    both = torch.func.vmap(torch.func.grad(value))(torch.stack((weight, weight)))
    assert eager.isfinite().all() and eager.abs().max() > 100
    for other in (compiled, traced, both[1]):
        torch.testing.assert_close(other, eager, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_factor_of_the_loss_is_not_rounded(dtype):
    """Compiled and under functorch too, where 1/3 in 16 bits would turn the whole gradient by 2^-9."""
    x, weight, target, _ = (t if t is None else t.detach() for t in draw(9, 8, 30))
    x, leaf = x.to(dtype), weight.to(dtype).requires_grad_()

    def value(w):
        return ops.linear_cross_entropy(x, w, target) / 3

    (eager,) = torch.autograd.grad(value(leaf), leaf)
    torch._dynamo.reset()
    (compiled,) = torch.autograd.grad(torch.compile(value, fullgraph=True, backend="aot_eager")(leaf), leaf)
    both = torch.func.vmap(torch.func.grad(value))(torch.stack((leaf, leaf)).detach())
    for other in (compiled, torch.func.grad(value)(leaf.detach()), both[1]):
        assert torch.equal(other, eager)


def test_functorch_and_export():
    x, weight, target, _ = (t if t is None else t.detach() for t in draw(6, 8, 30))
    for spec in (LossSpec(), LossSpec(reduction="none")):

        def value(function, w, spec=spec):
            return function(x, w, target, spec=spec).sin().sum()

        ours = torch.func.grad(lambda w, value=value: value(ops.linear_cross_entropy, w))(weight)
        torch.testing.assert_close(ours, torch.func.grad(lambda w, value=value: value(plain, w))(weight))

    class Loss(torch.nn.Module):
        def forward(self, x, w, t):
            return ops.linear_cross_entropy(x, w, t)

    assert "fastllm.linear_cross_entropy" in torch.export.export(Loss(), (x, weight, target)).graph_module.code


@pytest.mark.parametrize("bad", [-1, 300])
def test_targets_outside_errors(bad, block):
    x, weight, target, _ = draw()
    target[60], target[5] = bad, -100
    for spec in (LossSpec(), NONE):
        with pytest.raises(IndexError, match=rf"target {bad} of row 60 is outside \[0, 300\)"):
            ops.linear_cross_entropy(x, weight, target, spec=spec)


X, WEIGHT, TARGET = torch.randn(3, 8), torch.randn(9, 8), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.double(), WEIGHT, TARGET), TypeError, "x is float64, allowed: float32, bfloat16"),
        ((X, WEIGHT.half(), TARGET), TypeError, "weight is torch.float16, x is torch.float32"),
        ((X, WEIGHT.t(), TARGET), ValueError, r"x \(3, 8\) must be \[T, H\] and weight \(8, 9\) \[V, H\]"),
        ((X[None], WEIGHT, TARGET), ValueError, r"x \(1, 3, 8\) must be \[T, H\]"),
        ((X, WEIGHT, TARGET, torch.randn(8)), ValueError, r"bias \(8,\) must be \[9\]"),
        ((X, WEIGHT, TARGET[:2]), ValueError, r"target \(2,\) must be \[3\], one for each row of x"),
        ((X, WEIGHT, TARGET, None, torch.ones(2)), ValueError, r"token_weight \(2,\)"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(*arguments)
