"""linear: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.linear import SUITE


def test_linear(timed):
    timed(SUITE)
