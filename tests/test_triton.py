"""Triton without a GPU: every kernel runs in the interpreter, and is compiled ahead of time for sm_80 and sm_90 (slow: sm_89
and sm_100).

What to compile is not kept by hand: the launchers run on meta tensors over the benchmark cases, and each launch that
they would make is noted with its argument types, constants and warps.
"""

import contextlib
import functools
import gc
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import _registers
import pytest
import torch

from fastllm.bench.case import Make, as_tuple
from fastllm.bench.cases import suites
from fastllm.ops import _lora_gpu, _triton
from fastllm.ops._op import OPS, Kernel

if reason := _triton.load():
    pytest.skip(reason, allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HERE = Path(__file__).parent
NVIDIA = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64", "bool": "i1", "uint8": "u8"}
TYPES |= {f"int{n}": f"i{n}" for n in (8, 16, 32, 64)}


@pytest.mark.parametrize(
    ("file", "which"),
    [
        ("_triton_interpreter.py", "not slow"),
        ("_triton_bits.py", "not slow"),
        pytest.param("_triton_interpreter.py", "slow", marks=pytest.mark.slow),
    ],
)
def test_interpreter(file, which):
    """See there."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / file), "-m", which]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_triton_takes_every_kernel_that_was_kept_for_it():
    gc.collect()
    kept = (_triton.Source, _triton.Constant)
    assert not [thing for thing in gc.get_objects() if isinstance(thing, kept)]


def test_a_launcher_goes_to_the_device_of_its_tensors(monkeypatch):
    """Wherever among its arguments they are: adamw and grad_norm take lists alone."""
    went = []

    @contextlib.contextmanager
    def device(where):
        went.append(where)
        yield

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", device)
    launch, x = _triton.on_device(lambda *args: len(args)), torch.empty(3, device="meta")
    assert [launch(None, x), launch([x, x], 1), launch([], None, (x,), 2.0)] == [2, 2, 4]
    assert went == [x.device] * 3


class Launch(NamedTuple):
    """What decides how a kernel is compiled."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]  # arguments known to be multiples of 16
    options: tuple[tuple[str, object], ...]


def launches(monkeypatch, gpu_alone: bool = False) -> tuple[dict[Launch, object], set[str]]:
    """Every launch of the benchmark cases, forward and backward, as Triton would specialise it; and the ops that ran.
    gpu_alone: of cases of a GPU's size, in 16 bits."""
    found: dict[tuple, tuple[Launch, object]] = {}
    ran: set[str] = set()
    within: list[str] = []

    def watched(op):
        @functools.wraps(op.triton)
        def launch(*args, **options):
            within.append(op.name)
            try:
                return op.triton(*args, **options)
            finally:
                within.pop()

        return launch

    def note(kernel, *args, grid, warmup, **named):
        parameters = inspect.signature(kernel.fn).parameters
        options = {k: named.pop(k) for k in list(named) if k not in parameters}
        signature, constants, aligned = {}, {}, []
        for i, (name, value) in enumerate(inspect.signature(kernel.fn).bind(*args, **named).arguments.items()):
            constant = "constexpr" in str(parameters[name].annotation)
            special = not kernel.params[list(parameters).index(name)].do_not_specialize
            if hasattr(value, "block_shape"):
                block = ",".join(map(str, value.block_shape))
                signature[name] = f"tensordesc<{TYPES[str(value.base.dtype).removeprefix('torch.')]}[{block}]>"
            elif torch.is_tensor(value):
                signature[name] = "*" + TYPES[str(value.dtype).removeprefix("torch.")]
                aligned.append(i)
            elif constant or value is None or (special and type(value) is int and value == 1):  # folds ones in
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if special and value % 16 == 0:
                    aligned.append(i)
        launch = Launch(
            f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}",
            tuple(signature.items()),
            tuple(constants.items()),
            tuple(aligned),
            tuple(sorted(options.items())),
        )
        # Integers that are 1 or multiples of 16 are compiled in too; the first launch of a kernel stands for the others.
        pointers = tuple(t for _, t in launch.signature if t.startswith("*"))
        named = tuple(c for c in launch.constants if c[0].isupper())
        found.setdefault((launch.kernel, pointers, named, launch.options), (launch, kernel))
        ran.update(within)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", note)
    for op in OPS.values():
        if op.triton:
            monkeypatch.setitem(op._kernels, "meta", Kernel(watched(op), "Triton", "noted, not run"))
    for name, suite in suites().items():
        if OPS[name].triton:
            for case in (*(() if gpu_alone else suite.benchmark), *suite.gpu):
                for dtype in (torch.float32, torch.bfloat16):
                    wide = dtype == torch.float32 and case in suite.gpu and len(suite.dtypes) > 1
                    if dtype not in suite.dtypes or wide:  # those of a GPU's size are of 16 bits
                        continue
                    inputs = case.inputs(Make("meta", dtype))
                    with torch.no_grad():  # an op may have a way of its own where nothing asks for a gradient
                        suite.run(**inputs)
                    for g in suite.gradients:
                        if g in inputs:
                            inputs[g] = inputs[g].detach().requires_grad_()
                    outputs = as_tuple(suite.run(**inputs))
                    if any(o.requires_grad for o in outputs):
                        torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])
    return dict(found.values()), ran


@functools.cache
def noted(hopper: bool, gpu_alone: bool = False) -> dict[Launch, object]:
    """hopper: as on a GPU with its copy engine and shared memory."""
    with pytest.MonkeyPatch.context() as patch:
        if hopper:
            spaces = [vars(module) for name, module in sys.modules.items() if name.startswith("fastllm.ops")]
            for space, name in ((s, n) for s in spaces for n in ("has_descriptors", "roomy") if n in s):
                patch.setitem(space, name, lambda device: True)
        found, ran = launches(patch, gpu_alone)
    assert gpu_alone or ran == {op.name for op in OPS.values() if op.triton}, (
        "an op whose benchmark cases launch no kernel"
    )
    return found


def compiled(arch: int, launch: Launch, kernel):
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))


def compiled_for(arch: int, launch: Launch, kernel, folder: Path) -> _registers.Use:
    built = compiled(arch, launch, kernel)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    types = dict.fromkeys(t for _, t in launch.signature if t.startswith("*"))
    constants = (f"{k}={v}" for k, v in launch.constants)
    note = " ".join((f"{built.metadata.num_warps} warps ", *types, *constants))
    used = _registers.of_cubin(NVIDIA / "cuobjdump", cubin)
    return _registers.Use(launch.kernel, f"sm_{arch}", *used, built.metadata.shared, note)


@pytest.mark.parametrize("arch", [80, 90, *(pytest.param(a, marks=pytest.mark.slow) for a in (89, 100))])
def test_compiles_ahead_of_time_with_few_spills(arch, monkeypatch, tmp_path):
    """`pytest -s` prints what each kernel takes."""
    assembler = NVIDIA / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    known = (
        subprocess.run([str(assembler), "--help"], capture_output=True, text=True).stdout if assembler.exists() else ""
    )
    if f"sm_{arch}" not in known:
        pytest.skip(f"Triton {triton.__version__} ships no ptxas that knows sm_{arch}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    launches = noted(hopper=arch in (90, 100))
    _registers.check(compiled_for(arch, launch, kernel, tmp_path) for launch, kernel in launches.items())


# Kernels with a reason to touch less than 4 bytes at once: a way of their own for tensors that do not begin at multiples of 16
# bytes; quants and their scales, which lie as panels.
NARROW = {"adamw.kernel", "grad_norm.kernel", "_quant_gpu.quantise_kernel", "_quant_gpu.linear_kernel"}


@pytest.mark.slow
def test_memory_is_read_and_written_in_wide_words(monkeypatch, tmp_path):
    """At the sizes of a GPU's benchmark. What the compiler cannot see (that 16 neighbours share a mask, that rows begin at
    multiples of 16 bytes) it pays for with an access an element, and nothing else tells."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    found = noted(hopper=True, gpu_alone=True)
    assert {launch.kernel for launch in found} > NARROW - {"grad_norm.kernel"}
    for launch, kernel in found.items():
        accesses = re.findall(r"\b(?:ld|st)\.global\S*\.b(?:8|16)\b", compiled(90, launch, kernel).asm["ptx"])
        assert launch.kernel in NARROW or len(accesses) <= 2, (launch, accesses)


def is_exact(launch: Launch) -> bool:
    """Whether it makes sums of `linear(exact=True)`, or of the adapters that go on in them."""
    name, constants = launch.kernel, dict(launch.constants)
    if name == "_lora_gpu.shrink_kernel":
        return constants["K"] == _lora_gpu.EXACT_K[2]
    return name == "_linear_exact.exact_kernel" or (name == "multi_lora.kernel" and constants["EXACT"])


@pytest.mark.slow
def test_exact_sums_are_made_by_one_kind_of_instruction(monkeypatch, tmp_path):
    """On Hopper, whose two kinds of matrix products add in orders of their own: the same row has the same bits in a tile of any
    size, and in training, which knows one adapter, as in serving, which knows many."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    found = {launch: kernel for launch, kernel in noted(hopper=True, gpu_alone=True).items() if is_exact(launch)}
    assert len({launch.kernel for launch in found}) == 3
    for launch, kernel in found.items():
        ptx = compiled(90, launch, kernel).asm["ptx"]
        assert "wgmma.mma_async" in ptx and "mma.sync" not in ptx, launch
