"""advance: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.advance import SUITE


def test_advance(timed):
    timed(SUITE)
