from fastllm.bench.cases.rope import SUITE


def test_rope(timed):
    timed(SUITE)
