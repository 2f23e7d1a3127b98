"""Records as instructions: a question in one of several wordings, its answer, and solved examples in front of it.

    make = Instructions(REVIEWS["classify"], tokenizer, longest=512, pool=train, shots=2)
    fields = make({"text": "Effective but too tepid biopic", "label": "negative"}, index)     # {"prompt", "completion"}

Several wordings of a task keep a model from learning one of them by heart (FLAN: Wei et al. 2021, arXiv 2109.01652); solved
examples in front are few-shot prompting (Brown et al. 2020, arXiv 2005.14165).
"""

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .sources import permutation, uniform
from .tokenizer import Tokenizer

SHOT = "\n\n"  # between solved examples


@dataclass(frozen=True)
class Task:
    """Wordings of a question, pairs (prompt, completion), with {field} where a field of the record goes.

    A completion follows its prompt at once: the space or the new line between them belongs to the completion. What stands in
    a field is never read as a wording.
    """

    name: str
    wordings: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        for wording in self.wordings:
            for part in wording:
                for _, field, form, conversion in string.Formatter().parse(part):
                    if field is not None and (not field.isidentifier() or form or conversion):
                        raise ValueError(
                            f"task {self.name}: {{{field}}} in {part!r}; only {{name}} of a field is allowed"
                        )
        if not self.wordings or any(not prompt for prompt, _ in self.wordings):
            raise ValueError(f"task {self.name} needs a wording, and every wording a prompt")

    def render(self, fields: Mapping[str, Any], wording: int = 0) -> tuple[str, str]:
        """(prompt, completion) of a record. ValueError: a field that it has not."""
        try:
            prompt, completion = (part.format_map(fields) for part in self.wordings[wording % len(self.wordings)])
        except KeyError as error:
            raise ValueError(
                f"task {self.name} asks for the field {error}; the record has {', '.join(fields)}"
            ) from None
        return prompt, completion


def choices(options: Iterable[str]) -> str:
    """Options as in "a, b or c", for a prompt that names what may be answered."""
    *most, last = options
    return f"{', '.join(most)} or {last}" if most else last


# Of reviews: {"text", "label"}, and {"text", "summary"} for the summary.
REVIEWS = {
    "classify": Task(
        "classify",
        (
            ("Is this review positive or negative?\n{text}\nAnswer:", " {label}"),
            ("Review: {text}\nSentiment (positive or negative):", " {label}"),
            ("{text}\nDid the author like it? Say positive if so, else negative.\nAnswer:", " {label}"),
        ),
    ),
    "generate": Task(
        "generate",
        (
            ("Write a {label} review.\nReview:", " {text}"),
            ("A review by somebody whose opinion was {label}:", "\n{text}"),
        ),
    ),
    "summarise": Task(
        "summarise",
        (
            ("Sum up this review in one sentence.\n{text}\nSummary:", " {summary}"),
            ("{text}\nIn one sentence, what does the author think?", "\n{summary}"),
        ),
    ),
}
# As in FLAN, {"input", "answer", "options"}: any question with its allowed answers; as in SAMSum, {"dialogue", "summary"}.
FLAN = Task(
    "flan",
    (
        ("{input}\nAnswer with {options}.\nAnswer:", " {answer}"),
        ("{input}\nWhich is right: {options}?", "\n{answer}"),
        ("Choose from {options}.\n{input}\nAnswer:", " {answer}"),
    ),
)
SAMSUM = Task(
    "samsum",
    (
        ("{dialogue}\nWhat was that conversation about?", "\n{summary}"),
        ("Sum up this conversation.\n{dialogue}\nSummary:", " {summary}"),
        ("Here is a talk:\n{dialogue}\nWrite a short summary of it.", "\n{summary}"),
    ),
)


class Instructions:
    """Records -> {"prompt", "completion"}, with up to `shots` solved examples out of `pool` in front, as many as fit.

    shots: how many are wanted. longest: tokens of prompt and completion together, eos included. Which wording and which
    examples a record gets depends on (seed, index). All shots of a prompt have the wording of its question, and none is the
    question itself.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        longest: int,
        pool: Sequence[Mapping[str, Any]] = (),
        shots: int = 0,
        seed: int = 0,
    ):
        if shots < 0 or longest < 2 or (shots and not pool):
            raise ValueError(
                f"shots={shots}, longest={longest}, {len(pool)} in the pool; shots need a pool, longest 2 or more"
            )
        self.task, self.tokenizer, self.longest, self.pool = task, tokenizer, longest, pool
        self.shots, self.seed = shots, seed

    def __call__(self, fields: Mapping[str, Any], index: int = 0) -> dict[str, str]:
        """ValueError: a question that does not fit by itself, with its number of tokens."""
        wording = self._wording(index)
        prompt, completion = self.task.render(fields, wording)
        return {"prompt": self._with_examples(fields, prompt, [completion], index), "completion": completion}

    def options(self, fields: Mapping[str, Any], field: str, values: Sequence[Any], index: int = 0) -> dict[str, Any]:
        """{"prompt", "choices", "answer"}: what follows the prompt for each value of a field, and the place of the record's own.

        The prompt is the same whichever is right. ValueError: the record's value is none of them, a wording that tells it in the
        prompt, or a question that does not fit.
        """
        if (value := fields.get(field)) not in values:
            raise ValueError(f"{field} is {value!r}; allowed: {', '.join(map(str, values))}")
        rendered = [self.task.render({**fields, field: value}, self._wording(index)) for value in values]
        (prompt, *others), choices = dict.fromkeys(prompt for prompt, _ in rendered), [text for _, text in rendered]
        if others:
            raise ValueError(f"task {self.task.name}: a prompt tells the field {field!r}, which is asked for")
        prompt = self._with_examples(fields, prompt, choices, index)
        return {"prompt": prompt, "choices": choices, "answer": list(values).index(value)}

    def _wording(self, index: int) -> int:
        return int(uniform("wording", self.seed, index) * len(self.task.wordings))

    def _with_examples(self, fields: Mapping[str, Any], prompt: str, completions: Sequence[str], index: int) -> str:
        """The prompt behind as many examples as leave room for the longest completion."""
        size = max(self._sizes([prompt + completion for completion in completions]))
        room = self.longest - size - 2  # bos, eos
        if room < 0:
            raise ValueError(f"the question and its answer have {size + 2} tokens, longest={self.longest}")
        shown = self._examples(fields, self._wording(index), index)
        for example, size in zip(shown, self._sizes(shown), strict=True):
            if size > room:
                continue  # a shorter one may fit
            room -= size
            prompt = example + prompt
        return prompt

    def _examples(self, fields: Mapping[str, Any], wording: int, index: int) -> list[str]:
        found: list[str] = []
        for turn in range(4 * self.shots):  # some may be the question itself, or there twice
            if len(found) == self.shots:
                break
            other = self.pool[int(uniform("shot", self.seed, index, turn) * len(self.pool))]
            example = "".join(self.task.render(other, wording)) + SHOT
            if other != fields and example not in found:
                found.append(example)
        return found

    def _sizes(self, texts: list[str]) -> list[int]:
        """Tokens of each, one more for a border that is cut in another way when texts are joined."""
        return [len(ids) + 1 for ids in self.tokenizer.encode_batch(texts, add_special_tokens=False)]


# -------------------------------------------------------------------------------------------------------------- reviews


def read_reviews(path: Path, neutral: float = 0.5) -> list[dict[str, Any]]:
    """A table of rated sentences (id, mean rating in -4 .. 4, text, by tab; Hutto and Gilbert 2014) as records: text, rating,
    label, id.

    label: "positive" above `neutral`, "negative" below -neutral; what lies between is left out, as people do not agree on it.
    ValueError: a line of another form, by its number.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        parts = line.split("\t")
        try:
            id, rating, text = parts[0], float(parts[1]), parts[2].strip()
        except (IndexError, ValueError):
            raise ValueError(f"{path}:{number}: wanted id, rating and text by tab, got {line[:60]!r}") from None
        if text and abs(rating) > neutral:
            records.append(
                {"text": text, "label": "positive" if rating > 0 else "negative", "rating": rating, "id": id}
            )
    return records


def summaries(records: Iterable[Mapping[str, Any]], sentences: int = 3) -> list[dict[str, str]]:
    """Whole reviews with a summary, from sentences with ids "review_sentence": the sentence that is most decided in the
    direction of the review's mean. A heuristic: nobody wrote these summaries. Reviews of fewer sentences are left out."""
    reviews: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        reviews.setdefault(str(record["id"]).split("_")[0], []).append(record)
    made = []
    for parts in reviews.values():
        if len(parts) >= sentences:
            sign = 1 if sum(part["rating"] for part in parts) >= 0 else -1
            best = max(parts, key=lambda part: sign * part["rating"])
            made.append({"text": " ".join(part["text"] for part in parts), "summary": best["text"]})
    return made


def balanced(records: Sequence[Mapping[str, Any]], field: str = "label", seed: int = 0) -> list[Mapping[str, Any]]:
    """As many of each label, drawn."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for i in permutation(len(records), "balanced", seed):
        groups.setdefault(records[i][field], []).append(records[i])
    count = min(map(len, groups.values()), default=0)
    return [record for group in groups.values() for record in group[:count]]
