"""Stages from their options to a finished run folder, as a user runs them."""

import dataclasses
import json
import math
import re
import signal
import sys

import pytest
import safetensors.torch
import torch
from _assets import asset
from _training import LINES, options

from fastllm import LLM, models
from fastllm.cli import main
from fastllm.data.batch import Batches
from fastllm.data.tokenizer import Tokenizer
from fastllm.models import folder
from fastllm.models.initial import initialise
from fastllm.models.presets import build, preset
from fastllm.train import PretrainOptions, forecast, pretrain, stage
from fastllm.train.checkpoint import CheckpointError
from fastllm.train.command import parse
from fastllm.train.loop import LOG, TrainingError
from fastllm.train.objective import next_token_loss
from fastllm.train.plans import plan_of
from fastllm.train.plots import read_log
from fastllm.train.progress import Terminal, duration

MODULE = sys.modules["fastllm.train.pretrain"]  # whose name its function has taken


def tensors(out):
    return safetensors.torch.load_file(out / "model" / "model.safetensors")


# ----------------------------------------------------------------------------------------------------------- a whole run


def test_the_run_folder_is_complete(run):
    out, report = run
    names = {
        "options.yaml",
        "tokenizer",
        "log.jsonl",
        "checkpoints",
        "samples.txt",
        "loss.png",
        "tensorboard",
        "report.json",
        "model",
    }
    assert {p.name for p in out.iterdir()} == names
    assert json.loads((out / "report.json").read_text())["steps"] == report.steps == 6
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG") and any((out / "tensorboard").iterdir())
    log = read_log(out / LOG)
    assert [line["step"] for line in log if "validation" in line] == [3, 6]
    assert all(line["flops_per_s"] > 0 and line["grad_norm"] > 0 for line in log if "loss" in line)
    assert (out / "samples.txt").read_text().count("== held out") == 2


def test_the_model_is_read_by_llm_and_has_the_reported_loss(run, corpus):
    """bits a byte by another way: log-probabilities of the engine over the same documents."""
    out, report = run
    llm = LLM(out / "model")
    texts = [d.text for d in options(corpus, out).documents("test")]
    ids = [[*llm.tokenizer.encode(text), llm.tokenizer.eos_id] for text in texts]
    nats = -sum(map(sum, llm.logprobs(ids)))
    size = sum(len(text.encode()) - len(llm.tokenizer.token_bytes(i[0])) for text, i in zip(texts, ids, strict=True))
    assert report.test["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert report.test["loss"] == pytest.approx(nats / sum(len(i) - 1 for i in ids), rel=1e-5)


def test_the_same_options_give_the_same_bits(run, corpus, tmp_path):
    out, _ = run
    pretrain(options(corpus, tmp_path / "again"))
    assert all(
        torch.equal(a, b) for a, b in zip(tensors(out).values(), tensors(tmp_path / "again").values(), strict=True)
    )


def test_an_interrupted_run_goes_on_with_the_same_bits(run, corpus, tmp_path):
    out, _ = run

    def interrupt(record):
        if record["step"] == 2 and "loss" in record:
            signal.raise_signal(signal.SIGINT)

    stopped = pretrain(options(corpus, tmp_path / "cut"), watch=[interrupt])
    assert (stopped.reason, stopped.steps, stopped.test) == ("interrupted", 2, None)
    assert set(stopped.unigram) == {"validation"}
    ended = pretrain(options(corpus, tmp_path / "cut"), resume=True)
    assert (ended.reason, ended.steps) == ("done", 6)
    assert all(
        torch.equal(a, b) for a, b in zip(tensors(out).values(), tensors(tmp_path / "cut").values(), strict=True)
    )


def test_the_best_checkpoint_is_saved(corpus, tmp_path, monkeypatch):
    """Not the last one: held-out losses are replaced by ones that rise."""
    losses = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(stage._Validation, "__call__", lambda self, model: {"loss": next(losses)})
    report = pretrain(options(corpus, tmp_path / "run", steps=9, save_every=3, keep_last=5))
    assert report.best_step == 3
    best = safetensors.torch.load_file(tmp_path / "run/checkpoints/step-00000003/tensors.safetensors")
    saved = models.load(tmp_path / "run" / "model")
    assert torch.equal(saved.embedding.weight, best["model.embedding.weight"])


def test_several_sources_are_mixed(corpus, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"Sentence {i} of another kind."}) + "\n" for i in range(80)))
    made = options(corpus, tmp_path / "run", data={"sums": str(corpus), "other": str(other)}, mix_temperature=1e9)
    tasks = [
        document.fields["task"] for _, document in zip(range(200), made.documents("train", epochs=None), strict=False)
    ]
    assert 70 < tasks.count("other") < 130
    assert pretrain(made).reason == "done"


@pytest.mark.parametrize("arch", ["encoder", "seq2seq"])
def test_other_classes(corpus, tmp_path, arch):
    """They learn, resume, and are read by transformers."""
    import transformers

    made = options(corpus, tmp_path / "run", arch=arch, steps=12, vocab_size=400)
    report = pretrain(made)
    assert report.validation["loss"] < read_log(tmp_path / "run" / LOG)[0]["loss"]
    assert set(report.validation) == {"loss", "accuracy"} == set(report.unigram["test"])
    assert set(report.unigram) == {"validation", "test"} and report.unigram["test"]["accuracy"] > 0
    assert pretrain(made, resume=True).steps == 12
    kind = {"encoder": "AutoModelForMaskedLM", "seq2seq": "AutoModelForSeq2SeqLM"}[arch]
    theirs, ours = getattr(transformers, kind).from_pretrained(report.model).eval(), models.load(report.model)
    ids = torch.randint(10, 200, (2, 7))
    if arch == "encoder":
        assert torch.allclose(theirs(ids).logits, ours(ids), atol=1e-4)
    else:
        assert torch.allclose(theirs(input_ids=ids, decoder_input_ids=ids).logits, ours(ids, ids), atol=1e-4)


@pytest.mark.parametrize("arch", ["decoder", "encoder", "seq2seq"])
def test_in_bfloat16(corpus, tmp_path, arch):
    """As on a GPU: samples are written, what is saved is read again."""
    changed = {"arch": arch, "dtype": "bfloat16", "vocab_size": 400, "steps": 4, "eval_every": 2}
    report = pretrain(options(corpus, tmp_path / "run", **changed))
    assert math.isfinite(report.loss) and (arch == "encoder" or (tmp_path / "run" / "samples.txt").read_text())
    assert {p.dtype for p in models.load(report.model).parameters()} == {torch.float32}


def test_sources_and_targets(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"source": f"{i} plus 1", "target": f"{i + 1}"}) + "\n" for i in range(200)))
    report = pretrain(options(data, tmp_path / "run", arch="seq2seq", steps=9, vocab_size=400))
    assert report.steps == 9 and "plus 1 | " in (tmp_path / "run" / "samples.txt").read_text()


@pytest.mark.parametrize("record", [
    {"text": "one two three four five six seven eight nine ten " * 9}, {"source": "a b c d " * 40, "target": "e f g h " * 40},
], ids=["spans", "pairs"])  # fmt: skip
def test_pairs_as_long_as_they_may_be(tmp_path, record):
    """Both sides of max_length: more tokens than that together."""
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({k: f"{i} {v}" for k, v in record.items()}) + "\n" for i in range(60)))
    made = options(data, tmp_path / "run", arch="seq2seq", steps=2, vocab_size=400, max_length=64, tokens=128)
    assert pretrain(made).steps == 2
    with pytest.raises(ValueError, match="tokens is 127; a source and a target of max_length=64 tokens each need 128"):
        pretrain(dataclasses.replace(made, tokens=127, out=str(tmp_path / "small")))


def test_a_tokenizer_of_another_model(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"the tokenizer has 30522 ids, the model \d+;"):
        made = options(corpus, tmp_path)
        tokenizer, text = MODULE._tokenizer(made, False)
        other = Tokenizer.from_folder(asset("minilm-l6"))
        plan_of(made, build(preset("decoder", "nano", tokenizer)), other, None, text)


# ------------------------------------------------------------------------------------------------------ flags and YAML


def test_flags_win_over_yaml(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("arch: decoder\npreset: nano\ndata: [a.jsonl, b.jsonl]\nmax_length: 128\nlr: 1e-3\n")
    made, resume = parse(
        "pretrain", PretrainOptions, ["--config", str(file), "--out", "x", "--max-length=64", "--clip", "null"]
    )
    assert (made.data, made.max_length, made.lr, made.clip, resume) == (["a.jsonl", "b.jsonl"], 64, 1e-3, None, False)


def test_resume_takes_the_options_of_the_run(run):
    out, _ = run
    made, resume = parse("pretrain", PretrainOptions, ["--resume", "--out", str(out), "--steps", "8"])
    assert resume and made.steps == 8 and made.vocab_size == 300


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--foo", "3"], "--foo"),
        (["--lr", "fast"], "--lr: Expected a float. Got value: fast"),
        (["--lr", "-1"], "lr is -1.0; allowed: a positive number"),
        (["--max-length", "9000"], "max_length is 9000; allowed: at most tokens=4096"),
        (["--validation", "0.6", "--test", "0.5"], "less than 1"),
        (["--preset", "huge"], "preset is 'huge'; allowed: "),
        (["--arch", "tree"], "arch is 'tree'; allowed: decoder, encoder, seq2seq"),
        (["--lint", "maybe"], "lint is 'maybe'; allowed: warn, refuse, off"),
        (["--mix-temperature", "0.5"], "mix_temperature is 0.5; allowed: 1 where data is not several sources by name"),
        (["--seed", "-1"], "seed is -1; allowed: 0 to 2"),
        (["--seed", str(1 << 63)], "seed is 9223372036854775808; allowed: 0 to 2"),
    ],
)
def test_wrong_options(arguments, said):
    base = ["--arch", "decoder", "--preset", "nano", "--data", "a", "--out", "b"]
    with pytest.raises(ValueError, match="(?s)" + said.replace("(", "\\(")):
        parse("pretrain", PretrainOptions, [*base, *arguments])


def test_an_unknown_key_of_yaml(tmp_path):
    (tmp_path / "o.yaml").write_text("arch: decoder\nlearning_rate: 3\n")
    with pytest.raises(ValueError, match="learning_rate"):
        parse("pretrain", PretrainOptions, ["--config", str(tmp_path / "o.yaml")])


def test_a_vocabulary_of_an_attempt_that_came_to_nothing_is_not_kept(corpus, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"zorp quux {i} blarg"}) + "\n" for i in range(200)))
    out = tmp_path / "run"
    with pytest.raises(FileNotFoundError):
        pretrain(options(other, out, validation=str(tmp_path / "nowhere.jsonl")))
    first = Tokenizer.from_folder(out / "tokenizer")
    pretrain(options(corpus, out, steps=1))
    second = Tokenizer.from_folder(out / "tokenizer")
    assert len(first.encode(" zorp quux blarg")) < len(second.encode(" zorp quux blarg"))
    kept = (out / "tokenizer" / "tokenizer.json").read_bytes()
    with pytest.raises(CheckpointError, match="has checkpoints up to step 1"):
        pretrain(options(other, out))
    assert (out / "tokenizer" / "tokenizer.json").read_bytes() == kept  # of a run that is there


def test_a_run_goes_on_past_a_bad_record(corpus, tmp_path):
    lines = corpus.read_text().splitlines(keepends=True) * (1100 // len(LINES) + 1)
    bad, out = tmp_path / "bad.jsonl", tmp_path / "run"  # in the last of the windows that are read ahead
    bad.write_text("".join(lines[:-20]) + '{"text": \n' + "".join(lines[-20:]))
    given = {
        "shuffle": 0,
        "steps": 45,
        "tokens": 512,
        "validation": str(corpus),
        "test": 0,
        "eval_every": 0,
        "lint": "off",
    }
    pretrain(options(corpus, tmp_path / "first", steps=1))
    given["tokenizer"] = str(tmp_path / "first" / "model")
    with pytest.raises(ValueError, match=r"bad\.jsonl:\d+: "):
        pretrain(options(bad, out, **given))
    with pytest.warns(UserWarning, match=r"bad\.jsonl:\d+"):
        assert pretrain(options(bad, out, bad="skip", **given), resume=True).steps == 45


def test_other_options_than_the_run_began_with(run, corpus):
    out, _ = run
    with pytest.raises(ValueError, match=r"tokens is 512, the run in .* began with 256"):
        pretrain(options(corpus, out, tokens=512), resume=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b'{"text": "good"}\n{"text": \n', ":2: "),
        (b'{"text": "good"}\n{"text": "\xff\xfe"}\n', ":2: "),
        (b'{"title": "no text here"}\n' * 40, "no text to train a tokenizer on"),
        (b"\n\n", r"0 documents in \S*bad.jsonl; give other files"),
    ],
    ids=["empty", "broken line", "not UTF-8", "another record", "blank lines"],
)
def test_bad_data(tmp_path, monkeypatch, capsys, content, said):
    data = tmp_path / "bad.jsonl"
    data.write_bytes(content)
    arguments = [
        "--arch",
        "decoder",
        "--preset",
        "nano",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "run"),
        "--validation",
        "0",
    ]
    monkeypatch.setattr("sys.argv", ["fastllm", "pretrain", *arguments, "--test", "0"])
    with pytest.raises(SystemExit) as left:
        main()
    shown = capsys.readouterr().err.strip().splitlines()
    assert left.value.code in (1, 2) and re.search(said, shown[-1]) and shown[-1].startswith("fastllm: ")


# -------------------------------------------------------------------------------------------------- before it begins


def first(corpus, tmp_path, tokens=256):
    made = options(corpus, tmp_path)
    tokenizer, text = MODULE._tokenizer(made, False)
    plan = plan_of(made, initialise(build(preset("decoder", "nano", tokenizer)), 0), tokenizer, None, text)
    return plan, next(Batches(made.documents("train"), plan.encode, tokens))


def test_what_does_not_fit_is_refused_with_what_does(corpus, tmp_path, monkeypatch):
    plan, batch = first(corpus, tmp_path / "a")
    size = forecast.footprint(plan.model, next_token_loss, batch)
    free = size.of(100) / forecast.SHARE
    monkeypatch.setattr(stage, "available_memory", lambda device: free)
    with pytest.raises(MemoryError, match=r"tokens=(\d+) with accumulate=(\d+) takes the same step") as refused:
        pretrain(options(corpus, tmp_path / "b", tokens=256))
    tokens, parts = map(int, re.search(r"tokens=(\d+) with accumulate=(\d+)", str(refused.value)).groups())
    assert tokens * parts <= 256 and size.of(tokens) <= free
    monkeypatch.setattr(stage, "available_memory", lambda device: size.state)
    with pytest.raises(MemoryError, match="no batch fits beside the weights"):
        pretrain(options(corpus, tmp_path / "c", tokens=256))


def test_a_model_that_does_not_fit_is_not_drawn(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "initialise", lambda *_: pytest.fail("it was drawn"))
    monkeypatch.setattr(MODULE, "available_memory", lambda device: 4e9)
    with pytest.raises(
        MemoryError,
        match=r"take 1\d\d\.\d GB, 4\.0 GB are free; presets that fit: nano, micro, mini, smollm2-135m, gpt2",
    ):
        pretrain(options(corpus, tmp_path / "run", preset="llama-2-7b"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_model_that_cannot_be_read_whole_is_not_read(run, monkeypatch):
    monkeypatch.setattr(folder, "available_memory", lambda device: 4e6)
    with pytest.raises(
        MemoryError, match=r"model: its weights take 0\.0 GB in float32, 0\.0 GB are free; take a smaller"
    ):
        models.load(run[0] / "model")
    assert LLM(run[0] / "model").generate("It is", None)


def test_memory_that_gives_out_in_a_step(corpus, tmp_path, monkeypatch):
    calls = iter(range(100))

    def loss(model, batch):
        if next(calls) == 5:  # after the forecast, in the second or third step
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"
            )
        return next_token_loss(model, batch)

    monkeypatch.setattr("fastllm.train.plans.next_token_loss", loss)
    with pytest.raises(TrainingError, match=r"out of memory with tokens=256.*tokens=128 with accumulate=2"):
        pretrain(options(corpus, tmp_path / "run", validation=0))
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_forecast_leaves_no_trace(corpus, tmp_path):
    plan, batch = first(corpus, tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    gradient = torch.ones_like(plan.model.embedding.weight)
    plan.model.embedding.weight.grad = gradient
    forecast.footprint(plan.model, next_token_loss, batch)
    assert forecast.seconds_of(plan.model, next_token_loss, batch) > 0
    assert torch.equal(before, torch.get_rng_state())
    assert plan.model.embedding.weight.grad is gradient and bool((gradient == 1).all())
    assert all(p.grad is None for n, p in plan.model.named_parameters() if n != "embedding.weight")


def test_the_batch_that_is_tried_is_a_full_one(tmp_path, monkeypatch):
    """The records make two full batches and a small one, which stands first for some seeds."""
    data, tried, firsts = tmp_path / "short.jsonl", [], []
    data.write_text("".join(json.dumps({"text": f"{i:03d} is it."}) + "\n" for i in range(50)))
    monkeypatch.setattr(stage, "seconds_of", lambda model, loss, batch: tried.append(batch) or 1.0)
    for seed in range(4):
        made = options(data, tmp_path, seed=seed, validation=0, test=0)
        plan, _ = first(data, tmp_path)
        size = sum(len(e) for e in plan.encode(next(made.documents("train")), 0))
        made = dataclasses.replace(made, tokens=20 * size, max_length=size)
        firsts.append(next(Batches(made.documents("train"), plan.encode, made.tokens, seed=seed)))
        stage._forecast(made, plan, plan.model, lambda line: None, 1)
    assert all(forecast.tokens_of(batch) > 0.9 * 20 * size for batch in tried)
    assert min(map(forecast.tokens_of, firsts)) < 0.6 * 20 * size


def test_nothing_to_train_on(tmp_path):
    data = tmp_path / "empty.jsonl"
    data.write_text('{"text": ""}\n' * 5)
    with pytest.raises(ValueError, match="nothing of the training documents can be trained on"):
        pretrain(options(data, tmp_path / "run", tokenizer=str(asset("smollm2-135m")), validation=0, test=0))


def test_operations_of_a_step(corpus, tmp_path):
    """Counted by hand for a window that cuts and one that does not."""
    plan, batch = first(corpus, tmp_path)
    c, lengths = plan.model.config, batch.packed.cu.diff().tolist()
    weights = sum(
        m.weight.numel()
        for n, m in plan.model.named_modules()
        if n.endswith((".qkv", ".out", ".gate_up", ".up", ".down"))
    )
    weights += plan.model.head.weight.numel()
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    expected = 6 * weights * sum(lengths) + 12 * c.layers * c.heads * c.head_dim * pairs
    assert forecast.Operations(plan.model)(batch) == expected
    assert forecast._pairs(torch.tensor([5.0]), 2).item() == 1 + 2 + 2 + 2 + 2


def test_lint_may_refuse(tmp_path):
    data = tmp_path / "twice.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": f"Is {i % 40} good?", "completion": "yes" if i < 40 else "no"}) + "\n"
            for i in range(80)
        )
    )
    with pytest.raises(ValueError, match="the linter found"):
        pretrain(options(data, tmp_path / "run", lint="refuse", validation=0, test=0))


# ------------------------------------------------------------------------------------------------------------ progress


def test_the_line_of_progress(capsys):
    show = Terminal(steps=10, peak=1e9)
    show({"step": 2, "loss": 3.25, "tokens_per_s": 1234.0, "flops_per_s": 4e8})
    show({"step": 4, "validation": 3.0, "validation_bits_per_byte": 1.5})
    show({"step": 4, "loss": 3.125, "tokens_per_s": 1234.0, "flops_per_s": 4e8})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "2/10 · loss 3.250 · 1,234 tok/s · MFU 40%"
    assert lines[1].startswith(
        "4/10 · loss 3.125 · held out 3.000 (1.500 bits a byte) · 1,234 tok/s · MFU 40% · 0 s left"
    )


def test_durations():
    assert [duration(s) for s in (3.4, 99, 200, 7500)] == ["3 s", "99 s", "3:20 min", "2:05 h"]
