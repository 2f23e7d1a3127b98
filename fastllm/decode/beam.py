"""Generation by an encoder-decoder: greedy, or beam search with a length penalty (Wu et al. 2016, arXiv 1609.08144), as
`generate` of transformers has it: the same tokens.

All beams of all sources take one step together over a cache; a source that is done leaves it. Of the continuations of a
source's beams the 2 * beams likeliest are looked at, since up to half of them may end. One that ends is kept, with the score
log p / length^length_penalty, if it is among the likeliest `beams`. A source is done when it has `beams` of them and
- early_stopping is True, or
- False: the likeliest unfinished beam, scored at the length that it has, is no better than the worst of them; or
- "never": nor would it be at the greatest length, where the penalty favours longer ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import ops
from ..models.seq2seq import Memory, Seq2Seq

MOST_BEAMS = 10  # 2 * beams continuations come from ops.top_logprobs


@dataclass(frozen=True)
class BeamParams:
    """beams: 1 is greedy. prompt: what every target begins with, the model's start token where empty. n: hypotheses returned
    for a source. suppress: tokens that are never generated; the rest share their probability."""

    max_new_tokens: int = 128
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    n: int = 1
    prompt: Sequence[int] = ()
    suppress: Sequence[int] = ()

    def __post_init__(self) -> None:
        for key, most in (("max_new_tokens", None), ("beams", MOST_BEAMS), ("n", self.beams)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most and value > most):
                limit = "of at least 1" if not most else f"from 1 to {most}" + (", the beams" if key == "n" else "")
                raise ValueError(f"BeamParams: {key}={value!r}; allowed: an integer {limit}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"BeamParams: early_stopping={self.early_stopping!r}; allowed: True, False, 'never'")
        if not isinstance(self.length_penalty, int | float):
            raise ValueError(f"BeamParams: length_penalty={self.length_penalty!r}; allowed: a number")


@dataclass(frozen=True)
class Hypothesis:
    """token_ids: what was generated, the end token included. score: log p / length^length_penalty; greedy: log p.
    finish_reason: "stop" or "length"."""

    token_ids: list[int]
    score: float
    finish_reason: str


Candidate = tuple[float, int, int]  # log p of all tokens, beam of the source, token


@dataclass
class _Greedy:
    """One source: the likeliest token, until one ends it."""

    params: BeamParams
    eos: int
    running: list[tuple[float, list[int]]] = field(default_factory=lambda: [(0.0, [])])
    done: list[Hypothesis] = field(default_factory=list)

    def advance(self, candidates: list[Candidate], length: int) -> list[int]:
        """Takes the next tokens; the beams that those which go on came from: none, when the source is done."""
        score, _, token = candidates[0]
        tokens = [*self.running[0][1], token]
        if token == self.eos or length == self.params.max_new_tokens:
            self.done.append(Hypothesis(tokens, score, "stop" if token == self.eos else "length"))
            return []
        self.running = [(score, tokens)]
        return [0]


@dataclass
class _Beams(_Greedy):
    """One source: the likeliest `beams` sequences, and the best that ended."""

    def advance(self, candidates: list[Candidate], length: int) -> list[int]:
        p, last, going, parents = self.params, length == self.params.max_new_tokens, [], []
        for rank, (score, parent, token) in enumerate(candidates):
            if token == self.eos or last:
                if rank < p.beams:
                    tokens = [*self.running[parent][1], token]
                    reason = "stop" if token == self.eos else "length"
                    self.done.append(Hypothesis(tokens, score / length**p.length_penalty, reason))
            elif len(going) < p.beams:
                going.append((score, [*self.running[parent][1], token]))
                parents.append(parent)
        self.done = sorted(self.done, key=lambda h: -h.score)[: p.beams]
        self.running = going
        return [] if last or not going or self._is_done(length) else parents

    def _is_done(self, length: int) -> bool:
        p = self.params
        if len(self.done) < p.beams:
            return False
        reach = p.max_new_tokens if p.early_stopping == "never" and p.length_penalty > 0 else length
        return p.early_stopping is True or self.running[0][0] / reach**p.length_penalty <= self.done[-1].score


def generate(
    model: Seq2Seq, source: Tensor | Memory, mask: Tensor | None = None, params: BeamParams | None = None
) -> list[list[Hypothesis]]:
    """The best hypotheses of each source, best first.

    source, mask: as Seq2Seq takes them, or what `encode` or `encode_lists` made of them. Weights that `pack_weights` packed
    make it quicker on a CPU. ValueError where prompt and new tokens do not fit the model's positions; TypeError for any
    other source.
    """
    if not isinstance(source, (Tensor, Memory)):
        raise TypeError(
            f"beam.generate: source is a {type(source).__name__}; it must be a tensor of ids [B, S], or what the model's "
            "`encode` made of one, or `encode_lists` of lists of ids"
        )
    p = params or BeamParams()
    prompt = list(p.prompt) or [model.config.start_id]
    for token in (*prompt, *p.suppress):
        if not 0 <= token < model.config.vocab:
            raise ValueError(f"token {token} of prompt or suppress is outside the vocabulary [0, {model.config.vocab})")
    with torch.inference_mode():
        memory = source if isinstance(source, Memory) else model.encode(source, mask)
        search = _Greedy if p.beams == 1 else _Beams
        sources = [search(p, model.config.eos_id) for _ in range(memory.count)]
        _run(model, memory, sources, prompt, p)
    return [s.done[: p.n] for s in sources]


def _run(model: Seq2Seq, memory: Memory, sources: list[_Greedy], prompt: list[int], p: BeamParams) -> None:
    device, suppress = memory.hidden.device, torch.tensor(list(p.suppress), dtype=torch.int64)
    cache = model.start(memory, 1, len(prompt) + p.max_new_tokens - 1)
    ids = torch.tensor([prompt] * memory.count, device=device)
    for length in range(1, p.max_new_tokens + 1):
        live = [s for s in sources if s.running]
        if not live:
            break
        logits = model.step(ids, cache).float()
        if len(suppress):
            logits[:, suppress.to(device)] = -torch.inf
        best = [t.tolist() for t in ops.top_logprobs(logits, 2 * p.beams if p.beams > 1 else 1)]
        rows: list[int] = []
        first = 0
        for source in live:
            width = len(source.running)
            parents = source.advance(_candidates(source, best, first, 2 * p.beams), length)
            if not parents:
                source.running = []
            rows += [first + parent for parent in parents]
            first += width
        counts = [len(s.running) for s in sources]
        if sum(counts):
            changed = torch.tensor(counts, dtype=torch.int32, device=device)
            same = torch.equal(changed, cache.counts)
            cache.reorder(torch.tensor(rows, device=device), None if same else changed)
            ids = torch.tensor([[tokens[-1]] for s in sources for _, tokens in s.running], device=device)


def _candidates(source: _Greedy, best: list, first: int, most: int) -> list[Candidate]:
    """The likeliest continuations of a source, whose beams are the rows from `first` on."""
    tokens, logprobs = best
    found = [
        (score + logprob, beam, token)
        for beam, (score, _) in enumerate(source.running)
        for token, logprob in zip(tokens[first + beam], logprobs[first + beam], strict=True)
        if token >= 0  # -1: fewer tokens than were asked for
    ]
    return sorted(found, key=lambda c: -c[0])[:most]
