"""Files of several formats, read record by record from any place on; what cannot be read is said in words, not raised."""

import bz2
import glob
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

from .wikitext import articles

UNITS = ("file", "paragraph", "line")
# How a name ends; MediaWiki calls a part of a dump pages.xml-p1p41242.bz2.
_FORMAT = re.compile(
    r"\.(parquet|(?:txt|md|jsonl|ndjson|xml(?:-p\d+p\d+[\w-]*)?)(?:\.(?:gz|bz2|xz))?)\Z", re.IGNORECASE
)
_PACKED = re.compile(r"(\.(?:txt|md|jsonl|ndjson|xml|parquet))(\.\w+)\Z", re.IGNORECASE)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character, as JSON escapes it; a pair of them is one
_OPENERS: dict[str, Callable[..., IO[bytes]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def find_files(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """Files of a known format, sorted: files, folders (with all below them but hidden files) and globs.

    FileNotFoundError: nothing there. ValueError: a file of a format that is not known.
    """
    found: dict[Path, None] = {}
    for given in [paths] if isinstance(paths, str | os.PathLike) else list(paths):
        path = Path(given).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != "." and _format(p))
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            raise FileNotFoundError(
                f"{given} holds no file to read; give a file, a folder or a glob such as data/*.jsonl"
            )
        found |= dict.fromkeys(files)
    for file in found:
        if not _format(file):
            if packed := _PACKED.search(file.name):
                raise ValueError(
                    f"{file}: {packed[2]} behind {packed[1]} is no compression that is known; known: .gz .bz2 .xz, behind all "
                    "but .parquet; unpack it"
                )
            raise ValueError(
                f"{file}: the format is told by the name; known: .txt .md .jsonl .parquet .xml (.gz .bz2 .xz)"
            )
    if not found:
        raise FileNotFoundError("no file was given; give a file, a folder or a glob such as data/*.jsonl")
    return list(found)


def read_records(
    file: Path, offset: int = 0, number: int = 0, *, unit: str = "file", longest: int = 1 << 26
) -> Iterator[tuple[dict[str, Any] | str, int, int]]:
    """(fields, or what is wrong in words; the offset behind it; its number), from an offset and the number before it on.

    An offset is a byte of the text, a row of parquet, or a page of XML; a number is a line, a paragraph, a row or a page. An
    empty file is one bad record with the number 0.
    """
    kind = _format(file)
    if file.stat().st_size == 0:
        if offset == 0:
            yield "the file is empty", 1, 0
        return
    try:
        if kind == "parquet":
            yield from _read_parquet(file, offset)
            return
        with _OPENERS.get(file.suffix.lower(), open)(file, "rb") as stream:
            if kind == "xml":
                yield from _read_xml(stream, offset)
                return
            stream.seek(offset)
            cut = "line" if kind == "jsonl" else unit
            for raw, after, number in _chunks(stream, offset, number, cut, longest):  # noqa: B020
                yield (raw if isinstance(raw, str) else _parse(raw, kind, number)), after, number
                offset = after
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if file.suffix.lower() not in _OPENERS:
            raise
        yield f"damaged from here on: {error}", offset, number + 1


def _format(file: Path) -> str | None:
    found = _FORMAT.search(file.name)
    kind = found and re.split("[-.]", found[1].lower())[0]
    return {"ndjson": "jsonl", "md": "txt"}.get(kind, kind)


def has_fields(file: Path) -> bool:
    """Whether a file's records name their fields; those of text and XML have the names that we give."""
    return _format(file) in ("jsonl", "parquet")


def _chunks(
    stream: IO[bytes], offset: int, number: int, unit: str, longest: int
) -> Iterator[tuple[bytes | str, int, int]]:
    """Units that are not blank; one longer than `longest` is never held, and comes as words that say so."""
    if unit == "file":
        if offset:
            return
        raw = stream.read(longest + 1)
        if len(raw) > longest:
            yield (
                f"the text has more than longest={longest} bytes; read it by unit='paragraph' or 'line'",
                offset + 1,
                1,
            )
        elif raw.strip():
            yield raw, offset + len(raw), 1
        return
    held, size, paragraphs = [], 0, number
    while line := stream.readline(longest + 1):
        number, length = number + 1, len(line)
        ended = line.endswith(b"\n")
        while not ended and (more := stream.readline(longest)):
            length, ended = length + len(more), more.endswith(b"\n")
        offset += length
        blank = length <= longest and not line.strip()
        if not blank:
            size += length
            if size > longest:
                held.clear()
            else:
                held.append(line)
        if size and (blank or unit == "line"):
            paragraphs += 1
            yield _unit(held, size, longest), offset, paragraphs if unit == "paragraph" else number
            held, size = [], 0
    if size:
        yield _unit(held, size, longest), offset, paragraphs + 1


def _unit(held: list[bytes], size: int, longest: int) -> bytes | str:
    return f"{size} bytes, more than longest={longest}" if size > longest else b"".join(held)


def _parse(raw: bytes, kind: str, number: int) -> dict[str, Any] | str:
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return f"byte {error.start} of the record (0x{raw[error.start]:02x}) is not UTF-8"
    if kind == "txt":
        return {"text": text.strip("\r\n")}
    try:
        fields = json.loads(text)
        alone = _SURROGATE.search(text) and re.search(r"[\ud800-\udfff]", json.dumps(fields, ensure_ascii=False))
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    if alone:
        return f"it holds a lone surrogate {alone[0]!r}, which no encoding has"
    return fields if isinstance(fields, dict) else f"a JSON {type(fields).__name__}; a record is an object"


def _read_xml(stream: IO[bytes], offset: int) -> Iterator[tuple[dict[str, Any] | str, int, int]]:
    number = 0
    try:
        for number, fields in articles(stream):
            if fields is not None and number > offset:
                yield fields, number, number
    except (ElementTree.ParseError, EOFError) as error:
        if number + 1 > offset:
            yield f"no XML from here on: {error}", number + 1, number + 1


def _read_parquet(file: Path, offset: int) -> Iterator[tuple[dict[str, Any] | str, int, int]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f'{file}: parquet needs pyarrow; pip install "fastllm[train]"') from error
    row = 0
    try:
        with parquet.ParquetFile(file) as table:
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if row + rows <= offset:
                    row += rows
                    continue
                for batch in table.iter_batches(batch_size=1024, row_groups=[group]):
                    for fields in _rows(batch):
                        row += 1
                        if row > offset:
                            yield fields, row, row
    except (pyarrow.ArrowInvalid, OSError) as error:
        if row + 1 > offset:
            yield f"no parquet from here on: {error}", row + 1, row + 1


def _rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Of a batch of parquet: its strings are not looked at before they are read."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield f"byte {error.start} of a string (0x{error.object[error.start]:02x}) is not UTF-8"
            return
        for i in range(batch.num_rows):
            yield from _rows(batch.slice(i, 1))
