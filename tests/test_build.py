"""The build keeps its promises: what the libraries link, what each tier holds, the wheel, the switches."""

import importlib.util
import os
import re
import shlex
import shutil
import sys
import sysconfig
import zipfile
from collections import Counter
from pathlib import Path

import _registers
import pytest
from _build import BUILD, KERNELS, ROOT, SUFFIX, need, objects, python, run, setup_module, tier_objects

import fastllm
from fastllm import _C

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="ELF files are read here")
X86 = pytest.mark.skipif(not setup_module().X86, reason="the tiers are x86-64 instruction sets")
CUDA_LIBRARY = Path(fastllm.__file__).parent / "_cuda.so"
SYSTEM = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"}


def need_cuda_library() -> Path:
    return CUDA_LIBRARY if CUDA_LIBRARY.exists() else pytest.skip("built without nvcc: there is no _cuda.so")


# ------------------------------------------------------------------------------------------------------- the libraries


@LINUX
@pytest.mark.parametrize("library", ["_C", "_cuda"])
def test_links_only_the_systems_libraries(library):
    """No torch, no OpenMP, no CUDA: one build serves every torch, and imports where there is no driver."""
    path = Path(_C.__file__) if library == "_C" else need_cuda_library()
    dynamic = run(need("readelf", "binutils"), "-d", path).stdout
    needed = {n for n in re.findall(r"NEEDED.*\[(.*)\]", dynamic) if not n.startswith("ld-linux")}
    assert needed <= SYSTEM, f"{path.name} links {needed - SYSTEM}"
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


@LINUX
@pytest.mark.parametrize(("library", "symbol"), [("_C", "PyInit__C"), ("_cuda", "fastllm_cuda_table")])
def test_exports_one_symbol(library, symbol):
    path = Path(_C.__file__) if library == "_C" else need_cuda_library()
    table = run(need("nm", "binutils"), "-D", "--defined-only", path).stdout
    assert [line.split()[-1] for line in table.splitlines()] == [symbol]


# What a kernel may ask of the outside: what the compiler itself emits, the barrier's yield, and how this processor likes its
# memory read (registry.cpp). No libm: a scalar libm call differs between systems, and from the vector code beside it.
COMPILER = {"memcpy", "memmove", "memset", "memcmp", "__popcountdi2", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}
ALLOWED = COMPILER | {"sched_yield", "_ZN7fastllm9streamingE"}


@LINUX
def test_kernel_objects_stand_alone():
    """A weak symbol compiled with -mavx512f could be the copy that the linker keeps for every tier."""
    nm = need("nm", "binutils")
    for tier, paths in tier_objects().items():
        for path in paths:
            for line in run(nm, path).stdout.splitlines():
                kind, name = line.split()[-2:]
                assert kind not in "WwVvu", f"{path.name}: {name} is weak or unique ({kind})"
                assert kind != "U" or name in ALLOWED, f"{path.name} calls {name}"
                assert kind not in "DB", f"{path.name}: {name} is global data, in {tier} alone"


@LINUX
@pytest.mark.parametrize("program", sorted((ROOT / "tests/slow").glob("*.cpp")), ids=lambda p: p.stem)
def test_programs_of_the_slow_tier_still_fit_the_sources(program):
    run(need("g++", "g++"), "-fsyntax-only", "-std=c++17", program)


def test_every_kernel_is_in_every_tier():
    nm = need("nm", "binutils")
    tiers = tier_objects()
    assert list(tiers) == list(setup_module().TIERS)
    assert list(_C.kernels()) == KERNELS
    for tier, paths in tiers.items():
        table = run(nm, "-C", "--defined-only", *paths).stdout
        defined = re.findall(rf" T fastllm::{tier}::(\w+)\(", table)
        assert sorted(defined) == sorted(KERNELS), f"{tier}: {set(defined) ^ set(KERNELS)}"


WIDE = r"%zmm|%k[0-7]\b|%[xyz]mm(?:1[6-9]|2\d|3[01])\b"
FOREIGN = {"generic": r"\tv[a-z]|%ymm|" + WIDE, "avx2": WIDE}  # runtime files count as generic


@LINUX
@X86
def test_no_instruction_above_its_tier():
    """Neither the runtime nor a lower tier holds an instruction that its processors lack."""
    objdump = need("objdump", "binutils")
    wide_seen = False
    for path in objects():
        tier = path.suffixes[0][1:] if path.name.count(".") == 2 else "generic"
        code = run(objdump, "-d", "--no-show-raw-insn", path).stdout
        if tier in FOREIGN:
            found = re.search(rf"^.*(?:{FOREIGN[tier]}).*$", code, re.M)
            assert not found, f"{path.name}, compiled for {tier}: {found[0].strip()}"
        else:
            wide_seen = wide_seen or re.search(WIDE, code) is not None
    assert wide_seen, "the pattern finds nothing in the avx512 objects either"


# ---------------------------------------------------------------------------------------- the wheel, the source archive

SOURCES = [
    "csrc",
    "fastllm",
    "tests",
    "benchmarks",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
]


def copy_sources(to: Path) -> Path:
    """The tree as a checkout has it; the ninja cache comes along, so that only what changed is compiled."""
    skip = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=skip)
        elif source.exists():
            shutil.copy2(source, to / name)
    if (BUILD / "build.ninja").exists():
        shutil.copytree(BUILD, to / "build" / BUILD.name)
    return to


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tree = copy_sources(tmp_path_factory.mktemp("source"))
    target = tmp_path_factory.mktemp("wheel")
    left = tree / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/fastllm/deleted.py"
    left.parent.mkdir(parents=True)
    left.write_text("# of an older build: it must not get into the wheel\n")
    done = run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-w", target, cwd=tree, check=False)
    if done.returncode and re.search("No matching distribution|ConnectionError|NewConnectionError", done.stderr):
        pytest.skip("pip cannot reach a package index, so it cannot set up its isolated build")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = target.glob("fastllm-*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    python_files = {str(p.relative_to(ROOT)) for p in (ROOT / "fastllm").rglob("*.py")}
    libraries = {f"fastllm/_C{SUFFIX}", *(["fastllm/_cuda.so"] if setup_module().find_nvcc() else [])}
    package = {n for n in names if n.endswith((".py", ".so"))}
    assert package == python_files | libraries
    assert {"fastllm/py.typed", "fastllm/_C.pyi"} <= names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert {n.split("/")[0] for n in names} == {"fastllm", wheel.name.split("-cp")[0] + ".dist-info"}


def test_wheel_runs_without_the_source_tree(wheel, tmp_path):
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path, wheel)
    script = (
        "import torch, fastllm; from fastllm import _C, ops; ops.rms_norm(torch.ones(2, 8), torch.ones(8));"
        "print(fastllm.__file__, _C.__file__, fastllm.__version__, sep='\\n')"
    )
    package, core, version = python(script, path=tmp_path).stdout.split()
    assert Path(package).parent == Path(core).parent == tmp_path / "fastllm"
    assert version == wheel.name.split("-")[1]


def test_source_archive_holds_what_a_build_needs(tmp_path):
    tree = copy_sources(tmp_path / "tree")
    (tree / "fastllm/_cuda.so").write_bytes(b"left by a build in place")
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=tree)
    (path,) = tmp_path.glob("*.tar.gz")
    run("tar", "xf", path, "-C", tmp_path)
    root = tmp_path / path.name.removesuffix(".tar.gz")
    for folder in ("csrc", "fastllm", "tests"):
        for source in (ROOT / folder).rglob("*"):
            if source.suffix in (".h", ".cpp", ".def", ".cu", ".cuh", ".py"):
                assert (root / source.relative_to(ROOT)).exists(), f"{source.relative_to(ROOT)} is missing"
    assert not list(root.rglob("*.so"))


# ------------------------------------------------------------------------------------------------ switches of the build


def test_fastllm_cuda_is_auto_0_or_1(monkeypatch):
    setup = setup_module()
    monkeypatch.setenv("FASTLLM_CUDA", "0")
    assert setup.find_nvcc() is None
    monkeypatch.setattr(setup.os, "access", lambda *_: False)
    monkeypatch.setenv("FASTLLM_CUDA", "auto")
    assert setup.find_nvcc() is None
    monkeypatch.setenv("FASTLLM_CUDA", "1")
    with pytest.raises(SystemExit, match=r"^FASTLLM_CUDA=1, but there is no nvcc; set CUDA_HOME"):
        setup.find_nvcc()
    monkeypatch.setenv("FASTLLM_CUDA", "yes")
    with pytest.raises(SystemExit, match=r"^FASTLLM_CUDA='yes' is not one of auto, 0, 1\.$"):
        setup.find_nvcc()


@pytest.mark.parametrize(
    "version, why",
    [
        ("Cuda compilation tools, release 11.8, V11.8.89", r"/nvcc is of CUDA 11\.8"),
        ("something else", "names no release"),
        ("Cuda compilation tools, release 12.0, V12.0.76", r"/nvcc is of CUDA 12\.0"),
        ("Cuda compilation tools, release 12.1, V12.1.66", ""),
    ],
)
def test_an_old_nvcc_is_named_and_not_used(monkeypatch, tmp_path, capsys, version, why):
    setup = setup_module()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho '{version}'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FASTLLM_CUDA", "auto")
    assert setup.find_nvcc() == (None if why else str(nvcc))
    assert re.search(f"no CUDA library: .*{why}" if why else "^$", capsys.readouterr().out)
    monkeypatch.setenv("FASTLLM_CUDA", "1")
    if why:
        with pytest.raises(SystemExit, match=f"FASTLLM_CUDA=1, but .*{why}; .* 12.1 or later"):
            setup.find_nvcc()


def test_a_build_that_cannot_be_says_so_in_one_sentence(monkeypatch, tmp_path):
    setup = setup_module()
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(SystemExit, match=r"^no-such-compiler -O2 is not there: install a C\+\+17 compiler"):
        setup.core_rules(SUFFIX, tmp_path)
    monkeypatch.setattr(setup.sys, "platform", "win32")
    with pytest.raises(SystemExit, match=r"^fastllm builds on Linux and macOS; on Windows, install it inside WSL\.$"):
        setup.check_platform()


# ---------------------------------------------------------------------------------------- switches of a running process

NORM = """
import torch, fastllm
from fastllm import _C, ops
from fastllm.ops._op import OPS
x = torch.randn(5, 100)
wrong = (ops.rms_norm(x, torch.ones(100)) - torch.nn.functional.rms_norm(x, (100,), eps=1e-6)).abs().max()
assert wrong < 1e-5, wrong
print(_C.isa(), OPS["rms_norm"].kernel("cpu").name, sep="|")
"""


@pytest.mark.parametrize("tier", _C.isas())
def test_isa_can_be_lowered(tier):
    assert python(NORM, FASTLLM_ISA=tier).stdout.strip() == f"{tier}|C++ ({tier})"


@pytest.mark.parametrize("wish", ["avx9", "above"])
def test_isa_that_cannot_be_is_an_error(wish):
    if wish == "above":
        wish = next(iter({"generic", "avx2", "avx512"} - set(_C.isas())), None)
        wish or pytest.skip("this processor runs every tier there is")
    done = python("import fastllm", check=False, FASTLLM_ISA=wish)
    assert done.returncode and f"ValueError: FASTLLM_ISA={wish!r}: this processor runs generic" in done.stderr


def test_backend_switch():
    script = """
import os
from fastllm.ops._op import forced_backend
forced_backend.cache_clear()
os.environ["FASTLLM_BACKEND"] = "triton"
forced_backend()
"""
    done = python(NORM + script, check=False, FASTLLM_BACKEND="reference")
    assert done.stdout.strip().endswith("|reference")
    assert done.returncode and "ValueError: FASTLLM_BACKEND='triton': the only value is 'reference'" in done.stderr


def test_imports_without_triton_and_without_a_device():
    script = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("blocked by the test")
sys.meta_path.insert(0, Blocker())
from fastllm.ops import _triton
assert not _triton.available() and _triton.load() == "no Triton: blocked by the test"
"""
    assert "C++" in python(script + NORM, CUDA_VISIBLE_DEVICES="").stdout


def test_cuda_library_opens_without_a_driver():
    script = f"""
from fastllm import _C
count = _C.load_cuda({str(need_cuda_library())!r})
assert count <= 0, count  # no device, or minus an error
print(_C.cuda_error(-count), _C.cuda_runtime_version())
_C.load_cuda(_C.__file__)  # no library of ours
"""
    done = python(script, check=False, CUDA_VISIBLE_DEVICES="")
    assert done.stdout.strip(), done.stderr
    assert "RuntimeError" in done.stderr and "reinstall fastllm" in done.stderr


# ----------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.parametrize("wanted", ["90a", pytest.param("80;89;90+PTX;100", marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_cuda_kernels_compile_without_spills(source, wanted, tmp_path):
    """`pytest -s` prints what each kernel takes."""
    setup = setup_module()
    nvcc = setup.find_nvcc() or pytest.skip("nvcc is not installed")
    flags = [*setup.gencode(nvcc, wanted).split(), *shlex.split(setup.define_archs(nvcc, wanted))]
    assert "sm_90" in str(flags) and "compute_90" in str(flags)
    done = run(nvcc, *setup.NVCC_FLAGS.split(), "-Xptxas", "-v", *flags, "-c", source, "-o", tmp_path / "kernel.o")
    assert "Performance Loss" not in done.stderr, done.stderr  # products that ptxas lets wait for each other
    if "__global__" in source.read_text():
        uses = _registers.of_ptxas(done.stderr)
        _registers.check(uses)
        assert {u.arch for u in uses} >= {f"sm_{a}" for a in re.findall(r"(\d+a?)", wanted)}


def disassembled(source: str, folder: Path) -> str:
    """What a file of csrc/cuda becomes on sm_90a."""
    setup = setup_module()
    nvcc = setup.find_nvcc() or pytest.skip("nvcc is not installed")
    triton = importlib.util.find_spec("triton")
    beside = [str(Path(triton.origin).parent / "backends/nvidia/bin")] if triton else []
    path = os.pathsep.join([os.environ["PATH"], *beside])
    cuobjdump = shutil.which("cuobjdump", path=path) or pytest.skip("cuobjdump is on no path, nor in Triton")
    code, kernel = ROOT / f"csrc/cuda/{source}.cu", folder / "kernel.o"
    run(nvcc, *setup.NVCC_FLAGS.split(), *setup.gencode(nvcc, "90a").split(), "-c", code, "-o", kernel)
    return run(cuobjdump, "-sass", kernel).stdout


@pytest.mark.parametrize(
    ("source", "count", "loads"),
    [
        ("quant_linear", 16, {"LDG.E.EF.128", "LDG.E.U16"}),
        ("linear", 8, {"LDG.E.EF.128"}),
        ("kv_append", 2, {"LDG.E", "LDG.E.64"}),
        ("paged_attention", 8, {"LDG.E"}),
    ],
)
def test_what_begins_early_reads_what_rests(source, count, loads, tmp_path):
    """quant_linear's product begins while the rows are being rounded, linear's while x is being made: before they wait (ACQBULK)
    they load weights, 16 bytes a thread, and scales. kv_append and attention begin before the projection is done, with positions,
    angles, lengths and page numbers. What a compiler takes for constant it may move up from behind the wait."""
    found = re.split(r"\n\s*Function : ", disassembled(source, tmp_path))
    begins = {"kv_append": "append", "paged_attention": "decode"}.get(source, "linear")
    early, roundings = ([f for f in found if f"{name}_kernel" in f[:200]] for name in (begins, "quantise"))
    assert len(early) == count and all("PREEXIT" in f for f in (roundings or early))
    for kernel in early:
        before, _, after = kernel.partition("ACQBULK")
        assert set(re.findall(r"LDG\.E\S*", before)) == loads and "LDG.E" in after
        assert "CONSTANT" not in kernel


@pytest.mark.parametrize(
    ("source", "waits", "products"),
    [("attention_sm90a", 16, ("64x128x16.F32", "64x64x16.F32")), ("attention_backward_sm90a", 18, ("64x64x16.F32",))],
)
def test_attention_for_hopper_runs_on_its_units(source, waits, products, tmp_path):
    """Matrix products of a warpgroup, waited for where the source does and nowhere else, the copy engine, registers passed
    on; no local memory."""
    text = disassembled(source, tmp_path)
    words = Counter(re.findall(r"\b(HGMMA|HMMA|UTMALDG|USETMAXREG|LDL|STL|WARPGROUP\.DEPBAR)\b", text))
    assert set(words) == {"HGMMA", "UTMALDG", "USETMAXREG", "WARPGROUP.DEPBAR"}
    assert words["WARPGROUP.DEPBAR"] == waits and words["USETMAXREG"] == 2 * 4  # of two head dims in two dtypes
    for product in products:
        assert f"HGMMA.{product} " in text and f"HGMMA.{product}.BF16 " in text  # of float16 and bfloat16
    assert "].tnspB," in text
