"""What every op shares: its registration, its choice of a kernel, and its three ways in.

An op file states its schema, reference, kernels, fake, and (where it trains) what is saved and its backward; `Op` does
the rest. A call takes the cheapest way that is right:

- eager, no gradient: straight to the kernel;
- eager with gradient: an `autograd.Function` around the same kernel;
- under compile, export, fake tensors, functorch or a dispatch mode: the registered op (`torch.ops.fastllm.<name>`),
  inside an `autograd.Function` where a gradient is asked for. No autograd kernel is registered on it: that would cost
  every call, compiled ones too, some 15 us. Where functorch differentiates within a compiled function the graph breaks,
  and the call runs as it would without compile: a graph knows no derivative of the registered op there.
"""

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common.h: DType

_library = torch.library.Library("fastllm", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state
_is_traced_by_dynamo = torch.compiler.is_dynamo_compiling
# asked once: Dynamo of torch 2.6 cannot trace the question
_autocast_devices = [d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d)]


@dataclass(frozen=True)
class Kernel:
    """What runs an op on one kind of device, and why.

    A launcher may have an argument `train=False` and leave out, when it is False, what only the backward reads (None in
    its place): `infer` is the launcher as it is, for calls that want no gradient, and `run` has train=True.
    """

    infer: Callable[..., Any]
    name: str  # "C++ (avx512)", "Triton", "reference"
    reason: str
    run: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        train = "train" in arguments(self.infer)
        object.__setattr__(self, "run", functools.partial(self.infer, train=True) if train else self.infer)


def without_autocast(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The function, its products by torch in the dtypes that it names: under autocast they would be in autocast's."""
    if device not in _autocast_devices:
        return function

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        if not torch.is_autocast_enabled(device):
            return function(*args, **options)
        with torch.autocast(device, enabled=False):
            return function(*args, **options)

    return run


def is_plain(tensor: Tensor) -> bool:
    """An ordinary tensor that may be asked for its value: no compile, functorch, dispatch mode or trace looks on."""
    return (
        type(tensor) in _PLAIN
        and not _is_compiling()
        and not _dispatch_modes()
        and _functorch_level() is None
        and _tracing_state() is None
    )


def _differentiates() -> bool:
    """Whether functorch differentiates here (grad, vjp, jacrev, jvp), at any level. If so, `_outside` is there to be called."""
    kinds = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    found = any(level.key() in kinds for level in torch._C._functorch.get_interpreter_stack() or ())
    if found and _outside is None:
        _make_outside()
    return found


# Dynamo calls it while it traces: it guards the stack of transforms, and cannot compare what is on it. This is all that
# torch.compiler.assume_constant_result does, but for an import of torch._dynamo, which takes longer than torch's own.
_differentiates._dynamo_marked_constant = True
_outside: Callable[..., Any] | None = None  # calls an op from compiled code, and is never part of a graph


def _make_outside() -> None:
    """Not before Dynamo traces, for the same import's sake."""
    global _outside
    why = "torch.func cannot differentiate a kernel of fastllm within a graph; compile without fullgraph=True"
    reason = {"reason": why} if "reason" in arguments(torch.compiler.disable) else {}  # from torch 2.7 on
    _outside = torch.compiler.disable(lambda op, *args: op(*args), **reason)


@functools.cache
def forced_backend() -> str | None:
    """FASTLLM_BACKEND=reference makes every op run its PyTorch reference (the oracle)."""
    backend = os.environ.get("FASTLLM_BACKEND")
    if backend not in (None, "", "reference"):
        raise ValueError(f"FASTLLM_BACKEND={backend!r}: the only value is 'reference'; unset it to use the kernels")
    return backend or None


def check_isa() -> None:
    """FASTLLM_ISA lowers the instruction set; a wish that this processor cannot grant is an error, at import."""
    wish = os.environ.get("FASTLLM_ISA")
    if wish and _C.isa() != wish:
        raise ValueError(f"FASTLLM_ISA={wish!r}: this processor runs {', '.join(_C.isas())}; unset it to use the best")


check_isa()
OPS: dict[str, "Op"] = {}


@dataclass(eq=False)
class Op:
    """One registered op.

    schema: torch schema without the namespace, "rms_norm(Tensor x, ...) -> (Tensor, Tensor)".
    reference: plain PyTorch with the raw op's arguments and results, differentiable; shares no helper with the kernels.
    cpu, triton: launchers with the same arguments, for validated input; None where there is no such kernel.
        A launcher may have one more, `train=False`: see Kernel.
    triton_name, triton_reason: what `fastllm info` says of the GPU's kernel, where its launcher hands calls to a library.
    no_triton: what it says where there is none: what runs in its place, or why a GPU never asks.
    cuda: a launcher of CUDA C++, in the place of Triton's where _cuda.py says so; cuda_name: what `fastllm info` calls it.
    fake: shapes and dtypes of the results.
    save(ctx, inputs, output), backward(ctx, *gradients): as in torch.autograd.Function; None for an op without its own
        backward: asked for a gradient it runs its reference, and `fastllm info` says so.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    cpu: Callable[..., Any] | None = None
    triton: Callable[..., Any] | None = None
    triton_name: str = "Triton"
    triton_reason: str = "the GPU kernel of this op"
    no_triton: str = "no GPU kernel yet"
    cuda: Callable[..., Any] | None = None
    cuda_name: str = "CUDA C++"
    save: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        self.name = self.schema.split("(")[0]
        _library.define(self.schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        self.raw = getattr(torch.ops.fastllm, self.name).default
        for device in ("CPU", "CUDA"):
            _library.impl(self.name, self._run, device)
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")  # every other device: the reference
        torch.library.register_fake(f"fastllm::{self.name}", self.fake, lib=_library)
        kinds = [str(a.type) for a in self.raw._schema.arguments]
        self._tensors = [i for i, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")]
        self._lists = [i for i, kind in enumerate(kinds) if kind.startswith("List") and "Tensor" in kind]
        self._kernels: dict[str, Kernel] = {}
        self._eager, self._traced = self._functions() if self.backward else (None, None)
        OPS[self.name] = self

    def kernel(self, device: str) -> Kernel:
        """The kernel for a device type, chosen once."""
        if device not in self._kernels:
            self._kernels[device] = self._choose(device)
        return self._kernels[device]

    def _choose(self, device: str) -> Kernel:
        if forced_backend():
            return self._reference(device, "FASTLLM_BACKEND=reference")
        if device == "cpu":
            if self.cpu:
                wish = os.environ.get("FASTLLM_ISA")
                why = f"FASTLLM_ISA={wish}" if wish else "best tier of this processor"
                return Kernel(self.cpu, f"C++ ({_C.isa()})", f"{why}, {_C.max_threads()} threads")
            return self._reference(device, "no CPU kernel")
        if device == "cuda":
            return self._choose_gpu()
        warnings.warn(
            f"fastllm.{self.name}: no kernel for device {device!r}, running the PyTorch reference", stacklevel=5
        )
        return self._reference(device, f"no kernel for device {device!r}")

    def _reference(self, device: str, reason: str) -> Kernel:
        return Kernel(without_autocast(self.reference, device), "reference", reason)

    def _choose_gpu(self) -> Kernel:
        from . import _cuda, _triton

        if not self.triton:
            return self._reference("cuda", self.no_triton)
        if not _triton.available():
            return self._reference("cuda", _triton.unavailable_reason())
        if not self.cuda:
            return self.gpu_kernel(False, self.triton_reason)
        if self.name not in _cuda.wanted():
            other = f"{_cuda.VARIABLE}={self.name} runs CUDA C++ in its place"
            return self.gpu_kernel(False, f"{self.triton_reason}; {other}")
        wish = f"{_cuda.VARIABLE} names it" if _cuda.asked() else "the faster of its two kernels"
        used, why = _cuda.library()
        if used:
            return self.gpu_kernel(True, wish)
        reason = f"{wish}, but the CUDA library is not used: {why}"
        if _cuda.asked():
            warnings.warn(f"fastllm.{self.name}: {reason}; Triton runs it", stacklevel=6)
        return self.gpu_kernel(False, reason if _cuda.asked() else f"{self.triton_reason}; CUDA C++ is not used: {why}")

    def gpu_kernel(self, cuda: bool, reason: str) -> Kernel:
        """The one in CUDA C++, or Triton's."""
        from . import _triton

        launcher, name = (self.cuda, self.cuda_name) if cuda else (self.triton, self.triton_name)
        return Kernel(without_autocast(_triton.on_device(launcher), "cuda"), name, reason)

    @contextlib.contextmanager
    def using(self, device: str, kernel: Kernel) -> Iterator[None]:
        """Another kernel on a device for a while: what a benchmark compares."""
        chosen = self.kernel(device)
        self._kernels[device] = kernel
        try:
            yield
        finally:
            self._kernels[device] = chosen

    def _flat(self, args: tuple) -> list:
        return [args[i] for i in self._tensors] + [t for i in self._lists for t in args[i]]

    def _run(self, *args: Any) -> Any:
        device = next(t for t in self._flat(args) if t is not None).device.type
        return self.kernel(device).run(*args)

    def __call__(self, *args: Any) -> Any:
        values, positions = args, self._tensors
        if self._lists:
            values = self._flat(args)
            positions = range(len(values))
        plain, grad, first, device, ask = True, False, None, None, _grad_enabled()
        for i in positions:
            t = values[i]
            if t is not None:
                if first is None:
                    first, device = t, t.device
                elif t.device != device:
                    raise ValueError(self._apart(args))
                if type(t) not in _PLAIN:
                    plain = False
                if ask and t.requires_grad:
                    grad = True
        if forward_ad._current_level >= 0:  # within dual_level or torch.func.jvp alone
            self._refuse_tangents(values)
        if grad and self.backward is None:
            return without_autocast(self.reference, device.type)(*args)
        if (
            plain
            and not _is_compiling()
            and not _dispatch_modes()
            and _functorch_level() is None
            and _tracing_state() is None
        ):
            if grad:
                return self._eager.apply(*args)
            kind = "cpu" if first.is_cpu else device.type
            return (self._kernels.get(kind) or self.kernel(kind)).infer(*args)
        if _is_traced_by_dynamo() and _differentiates():
            return _outside(self, *args)
        if self._traced is not None and (grad or (not _is_compiling() and _functorch_level() is not None)):
            return self._traced.apply(*args)
        return self.raw(*args)

    def _refuse_tangents(self, values: Sequence[Any]) -> None:
        """A kernel would leave them out in silence."""
        given = [t for t in values if isinstance(t, Tensor) and t.is_floating_point()]
        if any(forward_ad.unpack_dual(t).tangent is not None for t in given):
            raise NotImplementedError(
                f"{self.name}: an input has a tangent, and there is no forward-mode derivative; use torch.autograd.grad"
            )

    def _apart(self, args: tuple) -> str:
        """Which tensors are not where the first one is."""
        names = [a.name for a in self.raw._schema.arguments]
        named = [(names[i], t) for i in self._tensors for t in (args[i],) if t is not None]
        named += [(f"{names[i]}[{n}]", t) for i in self._lists for n, t in enumerate(args[i])]
        (first, one), *others = named
        name, t = next((name, t) for name, t in others if t.device != one.device)
        return f"{self.name}: {name} is on {t.device}, {first} on {one.device}; move one with .to(device)"

    def _functions(self) -> tuple[type, type]:
        # plain functions in the closures: Dynamo traces into Traced and cannot wrap an Op
        run, raw, save, derivative = self._run, self.raw, self.save, _refusing(self.backward, _once(self.name))
        name = self.name

        class Eager(torch.autograd.Function):  # one forward with ctx: half the host time of the setup_context style
            @staticmethod
            def forward(ctx, *args):
                output = run(*args)
                save(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx, *gradients):
                try:
                    return derivative(ctx, *gradients)
                except RuntimeError:
                    _refuse_batched(name, gradients)
                    raise

        class Traced(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(*args):
                return raw(*args)

            @staticmethod
            def setup_context(ctx, inputs, output):
                save(ctx, inputs, output)

            @staticmethod
            def backward(ctx, *gradients):
                return derivative(ctx, *gradients)

        Eager.__name__, Traced.__name__ = f"{self.name}_eager", f"{self.name}_traced"
        return Eager, Traced


def _refuse_batched(name: str, gradients: Sequence[Tensor | None]) -> None:
    """Says why a backward failed where it was given many gradients at once, by torch's older vmap, which has no memory to read
    and which nothing tells of beforehand."""
    batched = torch._C._functorch.is_legacy_batchedtensor
    if any(g is not None and batched(g) for g in gradients):
        raise NotImplementedError(
            f"{name}: a batch of gradients (is_grads_batched=True, jacobian(vectorize=True)) is not supported; use "
            "torch.func.jacrev, or torch.func.vmap over torch.func.vjp"
        )


def _refusing(derivative: Callable[..., Any], once: type) -> Callable[..., Any]:
    """A backward whose gradients, where a graph of them is asked for, hang on all that it read and refuse to be
    differentiated. torch's once_differentiable would not do: its refusal hangs on no input, and torch.autograd.grad, which
    walks to the inputs it is given alone, never meets it and leaves the part out in silence."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        # Dynamo knows no Function within a backward, and what it compiles refuses by itself
        if not _grad_enabled() or _is_compiling():
            return derivative(ctx, *gradients)
        with torch.no_grad():
            found = derivative(ctx, *gradients)
        given = [g for g in found if g is not None]
        read = [t for t in (*gradients, *ctx.saved_tensors) if t is not None]
        marked = iter(once.apply(len(given), *given, *read))
        return tuple(None if g is None else next(marked) for g in found)

    return backward


def _once(name: str) -> type:
    """Gradients as they are, which refuse to be differentiated, by what was saved for them too: of a row's rstd or a loss a
    backward knows the number alone, and would leave out in silence what it depends on."""

    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(count, *tensors):
            return tuple(g.view_as(g) for g in tensors[:count])

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *gradients):
            raise RuntimeError(
                f"{name}: a second derivative was asked for, and there is none; use plain PyTorch in its place"
            )

    Once.__name__ = f"{name}_gradients"
    return Once


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors will be differentiated: what a public op asks that trains another way."""
    return _grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# --------------------------------------------------------------------------------------------------------- validation


def check(condition: bool, message: Callable[[], str], error: type[Exception] = ValueError) -> None:
    """Raises `error` with the message unless the condition holds; the message is built only then."""
    if not condition:
        raise error(message())


def check_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...] = tuple(DTYPES)) -> None:
    if getattr(tensor, "dtype", None) not in allowed:
        _check_tensor(op, name, tensor)
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(
            f"{op}: {name} is {str(tensor.dtype).removeprefix('torch.')}, allowed: {names}; convert it with .to(dtype)"
        )


def _check_tensor(op: str, name: str, value: Any) -> None:
    """Of an array the dtype alone would be told, which may be an allowed one."""
    check(
        isinstance(value, Tensor),
        lambda: (
            f"{op}: {name} is a {type(value).__name__}, and must be a torch.Tensor; make it one with torch.as_tensor"
        ),
        TypeError,
    )


def check_like(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device."""
    if getattr(tensor, "dtype", None) != other.dtype:
        _check_tensor(op, name, tensor)
        raise TypeError(f"{op}: {name} is {tensor.dtype}, {other_name} is {other.dtype}; they must agree")
    if tensor.device != other.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, {other_name} on {other.device}; move one with .to(device)"
        )


# ------------------------------------------------------------------------------------------------------ for launchers


def as_rows(x: Tensor) -> Tensor:
    """[..., n] as [rows, n] with unit stride in n: a view where the strides allow it, else a copy."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)
    # a compiled backward may not ask for strides (torch 2.6), and what it calls does
    return x if _is_compiling() or x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def row_stride(x: Tensor) -> tuple[Tensor, int]:
    """The same for a launcher that counts rows itself: (what to point at, elements from row to row). A contiguous
    tensor needs no view, and a view costs a microsecond."""
    if x.is_contiguous():
        return x, x.shape[-1]
    x = as_rows(x)
    return x, x.stride(0)


def empty_like(x: Tensor) -> Tensor:
    """Contiguous and uninitialised, with the shape, dtype and device of x."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def arguments(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)
