"""quant_linear: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.quant_linear import SUITE


def test_quant_linear(timed):
    timed(SUITE)
