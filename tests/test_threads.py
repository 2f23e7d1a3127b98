"""The thread team and the plans: torch's pool and its size, forks, several callers at once, record and replay."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from fastllm import _C, ops

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the team runs on torch's OpenMP pool on Linux alone")


def python(script: str, **environment: str) -> str:
    """Runs a script in a fresh interpreter and returns what it prints; a hang or a failure fails the test."""
    run = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.strip()


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------- the team


@LINUX
def test_one_openmp_runtime_and_it_is_torchs():
    script = """
import os, re, fastllm
from fastllm import _C
maps = open("/proc/self/maps").read()
pools = {os.path.realpath(p) for p in re.findall(r"(/\\S*/lib(?:gomp|omp|iomp5)[^/\\s]*)", maps)}
assert pools == {os.path.realpath(_C.openmp_path())}, (pools, _C.openmp_path())
print(_C.openmp_path())
"""
    assert "torch" in python(script)


@LINUX
def test_size_of_the_team_is_torchs(threads):
    assert _C.max_threads() == torch.get_num_threads() == threads


@LINUX
def test_a_new_thread_follows_torchs_setting(threads):
    """OpenMP keeps the number per thread; torch hands its own on when a thread first asks."""
    seen = []
    other = threading.Thread(target=lambda: seen.append(_C.max_threads()))
    other.start()
    other.join()
    assert seen == [threads]


@LINUX
def test_thread_limit_nests_and_belongs_to_its_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert _C.set_thread_limit(2) == 0
        assert _C.max_threads() == 2
        assert _C.set_thread_limit(1) == 2
        assert _C.max_threads() == 1
        seen = []
        other = threading.Thread(target=lambda: seen.append(_C.set_thread_limit(0)))
        other.start()
        other.join()
        assert seen == [0], "another thread saw this thread's limit"
        assert _C.set_thread_limit(2) == 1
        assert _C.set_thread_limit(100) == 2
        assert _C.max_threads() == 3, "a limit above torch's own changes nothing"
    finally:
        _C.set_thread_limit(0)
        torch.set_num_threads(before)


@LINUX
def test_forked_child_runs_and_is_right():
    """The pool's threads do not live in a child; entering it there would hang."""
    script = """
import os, time, torch, fastllm
from fastllm import _C, ops
torch.set_num_threads(2)
x, w = torch.randn(512, 512), torch.randn(512)
plain = torch.nn.functional.rms_norm(x, (512,), w, 1e-6)  # in the child torch itself would hang
FIRST
if pid := os.fork():
    for _ in range(600):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(pid, 9)
        raise SystemExit("the child hangs")
    assert status == 0, status
    assert _C.max_threads() == 2
else:
    serial, y = _C.max_threads() == 1, ops.rms_norm(x, w)
    torch.set_num_threads(1)
    os._exit(0 if serial and torch.allclose(y, plain, atol=1e-5) else 1)
"""
    python(script.replace("FIRST", "ops.rms_norm(x, w)"))
    python(script.replace("FIRST", "pass"))  # torch has entered the pool, fastllm has not


def test_several_callers_at_once(threads):
    inputs = [torch.randn(300, 257) for _ in range(4)]
    weight = torch.randn(257)
    expected = [ops.rms_norm(x, weight) for x in inputs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(ops.rms_norm(inputs[i], weight), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for c in callers:
        c.start()
    for c in callers:
        c.join()
    assert not wrong


# ---------------------------------------------------------------------------------------------------------------- plans


class Step:
    """Two norms over one buffer cut differently, then a backward: they need the barrier between them and within."""

    def __init__(self, rows: int = 192, cols: int = 320):
        self.x, self.w, self.v = torch.randn(rows, cols), torch.randn(cols), torch.randn(rows)
        self.y, self.z, self.dx = torch.zeros(rows, cols), torch.zeros(cols, rows), torch.zeros(cols, rows)
        self.rstd, self.dv = torch.zeros(cols), torch.zeros(rows)

    def run(self) -> None:
        (rows, cols), p = self.x.shape, torch.Tensor.data_ptr
        _C.rms_norm(p(self.y), 0, 0, p(self.x), 0, p(self.w), rows, cols, cols, 0, 0, 1e-6)
        _C.rms_norm(p(self.z), 0, p(self.rstd), p(self.y), 0, p(self.v), cols, rows, rows, 0, 0, 1e-6)
        _C.rms_norm_backward(
            p(self.dx), p(self.dv), p(self.z), 0, p(self.y), p(self.v), p(self.rstd), cols, rows, rows, 0, rows, 0
        )

    def results(self) -> list[torch.Tensor]:
        return [t.clone() for t in (self.y, self.z, self.rstd, self.dx)]


@pytest.mark.parametrize("replayers", [1, 2])
def test_replay_equals_a_fresh_run(replayers):
    step = Step()
    with _C.Plan() as plan:
        step.run()
    assert len(plan) == 3 and plan.kernels() == ["rms_norm", "rms_norm", "rms_norm_backward"]
    for _ in range(5):
        step.x.normal_()
        step.run()
        fresh, dv = step.results(), step.dv.clone()
        for t in (step.y, step.z, step.rstd, step.dx, step.dv):
            t.fill_(float("nan"))
        assert plan.replay(threads=replayers) == 0
        assert all(torch.equal(a, b) for a, b in zip(step.results(), fresh, strict=True))
        torch.testing.assert_close(step.dv, dv)  # summed by thread: its order is the team's


def test_replay_many_times_and_in_several_threads_at_once():
    steps = [Step() for _ in range(3)]
    plans = []
    for step in steps:
        with _C.Plan() as plan:
            step.run()
        plans.append(plan)
    expected = [step.results() for step in steps]
    runners = [threading.Thread(target=plan.replay, kwargs={"times": 50}) for plan in plans]
    for r in runners:
        r.start()
    for r in runners:
        r.join()
    for step, results in zip(steps, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step.results(), results, strict=True))


def test_replay_enters_no_python():
    step = Step()
    with _C.Plan() as plan:
        step.run()
    events = []
    sys.setprofile(lambda frame, event, arg: events.append((event, getattr(arg, "__name__", None))))
    plan.replay(times=20)
    sys.setprofile(None)
    # the call of replay itself and that of setprofile: nothing for the sixty kernels in between
    assert [e for e in events if e[1] != "setprofile"] == [("c_call", "replay"), ("c_return", "replay")]


def test_other_threads_run_python_during_a_replay():
    step = Step()
    with _C.Plan() as plan:
        step.run()
    replay = threading.Thread(target=plan.replay, kwargs={"times": 5000})
    replay.start()
    ticks = 0
    while replay.is_alive():
        ticks += 1
    assert ticks > 10, "the replay held the interpreter's lock"


def test_recording_is_one_per_thread_and_per_plan():
    first, second = _C.Plan(), _C.Plan()
    with pytest.raises(RuntimeError, match="does not record into this plan"):
        first.end()
    first.begin()
    for plan in (first, second):
        with pytest.raises(RuntimeError, match="records already"):
            plan.begin()
    with pytest.raises(RuntimeError, match="does not record into this plan"):
        second.end()
    with pytest.raises(RuntimeError, match="still records"):
        first.replay()
    step, errors = Step(), []

    def elsewhere() -> None:
        try:
            first.begin()
        except RuntimeError as error:
            errors.append(str(error))
        with second:
            step.run()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    first.end()
    assert len(errors) == 1 and len(first) == 0 and len(second) == 3


def test_an_exception_leaves_the_thread_clean():
    step, plan = Step(), _C.Plan()
    with pytest.raises(ZeroDivisionError), plan:
        step.run()
        _ = 1 // 0
    with pytest.raises(TypeError, match="takes 12 arguments"), plan:
        _C.rms_norm(1)
    assert len(plan) == 3, "a call that did not run was recorded"
    step.run()
    assert len(plan) == 3, "the thread still records"
    dropped = _C.Plan()
    dropped.begin()
    del dropped
    with _C.Plan() as after:
        step.run()
    assert len(after) == 3


@LINUX
def test_a_plan_is_freed():
    def resident() -> int:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    x = torch.ones(2)
    p = x.data_ptr()

    def many(count: int) -> None:
        for _ in range(count):
            with _C.Plan():
                for _ in range(100):
                    _C.rms_norm(p, 0, 0, p, 0, p, 1, 1, 1, 0, 0, 0.0)

    many(50)
    before = resident()
    many(2000)  # 50 MB of records, if they were kept
    assert resident() - before < 10e6


@LINUX
def test_out_of_memory_is_a_memory_error():
    script = """
import resource, torch, fastllm
from fastllm import _C, ops
x, w = torch.randn(64, 512), torch.randn(512)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, -1))
cols = 2**34
def huge():  # the scratch is asked for before any pointer is read
    _C.rms_norm_backward(0, 0, 0, 0, 0, 0, 0, 1, cols, cols, 0, cols, 0)
for _ in range(2):
    try:
        huge()
    except MemoryError:
        continue
    raise SystemExit("no MemoryError")
with _C.Plan() as plan:
    try:
        huge()
    except MemoryError:
        pass
assert len(plan) == 0
x.requires_grad_()
ops.rms_norm(x, w).sum().backward()
assert x.grad.isfinite().all()
print("ok")
"""
    assert python(script) == "ok"
