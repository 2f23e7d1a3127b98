"""geglu: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.geglu import SUITE


def test_geglu(timed):
    timed(SUITE)
