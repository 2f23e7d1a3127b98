"""The engine: a prompt goes in by chunks, tokens come out one replayed step at a time. One sequence at once.

Prefill runs the model eagerly over chunks of the prompt. The first decode step is captured while it runs and replayed for
every token after that, of every request: what differs between requests lies in tensors. The arithmetic contract makes tokens
and log-probabilities independent of the chunking, of the thread count and of what the cache held before.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import _C, ops
from ..models.decoder import Decoder
from ..sampling_params import SamplingParams
from .cache import SequenceCache
from .graph import Captured, capture

SCORE_ROWS = 64  # rows of logits at once when scoring: 64 x 49,152 floats are 12.6 MB


@dataclass
class Timing:
    """Seconds of the prompt and of the tokens after the first, with their counts."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0


@dataclass
class Step:
    """One generated token: its log-probability under the untruncated distribution at temperature 1, and, when asked for, the
    most likely tokens with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]] | None = None


@dataclass
class Engine:
    """model: packed. capacity: tokens of the longest sequence. threads: 0 takes torch's number. chunk: prompt tokens at once."""

    model: Decoder
    capacity: int
    eos_ids: frozenset[int]
    threads: int = 0
    chunk: int = 512
    _captured: Captured | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.cache = SequenceCache(self.model.config, self.capacity)
        self.state = ops.SampleState.create(1, history=self.capacity + 1, suppress=max(1, len(self.eos_ids)))
        self.logits = torch.empty(0)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        previous = _C.set_thread_limit(self.threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            _C.set_thread_limit(previous)

    # ------------------------------------------------------------------------------------------------------- prompts

    def _hidden(self, ids: Tensor) -> Iterator[Tensor]:
        """Final hidden states of a sequence from its start, chunk by chunk [T, dim]; fills the cache."""
        for start in range(0, len(ids), self.chunk):
            stop = min(start + self.chunk, len(ids))
            yield self.model.step(ids[start:stop], self.cache.chunk(start, stop))

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """Logits [1, V] of the token after the prompt."""
        with self._running():
            hidden = None
            for hidden in self._hidden(torch.as_tensor(ids)):
                pass
            return self.model.logits(hidden[-1:])

    def score(self, ids: Sequence[int]) -> Tensor:
        """log p(ids[i] | ids[:i]) for i from 1: float32 [n - 1]; the same bits as decoding those tokens would report."""
        targets, out = torch.as_tensor(ids), []
        with self._running():
            done = 0
            for hidden in self._hidden(targets):
                for rows in hidden.split(SCORE_ROWS):
                    wanted = targets[done + 1 : done + 1 + len(rows)]
                    if len(wanted):
                        out.append(ops.target_logprobs(self.model.logits(rows[: len(wanted)]), wanted))
                    done += len(rows)
        return torch.cat(out) if out else torch.empty(0)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Mean over the tokens of the normed final hidden states, float32 [dim], of length 1."""
        with self._running():
            total = sum(self.model.norm(h).sum(0) for h in self._hidden(torch.as_tensor(ids)))
            return torch.nn.functional.normalize(total, dim=0)

    # ------------------------------------------------------------------------------------------------------ decoding

    def _decode(self) -> tuple[Tensor, ...]:
        """One step on the cache's tensors: the token in `cache.ids` goes in, its successor is drawn and put there."""
        self.logits = self.model.logits(self.model.step(self.cache.ids, self.cache.next_token()))
        token, logprob, *_ = ops.sample(self.logits, self.state, entropy=False)
        self._advance(token)
        return token, logprob

    def _advance(self, token: Tensor) -> None:
        c = self.cache
        ops.advance(token, self.state, c.position, c.context_len, c.block_table, c.slot, next_ids=c.ids)

    def _next(self) -> tuple[Tensor, ...]:
        if self._captured is None:
            self._captured = capture(self._decode)
            return self._captured.outputs
        if self._captured.replay(self.threads):
            # ids, slots and positions were checked before the step, so what is left is logits without a distribution
            raise ops.LogitsError([0])
        return self._captured.outputs

    def generate(
        self, ids: Sequence[int], params: SamplingParams, index: int, seed: int, logits: Tensor, timing: Timing
    ) -> Iterator[Step]:
        """Tokens of completion `index` after a prefill of `ids` that gave `logits`; without end: the caller stops."""
        with self._running():
            self.cache.seek(len(ids))
            self.state.set(0, params, index=index, seed=seed, prompt=ids, eos=sorted(self.eos_ids))
            token, logprob, *_ = ops.sample(logits, self.state, entropy=False)
            self._advance(token)
            step = self._report(token, logprob, logits, params)
        timing.new_tokens += 1
        yield step
        while True:
            started = time.perf_counter()
            with self._running():
                token, logprob = self._next()
                step = self._report(token, logprob, self.logits, params)
            timing.decode_s += time.perf_counter() - started
            timing.new_tokens += 1
            yield step

    def _report(self, token: Tensor, logprob: Tensor, logits: Tensor, params: SamplingParams) -> Step:
        top = None
        if params.logprobs:
            ids, values = ops.top_logprobs(logits, params.logprobs)
            top = list(zip(ids[0].tolist(), values[0].tolist(), strict=True))
        return Step(int(token), float(logprob), top)
