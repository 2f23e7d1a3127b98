"""What every op must satisfy, over the cases of every suite: the oracle, guard bands, the contract, the lower tiers.

An op's own file holds what it alone must promise."""

from pathlib import Path

import _oracle
import pytest
import torch

HERE = Path(__file__)
ALL = pytest.mark.parametrize(("suite", "case", "dtype"), _oracle.table(lambda s, c, d: _oracle.ONE_OP in (None, s.op)))
ROWS = pytest.mark.parametrize(
    ("suite", "case", "dtype"),
    _oracle.table(lambda s, c, d: s.rows and c.apart and _oracle.ONE_OP in (None, s.op)),
)


@ALL
def test_forward_and_gradients(suite, case, dtype):
    _oracle.check_forward_and_gradients(suite, case, dtype)


@ALL
def test_writes_only_its_outputs(suite, case, dtype):
    _oracle.check_guards(suite, case, dtype)


@ROWS
def test_contract(suite, case, dtype):
    _oracle.check_contract(suite, case, dtype)


@pytest.mark.parametrize("tier", _oracle.LOWER_TIERS)
@pytest.mark.parametrize("file", sorted(p for p in HERE.parent.glob("test_*.py") if p != HERE), ids=lambda p: p.stem)
def test_lower_tiers(file, tier):
    """The op's table with its first file; the others bring tests alone."""
    op = file.stem.removeprefix("test_")
    _oracle.check_lower_tier(op, [HERE, file] if op in _oracle.suites() else [file], tier)


def small(suite) -> dict:
    """Inputs of the first case that has something to do."""
    return _oracle.draw(suite, next(c for c in suite.correct if c.bytes(4) or c.flops), suite.dtypes[0])


TENSORS = [
    pytest.param(suite, name, id=f"{op} {name}")
    for op, suite in _oracle.suites().items()
    for name in [name for name, value in small(suite).items() if torch.is_tensor(value)][1:]
]


@pytest.mark.parametrize(("suite", "name"), TENSORS)
def test_a_tensor_on_another_device_is_an_error(suite, name):
    """Named, and not read as if it were here."""
    inputs = small(suite)
    inputs[name] = inputs[name].to("meta")
    with pytest.raises(ValueError, match=r"on meta|several devices"):
        suite.run(**inputs)
