"""One row of a benchmark: a case of a suite in one dtype and one direction, ours beside its rivals and the ceiling."""

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import _C
from ..ops import _cuda
from ..ops._op import OPS, Op
from ..ops.attention import cudnn
from .case import Case, Make, Suite, as_tuple
from .ceiling import Ceiling, ceilings
from .harness import Settings, copies_of, cpu_sampler, cuda_sampler, interleave, peak_memory
from .load import other_load
from .peers import peers_of

OURS = "fastllm"
FORWARD, TRAIN = "forward", "forward+backward"
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    suite: Suite
    case: Case
    dtype: torch.dtype
    direction: str
    device: str = "cpu"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        return f"{self.suite.op} {self.case.label} {self.dtype_name} {self.direction}"

    def arguments(self) -> tuple:
        """(inputs,) for a forward; (inputs, names of the leaves, upstream gradients) for forward + backward."""
        seed = zlib.crc32(f"{self.suite.op} {self.case.label}".encode())
        inputs = self.case.inputs(Make(self.device, self.dtype, seed))
        if self.direction == FORWARD:
            return (inputs,)
        names = [n for n in self.suite.gradients if inputs.get(n) is not None]
        for name in names:
            inputs[name].requires_grad_()
        with torch.no_grad():
            outputs = as_tuple(self.suite.run(**inputs))
        return inputs, names, [torch.randn_like(o) for o in outputs if o.is_floating_point()]

    def call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of arguments()."""
        if self.direction == FORWARD:

            def forward(inputs):
                with torch.no_grad():
                    return function(**inputs)

            return forward

        def forward_and_backward(inputs, names, upstream):
            outputs = [o for o in as_tuple(function(**inputs)) if o.is_floating_point()]
            return torch.autograd.grad(outputs, [inputs[n] for n in names], upstream)

        return forward_and_backward

    def cost(self) -> tuple[int, int]:
        """(bytes, flops)"""
        size, case = self.dtype.itemsize, self.case
        total, flops = case.bytes(size), case.flops
        if self.direction == TRAIN:
            total, flops = total + case.backward_bytes(size), flops + case.backward_flops
        return total, flops


def functions(job: Job, compiled: bool) -> Iterator[tuple[str, Callable[..., Any] | str]]:
    """(name, a function of the job's arguments), or (name, why there is none), of ours and all its rivals."""
    suite, device = job.suite, job.device
    yield OURS, job.call(suite.run)
    for name, context in other_kernels(suite, device):
        yield name, context if isinstance(context, str) else within(context, job.call(suite.run))
    if job.case.plain:
        yield "torch", job.call(suite.reference)
    if job.case.plain and compiled:
        torch.compiler.reset()
        yield "compile", job.call(torch.compile(suite.reference, dynamic=False))
    for name, function in (*suite.peers.items(), *peers_of(suite.op, device)):
        yield name, function if isinstance(function, str) else job.call(function)


def within(context: Callable[[], Any], call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments):
        with context():
            return call(*arguments)

    return run


def other_kernels(suite: Suite, device: str) -> Iterator[tuple[str, Callable[[], Any] | str]]:
    """(name, a context in which it runs), or (name, why it cannot), of an op's kernels for a GPU that are not chosen: what
    decides between them."""
    op = OPS.get(suite.op)
    if device != "cuda" or op is None:
        return
    triton = op.triton_name
    if suite.op == "attention":
        yield "Triton", lambda: without_cudnn(op, device)
        triton = "cuDNN"  # which its launcher calls
    if op.cuda is None:
        return
    cuda = op.kernel(device).name != op.cuda_name
    used, why = _cuda.library()
    if cuda and not used:
        yield "CUDA C++", f"not here: {why}"
        return
    yield "CUDA C++" if cuda else triton, lambda: switched(op, device, cuda)


@contextlib.contextmanager
def switched(op: Op, device: str, cuda: bool) -> Iterator[None]:
    """An op, and its backward, in CUDA C++ or in Triton."""
    with contextlib.ExitStack() as stack:
        for one in (op, OPS.get(f"{op.name}_backward")):
            if one is not None and one.cuda is not None:
                stack.enter_context(one.using(device, one.gpu_kernel(cuda, "beside the chosen one")))
        yield


@contextlib.contextmanager
def without_cudnn(op: Op, device: str) -> Iterator[None]:
    with switched(op, device, cuda=False), cudnn.switched_off():
        yield


def measure(job: Job, settings: Settings, compiled: bool) -> Row:
    """The row of a job. A rival that cannot run is left out and named in the row's notes."""
    arguments = job.arguments()
    copies, cache = copies_of(arguments, job.suite.copy)
    sampler = cpu_sampler if job.device == "cpu" else cuda_sampler
    rivals, memory, notes = {}, {}, []
    for name, call in functions(job, compiled):
        if isinstance(call, str):
            notes.append(f"{name} is {call}")
            continue
        try:
            for _ in range(2):
                call(*arguments)
            memory[name] = peak_memory(lambda call=call: call(*arguments), job.device)
        except Exception as error:
            if name == OURS:
                raise
            reason = str(error).strip().splitlines() or [""]
            notes.append(f"{name} does not run here: {type(error).__name__}: {reason[0][:160]}")
            continue
        rivals[name] = sampler(call, copies)

    total, flops = job.cost()
    bandwidth, arithmetic = ceilings(job.device, job.dtype, job.suite.peak)
    bound = bound_by(total, flops, bandwidth, arithmetic)
    yardstick = {"memory": bandwidth, "compute": arithmetic}.get(bound)
    if yardstick:
        rivals["ceiling"] = sampler(yardstick.run, [()])
    measured = interleave(rivals, settings, other_load() if job.device == "cpu" else None)

    stats = dict(measured.stats)
    top = yardstick and yardstick.rate(stats.pop("ceiling").fast)
    if yardstick and measured.busy:
        top = max(top, capacity(yardstick))
    work = {"memory": total, "compute": flops}.get(bound, 0)
    ours = stats[OURS].median
    kernel = OPS[job.suite.op].kernel(job.device).name if job.suite.op in OPS else None
    return {
        "op": job.suite.op,
        "case": job.case.label,
        "dtype": job.dtype_name,
        "direction": job.direction,
        "device": job.device,
        "kernel": kernel,
        "bytes": total,
        "flops": flops,
        "bound": bound,
        "unit": yardstick.unit if yardstick else None,
        "arithmetic": arithmetic.name,
        "ceiling_name": yardstick and yardstick.name,
        "ceiling": top,
        "fraction": work / ours / 1e9 / top if top else None,
        "cache": cache,
        "rivals": {
            name: {**dataclasses.asdict(s), "rate": work / s.median / 1e9 or None, "memory_bytes": memory[name]}
            for name, s in stats.items()
        },
        "ratios": {name: s.median / ours for name, s in stats.items() if name != OURS},
        "discarded": measured.discarded,
        "busy": measured.busy,
        "notes": notes,
    }


@functools.cache
def capacity(ceiling: Ceiling) -> float:
    """The rate at its best, also where the team is never whole because others hold a core: then one thread's, reading
    alone or counting for each of the team's in arithmetic."""
    whole = ceiling.best()
    previous = _C.set_thread_limit(1)
    try:
        alone = ceiling.best()
    finally:
        _C.set_thread_limit(previous)
    return whole if 2 * whole > alone else alone


def bound_by(total: int, flops: int, bandwidth: Ceiling, arithmetic: Ceiling) -> str | None:
    """Which ceiling a call meets first: "memory", "compute", or None where the case states no cost."""
    if not total and not flops:
        return None
    return "memory" if total / capacity(bandwidth) >= flops / capacity(arithmetic) else "compute"


def peaks(device: str, dtypes: list[torch.dtype]) -> dict[str, dict[str, Any]]:
    """The ceilings of this process by name, as a report states them."""
    units = ("fma", "dot") if device == "cpu" else ("fma",)
    found = [c for dtype in dtypes for unit in units for c in ceilings(device, dtype, unit)]
    return {c.name: {"rate": capacity(c), "unit": c.unit} for c in found}
