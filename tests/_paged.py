"""Paged forwards of one sequence without an engine, and what must hold of a cache at any time."""

from fastllm.decode.cache import KVCache, pages_for, pieces
from fastllm.decode.rows import Rows
from fastllm.decode.scheduler import Sequence
from fastllm.models.blocks import PagedBatch


class SequenceCache:
    """Pages for `capacity` tokens of one sequence, and the row of its decode steps."""

    def __init__(self, config, capacity: int):
        self.cache = KVCache(config, pages_for(capacity))
        self.held = self.cache.take(self.cache.pages)
        self.rows = Rows(self.cache, 1, capacity, ())
        self.ids = self.rows.ids

    def chunk(self, start: int, stop: int) -> PagedBatch:
        return pieces(self.cache, [(self.held, start, stop)])

    def next_token(self) -> PagedBatch:
        return self.rows.batch(slice(0, 1))

    def seek(self, length: int) -> None:
        """Token `length - 1` is the next to be read; what it is, `ids` says."""
        s = Sequence([0] * length)
        s.pages, s.row = self.held, 0
        self.rows.seat(s)


def check(cache: KVCache, held: int = 0) -> None:
    """Every page is free, held or idle, and exactly one of them; what is known is known both ways."""
    free, idle = set(cache._free), set(cache._idle)
    holding = {page for page, count in enumerate(cache._holders) if count}
    assert len(free) == len(cache._free) and min(cache._holders) >= 0
    assert not free & idle and not free & holding and not idle & holding
    assert free | idle | holding == set(range(cache.pages)) and len(holding) == held
    assert {page: link for link, page in cache._page_of.items()} == {p: link for p, (link, _) in cache._link_of.items()}
    assert idle <= set(cache._link_of) and not free & set(cache._link_of)
    assert cache.available == len(free) + len(idle)
