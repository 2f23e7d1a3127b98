"""What all language models here are compared by: the nats of held-out documents, and how far back a gradient reaches."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ... import ops
from ...data.batch import Batch, Example, collate, pack
from ...ops import LossSpec
from .ngram import KneserNey

NONE = LossSpec(reduction="none")


def token_nats(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of every target [T], unweighted, 0 where there is none: of a `Decoder` or any neural baseline."""
    hidden = model.norm(model.packed_hidden(batch.packed))
    return ops.linear_cross_entropy(hidden, model.head.weight, batch.target, model.head.bias, spec=NONE)


def windows(document: Sequence[int], longest: int) -> list[Example]:
    """A document in sequences of at most `longest` (an even number of) tokens that overlap by half: every token after the first
    is predicted once, with at least longest / 2 tokens before it where there are so many."""
    if longest < 2 or longest % 2:
        raise ValueError(f"longest is {longest}; allowed: an even number from 2 on")
    whole, half = Example.next_tokens(document), longest // 2
    made = [whole.part(0, longest)]
    for begin in range(half, len(whole) - half, half):
        part = whole.part(begin, begin + longest)
        weight = part.weight.copy()
        weight[:half] = 0
        made.append(Example(part.ids, part.target, weight, part.ends))
    return made


@torch.no_grad()
def held_out_nats(
    model: KneserNey | nn.Module, documents: Iterable[Sequence[int]], longest: int = 256, tokens: int = 8192
) -> float:
    """The sum of -log p over every token after the first of every document; divided by ln 2 and the bytes of the texts these are
    bits per byte, which models of any tokenizer can be compared by.

    longest: what a neural model sees at once, see `windows`; n-grams see all that they can. tokens: of a batch.
    """
    if isinstance(model, KneserNey):
        return -sum(float(model.log_probabilities(d).sum()) for d in documents)
    device = next(model.parameters()).device
    examples = [e for d in documents for e in windows(d, longest)]
    training, total = model.training, 0.0
    model.eval()
    try:
        for rows in pack([len(e) for e in examples], max(tokens, longest)):
            batch = collate([examples[i] for i in rows]).to(device)
            total += float((token_nats(model, batch).double() * batch.weight).sum())
    finally:
        model.train(training)
    return total


def gradient_by_distance(model: nn.Module, sequences: Sequence[Sequence[int]]) -> Tensor:
    """How much the vector of a token k back moves the loss of the last prediction, float64 [S], k ascending from 0:

        mean over sequences of || d loss(S) / d e(S - k) ||

    where e(S) is the vector that the model reads last. sequences: B of S + 1 token ids each, the last of which is predicted.
    ValueError: none, or of different lengths.
    """
    if not len(sequences) or len({len(s) for s in sequences}) != 1 or len(sequences[0]) < 2:
        raise ValueError(f"{len(sequences)} sequences; allowed: one or more, all of one length of 2 tokens or more")
    batch = collate([Example.next_tokens(s) for s in sequences]).to(next(model.parameters()).device)
    vectors: list[Tensor] = []
    hook = model.embedding.register_forward_hook(lambda module, inputs, output: vectors.append(output))
    try:
        last = token_nats(model, batch)[batch.packed.cu[1:].long() - 1]
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(last.sum(), vectors[0])  # no sequence moves the loss of another
    norms = gradient.double().norm(dim=1).view(len(sequences), -1)
    return norms.mean(0).flip(0)
