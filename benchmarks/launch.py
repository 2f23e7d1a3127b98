"""What a call costs the host: Python, dispatch, allocation and launch, on inputs too small to count.

    python benchmarks/launch.py --device cuda              # every op
    python benchmarks/launch.py rms_norm layer_norm

A GPU works off what is queued while the host goes on; the time is the host's, the device is waited for between samples. The
goal: a norm's forward + backward within 40 us on a machine with a GPU. The first lines say what that machine takes for less: a
norm that torch has in C++, and a function of autograd in Python that computes nothing.
"""

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fastllm.bench.case import Case, Suite
from fastllm.bench.measure import FORWARD, TRAIN, Job
from fastllm.bench.select import DTYPES, pick_device, pick_ops

CALLS, SAMPLES = 100, 11  # fewer than a GPU queues


def smallest(suite: Suite) -> Case:
    """The case with the least work among those that have some."""
    return min((c for c in suite.correct if c.bytes(4) or c.flops), key=lambda c: (c.bytes(4), c.flops))


class Nothing(torch.autograd.Function):
    """What any kernel of ours with a gradient begins from."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, d):
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def floors(device: str) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Name -> forward, forward + backward."""
    x, weight = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((8, 256), (256,)))
    upstream = torch.randn(8, 256, device=device)

    def both(forward: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def train():
            return torch.autograd.grad([forward(x, weight)], [x, weight], [upstream])

        def infer():
            with torch.no_grad():
                return forward(x, weight)

        return infer, train

    norm = both(lambda x, weight: torch.nn.functional.layer_norm(x, (256,), weight))
    return {"torch.layer_norm": norm, "autograd": both(Nothing.apply)}


def host_seconds(call: Callable[..., Any], device: str) -> float:
    """Median of a call."""
    for _ in range(3):
        call()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    samples = []
    gc.disable()
    for _ in range(SAMPLES):
        wait()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - begin) / CALLS)
    gc.enable()
    wait()
    return statistics.median(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("ops", nargs="*", help="which; all when none is named")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    pick_device(options.device)
    print(f"{'op':24}{'case':36}{'forward':>10}{'+ backward':>12}  us")
    for name, calls in floors(options.device).items():
        show(name, "8x256", [host_seconds(call, options.device) for call in calls])
    for suite in pick_ops(options.ops):
        case, dtype = smallest(suite), next(d for d in DTYPES.values() if d in suite.dtypes)
        directions = (FORWARD, TRAIN) if suite.gradients else (FORWARD,)
        times = []
        for direction in directions:
            job = Job(suite, case, dtype, direction, options.device)
            times.append(host_seconds(functools.partial(job.call(suite.run), *job.arguments()), options.device))
        show(suite.op, case.label[:34], times)


def show(op: str, case: str, times: list[float]) -> None:
    print(f"{op:24}{case:36}" + "  ".join(f"{seconds * 1e6:10.1f}" for seconds in times), flush=True)


if __name__ == "__main__":
    main()
