"""Instructions: wordings, solved examples that fit, and real reviews."""

from collections import Counter

import pytest
from _assets import asset, packaged

from fastllm.data.batch import encode
from fastllm.data.instruct import (
    FLAN,
    REVIEWS,
    SAMSUM,
    Instructions,
    Task,
    balanced,
    choices,
    read_reviews,
    summaries,
)
from fastllm.data.tokenizer import Tokenizer
from fastllm.models.gguf import GGUFFile


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with GGUFFile(asset()) as file:
        return Tokenizer.from_gguf(file)


POOL = [{"text": f"It was {word}.", "label": label} for word, label in
        (("fine", "positive"), ("dull", "negative"), ("great, really great in all of its parts", "positive"))]  # fmt: skip
ASKED = {"text": "Not {label} at all", "label": "negative"}


def test_wordings(tokenizer):
    make = Instructions(REVIEWS["classify"], tokenizer, longest=100)
    seen = Counter(make(ASKED, i)["prompt"] for i in range(300))
    assert len(seen) == 3 and min(seen.values()) > 60
    assert all("Not {label} at all" in prompt for prompt in seen)  # a field is no wording
    assert make(ASKED, 7) == make(ASKED, 7) and make(ASKED)["completion"] == " negative"


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        (REVIEWS["generate"], ASKED),
        (REVIEWS["summarise"], ASKED | {"summary": "Bad."}),
        (FLAN, {"input": "2 + 2?", "options": choices("345"), "answer": "4"}),
        (SAMSUM, {"dialogue": "A: hi\nB: hello", "summary": "They greet."}),
    ],
)
def test_tasks(tokenizer, task, fields):
    for wording in range(len(task.wordings)):
        prompt, completion = task.render(fields, wording)
        assert "{" not in (prompt + completion).replace("{label} at all", "") and completion[0] in " \n"
        (example,) = encode(tokenizer, {"prompt": prompt, "completion": completion})
        assert tokenizer.decode(example.target[example.weight > 0]) == completion
    assert (choices("345"), choices(["yes"])) == ("3, 4 or 5", "yes")


@pytest.mark.parametrize("shots", [0, 1, 2, 3])
def test_shots_fit(tokenizer, shots):
    previous = -1
    for longest in range(30, 150):
        made = Instructions(REVIEWS["classify"], tokenizer, longest, POOL, shots)(ASKED, 2)
        (example,) = encode(tokenizer, made)
        assert len(example) + 1 <= longest
        shown = made["prompt"].count("\n\n")
        assert shown <= shots
        previous = max(previous, shown)
    assert previous == shots  # all of them, where there is room
    assert made["prompt"].endswith(REVIEWS["classify"].render(ASKED, 2)[0][-8:])


def test_no_shot_is_the_question(tokenizer):
    make = Instructions(REVIEWS["classify"], tokenizer, 500, POOL, shots=2)
    for index in range(50):
        prompt = make(POOL[0], index)["prompt"]
        assert prompt.count(POOL[0]["text"]) == 1


@pytest.mark.parametrize("shots", [0, 2])
def test_options(tokenizer, shots):
    """The prompt is that of the question, whichever answer is right; the choices are what may follow."""
    make = Instructions(REVIEWS["classify"], tokenizer, 400, POOL, shots)
    for index in range(20):
        made = make.options(POOL[1], "label", ["positive", "negative"], index)
        assert made == {"choices": [" positive", " negative"], "answer": 1} | {"prompt": make(POOL[1], index)["prompt"]}
        other = make.options(POOL[1] | {"label": "positive"}, "label", ["positive", "negative"], index)
        assert other["answer"] == 0 and (shots or other["prompt"] == made["prompt"])
    with pytest.raises(ValueError, match="label is 'negative'; allowed: good, bad"):
        make.options(POOL[1], "label", ["good", "bad"])
    with pytest.raises(ValueError, match="task generate: a prompt tells the field 'label', which is asked for"):
        Instructions(REVIEWS["generate"], tokenizer, 400).options(POOL[1], "label", ["positive", "negative"])
    with pytest.raises(
        ValueError, match=r"the question and its answer have \d+ tokens, longest=100"
    ):  # the longest choice
        Instructions(REVIEWS["classify"], tokenizer, 100).options(POOL[0], "label", ["positive", "negative " * 200])


def test_errors(tokenizer):
    with pytest.raises(ValueError, match=r"the question and its answer have \d+ tokens, longest=10"):
        Instructions(REVIEWS["classify"], tokenizer, 10)(ASKED)
    with pytest.raises(ValueError, match="shots need a pool"):
        Instructions(REVIEWS["classify"], tokenizer, 10, shots=1)
    with pytest.raises(ValueError, match="asks for the field 'label'; the record has text"):
        REVIEWS["classify"].render({"text": "x"})
    with pytest.raises(ValueError, match=r"only \{name\} of a field is allowed"):
        Task("t", (("{text.__class__}", " x"),))
    with pytest.raises(ValueError, match="needs a wording"):
        Task("t", ())


def test_reviews(tmp_path, tokenizer):
    movies = read_reviews(packaged("reviews") / "movieReviewSnippets_GroundTruth.txt")
    assert len(movies) > 8000 and set(Counter(r["label"] for r in movies)) == {"positive", "negative"}
    even = balanced(movies)
    assert len(set(Counter(r["label"] for r in even).values())) == 1
    make = Instructions(REVIEWS["classify"], tokenizer, 256, movies[:50], shots=5)
    prompt = make(movies[100], 0)["prompt"]
    assert prompt.count("\n\n") == 5
    whole = summaries(read_reviews(packaged("reviews") / "amazonReviewSnippets_GroundTruth.txt", neutral=0.0))
    assert len(whole) > 250 and all(r["summary"] in r["text"] for r in whole)
    (tmp_path / "f.txt").write_text("1\t2.0\tgood\n2\tbad\n")
    with pytest.raises(ValueError, match=r"f\.txt:2: wanted id, rating and text by tab, got '2\\tbad'"):
        read_reviews(tmp_path / "f.txt")
