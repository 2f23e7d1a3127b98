"""lora_linear: ours and PyTorch on the benchmark cases."""

from fastllm.bench.cases.lora_linear import SUITE


def test_lora_linear(timed):
    timed(SUITE)
