"""Texts to vectors by an encoder: texts are packed one after another, so that nothing is computed for padding, and a text's
vector has the same bits whatever stands beside it."""

import json
import os
from collections.abc import Sequence
from numbers import Integral
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
MODES = ("mean", "cls")  # of pooling, as sentence-transformers names them
MODULES = ("Transformer", "Pooling", "Normalize")


class TextEncoder:
    """An encoder with its tokenizer.

    how: "mean", "cls" or "pooler", normalize: vectors of length 1; as the folder of a sentence encoder says where None, else
    the mean, of length 1. longest: tokens of a text, at most the model's positions, which None stands for.
    """

    def __init__(
        self,
        model: Encoder,
        tokenizer: Tokenizer,
        how: str = "mean",
        normalize: bool = True,
        longest: int | None = None,
    ):
        if not isinstance(model, Encoder):
            raise TypeError(f"TextEncoder: the model is {type(model).__name__}; it must be an Encoder")
        if how not in POOLS:
            raise ValueError(f"TextEncoder: how={how!r}; allowed: {', '.join(map(repr, POOLS))}")
        check_vocab(tokenizer, model.config.vocab, "TextEncoder")
        if longest is not None and longest < 2:
            raise ValueError(f"TextEncoder: longest={longest}; allowed: 2 or more, or None")
        self.model, self.tokenizer, self.how, self.normalize = model, tokenizer, how, normalize
        positions = model.config.max_position
        self.longest = positions if longest is None else min(longest, positions)

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
        Texts are as long as sentence-transformers lets them be. Errors as of models.load; ValueError for a sentence encoder with
        other modules, or another pooling."""
        path = hub.resolve(name, revision=revision)
        model = models.load(path)
        if not isinstance(model, Encoder):
            raise ValueError(f"{path} holds a {type(model).__name__}, no encoder; LLM runs decoders")
        stored = _pooling(path)
        tokenizer = Tokenizer.from_folder(path)
        return cls(
            pack_weights(model, quantize), tokenizer, how or stored[0], stored[1] if normalize is None else normalize,
            _longest(path),
        )  # fmt: skip

    def embed(self, texts: str | Sequence[str | Sequence[int]], truncate: bool = False) -> Tensor:
        """The vectors of texts (or of token ids, special ones included): float32 [number of texts, dim].

        ValueError for a text of more than `longest` tokens, unless it may be cut (truncate; the last token, which ends a text,
        stays), and for one without tokens or with an id that the model has not.
        """
        sequences = self._ids([texts] if isinstance(texts, (str, bytes, bytearray)) else texts, truncate)
        with torch.inference_mode():
            parts = [
                self.model.embed(self.model.pack_lists(part), self.how, self.normalize)
                for part in in_parts(sequences, ROWS)
            ]
        return torch.cat(parts) if parts else torch.empty(0, self.model.config.dim)

    def _ids(self, texts: Sequence[str | Sequence[int]], truncate: bool) -> list[list[int]]:
        words = [text for text in texts if isinstance(text, str)]
        encoded = iter(self.tokenizer.encode_batch(words))
        sequences = [next(encoded) if isinstance(text, str) else _checked(text) for text in texts]
        limit, positions = self.longest, self.model.config.max_position
        has = f"{limit} positions" if limit == positions else f"is used with at most {limit}"
        for index, ids in enumerate(sequences):
            if not ids:
                raise ValueError(f"text {index} has no tokens; leave it out")
            if len(ids) > limit and not truncate:
                raise ValueError(
                    f"text {index} has {len(ids)} tokens, the model {has}; shorten it, or give TextEncoder.embed truncate=True"
                )
            check_ids(ids, self.tokenizer, self.model.config.vocab, f"text {index}: ")
        return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in sequences]


def _checked(ids: Sequence[int]) -> list[int]:
    listed = ids.tolist() if hasattr(ids, "tolist") else ids
    several = isinstance(listed, Sequence) and not isinstance(listed, (bytes, bytearray))
    if not several or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in listed):
        raise TypeError(f"a text is a str or a list of token ids (integers), got {type(ids).__name__} {repr(ids)[:40]}")
    return [int(i) for i in listed]


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
    """(how, normalize) as sentence-transformers writes them: a pooling_mode, or in earlier versions a flag for each."""
    modules = [m for m in _read(path / "modules.json", []) if isinstance(m, dict)]
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    strange = [kind for kind in kinds if kind not in MODULES]
    if strange:
        raise ValueError(f"{path}/modules.json has a {strange[0]}; supported: {', '.join(MODULES)}")
    file = path / "1_Pooling" / "config.json"
    pooling = _read(file, {})
    flags = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True]
    wanted = pooling.get("pooling_mode", [flag.removeprefix("pooling_mode_") for flag in flags] or MODES[0])
    wanted = wanted if isinstance(wanted, list) else [wanted]
    names = [str(one).removesuffix("_tokens").removesuffix("_token") for one in wanted]
    if len(names) != 1 or names[0] not in MODES:
        raise ValueError(
            f"{file}: the pooling is {' with '.join(names)}; supported: {' or '.join(MODES)}, one of the two"
        )
    return names[0], not kinds or "Normalize" in kinds


def _longest(path: Path) -> int | None:
    """Tokens that sentence-transformers cuts a text to; None where it says nothing, or there is no sentence encoder."""
    file = path / "sentence_bert_config.json"
    found = _read(file, {}).get("max_seq_length")
    if found is None and (path / "modules.json").is_file():  # later versions keep it with the tokenizer
        file = path / "tokenizer_config.json"
        found = _read(file, {}).get("model_max_length")
    if found is None:
        return None
    if not isinstance(found, int | float) or isinstance(found, bool) or found < 2:
        raise ValueError(f"{file}: texts have at most {found!r} tokens; it must be a number, 2 or more")
    return int(found)


def _read(path: Path, default: Any) -> Any:
    """The content of a file, of the same type as the default, which stands for one that is not there."""
    if not path.is_file():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, type(default)):
            raise ValueError(f"it holds a {type(content).__name__}, expected a {type(default).__name__}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return content
