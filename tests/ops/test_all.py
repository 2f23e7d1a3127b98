"""What every op must satisfy, over the cases of every suite: the oracle, guard bands, the contract, the lower tiers.

An op's own file holds what it alone must promise."""

from pathlib import Path

import _oracle
import pytest

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
