"""layer_norm: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.layer_norm import SUITE


def test_layer_norm(timed):
    timed(SUITE)
