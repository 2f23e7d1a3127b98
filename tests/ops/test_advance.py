"""advance: rows that are left out, and what is refused."""

import _oracle
import pytest
import torch

from fastllm import ops
from fastllm.bench.cases.advance import SUITE
from fastllm.ops import SampleState
from fastllm.ops._op import OPS


@_oracle.cases(SUITE)
def test_forward(case):
    inputs = _oracle.draw(SUITE, case, torch.float32)
    for ours, plain in zip(SUITE.run(**inputs), SUITE.reference(**inputs), strict=True):
        assert torch.equal(ours, plain)


def test_step_by_step():
    state = SampleState.create(2, history=3, history_len=1, position=torch.tensor([7, 15]))
    rows = torch.tensor([1, -1, 0], dtype=torch.int32)
    position, length = torch.tensor([15, 3, 7], dtype=torch.int32), torch.tensor([16, 4, 8], dtype=torch.int32)
    table, slot = torch.tensor([[5, 9], [1, 2], [3, 4]], dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    ops.advance(torch.tensor([11, 12, 13]), state.with_rows(rows), position, length, table, slot)
    assert state.history.tolist() == [[0, 13, 0], [0, 11, 0]]
    assert state.history_len.tolist() == [2, 2] and state.position.tolist() == [8, 16]
    assert position.tolist() == [16, 3, 8] and length.tolist() == [17, 4, 9]
    assert slot.tolist() == [9 * 16, -1, 3 * 16 + 8]


def test_what_does_not_fit():
    full = SampleState.create(1, history=1, history_len=1)
    with pytest.raises(IndexError, match="a history is full"):
        ops.advance(torch.tensor([3]), full)
    assert full.history.tolist() == [[0]]
    ops.advance(torch.tensor([3]), SampleState.create(1))  # no history is kept: nothing to overflow
    position, slot = torch.tensor([31]), torch.tensor([5])
    with pytest.raises(IndexError, match="beyond the block table"):
        ops.advance(torch.tensor([3]), SampleState.create(1), position, None, torch.zeros(1, 2).int(), slot)
    assert slot.tolist() == [-1]
    with pytest.raises(IndexError, match="a record does not exist"):
        ops.advance(torch.tensor([3]), SampleState.create(1).with_rows(torch.tensor([1], dtype=torch.int32)))


def test_opcheck_and_compile():
    inputs = _oracle.draw(SUITE, SUITE.correct[1], torch.float32)
    s = inputs["state"]
    rest = tuple(inputs[k] for k in ("position", "context_len", "block_table", "slot", "next_ids"))
    torch.library.opcheck(OPS["advance"].raw, (inputs["token"], s.settings, s.history, None, *rest, 16))
    torch._dynamo.reset()
    compiled = torch.compile(ops.advance, fullgraph=True)
    expected = SUITE.run(**inputs)
    compiled(inputs["token"], s, *rest)
    for ours, want in zip((s.settings, s.history, rest[0], rest[1], rest[3], rest[4]), expected, strict=True):
        assert torch.equal(ours, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"token": torch.zeros(2).int()}, TypeError, "token is int32, allowed: int64"),
        ({"position": torch.zeros(2)}, TypeError, "position is float32, allowed: int64, int32"),
        ({"context_len": torch.zeros(3).int()}, ValueError, r"context_len \(3,\) must be contiguous, \(2,\)"),
        ({"slot": torch.zeros(2).long(), "block_table": None}, ValueError, "slot needs block_table and position"),
        ({"block_table": torch.zeros(3, 1).int()}, ValueError, r"block_table \(3, 1\) must be \[2, P\]"),
        ({"page": 0}, ValueError, "page is 0, allowed"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "token": torch.zeros(2).long(), "state": SampleState.create(2), "position": torch.zeros(2).long(),
        "block_table": torch.zeros(2, 1).int(), "slot": torch.zeros(2).long(),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ops.advance(**{**arguments, **change})
