"""Capture and replay: no Python in a replayed step, nothing foreign in a capture, memory that lives as long as it."""

import gc
import sys
import weakref
from collections import Counter

import _tiny
import pytest
import torch
from _paged import SequenceCache

from fastllm import _C, ops
from fastllm.decode.graph import capture


@pytest.fixture
def model():
    """A step of a tiny decoder at token 4 of a sequence, and its captured form."""
    decoder = _tiny.decoder()
    cache = SequenceCache(decoder.config, 64)
    with torch.inference_mode():
        decoder.step(torch.tensor([5, 6, 7, 8]), cache.chunk(0, 4))
    cache.ids.fill_(9)
    cache.seek(5)

    def step() -> torch.Tensor:
        return decoder.logits(decoder.step(cache.ids, cache.next_token()))

    with torch.inference_mode():
        return step, capture(step), cache


def interpreter_events(call) -> Counter:
    """What the interpreter did during call(), but for reading this function's own frame."""
    events, here = Counter(), sys._getframe()

    def count(frame, event, _):
        if frame is not here:
            events[event] += 1
        return count

    previous = sys.gettrace(), sys.getprofile()
    sys.settrace(count)
    sys.setprofile(lambda frame, event, argument: count(frame, f"profile {event}", argument) and None)
    try:
        call()
    finally:
        sys.settrace(previous[0])
        sys.setprofile(previous[1])
    return events


def test_no_python_in_a_replayed_step(model):
    step, captured, _ = model
    replay = captured.replay  # one frame: its call, its one line, its return, and the call into the core
    events = interpreter_events(replay)
    frame = {"call": 1, "line": 1, "return": 1}
    assert events == {**frame, **{f"profile {e}": 1 for e in ("call", "return", "c_call", "c_return")}}
    with torch.inference_mode():
        eager = interpreter_events(step)
    assert eager["line"] > 1000 and eager["call"] > 100, eager  # the counter sees Python where there is some


def test_a_replay_is_the_step(model):
    step, captured, cache = model
    with torch.inference_mode():
        for token, length in ((9, 5), (30, 5), (31, 6), (32, 17)):
            cache.ids.fill_(token)
            cache.seek(length)
            expected = step()
            for threads in (1, 2, 0):
                captured.outputs.zero_()
                assert captured.replay(threads) == 0
                assert torch.equal(captured.outputs, expected)
    assert len(captured) == len(captured.kernels()) == 2 + 6 * _tiny.CONFIG.layers
    assert captured.kernels()[-1] == "linear"


def test_a_replay_reports_what_a_kernel_found(model):
    _, captured, cache = model
    cache.ids.fill_(_tiny.CONFIG.vocab)
    assert captured.replay() != 0
    cache.ids.fill_(3)
    assert captured.replay() == 0


X, WEIGHT, STRIDED = torch.randn(2, 32), torch.ones(32), torch.randn(32, 2).t()
HALF, SINKS = X.bfloat16().view(1, 2, 1, 32), ops.AttentionSpec(sinks=torch.zeros(1, dtype=torch.bfloat16))
FOREIGN = {
    "add": lambda: ops.rms_norm(torch.add(X, 1), WEIGHT),
    "mul_": lambda: ops.rms_norm(X, WEIGHT).mul_(2),
    "fill_": lambda: torch.empty(3).fill_(1),
    "(item|_local_scalar_dense)": lambda: ops.rms_norm(X, WEIGHT)[0, 0].item(),
    "(contiguous|clone)": lambda: ops.rms_norm(STRIDED, WEIGHT),  # hidden copies, in our own launchers
    "(to|_to_copy)": lambda: ops.attention(HALF, HALF, HALF, SINKS),
    "(reshape|clone|_unsafe_view|view)": lambda: ops.rms_norm(STRIDED.reshape(4, 16), WEIGHT[:16]),
}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_capture_refuses_what_a_replay_would_miss(name, mode):
    with mode():
        for _ in range(2):
            with pytest.raises(RuntimeError, match=rf"aten.{name}\S* cannot be captured.*Move it out of the step"):
                capture(FOREIGN[name])
            # nothing goes on recording: an eager call between is no part of the next capture
            ops.rms_norm(X, WEIGHT)
            assert capture(lambda: ops.rms_norm(X, WEIGHT)).kernels() == ["rms_norm"]


def test_views_are_free():
    x = torch.randn(4, 2, 32)
    with torch.inference_mode():
        captured = capture(lambda: ops.rms_norm(x.contiguous().reshape(8, 32).split((6, 2))[0].to(x.dtype), WEIGHT))
        assert torch.equal(captured.outputs, ops.rms_norm(x.view(8, 32)[:6], WEIGHT))


def test_an_exception_of_the_step_ends_the_recording():
    def fail():
        ops.rms_norm(X, WEIGHT)
        raise ZeroDivisionError

    for _ in range(2):
        with torch.inference_mode(), pytest.raises(ZeroDivisionError):
            capture(fail)
    with torch.inference_mode():
        ops.rms_norm(X, WEIGHT)
        assert len(capture(lambda: ops.rms_norm(X, WEIGHT))) == 1


def test_a_capture_within_a_capture_is_refused():
    with torch.inference_mode():
        with pytest.raises(RuntimeError):
            capture(lambda: capture(lambda: ops.rms_norm(X, WEIGHT)))
        assert len(capture(lambda: ops.rms_norm(X, WEIGHT))) == 1


def test_memory_lives_as_long_as_the_capture():
    x, refs = torch.randn(4, 32), []

    def step():
        hidden = ops.rms_norm(x, WEIGHT)
        refs.append(weakref.ref(hidden))
        return ops.rms_norm(hidden, WEIGHT)

    with torch.inference_mode():
        captured = capture(step)
        expected = captured.outputs.clone()
        gc.collect()
        assert refs[0]() is not None
        junk = [torch.full((4, 32), 7.0) for _ in range(100)]  # would land in memory that had been given back
        captured.outputs.zero_()
        captured.replay()
        assert torch.equal(captured.outputs, expected) and all((j == 7).all() for j in junk)
        del captured
        gc.collect()
        assert refs[0]() is None


def test_a_capture_imports_no_compiler():
    """torch's default for a dispatch mode would: seconds, and 45 MB."""
    import subprocess

    code = (
        "import sys, torch\nfrom fastllm import ops\nfrom fastllm.decode.graph import capture\n"
        "with torch.inference_mode(): capture(lambda: ops.rms_norm(torch.empty(2, 32), WEIGHT))\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    ).replace("WEIGHT", "torch.empty(32)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_threads_beyond_the_machine():
    with torch.inference_mode():
        captured = capture(lambda: ops.rms_norm(X, WEIGHT))
        expected = captured.outputs.clone()
        for threads in (_C.max_threads() + 5, -1):
            captured.outputs.zero_()
            captured.replay(threads)
            assert torch.equal(captured.outputs, expected)
