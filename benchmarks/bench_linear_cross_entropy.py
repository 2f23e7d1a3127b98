"""linear_cross_entropy: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.linear_cross_entropy import SUITE


def test_linear_cross_entropy(timed):
    timed(SUITE)
