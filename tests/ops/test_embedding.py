"""embedding: what only this op must promise."""

import _oracle
import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.cases.embedding import SUITE
from fastllm.ops._op import OPS


def test_compile_fullgraph():
    _oracle.check_compile(SUITE, SUITE.correct[3])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_opcheck(dtype):
    ids, weight = torch.randint(0, 20, (3, 4), dtype=dtype), torch.randn(20, 9)
    torch.library.opcheck(OPS["embedding"].raw, (ids, weight))
    torch.library.opcheck(OPS["embedding_backward"].raw, (torch.randn(3, 4, 9), ids, 20))


def test_gradient_has_the_bits_of_a_sum_in_order():
    """First to last, in fp32, rounded once; whatever the threads do."""
    generator = torch.Generator().manual_seed(3)
    ids = (torch.rand(4000, generator=generator) ** 4 * 60).long()  # few ids hold most positions, as in a text
    for dtype in SUITE.dtypes:
        dy = torch.randn(4000, 100, generator=generator).to(dtype)
        ours = OPS["embedding_backward"](dy, ids, 64)
        for v in (0, 1, 7, 59, 63):
            total = torch.zeros(100)
            for row in dy[ids == v].float():
                total += row
            assert torch.equal(ours[v], total.to(dtype))
        previous = _C.set_thread_limit(1)
        assert torch.equal(ours, OPS["embedding_backward"](dy, ids, 64))
        _C.set_thread_limit(previous)


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_an_unknown_id_is_named(bad, dtype):
    ids = torch.zeros(3, 4, dtype=dtype)
    ids[1, 2] = ids[2, 0] = bad
    with pytest.raises(IndexError, match=rf"id {bad} at position \(1, 2\) is outside \[0, 50\)"):
        ops.embedding(ids, torch.randn(50, 8))
    with pytest.raises(IndexError, match=rf"id {bad} at position \(0, 2\)"):
        ops.embedding(ids.t(), torch.randn(50, 8))
    with pytest.raises(IndexError, match=rf"id {bad} at position \(1, 2\)"):
        OPS["embedding_backward"](torch.randn(3, 4, 8), ids, 50)
    with pytest.raises(IndexError, match="id 0 at position"):
        ops.embedding(torch.zeros(1, dtype=dtype), torch.randn(0, 8))


def test_a_plan_reads_the_ids_again():
    ids, weight = torch.tensor([[3, 9], [0, 0], [7, 1]]), torch.randn(10, 33)
    plan = _C.Plan()
    plan.begin()
    y = ops.embedding(ids[:, 1], weight)
    plan.end()
    ids.copy_(torch.tensor([[5, 0], [2, 8], [0, 4]]))
    assert plan.replay() == 0 and torch.equal(y, weight[[0, 8, 4]])
    ids[1, 1] = 10
    assert plan.replay() == 1 and y[1].isnan().all() and torch.equal(y[::2], weight[[0, 4]])


@pytest.mark.parametrize(
    ("ids", "weight", "error", "message"),
    [
        (torch.zeros(2), torch.randn(3, 4), TypeError, "ids is float32, allowed: int64, int32"),
        (torch.zeros(2, dtype=torch.int64), torch.randn(3, 4).double(), TypeError, "weight is float64, allowed"),
        (torch.zeros(2, dtype=torch.int64), torch.randn(3), ValueError, r"weight \(3,\) must be \[V, N\]"),
        (
            torch.zeros(2, dtype=torch.int64, device="meta"),
            torch.randn(3, 4),
            ValueError,
            "ids are on meta, weight on cpu",
        ),
    ],
)
def test_errors(ids, weight, error, message):
    with pytest.raises(error, match=message):
        ops.embedding(ids, weight)
