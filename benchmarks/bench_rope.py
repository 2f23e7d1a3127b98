"""rope: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.rope import SUITE


def test_rope(timed):
    timed(SUITE)
