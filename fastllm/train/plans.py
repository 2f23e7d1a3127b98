"""How each class of model is trained: what a record becomes, which loss, what is written on the way, what spoils it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..data.batch import IGNORE, Batches, Example, collate, encode
from ..data.chat import ChatTemplate
from ..data.corrupt import Words, encode_masked, encode_spans, sentinel_ids
from ..data.lint import Finding, check_labels, check_splits, check_tokenizer, lint
from ..data.pairs import Pair, PairBatches, collate_pairs, encode_pair
from ..data.sources import Document, Skipped
from ..data.tokenizer import Tokenizer
from ..decode.beam import BeamParams
from ..decode.text2text import Text2Text
from ..llm import LLM
from ..models.decoder import Decoder
from ..models.encoder import Encoder
from ..models.seq2seq import Seq2Seq
from ..models.text import check_ids, check_vocab
from ..sampling_params import SamplingParams
from .objective import masked_loss, next_token_loss, pair_loss
from .stage import Plan, StageOptions, texts_of

OPENING = 40  # characters of a text that a sample goes on from
FEW_LABELS = 20  # completions that are so few are labels

Records = Mapping[str, list[Mapping[str, Any]]]


def plan_of(
    options: StageOptions,
    model: nn.Module,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    text: Path,
    mask_rate: float = 0.15,
    whole_words: bool = False,
) -> Plan:
    """text: where tokenizer and template are from. The last two are an encoder's. ValueError: a tokenizer that does not fit the
    model, or lacks a token that its class needs."""
    vocab = model.config.vocab
    check_vocab(tokenizer, vocab, text)
    if isinstance(model, Decoder):
        plan = _decoder(options, model, tokenizer, template, text)
    elif isinstance(model, Encoder):
        plan = _encoder(options, model, tokenizer, text, mask_rate, whole_words)
    elif isinstance(model, Seq2Seq):
        plan = _seq2seq(options, model, tokenizer, text)
    else:
        raise TypeError(f"{type(model).__name__} is not a Decoder, an Encoder or a Seq2Seq")
    made = plan.encode if len(tokenizer) <= vocab else _within(vocab, tokenizer, plan.encode)
    return dataclasses.replace(plan, encode=_leaving_out(options, made))


def _leaving_out(options: StageOptions, encode: Callable[[Document, int], list[Any]]) -> Callable[..., list[Any]]:
    """The same; a record that it cannot encode is left out with a warning, or the ValueError says that it may be. One whose
    answer is cut away as a whole is left out with a warning in any case."""
    skipped, places = Skipped(), set[str]()  # a record is read more than once

    def leave_out(document: Document, what: str) -> list[Any]:
        if document.place not in places:
            places.add(document.place)
            skipped.say(document.place, what)
        return []

    def checked(document: Document, index: int) -> list[Any]:
        try:
            made = encode(document, index)
        except ValueError as error:
            what = str(error).removeprefix(f"{document.place}: ")
            if options.bad == "raise":
                raise ValueError(f"{what}; or give bad=skip to leave such records out") from error
            return leave_out(document, what)
        if not made and document.fields.keys() & {"prompt", "messages"}:
            return leave_out(document, f"max_length={options.max_length} tokens leave no room for an answer")
        return made

    return checked


def _within(vocab: int, tokenizer: Tokenizer, encode: Callable[[Document, int], list[Any]]) -> Callable[..., list[Any]]:
    """The same, but ValueError for a token that the model has no row for: on a GPU nothing else would say so."""

    def checked(document: Document, index: int) -> list[Any]:
        made = encode(document, index)
        for one in made:
            example = one.target if isinstance(one, Pair) else one
            for ids in (one.source if isinstance(one, Pair) else (), example.ids, example.target):
                check_ids((id for id in map(int, ids) if id != IGNORE), tokenizer, vocab)
        return made

    return checked


def _decoder(
    options: StageOptions, model: Decoder, tokenizer: Tokenizer, template: ChatTemplate | None, text: Path
) -> Plan:
    """Next tokens of texts, of completions, or of the assistant's turns, whatever a record is."""

    def opening(fields: Mapping[str, Any]) -> Any:
        messages, prompt = fields.get("messages"), fields.get("prompt")
        if isinstance(messages, list):
            return messages[: max((i for i, m in enumerate(messages) if m.get("role") == "assistant"), default=0)]
        return prompt if isinstance(prompt, (str, list)) else _beginning(fields)

    def size(fields: Mapping[str, Any]) -> int | None:
        text = fields.get("text")
        if not isinstance(text, str) or fields.keys() & {"prompt", "messages"}:
            return None
        first = [] if tokenizer.add_bos else tokenizer.encode(text, add_special_tokens=False)[:1]  # context alone
        return len(text.encode()) - sum(len(tokenizer.token_bytes(id)) for id in first)

    def write(model: Decoder, prompts: list[Any]) -> list[str]:
        llm = LLM.of(model, tokenizer, template, max_model_len=min(options.max_length, model.config.max_position))
        ids = [tokenizer.encode(p) if isinstance(p, str) else llm.chat_ids(p) for p in prompts]
        count = min(options.sample_tokens, llm.max_model_len - 1)
        params = SamplingParams(max_new_tokens=count, temperature=0.8, top_p=0.95, seed=options.seed)
        return [out.text for out in llm.generate([each[count - llm.max_model_len :] for each in ids], params)]

    def check(examples: Sequence[Example], batches: list[Any], records: Records) -> list[Finding]:
        talks = any(isinstance(r.get("messages"), list) for r in records["train"])
        return lint(
            tokenizer, examples, vocab=model.config.vocab, template=template if talks else None, batches=batches,
            splits=_texts(records), labelled=_labelled(records),
        )  # fmt: skip

    return Plan(
        model=model,
        loss=next_token_loss,
        batches=Batches,
        collate=collate,
        encode=lambda document, index: encode(tokenizer, document.fields, template, options.max_length),
        text=text,
        lint=check,
        opening=opening,
        write=write,
        size=size,
    )


def _encoder(
    options: StageOptions, model: Encoder, tokenizer: Tokenizer, text: Path, rate: float, whole_words: bool
) -> Plan:
    """Masked tokens of texts, drawn anew in each pass over them."""
    words = Words.of(tokenizer)

    def masked(document: Document, index: int) -> list[Example]:
        return encode_masked(
            tokenizer, words, document.text, index, options.max_length, options.seed, rate, whole_words
        )

    return Plan(
        model=model,
        loss=masked_loss,
        batches=Batches,
        collate=collate,
        encode=masked,
        text=text,
        lint=lambda examples, batches, records: [*check_tokenizer(tokenizer), *check_splits(_texts(records))],
    )


def _seq2seq(options: StageOptions, model: Seq2Seq, tokenizer: Tokenizer, text: Path) -> Plan:
    """Corrupted spans of texts; of records with two sides, the second from the first. ValueError: too small batches."""
    start, sides = model.config.start_id, 2
    if options.tokens < sides * options.max_length:
        raise ValueError(
            f"tokens is {options.tokens}; a source and a target of max_length={options.max_length} tokens each need "
            f"{sides * options.max_length}: give more, or a smaller max_length"
        )

    def pairs(document: Document, index: int) -> list[Pair]:
        if "text" in document.fields:
            holes = sentinel_ids(tokenizer)
            return encode_spans(tokenizer, holes, document.text, index, start, options.max_length, options.seed)
        return encode_pair(tokenizer, document.fields, start, options.max_length)

    def opening(fields: Mapping[str, Any]) -> str:
        side = fields.get("source", fields.get("prompt"))
        return side if isinstance(side, str) else f"{_beginning(fields)}{tokenizer.token(sentinel_ids(tokenizer)[0])}"

    def write(model: Seq2Seq, prompts: list[str]) -> list[str]:
        encoded = tokenizer.encode_batch(prompts, add_special_tokens=False, parse_special=True)
        sources = [ids[: options.max_length - 1] for ids in encoded]
        found = Text2Text(model, tokenizer).generate(sources, BeamParams(max_new_tokens=options.sample_tokens))
        return [answers[0].text for answers in found]

    def check(pairs: Sequence[Pair], batches: list[Any], records: Records) -> list[Finding]:
        return [*check_tokenizer(tokenizer), *check_splits(_texts(records)), *check_labels(_labelled(records))]

    return Plan(
        model=model, loss=pair_loss, batches=PairBatches, collate=collate_pairs, encode=pairs, text=text, lint=check,
        opening=opening, write=write, sides=sides,
    )  # fmt: skip


def _beginning(fields: Mapping[str, Any]) -> str:
    """Whole words of a text."""
    beginning = str(fields.get("text", ""))[:OPENING]
    return beginning.rsplit(" ", 1)[0] or beginning


def _texts(records: Records) -> dict[str, list[str]]:
    return {split: [texts_of(fields) for fields in found] for split, found in records.items()}


def _labelled(records: Records) -> list[tuple[str, str]]:
    """(prompt, completion) of the training data, where there are so few completions that they are labels."""
    sides = [(r.get("prompt", r.get("source")), r.get("completion", r.get("target"))) for r in records["train"]]
    pairs = [pair for pair in sides if all(isinstance(side, str) for side in pair)]
    return pairs if len({label for _, label in pairs}) <= FEW_LABELS else []
