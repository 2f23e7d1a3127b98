"""What a model is trained to do: losses of a batch, summed over its predictions, as `fit` takes them.

Each is the sum over predictions t of weight_t * -log p(target_t), in nats, where p comes out of the head's matrix. What that
matrix reads is made first (`next_tokens`, `masked_tokens`, `pair_tokens`), for the places alone where something is predicted
to count; then loss and gradients come block by block, and the logits [T, V] are never in memory.
"""

from dataclasses import dataclass

from torch import Tensor

from .. import ops
from ..data.batch import Batch
from ..data.pairs import PairBatch
from ..models.blocks import Projection
from ..models.decoder import Decoder
from ..models.encoder import Encoder, MaskedHead
from ..models.seq2seq import Seq2Seq
from ..ops import LossSpec

SUM = LossSpec(reduction="sum")


@dataclass(frozen=True)
class Predictions:
    """hidden [N, dim] that `head` reads, [V, dim] and perhaps a bias; target int64 [N]; weight float32 [N]; exact: as the op
    takes it."""

    hidden: Tensor
    head: Projection
    target: Tensor
    weight: Tensor
    exact: bool = False

    def loss(self) -> Tensor:
        """sum_t weight_t * -log p(target_t)"""
        head = self.head
        return ops.linear_cross_entropy(self.hidden, head.weight, self.target, head.bias, self.weight, SUM, self.exact)


def next_tokens(model: Decoder, batch: Batch) -> Predictions:
    """Each token says the next one."""
    hidden = model.norm(model.packed_hidden(batch.packed))
    exact = getattr(model, "exact", False)  # which a Decoder has, beside the parts that every model has here
    return Predictions(hidden, model.head, batch.target, batch.weight, exact)


def masked_tokens(model: Encoder, batch: Batch) -> Predictions:
    """The chosen places say what stood there; no other one goes through the head. ValueError: a model without its head."""
    if not isinstance(model.head, MaskedHead):
        raise ValueError(f"the model's head is {model.config.head!r}; masked tokens need EncoderConfig(head='mlm')")
    chosen = (batch.weight != 0).nonzero()[:, 0]
    hidden = model.packed_hidden(model.placed(batch.packed)).index_select(0, chosen)
    return Predictions(model.head.transform(hidden), model.head.words, batch.target[chosen], batch.weight[chosen])


def pair_tokens(model: Seq2Seq, batch: PairBatch) -> Predictions:
    """Each token of a target says the next one, from its source."""
    hidden = model.decode_packed(batch.said.packed, model.encode_packed(batch.source))
    return Predictions(model.scaled(hidden), model.head, batch.said.target, batch.said.weight)


def next_token_loss(model: Decoder, batch: Batch) -> Tensor:
    """Of a decoder."""
    return next_tokens(model, batch).loss()


def masked_loss(model: Encoder, batch: Batch) -> Tensor:
    """Of an encoder (Devlin et al. 2018, arXiv 1810.04805)."""
    return masked_tokens(model, batch).loss()


def pair_loss(model: Seq2Seq, batch: PairBatch) -> Tensor:
    """Of an encoder-decoder: corrupted spans (Raffel et al. 2019, arXiv 1910.10683), or any sources and targets."""
    return pair_tokens(model, batch).loss()
