"""linear: the contract's bits, and that what is fused equals the ops one after another."""

import math
import sys

import _contract
import _oracle
import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.cases.linear import SUITE
from fastllm.ops import Panels
from fastllm.ops._op import OPS

linear_file = sys.modules["fastllm.ops.linear"]  # the name `ops.linear` is the function's

PACKED = pytest.mark.parametrize("packed", [False, True], ids=["rows", "panels"])
FUSED = [
    {},
    {"bias": True},
    {"norm": True},
    {"residual": True},
    {"norm": True, "residual": True, "bias": True},
    {"swiglu": True},
    {"norm": True, "residual": True, "swiglu": True},
]


def label(case) -> str:
    return case.label


@pytest.mark.parametrize(
    "wanted", ["12x64 to 48", "4x65 to 33 +bias +norm +residual", "25x65 to 33 +norm +residual +swiglu"]
)
def test_compile_fullgraph(wanted):
    (case,) = [c for c in SUITE.correct if c.label == wanted]
    _oracle.check_compile(SUITE, case)


def test_compile_fullgraph_with_panels():
    panels, x = Panels.pack(torch.randn(37, 65)), torch.randn(6, 65)
    compiled = torch.compile(lambda t: ops.linear(t, panels), fullgraph=True)
    assert torch.equal(compiled(x), ops.linear(x, panels))
    table = torch.compile(lambda i: panels.rows_at(i), fullgraph=True)
    assert torch.equal(table(torch.tensor([[3, 36]])), panels.rows_at(torch.tensor([[3, 36]])))


def test_opcheck():
    x, weight, row = torch.randn(5, 33), torch.randn(20, 33), torch.randn(5, 20)
    panels = Panels.pack(weight)
    torch.library.opcheck(OPS["linear"].raw, (x, weight, torch.randn(20), torch.randn(33), 1e-6, row, False, False))
    torch.library.opcheck(OPS["linear"].raw, (x, weight, None, None, 1e-6, row[:, :10], True, False))
    torch.library.opcheck(OPS["linear"].raw, (x.half(), weight.half(), None, None, 1e-6, None, False, True))
    torch.library.opcheck(OPS["linear_exact"].raw, (x, weight, None, None, 1e-6, None, False, False))
    torch.library.opcheck(OPS["linear_panels"].raw, (x, panels.data, 20, None, None, 1e-6, row, 0, False))
    torch.library.opcheck(OPS["linear_panels"].raw, (x.half(), panels.data, 20, None, None, 1e-6, None, 2, True))
    for needed in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(OPS["linear_backward"].raw, (row, x, weight, *needed))
    torch.library.opcheck(OPS["linear_panels_backward"].raw, (row, panels.data, 20, 0))
    torch.library.opcheck(OPS["panel_rows"].raw, (torch.tensor([[0, 19]]), panels.data, 20))


# ------------------------------------------------------------------------------------------------------ bits of a chain


def draw(rows: int, depth: int, cols: int, dtype=torch.float32, bias=False, norm=False, residual=False, swiglu=False):
    """x, weight and the keyword arguments of a fused call."""
    weight = torch.randn(cols * (1 + swiglu), depth, dtype=dtype) * depth**-0.5
    given = {
        "bias": torch.randn(cols, dtype=dtype) if bias else None,
        "norm": torch.randn(depth, dtype=dtype) if norm else None,
        "residual": torch.randn(rows, cols, dtype=dtype) if residual else None,
        "swiglu": swiglu,
    }
    return torch.randn(rows, depth, dtype=dtype), weight, given


def part(given: dict, rows: slice) -> dict:
    """The arguments that belong to some of the rows."""
    return {**given, "residual": None if given["residual"] is None else given["residual"][rows]}


@PACKED
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 12, 13, 30])
@pytest.mark.parametrize(("depth", "cols"), [(1, 1), (33, 17), (100, 70), (2049, 20)])
def test_bits_of_the_contract(rows, depth, cols, packed):
    x, weight, given = draw(rows, depth, cols, bias=True)
    ours = ops.linear(x, Panels.pack(weight) if packed else weight, given["bias"])
    assert torch.equal(ours, _contract.linear(x, weight, given["bias"]))


@PACKED
@pytest.mark.parametrize("rows", [5, 12, 40])
@pytest.mark.parametrize("depth", [1000, 1024])
def test_rows_a_multiple_of_4_kib_apart(rows, depth, packed):
    """Which are copied first, where they are many and meet many columns: the same bits, gradients too."""
    wide, weight, given = draw(rows, 1024, 272, bias=True)
    x, weight = wide[:, :depth], weight[:, :depth].contiguous()
    apart = torch.full((rows, depth + 24), torch.nan)[:, :depth].copy_(x)
    assert x.stride(0) == 1024 and apart.stride(0) == depth + 24
    held = Panels.pack(weight) if packed else weight
    ours, theirs = (ops.linear(t, held, given["bias"]) for t in (x, apart))
    assert torch.equal(ours, theirs) and torch.equal(ours[:4], ops.linear(x[:4], held, given["bias"]))
    dy = torch.randn(rows, 2048)[:, :272]
    for d in (dy, dy.clone()):
        leaf = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(ops.linear(leaf, held), leaf, d)
        assert torch.equal(dx[:4], torch.autograd.grad(ops.linear(leaf[:4], held), leaf, d[:4])[0][:4])
        assert (dx - d @ weight).norm() <= 1e-5 * dx.norm()


@PACKED
@pytest.mark.parametrize("fused", FUSED, ids=" ".join)
def test_a_row_has_one_value_whatever_stands_beside_it(fused, packed):
    """Every count of rows takes its own way through the tiles; the depth crosses a block of them."""
    x, weight, given = draw(20, 2100, 40, **fused)
    weight = Panels.pack(weight, given["swiglu"]) if packed else weight
    whole = ops.linear(x, weight, **given)
    for count in range(1, 21):
        some = slice(20 - count, 20)
        assert torch.equal(ops.linear(x[some], weight, **part(given, some)), whole[some]), f"{count} rows"
    for i in range(20):
        row = slice(i, i + 1)
        assert torch.equal(ops.linear(x[row], weight, **part(given, row)), whole[row]), f"row {i} alone"


@_oracle.dtypes(SUITE)
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("fused", FUSED, ids=" ".join)
def test_panels_equal_rows(fused, rows, dtype):
    x, weight, given = draw(rows, 97, 45, dtype, **fused)
    assert torch.equal(ops.linear(x, Panels.pack(weight, given["swiglu"]), **given), ops.linear(x, weight, **given))


@PACKED
@_oracle.dtypes(SUITE)
@pytest.mark.parametrize("rows", [1, 4, 5, 60])
@pytest.mark.parametrize("depth", [7, 64, 577])
def test_fused_norm_is_rms_norm_then_linear(rows, depth, dtype, packed):
    x, weight, given = draw(rows, depth, 33, dtype, norm=True)
    weight = Panels.pack(weight) if packed else weight
    fused = ops.linear(x, weight, norm=given["norm"], eps=1e-3)
    assert torch.equal(fused, ops.linear(ops.rms_norm(x, given["norm"], 1e-3), weight))


@PACKED
@pytest.mark.parametrize("rows", [1, 4, 5, 60])
def test_fused_residual_and_bias_are_additions_in_this_order(rows, packed):
    x, weight, given = draw(rows, 65, 33, bias=True, residual=True)
    weight = Panels.pack(weight) if packed else weight
    assert torch.equal(ops.linear(x, weight, **given), ops.linear(x, weight) + given["bias"] + given["residual"])


@PACKED
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 60])
@pytest.mark.parametrize("cols", [1, 16, 45])
def test_fused_swiglu_is_two_linears_and_swiglu(rows, cols, packed):
    x, weight, given = draw(rows, 65, cols, swiglu=True, residual=True)
    x *= torch.logspace(-2, 3, rows)[:, None]  # into both tails of the sigmoid
    gate, up = (ops.linear(x, half) for half in weight.chunk(2))
    given["residual"][:] = -0.0  # adds nothing
    fused = ops.linear(x, Panels.pack(weight, True) if packed else weight, **given)
    assert torch.equal(fused, ops.swiglu(gate, up))


def test_swiglu_at_infinity():
    """silu(-inf) is -0, its limit, as in ops.swiglu."""
    x = torch.tensor([[-math.inf], [math.inf], [-3e38]])
    weight = torch.tensor([[1.0], [math.copysign(1e-30, 1)]])
    gate, up = ops.linear(x[2:], weight).chunk(2, -1)
    assert torch.equal(ops.linear(x[2:], weight, swiglu=True), ops.swiglu(gate, up))
    assert torch.equal(
        ops.linear(x, weight, swiglu=True).isnan(), torch.tensor([[True], [False], [False]])
    )  # -0 * -inf


@PACKED
@pytest.mark.parametrize("rows", [1, 4, 5, 13, 100])
@pytest.mark.parametrize("norm", [False, True])
def test_nan_and_infinity_stay_in_their_row(rows, norm, packed):
    x, weight, given = draw(rows, 70, 37, norm=norm)
    weight = Panels.pack(weight) if packed else weight
    clean = ops.linear(x, weight, **given)
    for value in (math.nan, math.inf):
        for row in {0, rows // 2, rows - 1}:
            dirty = x.clone()
            dirty[row, 41] = value
            y = ops.linear(dirty, weight, **given)
            assert not y[row].isfinite().any()
            assert torch.equal(y[:row], clean[:row]) and torch.equal(y[row + 1 :], clean[row + 1 :])


@PACKED
@pytest.mark.parametrize("fused", FUSED, ids=" ".join)
@pytest.mark.parametrize("rows", [3, 4, 5, 97, 250])
def test_any_number_of_threads(rows, fused, packed):
    """More threads than items too: their scratch must not overlap."""
    x, weight, given = draw(rows, 300, 200, **fused)
    weight = Panels.pack(weight, given["swiglu"]) if packed else weight
    before, wanted = torch.get_num_threads(), None
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y = ops.linear(x, weight, **given)
            wanted = y if wanted is None else wanted
            assert torch.equal(y, wanted), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


def test_replayed_with_new_inputs():
    """A plan reads x, norm and residual again, through the same pointers."""
    x, weight, given = draw(3, 65, 33, norm=True, residual=True)
    panels, plan = Panels.pack(weight), _C.Plan()
    plan.begin()
    y = ops.linear(x, panels, **given)
    plan.end()
    for t in (x, given["norm"], given["residual"]):
        t.normal_()
    assert plan.replay() == 0 and torch.equal(y, ops.linear(x, panels, **given))


@PACKED
@_oracle.dtypes(SUITE)
@pytest.mark.parametrize("rows", [1, 4, 5, 60])
@pytest.mark.parametrize("fused", FUSED, ids=" ".join)
def test_a_call_that_trains_has_the_bits_of_one_that_does_not(fused, rows, dtype, packed):
    x, weight, given = draw(rows, 65, 33, dtype, **fused)
    weight = Panels.pack(weight, given["swiglu"]) if packed else weight
    assert torch.equal(ops.linear(x.clone().requires_grad_(), weight, **given), ops.linear(x, weight, **given))


@_oracle.dtypes(SUITE)
@pytest.mark.parametrize(("rows", "depth", "cols"), [(1, 33, 17), (5, 64, 48), (30, 100, 70), (97, 20, 5), (3, 40, 0)])
@pytest.mark.parametrize("swiglu", [False, True])
def test_gradient_through_panels_is_that_of_the_weight(rows, depth, cols, swiglu, dtype):
    """dx is a chain over n, whatever holds the weight."""
    x, weight, given = draw(rows, depth, cols, dtype, swiglu=swiglu)
    dy = torch.randn(rows, cols, dtype=dtype)
    leaf = x.requires_grad_()
    (ours,) = torch.autograd.grad(ops.linear(leaf, Panels.pack(weight, swiglu), **given), leaf, dy)
    (plain,) = torch.autograd.grad(SUITE.reference(leaf.double(), weight.double(), **given), leaf, dy.double())
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, plain, rtol=4 * unit, atol=8 * unit)
    if not swiglu and dtype == torch.float32:
        assert torch.equal(ours, _contract.linear(dy, weight.t().contiguous(), None))


@pytest.mark.parametrize(
    ("rows", "depth", "cols"),
    [(1, 33, 17), (2, 7, 3), (5, 64, 48), (30, 100, 70), (300, 20, 5), (97, 40, 130), (0, 8, 4)],
)
def test_gradients_are_products_of_the_contract(rows, depth, cols):
    """dx is a chain over n, dweight over the rows, in whatever stride they lie."""
    x, weight, dy = torch.randn(rows, depth + 3)[:, 3:], torch.randn(cols, depth), torch.randn(rows, cols + 5)[:, :cols]
    dx, dweight, dbias = OPS["linear_backward"].raw(dy, x, weight, True, True, True)
    assert torch.equal(dx, _contract.linear(dy, weight.t().contiguous()))
    assert torch.equal(dweight, _contract.linear(dy.t().contiguous(), x.t().contiguous()))
    assert torch.equal(dbias, dy.sum(0))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_a_weight_made_in_parts(rows, dtype, monkeypatch):
    x, weight, dy = (torch.randn(*shape, dtype=dtype) for shape in ((rows, 20), (1700, 20), (rows, 1700)))
    whole = OPS["linear_backward"].raw(dy, x, weight, False, False, True)[1]
    monkeypatch.setattr(linear_file, "MOST_TRANSPOSED", 1)
    assert torch.equal(OPS["linear_backward"].raw(dy, x, weight, False, False, True)[1], whole)
    torch.testing.assert_close(whole, (dy.double().t() @ x.double()).to(dtype))


def test_gradients_with_any_number_of_threads():
    x, weight, dy = torch.randn(250, 90), torch.randn(70, 90), torch.randn(250, 70)
    before, wanted = torch.get_num_threads(), None
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            made = OPS["linear_backward"].raw(dy, x, weight, False, True, True)[:2]
            wanted = wanted or made
            assert all(map(torch.equal, made, wanted)), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


def test_gradients_that_nobody_wants_are_not_made():
    x, weight, bias = torch.randn(4, 33), torch.randn(10, 33), torch.randn(10)
    for wanted in ((x,), (weight,), (bias,), (x, bias)):
        leaves = [t.detach().requires_grad_(any(t is w for w in wanted)) for t in (x, weight, bias)]
        ops.linear(*leaves).sum().backward()
        assert [t.grad is not None for t in leaves] == [t.requires_grad for t in leaves]


def test_functorch_and_a_second_derivative_that_is_refused():
    x, weight = torch.randn(4, 33), torch.randn(10, 33)
    gradient = torch.func.grad(lambda t: ops.linear(t, weight).square().sum())(x)
    torch.testing.assert_close(gradient, 2 * (x @ weight.t()) @ weight)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(ops.linear(leaf, weight).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_saves_its_inputs_alone():
    x, weight = torch.randn(4, 33), torch.randn(10, 33, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ops.linear(x, weight, torch.randn(10))
    assert sorted(saved) == sorted((x.data_ptr(), weight.data_ptr()))


# --------------------------------------------------------------------------------------------------------------- panels


@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (16, 16), (17, 33), (40, 100), (0, 8)])
def test_layout_of_panels(rows, depth):
    weight = torch.randn(rows, depth)
    panels = Panels.pack(weight)
    assert panels.shape == (rows, depth) and panels.nbytes == Panels.nbytes_for(rows, depth) == panels.data.numel() * 4
    columns = panels.data.transpose(1, 2).reshape(-1, depth)
    assert torch.equal(columns[:rows], weight) and (columns[rows:] == 0).all()


@pytest.mark.parametrize(("cols", "depth"), [(1, 1), (16, 32), (21, 33)])
def test_layout_of_swiglu_panels(cols, depth):
    weight = torch.randn(2 * cols, depth)
    room = torch.full((Panels.nbytes_for(2 * cols, depth, True) + 64,), 7, dtype=torch.uint8)
    panels = Panels.pack(weight, True, room[:-64])
    assert panels.data.data_ptr() == room.data_ptr() and (room[-64:] == 7).all()
    for i, half in enumerate(weight.chunk(2)):
        columns = panels.data[i::2].transpose(1, 2).reshape(-1, depth)
        assert torch.equal(columns[:cols], half) and (columns[cols:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pack_takes_any_float_and_any_strides(dtype):
    weight = torch.randn(40, 50, dtype=dtype)
    for view in (weight, weight.t(), weight[::2, 3:30]):
        assert torch.equal(Panels.pack(view).data, Panels.pack(view.float().contiguous()).data)


def test_rows_at():
    weight = torch.randn(37, 65)
    panels = Panels.pack(weight)
    for ids in (torch.tensor([0, 36, 15, 16, 15]), torch.randint(37, (3, 4)), torch.empty(2, 0, dtype=torch.int64)):
        assert torch.equal(panels.rows_at(ids), weight[ids])
    assert torch.equal(panels.rows_at(torch.arange(37)[::3]), weight[::3])


@pytest.mark.parametrize("bad", [-1, 37, 47, 48, 2**40, -(2**40)])
def test_rows_at_errors(bad):
    panels = Panels.pack(torch.randn(37, 8))
    with pytest.raises(IndexError, match=rf"id {bad} is outside the vocabulary \[0, 37\)"):
        panels.rows_at(torch.tensor([0, bad]))


X, W = torch.randn(2, 8), torch.randn(6, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.linear(X, torch.randn(6, 7)),
            ValueError,
            r"x \(2, 8\) must end in the weight's input size 7 \(weight \(6, 7\)\)",
        ),
        (lambda: ops.linear(torch.tensor(1.0), W), ValueError, r"x \(\) must end in"),
        (lambda: ops.linear(X, torch.randn(8)), ValueError, r"weight has shape \(8,\); it must be \[N, K\]"),
        (lambda: ops.linear(X, torch.randn(1, 6, 8)), ValueError, r"weight has shape \(1, 6, 8\)"),
        (lambda: ops.linear(X.double(), W.double()), TypeError, "x is float64, allowed: float32, bfloat16"),
        (lambda: ops.linear(X, W.half()), TypeError, "weight is torch.float16, x is torch.float32"),
        (lambda: ops.linear(X, W.to("meta")), ValueError, "weight is on meta, x on cpu"),
        (lambda: ops.linear(X.to("meta"), Panels.pack(W)), ValueError, "weight is on cpu, x on meta"),
        (lambda: ops.linear(X, W, torch.randn(5)), ValueError, r"bias has shape \(5,\), want \(6,\)"),
        (lambda: ops.linear(X, W, torch.randn(6).half()), TypeError, "bias is torch.float16"),
        (lambda: ops.linear(X, W, torch.randn(12)[::2]), ValueError, r"bias must be contiguous; call .contiguous\(\)"),
        (lambda: ops.linear(X, W, norm=torch.randn(6)), ValueError, r"norm has shape \(6,\), want \(8,\)"),
        (lambda: ops.linear(X, W, norm=torch.randn(16)[::2]), ValueError, "norm must be contiguous"),
        (lambda: ops.linear(X, W, residual=torch.randn(6)), ValueError, r"residual has shape \(6,\), want \(2, 6\)"),
        (lambda: ops.linear(X, W, residual=torch.randn(2, 6), swiglu=True), ValueError, r"want \(2, 3\)"),
        (
            lambda: ops.linear(X, torch.randn(5, 8), swiglu=True),
            ValueError,
            "takes a weight of 2F rows .* it has 5 rows",
        ),
        (lambda: ops.linear(X, W, torch.randn(3), swiglu=True), ValueError, "without bias"),
        (
            lambda: ops.linear(X, Panels.pack(W), swiglu=True),
            ValueError,
            "swiglu=True, but the weight was packed with swiglu=False",
        ),
        (lambda: ops.linear(X, Panels.pack(W, True)), ValueError, "swiglu=False, but the weight was packed with swiglu=True"),
        (lambda: Panels.pack(torch.randn(5, 8), True), ValueError, r"\(5, 8\); it must be \[N, K\], N even for swiglu"),
        (lambda: Panels.pack(torch.randn(8)), ValueError, r"shape \(8,\)"),
        (
            lambda: Panels.pack(W).rows_at(torch.tensor([1], dtype=torch.int32)),
            TypeError,
            r"ids are torch.int32; convert them with .long",
        ),
        (lambda: Panels.pack(W, True).rows_at(torch.tensor([1])), ValueError, "packed with swiglu, its rows are no table"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
