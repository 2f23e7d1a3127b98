"""Every op's table of cases, forward and gradients against float64, in one process: test_processors.py emulates it.

python tests/slow/suites.py EXPECTED_ISA
"""

import importlib
import pkgutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _oracle

import fastllm.bench.cases
from fastllm import _C

assert _C.isa() == sys.argv[1], f"chose {_C.isa()}, expected {sys.argv[1]}"
count = 0
for module in pkgutil.iter_modules(fastllm.bench.cases.__path__):
    suite = importlib.import_module(f"fastllm.bench.cases.{module.name}").SUITE
    for case in suite.correct:
        try:
            _oracle.check_forward_and_gradients(suite, case, suite.dtypes[0])
        except AssertionError as error:
            sys.exit(f"{suite.op} {case.label}: {error}")
        count += 1
print(f"{_C.isa()}: {count} cases ok")
