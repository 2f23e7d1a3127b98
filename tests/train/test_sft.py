"""Fine-tuning as a user runs it: records, templates, and what is saved."""

import json
import re
import shutil

import pytest
from _training import QUICK, SIZES

from fastllm import LLM, models
from fastllm.data.chat import ChatTemplate
from fastllm.data.tokenizer import Tokenizer
from fastllm.models.decoder import Decoder
from fastllm.train import SftOptions, sft, stage
from fastllm.train.loop import LOG
from fastllm.train.plots import read_log


@pytest.mark.parametrize(
    "record",
    [
        lambda i: {"prompt": f"{i} plus 1 is", "completion": f" {i + 1}."},
        lambda i: {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i + 1}."}]},
    ],
    ids=["completion", "messages"],
)
def test_sft(run, tmp_path, record):
    out, _ = run
    data, template = tmp_path / "data.jsonl", tmp_path / "template.jinja"
    data.write_text("".join(json.dumps(record(i)) + "\n" for i in range(120)))
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    given = {k: v for k, v in SIZES.items() if k != "vocab_size"} | QUICK
    report = sft(
        SftOptions(model=str(out / "model"), data=str(data), out=str(tmp_path / "run"), template=str(template), **given)
    )
    log = read_log(tmp_path / "run" / LOG)
    assert report.steps == 6 and log[-1]["validation"] < log[2]["loss"]
    assert 6 * 200 < report.tokens <= 6 * 256  # read, trained on or not
    assert "bits_per_byte" not in report.validation
    assert isinstance(models.load(report.model), Decoder)
    saved = ChatTemplate.from_folder(report.model)  # not the base's, which has none
    assert saved.render([{"role": "user", "content": "1?"}]) == "user: 1?<|endoftext|>\nassistant: "


@pytest.mark.parametrize(
    "record",
    [
        {"text": ""},
        {"messages": [{"role": "assistant", "content": "Good day."}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "3?"}]},
                {"role": "assistant", "content": "4."},
            ]
        },
    ],
    ids=["empty", "opened by the assistant", "parts"],
)
def test_samples_of_odd_records(run, tmp_path, record):
    """A run does not end for the sake of a sample."""
    data, held, template = tmp_path / "data.jsonl", tmp_path / "held.jsonl", tmp_path / "template.jinja"
    data.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": f"{i + 1}."}) + "\n" for i in range(120)))
    held.write_text(json.dumps(record) + "\n" + json.dumps({"prompt": "5?", "completion": "6."}) + "\n")
    template.write_text(
        "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}\n{% endfor %}"
    )
    given = {k: v for k, v in SIZES.items() if k != "vocab_size"} | QUICK
    given |= {"validation": str(held), "test": 0, "template": str(template), "samples": 1}
    sft(SftOptions(model=str(run[0] / "model"), data=str(data), out=str(tmp_path / "run"), **given))
    samples = (tmp_path / "run" / stage.SAMPLES).read_text().splitlines()
    parts = isinstance(record.get("messages", [{}])[0].get("content"), list)
    assert [line.split(" | ")[0] for line in samples[1::2]] == ["3?" if parts else "5?"] * 2


def test_samples_that_cannot_be_made(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("the chat template refused the messages: no")

    monkeypatch.setattr(LLM, "generate", refuse)
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps({"prompt": "3?", "completion": "4."}) + "\n") * 20)
    given = (
        {k: v for k, v in SIZES.items() if k != "vocab_size"}
        | QUICK
        | {"validation": str(data), "test": 0, "samples": 1}
    )
    report = sft(SftOptions(model=str(run[0] / "model"), data=str(data), out=str(tmp_path / "run"), **given))
    assert report.steps == 6
    assert "3? | (no sample: the chat template refused" in (tmp_path / "run" / stage.SAMPLES).read_text()


def test_a_sample_that_cannot_be_made_costs_no_other(run, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps({"prompt": "3?", "completion": "4."}) + "\n") * 20)
    given = {k: v for k, v in SIZES.items() if k != "vocab_size"} | QUICK | {"validation": str(data), "test": 0}
    given |= {"model": str(run[0] / "model"), "data": str(data), "steps": 1}
    samples = []
    for name, prompts in (("good", ["3?", "5?"]), ("odd", ["3?", "", "5?"])):
        sft(SftOptions(out=str(tmp_path / name), prompts=prompts, **given))
        samples.append((tmp_path / name / stage.SAMPLES).read_text().splitlines()[1:])
    assert samples[1] == [samples[0][0], " | (no sample: the prompt is empty; give at least one token)", samples[0][1]]


def test_transformers_ends_where_the_tokenizer_does(run, tmp_path):
    """Also of a model that says so in config.json alone."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run[0] / "model")
    eos = Tokenizer.from_folder(run[0] / "model").eos_id
    assert theirs.generation_config.eos_token_id == eos
    stored = json.loads((run[0] / "model" / "config.json").read_text())
    source = tmp_path / "source"
    shutil.copytree(run[0] / "model", source)
    (source / "config.json").write_text(json.dumps(stored | {"eos_token_id": [7, 9], "bos_token_id": 5}))
    assert Tokenizer.from_folder(source).eos_ids == {7, 9, eos}
    models.save(models.load(source), tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert (theirs.generation_config.eos_token_id, theirs.generation_config.bos_token_id) == ([7, 9], 5)


@pytest.mark.parametrize("lint", ["off", "warn"])
@pytest.mark.parametrize("which", ["data", "validation"])
def test_a_record_that_cannot_be_encoded_is_named(run, tmp_path, lint, which):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(json.dumps({"prompt": "1?", "completion": "2."}) + "\n")
    bad.write_text(good.read_text() + json.dumps({"prompt": "", "completion": "2."}) + "\n")
    files = {"data": str(good), "validation": str(good)} | {which: str(bad)}
    given = {k: v for k, v in SIZES.items() if k != "vocab_size"} | QUICK | files | {"test": 0, "lint": lint}
    with pytest.raises(
        ValueError, match=r"bad\.jsonl:2: the prompt is empty.*; or give bad=skip to leave such records out"
    ):
        sft(SftOptions(model=str(run[0] / "model"), out=str(tmp_path / "run"), **given))


def test_a_run_goes_on_past_a_record_that_cannot_be_encoded(run, tmp_path):
    """Which it meets late: editing the file would lose its place there."""
    record, data = {"prompt": "1?", "completion": "2."}, tmp_path / "a.jsonl"
    odd = [record | {"completion": None}, {"text": 5}, record | {"prompt": ""}, record | {"prompt": "1 " * 500}]
    data.write_text("".join(json.dumps(r) + "\n" for r in [*[record] * 520, *odd, *[record] * 9]))
    given = {k: v for k, v in SIZES.items() if k != "vocab_size"} | QUICK | {"test": 0, "lint": "off", "steps": 20}
    given |= {"model": str(run[0] / "model"), "data": str(data), "out": str(tmp_path / "run"), "shuffle": 0}
    given |= {"validation": str(tmp_path / "held.jsonl"), "eval_every": 0, "sample_tokens": 0, "log_every": 0}
    (tmp_path / "held.jsonl").write_text('{"text": 5}\n{"text": "one and two"}\n')
    with pytest.raises(ValueError, match=r"held\.jsonl:1: a record of text \(int\)"):
        sft(SftOptions(**given))
    (tmp_path / "held.jsonl").write_text('{"text": "one and two"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:521: a record of prompt \(str\), completion \(NoneType\)"):
        sft(SftOptions(**given))
    (tmp_path / "held.jsonl").write_text('{"text": 5}\n{"text": "one and two"}\n')
    with pytest.warns(UserWarning, match=r"a\.jsonl:521: .*; skipped") as said:
        report = sft(SftOptions(bad="skip", **given), resume=True)
    assert report.steps == 20 and "bits_per_byte" in report.validation
    assert {re.search(r"\w+\.jsonl:\d+", str(w.message))[0] for w in said if "skipped" in str(w.message)} == {
        "held.jsonl:1", "a.jsonl:521", "a.jsonl:522", "a.jsonl:523", "a.jsonl:524"
    }  # fmt: skip
    assert re.search(
        r"a\.jsonl:524: max_length=\d+ tokens leave no room for an answer; skipped", str([*map(str, said)])
    )


@pytest.mark.parametrize("lint", ["off", "warn"])
def test_a_special_token_that_the_model_has_no_row_for(run, tmp_path, lint):
    """Read out of what an assistant said; in a text, and in what a user typed, it is text."""
    path, talk = tmp_path / "model", [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2."}]
    models.save(models.load(run[0] / "model"), path)
    Tokenizer.from_folder(path).extended(["<image>"]).save(path)
    (tmp_path / "template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    typed = [talk[0] | {"content": "<image>?"}, talk[1]]
    records = [{"messages": talk}] * 30 + [{"text": "an <image> in a text"}, {"messages": typed}] * 15
    given = {k: v for k, v in SIZES.items() if k != "vocab_size"} | QUICK | {"test": 0, "lint": lint}
    given |= {"model": str(path), "data": str(tmp_path / "a.jsonl"), "template": str(tmp_path / "template.jinja")}
    given["validation"] = given["data"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert sft(SftOptions(out=str(tmp_path / "run"), **given)).steps == 6
    talk[1]["content"] = "<image>."
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match=r"a\.jsonl:\d+: token id \d+ at place .* the model has no row for '<image>'"):
        sft(SftOptions(out=str(tmp_path / "again"), **given))
