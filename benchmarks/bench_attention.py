"""attention: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.attention import SUITE


def test_attention(timed):
    timed(SUITE)
