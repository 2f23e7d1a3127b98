"""What a call costs the host: Python, dispatch, allocation and launch, on inputs too small to count.

    python benchmarks/launch.py --device cuda              # every op
    python benchmarks/launch.py rms_norm layer_norm

A GPU works off what is queued while the host goes on; the time is the host's, the device is waited for between samples. The
goal: a norm's forward + backward within 40 us on a machine with a GPU.
"""

import argparse
import gc
import statistics
import time

import torch

from fastllm.bench.case import Case, Suite
from fastllm.bench.measure import FORWARD, TRAIN, Job
from fastllm.bench.select import DTYPES, pick_device, pick_ops

CALLS, SAMPLES = 100, 11  # fewer than a GPU queues


def smallest(suite: Suite) -> Case:
    """The case with the least work among those that have some."""
    return min((c for c in suite.correct if c.bytes(4) or c.flops), key=lambda c: (c.bytes(4), c.flops))


def host_seconds(job: Job, device: str) -> float:
    """Median of a call."""
    arguments, call = job.arguments(), job.call(job.suite.run)
    for _ in range(3):
        call(*arguments)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    samples = []
    gc.disable()
    for _ in range(SAMPLES):
        wait()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call(*arguments)
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
    for suite in pick_ops(options.ops):
        case, dtype = smallest(suite), next(d for d in DTYPES.values() if d in suite.dtypes)
        directions = (FORWARD, TRAIN) if suite.gradients else (FORWARD,)
        times = [
            f"{host_seconds(Job(suite, case, dtype, d, options.device), options.device) * 1e6:10.1f}"
            for d in directions
        ]
        print(f"{suite.op:24}{case.label[:34]:36}" + "  ".join(times), flush=True)


if __name__ == "__main__":
    main()
