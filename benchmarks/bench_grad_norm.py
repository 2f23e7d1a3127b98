"""grad_norm: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.grad_norm import SUITE


def test_grad_norm(timed):
    timed(SUITE)
