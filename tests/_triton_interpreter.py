"""Every Triton kernel in Triton's interpreter, on CPU tensors, against the suites that the CPU kernels meet.

tests/test_triton.py runs this file in a process of its own: `TRITON_INTERPRET=1 pytest tests/_triton_interpreter.py`,
since Triton decides at import whether it interprets.
"""

import _oracle
import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from fastllm.bench.cases import suites
from fastllm.ops import kv_cache
from fastllm.ops._op import OPS, Kernel

# ------------------------------------------------------------------------------------------ bfloat16 in the interpreter
# The interpreter keeps bfloat16 as uint16 and computes on those integers: a sum adds bit patterns, and the conversion
# from fp32 truncates. Here every operation on it widens to fp32, computes, and rounds to nearest even, as a GPU does.


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float32)
    u = values.view(np.uint32)
    rounded = (u + np.uint32(0x7FFF) + (u >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def repair_bfloat16() -> None:
    builder, handle, bf16 = interpreter.InterpreterBuilder, interpreter.TensorHandle, tl.bfloat16
    convert = interpreter._convert_float

    def convert_float(data, source, target, rounding):
        if source == bf16 and target == tl.float32:
            return widen(data).view(np.uint32).reshape(data.shape)
        if source == tl.float32 and target == bf16:
            return narrow(data.view(np.float32)).reshape(data.shape)
        return convert(data, source, target, rounding)

    def is_bf16(h) -> bool:
        return isinstance(h, handle) and h.dtype.scalar == bf16 and h.data.dtype == np.uint16

    def repaired(name: str):
        original = getattr(builder, name)

        def operation(self, *operands):
            if not any(map(is_bf16, operands)) or (name == "binary_op" and "bitwise" in operands[-1].__name__):
                return original(self, *operands)
            out = original(self, *(handle(widen(h.data), tl.float32) if is_bf16(h) else h for h in operands))
            return out if out.data.dtype != np.float32 or name == "create_dot" else handle(narrow(out.data), bf16)

        return operation

    interpreter._convert_float = convert_float
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_dot"):
        setattr(builder, name, repaired(name))


def repair_conditions() -> None:
    """A scalar condition that meets a block keeps its type; the interpreter makes it an integer, which no mask may be."""
    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self, block, scalar):
        is_condition = scalar.data.dtype == np.bool_
        return interpreter.TensorHandle(np.full(block.shape, scalar.data), tl.int1) if is_condition else splat(self, block, scalar)

    interpreter.InterpreterBuilder.create_splat = create_splat


repair_bfloat16()
repair_conditions()

# ------------------------------------------------------------------------------------------------------------- the
# suites

called: set[str] = set()


def interpreted(op) -> Kernel:
    def launch(*args, **options):
        called.add(op.name)
        return op.triton(*args, **options)

    return Kernel(launch, "Triton", "interpreter")


@pytest.fixture(autouse=True, scope="module")
def triton_on_cpu():
    for op in OPS.values():
        if op.triton:
            op._kernels["cpu"] = interpreted(op)
    kv_cache.COLUMNS.clear()  # CPU tensors stand in for a GPU's: their pages lie as there


def small(case) -> bool:
    """Left out: cases that are large for the sake of the CPU's caches."""
    inputs = case.inputs(_oracle.Make("meta"))
    return sum(t.numel() for t in inputs.values() if torch.is_tensor(t)) < 2**18


TABLE = [
    pytest.param(suite, case, dtype, id=f"{name} {case.label} {str(dtype).removeprefix('torch.')}")
    for name, suite in suites().items()
    if OPS[name].triton
    for case in suite.correct
    for dtype in suite.dtypes
    if small(case)
]


@pytest.mark.parametrize(("suite", "case", "dtype"), TABLE)
def test_forward_and_gradients(suite, case, dtype):
    _oracle.check_forward_and_gradients(suite, case, dtype)


@pytest.mark.parametrize(("suite", "case", "dtype"), [p for p in TABLE if p.values[2] == torch.bfloat16])
def test_writes_only_its_outputs(suite, case, dtype):
    _oracle.check_guards(suite, case, dtype)


def test_every_triton_kernel_ran():
    assert called == {op.name for op in OPS.values() if op.triton}


def test_bfloat16_equals_torch():
    """The repair itself, against torch's conversions."""
    wide = torch.cat((torch.randn(1000) * 10.0 ** torch.randint(-40, 38, (1000,)), torch.tensor([0.0, -0.0])))
    bits = torch.from_numpy(narrow(wide.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(bits, wide.bfloat16())
    assert torch.equal(torch.from_numpy(widen(narrow(wide.numpy()))), wide.bfloat16().float())
    assert np.isnan(widen(narrow(np.array([np.nan, np.inf], np.float32)))).tolist() == [True, False]
