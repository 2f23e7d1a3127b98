"""kv_append: that it writes its rows and nothing else."""

import os

import _oracle
import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.cases.kv_append import SUITE
from fastllm.bench.cases.paged_attention import QUANTISED
from fastllm.ops import KVPages
from fastllm.ops._op import OPS

KINDS = pytest.mark.parametrize("kind", QUANTISED)


def draw(tokens=40, heads=4, kv_heads=2, dim=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(tokens, h, dim, generator=g) for h in (heads, kv_heads, kv_heads))
    return q, k, v, torch.randint(0, 300, (tokens,), generator=g), ops.rope_table(300, dim)


@_oracle.dtypes(SUITE)
def test_bits_are_those_of_rope(dtype):
    q, k, v, position, table = draw(dim=80)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    cache = KVPages.empty(5, 2, 80, dtype)
    slot = torch.randperm(80)[:40]
    rotated = ops.kv_append(k, v, cache, slot, position, table, q)
    q_rope, k_rope = ops.rope(q, k, position, table)
    assert torch.equal(rotated, q_rope)
    assert torch.equal(cache.k[slot // 16, :, :, slot % 16], k_rope)
    assert torch.equal(cache.v[slot // 16, :, slot % 16], v)


def test_other_slots_are_untouched_and_negative_slots_are_skipped():
    q, k, v, position, table = draw()
    cache = KVPages(torch.full((6, 2, 64, 16), 7.0), torch.full((6, 2, 16, 64), 7.0))
    slot = torch.randperm(96)[:40]
    slot[::3] = -1
    rotated = ops.kv_append(k, v, cache, slot, position, table, q)
    assert torch.equal(rotated, ops.rope(q, k, position, table)[0])
    untouched = torch.ones(96, dtype=torch.bool)
    untouched[slot[slot >= 0]] = False
    assert (cache.k.permute(0, 3, 1, 2).reshape(96, -1)[untouched] == 7).all()
    assert (cache.v.transpose(1, 2).reshape(96, -1)[untouched] == 7).all()
    assert (cache.k.permute(0, 3, 1, 2).reshape(96, -1)[~untouched] != 7).all()


def test_pages_may_lie_apart():
    q, k, v, position, table = draw()
    slot, together = torch.randperm(96)[:40], KVPages.empty(6, 2, 64)
    block = torch.full((6, 3, 2, 2, 64, 16), 7.0)  # a page holds K and V of three layers
    apart = KVPages(block[:, 1, 0], block[:, 1, 1].view(6, 2, 16, 64))
    apart.k.zero_(), apart.v.zero_()
    for cache in (together, apart):
        ops.kv_append(k, v, cache, slot, position, table, q)
    assert torch.equal(together.k, apart.k) and torch.equal(together.v, apart.v)
    assert (block[:, ::2] == 7).all()


def test_threads_and_neighbours_do_not_change_a_bit():
    q, k, v, position, table = draw(tokens=700)
    slot = torch.randperm(720)[:700]
    together, alone = KVPages.empty(45, 2, 64), KVPages.empty(45, 2, 64)
    rotated = ops.kv_append(k, v, together, slot, position, table, q)
    previous = _C.set_thread_limit(1)
    try:
        for i in range(700):
            row = slice(i, i + 1)
            one = ops.kv_append(k[row], v[row], alone, slot[row], position[row], table, q[row])
            assert torch.equal(one, rotated[row])
    finally:
        _C.set_thread_limit(previous)
    assert torch.equal(together.k, alone.k) and torch.equal(together.v, alone.v)


def test_a_plan_reads_slots_and_positions_at_replay():
    q, k, v, position, table = draw(tokens=3)
    cache, slot = KVPages.empty(4, 2, 64), torch.tensor([0, 17, -1])
    plan = _C.Plan()
    plan.begin()
    rotated = ops.kv_append(k, v, cache, slot, position, table, q)
    plan.end()
    slot.copy_(torch.tensor([5, -1, 63]))
    position.add_(1)
    assert plan.replay() == 0
    expected = KVPages.empty(4, 2, 64)
    ops.kv_append(k, v, expected, torch.tensor([0, 17, -1]), position - 1, table)
    assert torch.equal(ops.kv_append(k, v, expected, slot, position, table, q), rotated)
    assert torch.equal(cache.k, expected.k) and torch.equal(cache.v, expected.v)


@KINDS
@_oracle.dtypes(SUITE)
@pytest.mark.parametrize("rotary", [64, 24])
def test_quantised_pages_hold_what_rope_gives(dtype, rotary, kind):
    # the largest number, the row below which all are zeros, and the unit of the least and of the largest numbers
    largest, smallest, least, most = {"int8": (127, 1e-35, 1.0, 1.0), "fp8": (448, 1e-32, 2**-9, 32.0)}[kind]
    q, k, v, position, _ = draw()
    q, k, v, table = q.to(dtype), k.to(dtype), v.to(dtype), ops.rope_table(300, 64)[:, :rotary].contiguous()
    k[3, 1], v[4, 0], v[5, 1], k[6, 0, 7], v[7, 0, 9] = 0, 0, smallest / 10, float("nan"), float("-inf")
    cache, slot = KVPages.empty(5, 2, 64, QUANTISED[kind]), torch.randperm(80)[:40]
    rotated = ops.kv_append(k, v, cache, slot, position, table, q)
    q_rope, _ = ops.rope(q, k, position, table)
    assert torch.equal(rotated, q_rope)
    _, k_rope = ops.rope(q.float(), k.float(), position, table)
    written = cache.floats()
    page, offset = slot // 16, slot % 16
    for now, exact, scale in (
        (written.k[page, :, :, offset], k_rope, cache.scales[page, :, 0, offset]),
        (written.v[page, :, offset], v.float(), cache.scales[page, :, 1, offset]),
    ):
        top = exact.abs().amax(-1)
        bad = ~top.isfinite()
        assert torch.equal(scale.isnan(), bad) and bad.sum() == 1 and now[bad].isnan().all()
        torch.testing.assert_close(
            scale[~bad], torch.where(top < smallest, 0.0, top / largest)[~bad], rtol=3e-7, atol=0
        )
        unit = (exact.abs() / 8).clamp(scale[..., None] * least, scale[..., None] * most)  # an eighth of a power of two
        assert ((now - exact).abs() <= 0.502 * unit + smallest)[~bad].all()
        assert (now.abs().amax(-1)[~bad] >= 0.999 * top[~bad] - smallest).all()  # the largest stays what it is


@pytest.mark.parametrize("flush", [False, True])
def test_fp8_rounds_as_torch_does(flush):
    """To nearest, ties to even, subnormal numbers too; zeros keep their sign. A largest of 448 makes the scale 1."""
    steps = torch.arange(0x7F).to(torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (steps[1:] + steps[:-1]) / 2
    sizes = torch.cat((steps, ties, ties.nextafter(steps[1:]), ties.nextafter(steps[:-1]), torch.rand(1000) * 0.02))
    sizes = torch.cat((sizes, 10.0 ** torch.linspace(-44, 2.6, 400)))
    numbers = torch.cat((sizes, -sizes)).unflatten(0, (-1, 1, 1)).repeat(1, 1, 16)
    numbers[..., 15] = 448
    cache, slot = KVPages.empty(len(numbers), 1, 16, torch.float8_e4m3fn), torch.arange(len(numbers)) * 16
    torch.set_flush_denormal(flush)
    try:
        ops.kv_append(numbers, numbers, cache, slot, torch.zeros_like(slot), ops.rope_table(1, 16))
    finally:
        torch.set_flush_denormal(False)
    assert (cache.scales[:, 0, 1, 0] == 1).all()
    assert torch.equal(cache.as_bits().v[:, 0, 0], numbers[:, 0].to(torch.float8_e4m3fn).view(torch.uint8))


@KINDS
def test_quantised_pages_the_same_alone_and_with_one_thread(kind):
    q, k, v, position, table = draw(tokens=300)
    slot = torch.randperm(320)[:300]
    slot[::7] = -1
    together, alone = (KVPages.empty(20, 2, 64, QUANTISED[kind]) for _ in range(2))
    ops.kv_append(k, v, together, slot, position, table, q)
    previous = _C.set_thread_limit(1)
    try:
        for i in range(300):
            ops.kv_append(k[i : i + 1], v[i : i + 1], alone, slot[i : i + 1], position[i : i + 1], table)
    finally:
        _C.set_thread_limit(previous)
    assert all(torch.equal(a, b) for a, b in zip(together.as_bits(), alone.as_bits(), strict=True))
    skipped = torch.ones(320, dtype=torch.bool)
    skipped[slot[slot >= 0]] = False
    assert (together.scales.permute(0, 3, 1, 2).reshape(320, -1)[skipped] == 0).all()


@KINDS
def test_quantised_reference(kind):
    """What the reference writes differs from the kernel's bytes by one at most, where a product lies on a tie."""
    from fastllm.ops.kv_append import reference

    _, k, v, position, table = draw()
    ours, plain = (KVPages.empty(3, 2, 64, QUANTISED[kind]) for _ in range(2))
    slot = torch.arange(40)
    ops.kv_append(k, v, ours, slot, position, table)
    reference(k, v, *plain.as_bits(), slot, position, table, None)
    for a, b in zip(ours.as_bits()[:2], plain.as_bits()[:2], strict=True):
        assert (a.int() - b.int()).abs().max() <= 1 and (a != b).float().mean() < 0.01
    torch.testing.assert_close(ours.scales, plain.scales, rtol=3e-7, atol=0)


def test_compile_and_opcheck():
    _oracle.check_compile(SUITE, SUITE.correct[0])
    _oracle.check_compile(SUITE, SUITE.correct[1])
    q, k, v, position, table = draw(tokens=3)
    for given in (q, None):
        for dtype in (torch.float32, *QUANTISED.values()):
            arguments = (
                k,
                v,
                *KVPages.empty(2, 2, 64, dtype).as_bits(),
                torch.tensor([3, -1, 20]),
                position,
                table,
                given,
            )
            torch.library.opcheck(OPS["kv_append"].raw, arguments)


@KINDS
def test_compile_into_quantised_pages(kind):
    q, k, v, position, table = draw(tokens=3)
    compiled, eager = (KVPages.empty(2, 2, 64, QUANTISED[kind]) for _ in range(2))
    arguments = torch.tensor([3, -1, 20]), position, table, q
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(ops.kv_append, fullgraph=True)(k, v, compiled, *arguments)
    ops.kv_append(k, v, eager, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(compiled.as_bits(), eager.as_bits(), strict=True))


def test_the_cache_takes_no_gradient():
    q, k, v, position, table = draw(tokens=3)
    cache = KVPages.empty(1, 2, 64)
    out = ops.kv_append(k.requires_grad_(), v, cache, torch.arange(3), position, table, q.requires_grad_())
    assert not cache.k.requires_grad and torch.autograd.grad(out.sum(), q)[0].isfinite().all()


Q, K, V, P, TABLE = draw(tokens=3)
CACHE, SLOT = KVPages.empty(2, 2, 64), torch.arange(3)
INT8, FP8 = (KVPages.empty(2, 2, 64, dtype) for dtype in QUANTISED.values())
SCALES = INT8.scales


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (K.double(), V.double(), CACHE, SLOT, P, TABLE),
            TypeError,
            "k is float64, allowed: float32, bfloat16, float16",
        ),
        ((K.half(), V.half(), CACHE, SLOT, P, TABLE), TypeError, "k_pages is torch.float32, k is torch.float16"),
        ((K, V.half(), CACHE, SLOT, P, TABLE), TypeError, "v is torch.float16, k is torch.float32"),
        ((K, V[:2], CACHE, SLOT, P, TABLE), ValueError, r"v \(2, 2, 64\) must both be"),
        ((K, V, CACHE, SLOT, P, TABLE, Q[:2]), ValueError, r"q \(2, 4, 64\) must be \[3, H, 64\]"),
        ((K, V, KVPages.empty(2, 3, 64), SLOT, P, TABLE), ValueError, r"must be \[P, 2, 64, 16\]"),
        (
            (K, V, KVPages(*(t.mT for t in KVPages.empty(2, 2, 16)[:2])), SLOT, P, TABLE),
            ValueError,
            "each page contiguous",
        ),
        ((K, V, KVPages.empty(2, 2, 32), SLOT, P, TABLE), ValueError, "make them with KVPages.empty"),
        ((K, V, KVPages(CACHE.k.char(), CACHE.v.char()), SLOT, P, TABLE), TypeError, "k_pages is torch.int8, k is"),
        (
            (K, V, CACHE._replace(scales=SCALES), SLOT, P, TABLE),
            TypeError,
            "with scales, pages are int8 or float8_e4m3fn",
        ),
        ((K, V, INT8._replace(scales=SCALES.double()), SLOT, P, TABLE), TypeError, "scales float32, got"),
        (
            (K, V, INT8._replace(scales=SCALES[:1]), SLOT, P, TABLE),
            ValueError,
            r"and scales \(2, 2, 2, 16\), each page",
        ),
        ((K, V, INT8._replace(v=FP8.v), SLOT, P, TABLE), TypeError, "got torch.int8, torch.float8_e4m3fn and"),
        ((K, V, FP8._replace(scales=None), SLOT, P, TABLE), TypeError, "k_pages is torch.float8_e4m3fn, k is"),
        ((K, V, FP8.as_bits(), SLOT, P, TABLE), TypeError, "float8_e4m3fn and scales float32, got torch.uint8"),
        *(
            ((K[..., :8], V[..., :8], KVPages.empty(2, 2, 8, dtype), SLOT, P, TABLE), ValueError, "a multiple of 16")
            for dtype in QUANTISED.values()
        ),
        ((K, V, CACHE, SLOT.int(), P, TABLE), TypeError, "slot is int32, allowed: int64"),
        ((K, V, CACHE, SLOT[:2], P, TABLE), ValueError, r"slot \(2,\) and position \(3,\) must be \[3\]"),
        ((K, V, CACHE, SLOT + 30, P, TABLE), IndexError, "slots up to 32 in 2 pages of 16"),
        ((K, V, CACHE, SLOT, P + 300, TABLE), IndexError, "in a table of 300"),
        ((K, V, CACHE, SLOT, P, ops.rope_table(4, 66)), ValueError, "at most head dim 64"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.kv_append(*arguments)


def test_a_large_cache_is_zero_aligned_and_of_its_shape():
    cache = KVPages.empty(300, 4, 64)
    assert cache.k.shape == (300, 4, 64, 16) and cache.v.shape == (300, 4, 16, 64)
    assert all(t.is_contiguous() and not t.any() and t.data_ptr() % 64 == 0 for t in cache[:2])
    assert KVPages.empty(300, 4, 64, device="meta").k.device.type == "meta"


def test_cache_errors():
    with pytest.raises(ValueError, match="kv_heads is 0, allowed: >= 1"):
        KVPages.empty(1, 0, 64)


def test_a_forked_child_does_not_write_into_its_parents_cache():
    pages = ops.KVPages.empty(512, 3, 64)  # large enough for a mapping of its own
    child = os.fork()
    if child == 0:
        pages.k[0, 0, 0, 0] = 7.0
        os._exit(0)
    os.waitpid(child, 0)
    assert pages.k[0, 0, 0, 0] == 0
