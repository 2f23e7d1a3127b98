"""The CUDA C++ kernels against the CPU's, bit for bit: on a GPU, or on this processor with the library that tests/cuda_host
makes of them, which FASTLLM_CUDA_HOST names. tests/test_cuda.py runs this file, as test_triton.py does _triton_interpreter.py."""

import sys

import _oracle
import pytest
import torch
from _cuda_host import DEVICE, HOST, order, pose
from _sample_rows import FIELDS, HARD_PENALTIES, hard_rows, penalised

from fastllm import _C
from fastllm.bench.case import Make
from fastllm.bench.cases.kv_append import SUITE as APPEND
from fastllm.bench.cases.quant_linear import FORMATS, GROUPED, random_weight
from fastllm.bench.cases.quant_linear import SUITE as QUANT
from fastllm.bench.cases.sample import PENALTIES, SUITE, USUAL
from fastllm.ops import SampleState, _triton
from fastllm.ops._op import OPS
from fastllm.ops.kv_append import cuda_refusal
from fastllm.ops.kv_cache import PAGE, KVPages
from fastllm.ops.quant_linear import CUDA_ROWS

pytestmark = pytest.mark.skipif(_C.isa() == "generic", reason="the generic tier rounds an fma twice")
SEEDS = (
    (1, 2) if HOST else (0,)
)  # threads take turns in another order with each; a kernel without races has the same bits
# What the library on a processor takes its device for: (first number of the capability, shared memory of a block), and seeds
DEVICES = (
    {"clusters": (9, 227 << 10, SEEDS), "single blocks": (8, 163 << 10, (1,)), "global memory": (9, 48 << 10, (2,))}
    if HOST
    else {"": None}
)

if not HOST:
    _triton.load()  # some are compared with Triton's kernels


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def device(request, monkeypatch):
    if HOST:
        pose(*request.param[:2])
        monkeypatch.setattr(sys.modules[__name__], "SEEDS", request.param[2])


def on_device(value):
    if isinstance(value, SampleState):
        return SampleState(*(on_device(t) for t in (value.settings, value.history, value.suppress, value.rows)))
    return value.to(DEVICE) if torch.is_tensor(value) else value


def check(op: str, *arguments, against: str = "cpu") -> None:
    """The bits of the CPU's kernel (or Triton's), whichever threads go first."""
    given = [on_device(a) for a in arguments]
    wanted = _oracle.as_tuple(OPS[op].cpu(*arguments) if against == "cpu" else OPS[op].triton(*given))
    for seed in SEEDS:
        order(seed)
        for ours, theirs in zip(_oracle.as_tuple(OPS[op].cuda(*given)), wanted, strict=True):
            assert torch.equal(ours.cpu().nan_to_num(-7.0), theirs.cpu().nan_to_num(-7.0)), (ours, theirs)


def check_sample(logits, state, entropy: bool = True) -> None:
    check("sample", logits, state.settings, state.history, state.suppress, state.rows, entropy)


# ------------------------------------------------------------------------------------------------------------- sample


@_oracle.cases(SUITE)
def test_sample(case, device):
    inputs = _oracle.draw(SUITE, case, torch.float32)
    check_sample(inputs["logits"], inputs["state"])


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_sample_on_hard_rows(fields, device):
    check_sample(*hard_rows(fields))


@pytest.mark.parametrize("fields", [{}, USUAL, {"top_p": 0.9}, {"temperature": 0.0}], ids=str)
def test_sample_with_penalties(fields, device):
    logits = torch.randn(2, 9000, generator=torch.Generator().manual_seed(5)) * 4
    check_sample(logits, penalised(2, {**fields, **HARD_PENALTIES}), entropy=bool(fields))


def test_penalties_without_a_history(device):
    """Tokens are counted where none are kept: there is nothing to penalise, and no copy of the row to do it in."""
    logits = torch.randn(2, 32000, generator=torch.Generator().manual_seed(6)) * 4
    state = SampleState.create(2, position=5, **HARD_PENALTIES)
    assert state.history.shape[1] == 0
    check_sample(logits, state)


@pytest.mark.parametrize("fields", [{}, {"top_k": 30}, {"top_p": 0.95}, {"min_p": 0.05}, {"top_k": 200}], ids=str)
def test_draws(fields, device):
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(2)) * 2
    check_sample(logits.expand(12, -1), SampleState.create(12, seed=torch.arange(12), index=-5, **fields))


def sampled(logits, state):
    return [t.cpu() for t in OPS["sample"].cuda(*map(on_device, (logits, *state, True)))]


def test_rows_are_left_out_and_records_that_do_not_exist(device):
    logits = torch.randn(4, 100)
    logits[1] = float("nan")
    s = SampleState.create(2, top_k=5)
    rows = torch.tensor([1, -1, 2, 0], dtype=torch.int32)
    token, logprob, _, kept, _ = sampled(logits, (s.settings, s.history, s.suppress, rows))
    assert kept.tolist() == [5, 0, -1, 5] and token[1:3].tolist() == [0, 0] and logprob[1] == 0 and logprob[2].isnan()


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0}, USUAL, {"top_p": 0.5}, PENALTIES], ids=str)
def test_rows_without_a_distribution(fields, device):
    logits = torch.randn(5, 5000)
    logits[1, 4], logits[3] = float("nan"), -float("inf")
    logits[4, 0], logits[4, 4999] = float("nan"), float("inf")
    s = SampleState.create(5, history=12, **fields)
    outputs = sampled(logits, (s.settings, s.history, s.suppress, None))
    token, logprob, truncated, kept, entropy = outputs
    for output in (logprob, truncated, entropy):
        assert output.isnan().tolist() == [False, True, False, True, True]
    assert token[[1, 3, 4]].tolist() == kept[[1, 3, 4]].tolist() == [0, 0, 0]
    good = torch.tensor([0, 2])
    alone = OPS["sample"].cpu(logits[good], s.settings[good], s.history[good], s.suppress[good], None, True)
    assert all(torch.equal(o[good], a) for o, a in zip(outputs, alone, strict=True))


# -------------------------------------------------------------------------------------------------------- quant_linear


def check_quant(x, weight, bias=None, norm=None, residual=None, halves: int = 0) -> None:
    w = (weight.data, weight.rows, weight.depth, weight.bits, weight.has_min)
    own = not HOST and (norm is not None or halves == 1)  # a GPU's norm and silu have bits of their own: Triton's
    check("quant_linear", x, *w, bias, norm, 1e-6, residual, halves, against="triton" if own else "cpu")


@_oracle.cases(QUANT)
def test_quant_linear(case):
    inputs = _oracle.draw(QUANT, case, torch.float32)
    if "x" not in inputs or inputs["x"].numel() > CUDA_ROWS * inputs["weight"].depth:
        pytest.skip("more rows than it takes: Triton's")
    swiglu = int(inputs.pop("swiglu", False))
    check_quant(halves=swiglu, **inputs)


@pytest.mark.parametrize("rows", range(1, CUDA_ROWS + 1))
@pytest.mark.parametrize("form", [*FORMATS, "q4_1 g64", "int8 g128"])
def test_quant_linear_by_rows(form, rows):
    make = Make("cpu", seed=rows)
    check_quant(make.normal(rows, 1184), random_weight(make, 40, 1184, form), residual=make.normal(rows, 40))


@pytest.mark.parametrize("form", [*FORMATS, *GROUPED])
@pytest.mark.parametrize("halves", [1, 2], ids=["swiglu", "gate and up"])
def test_quant_linear_of_two_halves(form, halves):
    make = Make("cpu", seed=3)
    check_quant(make.normal(3, 2176) * 9, random_weight(make, 2 * 21, 2176, form, swiglu=True), halves=halves)


@pytest.mark.parametrize("form", FORMATS)
def test_quant_linear_of_odd_numbers(form):
    """Zeros, subnormals, infinities and a NaN, each in a row of its own."""
    make = Make("cpu", seed=4)
    x = make.normal(6, 96)
    x[0], x[1, :32], x[2, 5], x[3, 40], x[4] = 0, 1e-36, float("inf"), float("nan"), x[4] * 1e30
    check_quant(x, random_weight(make, 20, 96, form))


# ----------------------------------------------------------------------------------------------------------- kv_append


def appended(run, device, k, v, slot, position, table, q, pages):
    """q as it is turned, and the pages; on a GPU keys are rows."""
    (_, heads, dim), dtype = k.shape, k.dtype
    keys, values = (torch.zeros(pages, heads, PAGE, dim, dtype=dtype, device=device) for _ in range(2))
    cache = KVPages(keys.mT, values) if run == OPS["kv_append"].cuda else KVPages.empty(pages, heads, dim, dtype)
    out = run(k, v, *cache, slot, position, table, q)
    return [t.cpu() for t in (out, cache.k, cache.v)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", APPEND.correct, ids=lambda case: case.label)
def test_kv_append(case, dtype, device):
    drawn = _oracle.draw(APPEND, case, dtype)
    given = [drawn.get(name) for name in ("k", "v", "slot", "position", "table", "q", "pages")]
    wanted = appended(OPS["kv_append"].cpu, "cpu", *given)
    for seed in SEEDS:
        order(seed)
        found = appended(OPS["kv_append"].cuda, DEVICE, *map(on_device, given))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_kv_append_of_what_is_not_there(device):
    """A position outside the table is NaN, a slot outside the pages is not written; the others are as ever."""
    drawn = _oracle.draw(APPEND, next(c for c in APPEND.correct if c.label.startswith("37 tokens")), torch.bfloat16)
    k, v, slot, position, table, q, pages = (drawn[n] for n in ("k", "v", "slot", "position", "table", "q", "pages"))
    good = appended(OPS["kv_append"].cpu, "cpu", k, v, slot, position, table, q, pages)
    slot, position = slot.clone(), position.int()
    slot[5], position[3], position[20] = pages * PAGE, -1, len(table)
    out, keys, values = appended(
        OPS["kv_append"].cuda, DEVICE, *map(on_device, (k, v, slot, position, table, q)), pages
    )
    lost = torch.zeros(37, dtype=torch.bool).index_fill(0, torch.tensor([3, 20]), True)
    assert out[lost].isnan().all() and torch.equal(out[~lost], good[0][~lost])
    rows = keys.mT.transpose(1, 2).flatten(0, 1), good[1].mT.transpose(1, 2).flatten(0, 1)
    assert rows[0][[3, 20]].isnan().all() and not rows[0][5].any() and not values[0, :, 5].any()
    rest = [n for n in range(37) if n not in (3, 5, 20)]
    assert torch.equal(rows[0][rest], rows[1][rest])


def test_what_kv_append_leaves_to_triton():
    k, rows = torch.zeros(4, 2, 8, dtype=torch.bfloat16), torch.zeros(3, 2, PAGE, 8, dtype=torch.bfloat16)
    assert cuda_refusal(k, rows.mT, rows, None) is None
    for arguments, why in (
        ((k, rows.mT, rows, torch.zeros(1)), "quantised pages"),
        ((k.float(), rows.mT, rows, None), "float32"),
        ((k.expand(65, -1, -1, -1)[:, 0], rows.mT, rows, None), "65 tokens: up to 64"),
        ((k, rows.mT.contiguous(), rows, None), r"pages that are not [heads, 16, dim]"),
    ):
        assert cuda_refusal(*arguments) == why
