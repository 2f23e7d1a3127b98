"""The layout holds: floors that import downwards, one op under one name in every folder, files that one can read at a
sitting. Everything is derived from the tree; nothing here is a list to keep, but for the floors themselves."""

import ast
import graphlib
import importlib
import inspect
import re
import subprocess
from pathlib import Path

import pytest

from fastllm import _C, ops
from fastllm.bench.cases import suites
from fastllm.ops._op import OPS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastllm"

# From the ground up: a module imports from floors below its own, and from its own floor where that closes no circle.
FLOORS = (
    {"_C"},  # csrc
    {"ops"},
    {"models", "data", "files", "hub", "sampling_params"},
    {"peft"},
    {"decode"},
    {"llm", "conversation", "output", "terminal", "evaluate"},
    {"train"},
    {"rlhf"},
    {"integrations", "serve", "web"},
    {"cli", "__main__"},
)
MEASURING = {"bench", "info"}  # stand on the ops and are seen by the command line alone
BENCH_SEES, SEES_BENCH = {"_C", "ops", *MEASURING}, {"cli", "__main__"}
LINES = 500
FOREIGN = re.compile(r"(?<![\w.])/(home|root|work|Users|mnt)/\w")


def tracked() -> list[Path]:
    """The text files of the project, as git lists them; every file, where there is no git."""
    git = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = git.stdout.splitlines() if git.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.*")]
    texts = {".py", ".cpp", ".h", ".cu", ".cuh", ".def", ".md", ".toml", ".yml", ".yaml", ".sh", ".html", ".js", ".css"}
    return [ROOT / n for n in names if Path(n).suffix in texts and (ROOT / n).is_file()]


TRACKED = tracked()
SOURCES = [p for p in TRACKED if p.is_relative_to(PACKAGE) and p.suffix == ".py"]
TREES = {p: ast.parse(p.read_text(), str(p)) for p in TRACKED if p.suffix == ".py"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def top(path: Path) -> str:
    """ops for fastllm/ops/rms_norm.py, llm for fastllm/llm.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


# -------------------------------------------------------------------------------------------------------------- floors


def imported(path: Path) -> set[str]:
    """The top-level members of fastllm that a file imports, anywhere in it."""
    package = ["fastllm", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            targets = [a.name.split(".") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [[*base, a.name] for a in node.names]
        else:
            continue
        found |= {t[1] for t in targets if t[0] == "fastllm" and len(t) > 1}
    return found


def floor(member: str) -> int:
    for i, members in enumerate(FLOORS):
        if member in members:
            return i
    pytest.fail(f"fastllm/{member} stands on no floor: give it one in {Path(__file__).name}")


def test_imports_go_down():
    wrong, graph = [], {}
    for path in SOURCES:
        member = top(path)
        if member == "__init__":  # the door: it shows what every floor offers
            continue
        for other in imported(path) - {member, "__version__"}:
            if member in MEASURING:
                allowed = other in BENCH_SEES
            elif other in MEASURING:
                allowed = member in SEES_BENCH
            else:
                allowed = floor(other) <= floor(member)
                graph.setdefault(member, set()).add(other)
            if not allowed:
                wrong.append(f"{name(path)} imports fastllm.{other}")
    assert not wrong, "\n".join(wrong)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


def test_the_package_imports_little_at_once():
    """Who embeds the kernels does not wait for the rest."""
    eager = [n for n in TREES[PACKAGE / "__init__.py"].body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert [a.name for n in eager if isinstance(n, ast.ImportFrom) and n.level for a in n.names] == [
        "ops",
        "SamplingParams",
    ]


# ----------------------------------------------------------------------------------------------------- one op, one name

# Every module, or folder, that registers an op; `kv_cache` is only a record.
OP_MODULES = sorted({o.reference.__module__.split(".")[2] for o in OPS.values()})


def has_cpu_kernel(op: str) -> bool:
    return any(f"{o.cpu.__module__}.".startswith(f"fastllm.ops.{op}.") for o in OPS.values() if o.cpu)


def runtime_files() -> set[str]:
    """What setup.py compiles once, not once per tier."""
    for node in TREES[ROOT / "setup.py"].body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "RUNTIME":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py names no RUNTIME files")


@pytest.mark.parametrize("op", OP_MODULES)
def test_an_op_has_its_files(op):
    wanted = [f"fastllm/bench/cases/{op}.py", f"tests/ops/test_{op}.py", f"benchmarks/bench_{op}.py"]
    if has_cpu_kernel(op):
        wanted.append(f"csrc/cpu/{op}*.cpp")
    missing = [w for w in wanted if not any(ROOT.glob(w))]
    assert not missing, f"ops.{op} lacks {', '.join(missing)}"


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [
        ("fastllm/bench/cases", r"([a-z]\w*)\.py"),
        ("tests/ops", r"test_(?!all\.)(\w+)\.py"),
        ("benchmarks", r"bench_(\w+)\.py"),
        ("csrc/cpu", r"(\w+)\.cpp"),
    ],
)
def test_a_file_belongs_to_an_op(folder, pattern):
    """Named as an op, as one of its public functions, or as a part of it (`attention_decode`)."""
    known = {*OP_MODULES, *ops.__all__, *runtime_files(), *(p.stem for p in (PACKAGE / "bench").glob("*.py"))}
    stems = [m[1] for p in (ROOT / folder).glob("*") if (m := re.fullmatch(pattern, p.name))]
    strays = [s for s in stems if s not in known and not any(s.startswith(f"{op}_") for op in OP_MODULES)]
    assert not strays, f"{folder}: no op is named {', '.join(strays)}"


def test_a_suite_has_the_name_of_its_file():
    assert {file: suite.op for file, suite in suites().items()} == {file: file for file in suites()}


def test_every_kernel_has_a_caller():
    source = "".join(p.read_text() for p in SOURCES)
    assert not [k for k in _C.kernels() if not re.search(rf"_C\.{k}\b|\"{k}\"", source)]


@pytest.mark.parametrize("op", [n for n in ops.__all__ if inspect.isfunction(getattr(ops, n))])
def test_a_public_op_has_at_most_eight_arguments(op):
    count = len(inspect.signature(getattr(ops, op)).parameters)
    assert count <= 8, f"ops.{op} takes {count} arguments: make it two ops, or let it take a record"


# ---------------------------------------------------------------------------------------------------------- readability


def test_files_are_short():
    """Or say at their head why not, with the words `longer than 500 lines`."""
    wrong = []
    for path in TRACKED:
        lines = path.read_text().splitlines()
        if (
            len(lines) > LINES
            and path.suffix != ".md"
            and f"longer than {LINES} lines" not in " ".join(lines[:20]).lower()
        ):
            wrong.append(f"{name(path)}: {len(lines)} lines")
    assert not wrong, "\n".join(wrong)


def test_no_path_of_one_machine():
    found = [
        f"{name(path)}:{i}: {line.strip()}"
        for path in TRACKED
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if FOREIGN.search(line)
    ]
    assert not found, "\n".join(found)


def test_everything_public_is_documented():
    """Every module; every public function and class. Of an op's parts (`cpu`, `forward_kernel`), whose meaning the head
    of their file states, only what `fastllm.ops` exports; `bench` and `info` are no API."""
    missing = [f"{name(path)}: the module" for path, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]
    for path in SOURCES:
        if path.is_relative_to(PACKAGE / "ops") or top(path) in MEASURING:
            continue
        for node in TREES[path].body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{name(path)}:{node.lineno}: {node.name}")
    for module in (ops, importlib.import_module("fastllm")):
        for public in module.__all__:
            value = getattr(module, public) if module is ops else module.__dict__.get(public, "")
            if callable(value) and not inspect.getdoc(value):
                missing.append(f"{module.__name__}.{public}")
    assert not missing, "\n".join(missing)
