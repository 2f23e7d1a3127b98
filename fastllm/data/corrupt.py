"""Text with holes, and what belongs in them: masked tokens for an encoder, spans for an encoder-decoder.

What is drawn depends on (seed, index) alone: give the index of the document in the stream, and it is drawn anew in each epoch
and the same after a resume.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .batch import IGNORE, Example, end_id
from .pairs import Pair
from .tokenizer import Tokenizer

# What `Tokenizer.train` is to be given: roles for an encoder, and as `more` the sentinels for an encoder-decoder.
MASKED_ROLES: Mapping[str, str] = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))


@dataclass(frozen=True, eq=False)
class Words:
    """What masking has to know of a vocabulary of V tokens: mask_id; starts bool [V], where a token begins a word; ends bool
    [V], where none goes on behind it; plain int64, the tokens that are no special ones, which alone are masked and drawn."""

    mask_id: int
    starts: np.ndarray
    ends: np.ndarray
    plain: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Words":
        """Within a word are tokens with ## in front (WordPiece), else those that begin with a letter or a digit and have no
        space in front (byte-level, SentencePiece), behind one that ends so. ValueError: the vocabulary has no mask token."""
        if tokenizer.mask_id is None:
            raise ValueError("the tokenizer has no mask token; name one among its roles, such as {'mask': '[MASK]'}")
        size, special = len(tokenizer), tokenizer.special_ids
        spelled = [tokenizer.token(id) or "" for id in range(size)]
        if any(token.startswith("##") for token in spelled):
            starts, ends = [not token.startswith("##") for token in spelled], [False] * size
        else:
            written = [tokenizer.token_bytes(id) for id in range(size)]
            starts = [
                id in special or spelled[id].startswith("▁") or not _of_word(w[:1]) for id, w in enumerate(written)
            ]
            ends = [id in special or not _of_word(w[-1:]) for id, w in enumerate(written)]
        plain = [id for id in range(size) if id not in special and spelled[id]]
        return cls(tokenizer.mask_id, np.array(starts), np.array(ends), np.array(plain, dtype=np.int64))


def _of_word(byte: bytes) -> bool:
    return byte.isalnum() or byte >= b"\x80"  # the bytes of a letter that is not ASCII


def generator(seed: int, index: int) -> np.random.Generator:
    """What is drawn for a document."""
    return np.random.Generator(np.random.Philox(key=[seed, index]))


def mask_tokens(
    ids: Sequence[int], words: Words, draw: np.random.Generator, rate: float = 0.15, whole_words: bool = False
) -> Example:
    """Masked language modelling (Devlin et al. 2018, arXiv 1810.04805): of the n plain tokens, round(rate n) are chosen, at
    least one; each is read as the mask token (80 %), as a drawn token (10 %) or as itself (10 %), and is to be said at its own
    place: target[t] is ids[t] where chosen, else IGNORE.

    whole_words: words are chosen, with all of their tokens, as long as they fit into that number. Special tokens are never
    chosen and never drawn.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}; allowed: more than 0, up to 1")
    read = np.array(ids, dtype=np.int64)
    is_plain = np.isin(read, words.plain)
    places, target = is_plain.nonzero()[0], np.full(len(read), IGNORE, dtype=np.int64)
    if len(places):
        count = max(1, round(rate * len(places)))
        chosen = _choose_words(read, is_plain, words, count, draw) if whole_words else draw.permutation(places)[:count]
        target[chosen] = read[chosen]
        fate = draw.random(len(chosen))
        drawn = words.plain[draw.integers(len(words.plain), size=len(chosen))]
        read[chosen] = np.where(fate < 0.8, words.mask_id, np.where(fate < 0.9, drawn, read[chosen]))
    return Example(read, target, (target != IGNORE).astype(np.float32))


def encode_masked(
    tokenizer: Tokenizer,
    words: Words,
    text: str,
    index: int,
    longest: int,
    seed: int = 0,
    rate: float = 0.15,
    whole_words: bool = False,
) -> list[Example]:
    """A document, masked, in windows of at most `longest` tokens, cls in front and sep behind each where there are such roles.
    index: of the document in the stream."""
    first, last = ([id] if id is not None else [] for id in (tokenizer.cls_id, tokenizer.sep_id))
    draw = generator(seed, index)
    return [
        mask_tokens([*first, *part, *last], words, draw, rate, whole_words)
        for part in _windows(tokenizer, text, longest - len(first) - len(last))
    ]


def _windows(tokenizer: Tokenizer, text: str, size: int) -> list[list[int]]:
    if size < 1:
        raise ValueError(f"longest leaves room for {size} tokens of the text; it must be larger")
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def _choose_words(
    ids: np.ndarray, is_plain: np.ndarray, words: Words, count: int, draw: np.random.Generator
) -> np.ndarray:
    starts = words.starts[ids] | ~is_plain
    starts[1:] |= words.ends[ids[:-1]]
    groups = np.split(np.arange(len(ids)), starts.nonzero()[0][1:])
    groups = [g for g in groups if is_plain[g[0]]]
    chosen: list[int] = []
    for i in draw.permutation(len(groups)):
        if len(chosen) + len(groups[i]) <= count or not chosen:
            chosen += groups[i].tolist()
        if len(chosen) >= count:
            break
    return np.array(chosen, dtype=np.int64)


# ----------------------------------------------------------------------------------------------------------------- spans


def sentinel_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens <extra_id_0>, <extra_id_1> ... of T5. ValueError: there are none."""
    found: list[int] = []
    while (id := tokenizer.token_id(f"<extra_id_{len(found)}>")) is not None:
        found.append(id)
    if not found:
        raise ValueError("no <extra_id_0> in the vocabulary; tokenizer.extended(fastllm.data.corrupt.SENTINELS)")
    return found


def corrupt_spans(
    ids: Sequence[int],
    sentinels: Sequence[int],
    eos_id: int,
    draw: np.random.Generator,
    rate: float = 0.15,
    mean: float = 3.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Span corruption (Raffel et al. 2019, arXiv 1910.10683, section 3.1.4): (source, target) token ids, eos behind both.

    Of n tokens round(rate n) are taken out, in round(rate n / mean) spans, at least one; the lengths of the spans, and those of
    what stands between them, are drawn uniformly among all that add up. The source has a sentinel for each span; the target
    says each sentinel and its span, and one more sentinel at the end. ValueError: fewer than two tokens, or fewer sentinels than
    spans and one.
    """
    whole = np.asarray(ids, dtype=np.int64)
    length = len(whole)
    if length < 2 or not 0 < rate < 1 or not mean >= 1:
        raise ValueError(f"{length} tokens, rate={rate}, mean={mean}; allowed: 2 or more, between 0 and 1, 1 or more")
    holes = min(max(round(length * rate), 1), length - 1)
    spans = min(max(round(holes / mean), 1), holes, length - holes)
    if spans + 1 > len(sentinels):
        raise ValueError(f"{spans} spans need {spans + 1} sentinels, there are {len(sentinels)}; cut the text shorter")
    lengths = np.stack((_segments(length - holes, spans, draw), _segments(holes, spans, draw)), 1).ravel()
    parts = np.split(whole, lengths.cumsum()[:-1])  # kept, taken, kept, taken ...
    source, target = [], []
    for i in range(spans):
        source += [parts[2 * i], [sentinels[i]]]
        target += [[sentinels[i]], parts[2 * i + 1]]
    return np.concatenate([*source, [eos_id]]), np.concatenate([*target, [sentinels[spans]], [eos_id]])


def encode_spans(
    tokenizer: Tokenizer,
    sentinels: Sequence[int],
    text: str,
    index: int,
    start_id: int,
    longest: int,
    seed: int = 0,
) -> list[Pair]:
    """A document, its spans corrupted, in windows of at most `longest` tokens of the text; a pair has a tenth more. A last
    window of one token, in which nothing can be taken out, is left. index: of the document in the stream."""
    eos, draw = end_id(tokenizer), generator(seed, index)
    return [
        Pair.of(*corrupt_spans(part, sentinels, eos, draw), start_id)
        for part in _windows(tokenizer, text, longest)
        if len(part) > 1
    ]


def _segments(total: int, count: int, draw: np.random.Generator) -> np.ndarray:
    """`count` lengths of one or more that add up to total."""
    cuts = np.sort(draw.permutation(total - 1)[: count - 1]) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))
