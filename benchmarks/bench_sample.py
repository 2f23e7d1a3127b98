"""sample: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.sample import SUITE


def test_sample(timed):
    timed(SUITE)
