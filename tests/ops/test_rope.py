"""rope: the oracle's table, the table of angles, and its errors."""

import math

import _oracle
import pytest
import torch

from fastllm import ops
from fastllm.bench.cases.rope import SUITE
from fastllm.ops._op import OPS


@_oracle.dtypes(SUITE)
@_oracle.cases(SUITE)
def test_forward(case, dtype):
    _oracle.check_forward_and_gradients(SUITE, case, dtype)


@_oracle.dtypes(SUITE)
@_oracle.cases(SUITE)
def test_writes_only_its_outputs(case, dtype):
    _oracle.check_guards(SUITE, case, dtype)


@_oracle.dtypes(SUITE)
@_oracle.cases(SUITE)
def test_contract(case, dtype):
    _oracle.check_contract(SUITE, case, dtype)


def test_compile_and_opcheck():
    _oracle.check_compile(SUITE, SUITE.correct[1])
    _oracle.check_compile(SUITE, SUITE.correct[8])
    q, k = torch.randn(3, 4, 16), torch.randn(3, 2, 16)
    torch.library.opcheck(OPS["rope"].raw, (q, k, torch.arange(3), ops.rope_table(8, 16)))


def test_table_holds_cosines_then_sines_of_float64_angles():
    table = ops.rope_table(5000, 8, theta=500.0)
    assert table.shape == (5000, 8) and table.dtype == torch.float32
    for position in (0, 1, 4999):
        for i in range(4):
            angle = position * 500.0 ** (-2 * i / 8)
            assert table[position, i].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert table[position, 4 + i].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_position_zero_is_the_identity_and_lengths_are_kept():
    q, k, table = torch.randn(2, 3, 64), torch.randn(2, 1, 64), ops.rope_table(100, 64)
    q0, k0 = ops.rope(q, k, torch.zeros(2, dtype=torch.int64), table)
    assert torch.equal(q0, q) and torch.equal(k0, k)
    q9, _ = ops.rope(q, k, torch.tensor([9, 99]), table)
    torch.testing.assert_close(q9.norm(dim=-1), q.norm(dim=-1))


def test_dot_products_depend_on_the_distance_alone():
    q, k, table = torch.randn(1, 1, 64), torch.randn(1, 1, 64), ops.rope_table(1000, 64)

    def at(i, j):
        return (ops.rope(q, k, torch.tensor([i]), table)[0] * ops.rope(q, k, torch.tensor([j]), table)[1]).sum()

    torch.testing.assert_close(at(10, 3), at(907, 900), rtol=1e-4, atol=1e-4)


def test_one_position_row_serves_every_sequence_and_both_index_types_agree():
    q, k, table = torch.randn(3, 5, 2, 32), torch.randn(3, 5, 1, 32), ops.rope_table(64, 32)
    position = torch.tensor([4, 9, 2, 63, 0])
    shared = ops.rope(q, k, position, table)
    for other in (position.expand(3, 5), position.int(), position.int().expand(3, 5).contiguous()):
        assert all(torch.equal(a, b) for a, b in zip(shared, ops.rope(q, k, other, table), strict=True))


def test_gradient_runs_the_reference():
    q, k = torch.randn(3, 2, 8, requires_grad=True), torch.randn(3, 1, 8)
    out, _ = ops.rope(q, k, torch.arange(3), ops.rope_table(8, 8))
    out.square().sum().backward()
    torch.testing.assert_close(q.grad, 2 * q)


Q, K, P, TABLE = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.arange(3), ops.rope_table(4, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q.double(), K.double(), P, TABLE), TypeError, "q is float64, allowed: float32"),
        ((Q, K.half(), P, TABLE), TypeError, "k is torch.float16, q is torch.float32"),
        ((Q, K[:2], P, TABLE), ValueError, r"k \(2, 1, 8\) must be \[T, H, D\]"),
        ((Q, K, P[:2], TABLE), ValueError, r"position \(2,\) must be \(3,\)"),
        ((Q, K, P.float(), TABLE), TypeError, "position is float32, allowed: int64, int32"),
        ((Q, K, P, TABLE.half()), TypeError, "table is float16"),
        ((Q, K, P, ops.rope_table(4, 10)), ValueError, r"table \(4, 10\) must be .* at most head dim 8"),
        ((Q, K, P + 2, TABLE), IndexError, "positions from 2 to 4, the table has 4"),
        ((Q, K, P - 1, TABLE), IndexError, "positions from -1 to 1"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.rope(*arguments)


@pytest.mark.parametrize("arguments", [(4, 3), (4, 0), (0, 8), (4, 8, -1.0)])
def test_table_errors(arguments):
    with pytest.raises(ValueError, match="rope_table"):
        ops.rope_table(*arguments)
