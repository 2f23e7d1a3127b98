"""The public API is typed: every signature says all, and mypy, in strict mode, takes a user's program over all of it."""

import ast
import inspect
import os
import sys

import pytest
from _build import ROOT, run

import fastllm
from fastllm import _C, conversation, hub, models, ops
from fastllm.data import batch, corrupt, curate, formats, instruct, lint, pairs, questions, sources, tokenizer
from fastllm.decode import beam, embed
from fastllm.evaluate import choice, perplexity, records, scorer, tasks, text
from fastllm.models import baselines, resize

PROGRAM = ROOT / "tests/typing/program.py"


def test_mypy_takes_a_users_program():
    """The first time it reads all of torch, half a minute; then its cache knows what changed."""
    pytest.importorskip("mypy", reason="mypy is not installed: pip install mypy")
    done = run(sys.executable, "-m", "mypy", check=False, cwd=ROOT, env={**os.environ, "MYPYPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr


def callables(name, value):
    """A public name's functions: itself, or the methods of a class of ours."""
    if inspect.isfunction(value):
        yield name, value
    elif inspect.isclass(value):
        for key, member in vars(value).items():
            member = getattr(member, "__func__", getattr(member, "fget", member))  # of class methods and properties
            if inspect.isfunction(member) and (not key.startswith("_") or key == "__init__"):
                yield f"{name}.{key}", member


DATA = [batch, corrupt, curate, formats, instruct, lint, pairs, questions, sources, tokenizer]
EVALUATE = [choice, perplexity, records, scorer, tasks, text]


@pytest.mark.parametrize(
    "module",
    [fastllm, baselines, conversation, beam, embed, hub, models, ops, resize, *DATA, *EVALUATE],
    ids=lambda m: m.__name__,
)
def test_public_signatures_are_complete(module):
    ours = [
        n for n, v in vars(module).items() if not n.startswith("_") and getattr(v, "__module__", "") == module.__name__
    ]
    missing = []
    for name in sorted({*getattr(module, "__all__", ours)}):
        for label, function in callables(name, getattr(module, name)):
            signature = inspect.signature(function)
            bare = [
                p.name
                for p in signature.parameters.values()
                if p.annotation is p.empty and p.name not in ("self", "cls")
            ]
            bare += ["the result"] if signature.return_annotation is signature.empty and "__init__" not in label else []
            if bare and function.__name__ != "<lambda>":
                missing.append(f"{label}: {', '.join(bare)}")
    assert not missing, "\n".join(missing)


def test_the_program_names_everything_public():
    named = {node.attr for node in ast.walk(ast.parse(PROGRAM.read_text())) if isinstance(node, ast.Attribute)}
    named |= {node.id for node in ast.walk(ast.parse(PROGRAM.read_text())) if isinstance(node, ast.Name)}
    public = {name for module in (fastllm, models, ops) for name in module.__all__}
    assert not public - named


def test_the_stub_of_the_core_names_all_but_its_kernels():
    tree = ast.parse((ROOT / "fastllm/_C.pyi").read_text())
    stated = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))} - {"__getattr__"}
    kernels = {*_C.kernels(), *(f"cuda_{name}" for name in _C.cuda_kernels())}
    assert stated == {name for name in dir(_C) if not name.startswith("__")} - kernels
    plan = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    assert {n.name for n in plan.body if isinstance(n, ast.FunctionDef)} <= set(dir(_C.Plan))
