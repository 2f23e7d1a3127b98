"""AttentionSpec: which keys a query sees and how scores are shaped; one record for every kind of attention."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """causal: query i sees keys j <= i, positions in the sequence (fewer queries than keys: the last ones).
    window: of those only the last `window`, i - window < j <= i; needs causal.
    scale: factor on q . k; None means 1 / sqrt(D).
    softcap: scores become softcap * tanh(score / softcap) (Gemma 2)."""

    causal: bool = True
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.window is not None and not (isinstance(self.window, int) and self.window >= 1):
            raise ValueError(f"AttentionSpec: window is {self.window}, allowed: an int >= 1, or None for no window")
        if self.window is not None and not self.causal:
            raise ValueError("AttentionSpec: a window counts keys back from the query; it needs causal=True")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"AttentionSpec: scale is {self.scale}, allowed: a finite number, or None for 1/sqrt(D)")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(
                f"AttentionSpec: softcap is {self.softcap}, allowed: a positive number, or None for no cap"
            )

    def arguments(self, dim: int) -> tuple[bool, int, float, float]:
        """causal, window (0: none), scale, softcap (0: none) as the raw ops take them."""
        scale = dim**-0.5 if self.scale is None else float(self.scale)
        return self.causal, self.window or 0, scale, float(self.softcap or 0.0)


CAUSAL = AttentionSpec()
