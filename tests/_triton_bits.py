"""Triton kernels that promise bits, those of the CPU's kernels or of a row alone, in Triton's interpreter.

tests/test_triton.py runs this file, as it does _triton_interpreter.py. The interpreter's fma rounds once (from Triton 3.9
on; before, it rounds twice and these tests do not hold), so nothing is allowed to differ."""

import math

import _oracle
import pytest
import torch
from _interpreter import repair_conditions, repair_patching, repair_products
from _sample_rows import FIELDS, HARD_PENALTIES, hard_rows, penalised

from fastllm import _C, ops
from fastllm.bench.case import Make
from fastllm.bench.cases.lora_linear import QUANTISED as LORA_QUANTISED
from fastllm.bench.cases.lora_linear import SUITE as LORA
from fastllm.bench.cases.quant_linear import FORMATS as QUANTISED
from fastllm.bench.cases.quant_linear import GROUPED, random_weight
from fastllm.bench.cases.sample import PENALTIES, SUITE, USUAL
from fastllm.ops import _quant_gpu, _sample_gpu, _triton
from fastllm.ops._op import OPS, Kernel
from fastllm.ops.lora_linear import split
from fastllm.ops.multi_lora import AdapterPool
from fastllm.ops.quant_linear import QWeight
from fastllm.ops.sample import SampleState

repair_conditions()
repair_patching()
repair_products()
_triton.load()
pytestmark = pytest.mark.skipif(_C.isa() == "generic", reason="the generic tier rounds an fma twice")
INF, NAN = math.inf, math.nan
SAMPLE = OPS["sample"]


def assert_same_bits(ours, cpu):
    for o, c in zip(ours, cpu, strict=True):
        assert torch.equal(o.nan_to_num(-7.0), c.nan_to_num(-7.0)), (o, c)


def check_sample(logits, state, entropy: bool = True):
    arguments = (logits, state.settings, state.history, state.suppress, state.rows, entropy)
    assert_same_bits(SAMPLE.triton(*arguments), SAMPLE.cpu(*arguments))


@pytest.mark.parametrize("case", [c for c in SUITE.correct if c.bytes(4) < 2**17], ids=lambda c: c.label)
def test_sample(case):
    inputs = _oracle.draw(SUITE, case, torch.float32)
    check_sample(inputs["logits"], inputs["state"])


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_sample_on_hard_rows(fields):
    check_sample(*hard_rows(fields))


@pytest.mark.parametrize("fields", [{}, USUAL, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("penalties", [{}, HARD_PENALTIES], ids=("", "penalties"))
def test_sample_split_over_programs(monkeypatch, fields, penalties):
    monkeypatch.setattr(_sample_gpu, "splits", lambda *_: _sample_gpu._SPLITS)
    logits = torch.randn(2, 9000, generator=torch.Generator().manual_seed(5)) * 4
    state = penalised(2, {**fields, **penalties})
    check_sample(logits, state, entropy=bool(fields))


def test_rows_are_left_out_and_records_that_do_not_exist():
    logits = torch.randn(4, 100)
    logits[1] = NAN
    state = SampleState.create(2, top_k=5).with_rows(torch.tensor([1, -1, 2, 0], dtype=torch.int32))
    token, logprob, _, kept, _ = SAMPLE.triton(logits, state.settings, state.history, state.suppress, state.rows, True)
    assert kept.tolist() == [5, 0, -1, 5] and token[1:3].tolist() == [0, 0] and logprob[1] == 0 and logprob[2].isnan()


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0}, USUAL, {"top_p": 0.5}, PENALTIES], ids=str)
def test_rows_without_a_distribution(fields):
    logits = torch.randn(5, 300)
    logits[1, 4], logits[3] = NAN, -INF
    logits[4, 0], logits[4, 299] = NAN, INF
    state = SampleState.create(5, history=12, **fields)
    arguments = (state.settings, state.history, state.suppress, None, True)
    token, logprob, truncated, kept, entropy = SAMPLE.triton(logits, *arguments)
    for output in (logprob, truncated, entropy):
        assert output.isnan().tolist() == [False, True, False, True, True]
    assert token[[1, 3, 4]].tolist() == kept[[1, 3, 4]].tolist() == [0, 0, 0]
    good = torch.tensor([0, 2])
    alone = SAMPLE.triton(logits[good], state.settings[good], state.history[good], state.suppress[good], None, True)
    assert_same_bits(alone, [o[good] for o in (token, logprob, truncated, kept, entropy)])


@pytest.mark.parametrize("fields", [{}, {"top_k": 30}, {"top_p": 0.95}, {"min_p": 0.05}], ids=str)
def test_draws(fields):
    logits = torch.randn(1, 700, generator=torch.Generator().manual_seed(2)) * 2
    check_sample(logits.expand(12, -1), SampleState.create(12, seed=torch.arange(12), index=-5, **fields))


@pytest.mark.parametrize("vocab", [11, 1100])
def test_log_probabilities(vocab):
    ramp = torch.arange(vocab).float()
    special = torch.stack(
        (torch.zeros(vocab), ramp % 5, torch.where(ramp % 9 == 2, INF, ramp), torch.full_like(ramp, -INF))
    )
    logits = torch.cat((torch.randn(3, vocab, generator=torch.Generator().manual_seed(1)) * 4, special))
    logits[0, 3], logits[1, 4], logits[3:6, 5] = -INF, -0.0, -INF
    good = logits[:-1]
    for op, argument in (("top_logprobs", 7), ("top_logprobs", 20), ("target_logprobs", torch.arange(6) + 1)):
        ours, cpu = (f(good, argument) for f in (OPS[op].triton, OPS[op].cpu))
        assert_same_bits(_oracle.as_tuple(ours), _oracle.as_tuple(cpu))
    token, logprob = OPS["top_logprobs"].triton(logits[-2:], 2)
    assert token[1].tolist() == [-1, -1] and logprob.isnan().tolist() == [[False] * 2, [True] * 2]
    targets = torch.tensor([0, 1, -1, vocab, 2, 3, 0])
    nan = OPS["target_logprobs"].triton(logits, targets).isnan()
    assert nan.tolist() == [False, False, True, True, False, False, True]


def test_advance_where_it_does_not_fit():
    state = SampleState.create(4, history=2, history_len=torch.tensor([2, 0, 1, 0]), position=5)
    rows = torch.tensor([0, 1, -1, 4], dtype=torch.int32)
    position, slot = torch.tensor([3, 31, 3, 3]), torch.zeros(4, dtype=torch.int64)
    table, next_ids = torch.tensor([[5, 6]] * 4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    token = torch.tensor([7, 8, 9, 10])
    OPS["advance"].triton(token, state.settings, state.history, rows, position, None, table, slot, next_ids, 16)
    assert state.history_len.tolist() == [3, 1, 1, 0] and state.position.tolist() == [6, 6, 5, 5]
    assert state.history.tolist() == [[0, 0], [8, 0], [0, 0], [0, 0]] and next_ids.tolist() == [7, 8, 0, 0]
    assert position.tolist() == [4, 32, 3, 3] and slot.tolist() == [5 * 16 + 4, -1, -1, -1]


@pytest.mark.parametrize("form", [*QUANTISED, *GROUPED])
@pytest.mark.parametrize("shape", [(1, 96, 40), (5, 160, 33), (11, 128, 17), (70, 64, 20)], ids=str)
def test_quant_linear(form, shape):
    """By every kernel: of one row, of few, and in tiles."""
    rows, depth, cols = shape
    make = Make(seed=3)
    weight, x, ids = random_weight(make, cols, depth, form), make.normal(rows, depth), torch.arange(cols)
    x[0, :32], x[rows // 2, -1] = 0, INF
    around = make.normal(cols), None, 1e-6, make.normal(rows, cols), 0  # bias, norm, eps, residual, halves
    weight = weight.data, weight.rows, weight.depth, weight.bits, weight.has_min
    ours, cpu = (f(x, *weight, *around) for f in (OPS["quant_linear"].triton, OPS["quant_linear"].cpu))
    assert_same_bits((ours,), (cpu,))
    ours, cpu = (f(ids, *weight) for f in (OPS["quant_embedding"].triton, OPS["quant_embedding"].cpu))
    assert_same_bits((ours,), (cpu,))


@pytest.mark.parametrize("form", ["int4", "q4_1 g64", "int8 g128", "8 bits + minimum"])
def test_quant_linear_halves_rows_and_gradient(form, monkeypatch):
    """Gate and up panels in turn; a row alone; dequantised rows to the bit, and so the gradient in pieces."""
    make = Make(seed=4)
    weight, x = random_weight(make, 74, 160, form, swiglu=True), make.normal(70, 160)
    arguments = weight.data, weight.rows, weight.depth, weight.bits, weight.has_min
    gpu, cpu = OPS["quant_linear"].triton, OPS["quant_linear"].cpu
    both = gpu(x, *arguments, None, None, 1e-6, None, 2)  # GATE_UP: two halves side by side
    assert_same_bits((both,), (cpu(x, *arguments, None, None, 1e-6, None, 2),))
    whole = gpu(x, *arguments, None, None, 1e-6, None, 1)  # SWIGLU
    for some in (slice(0, 1), slice(33, 38), slice(60, 70)):
        assert torch.equal(gpu(x[some], *arguments, None, None, 1e-6, None, 1), whole[some])
        assert torch.equal(gpu(x[some], *arguments, None, None, 1e-6, None, 2), both[some])
    dense = _quant_gpu.dequantise(weight.data, weight.group, 5, 60, *arguments[1:], 1)
    assert torch.equal(dense, weight.dequantize()[5:65])
    monkeypatch.setattr(_quant_gpu, "_PIECE", 16 * 160)
    dy = make.normal(3, 7, 74)
    dx, exact = OPS["quant_linear_backward"].triton(dy, *arguments, 1), dy.double() @ weight.dequantize().double()
    torch.testing.assert_close(dx.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", LORA_QUANTISED, ids=lambda c: c.label)
def test_lora_over_a_quantised_base(case, monkeypatch):
    """Forward, gradients and row norms by the kernels of a GPU."""
    for name in ("lora_linear", "lora_linear_backward", "lora_row_norms"):
        op = OPS[name]
        monkeypatch.setitem(op._kernels, "cpu", Kernel(op.triton, "Triton", "interpreter"))
    _oracle.check_forward_and_gradients(LORA, case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("swiglu", [False, True])
def test_exact_linear_of_a_row_alone(dtype, swiglu):
    """Whatever tile a number of rows takes."""
    x, weight = torch.randn(150, 100).to(dtype), torch.randn(80, 100).to(dtype)
    whole = OPS["linear_exact"].triton(x, weight, None, None, 1e-6, None, swiglu, False)
    for begin, end in ((0, 1), (77, 78), (149, 150), (3, 60), (10, 90)):
        alone = OPS["linear_exact"].triton(x[begin:end], weight, None, None, 1e-6, None, swiglu, False)
        assert torch.equal(alone, whole[begin:end])


SIZES = {(80,): False, (48, 16, 16): False, (33, 33): True}  # of what a weight stacks; whether they are gate and up


@pytest.mark.parametrize("form", ["float32", "float16", "int8"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("most", [20, 100])
def test_exact_rows_with_adapters(most, sizes, form, monkeypatch):
    """Each has the bits of lora_linear with its adapter alone, or of the plain op, whatever stands beside it."""
    monkeypatch.setitem(OPS["swiglu"]._kernels, "cpu", Kernel(OPS["swiglu"].triton, "Triton", "interpreter"))
    make, swiglu, dtype = Make(seed=4), SIZES[sizes], torch.float16 if form == "float16" else torch.float32
    cols, depth, rows = sum(sizes), 96, 70
    weight, x = make.normal(cols, depth, scale=depth**-0.5).to(dtype), make.normal(rows, depth).to(dtype)
    bias = None if swiglu else make.normal(cols).to(dtype)

    def held(some=slice(None), swiglu=False):
        return split(QWeight.quantize(weight[some], 8, swiglu) if form == "int8" else weight[some])

    pool = AdapterPool(sizes, depth, 5, most, dora=True, swiglu=swiglu, exact=True)
    each, ids = [], make.integers(-1, 3, rows)
    pool.a, pool.b = pool.a.to(dtype), pool.b.to(dtype)  # as on a GPU
    for ranks in ((16, 4, 20), (3, 0, most), (most, 16, 1)):
        a, b = ([make.normal(*s, scale=0.2).to(dtype) for s in shapes]
                for shapes in ([(r, depth) for r in ranks], list(zip(sizes, ranks, strict=False))))  # fmt: skip
        parts = [(p, q, 0.5 + i) if p.numel() else None for i, (p, q) in enumerate(zip(a, b, strict=False))]
        each.append((parts, make.normal(cols).abs() + 0.5))
        pool.add_parts(*each[-1])

    def mixed(some):
        fields = (pool.a, pool.b, pool.rank, pool.scale, pool.gain, pool.part, ids[some], bias)
        return OPS["multi_lora"].triton(x[some], *held(swiglu=swiglu), *fields, None, 1e-6, None, swiglu, True)

    def alone(some, parts, gain):
        found, first = [], 0
        for size, part in zip(sizes, parts, strict=True):
            its = slice(first, first := first + size)
            a, b, scale = part or (torch.zeros(1, depth, dtype=dtype), torch.zeros(size, 1, dtype=dtype), 0.0)
            more = (None if bias is None else bias[its], gain[its], 0.0, 0, 0, True)
            found.append(OPS["lora_linear"].triton(x[some], *held(its), a, b, scale, *more)[0])
        return ops.swiglu(*found) if swiglu else torch.cat(found, -1)

    whole = mixed(slice(None))
    for some in (slice(0, 1), slice(30, 70)):
        assert torch.equal(mixed(some), whole[some])
    for i, adapter in enumerate(each):
        mine = (ids == i).nonzero()[:, 0]
        assert torch.equal(whole[mine[:1]], alone(mine[:1], *adapter))
        assert torch.equal(whole[mine], alone(mine, *adapter))
    none = x[ids < 0]
    if form == "int8":
        wanted = OPS["quant_linear"].triton(
            none, *held(swiglu=swiglu)[0:1], cols, depth, 8, False, bias, None, 1e-6, None, int(swiglu)
        )
    else:
        wanted = OPS["linear_exact"].triton(none, weight, bias, None, 1e-6, None, swiglu, False)
    assert torch.equal(whole[ids < 0], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.7}, USUAL, {"top_p": 0.8, "temperature": 1.3}], ids=str)
def test_exact_log_probabilities_are_the_sampler_s(fields, dtype):
    """And a row has the same alone, as has its exact loss."""
    x, weight = torch.randn(70, 33).to(dtype) * 4, torch.randn(1030, 33).to(dtype) / 4
    x[5], weight[400] = x[4], weight[1]
    logits = OPS["linear_exact"].triton(x, weight, None, None, 1e-6, None, False, True)
    state = SampleState.create(70, seed=torch.arange(70), **fields)
    token, logprob, truncated, kept, entropy = SAMPLE.triton(
        logits, state.settings, state.history, state.suppress, state.rows, True
    )
    op = OPS["token_logprobs"]
    assert_same_bits(op.triton(x, weight, token, None, 1.0, True), (logprob, entropy))
    temperature = fields.get("temperature", 1.0)
    whole = op.triton(x, weight, token, kept, temperature, True)
    assert_same_bits(whole[:1], (truncated,))
    assert_same_bits(op.triton(x[3:9], weight, token[3:9], kept[3:9], temperature, True), [w[3:9] for w in whole])
    wanted = op.reference(x.double(), weight.double(), token, kept, temperature)
    torch.testing.assert_close(whole, tuple(w.float() for w in wanted), rtol=1e-4, atol=1e-4)
    given = token, -100, 0.1, 0.0, 0.0, True
    losses = OPS["linear_cross_entropy"].triton(x, weight, None, *given)
    assert torch.equal(OPS["linear_cross_entropy"].triton(x[3:9], weight, None, token[3:9], *given[1:]), losses[3:9])


@pytest.mark.parametrize(("weight", "target", "kept"), [
    ([0, NAN, 1], 0, 3), ([-INF, -INF, -INF], 0, 3), ([0, 1, 2], 3, 3), ([0, 1, 2], -1, 3), ([0, 1, 2], 1, 0),
], ids=["NaN", "nothing", "beyond", "below", "nothing kept"])  # fmt: skip
def test_exact_log_probabilities_of_bad_rows(weight, target, kept):
    given = (torch.tensor([target]), torch.tensor([kept], dtype=torch.int32), 1.0, True)
    found = OPS["token_logprobs"].triton(torch.ones(1, 1), torch.tensor([weight]).float().t(), *given)
    assert all(t.isnan().all() for t in found)


def test_an_exact_log_probability_of_what_is_not_kept():
    target, kept = torch.tensor([0, 1, 2]), torch.full((3,), 2, dtype=torch.int32)
    weight = torch.tensor([[0.0], [1.0], [2.0]])
    logprob, _ = OPS["token_logprobs"].triton(torch.ones(3, 1), weight, target, kept, 1.0, True)
    assert logprob[0] == -INF
    torch.testing.assert_close(logprob[1:], torch.tensor([1.0, 2.0]).log_softmax(0))
