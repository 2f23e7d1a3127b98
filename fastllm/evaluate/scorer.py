"""Log-probabilities by a module, as `LLM.logprobs` gives them: for validation while it is being trained."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import nn

from ..data.packed import Packed, in_parts
from ..data.tokenizer import Tokenizer
from ..decode.score import target_logprobs
from ..llm import LLM
from ..models.decoder import Decoder
from ..models.text import check_ids, check_vocab

ROWS = 4096  # tokens that go through the model at once


class Scorer:
    """A decoder whose weights may be parameters, on any device, with its tokenizer.

    Texts lie one after another, at most `rows` tokens at once. On a CPU a text has the same bits whatever stands beside it, and
    those that `LLM` would give for the same weights in float32. Nothing is kept between calls: weights may change.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, rows: int = ROWS):
        if not isinstance(model, Decoder):
            raise TypeError(f"Scorer: the model is {type(model).__name__}; it must be a Decoder")
        if rows < 1:
            raise ValueError(f"Scorer: rows={rows}; allowed: 1 or more")
        check_vocab(tokenizer, model.config.vocab, "Scorer")
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.max_model_len = model.config.max_position

    def logprobs(
        self, prompts: Sequence[Sequence[int]], *, adapter: str | None = None, starts: int | Sequence[int] = 1
    ) -> list[list[float]]:
        """For each list of ids, log p of the tokens from its start on (one number for all, or one each) given those before.
        ValueError: an adapter, which a module has in itself; a text that is too long or has an id that the
        model has not, or a start out of it."""
        if adapter is not None:
            raise ValueError(f"Scorer: adapter={adapter!r}; a module has its adapter in itself, allowed: None")
        each = [starts] * len(prompts) if isinstance(starts, int) else list(starts)
        for ids, start in zip(prompts, each, strict=True):
            if not 1 <= start <= len(ids) <= self.max_model_len:
                raise ValueError(
                    f"Scorer: a text of {len(ids)} tokens, scored from {start} on; allowed: 1 to {self.max_model_len} tokens, "
                    "a start of 1 or more within them"
                )
            check_ids(ids, self.tokenizer, self.model.config.vocab, "Scorer: ")
        asked: dict[tuple[int, ...], list[int]] = {}  # texts that differ in their last token alone are read once
        for index, ids in enumerate(prompts):
            asked.setdefault(tuple(ids[:-1]), []).append(index)
        found: list[list[float]] = [[] for _ in prompts]
        with _evaluating(self.model):
            for part in in_parts(filter(None, asked), self.rows):
                indices, rows, targets, begin = list[int](), list[int](), list[int](), 0
                for ids in part:
                    for index in asked[ids]:
                        indices.append(index)
                        rows += range(begin + each[index] - 1, begin + len(ids))
                        targets += prompts[index][each[index] :]
                    begin += len(ids)
                values = iter(self._score(part, rows, targets))
                for index in indices:
                    found[index] = list(islice(values, len(prompts[index]) - each[index]))
        return found

    def _score(self, texts: Sequence[Sequence[int]], rows: list[int], targets: list[int]) -> list[float]:
        """log p(targets) after these rows of the texts, laid one after another."""
        batch = Packed.of_lists(texts, self.model.norm.weight.device)
        wanted, said = (torch.tensor(values, dtype=torch.int64, device=batch.ids.device) for values in (rows, targets))
        values = target_logprobs(self.model.logits, self.model.packed_hidden(batch)[wanted], said).tolist()
        if any(map(math.isnan, values)):  # on a GPU nothing else says so
            raise ValueError(
                "the model's logits are no distribution (NaN, or nothing above -inf); no text can be scored"
            )
        return values


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout, as it was afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


Scores = LLM | Scorer  # what can be evaluated
