"""Special tokens that a user typed, which are to stay text."""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

PRIVATE = range(0xE000, 0xF900)  # characters that mean nothing of themselves


def literal_model(backend: Backend, special: Collection[int]) -> models.Unigram | None:
    """The model of a backend that finds no special token in a text; None where its own finds none.

    Told that special tokens are text (`encode_special_tokens`), the library leaves them to the model, and one of Unigram finds
    those that are among its pieces, as T5's </s> is. Here such a piece is empty, which matches nothing.
    """
    if not isinstance(backend.model, models.Unigram):
        return None
    state = json.loads(backend.model.__getstate__())
    vocab, unknown = state["vocab"], state["unk_id"]
    found = [id for id in special if id < len(vocab) and id != unknown]
    for id in found:
        vocab[id][0] = ""
    return models.Unigram([tuple(piece) for piece in vocab], unknown, state["byte_fallback"]) if found else None


class Talk:
    """Messages for a chat template, which writes special tokens itself: those that stand in a message stay text, unless it is the
    assistant's own.

    messages: with a mark around each of them, for the template. encode: the tokens of what the template made.
    """

    def __init__(self, tokenizer: "Tokenizer", messages: Any):
        """Messages that are none stay as they are: the template says what is wrong with them."""
        self.messages, self._tokenizer = messages, tokenizer
        self._parts: re.Pattern[str] | None = None  # of a rendered text with marks
        typed = tokenizer.special_text
        others = [m for m in messages if _is_others(m)] if isinstance(messages, list | tuple) else []
        if typed is None or not any(typed.search(text) for text in _texts(others)):
            return
        self._begin, self._end = _unused("".join(_texts(messages)))
        self._parts = re.compile(f"{self._begin}({typed.pattern}){self._end}")

        def mark(text: str) -> str:
            return typed.sub(lambda found: f"{self._begin}{found[0]}{self._end}", text)

        self.messages = [_mapped(m, mark) if _is_others(m) else m for m in messages]

    def encode(self, text: str, before: Sequence[int] = ()) -> list[int]:
        """The ids of a rendered text, or of a part of one that goes on behind the ids `before`."""
        if self._parts is None:
            return self._tokenizer.encode_after(before, text, parse_special=True)
        for mark in (self._begin, self._end):  # as a template's tojson writes it, or Python a list
            text = text.replace(f"\\u{ord(mark):04x}", mark)
        ids: list[int] = list(before)
        for n, part in enumerate(self._parts.split(text)):  # by turns what the template wrote and what is marked
            part = part.replace(self._begin, "").replace(self._end, "")  # a template may have cut a pair
            ids += self._tokenizer.encode_after(ids, part, parse_special=n % 2 == 0)
        return ids[len(before) :]


def _is_others(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") != "assistant"


def _texts(value: Any) -> Iterator[str]:
    """All that are in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _mapped(value: Any, mark: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, mark) for key, item in value.items()}
    return [_mapped(item, mark) for item in value] if isinstance(value, list | tuple) else value


def _unused(text: str) -> tuple[str, str]:
    """Two characters that it has not, in no spelling. ValueError: it has all."""
    free = (chr(code) for code in PRIVATE if chr(code) not in text and f"\\u{code:04x}" not in text.lower())
    found = [*zip(free, free, strict=False)][:1]
    if not found:
        raise ValueError("the messages hold every character of Unicode's private use area; remove some of them")
    return found[0]
