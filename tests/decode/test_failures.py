"""What goes wrong, and who is there: failures that stay with their request, interrupts, cancels, and several threads."""

import ctypes
import gc
import random
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import _lora
import pytest
import torch
from _engine import GREEDY, PENALISED, PROMPT, SAMPLED, Made, alone, engine, mixed, steps
from _paged import check

from fastllm import ops
from fastllm.decode import engine as engine_module
from fastllm.decode.engine import Engine
from fastllm.decode.reader import Reader
from fastllm.decode.steps import Steps

DECODE = str(Path(engine_module.__file__).parent)

# --------------------------------------------------------------------------------------------------------- failures


def poisoned(e: Engine, token: int):
    """Makes the embedding of `token` NaN; returns what undoes it."""
    panels = e.model.embedding.weight.data
    good = panels[token // 16, :, token % 16].clone()
    panels[token // 16, :, token % 16] = torch.nan
    return lambda: panels[token // 16, :, token % 16].copy_(good)


def test_one_that_fails_touches_no_other():
    e = engine(max_num_seqs=8)
    clean = Made(PROMPT[:6], GREEDY, 30)
    token = alone(clean)[10][0]  # poisoned as an input: the step that reads it finds no distribution
    last = next(i for i, (t, _) in enumerate(alone(clean)) if t == token)
    others = [s for s in (Made(PROMPT[i : i + 25], GREEDY, 25) for i in range(40)) if token not in s.prompt]
    others = [s for s in others[:10] if token not in [t for t, _ in alone(s)]][:5]
    assert len(others) == 5
    undo = poisoned(e, token)
    with pytest.raises(ops.LogitsError, match="hold a NaN"):
        e.run([*others[:2], clean, *others[2:]])
    assert clean.made == alone(clean)[: last + 1]
    assert [s.made for s in others] == [alone(s) for s in others]
    check(e.cache)
    undo()
    assert steps(e, PROMPT[:6], count=30) == alone(clean)


def test_a_prompt_that_fails_is_not_taken_up():
    """It fails in its first step, which is also the one that is captured."""
    e = engine()
    undo = poisoned(e, PROMPT[3])
    other = Made([t for t in PROMPT if t != PROMPT[3]][:50], SAMPLED, 10)
    failing = [Made(PROMPT[:60], SAMPLED, 10, index) for index in range(2)]
    with pytest.raises(ops.LogitsError):
        e.run([failing[0], other, failing[1]])
    assert other.made == alone(other) and PROMPT[3] not in other.tokens
    undo()
    check(e.cache)
    assert steps(e, PROMPT[:60], SAMPLED, 10) == alone(failing[0])


class Odd(Exception):
    """Cannot be copied."""

    def __init__(self, one, other):
        super().__init__(f"{one} {other}")


@pytest.mark.parametrize("error", [None, KeyError("x"), Odd("x", "y")], ids=["logits", "KeyError", "Odd"])
def test_each_has_an_error_of_its_own(monkeypatch, error):
    """Callers in several threads write to theirs, and read nothing of the others' rows."""
    e, sequences = engine(), [Made([*PROMPT[i : i + 2], PROMPT[3]]) for i in range(3)]
    if error:
        monkeypatch.setattr(e.steps, "capture", lambda *_: (_ for _ in ()).throw(error))
    else:
        poisoned(e, PROMPT[3])
    e.submit(sequences)
    e.wait(lambda: all(s.ended for s in sequences))
    errors = [s.error for s in sequences]
    assert len(set(map(id, errors))) == 3 and all(one.__traceback__ for one in errors)
    wanted = "x" if error else "sample: logits of row 0 hold a NaN"
    assert all(wanted in str(one) for one in errors)
    check(e.cache)


def test_a_receiver_that_fails_ends_its_own_sequence():
    e = engine()
    bad, good = Made(PROMPT[:20]), Made(PROMPT[5:30])
    bad.receive = lambda step: 1 / 0
    with pytest.raises(ZeroDivisionError):
        e.run([bad, good])
    assert good.made == alone(good) and bad.ended
    check(e.cache)


def test_memory_that_runs_out_while_prompts_are_read(monkeypatch):
    """Of those that are read together the others are read without the one for which there is none."""
    e, read, forwards = engine(), Reader.read, []
    first, bad, last = Made(PROMPT[5:30]), Made(PROMPT[:20]), Made(PROMPT[40:50])

    def refuse(self, pieces, pools):
        forwards.append([p.sequence for p in pieces])
        if any(p.sequence is bad for p in pieces):
            raise MemoryError("no more")
        return read(self, pieces, pools)

    monkeypatch.setattr(Reader, "read", refuse)
    with pytest.raises(MemoryError, match="no more"):
        e.run([first, bad, last])
    assert first.made == alone(first) and last.made == alone(last) and not bad.made
    assert forwards[:4] == [[first, bad, last], [first], [bad], [last]]
    check(e.cache)


@pytest.mark.parametrize("where", ["capture", "replay"])
def test_memory_that_suffices_for_fewer_rows(monkeypatch, where):
    """Those that do not fit fail one by one, newest first; the others go on in smaller steps."""
    e, forward, replay = engine(max_num_seqs=8), Steps.forward, Steps.replay
    sequences, late = [Made(PROMPT[i : i + 20], SAMPLED, 30) for i in range(3)], [Made(PROMPT[i:50]) for i in range(3)]

    def refuse(size):
        if size > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096000 bytes.")

    name, call = ("forward", forward) if where == "capture" else ("replay", replay)
    e.submit(sequences)
    while not all(s.tokens for s in sequences):
        e.step()
    sizes = lambda what: what if where == "capture" else len(what.outputs[0])  # noqa: E731
    monkeypatch.setattr(Steps, name, lambda self, what, *rest: (refuse(sizes(what)), call(self, what, *rest))[1])
    with pytest.raises(
        MemoryError, match="a step of 8 rows: 4.10 MB are asked for .*; others go on; .* max_num_seqs=8"
    ):
        e.run(late)
    for s in [*sequences, *(s for s in late if not s.error)]:
        e.wait(lambda s=s: s.ended)
        assert s.made == alone(s)
    assert [type(s.error) for s in late].count(MemoryError) == 2 and not any(s.error for s in sequences)
    check(e.cache)


@pytest.mark.parametrize("times", [1, 3])
def test_an_interrupt_loses_nothing(monkeypatch, times):
    """Ctrl-C between a replay and its tokens, and within a prompt: the others' tokens are made again, bit for bit."""
    e, sequences = engine(chunk=64), [Made(PROMPT[i : i + 150], PENALISED, 20) for i in range(4)]
    left = [times] * 2

    def interrupted(call, which):
        def run(self, *arguments):
            result = call(self, *arguments)
            if len(sequences[1].made) in (0, 4) and left[which]:
                left[which] -= 1
                raise KeyboardInterrupt
            return result

        return run

    monkeypatch.setattr(Steps, "replay", interrupted(Steps.replay, 0))
    monkeypatch.setattr(e.model, "step", interrupted(lambda self, *a, step=e.model.step: step(*a), 1).__get__(e.model))
    e.submit(sequences)
    seen = 0
    for s in sequences:
        while not s.ended:
            try:
                e.wait(lambda s=s: s.ended)
            except KeyboardInterrupt:
                seen += 1
    assert seen >= times and [s.made for s in sequences] == [alone(s) for s in sequences]
    check(e.cache)


# ------------------------------------------------------------------------------------------------- threads that die


class Killed(BaseException):
    """What ends a thread wherever it is."""


def survive(e: Engine, kill) -> bool:
    """A thread drives the engine and dies; another one's sequences go on. kill(thread) has it die; whether it did."""
    died = []

    def drive():
        try:
            with kill:
                e.run([Made(PROMPT[i : i + 20], SAMPLED, 5) for i in range(2)])
        except Killed:
            died.append(True)

    others = [Made(PROMPT[i : i + 9], GREEDY, 8) for i in (3, 4)]
    e.submit(others)
    threads = [threading.Thread(target=call, daemon=True) for call in (drive, lambda: e.run([Made(PROMPT[:3])]))]
    for t in threads:
        t.start()
        for _ in range(600):  # not 30 s at once: a machine may stop this process for a while
            t.join(0.05)
            if not t.is_alive():
                break
        else:
            pytest.fail("it hangs")
    for s in others:
        e.wait(lambda s=s: s.ended)
        if s.error:  # the one whose token was being taken
            assert "was interrupted as it took a token; ask again" in str(s.error)
        else:
            assert s.made == alone(s)
    check(e.cache)
    assert not e.scheduler.running and not e.scheduler.waiting and not e._live and not e._busy
    return bool(died)


class AtLine:
    """Raises at the n-th line that Python runs in the step, or in another call of the engine, and in what it calls."""

    def __init__(self, n: int, call=Engine.step):
        self.left, self.code = n, call.__code__

    def __enter__(self):
        sys.settrace(self._called)

    def __exit__(self, *_):
        sys.settrace(None)

    def _called(self, frame, event, arg):
        if frame.f_code is self.code or (frame.f_back and frame.f_back.f_trace):
            lock = frame.f_code.co_name in (
                "_between_steps",
                "_sweep_between_steps",
            )  # Python looks for signals at calls alone
            return self._line if frame.f_code.co_filename.startswith(DECODE) and not lock else None
        return None

    def _line(self, frame, event, arg):
        self.left -= event == "line"
        if not self.left:
            sys.settrace(None)
            raise Killed
        return self._line


class Sent:
    """Raises after some time, by the call that debuggers and time limits use to end a thread."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __enter__(self):
        send, who = ctypes.pythonapi.PyThreadState_SetAsyncExc, ctypes.c_ulong(threading.get_ident())
        self.timer = threading.Timer(self.seconds, send, (who, ctypes.py_object(Killed)))
        self.timer.start()

    def __exit__(self, *_):
        self.timer.cancel()


def test_a_thread_that_dies_at_any_line_of_a_step():
    e, line, died = engine(), 1, 0
    e.run([Made(PROMPT[i : i + 20], SAMPLED, 5) for i in range(4)])  # plans of all sizes
    while survive(e, AtLine(line)):
        line, died = line + 7, died + 1
    assert died > 60


def test_a_thread_that_is_killed_at_any_time():
    e, r = engine(), random.Random(1)
    e.run([Made(PROMPT[i : i + 20], SAMPLED, 5) for i in range(4)])
    died = sum(survive(e, Sent(r.uniform(0, 4e-3))) for _ in range(60))
    assert died > 10


@pytest.mark.parametrize(
    ("call", "stride"), [(Engine.load_adapter, 9), (Engine.unload_adapter, 4)], ids=["load", "unload"]
)
def test_a_thread_that_dies_as_adapters_change(call, stride):
    """Ctrl-C in load_adapter: the name can be loaded again, what it stands for then is what is served, and nothing is left."""
    e, line, died, alike = engine(), 1, True, []
    one, other = (_lora.draw(e.model, seed, lambda name: 4 * name.endswith("k_proj")) for seed in (1, 2))
    params = replace(GREEDY, adapter="name")
    while died:
        e.load_adapter("name", one)
        first, again = (Made(PROMPT[:40], params, 3) for _ in range(2))
        e.run([first])  # now there are a plan and pages of that name
        try:
            with AtLine(line, call):
                call(e, "name", *[other][: call is Engine.load_adapter])
            died = False
        except Killed:
            line += stride
        e.load_adapter("name", other)
        e.run([again])
        e.unload_adapter("name")
        alike.append((first.made, again.made))
        assert not e.adapters._held and not e.adapters.pools and not e.steps.adapted_plans
        check(e.cache)
    assert len(set(map(str, alike))) == 1 and alike[0][0] != alike[0][1] and len(alike) > 9


def test_a_thread_that_dies_as_it_puts_sequences_in_line():
    """Nobody waits for them: they leave the line, and their adapter."""
    e, line, died = engine(), 1, True
    e.load_adapter("name", _lora.draw(e.model, 1, lambda name: 4 * name.endswith("k_proj")))
    while died:
        try:
            with AtLine(line, Engine.submit):
                e.run([Made(PROMPT[:9], replace(GREEDY, adapter="name"), 2) for _ in range(2)])
            died = False
        except Killed:
            line += 1
        assert not e.scheduler.waiting and not e._live and not e.adapters.named["name"].users
    assert line > 20


# ---------------------------------------------------------------------------------------------------------- threads


def test_threads_drive_in_turns():
    """Each waits for its own sequences; all are served, by whoever runs a step."""
    e, sequences = engine(max_num_seqs=8), mixed(24)
    drivers, step = set(), e.step

    def counted():
        drivers.add(threading.get_ident())
        step()

    e.step = counted
    workers = [threading.Thread(target=e.run, args=(sequences[i::6],)) for i in range(6)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(120)
    assert [s.made for s in sequences] == [alone(s) for s in sequences]
    assert drivers <= {w.ident for w in workers}
    check(e.cache)


def test_who_waits_does_not_look_again_and_again():
    """A thread that another one serves asks once a step, not all the time."""
    e, asked = engine(), [0]
    slow, step = Made(PROMPT[:20], count=40), e.step

    def slowly():
        time.sleep(0.01)
        step()

    e.step = slowly
    e.submit([slow])

    def ready() -> bool:
        asked[0] += 1
        return slow.ended

    workers = [threading.Thread(target=e.wait, args=(ready,)) for _ in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert slow.ended and asked[0] < 41 * 2 * 4


def test_a_cancel_from_anywhere_never_waits():
    e, sequences = engine(), [Made(PROMPT[i : i + 30], SAMPLED, 500) for i in range(4)]
    inside, go = threading.Event(), threading.Event()
    step = e.step

    def held():
        inside.set()
        go.wait(30)
        step()

    e.step = held
    driver = threading.Thread(target=e.run, args=(sequences,))
    driver.start()
    assert inside.wait(30)
    e.cancel(sequences[1:])  # while a step runs
    assert not sequences[1].ended
    go.set()
    e.wait(lambda: all(s.ended for s in sequences[1:]))
    e.cancel(sequences)
    driver.join(30)
    assert not driver.is_alive() and all(s.ended for s in sequences)
    check(e.cache)


def test_a_cancel_within_a_step():
    """The garbage collector may close a stream anywhere, also in the thread that drives."""
    e, other = engine(), Made(PROMPT[:30], count=300)
    good = Made(PROMPT[:9], count=12)
    take = good.receive
    good.receive = lambda step: (e.cancel([other]), take(step))[1]
    e.run([other, good])
    assert good.made == alone(good) and other.ended and len(other.made) < 20
    e.cancel([other]), e.cancel([good])
    check(e.cache)


def test_a_cancel_within_a_cancel(monkeypatch):
    """The same, while nobody drives."""
    e, sequences = engine(), [Made(PROMPT[i : i + 30], SAMPLED, 100) for i in range(4)]
    e.submit(sequences)
    while not sequences[3].tokens:
        e.step()
    leave = e.scheduler.leave
    monkeypatch.setattr(e.scheduler, "leave", lambda s: (e.cancel(sequences[2:]), leave(s)))
    e.cancel(sequences[:1])
    assert e.scheduler.running == sequences[1:2] and [s.ended for s in sequences] == [True, False, True, True]
    e.wait(lambda: sequences[1].ended)
    assert sequences[1].made == alone(sequences[1])
    check(e.cache)


class Line(list):
    """Counts how many are looked at."""

    looked = 0

    def remove(self, s):
        self.looked += self.index(s)
        super().remove(s)

    def __getitem__(self, place):
        self.looked += len(self) if isinstance(place, slice) else 1
        return super().__getitem__(place)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("turn", [1, -1])
def test_cancels_of_a_long_line(at_once, turn):
    """Those in line may be many: that they leave takes no longer for each of them."""
    e, count = engine(max_num_seqs=2), 2000
    e.scheduler.waiting = line = Line()
    sequences, stay = [Made(PROMPT[:5], count=4) for _ in range(count)], [Made(PROMPT[:7], count=4) for _ in range(3)]
    e.submit([*sequences[: count // 2], *stay, *sequences[count // 2 :]])
    e.step()
    for some in [sequences[::turn]] if at_once else [[s] for s in sequences[::turn]]:
        e.cancel(some)
    assert all(s.ended for s in sequences) and line.looked < 4 * count
    e.wait(lambda: all(s.ended for s in stay))
    assert all(s.made == alone(s) for s in stay) and not line and not e._cancelled
    check(e.cache)


def test_an_engine_goes_when_it_is_dropped():
    e = engine()
    e.run([Made(PROMPT[:20])])
    gone = weakref.ref(e)
    del e
    gc.collect()
    assert gone() is None
