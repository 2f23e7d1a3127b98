"""cross_entropy: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.cross_entropy import SUITE


def test_cross_entropy(timed):
    timed(SUITE)
