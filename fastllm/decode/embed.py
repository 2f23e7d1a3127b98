"""Texts to vectors by an encoder: texts are packed one after another, so that nothing is computed for padding, and a text's
vector has the same bits whatever stands beside it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import hub, models
from ..data.packed import in_parts
from ..data.tokenizer import Tokenizer
from ..models.encoder import POOLS, Encoder
from ..models.layers import pack_weights
from ..models.text import check_ids, check_vocab

ROWS = 4096  # tokens that go through the model at once: a layer's widest rows are 25 MB for MiniLM


class TextEncoder:
    """An encoder with its tokenizer.

    how: "mean", "cls" or "pooler", normalize: vectors of length 1; as the folder of a sentence encoder says where None, else
    the mean, of length 1.
    """

    def __init__(self, model: Encoder, tokenizer: Tokenizer, how: str = "mean", normalize: bool = True):
        if not isinstance(model, Encoder):
            raise TypeError(f"TextEncoder: the model is {type(model).__name__}; it must be an Encoder")
        if how not in POOLS:
            raise ValueError(f"TextEncoder: how={how!r}; allowed: {', '.join(map(repr, POOLS))}")
        check_vocab(tokenizer, model.config.vocab, "TextEncoder")
        self.model, self.tokenizer, self.how, self.normalize = model, tokenizer, how, normalize

    @classmethod
    def load(
        cls,
        name: str | os.PathLike,
        how: str | None = None,
        normalize: bool | None = None,
        *,
        quantize: str | None = None,
        revision: str | None = None,
    ) -> "TextEncoder":
        """An alias ("minilm-l6"), a folder, or a Hub id; weights are packed for a CPU, quantised with "int8" or "int4".
        Errors as of models.load."""
        path = hub.resolve(name, revision=revision)
        model = models.load(path)
        if not isinstance(model, Encoder):
            raise ValueError(f"{path} holds a {type(model).__name__}, no encoder; LLM runs decoders")
        stored = _pooling(path)
        tokenizer = Tokenizer.from_folder(path)
        return cls(
            pack_weights(model, quantize), tokenizer, how or stored[0], stored[1] if normalize is None else normalize
        )

    def embed(self, texts: str | Sequence[str | Sequence[int]], truncate: bool = False) -> Tensor:
        """The vectors of texts (or of token ids, special ones included): float32 [number of texts, dim].

        ValueError for a text of more tokens than the model has positions, unless it may be cut (truncate; the last token,
        which ends a text, stays), and for one without tokens or with an id that the model has not.
        """
        sequences = self._ids([texts] if isinstance(texts, str) else texts, truncate)
        with torch.inference_mode():
            parts = [
                self.model.embed(self.model.pack_lists(part), self.how, self.normalize)
                for part in in_parts(sequences, ROWS)
            ]
        return torch.cat(parts) if parts else torch.empty(0, self.model.config.dim)

    def _ids(self, texts: Sequence[str | Sequence[int]], truncate: bool) -> list[list[int]]:
        words = [text for text in texts if isinstance(text, str)]
        encoded = iter(self.tokenizer.encode_batch(words))
        sequences = [next(encoded) if isinstance(text, str) else [int(i) for i in text] for text in texts]
        limit = self.model.config.max_position
        for index, ids in enumerate(sequences):
            if not ids:
                raise ValueError(f"text {index} has no tokens; leave it out")
            if len(ids) > limit and not truncate:
                raise ValueError(
                    f"text {index} has {len(ids)} tokens, the model {limit} positions; shorten it, or give truncate=True"
                )
            check_ids(ids, self.tokenizer, self.model.config.vocab, f"text {index}: ")
        return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in sequences]


def read_encoder(path: Path, quantize: str | None, device: str) -> TextEncoder | None:
    """For LLM: None for a file or a folder of a decoder. ValueError: a GPU, or an encoder-decoder."""
    kind = models.kind_of(path)
    if kind == "Seq2Seq":
        raise ValueError(
            f"{path} is an encoder-decoder; `fastllm generate`, `fastllm eval` and decode.text2text run it"
        )
    if kind == "Decoder":
        return None
    if device == "cuda":
        raise ValueError(f"LLM: device='cuda', but {path} is an encoder: `embed` runs on a CPU; allowed: 'auto', 'cpu'")
    return TextEncoder.load(path, quantize=quantize)


def _pooling(path: Path) -> tuple[str, bool]:
    """(how, normalize) as sentence-transformers writes them."""
    modules, pooling = _read(path / "modules.json", []), _read(path / "1_Pooling" / "config.json", {})
    kinds = (
        [str(module.get("type")) for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    )
    normalize = not kinds or any(kind.endswith("Normalize") for kind in kinds)
    modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    wanted = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True]
    if len(wanted) > 1 or any(key not in modes for key in wanted):
        raise ValueError(
            f"{path}/1_Pooling/config.json wants {', '.join(wanted)}; one of {', '.join(modes)} is supported"
        )
    return modes[wanted[0]] if wanted else "mean", normalize


def _read(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
