"""embedding: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.embedding import SUITE


def test_embedding(timed):
    timed(SUITE)
