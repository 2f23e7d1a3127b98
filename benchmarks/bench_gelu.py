"""gelu: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.gelu import SUITE


def test_gelu(timed):
    timed(SUITE)
