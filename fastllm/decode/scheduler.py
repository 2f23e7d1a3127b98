"""Who is served, and when: sequences wait in line, are read in, run together, and leave.

First come, first served. The first in line is let in when its worst case fits: a row, and the pages of its prompt and of
all that it may generate. So what runs never stops for want of memory, nothing is read twice, and a block table is
complete before the first step: replaying needs nobody. The price is pages that a completion which ends early did not
need; the other way, to let in more and throw out what no longer fits, would pay with time.

Those first in line are read together, but for one that begins like another which is being read: it waits, and finds that
beginning in the cache.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ..ops import LogitsError
from ..sampling_params import SamplingParams
from .adapters import Adapter
from .cache import PAGE, KVCache, pages_for

if TYPE_CHECKING:
    from .speculate import Drafter


@dataclass
class Timing:
    """Of one request. prefill_s: seconds of work up to first tokens, in which `prompt_tokens` were read and `cached` more
    were found in the cache; capture_s: of steps that an engine captures; decode_s: of the `steps` that were replayed for
    `decoded` tokens, which is more where several completions run together. Others' shares in a step are not taken off.
    Of `drafted` tokens (speculate.py) `accepted` were right, and are among the decoded."""

    prefill_s: float = 0.0
    capture_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    cached: int = 0
    steps: int = 0
    decoded: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass
class Step:
    """One generated token: its log-probability under the untruncated distribution at temperature 1, and, when asked
    for, the most likely tokens with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]] | None = None


@dataclass(eq=False)
class Sequence:
    """A completion of `prompt`, or (room 0) a text that is only read.

    room: tokens to generate at most. index: the completion's number among those of its request, which share the prompt
    object. receive: is given each token, and says whether the sequence ends with it. hidden: is given the final hidden
    states [T, dim] of the prompt, piece by piece. Both are called by the thread that drives the engine. skip: of a text, so
    many tokens at the beginning whose hidden states are not wanted; they may be found in the cache, as those of a prompt.
    """

    prompt: list[int]
    room: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)
    index: int = 0
    seed: int = 0
    receive: Callable[[Step], bool] = lambda step: False
    hidden: Callable[[Tensor], None] | None = None
    timing: Timing = field(default_factory=Timing)
    skip: int = 0

    tokens: list[int] = field(default_factory=list, init=False)  # generated so far
    adapter: Adapter | None = field(default=None, init=False)  # the one that params names, once it is in line
    pages: list[int] = field(default_factory=list, init=False)
    known: int = field(default=0, init=False)  # tokens at the beginning of the prompt that the cache had
    read: int = field(default=0, init=False)  # tokens of the prompt whose keys and values are in the pages
    row: int = field(default=-1, init=False)
    drafter: "Drafter | None" = field(default=None, init=False)  # where drafts are made
    done: bool = field(default=False, init=False)  # has its last token
    taking: bool = field(default=False, init=False)  # a token, or hidden states: or that was interrupted
    leaving: bool = field(default=False, init=False)
    ended: bool = field(default=False, init=False)  # and has left, or was cancelled, or failed
    error: Exception | None = field(default=None, init=False)

    @property
    def root(self) -> int:
        """What the cache knows its text under."""
        return self.adapter.root if self.adapter else 0

    @property
    def to_read(self) -> int:
        """Prompt tokens to read in; the last one of a completion is the input of its first decode step."""
        return len(self.prompt) - bool(self.room)

    def take(self, token: int, logprob: float, top: list[tuple[int, float]] | None) -> None:
        """The next token. LogitsError where there was no distribution to draw it from."""
        if logprob != logprob:
            raise LogitsError([0])
        self.taking = True
        self.tokens.append(token)
        self.done = self.receive(Step(token, logprob, top)) or len(self.tokens) >= self.room
        self.taking = False


def own(error: Exception) -> Exception:
    """For one of those that a step has failed for: who catches it may write to it, and of the others it tells nothing."""
    if isinstance(error, LogitsError):  # whose rows are those of the batch
        return LogitsError([0]).with_traceback(error.__traceback__)
    try:
        made = copy.copy(error)
    except Exception:  # its class takes other arguments than it keeps
        made = RuntimeError(f"{type(error).__name__}: {error}")
    made.__cause__ = error.__cause__
    return made.with_traceback(error.__traceback__)


class Scheduler:
    """The line, and what runs: running[i] has row i, of `rows`."""

    def __init__(self, cache: KVCache, rows: int):
        self.cache, self.rows = cache, rows
        self.waiting: list[Sequence] = []  # with some that have left, until `close_up`
        self.running: list[Sequence] = []
        self._left = 0  # of the line, since `close_up`, at least as many as it holds of these
        self.torn = False  # who holds what is changing, or that was interrupted

    @contextmanager
    def changing(self) -> Iterator[None]:
        """An interrupt within leaves things torn; an Exception does not: whoever raises one puts back what he changed."""
        self.torn = True
        try:
            yield
        except Exception:
            self.torn = False
            raise
        self.torn = False

    def mend(self, sequences: Iterable[Sequence]) -> None:
        """Makes the line, the rows and the cache's books anew of the sequences that have not ended, as they came."""
        self.running = sorted((s for s in sequences if s.row >= 0), key=lambda s: s.row)
        for row, s in enumerate(self.running):
            s.row = row
        self.waiting, self._left = [s for s in sequences if s.row < 0], 0
        self.cache.mend([s.pages for s in sequences])

    def close_up(self) -> None:
        """Takes out of the line who has left, when they may be half of it: so leaving it takes no longer in a long one."""
        if self._left and 2 * self._left >= len(self.waiting):
            line, self._left = self.waiting[:], 0
            self.waiting[: len(line)] = [s for s in line if not s.leaving]  # behind them others may have joined

    def next(self, reading: list[Sequence]) -> Sequence | None:
        """Who is to be read beside these, the first in line: the one behind them, with its pages; None where nobody is, or it
        has to wait."""
        place = len(reading)
        while place < len(self.waiting) and self.waiting[place].leaving:
            del self.waiting[place]
        if place == len(self.waiting):
            return None
        s = self.waiting[place]
        if not s.pages:
            self.torn = True
            admitted = self._admit(s, reading)
            self.torn = False
            return s if admitted else None
        return s

    def _admit(self, s: Sequence, reading: list[Sequence]) -> bool:
        if s.room and len(self.running) + sum(bool(r.room) for r in reading) == self.rows:
            return False
        alike = (r for r in self.running if r.prompt is s.prompt and r.adapter is s.adapter)
        sibling = next(alike, None) if s.room else None
        if sibling:  # its full pages are shared; of the page that ends the prompt, each has its own copy
            known, shared = s.to_read, self.cache.share(sibling.pages[: s.to_read // PAGE])
        else:
            shared = self.cache.match(s.prompt if s.room else s.prompt[: s.skip], s.root)
            known = len(shared) * PAGE
        need = pages_for(len(s.prompt) + s.room) - len(shared)
        if not sibling and any(self._knows_more(r, s, known) for r in reading):
            self.cache.release(shared)
            return False
        if need > self.cache.available:
            self.cache.release(shared)
            if not self.running and not reading:
                raise RuntimeError(f"{need} pages are asked for, nobody runs, and {self.cache.available} are free")
            return False
        pages = shared + self.cache.take(need)
        if sibling and known % PAGE:
            self.cache.copy(sibling.pages[known // PAGE], pages[known // PAGE])
        s.pages, s.known, s.read = pages, known, min(known, s.to_read)
        s.timing.cached += s.read
        return True

    def _knows_more(self, r: Sequence, s: Sequence, known: int) -> bool:
        """Whether `s`, of which the cache has so many tokens, will find another page of its text once `r` has been read, or all
        of it beside its sibling."""
        if s.room and r.room and r.prompt is s.prompt and r.adapter is s.adapter:
            return True
        stop = known + PAGE
        if not self.cache.remember or r.root != s.root or stop > (r.to_read if r.room or r.skip else 0):
            return False
        return stop <= (len(s.prompt) if s.room else s.skip) and r.prompt[:stop] == s.prompt[:stop]

    def run(self, s: Sequence) -> None:
        """The first in line has been read in: it takes the next row."""
        self.torn = True
        self.cache.learn(s.prompt[: s.read], s.pages, s.root)
        s.row = len(self.running)
        self.running.append(s)
        while self.waiting.pop(0) is not s:  # those before it have left
            pass
        self.torn = False

    def leave(self, s: Sequence) -> None:
        """Gives back what `s` holds. The last row's sequence moves into the row that falls empty."""
        if s.row >= 0:
            last = self.running.pop()
            if last is not s:
                self.running[s.row], last.row = last, s.row
            if not s.error:
                self.cache.learn([*s.prompt, *s.tokens][:-1], s.pages, s.root)
        else:
            self._left += 1
            if s.skip and not s.error:
                self.cache.learn(s.prompt[: s.read], s.pages, s.root)
        self.cache.release(s.pages, forget=s.error is not None)
        s.pages = []
