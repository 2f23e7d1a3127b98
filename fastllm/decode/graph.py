"""Capture and replay of a decode step: one `capture(step, device)` for every device.

On a CPU a capture is our own plan: while `step` runs once, each kernel's entry stores its function and its arguments;
replay walks the list in one parallel region without entering Python. A capture is right only if the kernels are all
that the step does, so any compute op that is not ours is refused, also inside our launchers (a hidden copy would not be
replayed).

On a GPU it is a CUDA graph, of every kernel whoever wrote it; none may write a weight that another one reads, and where tokens
stand is written at its end alone. The step runs once before, which compiles and loads its kernels, and then is recorded without
running.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _C
from ..ops import _cuda
from ..ops._op import OPS

_ALLOCATES = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}


class _Recorder(TorchDispatchMode):
    """Keeps all that a step allocates, so that the pointers in the records stay valid, and refuses foreign compute."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True, torch's default, imports all of torch._dynamo: seconds and 45 MB. Nothing compiles in here

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastllm":
            with self:  # the launcher's own torch calls are looked at too
                output = OPS[func._schema.name.split("::")[1]]._run(*args)
            self.kept.append((args, output))
            return output
        returns = func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if is_view or func._schema.name in _ALLOCATES:
            output = func(*args, **(kwargs or {}))
            if not is_view or _is_view_of(output, args[0]):
                self.kept.append(output)
                return output
        raise RuntimeError(
            f"{func} cannot be captured: a replayed step runs fastllm's kernels only. Move it out of the step, or make "
            "its operands contiguous if it is a copy"
        )


def _is_view_of(output: Any, base: Tensor) -> bool:
    """`contiguous`, `to` and `reshape` call themselves views also where they copy."""
    views = output if isinstance(output, (list, tuple)) else (output,)
    return all(v.untyped_storage().data_ptr() == base.untyped_storage().data_ptr() for v in views)


class Captured:
    """A recorded step: `outputs` is what it returned, overwritten by every `replay`."""

    def __init__(self, plan: "_C.Plan", kept: list[Any], outputs: Any):
        self._plan, self._kept, self.outputs = plan, kept, outputs

    def replay(self, threads: int = 0) -> int:
        """Runs the step again with what its inputs hold now. Returns a kernel status (0: fine); threads 0: all."""
        return self._plan.replay(threads)

    def fetch(self, count: int) -> Callable[[], list[list[Any]]]:
        """What gives the first `count` outputs in Python, also when the step has been replayed again."""
        numbers = [output.tolist() for output in self.outputs[:count]]
        return lambda: numbers

    def __len__(self) -> int:
        """How many kernels the step runs."""
        return len(self._plan)

    def kernels(self) -> list[str]:
        return self._plan.kernels()


class CapturedGraph:
    """The same on a GPU; `replay` returns before the device is done, and finds no fault."""

    def __init__(self, graph: "torch.cuda.CUDAGraph", outputs: Any):
        self._graph, self.outputs = graph, outputs
        self._on_host: tuple[list[Tensor], list[Tensor]] = [], []  # pinned; taken in turns

    def replay(self, threads: int = 0) -> int:
        self._graph.replay()
        return 0

    def fetch(self, count: int) -> Callable[[], list[list[Any]]]:
        """Copies are launched behind the replay, and what is returned waits for them. Two replays may be under way."""
        self._on_host = self._on_host[::-1]
        hosts, outputs = self._on_host[0], self.outputs[:count]
        if not hosts:
            hosts += [torch.empty(output.shape, dtype=output.dtype, pin_memory=True) for output in outputs]
        for host, output in zip(hosts, outputs, strict=True):
            host.copy_(output, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(outputs[0].device))

        def numbers() -> list[list[Any]]:
            copied.synchronize()
            return [host.tolist() for host in hosts]

        return numbers


def capture(
    step: Callable[[], Any], device: torch.device | str = "cpu", pool: tuple[int, int] | None = None
) -> Captured | CapturedGraph:
    """Runs `step` once and records its kernels. What changes from step to step must lie in tensors that stay; the outputs
    are tensors. pool: of a GPU's memory (torch.cuda.graph_pool_handle), shared by graphs of which one runs at a time.

    On a CPU RuntimeError when the step computes anything with other than fastllm's ops; on a GPU when it waits for the device.
    """
    if torch.device(device).type == "cuda":
        return _capture_graph(step, pool)
    plan, recorder = _C.Plan(), _Recorder()
    with torch.no_grad(), recorder:
        plan.begin()
        try:
            outputs = step()
        finally:
            plan.end()
    return Captured(plan, recorder.kept, outputs)


def _capture_graph(step: Callable[[], Any], pool: tuple[int, int] | None) -> CapturedGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        results = step()
        # other threads may go on with theirs
        with _cuda.weights_rest(), torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            outputs = step()
        for output, result in zip(outputs, results, strict=True):
            output.copy_(result)
    return CapturedGraph(graph, outputs)
