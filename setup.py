"""The build: `fastllm._C` (CPU core, pybind11) and, with nvcc, `fastllm/_cuda.so` (plain C ABI, static cudart).

Environment: FASTLLM_CUDA=auto|0|1, FASTLLM_CUDA_ARCHS="80;90+PTX", CUDA_HOME, CXX, CXXFLAGS, MAX_JOBS,
FASTLLM_BUILD_DIR, FASTLLM_DEBUG=1 (-O0 -g), FASTLLM_SANITIZE=address,undefined (-O1 -g).
Every file of csrc/cpu that holds kernels is compiled once for each instruction-set tier; ninja rebuilds what changed.
Paths in its rules are relative, so a copied tree keeps its objects.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
RUNTIME = {"registry", "threads", "plan", "cuda_loader"}  # compiled once; the other files of csrc/cpu once per tier
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = "-mavx2 -mfma -mf16c -mbmi -mbmi2"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mprefer-vector-width=512"
TIERS = {"generic": "", "avx2": AVX2, "avx512": AVX512} if X86 else {"generic": ""}
# -fmad=false: as -ffp-contract=off for C++
NVCC_FLAGS = "-O3 -std=c++17 -fmad=false --expt-relaxed-constexpr"
KERNEL_FLAGS = "-fno-exceptions -fno-rtti"  # both would leave weak symbols in objects that differ in their instructions


def check_platform() -> None:
    if sys.platform == "win32":
        sys.exit("fastllm builds on Linux and macOS; on Windows, install it inside WSL.")


def find_nvcc() -> str | None:
    mode = os.environ.get("FASTLLM_CUDA", "auto").lower()
    if mode not in ("auto", "0", "1"):
        sys.exit(f"FASTLLM_CUDA={mode!r} is not one of auto, 0, 1.")
    if mode == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [f"{home}/bin/nvcc" for home in homes if home] + [shutil.which("nvcc")]
    candidates += [f"{path}/nvidia/cu13/bin/nvcc" for path in sys.path]  # the nvidia-cuda-nvcc package
    nvcc = next((c for c in candidates if c and os.access(c, os.X_OK)), None)
    missing = "there is no nvcc" if not nvcc else too_old(nvcc)
    if missing and mode == "1":
        sys.exit(f"FASTLLM_CUDA=1, but {missing}; set CUDA_HOME or install the CUDA toolkit, 12.1 or later.")
    if nvcc and missing:
        print(f"no CUDA library: {missing}")
    return None if missing else nvcc


def too_old(nvcc: str) -> str:
    """Why this nvcc is no help; empty where it is. Additions of four floats at once in memory came with CUDA 12.1."""
    version = subprocess.check_output([nvcc, "--version"], text=True)
    release = re.search(r"release (\d+)\.(\d+)", version)
    if not release:
        return f"`{nvcc} --version` names no release"
    return "" if (int(release[1]), int(release[2])) >= (12, 1) else f"{nvcc} is of CUDA {release[1]}.{release[2]}"


def known_archs(nvcc: str, spec: str) -> list[str]:
    """Those of `80;90+PTX` that this nvcc knows."""
    known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
    archs = [a for a in spec.replace(",", ";").split(";") if f"sm_{a.removesuffix('+PTX').rstrip('af')}" in known]
    return archs or sys.exit(f"FASTLLM_CUDA_ARCHS={spec!r}: {nvcc} knows {', '.join(known)}.")


def gencode(nvcc: str, spec: str) -> str:
    """`80;90+PTX` as nvcc flags."""
    flags = []
    for arch in known_archs(nvcc, spec):
        number = arch.removesuffix("+PTX")
        codes = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={codes}")
    return " ".join(flags)


def define_archs(nvcc: str, spec: str) -> str:
    """What tells the library which GPUs it is for: fastllm/ops/_cuda.py asks."""
    return f"""-DFASTLLM_CUDA_ARCHS='"{";".join(known_archs(nvcc, spec))}"'"""


def ninja_path() -> str:
    try:
        import ninja

        path = Path(ninja.BIN_DIR) / "ninja"
        if path.exists():
            return str(path)
    except ImportError:
        pass
    return shutil.which("ninja") or sys.exit("ninja is missing: pip install ninja.")


def core_rules(suffix: str, build: Path) -> list[str]:
    cxx = os.environ.get("CXX", "c++")
    if not shutil.which(cxx.split()[0]):
        sys.exit(f"{cxx} is not there: install a C++17 compiler (g++ or clang++), or name one in CXX.")
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        sys.exit(f"Python.h is not in {include}: install Python's headers (Debian: python3-dev).")
    import pybind11

    debug, sanitize = os.environ.get("FASTLLM_DEBUG"), os.environ.get("FASTLLM_SANITIZE")
    optimise = "-O0 -g" if debug else "-O1" if sanitize else "-O3 -g0 -DNDEBUG"  # sanitized at -O3: minutes a file
    sanitize = f"-fsanitize={sanitize} -fno-sanitize-recover=all -fno-omit-frame-pointer -g" if sanitize else ""
    mac = sys.platform == "darwin"
    exports = build / "exports.map"  # the compiler gives instances of std templates default visibility
    exports.write_text("{ global: PyInit__C; local: *; };\n")
    link = f"-Wl,--gc-sections -Wl,-O1 -Wl,--version-script={exports.name}"
    if mac:
        link = "-undefined dynamic_lookup -Wl,-exported_symbol,_PyInit__C"
    strip = "" if mac or sanitize or debug else "-Wl,-s"
    lines = [
        f"cxx = {cxx}",
        # -ffp-contract=off: an FMA happens where the kernel says so, or results would depend on the compiler
        f"cflags = {optimise} {sanitize} -std=c++17 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden"
        " -ffp-contract=off -fno-math-errno -fno-trapping-math -ffunction-sections -fdata-sections"
        " -Wall -Wextra -Wno-maybe-uninitialized -Wno-uninitialized"
        f" {'-DFASTLLM_X86' if X86 else ''} {os.environ.get('CXXFLAGS', '')}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $cflags $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -o $out {sanitize} {link} {strip} {'' if mac else '-ldl -lpthread'}",
    ]
    objects = []

    def compile_one(source: Path, name: str, flags: str) -> None:
        lines.extend([f"build {name}.o: cxx {os.path.relpath(source, build)}", f"  flags = {flags}"])
        objects.append(f"{name}.o")

    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        if source.stem in RUNTIME:
            compile_one(source, source.stem, "")
            continue
        for tier, flags in TIERS.items():
            compile_one(source, f"{source.stem}.{tier}", f"{flags} {KERNEL_FLAGS} -DFASTLLM_TIER={tier}")
    includes = f"-I{include} -I{pybind11.get_include()}"
    compile_one(ROOT / "csrc/bindings.cpp", "bindings", includes)
    return [*lines, f"build _C{suffix}: link {' '.join(objects)}"]


def cuda_rules(nvcc: str, build: Path) -> list[str]:
    lines = [
        "rule nvcc",
        f"  command = {nvcc} -MD -MF $out.d {NVCC_FLAGS} -Xcompiler -fPIC,-fvisibility=hidden -lineinfo"
        " $arch $define -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvlink",
        f"  command = {nvcc} -shared -cudart static $in -o $out -Xlinker=-s -Xlinker=--exclude-libs,ALL",
    ]
    objects = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        # wgmma, setmaxnreg and TMA exist for sm_90a alone
        common = os.environ.get("FASTLLM_CUDA_ARCHS", "80;90+PTX")
        spec = "90a" if source.stem.endswith("_sm90a") else common
        lines.append(f"build cuda_{source.stem}.o: nvcc {os.path.relpath(source, build)}")
        lines.append(f"  arch = {gencode(nvcc, spec)}")
        if source.stem == "table":
            lines.append(f"  define = {define_archs(nvcc, common)}")
        objects.append(f"cuda_{source.stem}.o")
    return [*lines, f"build _cuda.so: nvlink {' '.join(objects)}"]


class FreshPackage(build_py):
    def run(self) -> None:
        if not self.editable_mode:  # or a module that was deleted since the last build stays in the wheel
            shutil.rmtree(Path(self.build_lib) / "fastllm", ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):
    def run(self) -> None:
        check_platform()
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        build = Path(os.environ.get("FASTLLM_BUILD_DIR", ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"))
        build = build.resolve()
        build.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc()
        lines = ["ninja_required_version = 1.5", *core_rules(suffix, build)]
        lines += cuda_rules(nvcc, build) if nvcc else []
        rules, text = build / "build.ninja", "\n".join(lines) + "\n"
        if not rules.exists() or rules.read_text() != text:
            rules.write_text(text)
        targets = [f"_C{suffix}", *(["_cuda.so"] if nvcc else [])]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.check_call([ninja_path(), "-C", str(build), *jobs, *targets])
        package = ROOT / "fastllm" if self.inplace else Path(self.build_lib) / "fastllm"
        package.mkdir(parents=True, exist_ok=True)
        for target in targets:  # to a temporary name first: a process that has the old file mapped keeps it
            shutil.copy2(build / target, package / f".{target}.new")
            os.replace(package / f".{target}.new", package / target)
        if not nvcc:
            (package / "_cuda.so").unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "fastllm"
        names = [f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", "_cuda.so"]
        return [str(package / name) for name in names if (package / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable install asks for it; the libraries lie in the package already

    def get_source_files(self) -> list[str]:
        return [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()]


if __name__ == "__main__":  # pip runs this file so; a test imports it
    setup(ext_modules=[Extension("fastllm._C", [])], cmdclass={"build_py": FreshPackage, "build_ext": NinjaBuild})
