"""Files as a stream of documents that can stop at any of them and go on from there, bit for bit.

    train = Documents("corpus/*.jsonl", split="train", shuffle=10_000, seed=1, epochs=None)
    document = next(train)                  # document.text, document.fields, document.file, document.number
    state = train.state_dict()              # plain JSON; load_state_dict(state) goes on with the next document

Formats, by the end of a name: .txt and .md, .jsonl, .parquet (needs the extra `train`), and .xml of a MediaWiki dump; text,
jsonl and XML may be compressed (.gz, .bz2, .xz). A record is a JSON object or a row; that of a text has the one field "text".

Shuffling: the files of an epoch in a drawn order, then blocks of `shuffle` documents that lie one after another, each block
in a drawn order. So a position is where a block began and how many of it were given, and no document is part of the state.
Orders and splits are drawn from hashes (BLAKE2b), not from a generator whose stream may change between versions.
"""

import hashlib
import json
import math
import os
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .formats import UNITS, find_files, has_fields, read_records

FRACTIONS = {"train": 0.98, "validation": 0.01, "test": 0.01}
_OTHERS = ("messages", "prompt", "source")  # what a record of another form has, which parquet gives a text of null
_WARNINGS = 5  # a source says so often that it skipped a record, then only counts


@dataclass(frozen=True)
class Document:
    """A record and where it stands: fields by name; file; number, its line (or paragraph, row, page) there, from 1."""

    fields: dict[str, Any]
    file: str = ""
    number: int = 0

    @property
    def text(self) -> str:
        """The field "text". ValueError: it has none, or it is no string."""
        text = self.fields.get("text")
        if not isinstance(text, str):
            raise ValueError(f'{self.place}: no "text" (a string); the record has {_names(self.fields)}')
        return text

    @property
    def key(self) -> str:
        """What decides its split: the text, or without one all fields, whatever the case and the spaces."""
        fields = self.fields
        text = (
            fields["text"] if isinstance(fields.get("text"), str) else json.dumps(fields, sort_keys=True, default=str)
        )
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

    @property
    def place(self) -> str:
        """file:number, for a message."""
        return f"{self.file}:{self.number}"


class BadRecord(ValueError):
    """A record that cannot be read, named by file and number."""


class Skipped:
    """Records that are left out: counted, and the first of them told."""

    def __init__(self) -> None:
        self.count = 0

    def say(self, place: str, what: str) -> None:
        """One more."""
        self.count += 1
        if self.count <= _WARNINGS:
            more = "; further ones are only counted" if self.count == _WARNINGS else ""
            warnings.warn(f"{place}: {what}; skipped{more}", stacklevel=7)


def _draw(*key: Any) -> int:
    """64 bits that depend on the key alone."""
    return int.from_bytes(hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest(), "big")


def uniform(*key: Any) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return (_draw(*key) >> 11) / (1 << 53)


def permutation(count: int, *key: Any) -> list[int]:
    """0 to count - 1 in an order that depends on the key alone."""
    return sorted(range(count), key=lambda i: _draw(*key, i))


def split_of(key: str, fractions: Mapping[str, float] = FRACTIONS, seed: int = 0) -> str:
    """The split that a text belongs to, whatever else is in the corpus: a hash of it, cut at the fractions.

    ValueError: fractions that are negative or do not add up to 1.
    """
    if not fractions or min(fractions.values()) < 0 or not math.isclose(sum(fractions.values()), 1, abs_tol=1e-9):
        raise ValueError(f"fractions are {dict(fractions)}; they must not be negative and add up to 1")
    draw, edge = uniform("split", seed, key), 0.0
    for name, fraction in fractions.items():
        edge += fraction
        if draw < edge:
            return name
    return next(name for name in reversed(fractions) if fractions[name] > 0)  # the sum was a little less than 1


class Documents:
    """The documents of files, one after another: an iterator with a state.

    paths: files, folders, globs. text: the field that holds the text, which becomes "text". unit: what of a text file is a
    document: the "file", a "paragraph" (between blank lines) or a "line". bad: "raise" a BadRecord, or "skip" it with a
    warning; one whose text is null is bad. longest: bytes of the longest record that is read. split: only the documents of this
    name of `fractions`. shuffle: documents in a block, 0 keeps the order. epochs: how often all is given, None without end.
    part: (r, n) gives every n-th document, from the r-th on: what one of n processes trains on. apply: fields -> fields, or None
    to leave it out; a ValueError of it is a bad record.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Iterable[str | os.PathLike],
        *,
        text: str = "text",
        unit: str = "file",
        bad: str = "raise",
        longest: int = 1 << 26,
        split: str | None = None,
        fractions: Mapping[str, float] = FRACTIONS,
        shuffle: int = 0,
        epochs: int | None = 1,
        seed: int = 0,
        part: tuple[int, int] = (0, 1),
        apply: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
    ):
        for name, value, allowed in (("unit", unit, UNITS), ("bad", bad, ("raise", "skip"))):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        if split is not None:
            split_of("", fractions)  # checks them
            if split not in fractions:
                raise ValueError(f"split is {split!r}; the fractions name {', '.join(fractions)}")
        if shuffle < 0 or longest < 1 or (epochs is not None and epochs < 1) or not 0 <= part[0] < part[1]:
            raise ValueError(
                f"shuffle={shuffle}, longest={longest}, epochs={epochs}, part={part}; allowed: shuffle >= 0, "
                "longest >= 1, epochs >= 1 or None, part (r, n) with 0 <= r < n"
            )
        self.files = find_files(paths)
        self.text, self.unit, self.bad, self.longest, self.apply = text, unit, bad, longest, apply
        self.split, self.fractions, self.epochs, self.part = split, dict(fractions), epochs, part
        self.shuffle, self.seed = shuffle, seed
        self._skipped = Skipped()
        names = [(file.name, file.stat().st_size) for file in self.files]
        chosen = split and [split, list(fractions.items())]
        self._identity = hashlib.blake2b(
            json.dumps([names, text, unit, longest, chosen, shuffle, epochs, seed, part]).encode(), digest_size=8
        ).hexdigest()
        self._go_to(_beginning(0), 0)

    @property
    def skipped(self) -> int:
        """Bad records since this object was made."""
        return self._skipped.count

    def __iter__(self) -> "Documents":
        return self

    def __next__(self) -> Document:
        while self._taken == len(self._block):
            self._fill()
        self._taken += 1
        return self._block[self._taken - 1]

    def state_dict(self) -> dict[str, Any]:
        """Where the next document is: plain JSON."""
        return {"source": self._identity, "place": dict(self._start), "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there. ValueError: the state of other files, or of the same read with other options."""
        if state["source"] != self._identity:
            raise ValueError(
                "the position belongs to another source: files (by name and size) and options must be those that it was "
                "saved with; start anew, or give what was given then"
            )
        self._go_to(dict(state["place"]), state["taken"])
        if self._to_skip:
            self._fill()
            self._taken = self._to_skip

    # ----------------------------------------------------------------------------------------------------------- blocks

    def _go_to(self, place: dict[str, int], taken: int) -> None:
        self._start = self._after = place
        self._block: list[Document] = []
        self._taken, self._to_skip = 0, taken
        self._walk = self._epoch(place)

    def _fill(self) -> None:
        """The next block. StopIteration after the last one."""
        while True:
            epoch = self._after["epoch"]
            if self.epochs is not None and epoch >= self.epochs:
                self._start, self._block, self._taken = self._after, [], 0
                raise StopIteration
            start, block = self._after, []
            try:
                for document, place in self._walk:
                    self._after = place
                    if document is not None:
                        block.append(document)
                    if len(block) == (self.shuffle or 1):
                        break
            except BaseException:  # asked again it says the same again, and leaves nothing out
                self._go_to(start, 0)
                raise
            if block:
                break
            if start == _beginning(epoch):
                which = "" if self.split is None else f" of the split {self.split!r}"
                names = ", ".join(str(f) for f in self.files[:3])
                part = "" if self.part == (0, 1) else f", none for part {self.part}"
                raise ValueError(f"{self._after['count']} documents{which} in {names}{part}; give other files")
            self._after = _beginning(epoch + 1)
            self._walk = self._epoch(self._after)
        if self.shuffle:
            key = ("block", self.seed, start["epoch"], start["file"], start["offset"])
            block = [block[i] for i in permutation(len(block), *key)]
        self._start, self._block, self._taken = start, block, 0

    def _epoch(self, place: dict[str, int]) -> Iterator[tuple[Document | None, dict[str, int]]]:
        """The documents of an epoch from a place on, each with the place behind it; None where one was left out."""
        order = range(len(self.files))
        if self.shuffle:
            order = permutation(len(self.files), "files", self.seed, place["epoch"])
        count = place["count"]
        for turn in range(place["file"], len(order)):
            file = self.files[order[turn]]
            begin = (place["offset"], place["number"]) if turn == place["file"] else (0, 0)
            for record, offset, number in read_records(file, *begin, unit=self.unit, longest=self.longest):
                document = self._document(file, number, record)
                if document is not None:
                    mine = count % self.part[1] == self.part[0]
                    count += 1
                    document = document if mine else None
                yield document, place | {"file": turn, "offset": offset, "number": number, "count": count}

    def _document(self, file: Path, number: int, record: dict[str, Any] | str) -> Document | None:
        """None: skipped, of another split, or left out by `apply`."""
        if isinstance(record, str):
            return self._skip(file, number, record)
        if self.text != "text" and self.text in record:
            record = {"text": record[self.text]} | {k: v for k, v in record.items() if k not in ("text", self.text)}
        elif self.text != "text" and has_fields(file) and "text" in record and not record.keys() & set(_OTHERS):
            return self._skip(file, number, f"no field {self.text!r}; the record has {_names(record)}")
        if record.get("text", "") is None and all(record.get(name) is None for name in _OTHERS):
            return self._skip(file, number, f"{self.text!r} is null")
        document = Document(record, str(file), number)
        if self.split is not None and split_of(document.key, self.fractions) != self.split:
            return None
        if self.apply is not None:
            try:
                made = self.apply(document.fields)
            except ValueError as error:
                return self._skip(file, number, str(error))
            document = None if made is None else Document(made, document.file, document.number)
        return document

    def _skip(self, file: Path, number: int, what: str) -> None:
        if self.bad == "raise":
            raise BadRecord(f"{file}:{number}: {what}; mend it, or give bad='skip'")
        self._skipped.say(f"{file}:{number}", what)


def _beginning(epoch: int) -> dict[str, int]:
    return {"epoch": epoch, "file": 0, "offset": 0, "number": 0, "count": 0}


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, fields)) or "no field"


# ---------------------------------------------------------------------------------------------------------------- mixing


def mixing_rates(sizes: Mapping[str, int], temperature: float = 1.0, limit: int | None = None) -> dict[str, float]:
    """How often each task is drawn: with e_m examples and a limit K,

        r_m = (min(e_m, K) / sum_n min(e_n, K))^(1/T),  then divided by the sum of all r.

    temperature T: 1 keeps the proportions, towards infinity all tasks are alike (Raffel et al. 2019, arXiv 1910.10683,
    section 3.5.2). ValueError: no task, an empty one, T < 1 or K < 1.
    """
    if not sizes or min(sizes.values()) < 1 or not temperature >= 1 or (limit is not None and limit < 1):
        raise ValueError(
            f"sizes={dict(sizes)}, temperature={temperature}, limit={limit}; allowed: one task or more, each with an "
            "example, temperature >= 1, limit >= 1 or None"
        )
    cut = {name: min(size, limit) if limit else size for name, size in sizes.items()}
    total = sum(cut.values())
    raised = {name: (size / total) ** (1 / temperature) for name, size in cut.items()}
    return {name: rate / sum(raised.values()) for name, rate in raised.items()}


class Mixture:
    """Documents drawn from several sources by rates, each with the field "task" set to its source's name.

    Which source is next depends on the seed and on how many documents came before. One that ends leaves the rest to the
    others, in proportion; sources with epochs=None keep the rates.
    """

    def __init__(self, sources: Mapping[str, Documents], rates: Mapping[str, float], seed: int = 0):
        if set(sources) != set(rates) or min(rates.values(), default=0) <= 0:
            raise ValueError(f"sources {sorted(sources)} and rates {dict(rates)}: a positive rate for each is needed")
        self.sources, self.rates, self.seed = dict(sources), dict(rates), seed
        self._count, self._ended = 0, set[str]()

    def __iter__(self) -> "Mixture":
        return self

    def __next__(self) -> Document:
        draw = uniform("task", self.seed, self._count)
        while open_ := [name for name in self.sources if name not in self._ended]:
            left = draw * sum(self.rates[name] for name in open_)
            for name in open_:  # the last one takes what rounding leaves
                left -= self.rates[name]
                if left < 0:
                    break
            try:
                found = next(self.sources[name])
            except StopIteration:
                self._ended.add(name)
                continue
            self._count += 1
            return Document(found.fields | {"task": name}, found.file, found.number)
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "count": self._count,
            "ended": sorted(self._ended),
            "sources": {name: source.state_dict() for name, source in self.sources.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there. ValueError: the state of other sources."""
        if set(state["sources"]) != set(self.sources):
            raise ValueError(
                f"the position is one of {sorted(state['sources'])}, the sources are {sorted(self.sources)}"
            )
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])
        self._count, self._ended = state["count"], set(state["ended"])


def write_jsonl(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> int:
    """Writes records, a line each, and gives their number; the file is there when all of them are."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, count = path.with_name(f".{path.name}.part"), 0
    try:
        with part.open("w", encoding="utf-8") as file:
            for count, record in enumerate(records, 1):  # noqa: B007 - counts
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return count
