"""What a step will take, before there is one: operations, memory, time.

A batch is run forward and backward without an update; gradients and torch's generators are as they were afterwards.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.pairs import PairBatch
from ..models.blocks import Projection
from ..models.decoder import Decoder
from ..models.encoder import Encoder
from ..models.seq2seq import Seq2Seq

SHARE = 0.9  # of the free memory that a run may plan with
TRAINED = 16  # bytes of a parameter with gradient, moments and, where it has 16 bits, its float32 master
WORK = 1.15  # what kernels and the allocator take beside the tensors that are counted


# ---------------------------------------------------------------------------------------------------------- operations


class Operations:
    """operations(batch): floating-point operations of forward and backward, none of them done twice: 6 for each token and weight
    of a matrix that it passes, 12 H D for each pair of a query and a key that it sees, in each layer (Chowdhery et al. 2022,
    arXiv 2204.02311, appendix B, with the pairs counted). NaN for a model of another class.
    """

    def __init__(self, model: nn.Module):
        self.config, self.kind = getattr(model, "config", None), type(model)
        self._all, self._head, self._sources = _weights(model), 0, 0
        if isinstance(model, Encoder) and model.head is not None:
            self._head = _weights(model.head)
        if isinstance(model, Seq2Seq):
            keys = sum(layer.cross_kv.weight.numel() for layer in model.decoder.layers)  # made of the source
            self._sources = _weights(model.encoder) + keys

    def __call__(self, batch: Any) -> float:
        c = self.config
        if self.kind is Decoder:
            lengths = batch.packed.cu.diff().double()
            pairs = sum(float(_pairs(lengths, c.window_of(layer)).sum()) for layer in range(c.layers))
            return 6.0 * self._all * len(batch.packed.ids) + 12.0 * c.heads * c.head_dim * pairs
        if self.kind is Encoder:
            lengths, said = batch.packed.cu.diff().double(), float((batch.weight > 0).sum())
            passed = (self._all - self._head) * len(batch.packed.ids) + self._head * said
            return 6.0 * passed + 12.0 * c.dim * c.layers * float(lengths.square().sum())
        if self.kind is Seq2Seq:
            sources, targets = batch.source.cu.diff().double(), batch.said.packed.cu.diff().double()
            passed = self._sources * len(batch.source.ids) + (self._all - self._sources) * len(batch.said.target)
            pairs = sources.square() * c.encoder_layers + (_pairs(targets, None) + targets * sources) * c.decoder_layers
            return 6.0 * passed + 12.0 * c.heads * c.head_dim * float(pairs.sum())
        return math.nan


def tokens_of(batch: Any) -> int:
    """That go through the model, trained on or not: as the size of a batch counts them."""
    return batch.weight.numel() + (len(batch.source.ids) if isinstance(batch, PairBatch) else 0)


def _weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, Projection))


def _pairs(lengths: Tensor, window: int | None) -> Tensor:
    """Of a causal layer: each query sees itself and what came before, within the window."""
    seen = lengths if window is None else lengths.clamp(max=window)
    return seen * (seen + 1) / 2 + (lengths - seen) * seen


# -------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Footprint:
    """Bytes. state: parameters, gradients, moments and masters. token: what backward needs of each token of a batch."""

    state: int
    token: float

    def of(self, tokens: int) -> float:
        """A step's, with batches of so many tokens."""
        return WORK * (self.state + tokens * self.token)

    def fitting(self, available: float) -> int:
        """The most tokens of a batch that fit; 0 where not even the state does."""
        return max(0, int((SHARE * available / WORK - self.state) / self.token))

    def refuse(self, tokens: int, accumulate: int, available: float) -> str | None:
        """What to say where a batch of `tokens` does not fit, None where it does."""
        if self.of(tokens) <= SHARE * available:
            return None
        needs = f"a step takes some {self.of(tokens) / 1e9:.1f} GB ({self.state / 1e9:.1f} GB of them weights, gradients and "
        needs += f"AdamW's moments), {available / 1e9:.1f} GB are free; "
        most = self.fitting(available)
        if most < 64:
            return needs + "no batch fits beside the weights: take a smaller model, or a machine with more memory"
        parts = -(-tokens // most)
        return needs + f"tokens={tokens // parts} with accumulate={accumulate * parts} takes the same step and fits"


def refuse_state(model: nn.Module, free: float, processes: int) -> str | None:
    """What to say where no batch would fit beside weights, gradients and moments; the model may lie on the meta device."""
    parameters = sum(p.numel() for p in model.parameters())
    state = TRAINED * parameters / processes
    if state <= SHARE * free:
        return None
    kept = f"weights, gradients and AdamW's moments of {parameters:,} parameters"
    return f"{kept} take {state / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def footprint(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> Footprint:
    """Measured on a batch, which may be a small one."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with _Apart(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        value = loss(model, batch.to(device_of(model)))
        del value
    state = sum(TRAINED * p.numel() if p.requires_grad else p.nbytes for p in model.parameters())
    return Footprint(state, sum(kept.values()) / tokens_of(batch))


# ---------------------------------------------------------------------------------------------------------------- time


def seconds_of(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> float:
    """Forward and backward of a batch, the faster of two."""
    device, times = device_of(model), []
    with _Apart(model):
        for _ in range(2):
            begin = time.perf_counter()
            loss(model, batch.to(device)).backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin)
    return min(times)


class _Apart:
    """Nothing of what is done within stays: gradients, the state of generators."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> None:
        self._gradients = [p.grad for p in self.model.parameters()]
        for p in self.model.parameters():
            p.grad = None
        self._forked = torch.random.fork_rng()
        self._forked.__enter__()

    def __exit__(self, *error) -> None:
        self._forked.__exit__(*error)
        for p, gradient in zip(self.model.parameters(), self._gradients, strict=True):
            p.grad = gradient


def device_of(model: nn.Module) -> torch.device:
    """Where its parameters are."""
    return next(model.parameters()).device
