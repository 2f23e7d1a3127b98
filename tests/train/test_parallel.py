"""Two processes, started by torchrun, do what one does: the same gradients, losses and validations, on one another's checkpoints
too, and they end together."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import _parallel
import pytest
import torch
from _training import batches, decoder

from fastllm.train.checkpoint import Checkpoints
from fastllm.train.parallel import Processes, start

ALIKE = {"rel": 2e-5, "abs": 1e-6}  # float32, summed in another order, eight steps long


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What a single process finds, by scenario; asked for one by one."""
    folder, found = tmp_path_factory.mktemp("one"), {}

    def ask(name: str):
        if name not in found:
            found[name] = _parallel.SCENARIOS[name](folder, 1)
        return found[name]

    ask.folder = folder
    return ask


@pytest.fixture(scope="module")
def two(tmp_path_factory, one) -> tuple[Path, list[dict]]:
    """Their folder, and what each of two processes finds."""
    folder = tmp_path_factory.mktemp("two")
    batches(folder)  # writes the text before two look for it
    one("straight")
    half_of(one.folder / "straight", folder / "begun by one")
    script = Path(_parallel.__file__)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(folder),
    ]
    paths = os.pathsep.join([str(script.parent), *sys.path])
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return folder, [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


def half_of(run: Path, other: Path) -> None:
    """A run as it stood at its fourth step."""
    shutil.copytree(run, other)
    for step in Checkpoints(other).steps():
        if step > 4:
            shutil.rmtree(Checkpoints(other).path(step))


def alike(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)
    if isinstance(a, str):
        return a == b
    return a == pytest.approx(b, **ALIKE)


def test_gradients_are_those_of_one_process(two, one):
    ours, theirs = two[1][0]["gradients"], one("gradients")
    assert two[1][1]["gradients"] == ours
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(a).double(), torch.tensor(b).double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["straight", "ends", "recomputed", "frozen", "sized", "encoder", "seq2seq"])
def test_a_run_is_that_of_one_process(two, one, name):
    ours, theirs = two[1][0][name], one(name)
    assert two[1][1][name] == ours  # every process knows the same, and has the same model in the end
    assert alike(ours, theirs) and ours["step"] == len(ours["losses"]) > 4
    if name == "ends":
        assert ours["reason"] == "no more data"
    if name == "recomputed":
        assert ours["losses"] == two[1][0]["straight"]["losses"]


def test_in_bfloat16(two, one):
    ours, theirs = two[1][0]["bfloat16"], one("bfloat16")
    assert two[1][1]["bfloat16"] == ours
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-2)


def test_two_go_on_with_what_one_began(two, one):
    ours = two[1][0]["begun by one"]
    assert alike(ours, one("straight"))


def test_one_goes_on_with_what_two_began(two, one):
    folder = two[0]
    half_of(folder / "straight", folder / "begun by two")
    with pytest.warns(UserWarning, match="computed by 2 processes, now there are 1"):
        ours = _parallel.run(folder, "begun by two", 1, decoder(seed=5), save_every=4, eval_every=3)
    assert alike(ours, one("straight"))
    model = decoder(seed=6)
    assert Checkpoints(folder / "straight").load(model).step == 8  # a model without an optimizer
    assert [p.double().square().sum().item() for p in model.parameters()] == two[1][0]["straight"]["parameters"]


def test_a_checkpoint_of_two_is_two_files_without_pickles(two):
    path = Checkpoints(two[0] / "straight").path(8)
    assert sorted(p.name for p in path.iterdir()) == [
        "shard-00001-model-00001-of-00001.safetensors", "shard-00002-model-00001-of-00001.safetensors", "state.json",
    ]  # fmt: skip
    assert json.loads((path / "state.json").read_text())["processes"] == 2


def test_they_end_together(two, one):
    folder, (first, second) = two
    for found in (first, second):
        assert found["interrupted"] == ["interrupted", 3]
        assert found["not_a_number"].startswith("step 3: the loss is nan, in its batch 2; nothing was updated")
        assert "the last checkpoint is" in found["not_a_number"] and found["not_a_number"].endswith("whole")
        assert found["unwritable"].startswith("no checkpoint of step 1 could be written in")
        assert "is damaged" in found["damaged"] and found["damaged"].endswith("unchanged")
    assert one("not_a_number").split(";")[0] == first["not_a_number"].split(";")[0]
    assert one("interrupted") == first["interrupted"]
    assert len(_parallel.told(folder / "interrupted")) == 3  # one log


def test_without_torchrun_there_is_one():
    assert start() == Processes(0, 1)
    assert Processes().first(lambda: 3) == 3 and Processes().any(True) and Processes().sum([1.5]) == [1.5]


@pytest.mark.slow
def test_a_compiled_run_of_two(tmp_path):
    """By the command line: torch.compile over shards has the losses of the run without it."""
    lines = [json.dumps({"text": f"{i} and {i} are {2 * i}, says the book of sums."}) for i in range(120)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    sizes = "--vocab-size 300 --tokens 256 --max-length 64 --steps 5 --warmup 1 --eval-every 2 --log-every 1"
    sizes += " --lint off --samples 0"
    start_two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastllm"]
    losses = {}
    for compiled in ("false", "true"):
        command = ["pretrain", "--arch", "decoder", "--preset", "nano", "--data", str(tmp_path / "text.jsonl")]
        command += ["--out", str(tmp_path / compiled), "--compile", compiled, *sizes.split()]
        paths = os.pathsep.join(sys.path)
        done = subprocess.run(
            start_two + command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        losses[compiled] = _parallel.told(tmp_path / compiled)
    assert losses["true"] == pytest.approx(losses["false"], **ALIKE) and len(losses["true"]) == 5
