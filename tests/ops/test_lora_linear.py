"""lora_linear: the bits of its chain, its mask, and that it is the merged weight's linear."""

import math

import _build
import _contract
import _oracle
import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.case import Make
from fastllm.bench.cases.lora_linear import QUANTISED, SUITE, case
from fastllm.bench.cases.quant_linear import FORMATS, random_weight
from fastllm.ops import Dropout, LoraSpec, Panels, QWeight
from fastllm.ops._dropout import keep
from fastllm.ops._op import OPS
from fastllm.ops.lora_linear import row_norms, split

QUANTS = (*FORMATS, "int4 g128", "8 bits + minimum g64")
FORM = pytest.mark.parametrize("form", ["rows", "panels", *QUANTS])


@pytest.mark.parametrize("case", QUANTISED, ids=[c.label for c in QUANTISED])
def test_over_a_quantised_base(case):
    _oracle.check_forward_and_gradients(SUITE, case, torch.float32)
    _oracle.check_guards(SUITE, case, torch.float32)


@pytest.mark.parametrize("case", [c for c in QUANTISED if " p " not in c.label], ids=lambda c: c.label)
def test_contract_over_a_quantised_base(case):
    _oracle.check_contract(SUITE, case, torch.float32)


@pytest.mark.parametrize(
    "case",
    [case(13, 33, cols=40, rank=5, p=0.5, bias=True), case(4, 64, cols=40, rank=3, form="panels", magnitude=True)],
    ids=lambda c: c.label,
)
def test_compile_fullgraph(case):
    _oracle.check_compile(SUITE, case)


def test_calls_are_compiled_together():
    weight = torch.randn(6, 8)

    def dropped(call, x, a, b):
        return ops.lora_linear(x, weight, a, b, LoraSpec(0.5, Dropout(0.5, seed=3, call=call)))

    _oracle.check_compiled_calls(dropped, [torch.randn(*s, requires_grad=True) for s in ((4, 8), (2, 8), (6, 2))])


def test_opcheck():
    x, a, b = torch.randn(5, 64), torch.randn(3, 64), torch.randn(20, 3)
    bias, gain, s, dz = torch.randn(20), torch.rand(20), torch.randn(5, 3), torch.randn(5, 20)
    weight = torch.randn(20, 64)
    for held in (weight, Panels.pack(weight), QWeight.quantize(weight, 4)):
        torch.library.opcheck(OPS["lora_linear"].raw, (x, *split(held), a, b, 0.5, bias, gain, 0.5, 7, 1, False))
        torch.library.opcheck(OPS["lora_linear_backward"].raw, (dz, x, s, *split(held), a, b, 0.5, 0.5, 7, 1, True))
        torch.library.opcheck(OPS["lora_row_norms"].raw, (*split(held), a, b, 0.5))
    torch.library.opcheck(OPS["lora_linear_backward"].raw, (dz, x, s, weight, [], a, b, 0.5, 0.0, 0, 0, False))


# ------------------------------------------------------------------------------------------------------ bits of a chain


def draw(rows: int, depth: int, cols: int, rank: int, form: str = "rows"):
    x, a, b = torch.randn(rows, depth), torch.randn(rank, depth) * depth**-0.5, torch.randn(cols, rank)
    if form in QUANTS:
        return x, random_weight(Make(), cols, depth, form), a, b
    weight = torch.randn(cols, depth) * depth**-0.5
    return x, Panels.pack(weight) if form == "panels" else weight, a, b


def base(x, weight):
    return (ops.quant_linear if isinstance(weight, QWeight) else ops.linear)(x, weight)


def chain(acc, s, b):
    """acc continued over the rank."""
    for r in range(b.shape[1]):
        acc = _contract.fma(s[:, r, None].expand_as(acc).contiguous(), b[:, r].expand_as(acc).contiguous(), acc)
    return acc


@FORM
@pytest.mark.parametrize("rank", [1, 3, 16, 40])
@pytest.mark.parametrize("rows", [1, 3, 5, 30])
def test_bits_of_the_contract(rows, rank, form):
    x, weight, a, b = draw(rows, 288, 35, rank, form)  # K of two chains and a part of one
    bias, magnitude, scale = torch.randn(35), torch.rand(35) + 0.5, torch.tensor(0.3)
    s = scale * _contract.linear(x, a, None)
    low = chain(base(x, weight), s, b)
    assert torch.equal(ops.lora_linear(x, weight, a, b, LoraSpec(0.3)), low)
    assert torch.equal(ops.lora_linear(x, weight, a, b, LoraSpec(0.3), bias=bias), low + bias)
    gain = magnitude / row_norms(weight, a, b, 0.3)
    assert torch.equal(
        ops.lora_linear(x, weight, a, b, LoraSpec(0.3), bias=bias, magnitude=magnitude), low * gain + bias
    )


@pytest.mark.parametrize("rows", [1, 2, 5, 60])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_bits_with_dropout_are_those_of_the_dropped_x(rows, p):
    """s is that of drop(x), of the mask that the reference draws; K crosses its words of 64 columns."""
    x, weight, a, b = draw(rows, 200, 35, 3)
    spec = Dropout(p, seed=5, call=2)
    kept = keep(torch.arange(rows)[:, None], torch.arange(200), *spec.arguments())
    dropped = torch.where(kept, x * torch.tensor(1 / (1 - p)), 0.0)
    assert torch.equal(dropped, ops.dropout(x, spec))
    s = _contract.linear(dropped, a, None)
    assert torch.equal(ops.lora_linear(x, weight, a, b, LoraSpec(dropout=spec)), chain(base(x, weight), s, b))
    # a gradient of zero exactly where a place was dropped: b and weight let nothing else through
    leaf, low = x.clone().requires_grad_(), torch.ones(3, 200)
    ops.lora_linear(leaf, torch.zeros(35, 200), low, torch.ones(35, 3), LoraSpec(dropout=spec)).sum().backward()
    assert torch.equal(leaf.grad != 0, kept)


def test_dropout_of_zero_and_calls():
    x, weight, a, b = draw(6, 100, 35, 3)
    plain = ops.lora_linear(x, weight, a, b)
    assert torch.equal(ops.lora_linear(x, weight, a, b, LoraSpec(dropout=Dropout(0.0, seed=3))), plain)
    first, again, other = (
        ops.lora_linear(x, weight, a, b, LoraSpec(dropout=Dropout(0.5, 3, call))) for call in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(
        ops.lora_linear(x.view(2, 3, 100), weight, a, b, LoraSpec(dropout=Dropout(0.5, 3, 1))), first.view(2, 3, 35)
    )


@FORM
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("rows", [3, 5, 97])
def test_any_number_of_threads_forward_and_backward(rows, p, form):
    x, weight, a, b = draw(rows, 320, 200, 20, form)
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    drop, wanted = Dropout(p, 1) if p else None, None
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y = ops.lora_linear(x, weight, a, b, LoraSpec(0.7, drop))
            all_of_it = (y, *torch.autograd.grad(y.sin().sum(), (x, a, b)))
            wanted = all_of_it if wanted is None else wanted
            for ours, one in zip(all_of_it, wanted, strict=True):
                assert torch.equal(ours, one), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


@_oracle.dtypes(SUITE)
@FORM
def test_zero_b_is_the_frozen_linear(form, dtype):
    """As an adapter starts: its forward and dx are the base's, bit for bit."""
    if form in QUANTS and dtype != torch.float32:
        return
    x, weight, a, b = draw(13, 96, 35, 4, form)
    weight = weight.to(dtype) if torch.is_tensor(weight) else weight
    x, a, b = (t.to(dtype).requires_grad_() for t in (x, a, torch.zeros_like(b)))
    y = ops.lora_linear(x, weight, a, b, LoraSpec(2.0))
    assert torch.equal(y, base(x, weight))
    if not torch.is_tensor(weight):
        (ours,), (plain,) = (torch.autograd.grad(t.sin().sum(), x) for t in (y, base(x, weight)))
        assert torch.equal(ours, plain)


def test_equals_the_merged_weight():
    x, weight, a, b = draw(40, 300, 64, 16)
    merged = weight + 0.5 * b @ a
    torch.testing.assert_close(
        ops.lora_linear(x, weight, a, b, LoraSpec(0.5)), ops.linear(x, merged), rtol=1e-5, atol=1e-5
    )
    magnitude = torch.rand(64) + 0.5
    merged = magnitude[:, None] * merged / merged.norm(dim=1, keepdim=True)
    ours = ops.lora_linear(x, weight, a, b, LoraSpec(0.5), magnitude=magnitude)
    torch.testing.assert_close(ours, ops.linear(x, merged), rtol=1e-5, atol=1e-5)


@FORM
@pytest.mark.parametrize("dtype", SUITE.dtypes)
@pytest.mark.parametrize(("rows", "depth", "rank"), [(1, 1, 1), (17, 33, 3), (40, 96, 16), (35, 576, 40)])
def test_row_norms(rows, depth, rank, dtype, form):
    if form in QUANTS:
        if depth % 32 or dtype != torch.float32:
            pytest.skip("QWeight takes float32 and K a multiple of 32")
        weight = random_weight(Make(seed=rank), rows, depth, form)
        dense = weight.dequantize()
    else:
        dense = torch.randn(rows, depth).to(dtype)
        weight = Panels.pack(dense) if form == "panels" else dense
    a, b = torch.randn(rank, depth).to(dtype), torch.randn(rows, rank).to(dtype)
    ours, before = row_norms(weight, a, b, 0.3), torch.get_num_threads()
    exact = (dense.double() + 0.3 * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=0)
    assert torch.equal(row_norms(weight, a.t().contiguous().t(), b[:, :], 0.3), ours)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(row_norms(weight, a, b, 0.3), ours), f"{threads} threads"
    finally:
        torch.set_num_threads(before)
    zero = row_norms(weight, a, torch.zeros_like(b), 1.0)
    torch.testing.assert_close(zero.double(), dense.double().norm(dim=1), rtol=2e-6, atol=0)


def test_dora_at_its_start_is_the_frozen_linear():
    """magnitude = ||W||, B = 0."""
    x, weight, a, b = draw(7, 300, 64, 16)
    ours = ops.lora_linear(x, weight, a, torch.zeros_like(b), magnitude=weight.norm(dim=1))
    torch.testing.assert_close(ours, ops.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_saves_x_and_s_alone():
    x, weight, a, b = draw(7, 300, 64, 16)
    a, b, sizes = a.requires_grad_(), b.requires_grad_(), []
    given = {t.data_ptr() for t in (x, weight, a, b)}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(tuple(t.shape)) if t.data_ptr() not in given else None) or t, lambda t: t
    ):
        ops.lora_linear(x, weight, a, b, LoraSpec(dropout=Dropout(0.1, 3)), bias=torch.randn(64))
    assert sizes == [(7, 16)]


MANY_ROWS = """
import torch
from fastllm import ops
for rows, depth, cols in (600, 576, 192), (2100, 96, 64), (4200, 40, 24), (1024, 1024, 256), (48, 2048, 1024):
    x, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((rows, depth), (8, depth), (cols, 8)))
    w, d = torch.randn(cols, depth), torch.randn(rows, cols)
    ours = torch.autograd.grad(ops.lora_linear(x, w, a, b), (x, a, b), d)
    wanted = torch.autograd.grad(x @ w.T + x @ a.T @ b.T, (x, a, b), d)
    print(max(float((o - t).norm() / t.norm()) for o, t in zip(ours, wanted)) < 1e-5)
"""


def test_gradients_of_many_rows():
    """More than columns; a multiple of 4 KiB apart. In a process whose scratch memory no larger op has made."""
    assert _build.python(MANY_ROWS).stdout.split() == ["True"] * 5


def test_gradients_that_nobody_wants_are_not_made():
    tensors = draw(4, 33, 10, 3)
    for wanted in range(4):
        if wanted == 1:
            continue
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        ops.lora_linear(*leaves).sum().backward()
        assert [t.grad is not None for t in leaves] == [t.requires_grad for t in leaves]


def test_nan_and_infinity_stay_in_their_row():
    x, weight, a, b = draw(13, 70, 37, 4)
    clean = ops.lora_linear(x, weight, a, b)
    for value in (float("nan"), float("inf")):
        dirty = x.clone()
        dirty[6, 41] = value
        y = ops.lora_linear(dirty, weight, a, b)
        assert not y[6].isfinite().any()
        assert torch.equal(y[:6], clean[:6]) and torch.equal(y[7:], clean[7:])


def test_replayed_with_new_inputs():
    x, weight, a, b = draw(3, 65, 33, 4, "panels")
    plan = _C.Plan()
    plan.begin()
    y = ops.lora_linear(x, weight, a, b, LoraSpec(0.5))
    plan.end()
    for t in (x, a, b):
        t.normal_()
    assert plan.replay() == 0 and torch.equal(y, ops.lora_linear(x, weight, a, b, LoraSpec(0.5)))


X, W, A, B = torch.randn(2, 8), torch.randn(6, 8), torch.randn(3, 8), torch.randn(6, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.lora_linear(X, W, A, torch.randn(6, 4)), ValueError, r"a \(3, 8\) and b \(6, 4\) must be \[R, 8\] and"),
        (lambda: ops.lora_linear(X, W, torch.randn(3, 7), B), ValueError, r"a \(3, 7\) and b \(6, 3\)"),
        (lambda: ops.lora_linear(X, W, torch.randn(0, 8), torch.randn(6, 0)), ValueError, "R >= 1"),
        (lambda: ops.lora_linear(X, W, A.half(), B), TypeError, "a is torch.float16, x is torch.float32"),
        (lambda: ops.lora_linear(X, W.half(), A, B), TypeError, "weight is torch.float16"),
        (lambda: ops.lora_linear(X.double(), W.double(), A, B), TypeError, "x is float64, allowed"),
        (lambda: ops.lora_linear(X, torch.randn(8), A, B), ValueError, r"weight must be \[N, K\], Panels or QWeight"),
        (lambda: ops.lora_linear(X, W.clone().requires_grad_(), A, B), ValueError, r"requires a gradient, but the base is"),
        (lambda: ops.lora_linear(torch.randn(2, 7), W, A, B), ValueError, r"x \(2, 7\) must end in the weight's input size 8"),
        (lambda: ops.lora_linear(X, Panels.pack(W, True), A, B), ValueError, "packed with swiglu; pack its halves apart"),
        (
            lambda: ops.lora_linear(torch.randn(2, 32).half(), QWeight.quantize(torch.randn(6, 32), 8), A, B),
            TypeError,
            "x beside a QWeight is float16, allowed: float32",
        ),
        (lambda: ops.lora_linear(X, W, A, B, 0.5), TypeError, r"spec is 0.5; pass LoraSpec\(scale=0.5\)"),
        (lambda: LoraSpec(math.nan), ValueError, "LoraSpec: scale is nan, allowed: a finite number"),
        (lambda: ops.lora_linear(X, W, A, B, bias=torch.randn(5)), ValueError, r"bias has shape \(5,\), want \(6,\)"),
        (lambda: ops.lora_linear(X, W, A, B, magnitude=torch.randn(5)), ValueError, "magnitude has shape"),
        (lambda: ops.lora_linear(X, W, A.to("meta"), B), ValueError, "a is on meta, x on cpu"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
