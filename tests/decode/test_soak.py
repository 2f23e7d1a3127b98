"""2,000 mixed requests through a small engine: every output is that of its lone run, and nothing is left over."""

import gc
import random

import pytest
from _engine import KINDS, PROMPT, Made, alone, engine
from _paged import check

pytestmark = pytest.mark.slow


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_two_thousand_requests():
    r, e, line, live = random.Random(1), engine(max_num_seqs=8, pages=60, capacity=300), [], {}
    for i in range(2000):
        first = r.choice((0, 0, 0, 5, 90))
        prompt = PROMPT[first : first + r.choice((1, 3, 16, 40, 47, 48, 120, 260))]
        kind, room = r.choice(list(KINDS.values())), r.randint(1, 40)
        for index in range(r.choice((1, 1, 1, 3))):
            s = Made(prompt, kind, room, index, seed=i % 50, stop=r.choice((None, None, 5)))
            line.append((s, r.choice((None,) * 6 + (1, 7))))
    expected = {id(s): alone(s) for s, _ in line}
    line.reverse()
    now, memory, ended = 0, [], 0
    while line or live:
        while line and len(live) < 20:
            s, leaves = line.pop()
            live[s] = None if leaves is None else now + leaves
            e.submit([s])
        e.chunk = r.choice((7, 64, 512))
        e.cancel([s for s, leaves in live.items() if leaves == now])
        e.step()
        now += 1
        for s in [s for s in live if s.ended]:
            leaves, whole = live.pop(s), expected.pop(id(s))
            assert not s.error and s.made == whole[: len(s.made)]
            assert leaves is not None or len(s.made) == len(whole)
            ended += 1
        if now % 500 == 0:
            check(e.cache, held=len({page for s in live for page in s.pages}))
            gc.collect()
            memory.append(resident())
    check(e.cache)
    assert ended > 2000 and not e.scheduler.waiting and not e.scheduler.running and not expected
    settled = memory[len(memory) // 4 :]
    assert max(settled) - min(settled) < 8e6, [m // 1000 for m in memory]
