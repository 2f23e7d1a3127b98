from fastllm.bench.cases.rms_norm import SUITE


def test_rms_norm(timed):
    timed(SUITE)
