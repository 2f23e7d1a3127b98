"""token_logprobs: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.token_logprobs import SUITE


def test_token_logprobs(timed):
    timed(SUITE)
