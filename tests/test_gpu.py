"""Every suite on an NVIDIA GPU: `pytest -m gpu` is all that a machine with one needs."""

import _oracle
import pytest
import torch

from fastllm.bench.cases import suites
from fastllm.ops._op import OPS

pytestmark = pytest.mark.gpu

ALL = pytest.mark.parametrize(("suite", "case", "dtype"), _oracle.table())
ROWS = pytest.mark.parametrize(("suite", "case", "dtype"), _oracle.table(lambda s, c, d: s.rows and c.apart))


@pytest.fixture(autouse=True)
def _gpu():
    if not torch.cuda.is_available():
        pytest.fail("`pytest -m gpu` asks for an NVIDIA GPU, and torch sees none")


def test_kernels_are_ours():
    """An op with a GPU kernel runs it; falling back in silence would make every other test here pass."""
    assert all(op.kernel("cuda").name != "reference" for op in OPS.values() if op.triton)


@ALL
def test_forward_and_gradients(suite, case, dtype):
    _oracle.check_forward_and_gradients(suite, case, dtype, "cuda")


@ROWS
def test_contract(suite, case, dtype):
    if "cuBLAS" in OPS[suite.op].triton_name and "exact" not in case.label:
        pytest.skip("cuBLAS chooses its order by the number of rows; ops.linear holds the contract by exact=True")
    _oracle.check_contract(suite, case, dtype, "cuda")


@pytest.mark.parametrize("suite", suites().values(), ids=suites())
def test_compile_fullgraph(suite):
    largest = max(suite.correct, key=lambda case: case.bytes(4))
    _oracle.check_compile(suite, largest, device="cuda")
