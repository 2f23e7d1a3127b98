"""adamw: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.adamw import SUITE


def test_adamw(timed):
    timed(SUITE)
