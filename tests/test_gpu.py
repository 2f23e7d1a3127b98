"""Every suite on an NVIDIA GPU: `pytest -m gpu` is all that a machine with one needs."""

import _oracle
import pytest
import torch

from fastllm import ops
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


def test_more_rows_than_a_side_of_the_grid():
    """Of a grid the second side has 65,535 programs, the third what is beyond."""
    rows = 150_001
    both = torch.randn(rows, 24, device="cuda").requires_grad_()
    gate, up = both.chunk(2, 1)
    (dboth,) = torch.autograd.grad(ops.swiglu(gate, up).sum(), both)
    (wanted,) = torch.autograd.grad((torch.nn.functional.silu(gate) * up).sum(), both)
    torch.testing.assert_close(dboth, wanted)
    q, position, table = torch.randn(rows, 1, 16), torch.arange(rows) % 99, ops.rope_table(99, 16)
    turned, _ = ops.rope(*(t.cuda() for t in (q, q, position, table)))
    torch.testing.assert_close(turned.cpu(), ops.rope(q, q, position, table)[0])
    logits, target = torch.randn(rows, 9, device="cuda").requires_grad_(), torch.randint(9, (rows,), device="cuda")
    (d,) = torch.autograd.grad(ops.cross_entropy(logits, target), logits)
    (wanted,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), logits)
    torch.testing.assert_close(d, wanted)


@pytest.mark.parametrize("suite", suites().values(), ids=suites())
def test_compile_fullgraph(suite):
    largest = max(suite.correct, key=lambda case: case.bytes(4))
    _oracle.check_compile(suite, largest, device="cuda")
