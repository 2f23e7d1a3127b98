from fastllm.bench.cases.swiglu import SUITE


def test_swiglu(timed):
    timed(SUITE)
