"""Selection, rows, and whole runs in their child process."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastllm.bench import case, measure, run, select
from fastllm.bench.cases import suites
from fastllm.bench.harness import Settings
from fastllm.bench.measure import FORWARD, OURS, TRAIN, Job

FLEETING = Settings(samples=2, sample_s=1e-4, block_s=0.0, limit_s=0.05)
ROOT = Path(__file__).parents[2]


def smallest(suite):
    return min(suite.benchmark, key=lambda c: (c.bytes(4), c.flops))


# ------------------------------------------------------------------------------------------------------------- choosing


def test_select_derives_jobs_from_suites():
    jobs = select.select()
    assert {job.suite.op for job in jobs} == set(suites())
    assert {job.dtype for job in jobs} <= {torch.float32, torch.bfloat16}
    jobs = select.select(["rms_norm"], dtypes=["float16"], shape="RESIDUAL")
    assert [(j.case.label, j.dtype, j.direction) for j in jobs] == [
        ("2048x2048 +residual", torch.float16, FORWARD),
        ("2048x2048 +residual", torch.float16, TRAIN),
    ]
    assert all(job.direction == FORWARD for job in select.select(backward=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ["rmsnorm"]}, "no op 'rmsnorm' to measure; did you mean rms_norm"),
        ({"ops": ["zzzz"]}, "no op 'zzzz' to measure; there are: .*rms_norm"),
        ({"dtypes": ["fp8"]}, "no dtype 'fp8'; allowed: float32, bfloat16, float16"),
        ({"ops": ["rms_norm"], "shape": "2048x2047"}, "no case of rms_norm has '2048x2047' .* did you mean 2048x2048"),
        ({"device": "tpu"}, "no device 'tpu'; allowed: cpu, cuda"),
    ],
)
def test_selection_errors_name_what_there_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        select.select(**arguments)


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        select.select(device="cuda")


def test_every_suite_has_its_pytest_benchmark():
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert set(suites()) <= files, "add benchmarks/bench_<op>.py, a copy of bench_rms_norm.py"


def test_pytest_benchmark_runs_them(tmp_path):
    """The README's `pytest benchmarks`, of one case."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "benchmarks/bench_rms_norm.py",
        "-k",
        "1x576",
        "-p",
        "no:cacheprovider",
    ]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command += ["--benchmark-json", str(tmp_path / "new.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout
    names = [row["name"] for row in json.loads((tmp_path / "new.json").read_text())["benchmarks"]]
    assert names == [f"test_rms_norm[1x576-forward-{rival}]" for rival in ("fastllm", "torch")]


# ----------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("op", suites())
def test_the_smallest_case_of_every_suite_is_measured(op):
    suite = suites()[op]
    row = measure.measure(Job(suite, smallest(suite), suite.dtypes[0], FORWARD), FLEETING, compiled=False)
    check_row(row)
    assert not [note for note in row["notes"] if note.startswith("torch ")], row["notes"]


def one_of_each_case():
    """All of them take more than an hour: of the first case the first dtype and direction, of the next the next."""
    cases: dict[tuple, list] = {}
    for job in select.select():
        cases.setdefault((job.suite.op, job.case.label), []).append(job)
    return [jobs[i % len(jobs)] for i, jobs in enumerate(cases.values())]


@pytest.mark.slow
@pytest.mark.parametrize("job", one_of_each_case(), ids=lambda job: job.label)
def test_every_case_is_measured(job):
    check_row(measure.measure(job, FLEETING, compiled=False))


def test_compile_and_backward():
    suite = suites()["rms_norm"]
    row = measure.measure(Job(suite, smallest(suite), torch.float32, TRAIN), FLEETING, compiled=True)
    check_row(row)
    assert row["direction"] == TRAIN and {"torch", "compile"} <= row["ratios"].keys() and not row["notes"]
    forward = measure.measure(Job(suite, smallest(suite), torch.float32, FORWARD), FLEETING, compiled=False)
    assert row["bytes"] > forward["bytes"] and row["flops"] > forward["flops"]


def test_a_peer_that_cannot_run_is_a_note():
    def missing(**_):
        raise ImportError("no such library\nand more")

    suite = dataclasses.replace(suites()["rms_norm"], peers={"other": missing, "twin": suites()["rms_norm"].reference})
    row = measure.measure(Job(suite, smallest(suite), torch.float32, FORWARD), FLEETING, compiled=False)
    assert row["notes"] == ["other does not run here: ImportError: no such library"]
    assert row["ratios"].keys() == {"torch", "twin"}


def test_the_bound_follows_the_intensity():
    bandwidth, arithmetic = measure.ceilings("cpu", torch.float32)
    assert measure.bound_by(10**9, 10**6, bandwidth, arithmetic) == "memory"
    assert measure.bound_by(10**6, 10**12, bandwidth, arithmetic) == "compute"
    assert measure.bound_by(0, 0, bandwidth, arithmetic) is None


def check_row(row):
    """The schema of a row, and what must hold between its numbers."""
    json.dumps(row)
    kinds = {
        "op": str, "case": str, "dtype": str, "direction": str, "device": str, "bytes": int, "flops": int, "cache": str,
        "rivals": dict, "ratios": dict, "discarded": int, "busy": bool, "notes": list,
    }  # fmt: skip
    assert {name: type(row[name]) for name in kinds} == kinds
    ours = row["rivals"][OURS]
    for rival in row["rivals"].values():
        assert 0 < rival["fast"] <= rival["q1"] <= rival["median"] <= rival["q3"] and rival["samples"] >= 1
        assert rival["memory_bytes"] >= 0
    for name, ratio in row["ratios"].items():
        assert ratio == pytest.approx(row["rivals"][name]["median"] / ours["median"])
    if row["bound"]:
        work = row["bytes"] if row["bound"] == "memory" else row["flops"]
        assert ours["rate"] == pytest.approx(work / ours["median"] / 1e9)
        assert row["fraction"] == pytest.approx(ours["rate"] / row["ceiling"])
        assert row["unit"] in ("GB/s", "GFLOP/s", "GOP/s")


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_run_in_a_child_process():
    seen = []
    filters = {"ops": ["rms_norm"], "shape": "1x576", "dtypes": ["float32"], "malloc": "default"}
    result = run.run(**filters, compiled=False, settings=FLEETING, progress=seen.append)
    json.dumps(result)
    assert [(r["direction"], r["malloc"]) for r in result["rows"]] == [(FORWARD, "default"), (TRAIN, "default")]
    for row in result["rows"]:
        check_row(row)
    assert result["schema"] == run.SCHEMA and result["ceilings"].keys() == result["malloc"].keys() == {"default"}
    assert result["machine"]["threads"] >= 1 and result["versions"]["torch"] == torch.__version__
    assert not result["failures"] and not result["interrupted"]
    assert seen[0] == "[1/2] malloc default: rms_norm 1x576 float32 forward" and len(seen) == 2


def test_children_are_merged_and_an_interruption_keeps_the_rows(monkeypatch):
    def child(request, variables):
        yield {"ceilings": {"memory read": {"rate": 1.0 if variables else 2.0, "unit": "GB/s"}}}
        yield {"begin": "first"}
        yield {"row": {"op": "x"}}
        yield {"begin": "second"}
        yield {"failure": {"job": "second", "error": "no"}}
        if variables:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "_child", child)
    monkeypatch.setattr(run, "malloc_settings", lambda choice, device: ["default", "tuned"])
    result = run.run(settings=FLEETING)
    assert result["rows"] == [{"op": "x", "malloc": "default"}, {"op": "x", "malloc": "tuned"}]
    assert [f["malloc"] for f in result["failures"]] == ["default", "tuned"] and result["interrupted"]
    assert {name: c["memory read"]["rate"] for name, c in result["ceilings"].items()} == {"default": 2.0, "tuned": 1.0}


@pytest.mark.skipif(
    "tuned" not in run.malloc_settings("both", "cpu"), reason="malloc is tuned through glibc's environment"
)
def test_the_child_gets_the_malloc_settings(monkeypatch):
    captured = {}

    class Process:
        def __init__(self, command, env, **_):
            captured.update(command=command, env=env)
            raise OSError("stop here")

    monkeypatch.setattr(run.subprocess, "Popen", Process)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    for name, expected in (("tuned", run.TUNED), ("default", {})):
        with pytest.raises(OSError, match="stop here"):
            run.run(["rms_norm"], malloc=name, settings=FLEETING)
        assert {k: v for k, v in captured["env"].items() if k.startswith("MALLOC_")} == expected
        assert captured["command"][0] == sys.executable


def test_malloc_settings():
    with pytest.raises(ValueError, match="no malloc setting 'jemalloc'; allowed: default, tuned, both"):
        run.malloc_settings("jemalloc", "cpu")
    assert run.malloc_settings("both", "cuda") == ["default"]
    with pytest.raises(ValueError, match="needs glibc and the CPU"):
        run.malloc_settings("tuned", "cuda")


def test_a_broken_op_leaves_the_other_rows(monkeypatch):
    def broken(**_):
        raise RuntimeError("out of order")

    good = suites()["rms_norm"]
    bad = dataclasses.replace(good, run=broken)
    jobs = [Job(suite, smallest(good), torch.float32, FORWARD) for suite in (bad, good)]
    messages = list(run.measure_all(jobs, FLEETING, compiled=False))
    assert [next(iter(m)) for m in messages] == ["ceilings", "begin", "failure", "begin", "row"]
    assert messages[2]["failure"]["error"] == "RuntimeError: out of order"


def test_a_dying_child_is_reported(monkeypatch):
    monkeypatch.setattr(run.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the measuring process ended with status 1"):
        run.run(["rms_norm"], malloc="default", settings=FLEETING)


def test_costs_of_cases_are_plausible():
    """Bytes and flops are stated wherever there is a benchmark, backward ones where there is a gradient."""
    for op, suite in suites().items():
        for c in suite.benchmark:
            assert isinstance(c, case.Case) and c.bytes(4) > 0, f"{op} {c.label} states no bytes"
            assert c.bytes(4) >= c.bytes(2) and c.flops >= 0
