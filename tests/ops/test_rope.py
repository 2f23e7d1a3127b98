"""rope: what only this op must promise, and its errors."""

import _contract
import _oracle
import pytest
import torch

from fastllm import ops
from fastllm.bench.cases.rope import SUITE
from fastllm.ops._op import OPS


def test_compile_fullgraph():
    for case in SUITE.correct[1], SUITE.correct[6], SUITE.correct[12]:
        _oracle.check_compile(SUITE, case)


@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(interleaved):
    q, k = torch.randn(3, 4, 16), torch.randn(3, 2, 16)
    arguments = q, k, torch.arange(3), ops.rope_table(8, 16), interleaved
    torch.library.opcheck(OPS["rope"].raw, arguments)
    torch.library.opcheck(OPS["rope_backward"].raw, arguments)


@_oracle.dtypes(SUITE)
def test_bits_of_the_contract(dtype):
    q, k, position = torch.randn(7, 3, 64).to(dtype), torch.randn(7, 1, 64).to(dtype), torch.randint(0, 50, (7,))
    ours, _ = ops.rope(q, k, position, ops.rope_table(50, 64))
    assert torch.equal(ours, _contract.rope(q.float(), position, _contract.rope_table(50, 64)).to(dtype))


@_oracle.dtypes(SUITE)
@pytest.mark.parametrize("rotary", [2, 6, 20, 64])
def test_both_conventions_have_the_same_bits(rotary, dtype):
    x, position, table = torch.randn(5, 3, 70).to(dtype), torch.arange(5), ops.rope_table(5, rotary)
    pairs = torch.cat((torch.arange(rotary).view(2, -1).t().flatten(), torch.arange(rotary, 70)))
    halves, _ = ops.rope(x, x, position, table)
    neighbours, _ = ops.rope(x[..., pairs], x[..., pairs], position, table, interleaved=True)
    assert torch.equal(neighbours, halves[..., pairs])


@pytest.mark.parametrize("interleaved", [False, True])
def test_backward_undoes_the_rotation(interleaved):
    q, k, position = torch.randn(9, 2, 32), torch.randn(9, 1, 32), torch.arange(9)
    table = ops.rope_table(9, 32)
    turned = ops.rope(q, k, position, table, interleaved)
    back = OPS["rope_backward"](*turned, position, table, interleaved)
    torch.testing.assert_close(back, (q, k), rtol=1e-5, atol=1e-6)


def test_only_one_of_them_has_a_gradient():
    q, k = torch.randn(3, 2, 8, requires_grad=True), torch.randn(3, 1, 8)
    out, _ = ops.rope(q, k, torch.arange(3), ops.rope_table(8, 8))
    (dq,) = torch.autograd.grad(out.square().sum(), q)
    torch.testing.assert_close(dq, 2 * q)


def test_nan_and_infinity_stay_in_their_pair():
    q, table = torch.randn(2, 1, 16), ops.rope_table(2, 16)
    clean, _ = ops.rope(q, q, torch.arange(2), table)
    q[1, 0, 3] = float("nan")
    out, _ = ops.rope(q, q, torch.arange(2), table)
    assert out.isnan().nonzero().tolist() == [[1, 0, 3], [1, 0, 11]]
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])


def test_functorch_and_export():
    q, k, position, table = torch.randn(2, 5, 3, 16), torch.randn(2, 5, 1, 16), torch.arange(5), ops.rope_table(5, 16)
    rows = torch.func.vmap(lambda a, b: ops.rope(a, b, position, table))(q, k)
    torch.testing.assert_close(rows, ops.rope(q, k, position, table))

    class Turn(torch.nn.Module):
        def forward(self, *inputs):
            return ops.rope(*inputs)

    assert "fastllm.rope" in torch.export.export(Turn(), (q, k, position, table)).graph_module.code


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
