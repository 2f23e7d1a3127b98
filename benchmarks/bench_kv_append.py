"""kv_append: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.kv_append import SUITE


def test_kv_append(timed):
    timed(SUITE)
