"""Log-probabilities of given tokens, out of hidden states: what texts are scored with, by the engine and by a bare
model; and their mean."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from ..models.decoder import Decoder

ROWS = 64  # of logits at once: 64 x 49,152 floats are 12.6 MB


def target_logprobs(logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """log p(targets[t]) under logits(hidden)[t], hidden [T, dim]: float32 [T], the bits that decoding would report, whatever T
    is; never more than a few rows of logits are in memory."""
    rows = zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
    found = [ops.target_logprobs(logits(part).float(), target) for part, target in rows if len(target)]
    return torch.cat(found) if found else torch.empty(0, device=hidden.device)


class Scores:
    """Takes the hidden states of one beginning, as they come, and scores the texts that are it and one token more.

    ids: the beginning; start: the first token that is scored; lasts: the tokens that may follow, each of a text.
    """

    def __init__(self, model: Decoder, ids: Sequence[int], start: int):
        self.model, self.ids, self.skip = model, list(ids), start - 1
        self.lasts: dict[int, int] = {}  # token: its place in what is found for the end
        device = next(model.parameters()).device
        self._targets = torch.tensor(self.ids[start:], dtype=torch.int64, device=device)
        self._found, self._done = list[Tensor](), 0
        self._ends = torch.empty(0)

    def add(self, hidden: Tensor) -> None:
        """Those from token `skip` on, each once, in order."""
        inner = self._targets[self._done : self._done + len(hidden)]
        self._found.append(target_logprobs(self.model.logits, hidden[: len(inner)], inner))
        self._done += len(inner)
        if len(inner) < len(hidden):
            logits = self.model.logits(hidden[-1:]).float().expand(len(self.lasts), -1)
            self._ends = ops.target_logprobs(logits, torch.tensor(list(self.lasts), device=logits.device))

    def of(self, last: int) -> Tensor:
        """Of the text that ends with this token: float32 [its tokens from start on]."""
        place = self.lasts[last]
        return torch.cat([*self._found, self._ends[place : place + 1]]).cpu()


class Mean:
    """Takes the hidden states of a text as they come, and keeps their mean, normed: float32 [dim] of length 1."""

    def __init__(self, model: Decoder, ids: Sequence[int]):
        self.model, self.ids, self.found = model, ids, torch.empty(0)
        self._pieces: list[Tensor] = []

    def add(self, hidden: Tensor) -> None:
        self._pieces.append(hidden)
        if sum(map(len, self._pieces)) == len(self.ids):  # at once: a sum of sums would depend on the pieces
            mean = self.model.norm(torch.cat(self._pieces)).float().mean(0)
            self.found, self._pieces = torch.nn.functional.normalize(mean, dim=0), []
