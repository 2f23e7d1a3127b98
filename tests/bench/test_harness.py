"""The harness on a clock that the tests turn, and the ceilings' kernels against plain arithmetic."""

import gc
from dataclasses import dataclass

import pytest
import torch

from fastllm import _C, ops
from fastllm.bench import harness, load
from fastllm.bench.harness import Settings, Stats, copies_of, cpu_sampler, interleave, peak_memory, size_of


class Clock:
    """Time stands still but for what samplers say they took."""

    def __init__(self):
        self.now, self.foreign, self.order = 0.0, 0.0, []

    def __call__(self):
        return self.now

    def rival(self, name, seconds, foreign=lambda clock: 0.0):
        def sample(calls):
            self.order.append(name)
            self.now += seconds * calls
            self.foreign += foreign(self) * seconds * calls
            return seconds * calls

        return sample


def test_stats():
    s = Stats.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (s.median, s.q1, s.q3, s.samples) == (3.0, 2.0, 4.0, 5)
    assert 1.0 <= s.fast < 1.5
    assert Stats.of([7.0]) == Stats(7.0, 7.0, 7.0, 7.0, 1)


def test_rounds_are_interleaved_and_calls_fill_a_sample():
    clock = Clock()
    settings = Settings(samples=4, sample_s=0.01, block_s=0.02, limit_s=1)
    timed = interleave({"a": clock.rival("a", 0.001), "b": clock.rival("b", 0.02)}, settings, None, clock)
    assert clock.order == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 4
    assert timed.stats["a"].median == pytest.approx(0.001) and timed.stats["b"].median == pytest.approx(0.02)
    assert timed.stats["a"].samples == 4 and not timed.busy and timed.discarded == 0


def test_disturbed_blocks_are_repeated():
    clock = Clock()
    # others use half a core until t = 0.5, nothing afterwards
    rival = clock.rival("a", 0.01, lambda clock: 0.5 if clock.now < 0.5 else 0.0)
    settings = Settings(samples=10, sample_s=0.01, block_s=0.1, limit_s=10)
    timed = interleave({"a": rival}, settings, lambda: clock.foreign, clock)
    assert not timed.busy and timed.stats["a"].samples >= 10
    assert 40 <= timed.discarded <= 60


def test_a_busy_machine_ends_in_its_quietest_blocks():
    clock = Clock()
    slow = {"now": 1.0}

    def sample(calls):  # the load falls and the times with it, but never to quiet
        clock.now += 0.01 * calls
        slow["now"] *= 0.99
        clock.foreign += 0.01 * calls * (0.2 + slow["now"])
        return calls * (0.01 + slow["now"])

    settings = Settings(samples=10, sample_s=0.01, block_s=0.1, limit_s=2)
    timed = interleave({"a": sample}, settings, lambda: clock.foreign, clock)
    assert timed.busy and clock.now == pytest.approx(2, abs=0.3)
    assert timed.stats["a"].samples >= harness.ENOUGH and timed.discarded > 0
    assert timed.stats["a"].median < 0.25  # the last blocks, not the first


def test_a_slow_call_is_still_sampled_once():
    clock = Clock()
    timed = interleave({"a": clock.rival("a", 60.0)}, Settings(limit_s=1), lambda: 0.0, clock)
    assert timed.stats["a"].samples == 1 and timed.stats["a"].median == 60.0 and not timed.busy


def test_sampler_takes_turns_and_leaves_the_collector_as_it_was():
    seen, states = [], []
    sampler = cpu_sampler(lambda x: (seen.append(x), states.append(gc.isenabled())), [(1,), (2,), (3,)])
    assert sampler(2) >= 0 and sampler(3) >= 0
    assert seen == [1, 2, 3, 1, 2] and not any(states) and gc.isenabled()


def test_foreign_load_is_a_clock():
    others = load.other_load()
    assert others is not None
    begin = others()
    assert begin > 0 and others() - begin < 5


@dataclass
class Record:
    weight: torch.Tensor
    scale: float = 1.0


def test_size_counts_shared_memory_once():
    x = torch.zeros(100)
    assert size_of(({"x": x, "view": x[::2], "n": 3, "w": Record(torch.zeros(10)), "list": [x, None]},)) == 440


def test_copies_exceed_the_cache_and_share_nothing(monkeypatch):
    monkeypatch.setattr(harness, "cache_sizes", lambda: (1 << 10, 1 << 20))
    small, word = copies_of(({"x": torch.zeros(16)},))
    assert len(small) == 1 and word == "warm"
    large, word = copies_of(({"x": torch.randn(1 << 16), "r": Record(torch.randn(8))},))
    assert len(large) == 8 and word == "cold, 8 copies"
    pointers = {c[0]["x"].data_ptr() for c in large} | {c[0]["r"].weight.data_ptr() for c in large}
    assert len(pointers) == 16 and all(torch.equal(c[0]["x"], large[0][0]["x"]) for c in large)
    many, word = copies_of(({"x": torch.zeros(1 << 8)},))
    assert len(many) == harness.MOST_COPIES and word == "from L3, 64 copies"


def test_peak_memory_is_the_worst_moment():
    x = torch.randn(1000)

    def call():
        y = x + x
        z = torch.cat([y, y])
        del y
        return z[:1].clone()

    call()
    assert 12_000 <= peak_memory(call, "cpu") <= 12_200
    assert peak_memory(lambda: None, "cpu") == 0


def test_peak_memory_counts_the_kernels_scratch():
    x, w, dy = torch.randn(64, 4096, requires_grad=True), torch.ones(4096, requires_grad=True), torch.randn(64, 4096)
    y = ops.rms_norm(x, w)
    needed = x.nbytes + 2 * w.nbytes  # dx, dweight, and at least one thread's partial dweight in scratch
    assert peak_memory(lambda: torch.autograd.grad(y, (x, w), dy, retain_graph=True), "cpu") >= needed


# ------------------------------------------------------------------------------------------------------------- ceilings


@pytest.mark.parametrize("streams", [1, 4, 8, 16])
@pytest.mark.parametrize("lines", [0, 1, 7, 16, 1000, 4099])
@pytest.mark.parametrize("threads", [1, 2])
def test_read_bandwidth_reads_every_line(lines, streams, threads):
    data = torch.randint(-(2**31), 2**31, (lines * 16,), dtype=torch.int32)
    total = torch.zeros(1, dtype=torch.int32)
    previous = _C.set_thread_limit(threads)
    try:
        _C.read_bandwidth(total.data_ptr(), data.data_ptr(), lines, streams, 512)
    finally:
        _C.set_thread_limit(previous)
    assert total.item() == data.sum(dtype=torch.int64).to(torch.int32).item()


@pytest.mark.parametrize("kernel", ["fma_peak", "dot_peak"])
def test_peaks_count_their_operations(kernel):
    counts = []
    for iterations in (1, 10):
        result, done = torch.zeros(64, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
        getattr(_C, kernel)(result.data_ptr(), done.data_ptr(), iterations, 0.5, 1.0)
        counts.append(done.item())
    assert counts[0] > 0 and counts[1] == 10 * counts[0]
    assert counts[0] % (2 * 16 * _C.max_threads()) == 0


def test_dot_peak_computes():
    result, done = torch.zeros(64, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    _C.dot_peak(result.data_ptr(), done.data_ptr(), 1, 1, 1)  # weight bytes (1, 0, 0, 0) and, in chain c, 1 + c
    chains = done.item() // (8 * 16 * _C.max_threads())
    assert result[0].item() == sum(1 + c for c in range(chains))


def test_ceilings_are_rates():
    assert 0.1 < harness.read_bandwidth(1) < 1e5
    assert 0.1 < harness.fma_peak(1) < 1e6
    assert 0.1 < harness.dot_peak(1) < 1e7
