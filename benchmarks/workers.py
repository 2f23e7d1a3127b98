"""Contenders in worker processes, measured one at a time on a quiet machine: what the end-to-end benchmarks share.

A worker is a script that is given a JSON record and ends in `serve(KINDS, answer)`. It reads one JSON object a line from
stdin and answers with one on stdout; {"do": "load"} makes the contender, everything else is the script's own. An error
comes back as {"error": text}. `Worker` is the other end of the pipe; it stops its process by SIGSTOP whenever no answer
is awaited, so a waiting contender costs nothing, spinning OpenMP threads included.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import psutil

# A malloc that keeps its pages: first touch of fresh memory is slow, and a win over page faults is no win.
TUNED_MALLOC = {
    "MALLOC_TOP_PAD_": str(1 << 26),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
}


def environment(threads: int, tuned: bool) -> dict[str, str]:
    """Variables of a worker. tuned: with that malloc, as peers have it; ours runs untuned in inference."""
    return {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | (TUNED_MALLOC if tuned else {})


def serve(kinds, answer):
    """Runs a worker: makes kinds[record["kind"]](**record) when asked to load, then answers until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr, so that replies stay clean
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: no worker outlives the benchmark
    spec, contender = json.loads(sys.argv[1]), None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if request["do"] == "load":
                contender = kinds[spec["kind"]](**spec)
                reply = {"bytes_per_token": getattr(contender, "bytes_per_token", None)}
            else:
                reply = answer(contender, request)
        except Exception as error:
            import traceback

            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


class Worker:
    """A contender's process: `ask` wakes it, waits for the answer and stops it again."""

    def __init__(self, script, spec, environment):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process lives)
        self.process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,  # a group of its own, so that helpers of the worker are stopped with it
        )

    def ask(self, **request):
        """The answer to one request; RuntimeError with the worker's words if it failed or died."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the worker ended with status {self.process.wait()}: {self._last_words()}")
        os.killpg(self.process.pid, signal.SIGSTOP)
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    def _last_words(self):
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"

    def close(self):
        """End the process and all that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.log.close()


class Meter:
    """Takes samples while the machine is quiet: other processes below `limit` cores."""

    def __init__(self, limit: float, patience: float):
        from fastllm.bench.load import other_load  # not at the top: a peer's worker has no use for torch

        self.limit, self.patience = limit, patience  # patience: seconds left to wait or to throw away
        self.foreign = other_load()  # a clock of what this process did not use; None where the system does not say
        self.discarded, self.noisy, self.kept = 0, 0, 0

    def sample(self, worker: Worker, **request) -> dict:
        """The worker's reply from a quiet moment; when patience has run out, a noisy one, which is counted."""
        while True:
            while self.patience > 0 and not self._watch(worker, lambda: time.sleep(0.25))[1]:
                pass
            reply, quiet = self._watch(worker, lambda: worker.ask(**request))
            if quiet or self.patience <= 0:
                self.noisy += not quiet
                self.kept += 1
                return reply
            self.discarded += 1

    def _watch(self, worker: Worker, action) -> tuple:
        """(result of `action`, was the machine quiet meanwhile); a noisy moment costs patience."""
        start, before = time.monotonic(), self._others(worker)
        result = action()
        used, seconds = self._others(worker) - before, time.monotonic() - start
        quiet = used / seconds <= self.limit
        self.patience -= 0 if quiet else seconds
        return result, quiet

    def _others(self, worker: Worker) -> float:
        """CPU seconds that the machine spent so far outside this process and the worker."""
        if self.foreign is None:
            return 0.0
        root = psutil.Process(worker.process.pid)
        tree = (root, *root.children(recursive=True))
        return self.foreign() - sum(sum(process.cpu_times()[:4]) for process in tree)  # [:4]: with ended children


# ---------------------------------------------------------------- what a report says beside its rows


def machine() -> dict:
    """What the figures depend on."""
    from fastllm import info

    return {key: value for key, value in info.machine().items() if key not in ("openmp", "gpus", "driver")}


def versions() -> dict:
    """Versions of all that was measured; None for what is not installed."""
    from fastllm import info

    return info.versions() | {name: info.package(name) for name in ("transformers", "llama-cpp-python", "gguf")}


def aligned(lines: list[list[str]], left: int = 2) -> str:
    """Rows of cells as text; the first `left` columns begin at the left."""
    columns = []
    for i, column in enumerate(zip(*lines, strict=True)):
        width = max(map(len, column))
        columns.append([cell.ljust(width) if i < left else cell.rjust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def finish(result: dict, meter: Meter, path) -> None:
    """Adds how quiet it was, prints what failed and what was missed, and writes the JSON file whole or not at all."""
    if meter.foreign is None:
        result["failures"].append("not quiet: this system does not say how busy it is")
    if meter.noisy:
        result["failures"].append(f"not quiet: {meter.noisy} of {meter.kept} samples taken beside other work")
    result |= {"samples_discarded": meter.discarded, "ok": not result["failures"] and not result["missed"]}
    for word, lines in (("FAIL", result["failures"]), ("MISSED", result["missed"])):
        print("\n".join(f"{word} {line}" for line in lines) + "\n" * bool(lines), end="")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
