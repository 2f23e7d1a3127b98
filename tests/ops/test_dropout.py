"""dropout: what only this op must promise."""

import math

import _contract
import _oracle
import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.cases.dropout import SUITE
from fastllm.ops import Dropout
from fastllm.ops._dropout import keep, threshold
from fastllm.ops._op import OPS


def test_compile_fullgraph():
    _oracle.check_compile(SUITE, SUITE.correct[3])


def test_calls_are_compiled_together():
    def dropped(call, x):
        return ops.dropout(x, Dropout(0.5, seed=3, call=call))

    _oracle.check_compiled_calls(dropped, [torch.randn(4, 8, requires_grad=True)])


def test_opcheck():
    torch.library.opcheck(OPS["dropout"].raw, (torch.randn(4, 33), 0.25, 7, 0))


def test_the_mask_is_philox_word_by_word():
    """Against a Philox that shares nothing with the package."""
    seed, call, p = 0x0123456789ABCDEF, 0xFEDCBA98, 0.4
    rows, columns = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 + 5]), torch.tensor([0, 1, 2, 3, 4, 63, 64, 2**20 + 3])
    mask = keep(rows[:, None], columns, p, seed, call)
    for r, row in enumerate(rows.tolist()):
        for c, column in enumerate(columns.tolist()):
            counter = (column // 4, row % 2**32, row >> 32, call)
            word = _contract.philox(counter, (seed % 2**32, seed >> 32))[column % 4]
            assert mask[r, c] == (word >= threshold(p))


def test_rows_are_flat_and_threads_change_nothing():
    x, spec = torch.ones(7, 3, 1000), Dropout(0.2, 11)
    whole = ops.dropout(x, spec)
    assert torch.equal(whole.view(21, 1000), ops.dropout(x.view(21, 1000), spec))
    previous = _C.set_thread_limit(1)
    try:
        assert torch.equal(whole, ops.dropout(x, spec))
    finally:
        _C.set_thread_limit(previous)


def test_statistics():
    n, p = 1 << 20, 0.3
    masks = [
        ops.dropout(torch.ones(64, n // 64), Dropout(p, seed, call)) != 0 for seed, call in ((1, 0), (1, 1), (2, 0))
    ]
    sigma = math.sqrt(n * p * (1 - p))
    for mask in masks:
        assert abs(mask.sum().item() - n * (1 - p)) < 5 * sigma
        rows = mask.sum(1).double()
        assert abs(rows.var().item() / (n / 64 * p * (1 - p)) - 1) < 1  # 64 rows: sd of the ratio is .18
    for i, j in ((0, 1), (0, 2), (1, 2)):  # independent: both keep with (1 - p)^2
        q = (1 - p) ** 2
        assert abs((masks[i] & masks[j]).sum().item() - n * q) < 5 * math.sqrt(n * q * (1 - q))


def test_what_is_dropped_is_zero_and_p_zero_is_a_copy():
    x = torch.full((4, 256), math.nan)
    y = ops.dropout(x, Dropout(0.5, 0))
    assert ((y == 0) | y.isnan()).all() and 0 < (y == 0).sum() < y.numel()
    x = torch.randn(3, 5)
    y = ops.dropout(x, Dropout(0.0, 0))
    assert torch.equal(x, y) and x.data_ptr() != y.data_ptr()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Dropout(1.0, 0), ValueError, "p is 1.0, allowed: 0 <= p < 1"),
        (lambda: Dropout(math.nan, 0), ValueError, "p is nan"),
        (lambda: Dropout(0.1, 2**63), ValueError, "signed 64-bit integer"),
        (lambda: Dropout(0.1, 0, -1), ValueError, "call is -1, allowed: 0 to 4294967295"),
        (lambda: ops.dropout(torch.ones(3).double(), Dropout(0.1, 0)), TypeError, "x is float64, allowed: float32"),
        (lambda: ops.dropout(torch.tensor(1.0), Dropout(0.1, 0)), ValueError, "x is a scalar"),
        (lambda: ops.dropout(torch.ones(3), 0.1), TypeError, r"spec is 0.1; it must be a Dropout\(p, seed, call\)"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
