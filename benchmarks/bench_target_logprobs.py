"""target_logprobs: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.target_logprobs import SUITE


def test_target_logprobs(timed):
    timed(SUITE)
