"""The C++ under AddressSanitizer and UndefinedBehaviorSanitizer (the ops' own tests, every tier) and ThreadSanitizer
(barrier and plans). Each one is first shown a bug that it must report: a sanitizer that sees nothing proves nothing."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from _build import ROOT, need, run, setup_module, tier_objects

from fastllm import _C

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are set up for Linux here"),
]


def runtime(name: str) -> str:
    """The path of a library that belongs to the compiler."""
    path = run(need("g++", "g++"), f"-print-file-name={name}").stdout.strip()
    return path if os.path.isabs(path) else pytest.skip(f"{name} is not installed; it comes with g++")


# -------------------------------------------------------------------------------- AddressSanitizer, undefined behaviour


@pytest.fixture(scope="module")
def sanitized() -> dict:
    """Options to run Python on a sanitized build; its objects are kept in build."""
    base = ROOT / "build" / f"sanitized{os.environ.get('PYTEST_XDIST_WORKER', '')}"  # workers build at the same time
    shutil.rmtree(base / "lib", ignore_errors=True)
    switches = {"FASTLLM_SANITIZE": "address,undefined", "FASTLLM_BUILD_DIR": str(base / "ninja"), "FASTLLM_CUDA": "0"}
    build = ["setup.py", "-q", "build", "--build-base", base, "--build-lib", base / "lib"]
    run(sys.executable, *build, cwd=ROOT, env={**os.environ, **switches})
    environment = {
        **os.environ,
        "PYTHONPATH": str(base / "lib"),
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')} {runtime('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter itself keeps memory to the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    return {"env": environment, "cwd": base / "lib"}


def test_address_sanitizer_sees_an_overrun(sanitized):
    script = """
import torch, fastllm
from fastllm import _C
assert "sanitized" in _C.__file__
x, w, y = torch.randn(4, 64), torch.randn(64), torch.empty(4, 64)
_C.rms_norm(y.data_ptr(), 0, 0, x.data_ptr(), 0, w.data_ptr(), ROWS, 64, 64, 0, 0, 1e-6)
print("fine")
"""
    good = run(sys.executable, "-c", script.replace("ROWS", "4"), **sanitized)
    assert good.stdout.strip() == "fine"
    bad = run(sys.executable, "-c", script.replace("ROWS", "5"), check=False, **sanitized)
    assert bad.returncode and "heap-buffer-overflow" in bad.stderr


@pytest.mark.parametrize("tier", _C.isas())
def test_ops_under_address_and_undefined_sanitizer(sanitized, tier):
    """Without the tests that start compilers of their own: torch.compile is not what is looked at."""
    tests = [ROOT / "tests/ops", ROOT / "tests/test_threads.py"]
    chosen = "not compile and not opcheck and not export and not fork and not memory and not freed and not openmp"
    chosen += " and not lower_tiers"
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider", "-x", "-k", chosen]
    done = run(
        sys.executable, "-m", "pytest", *options, *tests,
        env={**sanitized["env"], "FASTLLM_ISA": tier}, cwd=sanitized["cwd"], timeout=3600,
    )  # fmt: skip
    assert " passed" in done.stdout and "runtime error" not in done.stdout + done.stderr
    print(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------ ThreadSanitizer


def build_team(folder: Path, *flags: str) -> Path:
    """tests/slow/team.cpp, the runtime and rms_norm under ThreadSanitizer; the other kernels are linked, not called."""
    setup = setup_module()
    compiler, cpu = need("g++", "g++"), ROOT / "csrc/cpu"
    common = ["-O1", "-g", "-std=c++17", "-fsanitize=thread", *(["-DFASTLLM_X86"] if setup.X86 else []), *flags]
    objects = [o for paths in tier_objects().values() for o in paths if not o.name.startswith("rms_norm.")]
    for tier, isa in setup.TIERS.items():
        objects.append(folder / f"rms_norm.{tier}.o")
        kernel = [*isa.split(), *setup.KERNEL_FLAGS.split(), f"-DFASTLLM_TIER={tier}", "-ffp-contract=off"]
        run(compiler, *common, *kernel, "-c", cpu / "rms_norm.cpp", "-o", objects[-1])
    program = folder / "team"
    sources = [ROOT / "tests/slow/team.cpp", cpu / "plan.cpp", cpu / "registry.cpp"]
    run(compiler, *common, *sources, *objects, "-o", program, "-pthread")
    return program


def test_thread_sanitizer_sees_a_broken_barrier(tmp_path):
    done = run(build_team(tmp_path, "-DBROKEN_BARRIER"), _C.isa(), "2", "2", check=False)
    assert done.returncode and "ThreadSanitizer: data race" in done.stderr, done.stderr


def test_barrier_and_plans_under_thread_sanitizer(tmp_path):
    program = build_team(tmp_path)
    for tier in _C.isas():
        for threads in (2, 3, 8):
            done = run(program, tier, threads, 25, env={**os.environ, "FASTLLM_ISA": tier}, timeout=600)
            assert done.stdout.strip() == f"{tier}, {threads} threads: ok" and "WARNING" not in done.stderr
