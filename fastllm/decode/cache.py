"""The KV cache: one pool of pages of 16 tokens, for all layers and all sequences, planned up front.

A page is free, or held by one or more sequences, or idle: nobody holds it, but it is known to hold a beginning of some
text and a later sequence may take it up. Pages are known by a chain: the page before, by a number that is never used
again, and the 16 tokens. A chain begins with a root: the model's, or that of an adapter, whose keys and values are others.
So a match is exact, whatever the hashes do. Of idle pages the one unused for longest is given up first, and of one text the
end before the beginning.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import ops
from ..models.arena import Arena, available
from ..models.blocks import Adapters, PagedBatch
from ..models.decoder import DecoderConfig
from ..ops.kv_cache import COLUMNS, QUANTISED

PAGE = ops.PAGE
_Link = tuple[int, tuple[int, ...]]  # (number of the page before, or of the root; the tokens)


def pages_for(tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // PAGE)


def page_bytes(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of keys and values of 16 tokens, all layers: of quantised ones with their scales."""
    scale = torch.float32.itemsize if dtype in QUANTISED else 0
    return PAGE * config.layers * config.kv_heads * 2 * (config.head_dim * dtype.itemsize + scale)


class KVCache:
    """`pages` pages of `dtype`, the model's own or a quantised one; `layers` are their tensors, one record a layer.

    A CPU's memory is mapped at once and touched as it fills: the process grows to the most that was ever in use, and a page
    that was used before is preferred to one that never was. A GPU's is taken at once. remember=False: no text is known, so
    none is shared. MemoryError when there is not so much.
    """

    def __init__(
        self,
        config: DecoderConfig,
        pages: int,
        remember: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)
        # A page holds all layers, so that the first tokens of a sequence lie together on few huge pages of memory.
        block = _memory(config, pages, dtype, self.device).view(pages, config.layers, -1)
        self.layers = [_pages(block[:, i], config, dtype) for i in range(config.layers)]
        self.pages, self.remember, self._block = pages, remember, block
        self._free = list(range(pages))[::-1]  # a stack
        self._holders = [0] * pages
        self._page_of: dict[_Link, int] = {}
        self._link_of: dict[int, tuple[_Link, int]] = {}  # of a known page: its link and its number
        self._idle: OrderedDict[int, None] = OrderedDict()  # the one unused for longest is the first
        self._numbers = itertools.count(1)

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int]:
        """`count` pages, held once."""
        if count > self.available:
            raise MemoryError(f"{count} pages of KV cache are asked for, {self.available} of {self.pages} are free")
        taken = []
        for _ in range(count):
            if not self._free:
                self._forget(next(iter(self._idle)))
            page = self._free.pop()
            self._holders[page] = 1
            taken.append(page)
        return taken

    def release(self, pages: Sequence[int], forget: bool = False) -> None:
        """One holder less. forget: what the pages hold is not to be taken up again."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if forget:
                self._forget(page)
            elif not self._holders[page]:
                if page in self._link_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def root(self) -> int:
        """A number of its own to begin chains with: what is known under it is not known under another. 0 is the model's."""
        return next(self._numbers)

    def match(self, ids: Sequence[int], root: int = 0) -> list[int]:
        """The pages of the longest known beginning of `ids`, which are held once more."""
        pages, number = [], root
        for start in range(0, len(ids) - PAGE + 1, PAGE):
            page = self._page_of.get((number, tuple(ids[start : start + PAGE])))
            if page is None:
                break
            pages.append(page)
            number = self._link_of[page][1]
        return self.share(pages)

    def share(self, pages: list[int]) -> list[int]:
        """One holder more."""
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)
        return pages

    def copy(self, source: int, target: int) -> None:
        self._block[target] = self._block[source]

    def learn(self, ids: Sequence[int], pages: Sequence[int], root: int = 0) -> None:
        """`pages` hold the keys and values of `ids`: from now on the full ones are known."""
        number = root
        for page, start in zip(pages, range(0, len(ids) - PAGE + 1 if self.remember else 0, PAGE), strict=False):
            link = (number, tuple(ids[start : start + PAGE]))
            known = self._page_of.get(link)  # another page with the same text stays what is known
            if known is None:
                self._unlink(page)
                known = self._page_of[link] = page
                self._link_of[page] = link, next(self._numbers)
            number = self._link_of[known][1]

    def forget(self, root: int | None = None) -> None:
        """No text is known any more, or none under this root: the weights have changed."""
        under = {root}
        for page, (link, number) in sorted(self._link_of.items(), key=lambda item: item[1][1]):  # beginnings first
            if root is None or link[0] in under:
                under.add(number)
                self._forget(page)

    def mend(self, held: Iterable[Sequence[int]]) -> None:
        """The books anew: who holds pages is told, what was known of texts is forgotten."""
        self._page_of.clear(), self._link_of.clear(), self._idle.clear()
        self._holders = [0] * self.pages
        for page in itertools.chain.from_iterable(held):
            self._holders[page] += 1
        self._free = [page for page in range(self.pages) if not self._holders[page]][::-1]

    def _forget(self, page: int) -> None:
        self._unlink(page)
        self._idle.pop(page, None)
        if not self._holders[page]:
            self._free.append(page)

    def _unlink(self, page: int) -> None:
        if page in self._link_of:
            del self._page_of[self._link_of.pop(page)[0]]


def _memory(c: DecoderConfig, pages: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, uint8: no bit pattern of old memory is ever read."""
    size = pages * page_bytes(c, dtype)
    try:
        if device.type == "cpu":
            return Arena(size).take(size)
        return torch.zeros(size, dtype=torch.uint8, device=device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        free = available(size) if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
        reason = (
            str(error) if device.type == "cpu" else f"{size} bytes of {device}'s memory are asked for, {free} are free"
        )
        raise MemoryError(
            f"a KV cache of {pages * PAGE} tokens: {reason}, for {free // page_bytes(c, dtype) * PAGE} tokens; lower kv_bytes "
            "or max_model_len"
        ) from error


def _pages(block: Tensor, c: DecoderConfig, dtype: torch.dtype) -> ops.KVPages:
    """One layer's part of all pages, uint8 [pages, bytes]: keys, values, and scales of quantised ones."""
    size = c.kv_heads * c.head_dim * PAGE * dtype.itemsize
    columns = block.device.type in COLUMNS
    keys = (c.head_dim, PAGE) if columns else (PAGE, c.head_dim)

    def part(begin: int, end: int | None, dtype: torch.dtype, *shape: int) -> Tensor:
        return block[:, begin:end].view(dtype).unflatten(-1, (c.kv_heads, *shape))

    k = part(0, size, dtype, *keys)
    return ops.KVPages(
        k if columns else k.mT,
        part(size, 2 * size, dtype, PAGE, c.head_dim),
        part(2 * size, None, torch.float32, 2, PAGE) if dtype in QUANTISED else None,
    )


def pieces(
    cache: KVCache, spans: Sequence[tuple[Sequence[int], int, int]], adapters: Adapters | None = None
) -> PagedBatch:
    """The batch that reads tokens [start, stop) of sequences, each given with its pages. Its numbers lie on the CPU: they are
    few, and `to` moves them."""
    position = torch.cat([torch.arange(start, stop) for _, start, stop in spans])
    table = torch.full((len(spans), max(len(pages) for pages, _, _ in spans)), -1, dtype=torch.int32)
    for row, (pages, _, _) in zip(table, spans, strict=True):
        row[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
    counts = torch.tensor([stop - start for _, start, stop in spans])
    owner = torch.arange(len(spans)).repeat_interleave(counts)
    return PagedBatch(
        position=position,
        slot=table[owner, position // PAGE].long() * PAGE + position % PAGE,
        block_table=table,
        context_len=torch.tensor([stop for _, _, stop in spans], dtype=torch.int32),
        cu_q=torch.tensor([0, *itertools.accumulate(counts.tolist())], dtype=torch.int32),
        pages=cache.layers,
        adapters=adapters,
    )
