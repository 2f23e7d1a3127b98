"""The step loop: what a step computes, and that a run which was cut off goes on with the same bits."""

import itertools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from _training import batches, decoder, equal, parameters

from fastllm import ops
from fastllm.train.checkpoint import STATE, TENSORS, CheckpointError, Checkpoints
from fastllm.train.loop import BAD_BATCH, LOG, LoopOptions, TrainingError, _Step, fit
from fastllm.train.objective import next_token_loss
from fastllm.train.parallel import Processes, Share

OPTIONS = LoopOptions(steps=12, lr=1e-2, warmup=3, log_every=1)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / LOG).read_text().splitlines()]


def interrupt_at(step: int):
    def watch(record):
        if record["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return watch


# ------------------------------------------------------------------------------------------------------------ one step


class Rows:
    """Batches of a regression in float64."""

    def __init__(self, x, y, weight):
        self.x, self.y, self.weight = x, y, weight

    def to(self, device):
        return self


class Listed:
    """A source of the batches of a list."""

    def __init__(self, parts):
        self._parts = iter(parts)

    def __next__(self):
        return next(self._parts)

    def state_dict(self):
        return {}


def gradient_of(model, parts) -> tuple[torch.Tensor, float, float]:
    """Of one step over these batches; its loss and weight."""
    found = []

    def step():
        found.append(model.weight.grad)
        model.weight.grad = None
        return torch.tensor(1.0)

    def loss(model, rows):
        return (rows.weight * (model(rows.x) - rows.y).square().sum(1)).sum()

    optimizer = SimpleNamespace(parameters=dict(model.named_parameters()), rate=0.0, step=step)
    value, weight = _Step(Share(model, loss, Processes()), Listed(parts), optimizer, len(parts))()
    return found[0], value, weight


def test_small_batches_have_the_gradient_of_the_large_one():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3, bias=False, dtype=torch.float64)
    x, y, weight = torch.randn(40, 5).double(), torch.randn(40, 3).double(), torch.rand(40)
    weight[7:15] = 0
    cuts = [0, 3, 20, 21, 40]  # as uneven as batches of tokens are
    parts = [Rows(x[a:b], y[a:b], weight[a:b]) for a, b in itertools.pairwise(cuts)]
    small, large = gradient_of(model, parts), gradient_of(model, [Rows(x, y, weight)])
    torch.testing.assert_close(small[0], large[0], rtol=1e-12, atol=1e-12)
    assert small[1] == pytest.approx(large[1]) and small[2] == pytest.approx(large[2])
    alone = gradient_of(model, parts[1:2])
    assert (alone[0] - large[0]).abs().max() > 1e-3  # the comparison can fail


def test_a_step_that_trains_nothing_is_refused(tmp_path):
    class Empty(Listed):
        load_state_dict = None

    part = next(batches(tmp_path))
    part.weight.zero_()
    with pytest.raises(ValueError, match="predictions of weight 0.0; leave out examples"):
        fit(decoder(), Empty([part]), next_token_loss, tmp_path / "run", OPTIONS)


# ----------------------------------------------------------------------------------------------------------- whole runs


def test_it_learns_and_says_what_it_did(tmp_path):
    seen, model = [], decoder()
    options = LoopOptions(steps=60, accumulate=2, lr=2e-2, warmup=5, log_every=20, eval_every=30)
    report = fit(
        model,
        batches(tmp_path),
        next_token_loss,
        tmp_path / "run",
        options,
        validate=lambda m: 5.0,
        watch=[seen.append],
    )
    assert (report.reason, report.step, report.best, report.best_step) == ("done", 60, 5.0, 30)
    assert report.loss < 1.5 < math.log(30)  # digits, letters and two words that come again
    assert [r["step"] for r in seen if "loss" in r] == [20, 40, 60] and seen == lines(tmp_path / "run")
    assert [r["validation"] for r in seen if "validation" in r] == [5.0, 5.0]
    last = next(r for r in reversed(seen) if "loss" in r)
    assert last["lr"] == pytest.approx(options.rate(60, 60)) and 60 * 300 < last["tokens"] <= 60 * 512
    assert last["tokens_per_s"] > 0 and 0 <= last["data_share"] < 1 and last["grad_norm"] > 0
    assert model.training and all(p.grad is None for p in model.parameters())


def test_gradients_that_were_there_do_not_count(tmp_path):
    models = decoder(), decoder()
    for p in models[1].parameters():
        p.grad = torch.ones_like(p)
    for n, model in enumerate(models):
        fit(model, batches(tmp_path), next_token_loss, tmp_path / f"run{n}", OPTIONS)
    assert equal(parameters(models[0]), parameters(models[1]))


def test_it_leaves_torchs_generator_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit(decoder(), batches(tmp_path), next_token_loss, tmp_path / "run", OPTIONS)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_stops_when_nothing_gets_better(tmp_path):
    losses = iter([3.0, 2.0, 2.5, 2.25, 1.0])
    options = LoopOptions(steps=50, lr=1e-2, eval_every=2, patience=2)
    report = fit(
        decoder(), batches(tmp_path), next_token_loss, tmp_path / "run", options, validate=lambda m: next(losses)
    )
    assert (report.reason, report.step, report.best, report.best_step) == ("no better", 8, 2.0, 4)
    assert Checkpoints(tmp_path / "run").steps() == [4, 8]  # the best one, and the last


def test_validation_is_in_eval_mode_without_gradients(tmp_path):
    def validate(model):
        assert not model.training and not torch.is_grad_enabled()
        return 1.0

    model = decoder()
    fit(model, batches(tmp_path), next_token_loss, tmp_path / "run", OPTIONS, validate=validate)
    assert model.training


def test_data_that_end_end_the_run(tmp_path):
    """The last step is logged and validated, as that of a run that ends by itself."""
    run, model, calls = tmp_path / "run", decoder(), []

    def validate(model):
        calls.append(len(calls))
        return 1.0

    report = fit(
        model,
        batches(tmp_path, epochs=1),
        next_token_loss,
        run,
        LoopOptions(steps=1000, log_every=0),
        validate=validate,
    )
    assert report.reason == "no more data" and 10 < report.step < 40 and report.best_step == report.step
    assert report.checkpoint.is_dir() and calls == [0]
    assert [sorted({"loss", "validation"} & line.keys()) for line in lines(run)] == [["loss"], ["validation"]]
    assert [line["step"] for line in lines(run)] == [report.step] * 2
    again = fit(
        model,
        batches(tmp_path, epochs=1),
        next_token_loss,
        run,
        LoopOptions(steps=1000),
        resume=True,
        validate=validate,
    )
    assert (again.reason, again.step, again.loss) == (report.reason, report.step, report.loss) and calls == [0]


def test_a_validation_that_is_no_number_is_not_the_best(tmp_path):
    losses = iter([math.nan, 3.0, math.nan, 2.0, math.inf, 2.5])
    options = LoopOptions(steps=12, lr=1e-2, eval_every=2)
    report = fit(
        decoder(), batches(tmp_path), next_token_loss, tmp_path / "run", options, validate=lambda m: next(losses)
    )
    assert (report.best, report.best_step) == (2.0, 8)


def test_a_run_that_has_ended_keeps_its_loss(tmp_path):
    first = fit(decoder(), batches(tmp_path), next_token_loss, tmp_path / "run", OPTIONS)
    again = fit(decoder(), batches(tmp_path), next_token_loss, tmp_path / "run", OPTIONS, resume=True)
    assert again == first


# ------------------------------------------------------------------------------------------------------------- going on


def whole(tmp_path) -> tuple[list[torch.Tensor], list[float]]:
    model = decoder()
    fit(model, batches(tmp_path), next_token_loss, tmp_path / "whole", OPTIONS)
    return parameters(model), [r["loss"] for r in lines(tmp_path / "whole")]


def test_after_ctrl_c_it_goes_on_with_the_same_bits(tmp_path):
    wanted, losses = whole(tmp_path)
    model, run = decoder(), tmp_path / "run"
    report = fit(model, batches(tmp_path), next_token_loss, run, OPTIONS, watch=[interrupt_at(5)])
    assert (report.reason, report.step) == ("interrupted", 5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    other = decoder(seed=1)  # nothing of it is left
    report = fit(other, batches(tmp_path), next_token_loss, run, OPTIONS, resume=True)
    assert (report.reason, report.step) == ("done", 12)
    assert equal(parameters(other), wanted)
    assert [r["loss"] for r in lines(run)] == losses


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def loss(model, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        fit(decoder(), batches(tmp_path), loss, tmp_path / "run", OPTIONS)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_lines_of_the_log_behind_the_checkpoint_go(tmp_path):
    wanted, losses = whole(tmp_path)
    run = tmp_path / "whole"
    for step in Checkpoints(run).steps():
        os.rename(Checkpoints(run).path(step), tmp_path / "away")
    options = LoopOptions(**{**vars(OPTIONS), "save_every": 4, "keep_last": 9})
    fit(decoder(), batches(tmp_path), next_token_loss, run, options)
    for step in (8, 12):
        os.rename(Checkpoints(run).path(step), tmp_path / f"away{step}")
    with (run / LOG).open("a") as file:
        file.write('{"step": 13, "lo')  # as a process that is killed leaves it
    model = decoder(seed=1)
    fit(model, batches(tmp_path), next_token_loss, run, options, resume=True)
    assert equal(parameters(model), wanted) and [r["loss"] for r in lines(run)] == losses


CHILD = """
import sys
from pathlib import Path
from fastllm.train.loop import LoopOptions, fit
from fastllm.train.objective import next_token_loss
from _training import batches, decoder
folder, run = map(Path, sys.argv[1:3])
model, source = decoder(dim=256, ffn=512), batches(folder)  # some megabytes, so that writing takes a while
options = LoopOptions(steps=40, lr=1e-2, warmup=3, save_every=1, log_every=1)
say = lambda record: print(record["step"], flush=True)
fit(model, source, next_token_loss, run, options, resume=(run / "checkpoints").is_dir() and any(
    p.name.startswith("step-") for p in (run / "checkpoints").iterdir()), watch=[say])
"""


def child(tmp_path: Path, run: str) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(tmp_path / run)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_with_the_same_bits(tmp_path, kills):
    batches(tmp_path)  # writes the text
    straight = child(tmp_path, "whole")
    assert straight.communicate(timeout=300)[0].split()[-1] == "40" and straight.returncode == 0
    chance, killed = random.Random(kills), 0
    for _ in range(kills):
        process = child(tmp_path, "killed")
        process.stdout.readline()  # a step is done, its checkpoint perhaps half written
        time.sleep(chance.uniform(0, 0.05))
        killed += process.poll() is None
        process.kill()
        process.communicate()
    assert killed >= kills - 1
    process = child(tmp_path, "killed")
    assert process.communicate(timeout=300)[0].split()[-1] == "40" and process.returncode == 0
    a, b = (safetensors.torch.load_file(Checkpoints(tmp_path / run).path(40) / TENSORS) for run in ("whole", "killed"))
    assert a.keys() == b.keys()
    # torch's generator was not asked for anything; its state holds bytes that mean nothing
    assert all(torch.equal(a[name], b[name]) for name in a if not name.startswith("random."))
    pick = [[(r["step"], r["loss"]) for r in lines(tmp_path / run)] for run in ("whole", "killed")]
    assert pick[0] == pick[1] and not list((tmp_path / "killed" / "checkpoints").glob(".*"))


def test_another_number_of_threads_is_said(tmp_path):
    run, threads = tmp_path / "run", torch.get_num_threads()
    fit(decoder(), batches(tmp_path), next_token_loss, run, OPTIONS, watch=[interrupt_at(3)])
    try:
        torch.set_num_threads(threads + 1)
        with pytest.warns(UserWarning, match=f"computed by {threads} threads, now there are {threads + 1}"):
            fit(decoder(), batches(tmp_path), next_token_loss, run, OPTIONS, resume=True)
    finally:
        torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_before_the_update(tmp_path, where):
    count, kept, model = 0, [], decoder()

    def loss(model, batch):
        nonlocal count
        count += 1
        value = next_token_loss(model, batch)
        if count < 6:
            return value
        kept.extend(parameters(model))
        return value * math.nan if where == "loss" else value.sign() * (value * 0).sqrt()  # 0, and its slope is 0 / 0

    options = LoopOptions(steps=12, accumulate=2, lr=1e-2, save_every=1)
    said = "the loss is nan, in its batch 2" if where == "loss" else "the gradients' norm is nan"
    with pytest.raises(
        TrainingError, match=f"step 3: {said}; nothing was updated, the last checkpoint is .*step-00000002"
    ):
        fit(model, batches(tmp_path), loss, tmp_path / "run", options)
    assert equal(parameters(model), kept) and all(p.grad is None for p in model.parameters())
    record = json.loads((tmp_path / "run" / BAD_BATCH).read_text())
    source = batches(tmp_path)
    source.load_state_dict(record["data"])  # leads to the text in question
    assert record["step"] == 3 and record["batch"] == (2 if where == "loss" else None)
    assert next(source).weight.sum() > 0


def test_steps_before_an_error_of_the_data_are_saved(tmp_path):
    source, wanted = batches(tmp_path), None

    count = 0

    def loss(model, batch):
        nonlocal wanted, count
        count += 1
        if count == 5:
            wanted = parameters(model)
            raise ZeroDivisionError("in a loss")
        return next_token_loss(model, batch)

    model = decoder()
    with pytest.raises(ZeroDivisionError):
        fit(model, source, loss, tmp_path / "run", OPTIONS)
    assert Checkpoints(tmp_path / "run").steps() == [4]
    Checkpoints(tmp_path / "run").load(model)
    assert equal(parameters(model), wanted)


@pytest.mark.parametrize("where", ["loss", "update"])
def test_an_error_within_a_step_costs_no_bits(tmp_path, monkeypatch, where):
    """What the step drew is drawn again; parameters of which some are updated are not saved."""
    fails, failed = 7, False

    def loss(model, batch):
        value = next_token_loss(model, batch) * (0.5 + torch.rand(()))
        if where == "loss":
            count()
        return value

    def count():
        nonlocal fails, failed
        fails -= 1
        if not fails:
            failed = True
            raise RuntimeError("of the moment")

    def update(params, *rest):
        adamw(params, *rest)
        if where == "update":
            count()

    def run(name, **how):
        torch.manual_seed(3)
        model = decoder(seed=0)
        fit(model, batches(tmp_path), loss, tmp_path / name, OPTIONS, **how)
        return parameters(model)

    adamw = ops.adamw
    monkeypatch.setattr(ops, "adamw", update)
    with pytest.raises(RuntimeError, match="of the moment"):
        run("cut")
    assert failed and Checkpoints(tmp_path / "cut").steps() == ([6] if where == "loss" else [])
    if where == "loss":
        assert equal(run("cut", resume=True), run("whole"))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    model, run = decoder(), tmp_path / "run"
    options = LoopOptions(steps=12, lr=1e-2, save_every=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def watch(record):
        if record["step"] == 4:  # files of more bytes than this cannot be written from here on
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))

    try:
        with pytest.raises(CheckpointError, match="no checkpoint of step 6 .* Make room.*last one is .*step-00000003"):
            fit(
                model,
                batches(tmp_path),
                next_token_loss,
                run,
                LoopOptions(**{**vars(options), "log_every": 1}),
                watch=[watch],
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000003"]
    fit(model, batches(tmp_path), next_token_loss, run, options, resume=True)
    wanted = decoder()
    fit(wanted, batches(tmp_path), next_token_loss, tmp_path / "whole", options)
    assert equal(parameters(model), parameters(wanted))


def test_a_folder_with_checkpoints_is_not_begun_anew(tmp_path):
    fit(decoder(), batches(tmp_path), next_token_loss, tmp_path / "run", OPTIONS)
    with pytest.raises(CheckpointError, match="has checkpoints up to step 12; give resume=True"):
        fit(decoder(), batches(tmp_path), next_token_loss, tmp_path / "run", OPTIONS)


def test_a_damaged_or_foreign_checkpoint_is_refused_and_changes_nothing(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="no checkpoint in .*; there is none"):
        fit(decoder(), batches(tmp_path), next_token_loss, run, OPTIONS, resume=True)
    fit(decoder(), batches(tmp_path), next_token_loss, run, LoopOptions(**{**vars(OPTIONS), "save_every": 6}))
    for changed, message in (({"layers": 3}, "another architecture's: layers.2"), ({"ffn": 64}, r"\(192, 64\)")):
        other = decoder(**changed)
        before = parameters(other)
        with pytest.raises(CheckpointError, match=message):
            fit(other, batches(tmp_path), next_token_loss, run, OPTIONS, resume=True)
        assert equal(parameters(other), before)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7 .*there are steps 6, 12"):
        Checkpoints(run).load(decoder(), step=7)
    path = Checkpoints(run).path(12)
    content = (path / TENSORS).read_bytes()
    for name, damage in ((TENSORS, content[: len(content) // 2]), (STATE, b"{")):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(damage)
        with pytest.raises(CheckpointError, match="step-00000012 is damaged .*go on from step 6"):
            Checkpoints(run).load(decoder())
        (path / name).write_bytes(whole)
    assert Checkpoints(run).load(decoder()).step == 12


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps is 0; allowed: 1 or more"),
        ({"patience": -1}, "patience is -1; allowed: 0 or more"),
        ({"lr": math.nan}, "lr is nan; allowed: a positive number"),
        ({"schedule": "cosin"}, "schedule is 'cosin'; allowed: cosine, linear, constant, wsd"),
        ({"steps": 5, "warmup": 6}, "warmup is 6; allowed: at most the 5 steps"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
    ],
)
def test_options_say_what_is_allowed(changed, message):
    with pytest.raises(ValueError, match=message):
        LoopOptions(**changed)
