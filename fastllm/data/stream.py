"""Ids to text, token by token: what is certain is told at once, and all of it is what the tokenizer makes of the whole."""

import codecs
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

LONGEST = 4  # bytes of a character


class StreamDecoder:
    """Decodes one sequence token by token: `push` gives the text that is certain, `flush` what an end leaves over.

    All that push and flush return, joined, equals `Tokenizer.decode` of the whole sequence. Where it continues the ids `after`,
    it is what both together have more than those alone, and a character that they left unfinished when it is whole.
    """

    def __init__(self, tokenizer: "Tokenizer", skip_special_tokens: bool = True, after: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._reset()
        self._follow(after)

    def _reset(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop = " " if self._tokenizer._strip else ""  # where the text begins so
        # Of a text that the library makes: tokens that were told, as many as the next ones depend on, and tokens that were not.
        self._told: list[int] = []
        self._held: list[int] = []

    def _follow(self, ids: Sequence[int]) -> None:
        tokenizer, kept = self._tokenizer, filter(self._counts, reversed(ids))
        if tokenizer._mode == "text":
            self._told = [*_up_to(kept, self._joins)][::-1]
        else:  # a character that is not whole lies in as many tokens at most
            last = itertools.islice(filter(None, map(tokenizer.token_bytes, kept)), LONGEST)
            self._clean(self._utf8.decode(b"".join([*last][::-1])))
            if self._utf8.getstate()[0]:  # it may stay unfinished: as that it has been told
                self._drop = "\ufffd"

    def push(self, id: int) -> str:
        """The new text, "" while a character is incomplete. ValueError: an id out of the vocabulary."""
        tokenizer = self._tokenizer
        id = tokenizer._check_id(id)
        if not self._counts(id):
            return ""
        if tokenizer._mode == "text":
            self._held.append(id)
            return "" if self._joins(id) else self._tell()
        return self._clean(self._utf8.decode(tokenizer.token_bytes(id)))

    def flush(self) -> str:
        """The rest: U+FFFD for an unfinished character, else "". The decoder then starts a new sequence."""
        text = self._clean(self._utf8.decode(b"", final=True)) + (self._tell() if self._held else "")
        self._reset()
        return text

    def _counts(self, id: int) -> bool:
        """Whether it is a token of the text; a vocabulary may have holes, and a model more ids than it."""
        tokenizer = self._tokenizer
        return (
            id < len(tokenizer) and not (self._skip and id in tokenizer.special_ids) and tokenizer.token(id) is not None
        )

    def _joins(self, id: int) -> bool:
        """Whether the library may make one text of this token and the next, so that its own is not certain before."""
        joined, token = self._tokenizer._joined, self._tokenizer.token(id)
        return joined == "all" or (joined == "bytes" and token.startswith("<0x") and len(token) == 6)

    def _tell(self) -> str:
        before, text = (self._tokenizer.decode(ids, False) for ids in (self._told, self._told + self._held))
        self._told, self._held = self._held[-1:], []
        return text[_alike(before, text) :]

    def _clean(self, text: str) -> str:
        drop, self._drop = self._drop, "" if text else self._drop
        return text.removeprefix(drop)


def _up_to(ids: Iterator[int], joins: Callable[[int], bool]) -> Iterator[int]:
    """The first of them that does not join, and those before it."""
    for id in ids:
        yield id
        if not joins(id):
            return


def _alike(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
