"""top_logprobs: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.top_logprobs import SUITE


def test_top_logprobs(timed):
    timed(SUITE)
