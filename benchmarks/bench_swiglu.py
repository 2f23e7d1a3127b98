"""swiglu: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.swiglu import SUITE


def test_swiglu(timed):
    timed(SUITE)
