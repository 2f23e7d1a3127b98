"""paged_attention in CUDA C++ against its formula in float64: on a GPU, or on this processor with the library that
tests/cuda_host makes of the same source, which FASTLLM_CUDA_HOST names. tests/test_cuda.py runs this file."""

import math

import pytest
import torch
from _cuda_host import DEVICE, HOST, order, pose

from fastllm.ops import AttentionSpec
from fastllm.ops.attention import decode, paged
from fastllm.ops.attention.spec import CAUSAL
from fastllm.ops.kv_cache import PAGE, KVPages

SEEDS = (0, 1, 3) if HOST else (0, 0)  # threads take turns in another order with each

pose()


class Cache:
    """Sequences of these lengths, their pages anywhere in the cache; what is not theirs is NaN."""

    def __init__(self, lengths, heads, kv_heads, dim, dtype, seed=0, more_pages=0, rows=None):
        make = torch.Generator().manual_seed(seed)
        need = [-(-n // PAGE) for n in lengths]
        self.count, width = sum(need) + 3, max([1, *need]) + more_pages
        order = torch.randperm(self.count, generator=make).tolist()
        k, v = (torch.full((self.count, kv_heads, PAGE, dim), math.nan) for _ in range(2))
        table = torch.full((len(lengths), width), 1 << 30, dtype=torch.int32)
        for b, n in enumerate(lengths):
            for at in range(need[b]):
                page, used = order.pop(), min(PAGE, n - at * PAGE)
                table[b, at] = page
                for x in (k, v):
                    x[page, :, :used] = torch.randn(kv_heads, used, dim, generator=make)
        rows = [1] * len(lengths) if rows is None else rows
        ends = torch.tensor([0, *rows]).cumsum(0)
        q = torch.randn(max(int(ends[-1]), len(lengths)), heads, dim, generator=make)
        self.q, self.k, self.v = (x.to(dtype).to(DEVICE) for x in (q, k, v))
        self.table, self.lengths, self.cu = table.to(DEVICE), list(lengths), ends.int().to(DEVICE)
        self.context = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)

    def arguments(self, spec):
        s = spec.settings(self.q.shape[2])
        shaping = (spec.alibi, spec.sinks, s.causal, s.window, s.scale, s.softcap, s.exact)
        return (self.q, self.k.mT, self.v, None, self.table, self.context, self.cu, *shaping)

    def run(self, spec, seed=0, multiprocessors=132):
        order(seed, multiprocessors)
        arguments = self.arguments(spec)
        refused = decode.refusal(*arguments[:4], self.table.shape[0], arguments[7], *arguments[9:])
        assert refused is None, refused
        return decode.cuda(*arguments)

    def wanted(self, spec, dtype):
        """By the formula, in another dtype."""
        whole = KVPages(self.k.mT.nan_to_num(0).to(dtype), self.v.nan_to_num(0).to(dtype))
        table = self.table.clamp(max=self.count - 1)
        arguments = self.arguments(spec)
        return paged.reference(self.q.to(dtype), whole.k, whole.v, None, table, *arguments[5:])


def check(cache, spec=CAUSAL, **options):
    """No further from float64 than twice the formula in its own dtype, with the same bits whatever ran first."""
    exact, plain = cache.wanted(spec, torch.float64), cache.wanted(spec, cache.q.dtype)
    out = cache.run(spec, SEEDS[0], **options)
    least = 2e-3 if cache.q.dtype == torch.bfloat16 else 3e-4
    scale = exact.norm().clamp(min=1e-30)
    assert (out.double() - exact).norm() / scale <= 2 * max(float((plain.double() - exact).norm() / scale), least)
    assert torch.equal(out[exact == 0], torch.zeros_like(out[exact == 0]))
    for seed in SEEDS[1:]:
        assert torch.equal(cache.run(spec, seed, **options), out)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (3, 3), (16, 2), (10, 1), (16, 1)])
def test_heads(heads, kv_heads, dim, dtype):
    check(Cache([37, 1, 16, 300], heads, kv_heads, dim, dtype))


@pytest.mark.parametrize("multiprocessors", [1, 4, 8, 20, 40, 132])
def test_keys_shared_by_a_cluster(multiprocessors):
    """1, 2, 4, 8 and 16 blocks, some of which have no keys."""
    check(Cache([700], 4, 1, 64, torch.bfloat16, more_pages=260), multiprocessors=multiprocessors)


def test_a_long_text_of_one_block():
    """Whose warps read their pages' numbers in several goes."""
    check(Cache([33 * 8 * PAGE - 3], 2, 2, 64, torch.bfloat16), multiprocessors=1)


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_windows_that_begin_late(multiprocessors):
    """Pages before them belong to nobody, and turns are counted from the first one."""
    for window in (3, 40, 700):
        cache = Cache([900, 1300, 20], 3, 1, 128, torch.float16)
        check(cache, AttentionSpec(window=window), multiprocessors=multiprocessors)


def test_lengths_that_end_anywhere():
    for first in range(1, 34, 5):
        check(Cache([*range(first, first + 5), 129 + first], 2, 1, 64, torch.float16, seed=first))


@pytest.mark.parametrize("window", [1, 7, 16, 33, 100, 5000])
def test_windows(window):
    check(Cache([5, 64, 230], 4, 2, 64, torch.bfloat16), AttentionSpec(window=window))


def test_many_sequences():
    check(Cache([3 + 7 * i % 50 for i in range(41)], 2, 1, 64, torch.bfloat16))


def test_rows_that_are_not_one_a_sequence():
    """Two rows of one, none of another, and rows that nobody claims."""
    cache = Cache([40, 20, 33, 18], 4, 2, 64, torch.float16, rows=[2, 0, 1, 0])
    out = check(cache)
    assert not out[3:].any() and out[:3].abs().amax((1, 2)).min() > 0
    check(Cache([40, 20, 33], 4, 2, 64, torch.float16, rows=[0, 0, 2]), AttentionSpec(window=9))
    late = Cache([20 + i for i in range(40)], 2, 1, 64, torch.bfloat16, rows=[0] * 36 + [3, 0, 1, 2])
    check(late)


def test_fewer_keys_than_rows_and_more_rows_than_there_are():
    cache = Cache([1, 2, 40], 4, 2, 64, torch.bfloat16, rows=[2, 1, 0])
    assert not check(cache)[0].any()
    cache = Cache([40, 30], 4, 2, 64, torch.bfloat16)
    wanted = cache.run(CAUSAL)
    cache.cu[2] = 5  # of which one is there
    assert torch.equal(cache.run(CAUSAL), wanted)


def test_values_outside_a_window_may_be_anything():
    cache, spec = Cache([64, 40], 4, 2, 64, torch.bfloat16), AttentionSpec(window=20)
    wanted = cache.run(spec)
    for b, n in enumerate(cache.lengths):
        for at in range(n - 20):
            cache.v[cache.table[b, at // PAGE].long(), :, at % PAGE] = math.inf
    assert torch.equal(cache.run(spec), wanted)


def test_both_directions_and_scale():
    check(Cache([40, 20], 4, 2, 64, torch.bfloat16, rows=[2, 0]), AttentionSpec(causal=False, scale=0.03))


def test_sinks():
    """One of -inf is none, also where there are no keys."""
    cache = Cache([40, 3, 0], 6, 2, 128, torch.bfloat16)
    for values in ([-2.0, 0.0, 5.0, 1.0, -30.0, 40.0], [-math.inf, 0.0, -math.inf, 1.0, -math.inf, -math.inf]):
        out = check(cache, AttentionSpec(sinks=torch.tensor(values, device=DEVICE)))
    assert torch.equal(out[:, 4:], cache.run(CAUSAL)[:, 4:])


def test_without_keys():
    out = check(Cache([0, 5, 0], 4, 2, 64, torch.bfloat16))
    assert not out[0].any() and not out[2].any()


def test_large_and_equal_scores():
    cache = Cache([50, 130], 4, 2, 64, torch.bfloat16)
    cache.q *= 40
    check(cache)
    cache.k.nan_to_num_(0).fill_(0.5)
    check(cache)


def test_what_cannot_be_is_nan():
    """A length that the block table cannot hold, a page outside the cache: its own sequence alone."""
    cache = Cache([40, 50, 60, 30], 4, 2, 64, torch.bfloat16)
    for pages in (cache.k, cache.v):
        pages.nan_to_num_(0)
    good = cache.run(CAUSAL)
    cache.context[1], cache.context[3] = 64 + 1, -1  # behind the table of the second are the pages of the third
    cache.table[2, 1] = cache.count
    assert cache.table.shape[1] == 4
    out = cache.run(CAUSAL)
    assert out[1:].isnan().all() and torch.equal(out[0], good[0])


def test_views():
    """q as a part of a fused projection, pages of a layer among others, a table that is wider than it need be."""
    cache = Cache([40, 50], 4, 2, 64, torch.float16)
    wanted = cache.run(CAUSAL)
    fused = torch.zeros(2, 8, 64, dtype=torch.float16, device=DEVICE)
    fused[:, 2:6] = cache.q
    cache.q = fused[:, 2:6]
    for name in ("k", "v"):
        layers = torch.full(
            (cache.count, 2, *getattr(cache, name).shape[1:]), math.nan, dtype=torch.float16, device=DEVICE
        )
        layers[:, 1] = getattr(cache, name)
        setattr(cache, name, layers[:, 1])
    cache.table = torch.cat([cache.table, cache.table], 1)[:, : cache.table.shape[1]]
    assert torch.equal(cache.run(CAUSAL), wanted)


def test_what_is_left_to_triton():
    cache = Cache([40], 4, 2, 64, torch.bfloat16)
    said = {}
    for name, spec in {
        "exact": AttentionSpec(exact=True), "a cap": AttentionSpec(softcap=3.0), "scale -1.0: above 0": AttentionSpec(scale=-1.0),
        "ALiBi": AttentionSpec(alibi=torch.ones(4)), "a window on both sides": AttentionSpec(window=4, causal=False),
    }.items():  # fmt: skip
        q, k, v, *_, alibi, _, causal, window, scale, softcap, exact = cache.arguments(spec)
        said[name] = decode.refusal(q, k, v, None, 1, alibi, causal, window, scale, softcap, exact)
    plain = (None, True, 0, 1.0, 0.0, False)
    said["float32"] = decode.refusal(cache.q.float(), cache.k.float().mT, cache.v.float(), None, 1, *plain)
    said["head dim 32: 64 or 128"] = decode.refusal(cache.q[..., :32], cache.k.mT, cache.v, None, 1, *plain)
    said["2 rows of 1 sequences: up to one each"] = decode.refusal(
        torch.cat([cache.q] * 2), cache.k.mT, cache.v, None, 1, *plain
    )
    said["20 heads of a KV head: up to 16"] = decode.refusal(
        cache.q.repeat(1, 10, 1), cache.k.mT, cache.v, None, 1, *plain
    )
    said["quantised pages"] = decode.refusal(cache.q, cache.k.mT, cache.v, cache.k, 1, *plain)
    odd = torch.zeros(1, 4 * 64 + 4, dtype=torch.bfloat16)[:, 4:].view(1, 4, 64)
    said["q or pages that do not lie multiples of 16 bytes apart"] = decode.refusal(
        odd, cache.k.mT, cache.v, None, 1, *plain
    )
    assert said == {name: name for name in said}
