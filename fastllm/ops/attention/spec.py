"""AttentionSpec: which keys a query sees and how scores are shaped; one record for every kind of attention."""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .._dropout import Dropout
from .._op import check, check_dtype


class Settings(NamedTuple):
    """The part of a spec that is plain numbers, as the raw ops take it: 0 stands for no window, no cap, no dropout."""

    causal: bool
    window: int
    scale: float
    softcap: float
    p: float
    seed: int
    call: int
    exact: bool


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """A query stands at position i, a key at j (fewer queries than keys: the queries are the last positions); its score is

        scale * q . k, capped, + bias or - slope * |i - j|, or -inf where the query may not see the key.

    causal: sees j <= i.
    window: sees |i - j| < window, so a causal query the last `window` keys (Mistral), any other window - 1 on both sides.
    scale: None means 1 / sqrt(D).
    softcap: scores become softcap * tanh(score / softcap) (Gemma 2).
    bias: added to scores: [B, H, Sq, Sk], any of the four may be 1 (T5). Learned: it gets a gradient.
    alibi: a slope for each head, [H] float32 (Press et al. 2022); no gradient. A spec has a bias or slopes, not both.
    sinks: a logit for each head, [H], that takes part in the softmax and carries no value (GPT-OSS). Learned.
    dropout: drops weights after the softmax and scales up the rest, by counter: row (b * H + h) * Sq + query, column key.
    exact: on a GPU, the arithmetic contract: the bits of a row depend neither on the batch nor on how a text was cut into
        chunks. A CPU always keeps it.

    Specs are equal when their numbers are equal and their tensors are the same objects.
    """

    causal: bool = True
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    bias: Tensor | None = None
    alibi: Tensor | None = None
    sinks: Tensor | None = None
    dropout: Dropout | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and not (isinstance(self.window, int) and self.window >= 1):
            raise ValueError(f"AttentionSpec: window is {self.window}, allowed: an int >= 1, or None for no window")
        if self.scale is not None and not -math.inf < self.scale < math.inf:
            raise ValueError(f"AttentionSpec: scale is {self.scale}, allowed: a finite number, or None for 1/sqrt(D)")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(
                f"AttentionSpec: softcap is {self.softcap}, allowed: a positive number, or None for no cap"
            )
        if self.bias is not None and self.alibi is not None:
            raise ValueError("AttentionSpec: both bias and alibi; add the slopes' part to the bias")
        if self.dropout is not None and not isinstance(self.dropout, Dropout):
            raise ValueError(f"AttentionSpec: dropout is {self.dropout}, allowed: Dropout(p, seed, call), or None")

    def _identity(self) -> tuple:
        values = (getattr(self, f.name) for f in fields(self))
        return tuple(id(v) if isinstance(v, Tensor) else v for v in values)

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, AttentionSpec) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity())

    def settings(self, dim: int) -> Settings:
        """The numbers for heads of `dim` elements."""
        scale = dim**-0.5 if self.scale is None else float(self.scale)
        dropout = self.dropout.arguments() if self.dropout else (0.0, 0, 0)
        return Settings(self.causal, self.window or 0, scale, float(self.softcap or 0.0), *dropout, self.exact)

    def check_tensors(self, op: str, q: Tensor, heads: int) -> None:
        """Slopes and sinks fit q and its heads."""
        for name, tensor in (("alibi", self.alibi), ("sinks", self.sinks)):
            if tensor is None:
                continue
            check_dtype(op, name, tensor, (torch.float32,) if name == "alibi" else (torch.float32, q.dtype))
            check(tensor.shape == (heads,), lambda n=name, t=tensor: f"{op}: {n} {tuple(t.shape)} must be [{heads}]")
            check_device(op, name, tensor, q)
        learned = self.alibi is not None and self.alibi.requires_grad
        check(not learned, lambda: f"{op}: alibi gets no gradient; learn a bias, or .detach() the slopes")

    def check_bias(self, op: str, q: Tensor, batch: int, heads: int, queries: int | None, keys: int | None) -> None:
        """The bias is [B, H, Sq, Sk] or broadcasts to it; None: Sq and Sk are not known here."""
        bias = self.bias
        if bias is None:
            return
        check_dtype(op, "bias", bias, (torch.float32, q.dtype))
        full = (batch, heads, queries, keys)
        fits = bias.dim() == 4 and all(w is None or n in (1, w) for n, w in zip(bias.shape, full, strict=True))
        check(
            fits,
            lambda: (
                f"{op}: bias {tuple(bias.shape)} must be [{batch}, {heads}, {'Sq' if queries is None else queries}, "
                f"{'Sk' if keys is None else keys}], where each may be 1"
            ),
        )
        check_device(op, "bias", bias, q)


def check_device(op: str, name: str, tensor: Tensor, q: Tensor) -> None:
    check(
        tensor.device == q.device,
        lambda: f"{op}: {name} is on {tensor.device}, q on {q.device}; move one with .to(device)",
    )


CAUSAL = AttentionSpec()


def extents(q: Tensor, k: Tensor, cu_q: Tensor | None = None) -> tuple[int, ...]:
    """batch, queries, keys, heads, kv_heads, dim, as a record has them: of a packed call the sequences, and the rows of all."""
    batch = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    return batch, q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]


def beyond_plain(
    q: Tensor,
    k: Tensor,
    cu_q: Tensor | None,
    bias: Tensor | None,
    alibi: Tensor | None,
    sinks: Tensor | None,
    s: Settings,
) -> str | None:
    """What of a call a kernel of dense 16-bit attention lacks, whoever wrote it; None where there is nothing of it."""
    features = {"bias": bias is not None, "alibi": alibi is not None, "sinks": sinks is not None}
    features |= {"softcap": s.softcap > 0, "dropout": s.p > 0, "exact": s.exact}
    if q.dtype == torch.float32:
        return "float32"
    if 0 in q.shape or 0 in k.shape:
        return "nothing to do"
    if cu_q is not None:
        return "packed sequences"
    return ", ".join(name for name, used in features.items() if used) or None
