"""fastllm eval: every task, its figures, its file, and every way to fail."""

import json
import sys

import _tiny
import pytest
from _cli import call
from _scores import TEXTS

from fastllm import LLM, SamplingParams, models
from fastllm.data.sources import Documents, write_jsonl
from fastllm.data.tokenizer import Tokenizer
from fastllm.decode.beam import BeamParams
from fastllm.decode.text2text import Text2Text
from fastllm.evaluate import choice, tasks
from fastllm.evaluate.perplexity import perplexity, pseudo_perplexity
from fastllm.models.encoder import Encoder, EncoderConfig

LABELLED = [{"text": text, "label": ("glad", "sad")[i % 3 == 0]} for i, text in enumerate(TEXTS[:30])]
QUESTIONS = [{"prompt": text, "choices": [" the", " a", " in"], "answer": i % 3} for i, text in enumerate(TEXTS[:9])]
OTHER = QUESTIONS[0] | {"choices": [" x", " y", " z"]}
PAIRS = [{"prompt": text, "completion": " the hill"} for text in TEXTS[:4]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return _tiny.gguf(tmp_path_factory.mktemp("eval") / "tiny.gguf")


@pytest.fixture(scope="module")
def llm(path):
    return LLM(path)


@pytest.fixture
def evaluate(monkeypatch, capsys, path, tmp_path):
    """evaluate(records, arguments...) -> (status, stdout, stderr, what was written)"""

    def run(records, *arguments, model=path):
        data, out = tmp_path / "data.jsonl", tmp_path / "out.json"
        if records is not None:
            write_jsonl(data, records)
        options = ("eval", "--model", model, "--data", data, "--json", out, *arguments)
        status, printed, err = call(monkeypatch, capsys, *options)
        return status, printed, err, json.loads(out.read_text()) if out.exists() else None

    return run


def test_perplexity(evaluate, llm):
    status, out, _, found = evaluate(
        [{"text": text} for text in TEXTS], "--task", "perplexity", "--window", 32, "--stride", 8
    )
    wanted = perplexity(llm, TEXTS, window=32, stride=8)
    assert status == 0 and found["figures"]["nats"] == wanted.nats and found["figures"]["tokens"] == wanted.tokens
    assert f"bits_per_byte  {wanted.bits_per_byte:.4f}\n" in out and f"perplexity     {wanted.perplexity:.4f}\n" in out
    assert found["count"] == len(TEXTS) and found["task"] == "perplexity" and found["options"]["window"] == 32
    options = ("--task", "perplexity", "--window", 32, "--stride", 8, "--exact")  # as a CPU is anyway
    assert evaluate([{"text": text} for text in TEXTS], *options)[3]["figures"] == found["figures"]
    status, *_, part = evaluate([{"text": text} for text in TEXTS], "--task", "perplexity", "--split", "validation")
    kept = [d.text for d in Documents(found["data"][0], split="validation")]
    assert status == 0 and part["split"] == "validation" and part["count"] == len(kept) < 10
    assert part["figures"]["nats"] == perplexity(llm, kept).nats


def test_choice(evaluate, llm):
    status, out, _, found = evaluate(QUESTIONS, "--task", "choice", "--limit", 8)
    scored = choice.score(llm, QUESTIONS[:8])
    assert status == 0 and found["figures"] == choice.summarise(scored) and found["count"] == 8
    assert [one["logprobs"] for one in found["records"]] == [list(one.logprobs) for one in scored]
    assert found["records"][2]["place"].endswith("data.jsonl:3") and "accuracy " in out


def test_classify(evaluate, llm, tmp_path):
    same = evaluate(QUESTIONS, "--task", "classify")[3]
    assert same["figures"] == choice.summarise(choice.score(llm, QUESTIONS)) and "f1_macro" in same["figures"]
    pool = tmp_path / "pool.jsonl"
    write_jsonl(pool, LABELLED[10:])
    asked = (
        "--task",
        "classify",
        "--shots",
        2,
        "--pool",
        pool,
        "--prompt",
        r"{text}\nSo it is {options}?",
        "--seed",
        3,
    )
    status, _, _, found = evaluate(LABELLED[:10], *asked)
    options = tasks.Options(shots=2, pool=LABELLED[10:], prompt="{text}\nSo it is {options}?", seed=3)
    again = tasks.run(llm, "classify", LABELLED[:10], options)
    assert status == 0 and again.figures == found["figures"] and found["figures"]["majority"] == 0.6
    records = list(tasks.documents(LABELLED[:10]))
    for document, record in zip(tasks.labelled(llm, records, options), LABELLED, strict=False):
        fields = document.fields
        assert fields["choices"] == [" glad", " sad"] and fields["choices"][fields["answer"]] == f" {record['label']}"
        assert (
            fields["prompt"].endswith(f"\n\n{record['text']}\nSo it is glad or sad?")
            and fields["prompt"].count("So it") == 3
        )
    plain = evaluate(LABELLED[:10], "--task", "classify")[3]
    assert plain["records"] != found["records"] and plain["options"]["shots"] == 0


def test_generate(evaluate, llm):
    pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score")
    params = SamplingParams(max_new_tokens=6, temperature=0.0, stop="\n")
    outputs = llm.generate([pair["prompt"] for pair in PAIRS], params)
    records = [PAIRS[0] | {"completion": outputs[0].text}, *PAIRS[1:]]
    status, out, _, found = evaluate(records, "--task", "generate", "--max-new-tokens", 6, "--stop", r"\n")
    assert status == 0 and [one["text"] for one in found["records"]] == [one.text for one in outputs]
    assert (
        found["figures"]["exact_match"] == 0.25 and "rougeL" in out and "version:" in found["figures"]["bleu_signature"]
    )
    assert evaluate(records, "--task", "generate", "--chat", "--max-new-tokens", 6)[3]["records"] != found["records"]


def test_an_encoder_decoder(evaluate, tmp_path, path):
    """Greedy or by beams, of records of both forms; what it has not is refused."""
    pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score")
    folder = _tiny.text2text(tmp_path / "t5", TEXTS)
    model = Text2Text.load(folder)
    for beams in (1, 3):
        answers = [found[0] for found in model.generate(TEXTS[:5], BeamParams(max_new_tokens=8, beams=beams))]
        records = [{"source": TEXTS[0], "target": answers[0].text}]
        records += [{"source": text, "target": "the hill"} for text in TEXTS[1:5]]
        arguments = ("--task", "generate", "--max-new-tokens", 8, "--beams", beams)
        status, out, _, found = evaluate(records, *arguments, model=folder)
        assert status == 0 and "rougeL" in out and found["figures"]["exact_match"] == 0.2
        assert [(one["text"], one["finish_reason"]) for one in found["records"]] == [
            (answer.text, answer.finish_reason) for answer in answers
        ]
        renamed = [{"prompt": r["source"], "completion": r["target"]} for r in records]
        assert evaluate(renamed, *arguments, model=folder)[3]["records"] == found["records"]
    for given, message in (
        (("--task", "perplexity"), "task is 'perplexity'; an encoder-decoder has 'generate' alone"),
        (("--task", "generate", "--chat"), "chat=True; an encoder-decoder has none"),
        (("--task", "generate", "--max-model-len", 64), "max_model_len=64;"),
        (("--task", "generate", "--adapter", "there"), "adapter='there';"),
        (("--task", "generate", "--beams", 11), "beams=11; allowed: an integer from 1 to 10"),
    ):
        status, _, err, _ = evaluate(records, *given, model=folder)
        assert status == 2 and message in err
    status, _, err, _ = evaluate(PAIRS, "--task", "generate", "--beams", 2)
    assert status == 2 and "beams=2; an encoder-decoder has beams" in err


def test_an_encoder(evaluate, tmp_path):
    tokenizer = Tokenizer.train(TEXTS, 300, roles={"cls": "[C]", "sep": "[S]", "mask": "[M]", "pad": "[P]"})
    model = Encoder(EncoderConfig(300, 1, 64, 96, 4, 32, head="mlm", pad_id=tokenizer.pad_id)).eval()
    models.save(model, tmp_path / "encoder")
    tokenizer.save(tmp_path / "encoder")
    records = [{"text": text} for text in TEXTS[:4]]
    status, out, _, found = evaluate(records, "--task", "perplexity", model=tmp_path / "encoder")
    assert status == 0 and "pseudo_perplexity" in out and "bits_per_byte" not in out
    wanted = pseudo_perplexity(model, tokenizer, TEXTS[:4])
    assert found["figures"]["nats"] == wanted.nats
    status, _, err, _ = evaluate(records, "--task", "perplexity", "--stride", 3, model=tmp_path / "encoder")
    assert status == 2 and "stride=3; an encoder's windows" in err
    status, _, err, _ = evaluate(QUESTIONS, "--task", "choice", model=tmp_path / "encoder")
    assert status == 2 and "is an encoder, which predicts no next token" in err


@pytest.mark.parametrize(
    ("records", "arguments", "status", "message"),
    [
        (QUESTIONS, ["--task", "perplexities"], 2, "--task perplexities; allowed: perplexity, choice, classify, generate"),
        ([], ["--task", "choice"], 2, "data.jsonl:0: the file is empty"),
        (QUESTIONS, ["--task", "choice", "--split", "dev"], 2, "split is 'dev'; the fractions name train, validation, test"),
        ([*QUESTIONS, QUESTIONS[0] | {"answer": 3}], ["--task", "choice"], 2, "data.jsonl:10: answer is 3; allowed: 0 to 2"),
        ([*QUESTIONS, {"question": "?"}], ["--task", "choice"], 2, "data.jsonl:10: the record has no prompt, choices, answer"),
        (QUESTIONS, ["--task", "choice", "--limit", 0], 2, "limit=0; allowed: 1 or more"),
        (QUESTIONS, ["--task", "perplexity"], 2, 'data.jsonl:1: no "text" (a string); the record has'),
        (LABELLED, ["--task", "classify", "--shots", 2], 2, "--shots 2: give the file that the examples come from"),
        (LABELLED[1:3], ["--task", "classify"], 2, "all 2 records have the label 'glad'; two labels or more"),
        ([*LABELLED, {"text": "x"}], ["--task", "classify"], 2, "data.jsonl:31: the record has no label; it must have"),
        ([*LABELLED, {"text": "x", "label": 1}], ["--task", "classify"], 2, "data.jsonl:31: label is 1; it must be a string"),
        (LABELLED, ["--task", "classify", "--prompt", "{what}"], 2, "data.jsonl:1: task classify asks for the field 'what'"),
        (LABELLED, ["--task", "classify", "--prompt", "{label}"], 2, "a prompt tells the field 'label'"),
        ([*QUESTIONS, OTHER], ["--task", "classify"], 2, "data.jsonl:10: the choices are others"),
        ([*PAIRS[:1], {"prompt": "a", "completion": ""}], ["--task", "generate"], 2, "data.jsonl:2: completion is ''"),
        (None, ["--task", "choice"], 1, "data.jsonl holds no file to read"),
        (QUESTIONS, ["--task", "choice", "--json", "none/out.json"], 1, "none/out.json: the folder"),
    ],
)  # fmt: skip
def test_errors(evaluate, records, arguments, status, message):
    code, out, err, written = evaluate(records, *arguments)
    last = err.strip().splitlines()[-1]
    assert code == status and message in last and not out and written is None and "Traceback" not in err


def test_a_broken_line(evaluate, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "a b c"}\n{"text": \n')
    status, _, err, _ = evaluate(None, "--task", "perplexity")
    assert status == 2 and "data.jsonl:2: no JSON" in err and "mend it, or give bad='skip'" in err


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [("shots", 2, "shots=2"), ("pool", LABELLED, "pool"), ("prompt", "{text}?", r"prompt='\{text\}\?'")],
)
@pytest.mark.parametrize(
    ("task", "records", "who"),
    [
        ("choice", QUESTIONS, "the task 'choice'"),
        ("classify", QUESTIONS, "a record with choices"),
        ("perplexity", TEXTS, "the task 'perplexity'"),
        ("generate", PAIRS, "the task 'generate'"),
    ],
)
def test_options_that_nothing_would_read(llm, task, records, who, name, value, shown):
    with pytest.raises(
        ValueError, match=rf"^{shown}; {who} has none: leave it out, or give the task 'classify' records"
    ):
        tasks.run(llm, task, records, tasks.Options(**{name: value}))


@pytest.mark.parametrize(
    ("task", "records", "name", "value"),
    [
        ("choice", QUESTIONS, "window", 5),
        ("generate", PAIRS, "stride", 5),
        ("perplexity", TEXTS, "chat", True),
        ("classify", LABELLED, "stop", ["x"]),
        ("choice", QUESTIONS, "max_new_tokens", 3),
        ("perplexity", TEXTS, "beams", 2),
    ],
)
def test_options_of_other_tasks(llm, task, records, name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.*; the task '{task}' has none: leave it out, or give "):
        tasks.run(llm, task, records, tasks.Options(**{name: value}))


def test_a_pool_without_shots(evaluate, tmp_path):
    write_jsonl(tmp_path / "pool.jsonl", LABELLED)
    status, out, err, _ = evaluate(LABELLED, "--task", "classify", "--pool", tmp_path / "pool.jsonl")
    assert status == 2 and "pool.jsonl without --shots" in err and not out


@pytest.mark.parametrize("module", ["sacrebleu.metrics", "rouge_score.rouge_scorer"])
def test_what_measures_texts_is_asked_for_before_they_are_generated(llm, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(tasks, "_completions", None)
    with pytest.raises(ImportError, match=r'pip install "fastllm\[eval\]"'):
        tasks.run(llm, "generate", PAIRS)


def test_shots_of_a_choice(evaluate, tmp_path):
    write_jsonl(tmp_path / "pool.jsonl", QUESTIONS)
    status, out, err, _ = evaluate(QUESTIONS, "--task", "choice", "--shots", 2, "--pool", tmp_path / "pool.jsonl")
    assert status == 2 and "shots=2; the task 'choice' has none" in err and not out


def test_an_unknown_task(llm):
    with pytest.raises(ValueError, match="task is 'x'; allowed: perplexity, choice, classify, generate"):
        tasks.run(llm, "x", TEXTS)
