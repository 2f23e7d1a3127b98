"""Multiple choice by log-likelihood: the answer that a model thinks likeliest behind the question.

    score(choice) = log p(choice | prompt) = sum over its tokens of log p(token | prompt, tokens before)

    "sum": the largest score;  "token": score / tokens;  "byte": score / UTF-8 bytes.

The sum is for answers of like length, such as labels and letters; per byte, long and short answers compare whatever the
vocabulary. Of equals the first one is taken.

Prompt and choice are encoded as one text, and a choice's tokens are those behind as many as the prompt has alone; white space
that ends the prompt is the choice's. It is what lm-evaluation-harness does (Gao et al. 2021, `_encode_pair`). But where no
token is left so, as one spans the border, and behind the template of a chat, the prompt stays as it is when the model is asked
and the choice goes on behind it.

The classification of a text is the same thing, its labels the choices: `Instructions.options` makes such records, with solved
examples in front. Choices share their prompt: it is read once, and a choice of one token costs nothing more.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..data.sources import Document
from ..data.tokenizer import Tokenizer
from ..llm import LLM
from .records import Record, Watch, check_fields, check_text, documents, in_groups
from .scorer import Scores
from .text import accuracy, f1

HOW = ("sum", "token", "byte")


@dataclass(frozen=True)
class Question:
    """answer: the place of the right choice, from 0. place: where the record stands, for a message."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    place: str = ""

    @classmethod
    def of(cls, document: Document) -> "Question":
        """Of {"prompt", "choices", "answer"}, the answer a place from 0 or one of the choices. ValueError: another form, fewer
        than two choices, an empty one, one that is there twice, an answer that is none of them."""
        fields, place = check_fields(document, "prompt", "choices", "answer"), document.place
        choices, answer = fields["choices"], fields["answer"]
        texts = isinstance(choices, (list, tuple)) and all(isinstance(c, str) and c for c in choices)
        if not texts or len(choices) < 2 or len(set(choices)) < len(choices):
            raise ValueError(
                f"{place}: choices is {repr(choices)[:80]}; it must be a list of two strings or more, none empty, none twice"
            )
        if isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise ValueError(
                f"{place}: answer is {answer!r}; allowed: 0 to {len(choices) - 1}, or the text of one of the choices"
            )
        return cls(check_text(document, "prompt"), tuple(choices), answer, place)


@dataclass(frozen=True)
class Scored:
    """logprobs: of each choice, the sum over its tokens, in nats."""

    question: Question
    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]

    def best(self, by: str = "sum") -> int:
        """The choice that is taken."""
        if by not in HOW:
            raise ValueError(f"by={by!r}; allowed: {', '.join(HOW)}")
        sizes = {"token": self.tokens, "byte": [len(c.encode()) for c in self.question.choices]}.get(by)
        scores = [p / size for p, size in zip(self.logprobs, sizes, strict=True)] if sizes else self.logprobs
        return max(range(len(scores)), key=scores.__getitem__)

    @property
    def right(self) -> bool:
        """Whether the sum takes the answer."""
        return self.best() == self.question.answer


def score(
    model: Scores,
    records: Iterable[Record | Question],
    *,
    chat: bool = False,
    adapter: str | None = None,
    batch: int = 16,
    watch: Watch | None = None,
) -> list[Scored]:
    """The choices of each question, by an `LLM` or a `Scorer`. records: questions, or what `Question.of` reads.

    chat: the prompt is a user's message, in the template of a chat model. batch: questions that are given to the model together,
    which changes no bit. watch: is told how many are done. ValueError: no question, one that does not fit into the context, a
    choice without a token.
    """
    if chat and not isinstance(model, LLM):
        raise ValueError("chat=True needs an LLM, which has the template; render the prompts before")
    given = [records] if isinstance(records, Mapping) else list(records)
    questions = given if given and isinstance(given[0], Question) else [Question.of(d) for d in documents(given)]
    found = []
    # all are encoded before any is run, so that what is wrong with the last one is said at once
    for group in in_groups([(question, _encode(model, question, chat)) for question in questions], batch):
        texts = [head + tail for _, encoded in group for head, tail in encoded]
        starts = [len(head) for _, encoded in group for head, _ in encoded]
        values = iter(model.logprobs(texts, adapter=adapter, starts=starts))
        for question, encoded in group:
            sums = tuple(math.fsum(next(values)) for _ in encoded)
            found.append(Scored(question, sums, tuple(len(tail) for _, tail in encoded)))
        if watch:
            watch(len(found))
    return found


def _encode(model: Scores, question: Question, chat: bool) -> list[tuple[list[int], list[int]]]:
    """Of each choice, the tokens before it and its own."""
    tokenizer, prompt = model.tokenizer, question.prompt
    if chat:
        head = model.chat_ids([{"role": "user", "content": prompt}])
        encoded = [(head, tokenizer.encode_after(head, choice)) for choice in question.choices]
    else:
        encoded = _encode_pairs(tokenizer, prompt, question.choices)
    for choice, (head, tail) in zip(question.choices, encoded, strict=True):
        if not tail or not head:
            raise ValueError(f"{question.place}: {choice if head else prompt!r} has no token; give a text that has one")
        if len(head) + len(tail) > model.max_model_len:
            raise ValueError(
                f"{question.place}: the prompt has {len(head)} tokens and {choice[:40]!r} {len(tail)}, the context holds "
                f"{model.max_model_len}; shorten the prompt, or show fewer examples"
            )
    return encoded


def _encode_pairs(tokenizer: Tokenizer, prompt: str, choices: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """Behind a prompt in plain text."""
    first = [tokenizer.bos_id] if tokenizer.add_bos else []
    context = prompt.rstrip() or prompt
    before = tokenizer.encode(context, add_special_tokens=False)
    count, encoded = len(before), []
    wholes = tokenizer.encode_batch([prompt + choice for choice in choices], add_special_tokens=False)
    for choice, whole in zip(choices, wholes, strict=True):
        if len(whole) <= count:  # a token spans the border
            whole = before + tokenizer.encode_after(before, prompt[len(context) :] + choice)
        encoded.append((first + whole[:count], whole[count:]))
    return encoded


def summarise(scored: Sequence[Scored]) -> dict[str, float]:
    """Figures: accuracy by each way, the standard error of the sum's, what guessing has; where all questions have the same
    choices, what always taking the commonest answer has, and the macro F1."""
    if not scored:
        raise ValueError("there is no question to sum up")
    answers = [one.question.answer for one in scored]
    found = {how: [one.best(how) for one in scored] for how in HOW}
    right = accuracy(found["sum"], answers)
    figures = {
        "accuracy": right,
        "accuracy_per_token": accuracy(found["token"], answers),
        "accuracy_per_byte": accuracy(found["byte"], answers),
        "standard_error": math.sqrt(right * (1 - right) / len(scored)),
        "chance": math.fsum(1 / len(one.question.choices) for one in scored) / len(scored),
    }
    if len({one.question.choices for one in scored}) == 1:
        figures |= {
            "majority": Counter(answers).most_common(1)[0][1] / len(answers),
            "f1_macro": f1(found["sum"], answers, "macro"),
        }
    return figures
