"""Models: three classes built from blocks, and what reads their weights from files and writes them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["load", "save"]


def load(name: str | os.PathLike) -> "nn.Module":
    """The model of a name, its weights float32 Parameters: an alias, an HF folder with safetensors, a folder of CTranslate2,
    a .gguf file (which is dequantised) or a Hub id. A `Decoder`, `Encoder` or `Seq2Seq`, as the file says.

    FileNotFoundError: a path that does not exist. ValueError: a file that cannot be used. HubError: fetching failed.
    """
    from .. import hub

    path = hub.resolve(name)
    model = _load(path)
    model.origin = path.absolute()  # where `save` finds the tokenizer
    return model


def kind_of(path: Path) -> str:
    """The class that `load` makes of a model of text, by the config.json of a folder: "Encoder", "Seq2Seq", or else "Decoder".
    ValueError: a folder without a config.json that can be read."""
    from . import hf_encoder, hf_seq2seq
    from .folder import architecture_of, read_json

    architecture = architecture_of(read_json(path / "config.json")) if path.is_dir() else ""
    kinds = {"Encoder": hf_encoder.ARCHITECTURES, "Seq2Seq": hf_seq2seq.ARCHITECTURES}
    return next((kind for kind, names in kinds.items() if architecture in names), "Decoder")


def _load(path: Path) -> "nn.Module":
    from ..hub import is_ctranslate2
    from . import ctranslate2, hf_encoder, hf_seq2seq, weights
    from .families import FAMILIES, unknown
    from .folder import Folder

    if is_ctranslate2(path):
        return ctranslate2.load(path / "model.bin")
    if path.is_dir():
        folder = Folder(path)
        for family in (hf_encoder, hf_seq2seq):
            if folder.architecture in family.ARCHITECTURES:
                return family.load(folder)
        if folder.architecture not in FAMILIES:
            known = [*FAMILIES, *hf_encoder.ARCHITECTURES, *hf_seq2seq.ARCHITECTURES]
            raise unknown(folder.architecture, known, path)
    return weights.load(path)


def save(
    model: "nn.Module",
    path: str | os.PathLike,
    dtype: "torch.dtype | None" = None,
    shard_bytes: int = 5 * 10**9,
    more: Mapping[str, Any] | None = None,
    text: str | os.PathLike | None = None,
) -> None:
    """Writes a `Decoder`, an `Encoder` or a `Seq2Seq` as a folder that `load`, LLM and transformers read: config.json,
    safetensors, tokenizer and chat template, in shards of at most shard_bytes.

    dtype: of the tensors, None keeps the parameters' own; what was loaded and not changed is written bit for bit in the dtype
    that it had. more: further keys for config.json. text: a file or folder of a model, whose tokenizer and chat template are
    written; None takes what the model was loaded from, if it was. Nothing in the folder is replaced before all is written. A
    tokenizer that cannot be read is left out with a warning. TypeError for a model of another class, or with packed weights.
    """
    from . import hf_encoder, hf_seq2seq, weights
    from .decoder import Decoder
    from .encoder import Encoder
    from .folder import Writing
    from .layers import packed
    from .seq2seq import Seq2Seq

    source = getattr(model, "origin", None) if text is None else Path(text)
    how = Writing(dtype, shard_bytes, more, source)
    if isinstance(model, Decoder):
        return weights.save(model, path, how)
    for kind, family in ((Encoder, hf_encoder), (Seq2Seq, hf_seq2seq)):
        if isinstance(model, kind):
            if packed(model):
                raise TypeError(
                    "save: the weights are packed for decoding; save the model as it was before pack_weights"
                )
            return family.save(model, path, how)
    raise TypeError(f"save: {type(model).__name__} cannot be saved; a Decoder, an Encoder or a Seq2Seq can")
