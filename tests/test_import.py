"""`import fastllm` costs little beyond torch: who embeds the kernels does not wait for the rest."""

import shutil
import statistics
from pathlib import Path

import pytest
from _build import python

import fastllm

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


UNMAPPED = """
import sys  # an editable install finds its core for any copy
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
"""


def test_a_source_tree_that_was_not_built_says_so(tmp_path):
    """As where Python is started in a checkout, and the package is installed elsewhere."""
    shutil.copytree(
        Path(fastllm.__file__).parent, tmp_path / "fastllm", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    done = python(UNMAPPED + "import fastllm", path=tmp_path, check=False)
    assert done.returncode and "Traceback" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: {tmp_path / 'fastllm'} holds no compiled core for this Python")
    assert "pip install -e ." in last
