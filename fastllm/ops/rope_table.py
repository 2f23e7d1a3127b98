"""rope_table: the cosines and sines that `rope` and `kv_append` turn by, and the ways to stretch a context by them.

Position p turns pair i of R/2 by the angle p w_i, w_i = theta^(-2i/R). A scaling changes the w_i, and YaRN and LongRoPE
also multiply every cosine and sine by an attention factor (attention logits by its square). With f the factor, L the
context that the model was pre-trained with, and r_i = L w_i / 2 pi the turns that pair i makes in it:

- linear: w_i / f (position interpolation, Chen et al. 2023, arXiv 2306.15595);
- llama3: w_i where r_i > high, w_i / f where r_i < low, between them ((1 - t) / f + t) w_i, t = (r_i - low) /
  (high - low) (Llama 3.1, Grattafiori et al. 2024, arXiv 2407.21783);
- yarn: the same blend, t falling linearly in i between the pairs that make beta_fast and beta_slow turns in L; attention
  factor 0.1 ln f + 1 (Peng et al. 2023, arXiv 2309.00071), with DeepSeek's mscale m(f) / m_all(f);
- dynamic: theta (f n / L - f + 1)^(R / (R - 2)) in place of theta, for a length of n > L (NTK-aware scaling, bloc97 and
  emozilla 2023; "dynamic" there means per call: here n is the length of the table);
- longrope: w_i / e_i, with one list of e for tables up to L and one for longer ones; attention factor
  sqrt(1 + ln f / ln L) (Ding et al. 2024, arXiv 2402.13753).

A table is made once for its whole length, so a key turned early has the angle that a later query expects. Angles are
computed in float64, and the table is rounded once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("linear", "llama3", "yarn", "dynamic", "longrope")


@dataclass(frozen=True)
class RopeScaling:
    """How a context is stretched; the head of this file has the formulas.

    kind: one of linear, llama3, yarn, dynamic, longrope. original_max_position: L, needed by all but linear.
    low_freq_factor, high_freq_factor: of llama3. beta_fast, beta_slow, truncate (to whole pairs), mscale,
    mscale_all_dim: of yarn. short_factor, long_factor: the R/2 divisors of longrope. attention_factor: in place of the
    one that yarn or longrope derive from `factor`.
    """

    kind: str
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"RopeScaling: kind is {self.kind!r}; allowed: {', '.join(KINDS)}, and None for none")
        if not self.factor > 0:
            raise ValueError(f"RopeScaling: factor is {self.factor}; it must be positive")
        if self.kind != "linear" and not self.original_max_position:
            raise ValueError(
                f"RopeScaling: {self.kind} needs original_max_position, the context of the pre-training; "
                f"it is {self.original_max_position}"
            )
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"RopeScaling: low_freq_factor {self.low_freq_factor} must be below high_freq_factor "
                f"{self.high_freq_factor}"
            )

    @classmethod
    def from_config(cls, parameters: Mapping[str, Any] | None, max_position: int) -> "RopeScaling | None":
        """From a Hugging Face config's `rope_parameters` (or `rope_scaling`) and `max_position_embeddings`."""
        p = dict(parameters or {})
        kind = p.get("rope_type", p.get("type", "default"))
        if kind == "default":
            return None
        original = p.get("original_max_position_embeddings") or (max_position if kind == "dynamic" else None)
        factor = p.get("factor") or (max_position / original if original else 1.0)
        names = (
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "truncate",
            "mscale",
            "mscale_all_dim",
        )
        given = {n: p[n] for n in (*names, "attention_factor") if p.get(n) is not None}
        lists = {n: tuple(p[n]) for n in ("short_factor", "long_factor") if p.get(n) is not None}
        return cls(kind, float(factor), original, **given, **lists)


def frequencies(max_position: int, dim: int, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """(w [dim / 2] in float64, attention factor) for a table of max_position rows."""
    pair = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    w = theta**-pair
    if scaling is None:
        return w, 1.0
    s, f, context = scaling, scaling.factor, scaling.original_max_position
    if s.kind == "linear":
        return w / f, 1.0
    if s.kind == "llama3":
        turns = context * w / (2 * math.pi)
        kept = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        return _blend(w, f, kept), 1.0
    if s.kind == "dynamic":
        if max_position > context and dim > 2:
            theta *= (f * max_position / context - (f - 1)) ** (dim / (dim - 2))
        return theta**-pair, 1.0
    if s.kind == "yarn":
        return _blend(w, f, _kept_by_yarn(s, dim, theta)), _yarn_attention(s)
    name = "long_factor" if max_position > context else "short_factor"
    divisors = getattr(s, name)
    if len(divisors) != dim // 2:
        raise ValueError(f"rope_table: {name} of longrope has {len(divisors)} values; {dim} dimensions take {dim // 2}")
    attention = s.attention_factor
    if attention is None:
        attention = math.sqrt(1 + math.log(f) / math.log(context)) if f > 1 else 1.0
    return w / torch.tensor(divisors, dtype=torch.float64, device="cpu"), attention


def _blend(w: Tensor, factor: float, kept: Tensor) -> Tensor:
    """w where kept is 1, w / factor where it is 0, and between them in proportion."""
    return w * (kept + (1 - kept) / factor)


def _kept_by_yarn(s: RopeScaling, dim: int, theta: float) -> Tensor:
    def pair_that_turns(times: float) -> float:
        return dim * math.log(s.original_max_position / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(s.beta_fast), pair_that_turns(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / (high - low if high != low else 0.001)
    return 1 - ramp.clamp(0, 1)


def _yarn_attention(s: RopeScaling) -> float:
    def magnitude(m: float) -> float:
        return 0.1 * m * math.log(s.factor) + 1 if s.factor > 1 else 1.0

    if s.attention_factor is not None:
        return s.attention_factor
    if s.mscale and s.mscale_all_dim:
        return magnitude(s.mscale) / magnitude(s.mscale_all_dim)
    return magnitude(1)


def rope_table(
    max_position: int,
    dim: int,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
    scaling: RopeScaling | None = None,
) -> Tensor:
    """[max_position, dim] in float32: per position dim/2 cosines, then dim/2 sines, times the attention factor.

    dim: how many elements of a head are turned. Raises ValueError for values out of range.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"rope_table: dim is {dim}; it must be even and positive")
    if max_position < 1 or not 0 < theta < math.inf:
        raise ValueError(f"rope_table: max_position is {max_position}, theta {theta}; both must be positive and finite")
    w, attention = frequencies(max_position, dim, theta, scaling)
    if not (w.isfinite().all() and math.isfinite(attention)):
        raise ValueError(
            f"rope_table: theta {theta} and {scaling} give angles or a factor that are not finite; mend them"
        )
    angle = torch.arange(max_position, dtype=torch.float64, device="cpu")[:, None] * w
    return (torch.cat((angle.cos(), angle.sin()), 1) * attention).float().to(device or "cpu")
