"""Models from the history of the field, thin over torch.nn, to see what each step bought.

    KneserNey(documents, vocab, order)      counts of n-grams, no neurons (1998)
    FeedForward(config)                     the last few tokens, side by side (2003)
    Recurrent(config)                       Elman network, LSTM, GRU; with attention over its own past (2010 to 2016)
    SkipGram(config, counts)                vectors of words, no language model (2013)

The neural language models have the parts of a `Decoder` that training reads: packed_hidden(batch.packed) -> [T, dim], norm and
head, so the loss and the loop of the Transformer train them as they are. No sequence of a batch sees another one. As in our
decoders the head is the embedding (Press & Wolf 2017, arXiv 1608.05859), so that an architecture is all that differs.

`harness` holds what all are compared by: held-out nats, and how far back a gradient reaches.
"""

from .feed_forward import FeedForward, FeedForwardConfig
from .harness import gradient_by_distance, held_out_nats, windows
from .ngram import KneserNey
from .recurrent import Recurrent, RecurrentConfig
from .word2vec import SkipGram, SkipGramConfig, analogies, skip_gram_loss

__all__ = [
    "FeedForward",
    "FeedForwardConfig",
    "KneserNey",
    "Recurrent",
    "RecurrentConfig",
    "SkipGram",
    "SkipGramConfig",
    "analogies",
    "gradient_by_distance",
    "held_out_nats",
    "skip_gram_loss",
    "windows",
]
