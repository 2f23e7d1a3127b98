from fastllm.bench.cases.quant_linear import SUITE


def test_quant_linear(timed):
    timed(SUITE)
