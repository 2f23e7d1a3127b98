"""paged_attention: the contract: the bits of the dense forward, whatever chunks and pages."""

import _oracle
import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.cases.attention import slopes
from fastllm.bench.cases.paged_attention import QUANTISED, SUITE, gather
from fastllm.ops import AttentionSpec, KVPages
from fastllm.ops._op import OPS

NAN = float("nan")
KINDS = pytest.mark.parametrize("kind", QUANTISED)


def test_compile_and_opcheck():
    _oracle.check_compile(SUITE, SUITE.correct[2])
    quantised = [next(case for case in SUITE.correct if kind in case.label) for kind in QUANTISED]
    for case in (SUITE.correct[6], *quantised):
        inputs = _oracle.draw(SUITE, case, torch.float32)
        pages = KVPages(inputs["k_pages"], inputs["v_pages"], inputs.get("scales")).as_bits()
        lengths = inputs["block_table"], inputs["context_len"], inputs["cu_q"]
        settings = (None, None, True, 0, 0.125, inputs["spec"].softcap or 0.0, False)
        torch.library.opcheck(OPS["paged_attention"].raw, (inputs["q"], *pages, *lengths, *settings))
    for case in quantised:
        _oracle.check_compile(SUITE, case)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


class Filled:
    """A cache filled chunk by chunk, as an engine does it, in pages of NaN taken in random order."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, spare: int = 3, dtype: torch.dtype = torch.float32):
        tokens, kv_heads, dim = k.shape
        count = -(-tokens // 16)
        self.k, self.v, self.written = k, v, 0
        shape = (count + spare, kv_heads)
        self.cache = KVPages.empty(*shape, dim, dtype)
        for tensor in self.cache[:2] if dtype == torch.float32 else self.cache[2:]:
            tensor.fill_(NAN)
        self.table = torch.randperm(count + spare)[:count].int()[None]
        self.rotation = ops.rope_table(1, dim - dim % 2)  # position 0: no rotation

    def append(self, n: int) -> None:
        at = torch.arange(self.written, self.written + n)
        slot = self.table[0, at // 16].long() * 16 + at % 16
        new = slice(self.written, self.written + n)
        ops.kv_append(self.k[new], self.v[new], self.cache, slot, torch.zeros_like(at), self.rotation)
        self.written += n

    def attend(self, q: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        """Appends the tokens of q, then attends."""
        self.append(len(q))
        return ops.paged_attention(q, self.cache, self.table, int32(self.written), int32(0, len(q)), spec)


HEADS = [(9, 3), (32, 4), (4, 4), (6, 1), (16, 1)]
SPECS = [
    AttentionSpec(),
    AttentionSpec(window=70),
    AttentionSpec(window=300, softcap=2.0),
    AttentionSpec(scale=0.5, alibi=slopes(9)),
    AttentionSpec(window=200, sinks=torch.linspace(-2, 3, 9)),
]


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "spec"), [
    *((h, hk, 64, AttentionSpec()) for h, hk in HEADS),
    *((9, 3, 48, spec) for spec in SPECS),
    (2, 1, 33, SPECS[1]), (8, 1, 128, SPECS[0]), (3, 1, 256, SPECS[0]), (3, 3, 7, SPECS[2]),
])  # fmt: skip
def test_any_chunks_equal_the_dense_forward(heads, kv_heads, dim, spec, chunk):
    tokens = 530 if chunk == 1 else 800
    q, k, v = torch.randn(tokens, heads, dim), torch.randn(tokens, kv_heads, dim), torch.randn(tokens, kv_heads, dim)
    dense = ops.attention(q[None], k[None], v[None], spec)[0]
    filled = Filled(k, v)
    chunks = [filled.attend(piece, spec) for piece in q.split(chunk)]
    assert torch.equal(torch.cat(chunks), dense)


@KINDS
@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(window=70, softcap=2.0)], ids=["plain", "window"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (16, 1, 128), (4, 4, 16)])
def test_quantised_pages_have_the_same_bits_in_any_chunks_pages_and_threads(heads, kv_heads, dim, spec, kind):
    tokens = 700
    q, k, v = torch.randn(tokens, heads, dim), torch.randn(tokens, kv_heads, dim), torch.randn(tokens, kv_heads, dim)
    whole = Filled(k, v, dtype=QUANTISED[kind])
    expected = whole.attend(q, spec)
    for chunk in (1, 7, 64):
        filled = Filled(k, v, dtype=QUANTISED[kind])
        previous = _C.set_thread_limit(1 if chunk == 7 else 0)
        try:
            chunks = [filled.attend(piece, spec) for piece in q.split(chunk)]
        finally:
            _C.set_thread_limit(previous)
        assert torch.equal(torch.cat(chunks), expected)
    exact = ops.attention(q[None], k[None], v[None], spec)[0]
    assert (expected - exact).abs().max() < (0.05 if kind == "int8" else 0.2) and not torch.equal(expected, exact)


@KINDS
def test_a_nan_in_quantised_pages_stays_with_those_who_see_it(kind):
    filled = Filled(torch.randn(40, 1, 16), torch.randn(40, 1, 16), dtype=QUANTISED[kind])
    filled.k[20, 0, 3] = filled.v[30, 0, 5] = NAN
    nan = filled.attend(torch.randn(40, 2, 16), AttentionSpec()).isnan()
    assert not nan[:20].any() and nan[20:].all()


@KINDS
@pytest.mark.parametrize("flush", [False, True])
def test_quantised_pages_with_scales_of_1_have_the_bits_of_their_numbers(kind, flush):
    """Every byte as a key and as a value, whether or not the processor flushes subnormal floats."""
    pages = KVPages.empty(8, 1, 64, QUANTISED[kind])
    for part in pages[:2]:
        numbers = torch.randperm(part.numel()).to(torch.uint8).view(QUANTISED[kind]).float()
        part.copy_(numbers.nan_to_num(0.0).view(part.shape))
    pages.scales.fill_(1.0)
    numbers = KVPages.of(pages.k.float().mT, pages.v.float())
    arguments = torch.randperm(8)[None].int(), int32(125), int32(0, 30), AttentionSpec(window=40)
    q = torch.randn(30, 3, 64) * 0.01
    torch.set_flush_denormal(flush)
    try:
        assert torch.equal(ops.paged_attention(q, pages, *arguments), ops.paged_attention(q, numbers, *arguments))
    finally:
        torch.set_flush_denormal(False)


@_oracle.dtypes(SUITE)
def test_equals_the_dense_forward_in_every_dtype(dtype):
    cache, table, context, cu_q, q = batch((700, 33, 1025), (1, 33, 40), kv_heads=2, heads=6)
    cache, q = KVPages(*(t.to(dtype) for t in cache[:2])), q.to(dtype)
    spec = AttentionSpec(alibi=slopes(6), sinks=torch.linspace(-1, 1, 6))
    out = ops.paged_attention(q, cache, table, context, cu_q, spec)
    for b, keys in enumerate(context.tolist()):
        k, v = gather(cache.k, table[b], keys, True), gather(cache.v, table[b], keys, False)
        rows = slice(int(cu_q[b]), int(cu_q[b + 1]))
        assert torch.equal(out[rows], ops.attention(q[None, rows], k[None], v[None], spec)[0])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (3, 1), (32, 4), (1, 1)])
def test_threads_share_heads_rows_and_tiles_without_changing_a_bit(heads, kv_heads, rows):
    """A plan runs with all the threads it is given, however little work there is."""
    torch_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        for n in (60, 1300, 2100):
            filled = Filled(torch.randn(n, kv_heads, 64), torch.randn(n, kv_heads, 64))
            filled.append(n)
            q, context, cu_q = torch.randn(rows, heads, 64), int32(n), int32(0, rows)
            plan = _C.Plan()
            plan.begin()
            out = ops.paged_attention(q, filled.cache, filled.table, context, cu_q)
            plan.end()
            dense = ops.attention(q[None], filled.k[None], filled.v[None])[0]
            for threads in range(1, 8):
                out.fill_(NAN)
                assert plan.replay(threads) == 0 and torch.equal(out, dense), (n, threads)
    finally:
        torch.set_num_threads(torch_threads)


def batch(lengths, rows, kv_heads=2, heads=4, dim=64):
    """Sequences in one cache, and the same with its pages permuted."""
    counts = [-(-n // 16) for n in lengths]
    total = sum(counts)
    cache = KVPages(torch.randn(total, kv_heads, dim, 16), torch.randn(total, kv_heads, 16, dim))
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for b, c in enumerate(counts):
        table[b, :c] = torch.arange(sum(counts[:b]), sum(counts[:b]) + c)
    return cache, table, int32(*lengths), torch.tensor([0, *rows]).cumsum(0).int(), torch.randn(sum(rows), heads, dim)


def test_page_order_and_batch_neighbours_do_not_change_a_bit():
    cache, table, context, cu_q, q = batch((700, 33, 1025, 256), (1, 5, 1, 100))
    out = ops.paged_attention(q, cache, table, context, cu_q)
    order = torch.randperm(len(cache.k))
    permuted = KVPages(cache.k[order].contiguous(), cache.v[order].contiguous())
    again = ops.paged_attention(q, permuted, order.argsort().int()[table.long()], context, cu_q)
    assert torch.equal(out, again)
    block = torch.full((len(cache.k), 3, 2, *cache.k.shape[1:]), NAN)  # a page holds K and V of three layers
    apart = KVPages(block[:, 1, 0], block[:, 1, 1].view(cache.v.shape))
    apart.k.copy_(cache.k), apart.v.copy_(cache.v)
    assert torch.equal(out, ops.paged_attention(q, apart, table, context, cu_q))
    for b in range(4):
        rows = slice(int(cu_q[b]), int(cu_q[b + 1]))
        alone = ops.paged_attention(q[rows], cache, table[b : b + 1], context[b : b + 1], cu_q[b : b + 2] - cu_q[b])
        assert torch.equal(alone, out[rows])


def test_pages_and_entries_past_the_context_are_never_used():
    cache, table, context, cu_q, q = batch((40, 300), (1, 20))
    out = ops.paged_attention(q, cache, table, context, cu_q)
    before = [t.clone() for t in cache[:2]]
    for b, n in enumerate(context.tolist()):
        last = int(table[b, (n - 1) // 16])
        if n % 16:
            cache.k[last, :, :, n % 16 :], cache.v[last, :, n % 16 :] = NAN, NAN
        table[b, -(-n // 16) :] = 10**9
    poisoned = [t.clone() for t in cache[:2]]
    assert torch.equal(ops.paged_attention(q, cache, table, context, cu_q), out)
    for now, then, was in zip(cache[:2], poisoned, before, strict=True):
        assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0)) and not torch.equal(now, was)


def test_queries_may_be_views_of_a_fused_projection():
    cache, table, context, cu_q, q = batch((40, 300), (1, 20))
    qkv = torch.randn(21, 8, 64)
    qkv[:, :4] = q
    out = ops.paged_attention(qkv[:, :4], cache, table, context, cu_q)
    assert torch.equal(out, ops.paged_attention(q, cache, table, context, cu_q))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_plan_reads_lengths_at_replay(threads):
    cache, table, context, cu_q, q = batch((1500, 900), (1, 1), kv_heads=1, heads=3)
    plan = _C.Plan()
    plan.begin()
    out = ops.paged_attention(q, cache, table, context, cu_q)
    plan.end()
    for lengths in ((1499, 900), (17, 0), (1, 880), (1500, 5)):
        context.copy_(int32(*lengths))
        out.fill_(NAN)
        assert plan.replay(threads) == 0
        assert torch.equal(out, ops.paged_attention(q, cache, table, context, cu_q)), lengths
    cu_q.copy_(int32(0, 1, 1))  # one sequence left: the row that nobody claims is zero
    assert plan.replay(threads) == 0 and (out[1] == 0).all() and (out[0] != 0).all()


CACHE, TABLE, CONTEXT, CU_Q, Q = batch((40, 30), (1, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q.double(), CACHE, TABLE, CONTEXT, CU_Q), TypeError, "q is float64, allowed: float32"),
        ((Q.half(), CACHE, TABLE, CONTEXT, CU_Q), TypeError, "k_pages is torch.float32, q is torch.float16"),
        ((Q, CACHE, TABLE, CONTEXT, CU_Q, AttentionSpec(bias=Q[None])), ValueError, "the spec has a bias or dropout"),
        ((Q, CACHE, TABLE, CONTEXT, CU_Q, AttentionSpec(sinks=Q[0, 0])), ValueError, r"sinks \(64,\) must be \[4\]"),
        ((Q[:, 0], CACHE, TABLE, CONTEXT, CU_Q), ValueError, r"q \(3, 64\) must be \[T, H, D\]"),
        ((Q[:, :3], CACHE, TABLE, CONTEXT, CU_Q), ValueError, "3 query heads over 2 KV heads"),
        ((Q[..., :32], CACHE, TABLE, CONTEXT, CU_Q), ValueError, r"must be \[P, Hk, 32, 16\]"),
        ((Q, CACHE, TABLE.long(), CONTEXT, CU_Q), TypeError, "block_table is int64, allowed: int32"),
        ((Q, CACHE, TABLE, CONTEXT, CU_Q[:2]), ValueError, r"must be \[B, max_pages\], \[B\], \[B \+ 1\]"),
        ((Q, CACHE, TABLE, CONTEXT - 31, CU_Q), IndexError, r"context_len \[9, -1\]"),
        ((Q, CACHE, TABLE, CONTEXT + 30, CU_Q), IndexError, "3 pages of 16 tokens a sequence"),
        ((Q, CACHE, TABLE, CONTEXT, CU_Q + 1), IndexError, "must fit 3 rows"),
        ((Q, CACHE, TABLE + 4, CONTEXT, CU_Q), IndexError, "pages in use lie in 0 .. 4"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.paged_attention(*arguments)
