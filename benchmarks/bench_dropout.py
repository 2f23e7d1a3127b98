"""dropout: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.dropout import SUITE


def test_dropout(timed):
    timed(SUITE)
