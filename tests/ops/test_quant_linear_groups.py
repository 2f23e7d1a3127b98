"""quant_linear with weights in groups of 64 and 128: the bits of groups of 32 that repeat their scales, and quantising."""

import math

import pytest
import torch

from fastllm import ops
from fastllm.bench.case import Make
from fastllm.bench.cases.quant_linear import GROUPED, random_weight
from fastllm.ops import AdapterPool, LoraSpec, QWeight
from fastllm.ops.quant_linear import GROUPS

FORM = pytest.mark.parametrize("form", GROUPED)
GROUP = pytest.mark.parametrize("group", GROUPS)
BITS = pytest.mark.parametrize("bits", [4, 8])
DEPTHS = (32, 128, 160, 576)  # 160 and 576: a last group that is shorter


def repeated(weight: QWeight) -> QWeight:
    """The same weight in groups of 32."""
    size, parts = 64 * weight.bits, weight.group // 32
    panels, blocks, _ = weight.data.shape
    quants = weight.data[:, :, : size * parts].reshape(panels, blocks * parts, size)
    tail = weight.data[:, :, size * parts :].repeat_interleave(parts, 1)
    data = torch.cat([quants, tail], -1)[:, : -(-weight.depth // 32)].contiguous()
    return QWeight(data, *weight.shape, weight.bits, weight.has_min, weight.swiglu)


@FORM
@pytest.mark.parametrize("depth", DEPTHS)
def test_bits_of_repeated_scales(depth, form):
    weight = random_weight(Make(seed=depth), 37, depth, form)
    small, ids = repeated(weight), torch.tensor([[0, 36], [15, 16]])
    assert weight.group > small.group == 32
    assert torch.equal(weight.dequantize(), small.dequantize())
    assert torch.equal(weight.rows_at(ids), weight.dequantize()[ids])
    for rows in (1, 2, 3, 4, 5, 8, 13, 97):
        x, upstream = torch.randn(rows, depth).requires_grad_(), torch.randn(rows, 37)
        ours, plain = (ops.quant_linear(x, w) for w in (weight, small))
        assert torch.equal(ours, plain), f"{rows} rows"
        assert torch.equal(*(torch.autograd.grad(y, x, upstream)[0] for y in (ours, plain))), f"dx of {rows} rows"


@FORM
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_bits_of_repeated_scales_fused(rows, form):
    weight = random_weight(Make(), 66, 160, form, swiglu=True)
    x, norm, residual = torch.randn(rows, 160), torch.randn(160), torch.randn(rows, 33)
    ours, plain = (
        ops.quant_linear(x, w, norm=norm, residual=residual, swiglu=True) for w in (weight, repeated(weight))
    )
    assert torch.equal(ours, plain)
    x.requires_grad_()
    ours, plain = (
        torch.autograd.grad(ops.quant_linear(x, w, norm=norm, residual=residual, swiglu=True).sum(), x)[0]
        for w in (weight, repeated(weight))
    )
    assert torch.equal(ours, plain)


@FORM
def test_adapters_over_it_have_the_bits_of_repeated_scales(form):
    weight = random_weight(Make(), 35, 160, form)
    x, a, b, ids = torch.randn(5, 160), torch.randn(3, 160) / 13, torch.randn(35, 3), torch.tensor([0, -1, 0, 1, 0])
    pool = AdapterPool(35, 160, slots=2, max_rank=3)
    pool.add(a, b, 0.5), pool.add(a[:1], b[:, :1], 2.0)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    ours, plain = (
        (y, *torch.autograd.grad(y.sin().sum(), leaves))
        for y in (
            ops.lora_linear(*leaves[:1], w, *leaves[1:], LoraSpec(0.5), magnitude=torch.ones(35))
            for w in (weight, repeated(weight))
        )
    )
    assert all(map(torch.equal, ours, plain))
    x = x.detach()
    assert torch.equal(*(ops.multi_lora(x, w, pool, ids) for w in (weight, repeated(weight))))


@pytest.mark.parametrize("form", ["int4 g128", "8 bits + minimum g64"])
def test_any_number_of_rows_and_threads(form):
    x, weight = torch.randn(97, 320), random_weight(Make(), 200, 320, form)
    whole, before = ops.quant_linear(x, weight), torch.get_num_threads()
    for count in range(1, 21):
        assert torch.equal(ops.quant_linear(x[97 - count :], weight), whole[97 - count :]), f"{count} rows"
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(ops.quant_linear(x, weight), whole), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------------- quantising


@GROUP
@BITS
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("depth", DEPTHS)
def test_within_half_a_step(depth, affine, bits, group):
    weight = torch.randn(21, depth) + 0.3 * affine
    q = QWeight.quantize(weight, bits, group=group, affine=affine)
    assert q.group == group and q.shape == (21, depth) and q.has_min == affine
    groups = torch.nn.functional.pad(weight, (0, -depth % group), value=math.nan).unflatten(-1, (-1, group))
    low, top = groups.nan_to_num(math.inf).amin(-1), groups.nan_to_num(-math.inf).amax(-1)
    largest = torch.maximum(top, -low)
    step = (top - low) / (2**bits - 1) if affine else largest / (2 ** (bits - 1) - (bits == 8))
    step = step * (0.5 if affine or bits == 8 else 1.0) + largest * 2**-10  # Q4_0 cuts off what lies beyond 7 steps
    error = (q.dequantize() - weight).abs()
    assert (error <= step.repeat_interleave(group, -1)[:, :depth]).all()


@GROUP
@BITS
def test_affine_is_closer_where_weights_lie_to_one_side(bits, group):
    weight = torch.rand(20, 256)
    plain, affine = (QWeight.quantize(weight, bits, group=group, affine=a) for a in (False, True))
    errors = [(q.dequantize() - weight).square().mean() for q in (plain, affine)]
    assert errors[1] < 0.5 * errors[0]


@GROUP
@BITS
@pytest.mark.parametrize("affine", [False, True])
def test_what_the_quants_hold_is_kept(affine, bits, group):
    low, top = (0, 2**bits) if affine else (-8, 8) if bits == 4 else (-127, 128)
    exact = torch.randint(low, top, (4, 384)).float()
    exact[:, ::32], exact[:, 1::32] = low, top - 1
    exact = exact * 0.5 - 3 * affine
    assert torch.equal(QWeight.quantize(exact, bits, group=group, affine=affine).dequantize(), exact)
    constant = torch.full((4, 96), -2.5)
    assert torch.equal(QWeight.quantize(constant, bits, group=group, affine=True).dequantize(), constant)


@GROUP
@BITS
@pytest.mark.parametrize("affine", [False, True])
def test_halves_and_pieces(affine, bits, group):
    weight = torch.randn(42, 160)
    whole = QWeight.quantize(weight, bits, group=group, affine=affine)
    halves = QWeight.quantize(weight, bits, True, group=group, affine=affine)
    assert torch.equal(halves.dequantize(), whole.dequantize())
    pieces = QWeight.empty(42, 160, bits, affine, group=group)
    pieces.data.zero_()
    first = 0
    for cut in (5, 21, 42):
        first = pieces.fill_quantized(first, weight[first:cut], affine)
    assert first == 42 and torch.equal(pieces.data, whole.data)
    assert whole.nbytes == QWeight.nbytes_for(42, 160, bits, affine, group=group) == whole.data.numel()


@pytest.mark.parametrize(("form", "bits"), [("int4 g128", 4.125), ("q4_1 g64", 4.5), ("int8 g128", 8.125)])
def test_bits_a_weight(form, bits):
    assert random_weight(Make("meta"), 4096, 1024, form).nbytes * 8 == bits * 4096 * 1024


WIDE = QWeight.quantize(torch.randn(6, 128), 8, group=128)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QWeight.quantize(torch.randn(6, 96), 4, group=48), "group=48; allowed: 32, 64, 128"),
        (lambda: QWeight.empty(6, 96, 4, False, group=0), "group=0; allowed"),
        (lambda: QWeight.nbytes_for(6, 96, 4, False, group=256), "group=256; allowed"),
        (lambda: QWeight.quantize(torch.randn(6, 48), 4, group=64), r"\(6, 48\) must be \[N, K\], K a multiple of 32"),
        (
            lambda: WIDE.fill(0, torch.zeros(6, 4 * 34, dtype=torch.uint8), "Q8_0"),
            "Q8_0 has a scale for 32 of K, this weight one for 128; make it with group=32",
        ),
        (lambda: WIDE.fill_quantized(1, torch.randn(6, 128)), r"at row 1 do not fit weight \(6, 128\)"),
        (
            lambda: WIDE.fill_quantized(0, torch.randn(6, 96)),
            r"rows \(6, 96\), affine=False do not fit weight \(6, 128\)",
        ),
        (lambda: WIDE.fill_quantized(0, torch.randn(6, 128), affine=True), "affine=True do not fit .* has_min=False"),
        *(
            (lambda v=v: QWeight.quantize(torch.full((2, 64), v), 4, group=64, affine=True), "NaN, infinite or huge")
            for v in (math.nan, math.inf, 1e9)
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@FORM
@pytest.mark.parametrize("bad", [-1, 37, 48])
def test_rows_at_errors(bad, form):
    with pytest.raises(IndexError, match=rf"id {bad} is outside the vocabulary \[0, 37\)"):
        random_weight(Make(), 37, 160, form).rows_at(torch.tensor([0, bad]))
