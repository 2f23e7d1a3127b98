"""`pytest benchmarks`: every suite's benchmark cases through pytest-benchmark, ours and torch in one group a case.

    pytest benchmarks                                    every op, float32, forward: some minutes
    pytest benchmarks/bench_rms_norm.py --backward       one op, forward + backward too
    pytest benchmarks --dtype bfloat16 --benchmark-json new.json

A quick look that fits other tools (saving, comparing, histograms). `fastllm bench` is the measurement: interleaved,
with the machine's ceilings and with malloc tuned.
"""

import itertools
import time

import pytest

from fastllm.bench.harness import copies_of
from fastllm.bench.measure import FORWARD, OURS, TRAIN, Job, functions
from fastllm.bench.select import DTYPES

SECONDS, FEWEST, MOST = 0.2, 3, 200  # timed for each rival of a case; rounds


def pytest_addoption(parser):
    parser.addoption("--dtype", default="float32", choices=list(DTYPES), help="of the inputs")
    parser.addoption("--backward", action="store_true", help="forward + backward too")


def pytest_generate_tests(metafunc):
    if "timed" not in metafunc.fixturenames:
        return
    suite, dtype = metafunc.module.SUITE, DTYPES[metafunc.config.getoption("dtype")]
    directions = (FORWARD, TRAIN) if metafunc.config.getoption("backward") and suite.gradients else (FORWARD,)
    cases = suite.benchmark if dtype in suite.dtypes else ()
    table = [(case, dtype, d, rival) for case in cases for d in directions for rival in (OURS, "torch")]
    ids = [f"{case.label}-{d}-{rival}" for case, _, d, rival in table]
    metafunc.parametrize(("case", "dtype", "direction", "rival"), table, ids=ids)


@pytest.fixture
def timed(benchmark, case, dtype, direction, rival):
    """timed(suite) runs the case that the parameters name."""

    def run(suite):
        job = Job(suite, case, dtype, direction)
        copies, cache = copies_of(job.arguments(), job.suite.copy)
        call, turn = dict(functions(job, False))[rival], itertools.cycle(copies)
        call(*next(turn))
        begin = time.perf_counter()
        call(*next(turn))
        rounds = max(FEWEST, min(MOST, int(SECONDS / (time.perf_counter() - begin))))
        moved, flops = job.cost()
        benchmark.group = job.label
        benchmark.extra_info.update(bytes=moved, flops=flops, cache=cache)
        benchmark.pedantic(call, setup=lambda: (next(turn), {}), rounds=rounds, warmup_rounds=1)

    return run
