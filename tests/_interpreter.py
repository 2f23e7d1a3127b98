"""Triton's interpreter as the tests need it: what it computes otherwise than a GPU is repaired, what it does again for nothing is
left out. For the files that run under TRITON_INTERPRET=1."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

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
        if not is_condition:
            return splat(self, block, scalar)
        return interpreter.TensorHandle(np.full(block.shape, scalar.data), tl.int1)

    interpreter.InterpreterBuilder.create_splat = create_splat


def repair_patching() -> None:
    """A kernel's launch puts the interpreter's functions in the place of Triton's; each function that it calls did so again, a
    sixth of the time."""
    patch, scope = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", None)

    def patch_once(fn):
        done = not any(tl.core.is_builtin(language.load) for language in (tl, tl.core))
        return scope() if done else patch(fn)

    if scope is not None:  # else of an older Triton, which keeps no list of what to restore
        interpreter._patch_lang = patch_once


def repair_products() -> None:
    """Sums in the order of k, as a matrix unit's: BLAS orders them by the number of rows, the addresses and the processor, so
    that neither a row alone nor the same call again need have the same bits."""

    def create_dot(self, a, b, sums, *_):
        left, right = (x.data.astype(sums.data.dtype) for x in (a, b))
        chain = np.zeros_like(sums.data)
        for k in range(left.shape[-1]):
            chain += left[..., k, None] * right[..., k, None, :]
        return interpreter.TensorHandle(chain + sums.data, sums.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
