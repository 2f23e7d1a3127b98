"""What the tests of the build share: the source tree, setup.py as a module, the objects of the last build."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
BUILD = Path(os.environ.get("FASTLLM_BUILD_DIR", ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"))
KERNELS = re.findall(r"^KERNEL\((\w+),", (ROOT / "csrc/cpu/kernels.def").read_text(), re.M)


def setup_module():
    """setup.py, imported: its tables of flags and its own functions."""
    spec = importlib.util.spec_from_file_location("fastllm_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command, check: bool = True, **options) -> subprocess.CompletedProcess:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0 or not check, f"{command[0]} failed:\n{done.stdout[-4000:]}{done.stderr[-8000:]}"
    return done


def need(tool: str, package: str) -> str:
    """The path of a program, or a skip that says what to install."""
    return shutil.which(tool) or pytest.skip(f"{tool} is not installed (Debian: {package})")


def objects() -> list[Path]:
    """The object files of the last build, in link order."""
    if not (BUILD / "build.ninja").exists():
        pytest.skip(f"no build tree at {BUILD}: the package was installed from a wheel (pip install -e . leaves one)")
    link = re.search(r"^build _C\S+: link (.*)$", (BUILD / "build.ninja").read_text(), re.M)
    return [BUILD / name for name in link[1].split()]


def tier_objects() -> dict[str, list[Path]]:
    """Kernel objects by instruction-set tier."""
    tiers: dict[str, list[Path]] = {}
    for path in objects():
        if path.name.count(".") == 2:
            tiers.setdefault(path.suffixes[0][1:], []).append(path)
    return tiers


def python(
    script: str, check: bool = True, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """A script in a fresh interpreter, with this checkout's package or the one under `path`."""
    env = {**os.environ, "PYTHONPATH": str(path or ROOT), **environment}
    return run(sys.executable, "-c", script, check=check, env=env, cwd=path or ROOT, timeout=600)
