"""A long text in pieces that have the tokens of the whole.

While the library encodes a text it holds a hundred bytes for each of the text's: 6 GB for a line of 60 MB. Vocabularies cut a
text into words first, so nothing is lost by cutting before a space, which is where a word begins. Whether that is so is tried
with what stands around each cut; where it is not so, the text stays whole.
"""

from collections.abc import Callable, Iterator

from tokenizers import Tokenizer as Backend

LONG = 1 << 20  # characters of a piece at most
AROUND = 64  # characters on both sides that a cut is tried with
TRIES = 16


def pieces(text: str, encode: Callable[[str], list[int]]) -> list[str]:
    """encode: the tokens of a short text."""
    made, begin = [], 0
    while len(text) - begin > LONG:
        cut = next((c for c in _candidates(text, begin) if _is_free(text, c, encode)), None)
        if cut is None:
            break
        made.append(text[begin:cut])
        begin = cut
    return [*made, text[begin:]]


def encode_short(backend: Backend, texts: list[str]) -> list[list[int]]:
    """Without special tokens around them."""
    return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode_long(backend: Backend, text: str) -> list[int]:
    """Without special tokens around it, piece by piece."""
    parts = pieces(text, lambda part: encode_short(backend, [part])[0])
    return [token for part in parts for token in encode_short(backend, [part])[0]]


def _candidates(text: str, begin: int) -> Iterator[int]:
    """Single spaces between words, the last ones first."""
    end = begin + LONG
    for _ in range(TRIES):
        end = text.rfind(" ", begin + LONG // 2, end)
        if end < 0:
            return
        if not text[end - 1].isspace() and not text[end + 1 : end + 2].isspace():
            yield end


def _is_free(text: str, cut: int, encode: Callable[[str], list[int]]) -> bool:
    left, right = text[max(cut - AROUND, 0) : cut], text[cut : cut + AROUND]
    return encode(left + right) == encode(left) + encode(right)
