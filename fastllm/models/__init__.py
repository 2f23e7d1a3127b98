"""Models: three classes built from blocks, and what reads their weights from files and writes them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load", "save"]


def load(name: str | os.PathLike) -> "nn.Module":
    """The model of a name, its weights float32 Parameters: an alias, an HF folder with safetensors, a .gguf file (which is
    dequantised) or a Hub id. A `Decoder`, `Encoder` or `Seq2Seq`, as the file says.

    FileNotFoundError: a path that does not exist. ValueError: a file that cannot be used. HubError: fetching failed.
    """
    from .. import hub
    from . import hf_encoder, weights
    from .folder import Folder

    path = Path(name) if Path(name).exists() else hub.resolve(name)
    if path.is_dir():
        folder = Folder(path)
        if folder.architecture in hf_encoder.ARCHITECTURES:
            return hf_encoder.load(folder)
    return weights.load(path)


def save(model: "nn.Module", path: str | os.PathLike) -> None:
    """Writes an `Encoder` or a `Seq2Seq` as a folder that `load` and transformers read, in the dtype of its parameters.

    TypeError for a model of another class, or with packed weights.
    """
    from . import hf_encoder
    from .encoder import Encoder

    if not isinstance(model, Encoder):
        raise TypeError(f"save: {type(model).__name__} cannot be saved; an Encoder can")
    hf_encoder.save(model, path)
