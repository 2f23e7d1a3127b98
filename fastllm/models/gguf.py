"""Reads GGUF files: metadata, tensor table, stored blocks without a copy, and dequantised tensors.

The header is walked once in plain Python, every length and count checked against the file's size before it is used, so
a truncated, corrupt or foreign file gives a `GGUFError` and nothing worse. Metadata values are decoded on access.
(`gguf.GGUFReader` makes several numpy objects for each of the 100,000 strings of a vocabulary, 2 s for a 135M model
against 0.05 s here, and loops without end on some corrupt counts; from `gguf` come the type table and the dequantiser.)

Format: magic "GGUF", version u32 (2 or 3), tensor count u64, pair count u64; pairs (key, type u32, value); tensor infos
(name, n_dims u32, dims u64 with the fastest first, type u32, offset u64); padding to `general.alignment`; tensor data.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

SUPPORTED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K")  # what can be dequantised

VERSIONS = (2, 3)
ALIGNMENT = 32  # when general.alignment is absent
STRING, ARRAY = 8, 9
SCALARS = {  # value type of the format -> little-endian struct
    code: struct.Struct("<" + letter)
    for code, letter in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
U32, U64 = SCALARS[4], SCALARS[10]


class GGUFError(ValueError):
    """The file is not a GGUF that can be read; the message names the file and the reason."""


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor. shape is in torch order (rows, columns); offset counts bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    offset: int


def check_supported(tensors: Iterable[TensorInfo], supported: Iterable[str] = SUPPORTED) -> None:
    """GGUFError naming the first tensor whose type is not among `supported`."""
    supported = tuple(supported)
    for info in tensors:
        if info.type not in supported:
            raise GGUFError(
                f"tensor {info.name!r} is stored as {info.type}, which is not supported; "
                f"supported: {', '.join(supported)}; convert the file to one of these"
            )


def llama_unpermute_rows(n_rows: int, n_heads: int) -> torch.Tensor:
    """Row index [n_rows] that turns Llama's attn_q / attn_k rows of a GGUF into the half-split (HF, NeoX) order.

    GGUF stores the rows of a head for interleaved rope: (x_j, x_{j + D/2}) side by side. With D = n_rows / n_heads,
    row (h, half, j) of the result is row (h, j, half) of the file. `weight[index]` works on dequantised tensors and on
    `GGUFFile.rows` alike, as a block never crosses a row. n_heads is the number of kv heads for attn_k.
    """
    if n_heads < 1 or n_rows < 1 or n_rows % (2 * n_heads):
        raise ValueError(f"{n_rows} rows do not split into {n_heads} heads of even size")
    return torch.arange(n_rows).view(n_heads, n_rows // n_heads // 2, 2).transpose(1, 2).reshape(n_rows)


def as_q8_0(blocks: np.ndarray) -> np.ndarray:
    """Rows of Q5_0 blocks, uint8 [n, 22 a block], as Q8_0, [n, 34 a block], with the same values: scale * (q - 16).

    Of the other types beyond Q4_0, Q4_1 and Q8_0 none fits into groups of 32 with a float16 scale: the scales of Q4_K are
    products of a float16 and 6 bits, those of Q6_K are of groups of 16.
    """
    parts = blocks.reshape(-1, 22)
    scale, high, low = parts[:, :2], np.unpackbits(parts[:, 2:6], axis=1, bitorder="little"), parts[:, 6:]
    quants = np.concatenate((low & 15, low >> 4), 1) | high << 4
    signed = quants.astype(np.int8) - np.int8(16)
    return np.concatenate((scale, signed.view(np.uint8)), 1).reshape(len(blocks), -1)


class Metadata(Mapping[str, Any]):
    """The key-value pairs of the header. A value is decoded each time it is read: int, float, bool, str or a list."""

    def __init__(self, file: "GGUFFile", places: dict[str, tuple[int, int]]):
        self._file = file
        self._places = places  # key -> (value type, offset of the value)

    def __getitem__(self, key: str) -> Any:
        kind, offset = self._places[key]
        return _decode(self._file, kind, offset)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class GGUFFile:
    """An open GGUF file, mapped into memory. Use as a context manager or call `close()`.

    path: its path. metadata: lazy mapping key -> value. tensors: name -> TensorInfo, in file order.
    GGUFError: not a GGUF, truncated, corrupt, of another version. FileNotFoundError, PermissionError: as usual.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if self.path.is_dir():
            raise GGUFError(f"{self.path}: is a folder, not a GGUF file")
        with self.path.open("rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            if self._size < 24:
                raise self._error(f"is {self._size} bytes long, shorter than a GGUF header (24)")
            self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            places, infos = self._walk()
        except struct.error as error:
            raise self._error("the header is truncated") from error
        self.metadata = Metadata(self, places)
        self.tensors: dict[str, TensorInfo] = infos

    # Header

    def _error(self, reason: str) -> GGUFError:
        return GGUFError(f"{self.path}: {reason}")

    def _walk(self) -> tuple[dict[str, tuple[int, int]], dict[str, TensorInfo]]:
        data, size = self._data, self._size
        if data[:4] != b"GGUF":
            raise self._error(f"not a GGUF file: it starts with {bytes(data[:4])!r}")
        (version,) = U32.unpack_from(data, 4)
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            reason = "is big-endian" if swapped else f"has version {version}"
            raise self._error(f"{reason}; supported: little-endian, versions {VERSIONS}")
        n_tensors, n_pairs = struct.unpack_from("<QQ", data, 8)
        # The smallest pair takes 8 + 4 + 1 bytes, the smallest tensor info 8 + 4 + 8 + 4 + 8.
        if n_pairs * 13 + n_tensors * 32 > size - 24:
            raise self._error(f"claims {n_pairs} pairs and {n_tensors} tensors, more than {size} bytes can hold")

        places: dict[str, tuple[int, int]] = {}
        at = 24
        for _ in range(n_pairs):
            key, at = self._string(at)
            (kind,) = U32.unpack_from(data, at)
            if key in places:
                raise self._error(f"has the key {key!r} twice")
            places[key] = (kind, at + 4)
            at = self._skip(key, kind, at + 4)

        raw = []
        for _ in range(n_tensors):
            name, at = self._string(at)
            (n_dims,) = U32.unpack_from(data, at)
            if not 1 <= n_dims <= 4:
                raise self._error(f"tensor {name!r} has {n_dims} dimensions; allowed: 1 to 4")
            *dims, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", data, at + 4)
            at += 4 + 8 * n_dims + 12
            raw.append((name, tuple(reversed(dims)), kind, offset))
        alignment = self._alignment(places)
        start = -(-at // alignment) * alignment
        return places, self._infos(raw, start, alignment)

    def _alignment(self, places: dict[str, tuple[int, int]]) -> int:
        if "general.alignment" not in places:
            return ALIGNMENT
        kind, offset = places["general.alignment"]
        value = _decode(self, kind, offset)
        if kind != 4 or value == 0 or value & (value - 1):
            raise self._error(f"general.alignment is {value!r}; allowed: a power of two, as u32")
        return value

    def _infos(self, raw: list, start: int, alignment: int) -> dict[str, TensorInfo]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        infos: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in raw:
            try:
                stored = GGMLQuantizationType(kind)
                block, block_bytes = GGML_QUANT_SIZES[stored]
            except (ValueError, KeyError):
                raise self._error(f"tensor {name!r} has type {kind}, unknown here; try a newer gguf package") from None
            if name in infos:
                raise self._error(f"has the tensor {name!r} twice")
            if min(shape) < 1 or shape[-1] % block:
                raise self._error(f"tensor {name!r} has shape {shape}; {stored.name} rows are multiples of {block}")
            nbytes = _product(shape) // block * block_bytes
            if offset % alignment or start + offset + nbytes > self._size:
                raise self._error(
                    f"tensor {name!r} takes {nbytes} bytes at {start + offset}, but the file ends at {self._size} "
                    f"(alignment {alignment}); it is truncated or corrupt"
                )
            infos[name] = TensorInfo(name, shape, stored.name, nbytes, start + offset)
        return infos

    def _string(self, at: int) -> tuple[str, int]:
        """The string at `at`, and where it ends."""
        (length,) = U64.unpack_from(self._data, at)
        end = at + 8 + length
        if end > self._size:
            raise self._error(f"a string at byte {at} claims {length} bytes, past the end of the file")
        try:
            return str(self._data[at + 8 : end], "utf-8"), end
        except UnicodeDecodeError:
            raise self._error(f"the string at byte {at} is not UTF-8") from None

    def _skip(self, key: str, kind: int, at: int) -> int:
        """Where the value of `key` ends; checks that it lies inside the file and that `_decode` knows its type."""
        if kind in SCALARS:
            end = at + SCALARS[kind].size
        elif kind == STRING:
            end = at + 8 + U64.unpack_from(self._data, at)[0]
        elif kind == ARRAY:
            item, count = struct.unpack_from("<IQ", self._data, at)
            if item in SCALARS:
                end = at + 12 + count * SCALARS[item].size
            elif item == STRING:
                end = self._skip_strings(key, count, at + 12)
            else:
                raise self._error(f"{key!r} is an array of type {item}, which is not supported")
        else:
            raise self._error(f"{key!r} has the unknown value type {kind}")
        if end > self._size:
            raise self._error(f"the value of {key!r} ends past the end of the file")
        return end

    def _skip_strings(self, key: str, count: int, at: int) -> int:
        data, size, unpack = self._data, self._size, U64.unpack_from
        if count * 8 > size - at:
            raise self._error(f"{key!r} claims {count} strings, more than the file can hold")
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
            if at > size:
                raise self._error(f"a string of {key!r} ends past the end of the file")
        return at

    # Contents

    @property
    def _data(self) -> mmap.mmap:
        if self._map is None:
            raise self._error("is closed")
        return self._map

    @property
    def architecture(self) -> str:
        """general.architecture, for instance "llama"; GGUFError if the file does not say."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise self._error("does not name its general.architecture")
        return name

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise KeyError(f"{self.path} has no tensor {name!r}; it has {len(self.tensors)}, see .tensors")
        return self.tensors[name]

    def rows(self, name: str) -> np.ndarray:
        """The stored blocks as uint8 [rows, bytes per row], read-only and without a copy; 1-D tensors are one row."""
        info = self._info(name)
        stored = np.frombuffer(self._data, np.uint8, info.nbytes, info.offset)
        return stored.reshape(_product(info.shape[:-1]), -1)

    def dequantize(self, name: str) -> torch.Tensor:
        """The tensor in float32 and torch order, in memory of its own. GGUFError for a type not in SUPPORTED."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        info = self._info(name)
        check_supported([info])
        with np.errstate(all="ignore"):  # a scale may be inf or NaN; the result says so
            values = dequantize(self.rows(name), GGMLQuantizationType[info.type])
        if info.type == "F32":
            values = values.copy()  # the dequantiser hands the mapped file through
        return torch.from_numpy(values.reshape(info.shape))

    def release(self, name: str) -> None:
        """Lets the kernel drop the tensor's pages from memory. They are read from the file again if used again."""
        info = self._info(name)
        if hasattr(mmap, "MADV_DONTNEED"):
            start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._data.madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)

    def close(self) -> None:
        """Gives the mapping up. Arrays from `rows` stay valid: the last one of them unmaps the file."""
        self._map = None

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r}, {len(self.tensors)} tensors)"


def _product(values: Iterable[int]) -> int:
    result = 1
    for value in values:  # Python integers: no overflow on a corrupt shape
        result *= value
    return result


def _decode(file: GGUFFile, kind: int, at: int) -> Any:
    """The value at `at`, whose extent `_skip` has checked."""
    data = file._data
    if kind == STRING:
        return file._string(at)[0]
    if kind in SCALARS:
        return SCALARS[kind].unpack_from(data, at)[0]
    item, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if item in SCALARS:
        return list(struct.unpack_from(f"<{count}{SCALARS[item].format[1:]}", data, at))
    values = []
    for _ in range(count):
        text, at = file._string(at)
        values.append(text)
    return values
