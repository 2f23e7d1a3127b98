"""Every Triton kernel in Triton's interpreter, on CPU tensors, against the suites that the CPU kernels meet.

tests/test_triton.py runs this file in a process of its own: `TRITON_INTERPRET=1 pytest tests/_triton_interpreter.py`,
since Triton decides at import whether it interprets.
"""

import importlib

import _oracle
import numpy as np
import pytest
import torch
from _exact import check_exact_adapters, check_exact_model
from _interpreter import narrow, repair_bfloat16, repair_conditions, repair_patching, repair_products, widen

from fastllm import _C, ops
from fastllm.bench.cases import suites
from fastllm.ops import _triton, kv_cache
from fastllm.ops._op import OPS, Kernel, without_autocast
from fastllm.ops.attention import triton_paged, triton_tile
from fastllm.ops.kv_append import reference
from fastllm.ops.kv_cache import QUANTISED

repair_products()
repair_bfloat16()
repair_conditions()
repair_patching()
_triton.load()

# ------------------------------------------------------------------------------------------------------------- the
# suites

called: set[str] = set()


def interpreted(op) -> Kernel:
    def launch(*args, **options):
        called.add(op.name)
        return op.triton(*args, **options)

    return Kernel(without_autocast(launch, "cpu"), "Triton", "interpreter")


@pytest.fixture(autouse=True, scope="module")
def triton_on_cpu():
    for op in OPS.values():
        if op.triton:
            op._kernels["cpu"] = interpreted(op)
    importlib.import_module("fastllm.ops.linear").rounds = lambda x, weight, bias, exact, swiglu: swiglu or not exact
    kv_cache.COLUMNS.clear()  # CPU tensors stand in for a GPU's: their pages lie as there
    # The interpreter pays for an operation, hardly for its size: large blocks, still several to a case.
    for name in ("EXACT", "DENSE", "KEYS", "QUERIES", "BIAS", "DECODE"):
        table = getattr(triton_tile, name)
        table.update({dtype: {1024: triton_tile.Sizes(64, 128, 4)} for dtype in table})


def small(case, dtype: torch.dtype) -> bool:
    """Left out: cases that are large for the sake of the CPU's caches, or that compute much; more of them in 16 bits, which
    the interpreter is slowest at; and weights packed for a CPU."""
    if "packed" in case.label:
        return False
    inputs = case.inputs(_oracle.Make("meta"))
    numbers = sum(t.numel() for t in inputs.values() if torch.is_tensor(t))
    return numbers < 2**17 and case.flops < (6e6 if dtype == torch.float32 else 5e5)


def deep(suite, case) -> bool:
    """Sums that a CPU's kernel takes in parts, which stay in its first cache: half a minute each in the interpreter."""
    x = case.inputs(_oracle.Make("meta")).get("x")
    return suite.op == "quant_linear" and x is not None and x.shape[-1] > 4096


def later(p):
    """float16 is another width to convert, nothing more: slow, so that the default tier stays short."""
    return pytest.param(*p.values, id=p.id, marks=pytest.mark.slow) if p.values[2] == torch.float16 else p


TABLE = _oracle.table(lambda s, case, dtype: OPS[s.op].triton and small(case, dtype) and not deep(s, case))
TABLE = [later(p) for p in TABLE]


@pytest.mark.parametrize(("suite", "case", "dtype"), TABLE)
def test_forward_and_gradients(suite, case, dtype):
    _oracle.check_forward_and_gradients(suite, case, dtype)


@pytest.mark.parametrize("op", ["linear", "linear_cross_entropy", "lora_linear", "multi_lora", "quant_linear"])
def test_autocast_changes_no_kernel(op):
    """Of those that leave a product to torch."""
    suite = suites()[op]
    case = next(c for c in suite.correct if small(c, torch.float32) and (c.bytes(4) or c.flops))
    _oracle.check_autocast(suite, _oracle.draw(suite, case, suite.dtypes[0]))


GUARDED = [p for p in TABLE if p.values[2] == torch.bfloat16 and p.values[1].flops < 2**17]


@pytest.mark.parametrize(("suite", "case", "dtype"), GUARDED)
def test_writes_only_its_outputs(suite, case, dtype):
    _oracle.check_guards(suite, case, dtype)


@pytest.mark.parametrize("spec", [
    ops.AttentionSpec(exact=True),
    ops.AttentionSpec(exact=True, window=300, softcap=4.0, alibi=torch.rand(2), sinks=torch.randn(2)),
], ids=["causal", "all"])  # fmt: skip
@pytest.mark.parametrize("room", [1, 40], ids=["whole", "split"])
def test_exact_attention_has_the_same_bits_paged_and_dense(spec, room, monkeypatch):
    """Whatever the order of the pages, the chunks, and the programs that share the keys."""
    monkeypatch.setattr(triton_paged, "plan", lambda blocks, size, keys, step, exact, device: (
        (min(room, -(-keys // step)), -(-keys // step)) if room > 1 and keys > step else (1, 1)
    ))  # fmt: skip
    tokens, generator = 530, torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(tokens, heads, 32, generator=generator) for heads in (2, 1, 1))
    dense = ops.attention(q[None], k[None], v[None], spec)[0]
    count = -(-tokens // ops.PAGE)
    table = torch.randperm(count + 2, generator=generator)[:count].int()[None]
    cache = ops.KVPages.empty(count + 2, 1, 32)
    at = torch.arange(tokens)
    slot = table[0, at // ops.PAGE].long() * ops.PAGE + at % ops.PAGE
    ops.kv_append(k, v, cache, slot, torch.zeros_like(at), ops.rope_table(1, 32))  # position 0: no rotation
    for first, last in ((529, 530), (255, 257), (200, 300)):
        ends = torch.tensor([0, last - first], dtype=torch.int32)
        out = ops.paged_attention(q[first:last], cache, table, torch.tensor([last], dtype=torch.int32), ends, spec)
        assert torch.equal(out, dense[first:last]), (first, last)
    loose = ops.AttentionSpec(**{**vars(spec), "exact": False})
    torch.testing.assert_close(ops.attention(q[None], k[None], v[None], loose)[0], dense, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("rotary", [32, 12])
def test_quantised_pages(rotary, dtype):
    """The bytes of the reference, but for one more or less where a product lies on a tie; a NaN in the scale alone."""
    k, v = torch.randn(40, 3, 32), torch.randn(40, 3, 32)
    k[3, 1, 4], v[4, 0], v[5, 1, 2] = float("nan"), 0, float("inf")
    table, at, slot = ops.rope_table(50, rotary), torch.arange(40), torch.randperm(64)[:40]
    ours, plain = (ops.KVPages.empty(4, 3, 32, dtype) for _ in range(2))
    ops.kv_append(k, v, ours, slot, at, table)
    reference(k, v, *plain.as_bits(), slot, at, table, None)
    torch.testing.assert_close(ours.scales, plain.scales, rtol=3e-7, atol=0, equal_nan=True)
    assert ours.scales.isnan().sum() == 2
    for a, b in zip(ours.as_bits()[:2], plain.as_bits()[:2], strict=True):
        assert (a.int() - b.int()).abs().max() <= 1 and (a != b).float().mean() < 0.01


@pytest.mark.parametrize("same", [False, True], ids=["without queries", "keys as queries"])
def test_keys_without_unit_stride_are_appended(same):
    """The launcher's copy of them is neither taken for queries nor for their absence."""
    k, v, at, table = (
        torch.randn(5, 16, 2).transpose(1, 2),
        torch.randn(5, 2, 16),
        torch.arange(5),
        ops.rope_table(9, 16),
    )
    ours, plain = (ops.KVPages.empty(1, 2, 16) for _ in range(2))
    rotated = ops.kv_append(k, v, ours, at, at, table, k if same else None)
    wanted = reference(k, v, *plain, at, at, table, k if same else None)
    torch.testing.assert_close((ours.k, ours.v), (plain.k, plain.v))
    assert rotated is None if not same else torch.allclose(rotated, wanted, atol=1e-6)


@pytest.mark.skipif(_C.isa() == "generic", reason="the generic tier rounds an fma twice")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pages", QUANTISED)
@pytest.mark.parametrize("rotary", [48, 20])
def test_quantised_pages_have_the_bits_of_the_cpu(pages, dtype, rotary):
    """Bytes and scales, of zeros, of numbers that are too small, and of a row with an infinity too."""
    make = _oracle.Make(dtype=dtype, seed=6)
    k, v, q = make.normal(50, 3, 48), make.normal(50, 3, 48), make.normal(50, 6, 48)
    k[3, 1, 4], v[4, 0], v[5, 1, 2], k[6], v[7, 1] = float("nan"), 0, -float("inf"), k[6] * 1e-36, -0.0
    v[8, 2] *= 1e-3
    slot, position = torch.randperm(64)[:50], torch.arange(50)
    table = ops.rope_table(50, 48)[:, :rotary].contiguous()
    ours = ops.KVPages.empty(4, 3, 48, pages)
    cpu = ops.KVPages(*(t.clone(memory_format=torch.contiguous_format) for t in ours))  # keys as columns
    op = OPS["kv_append"]
    rotated = [f(k, v, *c.as_bits(), slot, position, table, q) for f, c in ((op.triton, ours), (op.cpu, cpu))]
    for a, b in zip((rotated[0], *ours.as_bits()), (rotated[1], *cpu.as_bits()), strict=True):
        assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_exact_model_has_the_same_bits_however_a_text_is_cut(dtype):
    check_exact_model(dtype)


def test_an_exact_model_has_the_same_bits_beside_any_adapters():
    check_exact_adapters(torch.float32)


@pytest.mark.skipif(_C.isa() == "generic", reason="the generic tier rounds an fma twice")
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_has_the_bits_of_the_cpu(interleaved):
    q, k, position = torch.randn(9, 3, 20), torch.randn(9, 1, 20), torch.randint(40, (9,))
    arguments = q, k, position, ops.rope_table(40, 16), interleaved
    for ours, theirs in zip(OPS["rope"].triton(*arguments), OPS["rope"].cpu(*arguments), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("op", ["swiglu", "rope", "cross_entropy", "lora_linear"])
def test_more_rows_than_a_side_of_the_grid(op, monkeypatch):
    monkeypatch.setattr(_triton, "_MOST_ROWS", type(_triton._MOST_ROWS)(3))
    for case in (c for c in suites()[op].correct if small(c, torch.float32)):
        _oracle.check_forward_and_gradients(suites()[op], case, torch.float32)


def test_bad_lengths_and_pages_are_nan_in_their_sequence_alone():
    cache = ops.KVPages.of(torch.randn(4, 1, ops.PAGE, 16), torch.randn(4, 1, ops.PAGE, 16))
    table, ends = torch.tensor([[0, 1], [2, 9], [3, 0]], dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    out = ops.paged_attention(torch.randn(3, 1, 16), cache, table, torch.tensor([20, 20, 99], dtype=torch.int32), ends)
    assert out[0].isfinite().all() and out[1:].isnan().all()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("swiglu", [False, True])
def test_rows_of_a_removed_adapter_have_none(exact, swiglu):
    """Not even its magnitudes."""
    make, part = _oracle.Make(seed=2), 16
    x, weight, ids = make.normal(3, 32), make.normal(2 * part, 32), torch.tensor([0, -1, 1])
    pool = ops.AdapterPool((part, part), 32, slots=2, max_rank=40, dora=True, swiglu=swiglu, exact=exact)
    for _ in range(2):
        parts = [(make.normal(r, 32), make.normal(part, r), 0.5) for r in (3, 40)]
        pool.add_parts(parts, make.normal(2 * part).abs() + 2)

    def run(ids):
        return ops.multi_lora(x, weight, pool, ids)

    whole, plain = run(ids), run(torch.full((3,), -1))
    pool.remove(0)
    found = run(ids)
    assert torch.equal(found[:2], plain[:2]) and torch.equal(found[2], whole[2]) and (whole[0] != plain[0]).any()


def test_float16_losses_under_a_loss_scale():
    _oracle.check_float16_gradients()


FAR = 2**30 + 64  # elements from head to head: the third head's begin beyond what 32 bits count


def far(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, M, N] with its heads so far apart, in memory of which only what is written exists."""
    rows, cols = x.shape[2:]
    memory = torch.empty(2 * FAR + rows * cols, dtype=x.dtype)
    return memory.as_strided(x.shape, (0, FAR, cols, 1)).copy_(x)


@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "bias"])
def test_attention_over_more_than_32_bits_of_elements(name):
    make, heads = _oracle.Make(dtype=torch.float16, seed=8), 3
    given = {n: make.normal(1, heads, 5, 16).transpose(1, 2) for n in ("q", "k", "v", "dout")}
    given["bias"] = make.normal(1, heads, 5, 5)

    def run(q, k, v, dout, bias):
        rest = (None, None, bias, None, None)
        options = (True, 0, 0.25, 0.0, 0.0, 0, 0, False)
        out, lse = OPS["attention"].triton(q, k, v, *rest, *options)
        return out, *OPS["attention_backward"].triton(dout, q, k, v, out, lse, *rest, True, *options)[:4]

    apart = far(given[name]) if name == "bias" else far(given[name].transpose(1, 2)).transpose(1, 2)
    for found, wanted in zip(run(**{**given, name: apart}), run(**given), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_packed_attention_over_more_than_32_bits_of_elements(name):
    make, row = _oracle.Make(dtype=torch.float16, seed=9), 2**29 + 64
    given = {n: make.normal(1, 8, 1, 16) for n in ("q", "k", "v", "dout")}
    ends = torch.tensor([0, 5, 8], dtype=torch.int32)

    def run(q, k, v, dout):
        rest = (ends, ends, None, None, None)
        options = (True, 0, 0.25, 0.0, 0.0, 0, 0, False)
        out, lse = OPS["attention"].triton(q, k, v, *rest, *options)
        return out, *OPS["attention_backward"].triton(dout, q, k, v, out, lse, *rest, False, *options)[:3]

    apart = torch.empty(7 * row + 16, dtype=torch.float16).as_strided((1, 8, 1, 16), (0, row, 16, 1)).copy_(given[name])
    for found, wanted in zip(run(**{**given, name: apart}), run(**given), strict=True):
        assert torch.equal(found, wanted)


def test_every_triton_kernel_ran():
    assert called == {op.name for op in OPS.values() if op.triton}


def test_bfloat16_equals_torch():
    """The repair itself, against torch's conversions."""
    wide = torch.cat((torch.randn(1000) * 10.0 ** torch.randint(-40, 38, (1000,)), torch.tensor([0.0, -0.0])))
    bits = torch.from_numpy(narrow(wide.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(bits, wide.bfloat16())
    assert torch.equal(torch.from_numpy(widen(narrow(wide.numpy()))), wide.bfloat16().float())
    assert np.isnan(widen(narrow(np.array([np.nan, np.inf], np.float32)))).tolist() == [True, False]
