from fastllm.bench.cases.top_logprobs import SUITE


def test_top_logprobs(timed):
    timed(SUITE)
