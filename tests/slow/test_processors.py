"""Other processors, emulated by qemu-user: the tier is chosen at run time, and meets no unknown instruction."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from _build import ROOT, need, objects, run, setup_module

from fastllm import _C

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="qemu-user runs on Linux")]
X86 = pytest.mark.skipif(not setup_module().X86, reason="needs an x86-64 build")
RUNTIME = {"bindings.o", "threads.o", "cuda_loader.o"}  # these need Python, torch's pool or the loader


@pytest.fixture(scope="module")
def team(tmp_path_factory) -> Path:
    """tests/slow/team.cpp on the very objects that the package's library was linked from."""
    program = tmp_path_factory.mktemp("team") / "team"
    linked = [o for o in objects() if o.name not in RUNTIME]
    run(need("g++", "g++"), "-O1", "-std=c++17", ROOT / "tests/slow/team.cpp", *linked, "-o", program, "-pthread")
    return program


@X86
@pytest.mark.parametrize("tier", _C.isas())
def test_team_here(team, tier):
    for threads in (1, 2, 5):
        run(team, tier, threads, 50, env={**os.environ, "FASTLLM_ISA": tier}, timeout=600)


@X86
@pytest.mark.parametrize(
    ("processor", "tier"),
    [("Nehalem", "generic"), ("SandyBridge", "generic"), ("Haswell", "avx2"), ("EPYC-Rome", "avx2")],
)
def test_team_on_an_older_processor(team, processor, tier):
    """Nehalem has SSE4.2 and no AVX; Sandy Bridge has AVX without AVX2 and FMA; the others AVX2 without AVX-512."""
    qemu = need("qemu-x86_64", "qemu-user")
    done = run(qemu, "-cpu", processor, team, tier, 2, 3, timeout=600)
    assert done.stdout.strip() == f"{tier}, 2 threads: ok"


@X86
def test_a_wish_above_the_processor_does_not_crash_it(team):
    """Python refuses such a wish; the core alone takes the best tier that is there."""
    qemu = need("qemu-x86_64", "qemu-user")
    run(qemu, "-cpu", "Haswell", team, "avx2", 2, 1, env={**os.environ, "FASTLLM_ISA": "avx512"}, timeout=600)


@X86
def test_every_suite_on_an_emulated_haswell():
    """The interpreter, torch and every op's table of cases, on a processor without AVX-512."""
    qemu = need("qemu-x86_64", "qemu-user")
    path = os.pathsep.join([str(ROOT), *(p for p in sys.path if p.endswith("site-packages"))])
    interpreter = os.path.realpath(sys.executable)
    done = run(
        qemu, "-cpu", "Haswell", interpreter, ROOT / "tests/slow/suites.py", "avx2",
        env={**os.environ, "PYTHONPATH": path}, timeout=3600,
    )  # fmt: skip
    assert done.stdout.startswith("avx2: ") and done.stdout.strip().endswith("cases ok")


def test_generic_tier_on_arm64(tmp_path):
    """Cross-compiled whole, without a warning, and run: nothing in it is bound to x86."""
    compiler = need("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    setup = setup_module()
    kernels = [p for p in (ROOT / "csrc/cpu").glob("*.cpp") if p.stem not in setup.RUNTIME]
    flags = ["-O2", "-std=c++17", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Werror"]
    linked = []
    for source in kernels:
        linked.append(tmp_path / f"{source.stem}.o")
        generic = [*setup.KERNEL_FLAGS.split(), "-DFASTLLM_TIER=generic"]
        run(compiler, *flags, *generic, "-c", source, "-o", linked[-1])
    runtime = [ROOT / "csrc/cpu" / f"{name}.cpp" for name in ("plan", "registry", "threads", "cuda_loader")]
    for source in runtime:
        run(compiler, *flags, "-c", source, "-o", tmp_path / f"{source.stem}.o")
    linked += [tmp_path / "plan.o", tmp_path / "registry.o"]
    program = tmp_path / "team"
    run(compiler, *flags, ROOT / "tests/slow/team.cpp", *linked, "-o", program, "-pthread", "-static")
    qemu = shutil.which("qemu-aarch64") or pytest.skip("compiled; to run it, install qemu-user")
    assert run(qemu, program, "generic", 2, 3, timeout=600).stdout.strip() == "generic, 2 threads: ok"
