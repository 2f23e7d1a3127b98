"""Tiny engines, sequences that remember what they were given, and what each would have been alone."""

from functools import cache

import _tiny
import torch

from fastllm import SamplingParams
from fastllm.decode.engine import Engine
from fastllm.decode.scheduler import Sequence

EOS = frozenset({0, 2})
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=5)
PENALISED = SamplingParams(
    temperature=0.8, top_k=50, top_p=0.9, seed=5,
    repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, min_new_tokens=8,
)  # fmt: skip
KINDS = {"greedy": GREEDY, "sampled": SAMPLED, "penalised": PENALISED}
PROMPT = torch.randint(3, len(_tiny.TOKENS), (600,), generator=torch.Generator().manual_seed(1)).tolist()


def engine(config=_tiny.CONFIG, **fields) -> Engine:
    torch.manual_seed(0)
    return Engine(_tiny.decoder(config), **{"capacity": 700, "eos_ids": EOS, "max_num_seqs": 4} | fields)


class Made(Sequence):
    """A sequence; `made` holds a (token, logprob) pair for each that was generated. stop: ends after so many."""

    def __init__(self, prompt, params=GREEDY, count=24, index=0, seed=5, stop=None):
        self.made, self.steps = [], []
        super().__init__(prompt, count, params, index, seed, self._take)
        self.stop = stop

    def _take(self, step) -> bool:
        self.made.append((step.token, step.logprob))
        self.steps.append(step)
        return len(self.made) == self.stop


def steps(engine: Engine, prompt, params=GREEDY, count=24, index=0) -> list[tuple[int, float]]:
    """What one sequence is given, with nobody else in the engine."""
    s = Made(prompt, params, count, index)
    engine.run([s])
    return s.made


@cache
def _lone() -> Engine:
    return engine(max_num_seqs=1, prefix_cache=False)


@cache
def _alone(prompt: tuple[int, ...], params: SamplingParams, index: int, seed: int, count: int):
    s = Made(list(prompt), params, count, index, seed)
    _lone().run([s])
    return s.made


def alone(s: Made, longest: int = 64) -> list[tuple[int, float]]:
    """The tokens that `s` would be given if it were alone in an engine without a prefix cache."""
    count = min(max(longest, s.room), _lone().capacity - len(s.prompt))
    return _alone(tuple(s.prompt), s.params, s.index, s.seed, count)[: min(s.room, s.stop or s.room)]


def join_and_leave(engine: Engine, sequences: list[Made]) -> set[int]:
    """Sequences that join one after the other, at different steps; the indices of those that are cancelled on the way."""
    left = set()
    for turn, s in enumerate(sequences):
        engine.submit([s])
        for _ in range(turn % 3):
            engine.step()
        if turn in (3, 6, 7, 10):
            engine.cancel([sequences[turn - 2]])
            left.add(turn - 2)
    for s in sequences:
        engine.wait(lambda s=s: s.ended)
    return left


LENGTHS = (1, 2, 16, 17, 31, 33, 5, 48, 100, 255, 256, 257, 258, 90, 12, 64)  # around the borders of pages and tiles


def mixed(count: int = 16) -> list[Made]:
    """Requests of all kinds: prompts of many lengths, some that begin alike, several completions."""
    kinds, twin = list(KINDS.values()), PROMPT[:47]
    made = []
    for i in range(count):
        n = LENGTHS[i % 16]
        prompt = twin if i % 5 == 4 else PROMPT[:n] if i % 2 else PROMPT[i : i + n]
        made.append(Made(prompt, kinds[i % 3], 8 + 3 * (i % 7), index=i if prompt is twin else 0, seed=i % 4))
    return made
