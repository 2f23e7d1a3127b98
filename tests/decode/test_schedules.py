"""Random arrivals, cancels and lengths: whatever happens around a request, it is given what it would be given alone."""

import pytest
import torch
from _engine import KINDS, PROMPT, Made, alone, engine, forced
from _paged import check
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.decode.engine import Engine
from fastllm.decode.scheduler import Sequence

SPANS = [(0, 1), (0, 16), (0, 17), (0, 33), (0, 40), (0, 64), (3, 30), (3, 90), (7, 130)]  # of PROMPT: first, length
arrivals = st.lists(
    st.fixed_dictionaries(
        {
            "step": st.integers(0, 12),  # of the engine, when it arrives
            "prompt": st.sampled_from(SPANS),
            "kind": st.sampled_from(list(KINDS)),
            "room": st.integers(1, 20),
            "stop": st.none() | st.integers(1, 10),
            "completions": st.sampled_from([1, 1, 1, 2, 3]),
            "cancel": st.none() | st.integers(0, 8),  # steps after its arrival
            "scored": st.booleans(),
        }
    ),
    max_size=8,
)


@pytest.fixture(scope="module", params=[0, 6], ids=["plain", "speculating"])
def small(request) -> Engine:
    """An engine that is short of everything, used by all examples one after the other."""
    e = engine(max_num_seqs=3, pages=14, capacity=200, speculate=request.param)
    return forced(e) if e.speculate else e


@settings(max_examples=60, deadline=None)
@given(arrivals, st.sampled_from([1, 7, 64]), st.booleans())
def test_any_schedule(small, arrivals, chunk, forget):
    e, small.chunk, now, line, running = small, chunk, 0, sorted(arrivals, key=lambda a: a["step"]), []
    scored: list[tuple[Sequence, list]] = []
    if forget:
        e.cache.forget()
    while line or not all(s.ended for s, _ in running):
        while line and line[0]["step"] <= now:
            a = line.pop(0)
            first, count = a["prompt"]
            prompt = PROMPT[first : first + count]
            leaves = None if a["cancel"] is None else now + a["cancel"]
            for index in range(a["completions"]):
                s = Made(prompt, KINDS[a["kind"]], a["room"], index, stop=a["stop"])
                running.append((s, leaves))
                e.submit([s])
            if a["scored"]:
                states: list[torch.Tensor] = []
                s = Sequence(prompt, hidden=states.append)
                scored.append((s, states))
                running.append((s, leaves))
                e.submit([s])
        e.cancel([s for s, leaves in running if leaves == now])
        e.step()
        now += 1
        held = {page for s in [*e.scheduler.running, *e.scheduler.waiting] for page in s.pages}
        check(e.cache, held=len(held))
        assert now < 2000
    for s, leaves in running:
        assert not s.error
        if isinstance(s, Made):
            whole = alone(s)
            assert s.made == whole[: len(s.made)] and (leaves is not None or len(s.made) == len(whole))
    for s, states in scored:
        rows = sum(map(len, states))
        assert rows == len(s.prompt) or dict(running)[s] is not None
    check(e.cache)
