"""Others' question files: real ones whole, and records of another form."""

from collections import Counter

import pytest
from _assets import packaged

from fastllm.data.questions import HEADLINES, headline, lettered
from fastllm.data.sources import Documents


def test_mmlu():
    made = [d.fields for d in Documents(packaged("questions") / "sandbagging/samples-all-large.jsonl", apply=lettered)]
    assert len(made) == 1000 and all(fields["choices"] == [" A", " B", " C", " D"] for fields in made)
    assert Counter(fields["answer"] for fields in made) == {0: 223, 1: 260, 2: 247, 3: 270}
    assert all(fields["prompt"].endswith("\nAnswer:") for fields in made)


def test_headlines():
    made = [d.fields for d in Documents(packaged("questions") / "sarcasm/samples.jsonl", apply=headline)]
    assert Counter(fields["label"] for fields in made) == {"serious": 14984, "sarcastic": 13630}
    assert made[0] == {"text": "thirtysomething scientists unveil doomsday clock of hair loss", "label": "sarcastic"}
    for wording in range(len(HEADLINES.wordings)):
        prompt, completion = HEADLINES.render(made[0], wording)
        assert made[0]["text"] in prompt and completion == " sarcastic"


def test_a_line_that_begins_with_another_letter():
    question = "Which of these?\nI. one\nA. x\nB. y\nAnswer:"
    assert lettered({"question": question, "answer": "B"}) == {"prompt": question, "choices": [" A", " B"], "answer": 1}


@pytest.mark.parametrize(
    ("read", "fields", "message"),
    [
        (
            lettered,
            {"question": "A. x\nB. y", "answer": "C"},
            r"the answer is 'C', and lines .* begin with \['A', 'B'\]",
        ),
        (lettered, {"question": "A. x", "answer": "A"}, r"begin with \['A'\]"),
        (lettered, {"question": "A. x\nB. y", "answer": 1}, 'wanted "question" and "answer", two strings'),
        (lettered, {}, "a record of nothing"),
        (headline, {"input": [], "ideal": "1"}, "a record of input, ideal with ideal='1'; wanted \"input\", a list"),
        (headline, {"input": [{"content": "x"}], "ideal": "yes"}, '"ideal", 0 or 1'),
        (headline, {"input": [{"role": "user"}], "ideal": "1"}, "a list of messages"),
    ],
)
def test_other_forms(read, fields, message):
    with pytest.raises(ValueError, match=message):
        read(fields)
