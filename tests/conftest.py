"""Test-wide set-up: shared helpers importable, and no test that leans on another's global state."""

import os
import signal
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers' threads share the cores: one that waits must not spin
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")

if "PYTEST_XDIST_WORKER" not in os.environ and not any("gpu" in word for word in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a model goes to a GPU by itself; what is tested here are a CPU's bits

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's job in the background: Ctrl-C is tested all the same
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


FIRST, CHUNK = "test_triton.py", 32  # minutes in one item; how many items a worker is given at a time


def pytest_configure(config):
    """Workers end together: the longest items begin first, and none has many short ones waiting behind them."""
    if getattr(config.option, "maxschedchunk", 0) is None:
        config.option.maxschedchunk = CHUNK


def pytest_collection_modifyitems(config, items):
    """GPU and slow tests run when asked for with -m."""
    items.sort(key=lambda item: item.path.name != FIRST)
    expression = config.getoption("-m")
    for mark in ("gpu", "slow"):
        if mark not in expression:
            selected = [i for i in items if mark not in i.keywords]
            config.hook.pytest_deselected(items=[i for i in items if mark in i.keywords])
            items[:] = selected
