"""multi_lora: that every row has the bits of lora_linear with its adapter alone."""

import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.case import Make
from fastllm.bench.cases.quant_linear import FORMATS, random_weight
from fastllm.ops import AdapterPool, LoraSpec, Panels, QWeight
from fastllm.ops._op import OPS
from fastllm.ops.lora_linear import row_norms, split

FORM = pytest.mark.parametrize("form", ["rows", "panels", *FORMATS])


def adapters(cols: int, depth: int, ranks: list[int], dora: bool = False):
    """A pool, and what was put into it."""
    pool, each = AdapterPool(cols, depth, len(ranks) + 2, max(ranks), dora), []
    for i, rank in enumerate(ranks):
        a, b = torch.randn(rank, depth) * depth**-0.5, torch.randn(cols, rank)
        gain = torch.rand(cols) + 0.5 if dora and i % 2 else None
        each.append((a, b, 0.25 * (i + 1), gain))
        assert pool.add(a, b, 0.25 * (i + 1), gain) == i
    return pool, each


def draw_weight(cols: int, depth: int, form: str):
    if form in FORMATS:
        return random_weight(Make(), cols, depth, form)
    weight = torch.randn(cols, depth) * depth**-0.5
    return Panels.pack(weight) if form == "panels" else weight


def alone(x, weight, adapter, bias=None):
    """The raw op takes the gain as it is."""
    a, b, scale, gain = adapter
    return OPS["lora_linear"](x, *split(weight), a, b, scale, bias, gain, 0.0, 0, 0, False)[0]


@FORM
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 13, 60, 130])
def test_each_row_has_the_bits_of_its_adapter_alone(rows, dora, form):
    pool, each = adapters(35, 288, [16, 1, 3, 40], dora)  # K of two chains and a part of one
    weight, x, bias = draw_weight(35, 288, form), torch.randn(rows, 288), torch.randn(35)
    ids = torch.randint(-1, 4, (rows,))
    y = ops.multi_lora(x, weight, pool, ids, bias)
    none = (ops.quant_linear if isinstance(weight, QWeight) else ops.linear)(x, weight, bias)
    assert torch.equal(y[ids == -1], none[ids == -1])
    for i, adapter in enumerate(each):
        assert torch.equal(y[ids == i], alone(x, weight, adapter, bias)[ids == i])
    order = torch.randperm(rows)
    assert torch.equal(ops.multi_lora(x[order], weight, pool, ids[order], bias), y[order])
    in_order = ids.sort(stable=True)[1]
    assert torch.equal(ops.multi_lora(x[in_order], weight, pool, ids[in_order], bias), y[in_order])


SHAPES = {  # parts of a weight, whether gate and up are multiplied
    "q, k, v": ((48, 16, 32), False),
    "parts within panels": ((5, 16, 14), False),
    "gate, up": ((35, 35), True),
    "gate and up as one": ((70,), True),
}


def held_as(weight: torch.Tensor, form: str, swiglu: bool):
    if form == "rows":
        return weight
    return Panels.pack(weight, swiglu) if form == "panels" else QWeight.quantize(weight, int(form[3:]), swiglu)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("form", ["rows", "panels", "int4", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 5, 60])
def test_parts_and_what_stands_around(rows, shape, form, dora):
    """Each part as lora_linear alone, with norm, swiglu and residual as ops of their own."""
    (sizes, swiglu), weight = SHAPES[shape], torch.randn(sum(SHAPES[shape][0]), 96) / 9
    pool = AdapterPool(sizes, 96, 5, 20, dora, swiglu=swiglu)
    x, norm, residual = torch.randn(rows, 96), torch.rand(96) + 0.5, torch.randn(rows, sum(sizes) // (1 + swiglu))
    each = []
    for ranks in ((16, 4, 20), (3, 0, 7), (1, 16, 16), (0, 0, 0)):
        parts = [
            (torch.randn(r, 96) / 9, torch.randn(size, r), 0.5 if shape == "parts within panels" else 0.25 * (i + 1))
            if r
            else None
            for i, (r, size) in enumerate(zip(ranks, sizes, strict=False))
        ]
        gain = torch.rand(sum(sizes)) + 0.5 if dora and len(each) == 1 else None
        assert pool.add_parts(parts, gain) == len(each)
        each.append((parts, gain))
    ids, packed = torch.randint(-1, 4, (rows,)), held_as(weight, form, swiglu)
    y = ops.multi_lora(x, packed, pool, ids, norm=norm, eps=1e-5, residual=residual)
    linear = ops.quant_linear if form.startswith("int") else ops.linear
    fused = linear(x, packed, norm=norm, eps=1e-5, residual=residual, swiglu=swiglu)
    assert torch.equal(y[ids == -1], fused[ids == -1]) and torch.equal(y[ids == 3], fused[ids == 3])
    normed = ops.rms_norm(x, norm, 1e-5)
    for i, (parts, gain) in enumerate(each[:3]):
        whole = []
        for j, (part, rows_of) in enumerate(zip(parts, weight.split(sizes), strict=True)):
            held = held_as(rows_of.contiguous(), form, False)
            own = None if gain is None else gain.split(sizes)[j]
            if part is None:
                z = linear(normed, held)
                whole.append(z if own is None else z * own)
            else:
                whole.append(alone(normed, held, (*part, own)))
        wanted = torch.cat(whole, -1)
        wanted = (ops.swiglu(*wanted.chunk(2, -1)) if swiglu else wanted) + residual
        assert torch.equal(y[ids == i], wanted[ids == i])
    pool = pool.grown(9, 33, True)
    again = ops.multi_lora(x, packed, pool, ids, norm=norm, eps=1e-5, residual=residual)
    assert torch.equal(again, y)
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert torch.equal(ops.multi_lora(x, packed, pool, ids, norm=norm, eps=1e-5, residual=residual), y)
        finally:
            torch.set_num_threads(before)


def test_the_reference_of_parts():
    for sizes, swiglu in SHAPES.values():
        pool, weight = AdapterPool(sizes, 96, 2, 20, True, swiglu=swiglu), torch.randn(sum(sizes), 96) / 9
        pool.add_parts([(torch.randn(4, 96) / 9, torch.randn(size, 4), 0.5) for size in sizes], torch.rand(sum(sizes)))
        pool.add_parts([None] * len(sizes))
        x, ids, norm = torch.randn(7, 96), torch.tensor([0, -1, 1, 0, 0, -1, 1]), torch.rand(96)
        residual = torch.randn(7, sum(sizes) // (1 + swiglu))
        for form in ("rows", "panels", "int8"):
            held = held_as(weight, form, swiglu)
            given = (
                pool.a,
                pool.b,
                pool.rank,
                pool.scale,
                pool.gain,
                pool.part,
                ids,
                None,
                norm,
                1e-5,
                residual,
                swiglu,
                False,
            )
            wanted = OPS["multi_lora"].reference(x, *split(held), *given)
            y = ops.multi_lora(x, held, pool, ids, norm=norm, eps=1e-5, residual=residual)
            torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)


def test_strided_x_weight_and_ids():
    pool, _ = adapters(35, 96, [16, 1])
    x, weight, ids = torch.randn(96, 9), torch.randn(96, 35), torch.randint(-1, 2, (9, 2))
    wanted = ops.multi_lora(x.t().contiguous(), weight.t().contiguous(), pool, ids[:, 0].contiguous())
    assert torch.equal(ops.multi_lora(x.t(), weight.t(), pool, ids[:, 0]), wanted)


def test_equals_the_public_op_and_dora():
    weight, x, magnitude = torch.randn(35, 96), torch.randn(9, 96), torch.rand(35) + 0.5
    pool, each = adapters(35, 96, [16, 4], dora=True)
    a, b, scale, _ = each[0]
    pool.remove(0)
    assert pool.add(a, b, scale, magnitude / row_norms(weight, a, b, scale)) == 0
    ours = ops.multi_lora(x, weight, pool, torch.zeros(9, dtype=torch.int64))
    assert torch.equal(ours, ops.lora_linear(x, weight, a, b, LoraSpec(scale), magnitude=magnitude))


@pytest.mark.parametrize("rows", [3, 4, 5, 97])
def test_any_number_of_threads(rows):
    pool, _ = adapters(200, 320, [16, 1, 40])
    weight, x, ids = draw_weight(200, 320, "panels"), torch.randn(rows, 320), torch.randint(-1, 3, (rows,))
    before, wanted = torch.get_num_threads(), None
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y = ops.multi_lora(x, weight, pool, ids)
            wanted = y if wanted is None else wanted
            assert torch.equal(y, wanted), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


def test_replayed_with_other_adapters():
    """A plan reads the ids, and what the pool holds, again."""
    pool, _ = adapters(33, 65, [16, 3])
    weight, x, ids = draw_weight(33, 65, "panels"), torch.randn(4, 65), torch.tensor([0, 1, -1, 0])
    plan = _C.Plan()
    plan.begin()
    y = ops.multi_lora(x, weight, pool, ids)
    plan.end()
    pool.remove(0)
    pool.add(torch.randn(5, 65), torch.randn(33, 5), 2.0)
    ids[:] = torch.tensor([1, 0, 0, -1])
    assert plan.replay() == 0 and torch.equal(y, ops.multi_lora(x, weight, pool, ids))
    ids[2] = 3
    assert plan.replay() != 0


def test_pool_gives_back_what_was_added():
    pool, each = adapters(35, 50, [16, 1, 17, 40], dora=True)
    for i, (a, b, scale, gain) in enumerate(each):
        got = pool.get(i)
        assert torch.equal(got[0], a) and torch.equal(got[1], b) and got[2] == scale
        assert torch.equal(got[3], torch.ones(35) if gain is None else gain)
    assert pool.nbytes == sum(t.nbytes for t in (pool.a, pool.b, pool.rank, pool.scale, pool.part, pool.gain))
    pool.remove(2)
    assert pool.add(torch.randn(2, 50), torch.randn(35, 2), 1.0) == 2


def test_compile_fullgraph():
    pool, _ = adapters(33, 65, [16, 3])
    weight, x, ids = torch.randn(33, 65), torch.randn(4, 65), torch.tensor([0, 1, -1, 0])
    call = lambda t, i: ops.multi_lora(t, weight, pool, i)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True)
    assert torch.equal(compiled(x, ids), call(x, ids))
    given = x.clone().requires_grad_()  # the reference: with a gradient there is no kernel
    ours, theirs = (torch.autograd.grad(f(given, ids).square().sum(), given)[0] for f in (compiled, call))
    torch.testing.assert_close(ours, theirs)


def test_opcheck():
    pool, _ = adapters(33, 64, [16, 3], dora=True)
    weight, x, ids = torch.randn(33, 64), torch.randn(4, 64), torch.tensor([0, 1, -1, 0])
    for held in (weight, Panels.pack(weight), QWeight.quantize(weight, 8)):
        given = (pool.a, pool.b, pool.rank, pool.scale, pool.gain, pool.part, ids, torch.randn(33))
        around = (torch.randn(64), 1e-5, torch.randn(4, 33), False, True)
        torch.library.opcheck(OPS["multi_lora"].raw, (x, *split(held), *given, *around))


X, W, IDS = torch.randn(3, 8), torch.randn(6, 8), torch.tensor([0, -1, 0])
POOL, _ = adapters(6, 8, [2, 4])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.multi_lora(X, W, POOL, torch.tensor([0, 1, 2])), IndexError, r"adapter_id 2 at position \(2,\) is no"),
        (lambda: ops.multi_lora(X, W, POOL, torch.tensor([0, 4, 0])), IndexError, r"adapter_id 4 .* there are \[0, 1\]"),
        (lambda: ops.multi_lora(X, W, POOL, torch.tensor([-2, 0, 0])), IndexError, "adapter_id -2"),
        (lambda: ops.multi_lora(X, W, POOL, torch.tensor([2**40, 0, 0])), IndexError, f"adapter_id {2**40}"),
        (lambda: ops.multi_lora(X, W, POOL, IDS.int()), TypeError, r"adapter_id is torch.int32; convert it with .long\(\)"),
        (lambda: ops.multi_lora(X, W, POOL, IDS[:2]), ValueError, r"adapter_id has shape \(2,\), want \(3,\)"),
        (lambda: ops.multi_lora(X, torch.randn(5, 8), POOL, IDS), ValueError, r"pool is for weights \(6, 8\), .* \(5, 8\)"),
        (lambda: ops.multi_lora(X, W, POOL, IDS.to("meta")), ValueError, "adapter_id on meta"),
        (lambda: ops.multi_lora(X.half(), W, POOL, IDS), TypeError, "weight is torch.float32, x is torch.float16"),
        (lambda: POOL.add(torch.randn(5, 8), torch.randn(6, 5), 1.0), ValueError, "rank 5, allowed: 1 to 4"),
        (lambda: POOL.add(torch.randn(2, 8), torch.randn(6, 3), 1.0), ValueError, r"must be \[R, 8\] and \[6, R\]"),
        (lambda: POOL.add(torch.randn(2, 8), torch.randn(6, 2), 1.0, torch.ones(6)), ValueError, "made with dora=True"),
        (lambda: POOL.remove(3), IndexError, r"there is no adapter 3; there are \[0, 1\] in 4 slots"),
        (lambda: POOL.get(-1), IndexError, "there is no adapter -1"),
        (lambda: AdapterPool((6, 4), 8, 2, 4, swiglu=True), ValueError, r"parts of \(6, 4\) rows with swiglu; allowed: one of"),
        (lambda: POOL.add_parts([None, None]), ValueError, "2 parts; this pool's weight has 1"),
        (lambda: POOL.add_parts([None], slot=0), RuntimeError, r"slot 0 is taken or is none; free are \[2, 3\]"),
        (lambda: ops.multi_lora(X, W, POOL, IDS, norm=torch.ones(7)), ValueError, r"norm has shape \(7,\), want \(8,\)"),
        (lambda: ops.multi_lora(X, Panels.pack(W, True), POOL, IDS), ValueError, "packed with swiglu"),
        (lambda: AdapterPool(6, 8, 0, 4), ValueError, "slots is 0, allowed: 1 and more"),
        (lambda: AdapterPool(6, 8, 1, 4, dtype=torch.bfloat16), ValueError, "on a CPU the pool is float32"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_full_pool():
    pool, _ = adapters(6, 8, [2])
    for _ in range(2):
        pool.add(torch.randn(1, 8), torch.randn(6, 1), 1.0)
    with pytest.raises(RuntimeError, match="all 3 slots are taken; remove one first"):
        pool.add(torch.randn(1, 8), torch.randn(6, 1), 1.0)
