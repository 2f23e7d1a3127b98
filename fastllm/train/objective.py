"""What a model is trained to do: losses of a batch, summed over its predictions, as `fit` takes them."""

from torch import Tensor

from .. import ops
from ..data.batch import Batch
from ..models.decoder import Decoder
from ..ops import LossSpec

SUM = LossSpec(reduction="sum")


def next_token_loss(model: Decoder, batch: Batch) -> Tensor:
    """sum_t weight_t * -log p(target_t), in nats; the logits [T, V] are never in memory."""
    hidden = model.norm(model.packed_hidden(batch.packed))
    return ops.linear_cross_entropy(hidden, model.head.weight, batch.target, model.head.bias, batch.weight, SUM)
