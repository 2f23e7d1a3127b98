"""quant_linear: what the stored formats mean, and how far rounding the activations may lead."""

import math

import _oracle
import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from fastllm import _C, ops
from fastllm.bench.case import Make
from fastllm.bench.cases.quant_linear import FORMATS, SUITE, random_weight
from fastllm.ops import QWeight
from fastllm.ops._op import OPS
from fastllm.ops.quant_linear import STORED

FUSED = [
    {},
    {"bias": True},
    {"norm": True},
    {"residual": True},
    {"norm": True, "residual": True, "bias": True},
    {"swiglu": True},
    {"norm": True, "residual": True, "swiglu": True},
]
FORM = pytest.mark.parametrize("form", FORMATS)


@pytest.mark.parametrize(
    "wanted", ["12x64 to 40 q4_1", "5x64 to 33 int4 +bias +norm +residual", "4x64 to 144 int8 +swiglu"]
)
def test_compile_fullgraph(wanted):
    (case,) = [c for c in SUITE.correct if c.label == wanted]
    _oracle.check_compile(SUITE, case)
    weight = random_weight(Make(), 37, 64, "q4_1")
    table = torch.compile(lambda i: weight.rows_at(i), fullgraph=True)
    assert torch.equal(table(torch.tensor([[3, 36]])), weight.rows_at(torch.tensor([[3, 36]])))


@FORM
def test_opcheck(form):
    w = random_weight(Make(), 20, 64, form)
    form = (w.data, 20, 64, w.bits, w.has_min)
    x, row = torch.randn(5, 64), torch.randn(5, 20)
    torch.library.opcheck(OPS["quant_linear"].raw, (x, *form, torch.randn(20), torch.randn(64), 1e-6, row, 0))
    torch.library.opcheck(OPS["quant_linear_backward"].raw, (row, *form, 0))
    torch.library.opcheck(OPS["quant_embedding"].raw, (torch.tensor([[0, 19]]), *form))


# ------------------------------------------------------------------------------------------------------- what is stored


def random_blocks(rows: int, depth: int, kind: str) -> torch.Tensor:
    """Blocks of a GGUF type: any byte as quants, any finite float16 as scales and minima."""
    head = 4 if STORED[kind][1] else 2
    quants = torch.randint(0, 256, (rows, depth // 32, STORED[kind][2] - head), dtype=torch.uint8)
    bits = torch.randint(0, 1 << 16, (rows, depth // 32, head // 2), dtype=torch.int32)
    bits = torch.where(bits & 0x7C00 == 0x7C00, bits & 0xBFFF, bits)  # no infinity, no NaN
    scales = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16).view(torch.uint8)
    return torch.cat([scales, quants], -1).flatten(1)


def meaning(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), GGMLQuantizationType[kind]).copy())


def packed(blocks: torch.Tensor, kind: str, bits: int, has_min: bool, swiglu: bool = False) -> QWeight:
    rows, depth = blocks.shape[0], blocks.shape[1] // STORED[kind][2] * 32
    room = torch.full((QWeight.nbytes_for(rows, depth, bits, has_min, swiglu) + 64,), 7, dtype=torch.uint8)
    weight = QWeight.empty(rows, depth, bits, has_min, swiglu, room[:-64])
    assert weight.fill(0, blocks, kind) == rows and (room[-64:] == 7).all()
    return weight


HOLDS = [
    (kind, bits, has_min)
    for kind, (own, minimum, _) in STORED.items()
    for bits in (4, 8)
    for has_min in (False, True)
    if bits >= own and has_min >= minimum
]


@pytest.mark.parametrize(("kind", "bits", "has_min"), HOLDS)
@pytest.mark.parametrize(("rows", "depth", "swiglu"), [(1, 32, False), (37, 96, False), (64, 64, True), (42, 96, True)])
def test_bytes_of_a_gguf_keep_their_meaning(kind, bits, has_min, rows, depth, swiglu):
    """In their own format and widened to every one that holds more."""
    blocks = random_blocks(rows, depth, kind)
    if has_min and not STORED[kind][1]:  # the minimum is -8 or -128 scales, and stays finite
        blocks.view(rows, depth // 32, -1)[..., 1] &= 0xBF
    weight = packed(blocks, kind, bits, has_min, swiglu)
    assert torch.equal(weight.dequantize(), meaning(blocks, kind))


@FORM
def test_rows_at(form):
    weight = random_weight(Make(), 37, 96, form)
    whole = weight.dequantize()
    for ids in (torch.tensor([0, 36, 15, 16, 15]), torch.randint(37, (3, 4)), torch.empty(2, 0, dtype=torch.int64)):
        assert torch.equal(weight.rows_at(ids), whole[ids])
    assert torch.equal(weight.rows_at(torch.arange(37)[::3]), whole[::3])


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("form", ["int4", "q4_1", "int8"])
@pytest.mark.parametrize("cuts", [(1, 2, 3), (16, 32), (5, 23, 41), (21, 22), (30,)])
def test_fill_in_pieces_and_nothing_beside_them(form, cuts, swiglu):
    kind = {"int4": "Q4_0", "q4_1": "Q4_1", "int8": "Q8_0"}[form]
    blocks = random_blocks(42, 64, kind)
    whole, pieces = (packed(blocks, kind, *FORMATS[form], swiglu) for _ in range(2))
    pieces.data.fill_(0x3C)
    for begin, end in zip((0, *cuts), (*cuts, 42), strict=True):
        untouched = pieces.dequantize()
        assert pieces.fill(begin, blocks[begin:end], kind) == end
        now = pieces.dequantize()
        assert torch.equal(now[end:], untouched[end:]) and torch.equal(now[:end], whole.dequantize()[:end])
    padding = QWeight(pieces.data, pieces.data.shape[0] * 16, 64, pieces.bits, pieces.has_min)
    real = torch.zeros(padding.rows, dtype=torch.bool)
    ids = torch.arange(42)
    real[ids % 21 // 16 * 32 + ids // 21 * 16 + ids % 21 % 16 if swiglu else ids] = True
    filled = QWeight(torch.full_like(pieces.data, 0x3C), *padding.shape, pieces.bits, pieces.has_min)
    assert torch.equal(padding.dequantize()[~real], filled.dequantize()[~real])


def test_mixed_types_side_by_side_in_one_weight():
    parts = {kind: random_blocks(19, 64, kind) for kind in STORED}
    for kind in ("Q4_0", "Q8_0"):
        parts[kind].view(19, 2, -1)[..., 1] &= 0xBF
    weight, first = QWeight.empty(57, 64, 8, True), 0
    for kind, blocks in parts.items():
        first = weight.fill(first, blocks, kind)
    wanted = torch.cat([meaning(blocks, kind) for kind, blocks in parts.items()])
    assert first == 57 and torch.equal(weight.dequantize(), wanted)


# ----------------------------------------------------------------------------------------------------------- quantising


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_0"), (8, "Q8_0")])
@pytest.mark.parametrize("scale", [1.0, 0.02, 30.0])
def test_quantising_is_no_worse_than_ggufs(bits, kind, scale):
    weight = torch.randn(200, 576) * scale
    theirs = meaning(torch.from_numpy(gguf.quants.quantize(weight.numpy(), GGMLQuantizationType[kind])), kind)
    ours = QWeight.quantize(weight, bits).dequantize()

    def error(values):
        return (values - weight).double().square().mean().sqrt().item()

    assert error(ours) <= error(theirs) * (1 + 1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_bounds_and_special_groups(bits):
    weight = torch.randn(21, 96)
    weight[0], weight[1, :32], weight[2, 32:64], weight[3] = 0, 1e-9, -2.5, 0
    weight[3, 40] = -7.0
    q = QWeight.quantize(weight, bits).dequantize()
    step = weight.view(21, 3, 32).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((q - weight).view(21, 3, 32).abs() <= 1.01 * step + 1e-7).all()
    assert (q[0] == 0).all() and (q[2, 32:64] + 2.5).abs().max() < 2e-3
    assert q[3].nonzero().tolist() == [[40]] and q[3, 40].item() == pytest.approx(-7, rel=1e-3)
    exact = torch.randint(-8, 8, (4, 64)).float() * 0.5
    exact[:, ::32] = -4.0  # the whole range is there: nothing is lost
    assert torch.equal(QWeight.quantize(exact, bits=4).dequantize(), exact)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_swiglu_weight(bits):
    weight = torch.randn(42, 64)
    assert torch.equal(
        QWeight.quantize(weight, bits, swiglu=True).dequantize(), QWeight.quantize(weight, bits).dequantize()
    )


# ----------------------------------------------------------------------------------------------------------- arithmetic


def draw(rows: int, depth: int, cols: int, form: str, bias=False, norm=False, residual=False, swiglu=False):
    weight = random_weight(Make(seed=rows), cols * (1 + swiglu), depth, form, swiglu)
    given = {
        "bias": torch.randn(cols) if bias else None,
        "norm": torch.randn(depth) if norm else None,
        "residual": torch.randn(rows, cols) if residual else None,
        "swiglu": swiglu,
    }
    return torch.randn(rows, depth), weight, given


def part(given: dict, rows: slice) -> dict:
    return {**given, "residual": None if given["residual"] is None else given["residual"][rows]}


def product(x: torch.Tensor, weight: QWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T of the dequantised weight in float64, and how far rounding x may lead: half a step of each group."""
    w, x = weight.dequantize().double(), x.double()
    step = x.unflatten(-1, (-1, 32)).abs().amax(-1) / 127
    bound = 0.5 * step @ w.unflatten(-1, (-1, 32)).abs().sum(-1).t()
    return x @ w.t(), bound


@FORM
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 12, 13, 97])
@pytest.mark.parametrize(("depth", "cols"), [(32, 1), (96, 17), (576, 70), (4992, 33)])
def test_close_to_the_dequantised_product(rows, depth, cols, form):
    x, weight, _ = draw(rows, depth, cols, form)
    exact, bound = product(x, weight)
    error = (ops.quant_linear(x, weight) - exact).abs()
    slack = 4e-6 * (x.double().abs() @ weight.dequantize().double().abs().t())
    assert (error <= 1.001 * bound + slack).all()
    if depth >= 576:  # roundings are independent: they add up like a random walk
        assert error.square().mean().sqrt() < 0.2 * bound.square().mean().sqrt()


def steep(form: str, depth: int, low: bool) -> QWeight:
    """Every quant at one end of its range; scale 1."""
    kind = {"int4": "Q4_0", "q4_1": "Q4_1"}.get(form, "Q8_0")
    blocks = torch.zeros(33, depth // 32, STORED[kind][2], dtype=torch.uint8)
    blocks[..., 1] = 0x3C
    if STORED[kind][1]:
        blocks[..., 3] = 0xC0  # minimum -2
    head = 4 if STORED[kind][1] else 2
    blocks[..., head:] = (0x00 if low else 0xFF) if kind != "Q8_0" else (0x80 if low else 0x7F)
    return packed(blocks.flatten(1), kind, *FORMATS[form])


@FORM
@pytest.mark.parametrize("low", [False, True], ids=["highest", "lowest"])
@pytest.mark.parametrize("sign", ["+", "-", "mixed"])
def test_no_sum_saturates(form, low, sign):
    """u8 255 (or u4 15) times s8 127 everywhere: 16-bit sums of pairs would overflow."""
    depth = 96
    x = torch.ones(7, depth)
    if sign != "+":
        x = -x if sign == "-" else x * torch.where(torch.rand(7, depth) < 0.5, -1.0, 1.0)
    weight = steep(form, depth, low)
    top = {"int4": (-8, 7), "q4_1": (-2, 13)}.get(form, (-128, 127))[not low]
    wanted = (x.sum(1, keepdim=True) * top).expand(7, 33)
    for rows in (1, 2, 4, 7):
        torch.testing.assert_close(ops.quant_linear(x[:rows], weight), wanted[:rows], rtol=1e-5, atol=1e-4)


@FORM
def test_integer_sums_are_exact(form):
    """Powers of two as scales: then nothing rounds at all, and any wrong quant shows."""
    rows, depth, cols = 9, 160, 40
    x = torch.randint(-127, 128, (rows, depth)).float()
    x[:, ::32] = 127.0
    weight = random_weight(Make(), cols, depth, form)
    size = 16 * weight.bits * 4
    weight.data[:, :, size:].view(torch.float16)[:] = 2.0 ** torch.randint(-3, 3, weight.data[:, :, size::2].shape)
    wanted = x.double() @ weight.dequantize().double().t()
    assert torch.equal(ops.quant_linear(x, weight).double(), wanted)


@pytest.mark.parametrize("form", ["int4", "q4_1", "int8"])
@pytest.mark.parametrize("fused", FUSED, ids=" ".join)
def test_a_row_has_one_value_whatever_stands_beside_it(fused, form):
    x, weight, given = draw(20, 160, 40, form, **fused)
    whole = ops.quant_linear(x, weight, **given)
    for count in range(1, 21):
        some = slice(20 - count, 20)
        assert torch.equal(ops.quant_linear(x[some], weight, **part(given, some)), whole[some]), f"{count} rows"
    for i in range(20):
        row = slice(i, i + 1)
        assert torch.equal(ops.quant_linear(x[row], weight, **part(given, row)), whole[row]), f"row {i} alone"


@FORM
@pytest.mark.parametrize("rows", [1, 4, 5, 70])
@pytest.mark.parametrize("depth", [32, 576])
def test_fused_norm_is_rms_norm_then_linear(rows, depth, form):
    x, weight, given = draw(rows, depth, 33, form, norm=True)
    fused = ops.quant_linear(x, weight, norm=given["norm"], eps=1e-3)
    assert torch.equal(fused, ops.quant_linear(ops.rms_norm(x, given["norm"], 1e-3), weight))


@FORM
@pytest.mark.parametrize("rows", [1, 4, 5, 70])
def test_fused_residual_and_bias_are_additions_in_this_order(rows, form):
    x, weight, given = draw(rows, 64, 33, form, bias=True, residual=True)
    wanted = ops.quant_linear(x, weight) + given["bias"] + given["residual"]
    assert torch.equal(ops.quant_linear(x, weight, **given), wanted)


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 70])
@pytest.mark.parametrize("cols", [1, 16, 45])
def test_fused_swiglu_is_two_linears_and_swiglu(rows, cols, kind):
    blocks = torch.from_numpy(
        gguf.quants.quantize(np.random.randn(2 * cols, 64).astype("f"), GGMLQuantizationType[kind])
    )
    form, x = STORED[kind][:2], torch.randn(rows, 64) * torch.logspace(-2, 3, rows)[:, None]
    gate, up = (ops.quant_linear(x, packed(half, kind, *form)) for half in blocks.chunk(2))
    fused = ops.quant_linear(x, packed(blocks, kind, *form, True), swiglu=True)
    assert torch.equal(fused, ops.swiglu(gate, up))


@FORM
@pytest.mark.parametrize("rows", [1, 4, 5, 13, 100])
def test_nan_and_infinity_stay_in_their_row(rows, form):
    x, weight, _ = draw(rows, 96, 37, form)
    clean = ops.quant_linear(x, weight)
    for value in (math.nan, math.inf, -math.inf):
        for row in {0, rows // 2, rows - 1}:
            dirty = x.clone()
            dirty[row, 41] = value
            y = ops.quant_linear(dirty, weight)
            assert y[row].isnan().all()
            assert torch.equal(y[:row], clean[:row]) and torch.equal(y[row + 1 :], clean[row + 1 :])


@FORM
def test_zeros_and_the_smallest_groups(form):
    x, weight, _ = draw(6, 96, 37, form)
    x[0], x[1], x[2], x[3] = 0.0, 0.0, 3e-36, x[3] * 1e-30
    x[1, 40], x[5] = 2e-38, x[5] * 1e30
    y = ops.quant_linear(x, weight)
    assert (y[:3] == 0).all()
    exact, bound = product(x[3:], weight)
    assert ((y[3:] - exact).abs() <= 1.01 * bound + 1e-5 * exact.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("form", ["int4", "q4_1", "int8"])
@pytest.mark.parametrize("fused", FUSED, ids=" ".join)
@pytest.mark.parametrize("rows", [3, 4, 5, 97, 250])
def test_any_number_of_threads(rows, fused, form):
    x, weight, given = draw(rows, 320, 200, form, **fused)
    before, wanted = torch.get_num_threads(), None
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y = ops.quant_linear(x, weight, **given)
            wanted = y if wanted is None else wanted
            assert torch.equal(y, wanted), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


def test_replayed_with_new_inputs():
    x, weight, given = draw(3, 64, 33, "q4_1", norm=True, residual=True)
    plan, ids = _C.Plan(), torch.tensor([3, 32, 7])
    plan.begin()
    y, rows = ops.quant_linear(x, weight, **given), weight.rows_at(ids)
    plan.end()
    for t in (x, given["norm"], given["residual"]):
        t.normal_()
    ids.copy_(torch.tensor([0, 1, 31]))
    assert plan.replay() == 0
    assert torch.equal(y, ops.quant_linear(x, weight, **given)) and torch.equal(rows, weight.rows_at(ids))


@FORM
def test_gradient_is_that_of_the_dequantised_weight(form):
    x, weight, given = draw(4, 96, 20, form, norm=True, residual=True)
    given["residual"].requires_grad_()
    x.requires_grad_()
    upstream = torch.randn(4, 20)
    y = ops.quant_linear(x, weight, **given)
    torch.testing.assert_close(y, ops.quant_linear(x.detach(), weight, **given).detach(), rtol=1e-5, atol=1e-4)
    ours = torch.autograd.grad(y, (x, given["residual"]), upstream)
    normed = torch.nn.functional.rms_norm(x, (96,), given["norm"], 1e-6)
    plain = torch.autograd.grad(normed @ weight.dequantize().t() + given["residual"], (x, given["residual"]), upstream)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- errors

X, W = torch.randn(2, 64), QWeight.quantize(torch.randn(6, 64), 4)
S = QWeight.quantize(torch.randn(6, 64), 8, swiglu=True)


def spoilt(value: float) -> torch.Tensor:
    weight = torch.randn(6, 64)
    weight[3, 40] = value
    return weight


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.quant_linear(X[:, :32], W), ValueError, r"x \(2, 32\) must end in the weight's input size 64"),
        (lambda: ops.quant_linear(X.double(), W), TypeError, "x is float64, allowed: float32"),
        (lambda: ops.quant_linear(X.bfloat16(), W), TypeError, "x is bfloat16, allowed: float32"),
        (
            lambda: ops.quant_linear(X, torch.randn(6, 64)),
            TypeError,
            r"weight is Tensor; make it with QWeight.quantize",
        ),
        (lambda: ops.quant_linear(X.to("meta"), W), ValueError, "weight is on cpu, x on meta"),
        (lambda: ops.quant_linear(X, W, torch.randn(5)), ValueError, r"bias has shape \(5,\), want \(6,\)"),
        (lambda: ops.quant_linear(X, W, torch.randn(6).double()), TypeError, "bias is torch.float64"),
        (lambda: ops.quant_linear(X, W, norm=torch.randn(128)[::2]), ValueError, "norm must be contiguous"),
        (lambda: ops.quant_linear(X, W, norm=torch.randn(32)), ValueError, r"norm has shape \(32,\), want \(64,\)"),
        (
            lambda: ops.quant_linear(X, W, residual=torch.randn(2, 5)),
            ValueError,
            r"residual has shape \(2, 5\), want \(2, 6\)",
        ),
        (
            lambda: ops.quant_linear(X, W, swiglu=True),
            ValueError,
            "swiglu=True, but the weight was packed with swiglu=False",
        ),
        (lambda: ops.quant_linear(X, S), ValueError, "swiglu=False, but the weight was packed with swiglu=True"),
        (lambda: ops.quant_linear(X, S, torch.randn(3), swiglu=True), ValueError, "without bias"),
        (lambda: QWeight.quantize(torch.randn(6, 64), 5), ValueError, "bits=5; allowed: 4, 8"),
        (
            lambda: QWeight.quantize(torch.randn(6, 48), 4),
            ValueError,
            r"\(6, 48\) must be \[N, K\], K a multiple of 32",
        ),
        (lambda: QWeight.quantize(torch.randn(64), 4), ValueError, r"\(64,\) must be"),
        (lambda: QWeight.quantize(torch.randn(5, 64), 4, swiglu=True), ValueError, "N even for swiglu"),
        *(
            (lambda v=v, b=b: QWeight.quantize(spoilt(v), b), ValueError, "NaN, infinite or huge entries")
            for v in (math.nan, math.inf, -math.inf, 1e9)
            for b in (4, 8)
        ),
        (
            lambda: W.rows_at(torch.tensor([1], dtype=torch.int32)),
            TypeError,
            "ids are torch.int32; convert them with .long",
        ),
        (lambda: S.rows_at(torch.tensor([1])), ValueError, "packed with swiglu, its rows are no table"),
        (
            lambda: W.fill(0, random_blocks(6, 64, "Q4_1"), "Q4_1"),
            ValueError,
            "Q4_1 blocks do not fit into 4 bits, has_min=False",
        ),
        (lambda: W.fill(0, random_blocks(6, 64, "Q8_0"), "Q8_0"), ValueError, "Q8_0 blocks do not fit into 4 bits"),
        (
            lambda: W.fill(1, random_blocks(6, 64, "Q4_0"), "Q4_0"),
            ValueError,
            r"blocks \(6, 36\) at row 1 do not fit weight \(6, 64\)",
        ),
        (lambda: W.fill(-1, random_blocks(2, 64, "Q4_0"), "Q4_0"), ValueError, "at row -1 do not fit"),
        (lambda: W.fill(0, random_blocks(6, 32, "Q4_0"), "Q4_0"), ValueError, r"blocks \(6, 18\) at row 0 do not fit"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@FORM
@pytest.mark.parametrize("bad", [-1, 37, 47, 48, 2**40, -(2**40)])
def test_rows_at_errors(bad, form):
    with pytest.raises(IndexError, match=rf"id {bad} is outside the vocabulary \[0, 37\)"):
        random_weight(Make(), 37, 64, form).rows_at(torch.tensor([0, bad]))


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_empty_weights_and_batches(form):
    empty = QWeight.quantize(torch.randn(0, 64), FORMATS[form][0])
    assert ops.quant_linear(torch.randn(3, 64), empty).shape == (3, 0) and empty.dequantize().shape == (0, 64)
    assert ops.quant_linear(torch.randn(2, 0, 64), W).shape == (2, 0, 6)
