"""softmax: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.softmax import SUITE


def test_softmax(timed):
    timed(SUITE)
