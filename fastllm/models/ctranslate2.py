"""Reads a Whisper model in CTranslate2's format (version 6): numbers and names, no code.

The file: version u32; the name of a specification (u16 length, with a closing NUL) and its revision u32; the count of
variables u32; each a name, rank u8, dimensions u32, type u8, bytes u32, data; the count of aliases u32, each two names.
Every length is checked against the file's size before it is used. https://github.com/OpenNMT/CTranslate2
"""

import mmap
import os
import struct
from pathlib import Path

import torch
from torch import Tensor

from .folder import Names, fill, skeleton
from .seq2seq import Seq2Seq, Seq2SeqConfig

VERSION, SPECIFICATION = 6, "WhisperSpec"
DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}
LARGEST_RANK = 8
SELF = {  # ours -> theirs
    "attn_norm": "self_attention/layer_norm",
    "qkv": "self_attention/linear_0",
    "out": "self_attention/linear_1",
    "mlp_norm": "ffn/layer_norm",
    "up": "ffn/linear_0",
    "down": "ffn/linear_1",
}
CROSS = {
    "cross_norm": "attention/layer_norm",
    "cross_q": "attention/linear_0",
    "cross_kv": "attention/linear_1",
    "cross_out": "attention/linear_2",
}
# settings that a file holds beside its weights; Whisper has one value of each
SETTINGS = (
    r"(encoder|decoder)/(num_heads|pre_norm|activation|layer_norm/.*)",
    r"decoder/(alibi.*|alignment_.*|scale_.*|start_from_zero_embedding)",
)


class File:
    """where: name -> (dtype, shape, offset). ValueError, naming the file, where it is not what it should be."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise self._error("it is empty")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._size, self._at = size, 0
        version, spec, revision = self._int("I"), self._text(), self._int("I")
        if version != VERSION or spec != SPECIFICATION:
            raise self._error(
                f"{spec!r}, revision {revision}, in version {version}; {SPECIFICATION} in {VERSION} is read"
            )
        self.where: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        for _ in range(self._int("I")):
            name, rank = self._text(), self._int("B")
            if rank > LARGEST_RANK:
                raise self._error(f"{name!r} has {rank} dimensions")
            shape = tuple(self._int("I") for _ in range(rank))
            kind, nbytes = self._int("B"), self._int("I")
            count = 1
            for n in shape:
                count *= n
            if kind not in DTYPES or count * DTYPES[kind].itemsize != nbytes:
                raise self._error(f"{name!r} of type {kind} and shape {shape} cannot take {nbytes} bytes")
            if name in self.where:
                raise self._error(f"{name!r} is there twice")
            self.where[name] = DTYPES[kind], shape, self._skip(nbytes)
        self.aliases = {self._text(): self._text() for _ in range(self._int("I"))}
        if self._at != size:
            raise self._error(f"{size - self._at} bytes follow its end")

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is no CTranslate2 model of Whisper that can be read: {what}; fetch it again")

    def _skip(self, nbytes: int) -> int:
        start, self._at = self._at, self._at + nbytes
        if self._at > self._size:
            raise self._error(f"it ends at byte {self._size}, {self._at} are needed")
        return start

    def _int(self, kind: str) -> int:
        start = self._skip(struct.calcsize(kind))
        return struct.unpack_from(f"<{kind}", self._map, start)[0]

    def _text(self) -> str:
        length = self._int("H")
        start = self._skip(length)
        try:
            return self._map[start : start + length].rstrip(b"\0").decode()
        except UnicodeDecodeError:
            raise self._error(f"the name at byte {start} is no text") from None

    def find(self, name: str) -> str | None:
        """The name, if it is there."""
        return name if name in self.where else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a variable that is there."""
        return self.where[name][1]

    def read(self, name: str) -> Tensor:
        """A variable as float32, in memory of its own."""
        dtype, shape, start = self.where[name]
        if not dtype.is_floating_point:
            raise self._error(f"{name!r} is stored as {dtype}; float16, bfloat16 and float32 are read")
        data = bytearray(self._map[start : start + dtype.itemsize * torch.Size(shape).numel()])
        return torch.frombuffer(data, dtype=dtype).to(torch.float32, copy=True).reshape(shape)

    def number(self, name: str) -> int:
        """A setting."""
        dtype, shape, start = self.where.get(name) or (None, None, 0)
        if shape != () or dtype not in (torch.int8, torch.int16, torch.int32):
            raise self._error(f"it has no number {name!r}")
        return int.from_bytes(self._map[start : start + dtype.itemsize], "little", signed=True)


def names(c: Seq2SeqConfig) -> Names:
    """Of Whisper."""
    ours = {"embedding.weight": "decoder/embeddings/weight"}
    for side, count in (("encoder", c.encoder_layers), ("decoder", c.decoder_layers)):
        parts = {
            f"{side}.layers.{i}.{name}": f"{side}/layer_{i}/{theirs}"
            for i in range(count)
            for name, theirs in (SELF | (CROSS if side == "decoder" else {})).items()
        }
        for name, theirs in (parts | {f"{side}.norm": f"{side}/layer_norm"}).items():
            weight, bias = ("gamma", "beta") if name.endswith("norm") else ("weight", "bias")
            ours |= {f"{name}.weight": f"{theirs}/{weight}", f"{name}.bias": f"{theirs}/{bias}"}
        ours[f"{side}.positions.weight"] = f"{side}/position_encodings/encodings"
    shapes = {}
    for name, theirs, inputs in (("first", "conv1", c.bins), ("second", "conv2", c.dim)):
        ours |= {f"front.{name}.{kind}": f"encoder/{theirs}/{kind}" for kind in ("weight", "bias")}
        shapes[f"front.{name}.weight"] = (c.dim, inputs, 3)
    return Names({name: (theirs,) for name, theirs in ours.items()}, shapes, SETTINGS)


def read_config(file: File) -> Seq2SeqConfig:
    """Sizes as the variables have them."""

    def size(name: str, dim: int) -> int:
        if name not in file.where or len(file.shape(name)) <= dim:
            raise file._error(f"it has no {name!r}")
        return file.shape(name)[dim]

    def layers(side: str) -> int:
        return len(
            {name.split("/")[1] for name in file.where if name.startswith(f"{side}/layer_") and name.count("/") > 2}
        )

    vocab, dim = size("decoder/embeddings/weight", 0), size("decoder/embeddings/weight", 1)
    heads = file.number("decoder/num_heads")
    if heads < 1 or dim % heads:
        raise file._error(f"{heads} heads do not share {dim} columns")
    if file.aliases.get("decoder/projection/weight", "decoder/embeddings/weight") != "decoder/embeddings/weight":
        raise file._error("its head is not the table of its words")
    end = 50257 if vocab >= 51865 else 50256  # the smaller vocabulary is that of the English models
    return Seq2SeqConfig(
        vocab=vocab, dim=dim, heads=heads, head_dim=dim // heads, ffn=size("decoder/layer_0/ffn/linear_0/weight", 0),
        encoder_layers=layers("encoder"), decoder_layers=layers("decoder"),
        max_position=size("decoder/position_encodings/encodings", 0),
        source_position=size("encoder/position_encodings/encodings", 0),
        position="learned", norm_first=True, activation="gelu", bins=size("encoder/conv1/weight", 1),
        pad_id=end, eos_id=end, start_id=end + 1,
    )  # fmt: skip


def load(path: str | os.PathLike) -> Seq2Seq:
    """The model in a model.bin, its weights float32 Parameters."""
    file = File(path)
    config = read_config(file)
    model = fill(skeleton(lambda: Seq2Seq(config), file.path), names(config), file)
    model.tie()
    return model
