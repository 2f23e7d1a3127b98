from fastllm.bench.cases.sample import SUITE


def test_sample(timed):
    timed(SUITE)
