"""What is evaluated, as documents that know their place."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

from ..data.sources import Document

Record = str | Document | Mapping[str, Any]
Watch = Callable[[int], None]  # told how many records are done
CARRIED = ("id", "task")  # fields that say where a record is from, and are let through
Item = TypeVar("Item")


def documents(records: Iterable[Record]) -> Iterator[Document]:
    """Texts, fields and documents as documents. ValueError: there is none."""
    if isinstance(records, (str, Mapping)):
        records = [records]
    count = 0
    for count, record in enumerate(records, 1):
        if isinstance(record, Document):
            yield record
        else:
            yield Document({"text": record} if isinstance(record, str) else dict(record), "record", count)
    if not count:
        raise ValueError(
            "there is nothing to evaluate; a Documents gives its documents once, and a filter or a split may leave none"
        )


def check_fields(document: Document, *names: str) -> dict[str, Any]:
    """The fields of a record that must have these, and no others but CARRIED. ValueError: with its place."""
    fields = document.fields
    missing = [name for name in names if name not in fields]
    unknown = [name for name in fields if name not in names and name not in CARRIED]
    if missing or unknown:
        what = [f"has no {', '.join(missing)}"] * bool(missing) + [f"knows no {', '.join(unknown)}"] * bool(unknown)
        raise ValueError(
            f"{document.place}: the record {' and '.join(what)}; it must have {', '.join(names)}, and may have "
            f"{', '.join(CARRIED)}; rename or leave out what is other"
        )
    return fields


def check_text(document: Document, name: str) -> str:
    """A field that must be a string with something in it."""
    value = document.fields[name]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{document.place}: {name} is {repr(value)[:60]}; it must be a string that is not empty")
    return value


def in_groups(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """Lists of so many, in order, the last one shorter. ValueError: a count below 1."""
    if count < 1:
        raise ValueError(f"batch={count}; allowed: 1 or more")
    items = iter(items)
    while group := list(islice(items, count)):
        yield group
