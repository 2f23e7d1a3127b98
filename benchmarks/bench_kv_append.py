from fastllm.bench.cases.kv_append import SUITE


def test_kv_append(timed):
    timed(SUITE)
