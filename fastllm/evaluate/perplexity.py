"""Perplexity of texts of any length, bits per byte, and the pseudo-perplexity of masked language models.

With nats = -sum log p over the n tokens that are scored, and b the UTF-8 bytes of the text that they stand for,

    perplexity = exp(nats / n)              bits per byte = nats / (b ln 2).

The perplexity of two models can be compared where they have one vocabulary; bits per byte always.

What is scored: every token of a text but the first, which is context alone where the vocabulary puts no bos in front; then its
bytes do not count either. A text longer than a window goes through the model in windows that overlap: each begins `stride`
tokens after the one before, and scores the tokens that no earlier one has, so each token is scored once, and with
window - stride tokens before it at least (but for the first window, which scores all of its own). The figure depends on the
window: state it beside.

Masked: log p(token | all others), by masking each token of a text in turn (Salazar et al. 2020, arXiv 1910.14659): its
pseudo-perplexity exp(nats / n) ranks texts and models of one vocabulary. It is no probability of a text, nor comparable to the
perplexity of a decoder.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..data.packed import in_parts
from ..data.tokenizer import Tokenizer
from ..decode.score import target_logprobs
from ..models.encoder import Encoder
from .records import Record, Watch, documents, in_groups
from .scorer import ROWS, Scores


@dataclass(frozen=True)
class Perplexity:
    """nats: -sum log p of `tokens` tokens, which stand for `bytes` bytes of `texts` texts."""

    nats: float
    tokens: int
    bytes: int
    texts: int

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens); inf where a token has no probability."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """nats / (bytes ln 2)"""
        return self.nats / math.log(2) / self.bytes


def windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, stop, first): the tokens [begin, stop) of `count` go through the model, and [first, stop) are scored. Every token
    but 0 is scored once. ValueError: a window below 2, a stride outside 1 to window - 1."""
    if window < 2 or not 1 <= stride < window:
        raise ValueError(
            f"window={window}, stride={stride}; allowed: a window of 2 or more, a stride of 1 to window - 1, as a token "
            "needs another one before it"
        )
    begin, first = 0, 1
    while first < count:
        stop = min(begin + window, count)
        yield begin, stop, first
        begin, first = begin + stride, stop


def perplexity(
    model: Scores,
    texts: Iterable[Record],
    *,
    window: int | None = None,
    stride: int | None = None,
    adapter: str | None = None,
    batch: int = 16,
    watch: Watch | None = None,
) -> Perplexity:
    """Of all texts together, by an `LLM` or a `Scorer`. texts: strings, or records with a "text".

    window: tokens that the model sees at once, None: as many as it can; stride: None takes half of them. batch: texts that are
    given to the model together, which changes no bit. watch: is told how many are done. ValueError: no text, none of two tokens,
    a window that the model has not.
    """
    window = model.max_model_len if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    if window > model.max_model_len:
        raise ValueError(f"window={window}; allowed: 2 to {model.max_model_len}, as the model has no more positions")
    list(windows(2, window, stride))  # checks both
    tokenizer = model.tokenizer
    head = [tokenizer.bos_id] if tokenizer.add_bos else []
    nats, tokens, size, count = [], 0, 0, 0
    for group in in_groups((document.text for document in documents(texts)), batch):
        encoded = [head + ids for ids in tokenizer.encode_batch(group, add_special_tokens=False)]
        cut = [
            (ids[begin:stop], first - begin)
            for ids in encoded
            for begin, stop, first in windows(len(ids), window, stride)
        ]
        if cut:
            values = model.logprobs([ids for ids, _ in cut], adapter=adapter, starts=[start for _, start in cut])
            nats += [-value for part in values for value in part]
        tokens += sum(max(len(ids) - 1, 0) for ids in encoded)
        size += sum(
            len(text.encode()) - _context_bytes(ids, head, tokenizer) for text, ids in zip(group, encoded, strict=True)
        )
        count += len(group)
        if watch:
            watch(count)
    if not tokens:
        raise ValueError(f"{count} texts, and none has two tokens; the first is context alone, so give longer texts")
    return Perplexity(math.fsum(nats), tokens, size, count)  # fsum: rounded once, in whatever order


def _context_bytes(ids: list[int], head: list[int], tokenizer: Tokenizer) -> int:
    """Of the first token, where it is part of the text."""
    return len(tokenizer.token_bytes(ids[0])) if ids and not head else 0


def pseudo_perplexity(
    model: Encoder, tokenizer: Tokenizer, texts: Iterable[Record], *, window: int | None = None, rows: int = ROWS
) -> Perplexity:
    """Of all texts together: n forwards over a text of n tokens, as many at once as have `rows` tokens.

    window: tokens of a piece, with those that the vocabulary puts around it (None: as many as the model has positions); a longer
    text is cut into pieces, each by itself. ValueError: a model without a masked head, a vocabulary without a mask, no text.
    """
    if model.config.head != "mlm":
        raise ValueError(f"the encoder has head={model.config.head!r}; pseudo-perplexity needs one with head='mlm'")
    if tokenizer.mask_id is None:
        raise ValueError(
            "the vocabulary names no mask, which stands for the token that is asked for; name one in its roles"
        )
    around = tokenizer.encode("")
    head, tail = around[: (len(around) + 1) // 2], around[(len(around) + 1) // 2 :]
    room = (model.config.max_position if window is None else window) - len(around)
    if not 1 <= room <= model.config.max_position - len(around):
        raise ValueError(f"window={window}; allowed: {len(around) + 1} to {model.config.max_position}")
    size, count = 0, 0

    def masked() -> Iterator[tuple[list[int], int, int]]:
        """(ids with a mask, its place, what stands there)"""
        nonlocal size, count
        for document in documents(texts):
            ids = tokenizer.encode(document.text, add_special_tokens=False)
            count, size = count + 1, size + len(document.text.encode())
            for begin in range(0, len(ids), room):
                piece = [*head, *ids[begin : begin + room], *tail]
                for place in range(len(head), len(piece) - len(tail)):
                    yield [*piece[:place], tokenizer.mask_id, *piece[place + 1 :]], place, piece[place]

    nats: list[float] = []
    with torch.inference_mode():
        for part in in_parts(masked(), rows, size=lambda one: len(one[0])):
            batch = model.pack_lists([ids for ids, _, _ in part])
            wanted = batch.cu[:-1].long() + torch.tensor([place for _, place, _ in part], device=batch.cu.device)
            targets = torch.tensor([target for *_, target in part], device=batch.cu.device)
            nats += target_logprobs(model.head, model.packed_hidden(batch)[wanted], targets).neg().tolist()
    if not nats:
        raise ValueError(f"{count} texts, and none has a token; give texts that are not empty")
    return Perplexity(math.fsum(nats), len(nats), size, count)
