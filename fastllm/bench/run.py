"""A benchmark run: its jobs in a child process for each malloc setting, which glibc reads once at start; one result."""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..info import machine, versions
from .harness import GPU, QUICK, Settings
from .measure import Job, measure, peaks
from .select import select

SCHEMA = 1
TUNED = {  # freed memory stays with the process: no page faults, the larger part of torch's time on large temporaries
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 34),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
}
Result = dict[str, Any]


def malloc_settings(choice: str, device: str) -> list[str]:
    """The settings to run under: "default", "tuned" or both."""
    if choice not in ("default", "tuned", "both"):
        raise ValueError(f"no malloc setting {choice!r}; allowed: default, tuned, both")
    tunable = device == "cpu" and platform.libc_ver()[0] == "glibc"
    if choice == "tuned" and not tunable:
        raise ValueError("malloc=tuned needs glibc and the CPU; use default")
    return [choice] if choice != "both" else ["default", "tuned"] if tunable else ["default"]


def run(
    ops: Sequence[str] = (),
    device: str = "cpu",
    dtypes: Sequence[str] = (),
    shape: str = "",
    backward: bool = True,
    compiled: bool = True,
    malloc: str = "both",
    settings: Settings | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Result:
    """Measures what the filters leave and returns the result as it is written to JSON."""
    settings = settings or (GPU if device == "cuda" else Settings())
    filters = {"ops": list(ops), "device": device, "dtypes": list(dtypes), "shape": shape, "backward": backward}
    total = len(select(**filters))
    result: Result = {
        "schema": SCHEMA,
        "command": shlex.join(["fastllm", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
        "device": device,
        "settings": dataclasses.asdict(settings),
        "malloc": {},
        "ceilings": {},
        "rows": [],
        "failures": [],
        "interrupted": False,
    }
    request = {"filters": filters, "compiled": compiled, "settings": result["settings"]}
    for name in malloc_settings(malloc, device):
        variables = TUNED if name == "tuned" else {}
        result["malloc"][name] = variables
        begun = 1
        try:
            for message in _child(request, variables):
                if "ceilings" in message:
                    result["ceilings"][name] = message["ceilings"]
                elif "begin" in message:
                    progress(f"[{begun}/{total}] malloc {name}: {message['begin']}")
                    begun += 1
                elif "failure" in message:
                    result["failures"].append({**message["failure"], "malloc": name})
                else:
                    result["rows"].append({**message["row"], "malloc": name})
        except KeyboardInterrupt:
            result["interrupted"] = True
            break
    return result


def _child(request: dict[str, Any], variables: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Runs the jobs in a process of their own and yields its messages."""
    clean = {k: v for k, v in os.environ.items() if k not in TUNED}
    quiet = {"KINETO_LOG_LEVEL": "6"} if "KINETO_LOG_LEVEL" not in clean else {}  # the profiler's notes on stderr
    # not `-m`: that puts the working directory first, and perhaps a source tree before the installed package
    code = f"import sys; sys.path[:] = {sys.path!r}; from fastllm.bench.run import child; child()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**clean, **quiet, **variables},
    )  # fmt: skip
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request))
            process.stdin.close()
        for line in process.stdout:
            yield json.loads(line)
        if process.wait():
            raise RuntimeError(f"the measuring process ended with status {process.returncode}; its message is above")
    finally:
        process.terminate()
        process.wait()


def measure_all(jobs: list[Job], settings: Settings, compiled: bool) -> Iterator[dict[str, Any]]:
    """What the child sends: the ceilings, then for each job its label and its row."""
    device = jobs[0].device
    yield {"ceilings": peaks(device, list(dict.fromkeys(job.dtype for job in jobs)))}
    for job in jobs:
        yield {"begin": job.label}
        try:
            yield {"row": measure(job, settings, compiled)}
        except Exception as error:  # one broken op must not take the others' rows with it
            traceback.print_exc()
            yield {"failure": {"job": job.label, "error": f"{type(error).__name__}: {error}"}}


def child() -> None:
    """The measuring process: a request on stdin, one JSON line a message on stdout."""
    with contextlib.suppress(KeyboardInterrupt):
        _answer(json.load(sys.stdin))


def _answer(request: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    torch.manual_seed(0)
    for message in measure_all(select(**request["filters"]), Settings(**request["settings"]), request["compiled"]):
        print(json.dumps(message), file=answers, flush=True)


__all__ = ["QUICK", "Settings", "child", "measure_all", "run"]
