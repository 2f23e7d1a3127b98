"""Texts to texts by an encoder-decoder: translations, titles, summaries, spans for the holes of a text."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .. import hub, models
from ..data.batch import end_id
from ..data.packed import in_parts
from ..data.tokenizer import Tokenizer
from ..models.layers import pack_weights
from ..models.seq2seq import Seq2Seq
from ..models.text import check_ids, check_vocab, read_text
from .beam import BeamParams, Hypothesis, generate

TOKENS = 4096  # of sources that are decoded together


@dataclass(frozen=True)
class Answer(Hypothesis):
    """A hypothesis with its text, special tokens left out."""

    text: str = ""


class Text2Text:
    """An encoder-decoder of text with its tokenizer. ValueError: a model that reads audio, or a tokenizer that does not fit."""

    def __init__(self, model: Seq2Seq, tokenizer: Tokenizer):
        if not isinstance(model, Seq2Seq):
            raise TypeError(f"Text2Text: the model is a {type(model).__name__}; it must be a Seq2Seq")
        if model.config.bins:
            raise ValueError(
                "Text2Text: the model reads audio; give features to model.encode, and that to beam.generate"
            )
        check_vocab(tokenizer, model.config.vocab, "Text2Text")
        self.model, self.tokenizer, self.eos_id = model, tokenizer, end_id(tokenizer)

    @classmethod
    def load(cls, name: str | os.PathLike, *, quantize: str | None = None, revision: str | None = None) -> "Text2Text":
        """A folder or a Hub id; weights are packed for a CPU, quantised with "int8" or "int4". Errors as of models.load."""
        path = hub.resolve(name, revision=revision)
        model = models.load(path)
        if not isinstance(model, Seq2Seq):
            raise ValueError(f"{path} holds a {type(model).__name__}, no encoder-decoder; LLM runs decoders")
        return cls(pack_weights(model, quantize), read_text(path)[0])

    def generate(
        self,
        sources: str | Sequence[str | Sequence[int]],
        params: BeamParams | None = None,
        parse_special: bool = False,
    ) -> list[list[Answer]]:
        """The best answers to each source, best first; greedy, where params does not ask for beams.

        sources: texts, or token ids without the end. parse_special: read special tokens that are written in a text, such as
        <extra_id_0>, as such. ValueError: a source with more tokens, its end included, than the model has positions,
        or with an id that it has not.
        """
        return list(self.stream([sources] if isinstance(sources, str) else sources, params, parse_special))

    def stream(
        self, sources: Sequence[str | Sequence[int]], params: BeamParams | None = None, parse_special: bool = False
    ) -> Iterator[list[Answer]]:
        """`generate`, source by source: some go through the model together, and come when all of them are done."""
        for part in in_parts(self._ids(sources, parse_special), TOKENS):
            with torch.inference_mode():
                memory = self.model.encode_lists(part)
            for found in generate(self.model, memory, params=params):
                yield [Answer(h.token_ids, h.score, h.finish_reason, self.tokenizer.decode(h.token_ids)) for h in found]

    def _ids(self, sources: Sequence[str | Sequence[int]], parse_special: bool) -> list[list[int]]:
        """With their ends."""
        texts = [source for source in sources if isinstance(source, str)]
        encoded = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False, parse_special=parse_special))
        ids = [[*(next(encoded) if isinstance(s, str) else s), self.eos_id] for s in sources]
        limit = None if self.model.config.position == "relative" else self.model.config.source_limit
        for index, each in enumerate(ids):
            if limit is not None and len(each) > limit:
                raise ValueError(f"source {index} has {len(each)} tokens, the model {limit} positions; shorten it")
            check_ids(each, self.tokenizer, self.model.config.vocab, f"source {index}: ")
        return ids
