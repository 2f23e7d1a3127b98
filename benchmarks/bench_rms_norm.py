"""rms_norm: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.rms_norm import SUITE


def test_rms_norm(timed):
    timed(SUITE)
