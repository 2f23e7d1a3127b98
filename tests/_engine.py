"""Tiny engines, sequences that remember what they were given, and what each would have been alone."""

import random
from collections.abc import Callable
from functools import cache

import _tiny
import pytest
import torch
from _paged import check

from fastllm import SamplingParams
from fastllm.decode.engine import Engine
from fastllm.decode.scheduler import Sequence
from fastllm.decode.speculate import Draft, Speculator

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


def come_and_go(e: Engine, sequences: list[Made]) -> None:
    """They join late and some leave early; each is given what it would be given alone."""
    for s in sequences:
        s.room += 10
    left = join_and_leave(e, sequences)
    for turn, s in enumerate(sequences):
        assert s.made == alone(s)[: len(s.made)] and (turn in left or len(s.made) == s.room)
    check(e.cache)


# The sizes of an engine that must not show: threads, how prompts are cut, and whether known beginnings are taken up.
IN_EVERY_WAY = pytest.mark.parametrize(
    "fields",
    [
        {"threads": threads, "chunk": chunk, "prefix_cache": prefix_cache, "max_num_seqs": 16}
        for prefix_cache in (True, False) for chunk in (1, 7, 64, 512) for threads in (1, 2)
    ],
    ids=lambda fields: "-".join(map(str, list(fields.values())[:3])),
)  # fmt: skip


def run_together(e: Engine, sequences: list[Made], lone: Callable[[Made], list]) -> None:
    """Each is given what it would be given alone."""
    e.run(sequences)
    assert [s.made for s in sequences] == [lone(s) for s in sequences]
    check(e.cache)


class Forced(Speculator):
    """Drafts in every step that has a row free, of any lengths, right up to some guess and wrong from there on. truth: all
    tokens of a sequence, or as many as are known."""

    def __init__(self, e: Engine, truth=lambda s: [token for token, _ in alone(s)]):
        super().__init__(e.speculate, e.sizes)
        self._truth, self._random = truth, random.Random(1)

    def choose(self, running, plans):
        r, sizes = self._random, [n for n in self.sizes if n >= len(running)]
        size = r.choice(sizes) if sizes[0] in plans and all(s.tokens for s in running) else sizes[0]
        first, drafts = len(running), []
        for row, s in enumerate(running if size in plans else ()):
            count = r.randint(0, max(min(self.most, s.room - len(s.tokens) - 1, size - first), 0))
            right = self._truth(s)[len(s.tokens) :][: r.choice((count, r.randint(0, count)))]
            wrong = [r.randrange(len(_tiny.TOKENS)) for _ in range(count - len(right))]
            if count and s.tokens:
                drafts.append(Draft(row, first, right + wrong))
                first += count
        return size, drafts

    def saw(self, *_):
        pass


def forced(e: Engine, **fields) -> Engine:
    e.steps.speculator = Forced(e, **fields)
    return e
