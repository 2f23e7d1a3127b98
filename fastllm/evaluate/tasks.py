"""What `fastllm eval` runs: a task on a model and documents, the figures, and what they come from, record by record."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from .. import hub, models
from ..data.instruct import Instructions, Task, choices
from ..data.pairs import FORMS
from ..data.sources import Document
from ..decode.beam import BeamParams
from ..decode.text2text import Answer, Text2Text
from ..llm import LLM, Completion
from ..sampling_params import SamplingParams
from . import choice, text
from .perplexity import perplexity, pseudo_perplexity
from .records import Record, Watch, check_fields, check_text, documents, in_groups

TASKS = ("perplexity", "choice", "classify", "generate")
READ_BY = {  # the tasks that have an option, of those that not all have
    "window": TASKS[:1],
    "stride": TASKS[:1],
    "chat": TASKS[1:],
    "max_new_tokens": TASKS[3:],
    "stop": TASKS[3:],
    "beams": TASKS[3:],
}
PROMPT = "{text}\nWhich is it: {options}?\nAnswer:"


@dataclass(frozen=True, kw_only=True)
class Options:
    """limit: records from the beginning, None: all. window, stride: of perplexity. shots: solved examples in front of each
    record that is classified, drawn by seed out of the records of `pool`, with {"text", "label"}. prompt: the wording of that
    question, with {text} and {options}; the label follows, behind a space. These three are of such records alone.
    max_new_tokens, stop: of a text that is generated. beams: of an encoder-decoder. chat: the prompt is a user's message. batch:
    records that are given to the model together."""

    limit: int | None = None
    window: int | None = None
    stride: int | None = None
    shots: int = 0
    pool: Iterable[Record] = ()
    prompt: str = PROMPT
    seed: int = 0
    max_new_tokens: int = 64
    stop: Sequence[str] = ()
    beams: int = 1
    chat: bool = False
    adapter: str | None = None
    batch: int = 16

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}; allowed: 1 or more")


@dataclass(frozen=True)
class Report:
    """figures: by name. records: what was found for each record, as plain fields. count: of records. seconds: of the task."""

    task: str
    figures: dict[str, float | int | str]
    count: int
    seconds: float
    records: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> str:
        """The figures, a line each."""
        rows = {"records": self.count, **self.figures, "seconds": self.seconds}
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {_shown(value)}" for name, value in rows.items())


def _shown(value: float | int | str) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def load(name: str, *, quantize: str | None = None, adapter: str | None = None, **limits: Any) -> LLM | Text2Text:
    """The model of a name: an LLM with these limits and an adapter, named by its path; or the encoder-decoder that a folder
    holds, which takes neither. ValueError: it was given one."""
    path = hub.resolve(name)
    if models.kind_of(path) != "Seq2Seq":
        llm = LLM(path, quantize=quantize, **limits)
        if adapter:
            llm.load_adapter(adapter, adapter)
        return llm
    given = {key: value for key, value in (limits | {"adapter": adapter}).items() if value not in (None, "auto")}
    if given:
        key, value = next(iter(given.items()))
        raise ValueError(
            f"{key}={value!r}; {path} is an encoder-decoder, which runs in float32 on the CPU, with the threads that "
            "OMP_NUM_THREADS says: leave it out"
        )
    return Text2Text.load(path, quantize=quantize)


def run(
    llm: LLM | Text2Text,
    task: str,
    records: Iterable[Record],
    options: Options | None = None,
    watch: Watch | None = None,
) -> Report:
    """Evaluates a model on records: of "perplexity" {"text"}, of "choice" {"prompt", "choices", "answer"}, of "classify" the same
    with one list of choices for all, or {"text", "label"}, of "generate" {"prompt", "completion"} or {"source", "target"}.

    An encoder with a masked head has pseudo-perplexity, an encoder-decoder "generate" alone. watch: is told how many are done.
    ValueError: another task, one that the model has not, or a record of another form, by its place.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; allowed: {', '.join(TASKS)}")
    options = Options() if options is None else options
    unset = Options()
    for name, has in READ_BY.items():
        value = getattr(options, name)
        if task not in has and value != getattr(unset, name) and value != []:
            raise ValueError(f"{name}={value!r}; the task {task!r} has none: leave it out, or give {' or '.join(has)}")
    if isinstance(llm, Text2Text):
        if task != "generate":
            raise ValueError(f"task is {task!r}; an encoder-decoder has 'generate' alone")
        wrong = [name for name in ("chat", "stop") if getattr(options, name)]
        if wrong:
            raise ValueError(f"{wrong[0]}={getattr(options, wrong[0])!r}; an encoder-decoder has none")
    elif options.beams != 1:
        raise ValueError(f"beams={options.beams}; an encoder-decoder has beams, a decoder is greedy: 1")
    if task != "classify":
        _check_worded(options, f"the task {task!r}")
    given = islice(documents(records), options.limit)
    began = time.perf_counter()
    figures, found, count = _RUN[task](llm, given, options, watch)
    return Report(task, figures, count, time.perf_counter() - began, found)


def _check_worded(options: Options, who: str) -> None:
    """ValueError: an option that makes a question of a record, where the record is one, or has none."""
    for name, unset in (("shots", 0), ("pool", ()), ("prompt", PROMPT)):
        value = getattr(options, name)
        if value not in (unset, []):
            shown = name if name == "pool" else f"{name}={value!r}"
            raise ValueError(
                f'{shown}; {who} has none: leave it out, or give the task \'classify\' records {{"text", "label"}}'
            )


Found = tuple[dict[str, Any], list[dict[str, Any]], int]


def _perplexity(llm: LLM, given: Iterable[Document], options: Options, watch: Watch | None) -> Found:
    if llm.encoder:
        if options.stride is not None:
            raise ValueError(f"stride={options.stride}; an encoder's windows stand side by side: leave it out")
        what, score = "pseudo_perplexity", pseudo_perplexity(llm.model, llm.tokenizer, given, window=options.window)
        figures = {what: score.perplexity}
    else:
        score = perplexity(
            llm, given, window=options.window, stride=options.stride, adapter=options.adapter, batch=options.batch,
            watch=watch,
        )  # fmt: skip
        figures = {"perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
    return figures | {"nats": score.nats, "tokens": score.tokens, "bytes": score.bytes}, [], score.texts


def _choice(llm: LLM, given: Iterable[Document], options: Options, watch: Watch | None) -> Found:
    scored = choice.score(llm, given, chat=options.chat, adapter=options.adapter, batch=options.batch, watch=watch)
    found = [
        {"place": s.question.place, "answer": s.question.answer, "found": s.best(), "logprobs": list(s.logprobs)}
        for s in scored
    ]
    return choice.summarise(scored), found, len(scored)


def _classify(llm: LLM, given: Iterable[Document], options: Options, watch: Watch | None) -> Found:
    records = list(given)
    if "label" in records[0].fields:
        records = labelled(llm, records, options)
    else:
        _check_worded(options, "a record with choices")
    one = choice.Question.of(records[0])
    for document in records:
        if tuple(document.fields.get("choices", ())) != one.choices:
            raise ValueError(
                f"{document.place}: the choices are others than those of {one.place}, {', '.join(one.choices)}; records that are "
                "classified have the same labels, so give the task 'choice'"
            )
    return _choice(llm, records, options, watch)


def labelled(llm: LLM, records: Sequence[Document], options: Options) -> list[Document]:
    """Records {"text", "label"} as questions with solved examples in front; the labels are all that occur, sorted.
    ValueError: another form, fewer than two labels, or a question that does not fit, by its place."""
    for document in records:
        check_fields(document, "text", "label"), check_text(document, "text"), check_text(document, "label")
    pool = [check_fields(document, "text", "label") for document in documents(options.pool)] if options.shots else []
    labels = sorted({fields["label"] for fields in (*pool, *(document.fields for document in records))})
    if len(labels) < 2:
        raise ValueError(f"all {len(records)} records have the label {labels[0]!r}; two labels or more are needed")
    named = {"options": choices(labels)}
    make = Instructions(
        Task("classify", ((options.prompt, " {label}"),)), llm.tokenizer, llm.max_model_len,
        [fields | named for fields in pool], options.shots, options.seed,
    )  # fmt: skip
    made = []
    for index, document in enumerate(records):
        try:
            asked = make.options(document.fields | named, "label", labels, index)
        except ValueError as error:
            raise ValueError(f"{document.place}: {error}") from error
        made.append(Document(asked, document.file, document.number))
    return made


def _generate(llm: LLM | Text2Text, given: Iterable[Document], options: Options, watch: Watch | None) -> Found:
    text.require()
    records = list(given)
    names = next((form for form in FORMS if form[0] in records[0].fields), FORMS[-1])
    for document in records:
        check_fields(document, *names)
        check_text(document, names[0]), check_text(document, names[1])
    prompts, wanted = ([document.fields[name] for document in records] for name in names)
    outputs = []
    for output in (_answers if isinstance(llm, Text2Text) else _completions)(llm, prompts, options):
        outputs.append(output)
        if watch and (len(outputs) % (8 * options.batch) == 0 or len(outputs) == len(prompts)):
            watch(len(outputs))
    texts, wanted = [out.text.strip() for out in outputs], [one.strip() for one in wanted]
    found = [
        {"place": document.place, "text": out.text, "tokens": len(out.token_ids), "finish_reason": out.finish_reason}
        for document, out in zip(records, outputs, strict=True)
    ]
    score, signature = text.bleu(texts, wanted)
    figures = {
        "exact_match": text.exact_match(texts, wanted),
        "exact_match_normalised": text.exact_match(texts, wanted, normalise=True),
        "bleu": score,
        **text.rouge(texts, wanted),
        "distinct1": text.distinct(texts, 1),
        "distinct2": text.distinct(texts, 2),
        "finished": sum(out.finish_reason == "stop" for out in outputs) / len(outputs),
        "bleu_signature": signature,
    }
    return figures, found, len(records)


def _completions(llm: LLM, prompts: list[str], options: Options) -> Iterator[Completion]:
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens, temperature=0.0, stop=tuple(options.stop), adapter=options.adapter
    )
    asked = [llm.chat_ids([{"role": "user", "content": prompt}]) for prompt in prompts] if options.chat else prompts
    for group in in_groups(asked, 8 * options.batch):  # more than run together, so that none waits for the longest
        for output in llm.generate(group, params):
            yield output.outputs[0]


def _answers(model: Text2Text, sources: list[str], options: Options) -> Iterator[Answer]:
    params = BeamParams(max_new_tokens=options.max_new_tokens, beams=options.beams)
    for group in in_groups(sources, 8 * options.batch):
        for answers in model.generate(group, params):
            yield answers[0]


_RUN = {"perplexity": _perplexity, "choice": _choice, "classify": _classify, "generate": _generate}
