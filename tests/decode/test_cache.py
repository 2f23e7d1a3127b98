"""The pool of pages: who holds what, what is known of them, and what is given up first."""

from dataclasses import replace

import _tiny
import pytest
from _paged import check
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.decode.cache import PAGE, KVCache, page_bytes, pages_for

TEXT = list(range(100))


def pool(pages: int = 8, **fields) -> KVCache:
    return KVCache(_tiny.CONFIG, pages, **fields)


def test_sizes():
    assert [pages_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    cache = pool(5)
    assert sum(k.nbytes + v.nbytes for k, v, _ in cache.layers) == 5 * page_bytes(_tiny.CONFIG)
    assert {(tuple(k.shape), tuple(v.shape)) for k, v, _ in cache.layers} == {((5, 2, 16, 16), (5, 2, 16, 16))}


def test_what_the_system_refuses():
    with pytest.raises(
        MemoryError, match="a KV cache of .* tokens: .* GB are asked for .* could be had, for .* tokens; lower"
    ):
        pool(1 << 40)


def test_pages_are_taken_and_given_back():
    cache = pool()
    first, second = cache.take(3), cache.take(5)
    check(cache, held=8)
    assert sorted(first + second) == list(range(8)) and not cache.available
    with pytest.raises(MemoryError, match="1 pages of KV cache are asked for, 0 of 8 are free"):
        cache.take(1)
    cache.release(first)
    check(cache, held=5)
    assert sorted(cache.take(3)) == sorted(first)  # what was touched before, before what never was


def test_a_known_beginning_is_shared():
    cache = pool()
    held = cache.take(3)
    assert cache.match(TEXT) == []
    cache.learn(TEXT[:40], held)  # two full pages
    assert cache.match(TEXT) == held[:2] and cache.match(TEXT[:31]) == held[:1]
    assert cache.match([*TEXT[:16], 7, *TEXT[17:]]) == held[:1] and cache.match(TEXT[:15]) == []
    assert cache.match([9, *TEXT[1:]]) == [] and cache.match(TEXT[16:]) == []  # a later page needs the ones before
    for count in (2, 1, 1):
        cache.release(held[:count])
    cache.release(held)
    check(cache)
    assert cache.match(TEXT) == held[:2]  # nobody held them
    check(cache, held=2)


def test_two_pages_of_the_same_text():
    """Read at the same time by two: the first stays what is known, and the second's end is found behind it."""
    cache = pool()
    one, two = cache.take(2), cache.take(3)
    cache.learn(TEXT[:32], one)
    cache.learn(TEXT[:48], two)
    assert cache.match(TEXT) == [*one, two[2]]
    for pages in ([*one, two[2]], one, two):
        cache.release(pages)
    check(cache)


def test_the_longest_unused_is_given_up_and_ends_before_beginnings():
    cache = pool(6)
    texts = [[n] * 48 for n in (1, 2)]
    for text in texts:
        held = cache.take(3)
        cache.learn(text, held)
        cache.release(held)
    cache.release(cache.match(texts[0]))  # the second one's are now the longest unused
    cache.release(cache.take(2))
    assert len(cache.match(texts[1])) == 1 and len(cache.match(texts[0])) == 3
    check(cache, held=4)


def test_what_is_forgotten_is_not_found_again():
    cache = pool()
    held = cache.take(3)
    cache.learn(TEXT, held)
    other = cache.match(TEXT[:32])
    cache.release(held, forget=True)  # of one that failed; two of the pages are still held
    assert cache.match(TEXT) == []
    check(cache, held=2)
    cache.learn(TEXT[:32], other)
    assert cache.match(TEXT) == other
    cache.forget()
    assert cache.match(TEXT) == []
    cache.release(other), cache.release(other)
    check(cache)
    assert len(cache._free) == 8


def test_a_page_is_known_under_one_text():
    """Its beginning was forgotten and is learnt again elsewhere: the old link must not survive."""
    cache = pool()
    one = cache.take(2)
    cache.learn(TEXT[:32], one)
    other = cache.match(TEXT[:16])
    cache.release(other, forget=True)
    cache.learn(TEXT[:32], one)
    check(cache, held=2)
    assert cache.match(TEXT) == one


def test_nothing_is_known_without_a_prefix_cache():
    cache = pool(remember=False)
    held = cache.take(3)
    cache.learn(TEXT, held)
    assert cache.match(TEXT) == []
    cache.release(held)
    check(cache)


def test_a_copy_of_a_page():
    cache = pool()
    for i, (k, v, _) in enumerate(cache.layers):
        k[2], v[2] = i + 1, -i - 1
    cache.copy(2, 5)
    assert all((k[5] == i + 1).all() and (v[5] == -i - 1).all() for i, (k, v, _) in enumerate(cache.layers))
    assert all(not k[p].any() for k, _, _ in cache.layers for p in (0, 1, 3, 4, 6, 7))


def test_the_cache_takes_memory_as_it_fills():
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096  # noqa: E731, SIM115
    try:
        before = resident()
    except OSError:
        pytest.skip("needs /proc")
    config = replace(_tiny.CONFIG, layers=16)
    cache = KVCache(config, 4096)
    assert 4096 * page_bytes(config) > 200e6 and resident() - before < 20e6
    assert all(not k[0].any() and not v[-1].any() for k, v, _ in cache.layers)


texts = st.lists(st.sampled_from([1, 2, 3]), max_size=5).map(lambda t: [i for i in t for _ in range(PAGE)])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["begin", "end", "fail", "forget"]), texts, st.integers(0, 5)), max_size=30))
def test_any_order_of_events(events):
    """A model of what every page holds: a match never gives a page that holds another text."""
    cache, running, holds = pool(12), [], {}
    for event, text, pick in events:
        if event == "begin":
            shared = cache.match(text)
            assert [holds[p] for p in shared] == [text[: i + 16] for i in range(0, len(shared) * PAGE, PAGE)]
            need = pages_for(len(text) + 1) - len(shared)
            if need > cache.available:
                cache.release(shared)
                continue
            pages = shared + cache.take(need)
            holds.update({page: text[: (i + 1) * PAGE] for i, page in enumerate(pages)})
            running.append((text, pages))
            if pick % 2:
                cache.learn(text, pages)
        elif event == "forget":
            cache.forget()
        elif running:
            text, pages = running.pop(pick % len(running))
            if event == "end":
                cache.learn(text, pages)
            cache.release(pages, forget=event == "fail")
        check(cache, held=len({page for _, pages in running for page in pages}))
