"""Records of others' question files, as the fields that are evaluated and trained on; each to be given to
`Documents(path, apply=...)`:

    lettered    {"question" with its choices in lines "A. ...", "answer": "B"}                  -> {"prompt", "choices", "answer"}
    headline    {"input": [..., {"role": "user", "content": headline}], "ideal": "1" or "0"}    -> {"text", "label"}

The forms are those of files in OpenAI's evals (sandbagging/samples-all-large.jsonl, 1,000 questions of MMLU: Hendrycks et al.
2020, arXiv 2009.03300; sarcasm/samples.jsonl, 28,614 headlines: Misra and Arora 2019, arXiv 1908.07414).
"""

import re
from collections.abc import Mapping
from typing import Any

from .instruct import Task

HEADLINES = Task(
    "headlines",
    (
        ("Is this headline sarcastic or serious?\n{text}\nAnswer:", " {label}"),
        ("Headline: {text}\nTone (sarcastic or serious):", " {label}"),
    ),
)
LABELS = {"0": "serious", "1": "sarcastic"}
_LETTER = re.compile(r"^([A-Z])[.:)] ", re.MULTILINE)


def lettered(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The question as it stands, the letters as its choices. ValueError: another form, fewer than two letters, an answer that
    is none of them."""
    question, answer = fields.get("question"), fields.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError(f'a record of {", ".join(fields) or "nothing"}; wanted "question" and "answer", two strings')
    letters: list[str] = []
    for letter in _LETTER.findall(question):
        if ord(letter) == ord("A") + len(letters):  # a line may begin with another one, such as the numeral I
            letters.append(letter)
    if len(letters) < 2 or answer not in letters:
        raise ValueError(
            f"the answer is {answer!r}, and lines of the question begin with {letters}; it must be one of them"
        )
    return {"prompt": question, "choices": [f" {letter}" for letter in letters], "answer": letters.index(answer)}


def headline(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The last message as the text, "sarcastic" or "serious" as the label. ValueError: another form."""
    messages, ideal = fields.get("input"), fields.get("ideal")
    last = messages[-1] if isinstance(messages, list) and messages else None
    text = last.get("content") if isinstance(last, dict) else None
    if not isinstance(text, str) or ideal not in LABELS:
        raise ValueError(
            f'a record of {", ".join(fields) or "nothing"} with ideal={ideal!r}; wanted "input", a list of messages, and '
            f'"ideal", {" or ".join(LABELS)}'
        )
    return {"text": text, "label": LABELS[ideal]}
