"""Timing rivals fairly: interleaved rounds A B C A B C, medians and quartiles, and no sample that others disturbed.

timed = interleave({"ours": cpu_sampler(f, copies), "theirs": cpu_sampler(g, copies)}, Settings(), other_load())
timed.stats["ours"].median  # seconds a call
"""

import copy
import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..info import cache_sizes
from .ceiling import dot_peak, fma_peak, read_bandwidth
from .load import other_load

__all__ = [
    "GPU", "QUICK", "Measured", "Settings", "Stats", "copies_of", "cpu_sampler", "cuda_sampler", "dot_peak", "fma_peak",
    "interleave", "other_load", "peak_memory", "read_bandwidth",
]  # fmt: skip

Sampler = Callable[[int], float]  # number of calls -> the seconds they took together


@dataclass(frozen=True)
class Settings:
    """samples: clean ones wanted of each rival. sample_s: a call is repeated until a sample lasts this long. block_s:
    rounds are kept or discarded in blocks of this length, long enough for the system's 10 ms ticks to show 0.1 core.
    limit_s: no row waits longer than this for a quiet machine. other_cores: what other processes may use."""

    samples: int = 21
    sample_s: float = 0.01
    block_s: float = 0.4
    limit_s: float = 8.0
    other_cores: float = 0.1


QUICK = Settings(samples=7, sample_s=0.002, block_s=0.25, limit_s=1.0)
GPU = Settings(samples=15, sample_s=0.001, block_s=0.0)  # nobody else is on it: every round counts
ENOUGH = 5  # samples: with fewer, a row goes back to the quietest of its disturbed blocks


@dataclass(frozen=True)
class Stats:
    """Seconds a call; `fast` is the tenth percentile."""

    median: float
    q1: float
    q3: float
    fast: float
    samples: int

    @classmethod
    def of(cls, values: list[float]) -> "Stats":
        at = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else values * 19
        return cls(median=at[9], q1=at[4], q3=at[14], fast=at[1], samples=len(values))


@dataclass(frozen=True)
class Measured:
    """stats: by rival. discarded: rounds thrown away because others used the machine. busy: it did not become quiet in
    time, so the statistics are over the quietest blocks there were."""

    stats: dict[str, Stats]
    discarded: int
    busy: bool


def interleave(
    rivals: Mapping[str, Sampler],
    settings: Settings,
    others: Callable[[], float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Rounds of one sample of each rival, until each has its clean samples. others: a clock of foreign CPU seconds."""
    calls = {}
    for name, sample in rivals.items():
        sample(1)  # allocations, page faults, compilation
        once = min(sample(1), sample(1))
        calls[name] = max(1, min(10_000, int(settings.sample_s / max(once, 1e-9))))

    blocks: list[tuple[float, list[dict[str, float]]]] = []  # (foreign cores, rounds: rival -> seconds a call)
    start = clock()
    while True:
        rounds: list[dict[str, float]] = []
        begin, foreign = clock(), others() if others else 0.0
        while not rounds or clock() - begin < settings.block_s:
            rounds.append({name: sample(calls[name]) / calls[name] for name, sample in rivals.items()})
        load = (others() - foreign) / (clock() - begin) if others else 0.0
        blocks.append((load, rounds))
        clean = [r for load, rounds in blocks if load <= settings.other_cores for r in rounds]
        if len(clean) >= settings.samples or clock() - start > settings.limit_s:
            break

    busy = len(clean) < min(ENOUGH, settings.samples) and any(load > settings.other_cores for load, _ in blocks)
    kept = clean
    if busy:
        kept = []
        for _, rounds in sorted(blocks, key=lambda block: block[0]):
            kept += rounds if len(kept) < ENOUGH else []
    discarded = sum(len(rounds) for _, rounds in blocks) - len(kept)
    return Measured({name: Stats.of([r[name] for r in kept]) for name in rivals}, discarded, busy)


# ------------------------------------------------------------------------------------------------------------- samplers


def cpu_sampler(
    call: Callable[..., Any], copies: list[tuple], clock: Callable[[], float] = time.perf_counter
) -> Sampler:
    """Times call(*arguments), taking turns among copies of the arguments."""
    turn = itertools.cycle(copies)

    def sample(calls: int) -> float:
        batch = list(itertools.islice(turn, calls))
        collecting = gc.isenabled()
        gc.disable()
        begin = clock()
        for arguments in batch:
            call(*arguments)
        seconds = clock() - begin
        if collecting:
            gc.enable()
        return seconds

    return sample


QUEUED, LONGEST = 64, 0.01  # calls that are queued before the device goes on; seconds of one of them that count
CYCLES = 2.0e9  # of a GPU's clock, a second


def cuda_sampler(call: Callable[..., Any], copies: list[tuple]) -> Sampler:
    """Times each call between two events, after overwriting the L2 cache. The device waits while calls are queued, so that
    what Python takes to launch one is not counted, unless the call itself waits for the device."""
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda")
    turn = itertools.cycle(copies)
    head_start = LONGEST  # what a call takes the host, at least: in a full queue it waits

    def sample(calls: int) -> float:
        nonlocal head_start
        spans = []
        torch.cuda._sleep(int(1.5 * CYCLES * head_start * min(calls, QUEUED)))
        begun = time.perf_counter()
        for arguments in itertools.islice(turn, calls):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call(*arguments)
            end.record()
            spans.append((begin, end))
        head_start = min((time.perf_counter() - begun) / calls, head_start)
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1e3

    return sample


# --------------------------------------------------------------------------------------------------------------- inputs


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor of nested lists, dicts and records."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(tensors_in, value.values()))
    elif isinstance(value, (list, tuple)):
        yield from itertools.chain.from_iterable(map(tensors_in, value))
    elif dataclasses.is_dataclass(value):
        fields = (getattr(value, f.name) for f in dataclasses.fields(value))
        yield from itertools.chain.from_iterable(map(tensors_in, fields))
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        yield from tensors_in(vars(value))


def size_of(value: Any) -> int:
    """Bytes of the distinct memory behind the tensors of `value`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(value)}
    return sum(storages.values())


MOST_BYTES, MOST_COPIES = 1 << 30, 64


def copies_of(arguments: tuple, copied: Callable[[Any], Any] = copy.deepcopy) -> tuple[list[tuple], str]:
    """Enough copies that a call finds its inputs in memory and not in a cache, and a word for it. Inputs that fit in
    half of one core's L2 stay warm: in use, too, they come from the kernel that ran before."""
    if any(t.is_cuda for t in tensors_in(arguments)):
        return [arguments], "cold, L2 overwritten"
    l2, l3 = cache_sizes()
    size = size_of(arguments)
    if size <= l2 // 2:
        return [arguments], "warm"
    count = min(MOST_COPIES, max(2, -(-2 * l3 // size)), max(1, MOST_BYTES // size))
    inputs, *rest = arguments
    copies = [arguments, *((copied(inputs), *copy.deepcopy(rest)) for _ in range(count - 1))]
    return copies, f"cold, {count} copies" if count * size > l3 else f"from L3, {count} copies"


# --------------------------------------------------------------------------------------------------------------- memory


def peak_memory(call: Callable[[], Any], device: str) -> int | None:
    """Bytes that a call holds at its worst beside what was there before, outputs and kernels' scratch included."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    from torch.profiler import ProfilerActivity, profile

    from .. import _C

    _C.take_most_scratch()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    scratch = _C.take_most_scratch()
    try:  # torch's public summaries add events up and lose the peak
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    except AttributeError:
        return None
    return max(0, *itertools.accumulate(changes), 0) + scratch
