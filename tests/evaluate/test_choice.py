"""Multiple choice: figures worked out by hand, bits that no batch changes, prompts read once, bad records."""

import math

import _tiny
import pytest
from _assets import asset, packaged
from _paged import check
from _prefixed import FORMS
from _scores import TEXTS, Counting

from fastllm import LLM, models
from fastllm.data.chat import ChatTemplate
from fastllm.data.instruct import REVIEWS, Instructions, read_reviews
from fastllm.data.questions import HEADLINES, headline, lettered
from fastllm.data.sources import Documents
from fastllm.data.tokenizer import Tokenizer
from fastllm.evaluate.choice import Question, Scored, score, summarise
from fastllm.evaluate.scorer import Scorer
from fastllm.models.decoder import Decoder, DecoderConfig
from fastllm.models.initial import initialise

# answers of one token and of many, some that begin alike
QUESTIONS = [
    {"prompt": text, "choices": [f" {letter}" for letter in "abcd"][: 2 + i % 3] if i % 2 else [" the hat", " the hill", " a"],
     "answer": i % 2}
    for i, text in enumerate(TEXTS)
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return _tiny.gguf(tmp_path_factory.mktemp("choice") / "tiny.gguf")


@pytest.fixture(scope="module")
def llm(path):
    return LLM(path)


# -------------------------------------------------------------------------------------------------------------- by hand


def test_by_hand():
    """A byte a token, log p = -(tokens before): behind 2 tokens " a" has -2 - 3, " bcd" -2 - 3 - 4 - 5."""
    tokenizer = Tokenizer.train(["a"], 258)
    (one,) = score(Counting(tokenizer), [{"prompt": "ab", "choices": [" a", " bcd"], "answer": " bcd"}])
    assert one == Scored(Question("ab", (" a", " bcd"), 1, "record:1"), (-5.0, -14.0), (2, 4))
    assert (one.best(), one.best("token"), one.best("byte"), one.right) == (0, 0, 0, False)
    question = Question("q", ("é", "abcd", "ab"), 1)
    one = Scored(question, (-4.0, -6.0, -5.0), (4, 1, 2))
    assert (one.best("sum"), one.best("token"), one.best("byte")) == (
        0,
        0,
        1,
    )  # -4, -6, -5; -1, -6, -2.5; -2, -1.5, -2.5
    assert Scored(question, (-1.0, -1.0, -1.0), (1, 1, 1)).best() == 0  # of equals the first
    figures = summarise([one, Scored(Question("q", ("x", "y"), 0), (-1.0, -2.0), (1, 1))])
    assert figures["accuracy"] == 0.5 and figures["accuracy_per_byte"] == 1 and "majority" not in figures
    assert figures["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2) and figures["standard_error"] == math.sqrt(0.25 / 2)


def test_figures_of_classes():
    asked = [Question("q", ("n", "p"), answer) for answer in (0, 0, 0, 1)]
    scored = [Scored(q, p, (1, 1)) for q, p in zip(asked, [(-1, -2), (-2, -1), (-1, -2), (-2, -1)], strict=True)]
    figures = summarise(scored)
    assert (figures["accuracy"], figures["majority"], figures["chance"]) == (0.75, 0.75, 0.5)
    assert figures["f1_macro"] == pytest.approx((4 / 5 + 2 / 3) / 2)


# -------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("prompt", "choices"),
    [
        ("two and two is", (" four", " five")),
        ("two and two is ", ("four", "five and six")),
        ("is it\n\n", ("positive", "negative")),
        ("is it", ("\npositive", " negative")),
    ],
)
def test_the_tokens_of_the_whole(form, prompt, choices):
    """Prompt and choice as one text, as lm-evaluation-harness scores them, though the vocabulary begins a text with a space."""
    model = Counting(FORMS[form])
    (one,) = score(model, [{"prompt": prompt, "choices": choices, "answer": 0}])
    wholes = [model.tokenizer.encode(prompt + choice) for choice in choices]
    count = len(model.tokenizer.encode(prompt.rstrip()))
    assert model.asked == wholes and one.tokens == tuple(len(ids) - count for ids in wholes)


def test_a_token_that_spans_the_border():
    """Colon and new line, one token, stand in place of the prompt's colon; "ab" leaves none to a choice, so it is cut."""
    tokenizer = Tokenizer.train(["ab :\n ab :\n"] * 9, 265, pre="llama3")
    assert [tokenizer.decode([id]) for id in tokenizer.encode(":\nx")] == [":\n", "x"]
    assert len(tokenizer.encode("ab")) == 1
    model = Counting(tokenizer)
    (one,) = score(model, [{"prompt": ":", "choices": ["\nx", "y"], "answer": 0}])
    assert model.asked[0] == tokenizer.encode(":\nx") and one.tokens == (1, 1)
    model = Counting(tokenizer)
    (one,) = score(model, [{"prompt": "a", "choices": ["b", "x"], "answer": 0}])
    assert model.asked == [tokenizer.encode("a") + tokenizer.encode(c) for c in "bx"] and one.tokens == (1, 1)
    model = Counting(FORMS["prepend"])
    score(model, [{"prompt": "is it f", "choices": ["our", "ive"], "answer": 0}])
    assert [model.tokenizer.decode(ids) for ids in model.asked] == ["is it four", "is it five"]


@pytest.mark.parametrize("form", ["gguf", "prepend", "first"])
@pytest.mark.parametrize("end", ["<|assistant|>", "<|assistant|>\n", "[A]"])
def test_behind_a_template(form, end):
    """The tokens of the rendered talk, whether a special token ends the prompt or not."""
    tokenizer = FORMS[form]
    model = initialise(Decoder(DecoderConfig(len(tokenizer), 1, 64, 64, 2, 2, 32, 64)), 0)
    template = ChatTemplate("<|user|>{{ messages[0].content }}</s>{% if add_generation_prompt %}" + end + "{% endif %}")
    llm = LLM.of(model, tokenizer, template)
    (one,) = score(llm, [{"prompt": "is it", "choices": ["positive", " negative"], "answer": 0}], chat=True)
    asked = llm.chat_ids([{"role": "user", "content": "is it"}])
    rendered = template.render([{"role": "user", "content": "is it"}])
    for choice, logprob in zip(one.question.choices, one.logprobs, strict=True):
        whole = tokenizer.encode(rendered + choice, add_special_tokens=False, parse_special=True)
        assert whole[: len(asked)] == asked and math.fsum(llm.logprobs([whole], starts=len(asked))[0]) == logprob


# ---------------------------------------------------------------------------------------------------------------- bits


def test_a_batch_changes_no_bit(llm, path):
    whole = score(llm, QUESTIONS)
    for one in whole:  # each choice by itself, without a cache
        llm.engine.cache.forget()
        head = llm.tokenizer.encode(one.question.prompt)
        for choice, logprob, count in zip(one.question.choices, one.logprobs, one.tokens, strict=True):
            tail = llm.tokenizer.encode(choice)
            assert len(tail) == count
            assert math.fsum(llm.logprobs([head + tail])[0][len(head) - 1 :]) == logprob
    module = models.load(path)
    for batch in (1, 16, 128):
        assert score(llm, QUESTIONS, batch=batch) == whole
        assert score(Scorer(module, llm.tokenizer), QUESTIONS, batch=batch) == whole
    for fields in ({"max_num_seqs": 1}, {"kv_bytes": 1 << 20}):
        assert score(LLM(path, max_model_len=400, **fields), QUESTIONS) == whole
    check(llm.engine.cache)


def test_a_prompt_is_read_once(llm, monkeypatch):
    """Of n tokens at most 15 again for each choice; choices of one token cost nothing."""
    step, rows = llm.model.step, []
    monkeypatch.setattr(llm.model, "step", lambda ids, batch: rows.append(len(ids)) or step(ids, batch))
    prompt = "the rain " * 60 + "and"
    for choices, again in ((["a", "b", "c", "d"], 0), ([" the hat", " a hill", " in the rain"], 3)):
        llm.engine.cache.forget()
        rows.clear()
        (one,) = score(llm, [{"prompt": prompt, "choices": choices, "answer": 0}])
        n = len(llm.tokenizer.encode(prompt))
        assert n <= sum(rows) <= n + again * (15 + max(one.tokens))
        if not again:
            assert set(one.tokens) == {1}


def test_chat(llm):
    fields = {"prompt": "hello", "choices": ["a", "b"], "answer": 0}
    (one,) = score(llm, [fields], chat=True)
    head = llm.chat_ids([{"role": "user", "content": "hello"}])
    wanted = [llm.logprobs([head + llm.tokenizer.encode(c)], starts=len(head))[0] for c in "ab"]
    assert one.logprobs == tuple(map(math.fsum, wanted)) != score(llm, [fields])[0].logprobs
    with pytest.raises(ValueError, match="chat=True needs an LLM"):
        score(Counting(llm.tokenizer), [fields], chat=True)


# ---------------------------------------------------------------------------------------------------------- real models


def test_real_questions():
    """SmolLM2 on 12 questions of MMLU and 12 headlines: figures are in order, and another batch has the same bits."""
    llm = LLM(asset())
    folder = packaged("questions")
    mmlu = Documents(folder / "sandbagging/samples-all-large.jsonl", apply=lettered)
    scored = score(llm, [next(mmlu) for _ in range(12)])
    assert all(one.question.choices == (" A", " B", " C", " D") and one.tokens == (1, 1, 1, 1) for one in scored)
    assert summarise(scored)["chance"] == 0.25
    assert sum(math.exp(p) for one in scored for p in one.logprobs) / 12 > 0.05  # it knows that a letter follows
    headlines = Documents(folder / "sarcasm/samples.jsonl", apply=headline)
    records = [next(headlines).fields for _ in range(24)]
    make = Instructions(HEADLINES, llm.tokenizer, 512, records[:12], shots=2)
    asked = [make.options(fields, "label", ["sarcastic", "serious"], i) for i, fields in enumerate(records[12:])]
    scored = score(llm, asked, batch=5)
    assert scored == score(llm, asked, batch=1)
    assert {one.question.prompt.count("\n\n") for one in scored} == {2}


def test_a_review_that_says_it():
    llm = LLM(asset())
    movies = read_reviews(packaged("reviews") / "movieReviewSnippets_GroundTruth.txt")
    make = Instructions(REVIEWS["classify"], llm.tokenizer, 256, movies[:50], shots=4)
    plain = [
        {"text": "A wonderful film, I loved it.", "label": "positive"},
        {"text": "Awful. I hated it.", "label": "negative"},
    ]
    scored = score(llm, [make.options(fields, "label", ["positive", "negative"], i) for i, fields in enumerate(plain)])
    glad, sad = (one.logprobs[0] - one.logprobs[1] for one in scored)
    assert glad > sad


# -------------------------------------------------------------------------------------------------------------- errors

GOOD = {"prompt": "q", "choices": [" a", " b"], "answer": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, r"record:2: answer is 2; allowed: 0 to 1, or the text of one of the choices"),
        ({"answer": -1}, "answer is -1; allowed: 0 to 1"),
        ({"answer": True}, "answer is True"),
        ({"answer": "a"}, "answer is 'a'"),
        ({"choices": [" a"]}, r"record:2: choices is \[' a'\]; it must be a list of two strings or more"),
        ({"choices": [" a", " a"]}, "none twice"),
        ({"choices": [" a", ""]}, "none empty"),
        ({"choices": " ab"}, "it must be a list"),
        ({"prompt": ""}, "record:2: prompt is ''; it must be a string that is not empty"),
        (
            {"promt": "q"},
            r"record:2: the record knows no promt; it must have prompt, choices, answer, and may have id, task",
        ),
        (
            {"prompt": "the rain " * 600 + "and"},
            r"record:2: the prompt has \d+ tokens and ' a' 1, the context holds 1024; shorten",
        ),
        ({"choices": ["\x01", " b"]}, r"record:2: '\\x01' has no token"),
    ],
)
def test_bad_records(llm, change, message):
    with pytest.raises(ValueError, match=message):
        score(llm, [GOOD, GOOD | change])


def test_errors(llm, tmp_path):
    with pytest.raises(ValueError, match="record:1: the record has no choices, answer; it must have"):
        score(llm, [{"prompt": "q"}])
    with pytest.raises(ValueError, match="there is nothing to evaluate"):
        score(llm, [])
    with pytest.raises(ValueError, match="there is no question"):
        summarise([])
    with pytest.raises(ValueError, match="by='tokens'; allowed: sum, token, byte"):
        score(llm, [GOOD | {"id": 7}])[0].best("tokens")
    (tmp_path / "q.jsonl").write_text(
        '{"question": "A. x\\nB. y\\nAnswer:", "answer": "B"}\n{"question": "?", "answer": "C"}\n'
    )
    with pytest.raises(ValueError, match=r"q\.jsonl:2: the answer is 'C', and lines of the question begin with \[\]"):
        score(llm, Documents(tmp_path / "q.jsonl", apply=lettered))
