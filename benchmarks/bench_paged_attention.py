from fastllm.bench.cases.paged_attention import SUITE


def test_paged_attention(timed):
    timed(SUITE)
