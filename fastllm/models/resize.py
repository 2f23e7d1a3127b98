"""A vocabulary that grew: the tables of a model get the rows that its new tokens need."""

import dataclasses

import torch
from torch import Tensor, nn

from .blocks import Projection
from .decoder import Decoder
from .encoder import Encoder, MaskedHead
from .seq2seq import Seq2Seq


@torch.no_grad()
def resize_vocab(model: Decoder | Encoder | Seq2Seq, vocab: int) -> None:
    """Gives the embedding and the head of a model rows for `vocab` tokens, in place; what is tied stays tied.

    A new row is the mean of the old ones, so a new token starts with a logit below the logsumexp of the old by at least
    log(V), and hardly changes what the model says (J. Hewitt, "Initializing New Word Embeddings for Pretrained Language
    Models", 2021). Make the optimizer afterwards: the Parameters are new ones. ValueError: fewer rows than there are.
    TypeError: weights that are packed for decoding, a model of another class.
    """
    if not isinstance(model, Decoder | Encoder | Seq2Seq):
        raise TypeError(f"resize_vocab: {type(model).__name__} is none of Decoder, Encoder, Seq2Seq")
    old = model.config.vocab
    if vocab < old:
        raise ValueError(f"resize_vocab: vocab={vocab}, the model has {old} rows; tokens are added, not taken away")
    head = model.head.words if isinstance(model.head, MaskedHead) else model.head
    if isinstance(model, Encoder) and not isinstance(model.head, MaskedHead):
        head = None  # its head, where it has one, knows labels, not words
    weight = model.embedding.weight
    if not isinstance(weight, Tensor) or (head is not None and not isinstance(head.weight, Tensor)):
        raise TypeError("resize_vocab: the weights are packed for decoding; load the model by fastllm.models.load")
    tied = head is not None and head.weight is weight
    model.embedding.weight = _grown(weight, vocab)
    if head is not None:
        head.weight = model.embedding.weight if tied else _grown(head.weight, vocab)
        _grow_bias(head, vocab)
    model.config = dataclasses.replace(model.config, vocab=vocab)


def _grown(table: Tensor, rows: int) -> nn.Parameter:
    mean = table.float().mean(0).to(table.dtype)
    grown = torch.cat((table, mean.expand(rows - table.shape[0], *table.shape[1:])))
    return nn.Parameter(grown, requires_grad=table.requires_grad)


def _grow_bias(head: Projection, rows: int) -> None:
    if head.bias is not None:
        head.bias = _grown(head.bias, rows)
