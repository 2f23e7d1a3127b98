"""`import fastllm` costs little beyond torch: who embeds the kernels does not wait for the rest."""

import statistics

import pytest
from _build import python

SECONDS = 0.3  # of processor time: a wait for a busy core is not the import's
SCRIPT = """
import sys, time, torch
torch.version.cuda = {cuda!r}
known, start = set(sys.modules), time.process_time()
import fastllm
print(time.process_time() - start, *sorted({{name.split(".")[0] for name in set(sys.modules) - known}}))
"""
LATE = {"gguf", "huggingface_hub", "jinja2", "safetensors", "tokenizers", "transformers", "triton", "typer"}


@pytest.mark.parametrize("cuda", [None, "13.0"], ids=["torch without CUDA", "with"])
def test_import_is_quick_and_brings_in_little(cuda):
    runs = [python(SCRIPT.format(cuda=cuda)).stdout.split() for _ in range(5)]
    assert statistics.median(float(seconds) for seconds, *_ in runs) <= SECONDS
    assert not LATE & set(runs[0][1:])
