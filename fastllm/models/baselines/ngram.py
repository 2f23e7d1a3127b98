"""N-grams with interpolated modified Kneser-Ney smoothing (Chen & Goodman 1998, TR-10-98, Harvard; section 4.1.6).

For a word w after the n - 1 tokens h, of which h' are all but the first:

    p(w | h) = max(c(hw) - D(c(hw)), 0) / c(h.) + g(h) p(w | h')      g(h) = (D1 N1(h.) + D2 N2(h.) + D3 N3+(h.)) / c(h.)
    D(c) = D1, D2 or D3 for c = 1, 2, more      D_i = i - (i + 1) Y n_(i+1) / n_i      Y = n1 / (n1 + 2 n2)

c: at the highest order how often the n-gram occurs; below, how many different tokens stand before it, for it serves where the
longer one is unknown (an n-gram at the start of a document, which nothing stands before, counts its occurrences). c(h.) sums it
over the words, N_i(h.) counts the words of which it is i, n_i all n-grams of which it is i. Below order 1 stands 1 / V. Each
order has its own discounts. An unseen h gives p(w | h').

A document is a sequence in which every token after the first is predicted; the first (a mark of the beginning) is only a
context. N-grams of one length are one sorted array of integers, (number of the context) * V + word, found by bisection.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

FALLBACK = (0.5, 1.0, 1.5)  # discounts of an order that has too few n-grams to estimate its own
Discounts = tuple[float, float, float]


@dataclass(frozen=True)
class _Order:
    """N-grams of one length, ascending by key. kept: count less discount of each; total, left: c(h.) and g(h) of each context,
    total 0 of one that nothing follows."""

    vocab: int
    keys: np.ndarray
    kept: np.ndarray
    total: np.ndarray
    left: np.ndarray

    def find(self, context: np.ndarray, word: np.ndarray) -> np.ndarray:
        """The number of each n-gram, -1 where it was not seen; context -1: an unseen one."""
        if not len(self.keys):
            return np.full(np.broadcast(context, word).shape, -1)
        key = context * self.vocab + word
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        return np.where((context >= 0) & (self.keys[at] == key), at, -1)

    def mix(self, context: np.ndarray, found: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """p(w | h), where lower is p(w | h')."""
        if not len(self.keys):  # no document is so long
            return lower
        total = np.where(context >= 0, self.total[context], 0.0)
        kept = np.where(found >= 0, self.kept[found], 0.0)
        mixed = kept / np.maximum(total, 1.0) + self.left[context] * lower
        return np.where(total > 0, mixed, lower)


class KneserNey:
    """The n-grams of documents of token ids below `vocab`, up to `order`; in nats, like every loss here.

    discounts: (D1, D2, D3) of the orders 1 to n, estimated where not given. An order whose counts of counts allow no estimate
    (one of n1 to n4 is 0, or a D_i is not in [0, i]) takes FALLBACK, and is in `fallback`. ValueError: no prediction at all, an
    id out of range, order or discounts that are not allowed.
    """

    def __init__(
        self,
        documents: Iterable[Sequence[int]],
        vocab: int,
        order: int = 5,
        discounts: Sequence[Discounts] | None = None,
    ):
        if vocab < 1 or order < 1:
            raise ValueError(f"KneserNey: vocab={vocab}, order={order}; allowed: 1 or more each")
        if discounts is not None and len(discounts) != order:
            raise ValueError(f"KneserNey: discounts for {len(discounts)} orders; give them for all {order}")
        for i, d in enumerate(discounts or (), 1):
            if len(d) != 3 or not all(0 <= value <= most for most, value in enumerate(d, 1)):
                raise ValueError(
                    f"KneserNey: the discounts of order {i} are {d}; allowed: D1 in [0, 1], D2 in [0, 2], D3 in [0, 3]"
                )
        self.vocab, self.order = vocab, order
        self.discounts: list[Discounts] = []
        self.fallback: list[int] = []
        self._orders: list[_Order] = []
        self._build(*self._joined(documents), discounts)

    def __repr__(self) -> str:
        return f"KneserNey(order {self.order}, {self.size:,} n-grams)"

    @property
    def size(self) -> int:
        """How many n-grams it keeps."""
        return self.vocab + sum(len(o.keys) for o in self._orders[1:])

    def log_probabilities(self, document: Sequence[int]) -> np.ndarray:
        """Of every token after the first, float64 [n - 1]."""
        ids = self._checked(document)
        word = ids[1:]
        context, p = np.zeros_like(word), np.full(len(word), 1 / self.vocab)
        for length, order in enumerate(self._orders, 1):
            found = order.find(context, word)
            p = order.mix(context, found, p)
            # next: the n-gram of this length that ends before the word; none of 2 or more ends at the first token
            context = ids[:-1] if length == 1 else np.concatenate(([-1], found[:-1]))
        return np.log(p)

    def distribution(self, history: Sequence[int]) -> np.ndarray:
        """p(w | history) of every word, float64 [V]; history: a document so far, its first token included."""
        ids = self._checked(history)
        word, p = np.arange(self.vocab), np.full(self.vocab, 1 / self.vocab)
        gram = ids
        for length, order in enumerate(self._orders, 1):
            if length == 1:
                context = np.zeros(1, np.int64)
            else:
                context = gram[-1:]
                gram = np.concatenate(([-1], order.find(gram[:-1], ids[1:])))
            context = np.broadcast_to(context, word.shape)
            p = order.mix(context, order.find(context, word), p)
        return p

    # ------------------------------------------------------------------------------------------------------- counting

    def _checked(self, document: Sequence[int]) -> np.ndarray:
        ids = np.asarray(document, dtype=np.int64)
        if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= self.vocab:
            what = f"shape {ids.shape}" + (f", ids from {ids.min()} to {ids.max()}" if ids.size else "")
            raise ValueError(f"KneserNey: a document of {what}; allowed: one token or more, ids 0 to {self.vocab - 1}")
        return ids

    def _joined(self, documents: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """All tokens, and the place of each in its document."""
        checked = [self._checked(d) for d in documents]
        if sum(map(len, checked)) == len(checked):
            raise ValueError("KneserNey: no document has a token after its first one, so there is nothing to count")
        return np.concatenate(checked), np.concatenate([np.arange(len(d)) for d in checked])

    def _build(self, ids: np.ndarray, place: np.ndarray, discounts: Sequence[Discounts] | None) -> None:
        types = np.arange(self.vocab)  # keys of length 1: every word, seen or not
        gram = ids  # the number of the n-gram that ends at each token
        contexts = 1
        raw = np.bincount(ids[place >= 1], minlength=self.vocab)
        for length in range(1, self.order + 1):
            if length == self.order:
                self._add(types, raw, contexts, discounts)
                return
            ends = np.flatnonzero(place >= length)  # of the n-grams that are one longer
            keys, first, number = np.unique(
                gram[ends - 1] * self.vocab + ids[ends], return_index=True, return_inverse=True
            )
            continued = np.bincount(gram[ends[first]], minlength=len(types))
            if length > 1:
                continued = continued + np.bincount(gram[place == length - 1], minlength=len(types))
            self._add(types, continued, contexts, discounts)
            contexts, types = len(types), keys
            gram = np.full(len(ids), -1)
            gram[ends] = number
            raw = np.bincount(number, minlength=len(keys))

    def _add(self, keys: np.ndarray, count: np.ndarray, contexts: int, given: Sequence[Discounts] | None) -> None:
        length = len(self._orders) + 1
        if given is not None:
            discounts = given[length - 1]
        else:
            estimated = _estimate(count)
            discounts = estimated or FALLBACK
            self.fallback += [length] if estimated is None else []
        self.discounts.append(discounts)
        level = np.minimum(count, 3)
        discount = np.array((0.0, *discounts))[level]
        context = keys // self.vocab
        total = np.bincount(context, weights=count, minlength=contexts)
        left = np.bincount(context, weights=np.minimum(discount, count), minlength=contexts) / np.maximum(total, 1.0)
        self._orders.append(_Order(self.vocab, keys, np.maximum(count - discount, 0.0), total, left))


def _estimate(count: np.ndarray) -> Discounts | None:
    """(D1, D2, D3) by the counts of counts, or None."""
    n1, n2, n3, n4 = (int((count == i).sum()) for i in range(1, 5))
    if not (n1 and n2 and n3 and n4):
        return None
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return found if all(0 <= d <= i for i, d in enumerate(found, 1)) else None
