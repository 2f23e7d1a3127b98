"""Prompt-lookup speculative decoding: what a text says again is drafted from the text itself.

Where the last tokens of a sequence stood earlier in it, what followed them there is a guess at what follows now. Guesses
take rows of a decode step beside the sequence's own: row i reads guess i and draws what comes after it. The token of the
sequence's own row always counts; that of the next row if it has read just this token; and so on. By the arithmetic
contract a row draws the same token whatever its neighbours are: what comes out is what decoding one by one gives, to the
bit, and only the time is uncertain, as rows are not free.

So guesses are followed also where none is tried: every token shows whether the guess would have been right, at no cost
but the look-up. Rows are taken once that was so often enough, as many as pay by what steps of so many rows have taken
here. And each sequence has a ledger: what rows beside its own cost it, for its guesses or its neighbours', may exceed what
they saved by 2 % of the time that it has taken so far, reading included. So a text that does not repeat is hardly slower,
nor one beside another that does.

Saxena, "Prompt Lookup Decoding" (2023); Leviathan et al., "Fast Inference from Transformers via Speculative Decoding"
(2023).
"""

from collections import Counter, deque
from collections.abc import Collection
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from .scheduler import Sequence

LONGEST, SHORTEST = 4, 2  # tokens of the n-grams that are looked up
# How likely a guess is before anything is known, by how many tokens before it agree with those at its source: 2, 3, ...
CHANCE = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)
LEAST_CHANCE = 0.1  # of a guess that takes a row
MEMORY = 8  # of so many guesses each new one makes up one part
SHARE = 0.02  # of its time that a sequence may lose
WORTH = 1.1  # drafts must be expected to bring so many times the tokens a second
RECENT = 8  # steps, whose median says how long they take


class Lookup:
    """A text, and where its last tokens stood before. `at`: the place of what followed them there, 0: nowhere; `agreeing`:
    how many tokens before that place are the last ones.

    Of n-grams of 4, 3 and 2 tokens the longest that stood before counts, where it stood last; as long as guesses are
    right, their source stays. A token takes the same time however long the text is.
    """

    def __init__(self, ids: Tokens[int]):
        self.ids = list(ids[:-1])
        self._after: list[tuple[int, dict]] = []  # n, and of each n-gram the place after it
        for n in range(LONGEST, SHORTEST - 1, -1):
            grams = zip(*(self.ids[i:] for i in range(n)), strict=False)
            self._after.append((n, dict(zip(grams, range(n, len(ids)), strict=False))))
        self.at = self.agreeing = 0
        self.append(ids[-1])

    def append(self, token: int) -> None:
        ids, found, agreeing = self.ids, 0, 0
        right = self.at and ids[self.at] == token
        ids.append(token)
        for n, after in self._after:
            gram = tuple(ids[-n:])
            if not found:
                found, agreeing = after.get(gram, 0), n
            after[gram] = len(ids)
        self.at, self.agreeing = (self.at + 1, self.agreeing + 1) if right else (found, agreeing if found else 0)

    def guesses(self, count: int) -> list[int]:
        """The tokens that follow at the source; where it reaches the end of the text, it goes on in the guesses."""
        found, period = self.ids[self.at : self.at + count], len(self.ids) - self.at
        while len(found) < count:
            found.append(found[-period])
        return found


class Drafter:
    """One sequence's guesses, how often they were right, and its ledger: `balance`, in steps."""

    def __init__(self, ids: Tokens[int], balance: float):
        self.lookup, self.balance, self._chance = Lookup(ids), balance, list(CHANCE)

    def follow(self, tokens: Tokens[int]) -> None:
        """The text goes on with tokens that were generated."""
        lookup, chance = self.lookup, self._chance
        for token in tokens:
            if lookup.at:
                level = min(lookup.agreeing - SHORTEST, len(chance) - 1)
                chance[level] += ((lookup.ids[lookup.at] == token) - chance[level]) / MEMORY
            lookup.append(token)
        self.balance += SHARE * len(tokens)

    def chances(self, most: int) -> list[float]:
        """Of each of the next guesses: that it and all before it are right. As many as may be worth a row."""
        found, chance, level = [], 1.0, self.lookup.agreeing - SHORTEST
        for i in range(level, level + most if self.lookup.at else level):
            chance *= self._chance[min(i, len(CHANCE) - 1)]
            if chance < LEAST_CHANCE:
                break
            found.append(chance)
        return found


@dataclass
class Draft:
    """Guesses of the sequence in `row`; `first`: the row that reads the first of them."""

    row: int
    first: int
    tokens: list[int]

    def right(self, drawn: Tokens[int]) -> list[int]:
        """The rows whose tokens are the sequence's next ones, by what all rows have drawn."""
        rows = [self.row]
        for row, token in enumerate(self.tokens, self.first):
            if drawn[rows[-1]] != token:
                break
            rows.append(row)
        return rows


class Speculator:
    """Chooses the drafts of an engine's steps, and learns what rows take. most: guesses of a sequence in a step, 0: none.
    sizes: rows of the engine's plans."""

    def __init__(self, most: int, sizes: tuple[int, ...]):
        self.most, self.sizes = most, sizes
        self._plain: dict[int, deque[float]] = {}  # by sequences that run: seconds of the last steps without drafts
        self._times: dict[tuple[int, int], deque[float]] = {}  # and by rows: of steps with drafts, over those seconds
        self._missed: Counter[int] = Counter()  # by size of a plan not captured yet: tokens that it would have brought
        self._capture_s = 0.0

    def size(self, rows: int) -> int:
        return next(n for n in self.sizes if n >= rows)

    def choose(self, running: list[Sequence], plans: Collection[int]) -> tuple[int, list[Draft]]:
        """The size of the next step's plan, and its drafts: none where that plan is yet to be captured."""
        n = len(running)
        size, taken = self.size(n), []
        if not self.most or n == self.sizes[-1] or size not in plans or not all(s.tokens for s in running):
            return size, []
        step_s = _median(self._plain.get(n, (0.0,)))
        ranked = sorted(((c, row) for row, s in enumerate(running) for c in self._chances(s, step_s)), reverse=True)
        if not ranked:
            return size, []
        affordable, value, wish, wanted = 1 + min(s.drafter.balance for s in running), WORTH, WORTH, 0
        for candidate in self.sizes[self.sizes.index(size) :]:
            best = ranked[: candidate - n]
            times = _median(self._times_of(n, n + len(best)))
            if not best or self.size(n + len(best)) < candidate or times > affordable:
                continue
            rate = (n + sum(chance for chance, _ in best)) / (n * times)  # tokens a second, over those without drafts
            if candidate in plans and rate > value:
                size, taken, value = candidate, best, rate
            elif candidate not in plans and rate > wish:
                wanted, wish = candidate, rate
        if wish > value:
            self._missed[wanted] += wish - value
            if self._missed[wanted] * step_s >= self._capture_s:
                return wanted, []
        drafts, first = [], n
        for row, count in Counter(row for _, row in taken).items():
            drafts.append(Draft(row, first, running[row].drafter.lookup.guesses(count)))
            first += count
        return size, drafts

    def saw(
        self, running: list[Sequence], counts: list[int], drafts: list[Draft], seconds: float, captures: bool
    ) -> None:
        """A step with these drafts, in which each sequence drew so many tokens, lasted so many seconds."""
        n = len(running)
        if captures:
            self._capture_s = seconds
        elif not drafts:
            self._plain.setdefault(n, deque(maxlen=RECENT)).append(seconds)
        else:
            times = self._times_of(n, n + sum(len(draft.tokens) for draft in drafts))
            if n in self._plain:
                times.append(seconds / _median(self._plain[n]))
            for s, count in zip(running, counts, strict=True):
                s.drafter.balance += count - _median(times)

    def _times_of(self, n: int, rows: int) -> deque[float]:
        """At first: weights take as long to read as four rows to compute."""
        at_first = (4 + self.size(rows)) / (4 + self.size(n))
        return self._times.setdefault((n, rows), deque((at_first,), maxlen=RECENT))

    def _chances(self, s: Sequence, step_s: float) -> list[float]:
        if s.drafter is None:
            steps = s.timing.prefill_s / step_s if step_s else 0.0
            s.drafter = Drafter([*s.prompt, *s.tokens], SHARE * (steps + len(s.tokens)))
        else:
            s.drafter.follow(s.tokens[len(s.drafter.lookup.ids) - len(s.prompt) :])
        return s.drafter.chances(min(self.most, s.room - len(s.tokens) - 1))


def _median(values: Collection[float]) -> float:
    """The lower one of two."""
    return sorted(values)[(len(values) - 1) // 2]
