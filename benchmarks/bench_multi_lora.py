"""multi_lora: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.multi_lora import SUITE


def test_multi_lora(timed):
    timed(SUITE)
