"""The CUDA C++ kernels without a GPU: compiled for this processor by tests/cuda_host they run against the CPU's kernels, bit for
bit, and attention and linear, whose arithmetic is the matrix unit's, against their formulas. With one (`pytest -m gpu`): the same
tests on it, and the kernels under compute-sanitizer."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _build import ROOT, need, python, run

from fastllm import _C, info
from fastllm.bench.cases.attention import SUITE as ATTENTION_SUITE
from fastllm.bench.cases.sample import SUITE
from fastllm.bench.measure import other_kernels, within
from fastllm.ops import _cuda
from fastllm.ops._op import OPS, Kernel

HERE = Path(__file__).parent
BITS, ATTENTION, DECODE, LINEAR = (HERE / f"_cuda_{name}.py" for name in ("bits", "attention", "decode", "linear"))
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
FLAGS += ["-march=native", "-I", HERE / "cuda_host", "-x", "c++"]  # native: an fma is one instruction
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="contexts and shared libraries of Linux")


ON_A_GPU = ("-m", "gpu or not gpu")  # all tests, and conftest.py hides no GPU from them


def passes(file: Path, *options: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file), *options]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.fixture(scope="module")
def host_library(tmp_path_factory):
    library = tmp_path_factory.mktemp("cuda_host") / "cuda_host.so"
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    run(need("g++", "g++"), *FLAGS, "-shared", "-fPIC", *sources, "-o", library)
    return str(library)


def test_kernels_have_the_bits_of_the_cpu(host_library):
    passes(BITS, FASTLLM_CUDA_HOST=host_library)


@pytest.mark.parametrize("file", [ATTENTION, DECODE, LINEAR], ids=lambda p: p.stem)
def test_kernels_have_the_values_of_their_formulas(host_library, file):
    passes(file, FASTLLM_CUDA_HOST=host_library)


# ------------------------------------------------------------------------------------------------ what the processor finds


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    program = tmp_path_factory.mktemp("faults") / "faults"
    run(need("g++", "g++"), *FLAGS, HERE / "cuda_host/faults.cu", "-o", program)
    return lambda name, seed=1: run(program, name, seed, check=name != "beyond")


def test_a_sound_kernel_has_one_result(faults):
    assert {faults("sound", seed).stdout for seed in range(8)} == {"2080\n"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missed", r"a barrier that not all threads reach: \d+ wait, and \d+ have left"),
        ("elsewhere", r"threads meet at different places, lines \d+ and \d+ \(block \d, thread \d+\)"),
        ("lane", r"a barrier that not all threads reach"),
        ("cluster", r"a barrier that not all threads reach"),
        ("twice", r"a thread arrives twice at its cluster's barrier"),
        ("waits", r"a thread waits at its cluster's barrier and has not arrived"),
    ],
)
def test_a_barrier_that_not_all_reach_fails_the_launch(faults, fault, message):
    assert all(re.match(message, faults(fault, seed).stdout) for seed in range(8))


@pytest.mark.parametrize("fault", ["race", "unwritten"])
def test_what_depends_on_the_order_differs_between_seeds(faults, fault):
    assert len({faults(fault, seed).stdout for seed in range(8)}) > 1


def test_shared_memory_ends_where_it_ends(faults):
    assert faults("beyond").returncode < 0


HOPPER_FAULTS = {  # by name: what at least one order of events shows
    "sound": "^0 wrong",
    "parity": "a barrier that not all threads reach",
    "bytes": "a block ends with bytes that a barrier did not announce",
    "early": "^[1-9][0-9]* wrong",  # a tile read before it is there
    "unfenced": "a product without wgmma.fence",
    "unwaited": "^[1-9][0-9]* wrong",  # sums read while their product runs
    "overwritten": "^[1-9][0-9]* wrong",  # a tile given back while a product reads it
    "rewritten": "a product's left side was written while it ran",
    "swizzle": "a descriptor without 128-byte swizzling",
    "stride": "^[1-9][0-9]* wrong",
    "left": "a block ends with bytes|a barrier that not all threads reach",
    "arrivals": "a barrier that not all threads reach",
    "registers": "a barrier that not all threads reach",
    "offset": "a matrix that begins within the swizzling's pattern",
}


def test_faults_of_copies_and_products(tmp_path):
    program = tmp_path / "faults"
    run(need("g++", "g++"), *FLAGS, HERE / "cuda_host/hopper_faults.cu", "-o", program)
    for fault, message in HOPPER_FAULTS.items():
        seen = [run(program, fault, seed).stdout for seed in range(8)]
        found = [text for text in seen if re.search(message, text)]
        assert found if fault != "sound" else len(found) == len(seen), (fault, seen)


# ------------------------------------------------------------------------------------------------------------ the switch


def test_names_of_the_switch(monkeypatch):
    assert set(_cuda.OPS) == {op.name for op in OPS.values() if op.cuda}
    for words, names in {
        "": set(),
        "sample": {"sample"},
        " sample, quant_linear,": {"sample", "quant_linear"},
        "all": set(_cuda.OPS),
    }.items():
        monkeypatch.setenv(_cuda.VARIABLE, words)
        assert _cuda.wanted.__wrapped__() == names
    monkeypatch.setenv(_cuda.VARIABLE, "sample,softmax")
    with pytest.raises(
        ValueError,
        match=r"FASTLLM_CUDA_KERNELS names softmax; allowed: attention, attention_backward, kv_append, linear, "
        "paged_attention, quant_linear, sample, or all alone",
    ):
        _cuda.wanted.__wrapped__()


CHOICE = """
import torch, warnings
from fastllm.ops import _cuda, _triton, sample
from fastllm.ops._op import OPS
_triton.available = lambda: True  # as on a machine with a GPU
_triton.on_device = lambda launcher: launcher
LIBRARY
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in ("sample", "softmax"):
        kernel = OPS[name].kernel("cuda")
        print(kernel.name, kernel.reason, sep="|")
print(*(w.message for w in caught), sep="\\n")
"""


@pytest.mark.parametrize(
    ("library", "wish", "lines"),
    [
        ("", "", ["Triton|the GPU kernel of this op; FASTLLM_CUDA_KERNELS=sample runs CUDA C++ in its place", ""]),
        (
            "_cuda.library = lambda: (True, 'there')",
            None,
            [f"{OPS['sample'].cuda_name}|the faster of its two kernels", ""],
        ),
        (
            "_cuda.library = lambda: (False, 'no NVIDIA driver')",
            None,
            ["Triton|the GPU kernel of this op; CUDA C++ is not used: no NVIDIA driver", ""],
        ),
        (
            "_cuda.library = lambda: (True, 'there')",
            "sample",
            [f"{OPS['sample'].cuda_name}|FASTLLM_CUDA_KERNELS names it", ""],
        ),
        (
            "_cuda.library = lambda: (False, 'no NVIDIA driver')",
            "sample",
            [
                "Triton|FASTLLM_CUDA_KERNELS names it, but the CUDA library is not used: no NVIDIA driver",
                "fastllm.sample: FASTLLM_CUDA_KERNELS names it, but the CUDA library is not used: no NVIDIA driver;"
                " Triton runs it",
            ],
        ),
    ],
    ids=["none", "default", "default in vain", "named", "named in vain"],
)
def test_what_runs_on_a_gpu(library, wish, lines):
    named = {} if wish is None else {_cuda.VARIABLE: wish}
    done = python(CHOICE.replace("LIBRARY", library), **named)
    assert done.stdout.splitlines() == [lines[0], "Triton|the GPU kernel of this op", lines[1]], done.stderr


def test_a_benchmark_times_both(monkeypatch):
    """The other kernel's launcher runs under its own name, and only then."""
    op, calls = OPS["sample"], []
    monkeypatch.setattr(op, "cuda", lambda *arguments: calls.append(len(arguments)))
    monkeypatch.setattr(_cuda, "library", lambda: (True, "there"))
    monkeypatch.setitem(op._kernels, "cuda", chosen := Kernel(op.triton, "Triton", "chosen"))
    suite = dataclasses.replace(SUITE, run=lambda n: op.kernel("cuda").infer(*range(n)))
    rivals = dict(other_kernels(suite, "cuda"))
    within(rivals["CUDA C++"], lambda n: suite.run(n=n))(6)
    assert list(rivals) == ["CUDA C++"] and calls == [6] and op.kernel("cuda") is chosen
    monkeypatch.setattr(_cuda, "library", lambda: (False, "no NVIDIA driver"))
    assert dict(other_kernels(suite, "cuda")) == {"CUDA C++": "not here: no NVIDIA driver"}
    assert not dict(other_kernels(suite, "cpu"))


def test_a_benchmark_times_attention_three_ways(monkeypatch):
    """cuDNN's, Triton's and CUDA C++'s, whichever is chosen."""
    op, calls = OPS["attention"], []
    monkeypatch.setattr(op, "cuda", lambda *arguments: calls.append("CUDA C++"))
    monkeypatch.setattr(
        op, "triton", lambda *a: calls.append("cuDNN" if torch.backends.cuda.cudnn_sdp_enabled() else "Triton")
    )
    monkeypatch.setattr(_cuda, "library", lambda: (True, "there"))
    suite = dataclasses.replace(ATTENTION_SUITE, run=lambda n: op.kernel("cuda").infer(*range(n)))
    for chosen in (Kernel(op.triton, op.triton_name, "chosen"), Kernel(op.cuda, op.cuda_name, "chosen")):
        monkeypatch.setitem(op._kernels, "cuda", chosen)
        for name, context in other_kernels(suite, "cuda"):
            within(context, lambda n: suite.run(n=n))(16)
            assert calls.pop() == name
        suite.run(n=16)
        assert calls.pop() == ("cuDNN" if chosen.infer is op.triton else "CUDA C++")
        assert {name for name, _ in other_kernels(suite, "cuda")} | {"cuDNN", "CUDA C++"} == {
            "Triton",
            "cuDNN",
            "CUDA C++",
        }


def test_a_launch_without_a_device_is_an_error():
    """Not a crash, and the process goes on."""
    script = """
import torch
from fastllm.ops import SampleState, _cuda
from fastllm.ops._op import OPS
s = SampleState.create(1)
arguments = (torch.zeros(1, 8), s.settings, s.history, s.suppress, None, True)
for load in (False, True):
    try:
        if load:
            _cuda.library()
        OPS["sample"].cuda(*arguments)
    except RuntimeError as error:
        print(error)
print(OPS["sample"].cpu(*arguments)[3].tolist())
"""
    lines = python(script, CUDA_VISIBLE_DEVICES="").stdout.splitlines()
    assert lines[0] == "the CUDA library is not loaded; see `fastllm info`" and lines[-1] == "[8]"
    if (Path(_C.__file__).parent / "_cuda.so").exists() and not torch.cuda.is_available():
        assert lines[1].startswith("sample: the CUDA kernel could not be launched: ")


def test_weights_rest_within_a_block_alone(monkeypatch):
    said = []
    monkeypatch.setattr(_C, "cuda_weights_rest", said.append)
    with pytest.raises(ZeroDivisionError), _cuda.weights_rest():
        assert said == [True]
        raise ZeroDivisionError
    assert said == [True, False]


def test_a_record_is_counted():
    with pytest.raises(TypeError, match=r"_C\.cuda_sample takes 18 arguments \(p+l+pp\), got 1"):
        _C.cuda_sample(0)


# --------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("file", [BITS, ATTENTION, DECODE, LINEAR], ids=lambda p: p.stem)
def test_kernels_on_a_gpu(file):
    if file is ATTENTION and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("attention in CUDA C++ is for compute capability 9.0")
    passes(file, *ON_A_GPU, FASTLLM_CUDA_HOST="")


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool):
    """Of every kernel some tests: `compute-sanitizer --tool TOOL python -m pytest -m "gpu or not gpu" tests/_cuda_bits.py
    tests/_cuda_attention.py tests/_cuda_decode.py tests/_cuda_linear.py` runs all of them."""
    program = shutil.which("compute-sanitizer") or pytest.skip(
        "compute-sanitizer is not on the path: it comes with CUDA's toolkit"
    )
    chosen = "hard_rows or penalties or distribution or by_rows or two_halves or stay or strides or cluster or sinks or fused"
    tests = [sys.executable, "-m", "pytest", BITS, ATTENTION, DECODE, LINEAR, *ON_A_GPU, "-k", chosen]
    command = [program, "--tool", tool, "--error-exitcode", "9", *tests]
    done = run(*command, check=False, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.gpu
def test_the_library_opens_and_info_says_so():
    used, why = info.cuda_library()
    assert used, why
