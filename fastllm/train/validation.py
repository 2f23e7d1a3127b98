"""What a model says on batches that were set aside, and what one says that knows no more than how often each token comes.

held = list(Batches(Documents(path, split="validation"), encode, tokens=4096))      # masks drawn once, by the seed
fit(model, batches, masked_loss, out, options, validate=lambda m: held_out(m, held, masked_loss)["loss"])
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .objective import (
    SUM,
    Predictions,
    masked_loss,
    masked_tokens,
    next_token_loss,
    next_tokens,
    pair_loss,
    pair_tokens,
)

LOGITS = 1 << 23  # in memory at a time
PREDICTIONS: dict[Callable[..., Tensor], Callable[..., Predictions]] = {
    next_token_loss: next_tokens,
    masked_loss: masked_tokens,
    pair_loss: pair_tokens,
}


@torch.no_grad()
def held_out(model: nn.Module, batches: Sequence[Any], loss: Callable[..., Tensor]) -> dict[str, float]:
    """loss: nats a prediction; accuracy: how often the most likely token is the right one. Both weighted as in training, in eval
    mode; loss is one of those in objective.py. ValueError: another one, or batches without a prediction."""
    if loss not in PREDICTIONS:
        raise ValueError(f"held_out: loss is {loss!r}; allowed: {', '.join(f.__name__ for f in PREDICTIONS)}")
    device, was_training = next(model.parameters()).device, model.training
    nats, right, total = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
    model.eval()
    try:
        for batch in batches:
            p = PREDICTIONS[loss](model, batch.to(device))
            rows = max(1, LOGITS // p.head.weight.shape[0])
            for hidden, target, weight in zip(
                p.hidden.split(rows), p.target.split(rows), p.weight.split(rows), strict=True
            ):
                logits = p.head(hidden)
                nats += ops.cross_entropy(logits, target, weight, SUM)
                right += ((logits.argmax(1) == target) * weight).sum()
                total += weight.sum()
    finally:
        model.train(was_training)
    return _figures(nats, right, total)


def unigram(batches: Sequence[Any]) -> dict[str, float]:
    """The same of the best that can be said without a context: every token with the share that it has among these very
    targets (their entropy), and always the most frequent one. No other unigram does better on them."""
    said = [getattr(batch, "said", batch) for batch in batches]
    counted = [b.weight != 0 for b in said]
    target = torch.cat([b.target[c] for b, c in zip(said, counted, strict=True)] or [torch.zeros(0).long()])
    weight = torch.cat([b.weight[c] for b, c in zip(said, counted, strict=True)] or [torch.zeros(0)])
    mass = torch.bincount(target, weight.double(), minlength=1)
    total = mass.sum()
    return _figures(-(torch.special.xlogy(mass, mass / total)).sum(), mass.max(), total)


def _figures(nats: Tensor, right: Tensor, total: Tensor) -> dict[str, float]:
    if not total > 0:
        raise ValueError(f"the predictions of these batches weigh {float(total)}; give batches with a prediction")
    return {"loss": float(nats / total), "accuracy": float(right / total)}
