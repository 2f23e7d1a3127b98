"""Sources and what is to be said of them, for an encoder-decoder: a pair is to `PairBatches` what an example is to `Batches`.

    encode = lambda document, index: encode_pair(tokenizer, document.fields, start_id, longest=512)
    for batch in PairBatches(documents, encode, tokens=8192):
        hidden = model.decode_packed(batch.said.packed, model.encode_packed(batch.source))                       # [T, dim]

Both sides are packed: `cu` of the two keeps every target at its own source. A batch counts the tokens of both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch import Batch, Example, Groups, collate, end_id
from .packed import Packed
from .tokenizer import Tokenizer

FORMS = (("source", "target"), ("prompt", "completion"))


@dataclass(frozen=True, eq=False)
class Pair:
    """source int64 [n]; target, an example that begins with the token that begins every target. Its length: of both."""

    source: np.ndarray
    target: Example

    def __len__(self) -> int:
        return len(self.source) + len(self.target)

    @classmethod
    def of(cls, source: Sequence[int], target: Sequence[int], start_id: int) -> "Pair":
        """Token ids, eos included in both. ValueError: a side without a token."""
        if not len(source) or not len(target):
            raise ValueError(f"a source of {len(source)} tokens, a target of {len(target)}; each needs one")
        return cls(np.asarray(source, dtype=np.int64), Example.next_tokens([start_id, *target]))


@dataclass(frozen=True)
class PairBatch:
    """B sources, and what is to be said of each: source, packed, and `said`, the targets as a batch of their own."""

    source: Packed
    said: Batch

    @property
    def weight(self) -> Tensor:
        """float32 [T] of each prediction."""
        return self.said.weight

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same elsewhere."""
        return PairBatch(self.source.to(device), self.said.to(device))


def collate_pairs(pairs: Sequence[Pair]) -> PairBatch:
    """Pairs as one batch. ValueError: none."""
    said = collate([pair.target for pair in pairs])
    return PairBatch(Packed.of_arrays([pair.source for pair in pairs]), said)


class PairBatches(Groups[Pair]):
    """Batches of at most `tokens` tokens, sources and targets together, packed and with a state as those of `Batches`."""

    def __iter__(self) -> "PairBatches":
        return self

    def __next__(self) -> PairBatch:
        return collate_pairs(self.take())


def encode_pair(
    tokenizer: Tokenizer, fields: Mapping[str, Any], start_id: int, longest: int | None = None
) -> list[Pair]:
    """A record {"source", "target"} or {"prompt", "completion"}, of strings: each side and eos.

    Longer than `longest` tokens, the end of a side is cut. A source has its eos all the same, a target has none then, so that
    nothing teaches to stop early. ValueError: another form.
    """
    for names in FORMS:
        sides = [fields.get(name) for name in names]
        if all(isinstance(side, str) for side in sides):
            break
    else:
        allowed = " or ".join(f'"{a}" and "{b}"' for a, b in FORMS)
        raise ValueError(f"a record of {', '.join(fields) or 'nothing'}; allowed: {allowed}, two strings")
    eos = end_id(tokenizer)
    source, target = tokenizer.encode_batch(sides, add_special_tokens=False)
    limit = None if longest is None else max(longest - 1, 0)
    return [Pair.of([*source[:limit], eos], [*target, eos][:longest], start_id)]
