"""The engine: a prompt goes in by chunks, tokens come out one replayed step at a time. One sequence at once.

Prefill runs the model eagerly over chunks of the prompt. The first decode step is captured while it runs and replayed
for every token after that, of every request: what differs between requests lies in tensors. The arithmetic contract
makes tokens and log-probabilities independent of the chunking, of the thread count and of what the cache held before.
So a generation that another one interrupted reads its tokens in again and goes on as if nothing had happened.
"""

import contextlib
import time
from collections import deque
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
    """prefill_s: seconds to a first token, over `prompt_tokens` read in; capture_s: of the step that an engine
    captures; decode_s: of the `decoded` tokens that were replayed."""

    prefill_s: float = 0.0
    capture_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    decoded: int = 0


@dataclass
class Step:
    """One generated token: its log-probability under the untruncated distribution at temperature 1, and, when asked
    for, the most likely tokens with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]] | None = None


@dataclass
class Engine:
    """model: packed. capacity: tokens of the longest sequence. threads: 0 takes torch's number. chunk: prompt tokens
    that are read in at once."""

    model: Decoder
    capacity: int
    eos_ids: frozenset[int]
    threads: int = 0
    chunk: int = 512
    _captured: Captured | None = field(default=None, init=False)
    _prompt: tuple[Sequence[int], Tensor] | None = field(default=None, init=False)  # in the cache, and its logits
    _current: list[int] | None = field(default=None, init=False)  # the generation whose next step can be replayed

    def __post_init__(self) -> None:
        self.cache = SequenceCache(self.model.config, self.capacity)
        self.state = ops.SampleState.create(1, history=self.capacity + 1, suppress=max(1, len(self.eos_ids)))

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
        self._prompt = self._current = None
        for start in range(0, len(ids), self.chunk):
            stop = min(start + self.chunk, len(ids))
            yield self.model.step(ids[start:stop], self.cache.chunk(start, stop))

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """Logits [1, V] of the token after the prompt."""
        with self._running():
            last = deque(self._hidden(torch.as_tensor(ids)), maxlen=1).pop()
            return self.model.logits(last[-1:])

    def score(self, ids: Sequence[int]) -> Tensor:
        """log p(ids[i] | ids[:i]) for i from 1: float32 [n - 1]; the bits that decoding those tokens reports."""
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

    def _decode(self) -> tuple[Tensor, Tensor, Tensor]:
        """One step on the cache's tensors: the token in `cache.ids` goes in, its successor is drawn and put there."""
        return self._draw(self.model.logits(self.model.step(self.cache.ids, self.cache.next_token())))

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(token, logprob, logits) of the next token, which is put where the step after this one reads it."""
        c = self.cache
        token, logprob, *_ = ops.sample(logits, self.state, entropy=False)
        ops.advance(token, self.state, c.position, c.context_len, c.block_table, c.slot, next_ids=c.ids)
        return token, logprob, logits

    def generate(
        self, prompt: Sequence[int], params: SamplingParams, index: int, seed: int, timing: Timing
    ) -> Iterator[Step]:
        """Tokens of completion `index` until the cache is full. Between two of them others may use the engine.

        The completions of one prompt (the same object) read it in once. LogitsError when the model gives NaNs.
        """
        done: list[int] = []
        while len(prompt) + len(done) < self.capacity:
            started = time.perf_counter()
            with self._running():
                if self._current is not done:
                    spent, drawn = "prefill_s", self._begin(prompt, done, params, index, seed, timing)
                elif self._captured is None:
                    self._captured = capture(self._decode)
                    spent, drawn = "capture_s", self._captured.outputs
                else:
                    spent, drawn = "decode_s", self._replay(self._captured)
                token, logprob, logits = drawn
                step = Step(int(token), float(logprob), _top(logits, params.logprobs))
            done.append(step.token)
            self._current = done
            setattr(timing, spent, getattr(timing, spent) + time.perf_counter() - started)
            timing.decoded += spent == "decode_s"
            yield step

    def _replay(self, captured: Captured) -> tuple[Tensor, Tensor, Tensor]:
        if captured.replay(self.threads):
            # ids, slots and positions were checked before the step, so what is left is logits without a distribution
            raise ops.LogitsError([0])
        return captured.outputs

    def _begin(
        self, prompt: Sequence[int], done: list[int], params: SamplingParams, index: int, seed: int, timing: Timing
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reads in the prompt and what followed it so far, unless the cache has it, and draws the token after that."""
        if done or self._prompt is None or self._prompt[0] is not prompt:
            ids = [*prompt, *done]
            logits = self.prefill(ids)
            timing.prompt_tokens += len(ids)
            if not done:
                self._prompt = prompt, logits
        else:
            ids, logits = prompt, self._prompt[1]
        self.cache.seek(len(ids))
        self.state.set(0, params, index=index, seed=seed, prompt=ids, eos=sorted(self.eos_ids))
        self.state.prompt_len[0] = len(prompt)
        return self._draw(logits)


def _top(logits: Tensor, count: int | None) -> list[tuple[int, float]] | None:
    if count is None:
        return None
    ids, values = ops.top_logprobs(logits, count)
    pairs = zip(ids[0].tolist(), values[0].tolist(), strict=True)
    return [pair for pair in pairs if pair[0] >= 0]  # -1: nothing is left above -inf
