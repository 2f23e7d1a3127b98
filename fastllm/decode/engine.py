"""The engine: many requests at once, each with the bits that it would have alone.

A step is one decode step for all that run, replayed from a plan, and then a piece of the prompts that wait. Plans are
captured for 1, 2, 4, 8, ... rows; rows beyond those that run are padding. What differs between requests lies in
tensors. A prompt's last token is the input of its first decode step: what is drawn, is drawn in one place.

Nobody drives the engine but those who wait for it: of the threads in `wait` one runs a step, which serves all of them,
and the next one may be run by another. So there is no thread in the background, and none that asks in a loop.

By the arithmetic contract tokens and log-probabilities depend on no neighbour, on no piece, and not on what the cache
held. So a sequence can also be made anew from its tokens, at any time: after a step that was interrupted, all are. Where it was
in the midst of who holds what, that too is made anew (`_mend`): a thread may die anywhere, and the others go on.

A step in which any row has an adapter is another plan, of the same sizes; the plans of steps without one know nothing of
adapters. A row without one has the same bits in both.

On a GPU a step is launched ahead, before the tokens of the one before are fetched, where nobody comes, leaves or looks at
logits: what the next one needs lies in tensors. A sequence that has ended with those draws a token that nobody sees.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import _C, ops
from ..models.arena import lack_of_memory
from ..models.decoder import Decoder
from ..peft import lora
from ..sampling_params import SamplingParams
from .adapters import Adapter, AdapterTable
from .cache import KVCache, pages_for
from .forks import Home
from .reader import LEAST, Piece, Reader
from .rows import Rows
from .scheduler import Scheduler, Sequence, own
from .score import Mean, Scores
from .speculate import Speculator
from .steps import Flight, Steps

LOST_S = 0.5  # after which one who waits looks for himself, should the thread that was to wake him have died


@dataclass
class Engine:
    """model: packed, or on a GPU. capacity: tokens of the longest sequence. max_num_seqs: how many run together. pages: of
    the cache; None takes enough for all of them. threads: 0 takes torch's number. chunk: prompt tokens that are read at
    once, at most. prefix_cache: texts that begin alike share the beginning. kv_dtype: of the cache, the model's own, int8
    or float8_e4m3fn. speculate: guesses of a sequence that a step may try, in rows that are free (speculate.py)."""

    model: Decoder
    capacity: int
    eos_ids: frozenset[int]
    max_num_seqs: int = 16
    pages: int | None = None
    threads: int = 0
    chunk: int = 512
    prefix_cache: bool = True
    kv_dtype: torch.dtype = torch.float32
    speculate: int = 0
    _unsure: bool = field(default=False, init=False)  # rows may be a token ahead of the sequences
    _busy: bool = field(default=False, init=False)  # a thread runs a step, or changes adapters
    _wanted: int = field(default=0, init=False)  # threads that are to change adapters before the next step

    def __post_init__(self) -> None:
        pages = self.max_num_seqs * pages_for(self.capacity) if self.pages is None else self.pages
        self.device = next(self.model.parameters()).device
        self.cache = KVCache(self.model.config, pages, self.prefix_cache, self.kv_dtype, self.device)
        rows = max(self.max_num_seqs, self.speculate + 1)
        try:
            self.rows = Rows(self.cache, rows, self.capacity, self.eos_ids)
        except (MemoryError, RuntimeError) as error:
            what = f"the records of max_num_seqs={self.max_num_seqs} sequences of {self.capacity} tokens"
            raise lack_of_memory(error, what, "lower max_num_seqs or max_model_len") or error from None
        self.scheduler = Scheduler(self.cache, self.max_num_seqs)
        self.reader = Reader(self.model, self.cache, self.max_num_seqs, self.capacity)
        self.adapters = AdapterTable(self.model)
        self._live: dict[Sequence, None] = {}  # that have not ended, as they came
        # The lock itself is what is held, not the condition: an interrupt cannot come between its release and Python's own code.
        self._lock, self._home = threading.RLock(), Home()
        self._turn = threading.Condition(self._lock)
        self._cancelled: deque[Sequence] = deque()
        self.goes_ahead = self.device.type == "cuda"
        self._ahead: Flight | None = None
        self._landed = self._resumed = 0.0  # when the last step's tokens came; since when somebody waits
        self.sizes = (*(1 << i for i in range((rows - 1).bit_length())), rows)
        self.steps = Steps(self.model, self.rows, self.adapters, Speculator(self.speculate, self.sizes))

    def _settle(self) -> None:
        """RuntimeError in a process that was forked while others used the engine."""
        if self._home.left:
            free = self._lock.acquire(blocking=False)
            try:
                self._home.move(not free or self._busy or bool(self.scheduler.running or self.scheduler.waiting))
            finally:
                if free:
                    self._lock.release()

    # ------------------------------------------------------------------------------------------------- from any thread

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Puts sequences in line. They are served while somebody waits for anything. ValueError for one that never fits, or
        an adapter that is not loaded."""
        self._settle()
        sequences = list(sequences)
        for s in sequences:
            tokens, need = len(s.prompt) + s.room, pages_for(len(s.prompt) + s.room)
            if not s.prompt or tokens > self.capacity or need > self.cache.pages:
                raise ValueError(
                    f"a sequence of {tokens} tokens ({need} pages) with {len(s.prompt)} to read; allowed: 1 to "
                    f"{self.capacity} tokens, in a cache of {self.cache.pages} pages"
                )
        with self._lock:  # between finding an adapter and using it nobody may take it out
            named = [(s, self.adapters.find(s.params.adapter)) for s in sequences if s.params.adapter is not None]
            for s, s.adapter in named:
                s.adapter.users.add(s)
            self.scheduler.waiting.extend(sequences)
            self._live.update(dict.fromkeys(sequences))

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Ends sequences that are not wanted any more; never waits."""
        if self._home.left or sys.is_finalizing():  # they are the parent's, or end with the process
            return
        self._cancelled.extend(s for s in sequences if not s.ended)
        with self._lock:
            self._sweep_between_steps()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Returns when ready(). Until then it runs steps, or lets another thread's steps pass."""
        self._settle()
        drives, self._resumed = False, time.perf_counter()
        while not ready():
            try:
                with self._lock:
                    self._turn.wait_for(lambda: ready() or not (self._busy or self._wanted), LOST_S)
                    if self._busy or self._wanted:
                        continue
                    if ready():
                        return
                    drives = self._busy = True
                self.step()
            finally:
                if drives:
                    drives = self._busy = False
                    with self._lock:
                        self._sweep_between_steps()
                        self._turn.notify_all()

    def run(self, sequences: Iterable[Sequence]) -> None:
        """Submits sequences and returns when all have ended; then raises the first one's error that has one."""
        sequences = list(sequences)
        try:
            self.submit(sequences)
            for s in sequences:
                self.wait(lambda s=s: s.ended)
        finally:
            self.cancel(sequences)
        for s in sequences:
            if s.error:
                raise s.error

    # ------------------------------------------------------------------------------------------------------- adapters

    def load_adapter(self, name: str, adapter: lora.Lora) -> None:
        """Sequences that are put in line from now on may name it; those that have an older one of that name keep it.
        Waits for the step that is running. ValueError for an adapter of another base, MemoryError where it does not fit."""
        parts = lora.parts(adapter, self.model)
        with self._between_steps():
            old = self.adapters.named.get(name)
            try:
                self.adapters.load(name, parts, self.cache.root())
            except (MemoryError, RuntimeError) as error:
                raise lack_of_memory(error, f"adapter {name!r}", "unload one that is not needed") or error from None
            finally:
                self.steps.drop_plans()
            with self._lock:
                if old:
                    self._retire(old)

    def unload_adapter(self, name: str) -> None:
        """The name is unknown from now on; sequences in line that have the adapter end with it. Waits as load_adapter."""
        with self._between_steps(), self._lock:
            adapter = self.adapters.find(name)
            del self.adapters.named[name]
            self._retire(adapter)

    def _retire(self, adapter: Adapter) -> None:
        adapter.retired = True
        if not adapter.users:
            self.cache.forget(adapter.root)
            self.adapters.free(adapter)
            self.steps.drop_plans()

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """Nobody runs a step meanwhile; whoever is about to begin the next one waits. What an interrupt tears apart is mended."""
        self._settle()
        alone = False
        try:
            with self._lock:
                self._wanted += 1
                try:
                    while self._busy:
                        self._turn.wait_for(lambda: not self._busy, LOST_S)
                    alone = self._busy = True
                finally:
                    self._wanted -= 1
            with torch.inference_mode():
                self._drop_ahead()
                self._sweep()
            with self.scheduler.changing():
                yield
        finally:
            if alone:
                self._busy = False
            with self._lock:
                self._sweep_between_steps()
                self._turn.notify_all()

    def _sweep_between_steps(self) -> None:
        if not self._busy:  # else that step does it
            self._busy = True  # a cancel within this one, by the garbage collector, only adds to the list
            try:
                with torch.inference_mode():  # as in a step: what was made in it may not be written to outside
                    self._sweep()
            finally:
                self._busy = False

    def _sweep(self) -> None:
        if self._cancelled:
            self._drop_ahead()
        if self.scheduler.torn:
            self._mend()
        while self._cancelled:
            s = self._cancelled[0]
            if not s.ended:
                self._end(s)
            self._cancelled.popleft()  # still the same: others only add behind it
        self.scheduler.close_up()

    # ------------------------------------------------------------------------------------------------------- the step

    def step(self) -> None:
        """A decode step of all that run, then a piece of the prompts that wait. By one thread at a time: see `wait`."""
        previous = _C.set_thread_limit(self.threads)
        try:
            with torch.inference_mode():
                self._sweep()
                if self._unsure:  # the last step did not come to its end
                    self._seat_all()
                self._unsure = True
                if self.scheduler.running:
                    self._decode()
                self._read()
                self._unsure = False
        finally:
            _C.set_thread_limit(previous)

    def _may_go_ahead(self, flight: Flight) -> bool:
        """Whether the step after it is known already: the same rows, which need nothing of Python."""
        changes = self.speculate or flight.captures or self._wanted or self._cancelled
        if not self.goes_ahead or changes or flight.running != self.scheduler.running:
            return False
        return all(
            s.room - len(s.tokens) > 1 and s.params.logprobs is None and not (s.done or s.error) for s in flight.running
        )

    def _drop_ahead(self) -> None:
        """Waits for a step that was launched ahead; all rows are to be made anew."""
        if self._ahead:
            flight, self._ahead, self._unsure = self._ahead, None, True
            flight.numbers()

    def _decode(self) -> None:
        flight, self._ahead = self._ahead, None
        running = flight.running if flight else list(self.scheduler.running)
        began = max(self._landed, self._resumed) if flight else time.perf_counter()
        try:
            flight = flight or self.steps.launch(running, self.threads)
            if self._may_go_ahead(flight):
                self._ahead = self.steps.launch(running, self.threads)
            tokens, logprobs = flight.numbers()
        except Exception as error:  # none has moved on
            lack = self._lack_of_memory(error, f"a step of {self.steps.speculator.size(len(running))} rows")
            if lack:  # with one sequence less it is another step: the one that has least to lose
                failed = [min(running, key=lambda s: len(s.tokens))]
            else:
                failed = [running[row] for row in error.rows] if isinstance(error, ops.LogitsError) else running
            for s in failed:
                s.error = lack or own(error)
            self._end_done()
            return self._seat_all()  # the rows may be a token ahead
        self._landed = time.perf_counter()
        drafts, captures = flight.drafts, flight.captures
        seconds = self._landed - began
        self._clock([s for s in running if not (s.done or s.error)], seconds, captures)
        drawn = [[row] for row in range(len(running))]  # the rows that drew each one's next tokens
        for draft in drafts:
            drawn[draft.row] = draft.right(tokens)
            running[draft.row].timing.drafted += len(draft.tokens)
        for s, rows in zip(running, drawn, strict=True):
            if s.done or s.error:
                continue
            begun, s.timing.accepted = len(s.tokens), s.timing.accepted + len(rows) - 1
            try:
                for row in rows:
                    s.take(tokens[row], logprobs[row], _top(flight.plan.outputs[2], row, s.params.logprobs))
                    if s.done:
                        break
                else:
                    if drafts:
                        self.rows.go_on(s, rows[-1], len(rows))
            except Exception as error:
                s.error = error
            s.timing.decoded += len(s.tokens) - begun if begun and not captures else 0
        self.steps.speculator.saw(running, [len(rows) for rows in drawn], drafts, seconds, captures)
        if drafts:
            self.rows.clear(len(running), len(flight.plan.outputs[0]))
        if self._ahead and any(s.done or s.error for s in running):  # it lands before any row moves
            return self._decode()
        self._end_done()

    def _lack_of_memory(self, error: Exception, what: str) -> MemoryError | None:
        step = f"others go on; run fewer at once than max_num_seqs={self.max_num_seqs}, with less kv_bytes, or int8"
        return lack_of_memory(error, what, step)

    def _clock(self, running: list[Sequence], seconds: float, captures: bool) -> None:
        for s in running:
            s.timing.prompt_tokens += not s.tokens
        for (_, later), timing in {(id(s.timing), bool(s.tokens)): s.timing for s in running}.items():
            spent = "capture_s" if captures else "decode_s" if later else "prefill_s"
            setattr(timing, spent, getattr(timing, spent) + seconds)
            timing.steps += spent == "decode_s"

    def _read(self) -> None:
        """Reads prompts for about as long as a step may give them."""
        most = self.reader.budget(bool(self.scheduler.running), self.chunk)
        while most > 0 and (pieces := self.reader.gather(self.scheduler, most)):
            self._read_pieces(pieces)
            most -= max(sum(p.stop - p.start for p in pieces), LEAST)

    def _read_pieces(self, pieces: list[Piece]) -> None:
        began = time.perf_counter()
        try:
            hidden = self.reader.read(pieces, self.adapters.pools)
            seconds = self._seconds_since(began)  # where a GPU tells of its errors
        except Exception as error:
            if len(pieces) > 1:  # each for itself, to its end or its own error
                for piece in pieces:
                    self._read_pieces([piece])
                return
            s = pieces[0].sequence
            s.error = self._lack_of_memory(error, f"reading a prompt of {len(s.prompt)} tokens") or error
            return self._end(s)
        for timing in {id(p.sequence.timing): p.sequence.timing for p in pieces if p.stop > p.start}.values():
            timing.prefill_s += seconds
        for piece, states in zip(pieces, hidden, strict=True):
            try:
                self._take_piece(piece, states)
            except Exception as error:
                piece.sequence.error = error
                self._end(piece.sequence)
        self.rows.send(*(p.sequence for p in pieces if p.sequence.row >= 0))
        self.reader.took(sum(p.stop - p.start for p in pieces), self._seconds_since(began))

    def _seconds_since(self, began: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def _take_piece(self, piece: Piece, hidden: Tensor) -> None:
        s, start, stop = piece
        s.timing.prompt_tokens += stop - start
        if s.hidden and stop > max(s.skip, start):
            s.taking = True
            s.hidden(hidden[max(s.skip - start, 0) :])
        s.read, s.taking = stop, False
        if stop < s.to_read:
            return
        if s.room:
            self.scheduler.run(s)
            self.rows.write(s)
        else:
            self._end(s)

    def _end_done(self) -> None:
        running = self.scheduler.running
        # from the last row: what moves into an empty one goes on
        ended = [s for s in reversed(running) if s.done or s.error]
        if not ended:
            return
        before = {s: s.row for s in running}
        for s in ended:
            self._leave(s)
        self.rows.seat(*(s for s in running if s.row != before[s]))
        self.rows.clear(len(running), len(before))
        self.scheduler.torn = False

    def _seat_all(self) -> None:
        """All rows anew from their sequences. One whose token was being taken when that was interrupted has failed."""
        self._ahead = None
        for s in list(self._live):
            if s.taking and not s.error:
                s.error = RuntimeError("the thread that served this was interrupted as it took a token; ask again")
                if s.row < 0:
                    self._end(s)
        self._end_done()
        self.rows.seat(*self.scheduler.running)
        self.rows.clear(len(self.scheduler.running), self.sizes[-1])

    def _mend(self) -> None:
        """What an interrupt tore apart is made anew from the sequences; what the cache knew of texts is forgotten."""
        with self._lock:
            ended = [s for s in self._live if s.leaving]
            for s in ended:
                s.ended = True
                del self._live[s]
                if s.adapter:
                    s.adapter.users.discard(s)
            self.scheduler.mend(self._live)
            self.adapters.mend(self._live)
            self.steps.drop_plans()
        self._unsure, self.scheduler.torn = True, False

    def _end(self, s: Sequence) -> None:
        row, running = s.row, self.scheduler.running
        self._leave(s)
        if row >= 0:
            if row < len(running):
                self.rows.seat(running[row])
            self.rows.clear(len(running), len(running) + 1)
        self.scheduler.torn = False

    def _leave(self, s: Sequence) -> None:
        """It has ended. Left to be written: its row, and that of who has it now."""
        self.scheduler.torn = s.leaving = True
        self.scheduler.leave(s)
        s.ended = True
        if s.adapter:
            s.adapter.users.discard(s)
            if s.adapter.retired and not s.adapter.users:
                self._retire(s.adapter)
        self._live.pop(s, None)

    # ------------------------------------------------------------------------------------------------------- prompts

    def score(
        self, texts: Iterable[list[int]], adapter: str | None = None, starts: Iterable[int] | None = None
    ) -> list[Tensor]:
        """log p(ids[i] | ids[:i]) for i from a start on, 1 where none is given, float32 [n - start], of each text: the bits
        that decoding would report.

        What comes before a start may be found in the cache, and is known to it afterwards; texts that differ in their last
        token alone are read once. So the choices of a question cost little more than the question.
        """
        texts = list(texts)
        groups: dict[tuple[tuple[int, ...], int], Scores] = {}
        wanted = []
        for ids, start in zip(texts, [1] * len(texts) if starts is None else starts, strict=True):
            key = tuple(ids[:-1]), start
            if key[0] and key not in groups:
                groups[key] = Scores(self.model, ids[:-1], start)
            if group := groups.get(key):
                group.lasts.setdefault(ids[-1], len(group.lasts))
            wanted.append(group)
        params, scores = SamplingParams(adapter=adapter), groups.values()
        self.run([Sequence(s.ids, params=params, hidden=s.add, skip=s.skip) for s in scores])
        return [s.of(ids[-1]) if s else torch.empty(0) for s, ids in zip(wanted, texts, strict=True)]

    def embed(self, texts: Iterable[list[int]], adapter: str | None = None) -> Tensor:
        """Mean over the tokens of the normed final hidden states, of length 1: float32 [number of texts, dim]."""
        means = [Mean(self.model, ids) for ids in texts]
        params = SamplingParams(adapter=adapter)
        self.run([Sequence(m.ids, params=params, hidden=m.add) for m in means])
        return torch.stack([m.found for m in means])


def _top(logits: Tensor, row: int, count: int | None) -> list[tuple[int, float]] | None:
    if count is None:
        return None
    ids, values = ops.top_logprobs(logits[row : row + 1], count)
    pairs = zip(ids[0].tolist(), values[0].tolist(), strict=True)
    return [pair for pair in pairs if pair[0] >= 0]  # -1: nothing is left above -inf
