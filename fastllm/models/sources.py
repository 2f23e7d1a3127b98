"""Files of weights under names of their own: a GGUF, or a folder of transformers. They give what `weights` builds models from."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .decoder import DecoderConfig
from .families import family_of, read_config
from .folder import KINDS, Folder
from .gguf import GGUFFile, as_q8_0, check_supported
from .gguf_families import FAMILIES as GGUF_FAMILIES
from .gguf_families import read_metadata

PIECE = 4096  # rows of blocks copied out of a file at once


class Source(Protocol):
    """A file of weights. `names` gives the file's names of a parameter of ours, stacked by rows; the rest takes such names.
    Shapes and rows are in our order, whatever the file's is."""

    config: DecoderConfig

    def extra_names(self, known: set[str]) -> list[str]: ...
    def names(self, ours: str) -> tuple[str, ...]: ...
    def kind(self, name: str) -> str: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def float_rows(self, name: str) -> Tensor: ...
    def stored_rows(self, name: str) -> tuple[str, Iterator[Tensor]]: ...
    def release(self, name: str) -> None: ...


class GGUFSource:
    """Weights of a GGUF."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.config = read_metadata(file)
        self._names = GGUF_FAMILIES[file.architecture].names
        check_supported(file.tensors.values())

    def extra_names(self, known: set[str]) -> list[str]:
        return [n for n in self.file.tensors if n not in known and n != "rope_freqs.weight"]

    def names(self, ours: str) -> tuple[str, ...]:
        return self._names.of(ours)

    def kind(self, name: str) -> str:
        return self._info(name).type

    def _info(self, name: str):
        info = self.file.tensors.get(name)
        if info is None:
            raise ValueError(
                f"{self.file.path}: there is no tensor {name!r}; the file is incomplete or of another model"
            )
        return info

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._info(name).shape)

    def float_rows(self, name: str) -> Tensor:
        values, order = self.file.dequantize(name), self._names.order_of(name, self.config)
        if self.config.unit_norm and name.endswith("norm.weight"):
            values -= 1.0  # a GGUF holds what a norm multiplies by
        return values if order is None else values[order]

    def stored_rows(self, name: str) -> tuple[str, Iterator[Tensor]]:
        """(type, its blocks as uint8 [n, bytes a row], in pieces): the file's, or a wider type with the same values."""
        kind, expand = self.kind(name), None
        if kind == "Q5_0":
            kind, expand = "Q8_0", as_q8_0

        def pieces() -> Iterator[Tensor]:
            blocks, order = self.file.rows(name), self._names.order_of(name, self.config)
            for start in range(0, len(blocks), PIECE):
                piece = slice(start, start + PIECE)
                rows = blocks[piece].copy() if order is None else blocks[order[piece].numpy()]
                yield torch.from_numpy(expand(rows) if expand else rows)

        return kind, pieces()

    def release(self, name: str) -> None:
        self.file.release(name)


class FolderSource:
    """Weights of a folder of transformers: config.json and safetensors, one file or sharded."""

    def __init__(self, folder: Path):
        self.folder, self._files = folder, Folder(folder)
        family = family_of(self._files.config, folder)
        for key in family.keys["layers"].split("|"):
            self._files.check_layers(self._files.config.get(key))
        self._names = family.names
        self.config = read_config(self._files.config, folder)
        # A model without its head is saved without the prefix; the head, where it is tied, is the embedding.
        self._bare = bool(self._files.where) and not any(n.startswith(self._names.base) for n in self._files.where)
        self._only_head = False  # of two that are tied the head alone is stored
        (table,), (head,) = self.names("embedding.weight"), self.names("head.weight")
        if self.config.tied and self._files.differ(table, head):
            self.config = replace(self.config, tied=False)  # as in transformers: the weights count, not the config
        elif self.config.tied and head in self._files.where:
            self._only_head = table not in self._files.where

    def extra_names(self, known: set[str]) -> list[str]:
        """Without what older checkpoints hold besides the weights, and a tied head that is stored all the same."""
        tied = set(self.names("head.weight")) if self.config.tied else set()
        unused = [re.compile(pattern) for pattern in self._names.unused]
        return [n for n in self._files.where if n not in known | tied and not any(u.fullmatch(f".{n}") for u in unused)]

    def names(self, ours: str) -> tuple[str, ...]:
        names = self._names.of("head.weight" if self._only_head and ours == "embedding.weight" else ours)
        return tuple(name.removeprefix(self._names.base) for name in names) if self._bare else names

    def _check(self, name: str) -> None:
        if name not in self._files.where:
            raise ValueError(f"{self.folder}: there is no tensor {name!r}; a shard is missing or it is another model")

    def kind(self, name: str) -> str:
        self._check(name)
        kind = self._files.where[name][1]
        if kind not in KINDS:
            raise ValueError(f"{self.folder}: tensor {name!r} is stored as {kind}; supported: {', '.join(KINDS)}")
        return kind

    def shape(self, name: str) -> tuple[int, ...]:
        self._check(name)
        shape = self._files.shape(name)
        return shape[::-1] if self._names.is_transposed(name) else shape

    def float_rows(self, name: str) -> Tensor:
        values = self._files.read(name)
        order = self._names.order_of(name, self.config)
        if order is not None:
            values = values[order]
        return values.t().contiguous() if self._names.is_transposed(name) else values

    def stored_rows(self, name: str) -> tuple[str, Iterator[Tensor]]:
        raise TypeError(f"{name!r} holds {self.kind(name)}, no quantised blocks")

    def release(self, name: str) -> None:
        pass


def open_source(path: str | Path) -> GGUFSource | FolderSource:
    """A .gguf file or a folder of transformers; ValueError says what is wrong with it."""
    path = Path(path)
    return FolderSource(path) if path.is_dir() else GGUFSource(GGUFFile(path))


def float_rows(source: Source, ours: str) -> Tensor:
    """A parameter of ours, float32, its parts stacked."""
    parts = [source.float_rows(name) for name in source.names(ours)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def kinds(source: Source, ours: str) -> Iterable[str]:
    """The stored types of its parts."""
    return [source.kind(name) for name in source.names(ours)]
