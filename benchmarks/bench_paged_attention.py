"""paged_attention: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.paged_attention import SUITE


def test_paged_attention(timed):
    timed(SUITE)
