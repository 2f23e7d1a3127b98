"""word2vec: skip-gram with negative sampling (Mikolov et al. 2013, arXiv 1301.3781 and 1310.4546).

For each token c and each token o within its window, with K tokens n drawn as noise,

    loss = -log sigmoid(u(o) v(c)) - sum_n log sigmoid(-u(n) v(c))

noise ~ count^(3/4); the window of a token is drawn from 1 to `window`, so that near tokens count more; a token of frequency f
stays in the text with probability min(1, sqrt(s / f) + s / f), as in the authors' program, and a pair needs both.
No language model: it says which tokens stand near each other, not what comes next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize

from ...data.batch import Batch


@dataclass(frozen=True)
class SkipGramConfig:
    """vocab V; dim: of a vector; window: tokens to each side; negatives K; sample: s above, the frequency from which on tokens
    are left out at times."""

    vocab: int
    dim: int
    window: int = 5
    negatives: int = 5
    sample: float = 1e-3

    def __post_init__(self) -> None:
        if min(self.vocab, self.dim, self.window, self.negatives) < 1 or not self.sample > 0:
            raise ValueError(f"SkipGramConfig: every size must be at least 1 and sample above 0, got {self}")


class SkipGram(nn.Module):
    """embedding.weight [V, dim]: the vectors. counts [V]: how often each token occurs in the text that it is trained on."""

    def __init__(self, config: SkipGramConfig, counts: Tensor):
        super().__init__()
        self.config = c = config
        if counts.shape != (c.vocab,) or not (counts >= 0).all() or not counts.sum() > 0:
            raise ValueError(
                f"SkipGram: counts have shape {tuple(counts.shape)}; allowed: [{c.vocab}], none negative, not all 0"
            )
        self.embedding, self.context = nn.Embedding(c.vocab, c.dim), nn.Embedding(c.vocab, c.dim)
        nn.init.uniform_(self.embedding.weight, -0.5 / c.dim, 0.5 / c.dim)
        nn.init.zeros_(self.context.weight)
        share = c.sample / (counts.double() / counts.sum()).clamp(min=1e-12)
        self.register_buffer("noise", counts.double() ** 0.75)
        self.register_buffer("stays", (share.sqrt() + share).clamp(max=1.0).float())

    def neighbours(self, token: int, count: int = 10) -> list[tuple[int, float]]:
        """The nearest other tokens and the cosines of their vectors, the nearest first."""
        return self._nearest(self._unit()[token], {token}, count)

    def analogy(self, a: int, b: int, c: int, count: int = 1) -> list[tuple[int, float]]:
        """What is to c as b is to a: the tokens, but those three, nearest to v(b) - v(a) + v(c), each of length 1."""
        v = self._unit()
        return self._nearest(v[b] - v[a] + v[c], {a, b, c}, count)

    @torch.no_grad()
    def _unit(self) -> Tensor:
        return normalize(self.embedding.weight, dim=1)

    def _nearest(self, vector: Tensor, without: set[int], count: int) -> list[tuple[int, float]]:
        cosine = self._unit() @ normalize(vector, dim=0)
        cosine[list(without)] = -torch.inf
        best = cosine.topk(min(count, len(cosine) - len(without)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def skip_gram_loss(model: SkipGram, batch: Batch) -> Tensor:
    """The sum over pairs of loss * weight of the centre, as `fastllm.train.loop.fit` takes it; draws from torch's generator."""
    c, ids, position = model.config, batch.packed.ids, batch.packed.position
    length = len(ids)
    reach = torch.randint(1, c.window + 1, (length,), device=ids.device)
    kept = torch.rand(length, device=ids.device) < model.stays[ids]
    centres, others = [], []
    for distance in range(1, min(c.window, length - 1) + 1):
        # position[right] >= distance says that both are of one sequence
        both = (position[distance:] >= distance) & kept[distance:] & kept[:-distance]
        for centre, other in ((0, distance), (distance, 0)):
            left = (both & (reach[centre : length - distance + centre] >= distance)).nonzero()[:, 0]
            centres.append(left + centre)
            others.append(left + other)
    centre, other = torch.cat(centres or [ids[:0]]), torch.cat(others or [ids[:0]])
    noise = torch.multinomial(model.noise, max(1, len(centre)) * c.negatives, replacement=True)[
        : len(centre) * c.negatives
    ]
    v = model.embedding(ids[centre])  # [P, dim]
    u = model.context(ids[other])
    n = model.context(noise.view(len(centre), c.negatives))  # [P, K, dim]
    near = logsigmoid((u * v).sum(1))
    far = logsigmoid(-(n @ v[:, :, None])[:, :, 0]).sum(1)
    return -((near + far) * batch.weight[centre]).sum()


def analogies(model: SkipGram, questions: Sequence[tuple[int, int, int, int]]) -> float:
    """The share of questions (a, b, c, d) in which d is the nearest answer. ValueError: no question."""
    if not questions:
        raise ValueError("there is no question; give some whose words are all in the vocabulary")
    return sum(model.analogy(a, b, c)[0][0] == d for a, b, c, d in questions) / len(questions)
