"""Block sizes of the Triton kernels, compared on a GPU: what the constants in fastllm/ops were chosen by.

    python benchmarks/tune.py                      # every space
    python benchmarks/tune.py attention decode     # some, by name
    python benchmarks/tune.py --list

A space is a case of a suite and variants of it; a variant gives other values to the constants of an op's module while its
kernels are launched. Processes compile all variants first, side by side; then one times them, the L2 cache overwritten
before each call. Beside the constants in use each variant says how much faster it is.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

Patch = dict[tuple[str, str], Any]  # (module of fastllm.ops, constant) -> value
SAMPLES = 9
PLACES = dict.fromkeys(
    ("DENSE", "KEYS", "QUERIES"), ("attention.triton_tile", "ROOMY")
)  # where kernels look for a table
PLACES["DECODE"] = ("attention.triton_paged", "DECODE")


@dataclass(frozen=True)
class Space:
    """case: the beginning of its label. backward: time forward and backward."""

    name: str
    op: str
    case: str
    variants: dict[str, Patch]
    backward: bool = False
    dtype: str = "bfloat16"


def tiles(name: str, sizes: list) -> dict[str, Patch]:
    """A table of attention: (rows, keys, warps, stages) for every head dim."""
    import torch

    from fastllm.ops.attention.triton_tile import ROOMY, Sizes

    def patch(size: tuple) -> Patch:
        table = {torch.bfloat16: {1024: Sizes(*size)}}
        return {PLACES[name]: ROOMY | {name: table} if name in ROOMY else table}

    return {"{}x{} {} warps {} stages".format(*size): patch(size) for size in sizes}


def constants(module: str, name: str, values: list) -> dict[str, Patch]:
    return {f"{name} {value}": {(module, name): value} for value in values}


def spaces() -> list[Space]:
    grid = itertools.product
    forward = [*grid((128,), (64, 128), (8,), (2, 3, 4)), *grid((64,), (64, 128), (4,), (2, 3)), (128, 32, 4, 3)]
    forward += [(128, 128, 8, 1), (64, 64, 4, 4)]
    keys = [*grid((32, 64), (64, 128), (4, 8), (2, 3)), (128, 64, 8, 2), (128, 128, 8, 2)]
    queries = [*grid((64, 128), (32, 64), (4, 8), (2, 3)), (128, 128, 8, 2)]
    decode = [*grid((16,), (32, 64, 128), (2, 4), (3, 5))]
    found = []
    for dim, heads in ((64, 32), (128, 16)):
        case = f"B4 Sq4096 Sk4096 H{heads}/{heads} D{dim}"
        found += [
            Space(f"attention D{dim}", "attention", case, tiles("DENSE", forward)),
            Space(f"keys D{dim}", "attention", case, tiles("KEYS", keys), True),
            Space(f"queries D{dim}", "attention", case, tiles("QUERIES", queries), True),
        ]
    shapes = {"1@4096 H32/8 D128": "decode 1", "64 x 1@4096": "decode 64", "128 x 1@1024": "decode 128"}
    found += [Space(name, "paged_attention", case, tiles("DECODE", decode)) for case, name in shapes.items()]
    block_warps = [*grid((1024, 2048, 4096, 8192, 16384), (4, 8, 16))]
    vectors = [*grid((512, 1024, 2048, 4096), (2, 4, 8))]
    exact = [(*tile, 64, 8, stages) for tile in ((128, 128), (128, 256), (256, 128)) for stages in (3, 4)]
    pairs = {f"{block} by {warps} warps": (block, warps) for block, warps in block_warps}
    found += [
        Space("cross_entropy", "cross_entropy", "8192x128256",
              {label: {("cross_entropy", "READ"): pair} for label, pair in pairs.items()}),
        Space("cross_entropy backward", "cross_entropy", "8192x128256",
              {label: {("cross_entropy", "WRITE"): pair} for label, pair in pairs.items()}, True),
        *(Space(f"adamw{of}", "adamw", f"16384x24576{of}",
                {f"{n} by {w} warps": {("adamw", "LANES"): n, ("adamw", "WARPS"): w} for n, w in vectors})
          for of in (" master", " bf16 moments")),
        Space("swiglu", "swiglu", "8192x14336",
              {f"{n} by {w} warps": {("_gated", "BLOCK"): n, ("_gated", "WARPS"): w} for n, w in vectors}),
        Space("swiglu backward", "swiglu", "8192x14336",
              {f"{n} by {w} warps": {("_gated", "BLOCK"): n, ("_gated", "WARPS"): w} for n, w in vectors}, True),
        Space("rope", "rope", "4x4096",
              {f"{n} heads by {w} warps": {("rope", "HEADS"): n, ("rope", "WARPS"): w}
               for n, w in grid((4, 8, 16, 32), (1, 2, 4, 8))}),
        *(Space(f"head {case}", "linear_cross_entropy", case,
                {f"{r} rows": {("_head", "GPU_BYTES"): 1, ("_head", "GPU_ROWS"): (r, r)} for r in (768, 1280, 2048, 4096)}, True)
          for case in ("8192x2048 to 32000", "8192x4096 to 128256")),
        *(Space(f"sample {case}", "sample", f"{case} no entropy",
                {"CUDA C++": {("sample", "MANY_ROWS"): 1 << 30}}
                | {f"Triton, {w} warps": {("_sample_gpu", "OPTIONS"): {"num_warps": w, "enable_fp_fusion": False}}
                   for w in (4, 8)}, dtype="float32")
          for case in ("256x128256", "256x151936")),
        Space("lora", "lora_linear", "2048x4096 to 4096",
              {f"shrink: {k} of K, {stages} stages": {("_lora_gpu", "SHRINK_K"): k, ("_lora_gpu", "SHRINK_STAGES"): stages}
               for k, stages in grid((32, 64, 128, 256), (3, 4))}, True),
        Space("multi_lora", "multi_lora", "32x4096 to 4096",
              {f"{c} columns a program, {k} of K, {b} rows of B":
               {("multi_lora", "COLS"): c, ("multi_lora", "MOST_K"): k, ("multi_lora", "B_ROWS"): b}
               for c, k, b in grid((512, 1024, 2048, 4096), (128, 256), (128, 256))}),
        Space("exact linear", "linear", "8192x4096 to 4096 exact",
              {str(t): {("_linear_exact", "MANY_ROWS_ROOMY"): t} for t in exact}),
        Space("exact linear, one row", "linear", "1x4096 to 4096 exact",
              {str(t): {("_linear_exact", "FEW_ROWS_ROOMY"): t}
               for t in ((64, 32, 128, 4, 6), (64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (64, 64, 256, 4, 2))}),
    ]  # fmt: skip
    for op in ("rms_norm", "layer_norm"):
        warps = {f"{w} warps": {(op, "row_warps"): Constant(w)} for w in (2, 4, 8, 16)}
        found.append(Space(op, op, "8192x4096", warps))
        sets = {
            f"{w} warps, {m} programs a multiprocessor": {(op, "row_warps"): Constant(w), (op, "PROGRAMS"): m}
            for w in (4, 8, 16) for m in (1, 2, 3, 4)
        }  # fmt: skip
        found.append(Space(f"{op} backward", op, "8192x4096", sets, True))
    return found


@dataclass(frozen=True)
class Constant:
    """A function that gives the same, whatever it is asked."""

    value: Any

    def __call__(self, *_):
        return self.value


# -------------------------------------------------------------------------------------------------------------- running


@contextlib.contextmanager
def patched(patch: Patch) -> Iterator[None]:
    before = []
    for (module, name), value in patch.items():
        space = vars(importlib.import_module(f"fastllm.ops.{module}"))
        before.append((space, name, space[name]))
        if type(space[name]).__name__ == "constexpr":
            value = type(space[name])(value)
        space[name] = value
    try:
        yield
    finally:
        for space, name, value in before:
            space[name] = value


def call_of(space: Space):
    """The space's case, ready to run on the GPU."""
    from fastllm.bench.measure import FORWARD, TRAIN
    from fastllm.bench.select import select
    from fastllm.ops.attention import cudnn

    jobs = select([space.op], "cuda", [space.dtype])
    wanted = TRAIN if space.backward else FORWARD
    job = next(j for j in jobs if j.case.label.startswith(space.case) and j.direction == wanted)
    arguments, call = job.arguments(), job.call(job.suite.run)

    def run():
        with cudnn.switched_off():
            return call(*arguments)

    return job, run


def compile_variants(index: int, labels: list[str]) -> dict[str, str]:
    """In a process of its own: Triton keeps what it compiles on disk. What fails, and why."""
    import torch

    space, failed = spaces()[index], {}
    _, run = call_of(space)
    for label in labels:
        try:
            with patched(space.variants[label]):
                run()
                torch.cuda.synchronize()
        except Exception as error:
            failed[label] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
    del run, _
    torch.cuda.empty_cache()
    return failed


def time_variants(index: int, failed: dict[str, str]) -> dict[str, float]:
    """Median seconds by label; "" is what the modules hold."""
    import torch

    from fastllm.bench.harness import cuda_sampler

    space, times = spaces()[index], {}
    _, run = call_of(space)
    sampler = cuda_sampler(run, [()])
    for label in ["", *space.variants]:
        if label in failed:
            continue
        with patched(space.variants[label] if label else {}):
            try:
                sampler(1)
                calls = max(1, min(20, int(2e-3 / sampler(1))))
                times[label] = statistics.median(sampler(calls) / calls for _ in range(SAMPLES))
            except Exception as error:
                failed[label] = f"{type(error).__name__}: {str(error)[:90]}"
    torch.cuda.empty_cache()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="spaces, by the beginning of their names")
    parser.add_argument("--list", action="store_true", help="print the spaces and end")
    parser.add_argument("--best", type=int, default=4, help="variants to print of each space")
    parser.add_argument("--json", help="a file for every time")
    options = parser.parse_args()
    known = spaces()
    chosen = [i for i, s in enumerate(known) if not options.names or s.name.startswith(tuple(options.names))]
    if options.list:
        return print("\n".join(f"{s.name}: {len(s.variants)} variants of {s.op} {s.case}" for s in known))
    failed: dict[int, dict[str, str]] = {i: {} for i in chosen}
    workers = min(os.cpu_count() or 1, 14)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        work = {}
        for i in chosen:
            labels, size = list(known[i].variants), 4
            for at in range(0, len(labels), size):
                work[pool.submit(compile_variants, i, labels[at : at + size])] = i
        for done in as_completed(work):
            failed[work[done]] |= done.result()
    result = {}
    for i in chosen:
        times = time_variants(i, failed[i])
        result[known[i].name] = {"seconds": times, "failed": failed[i]}
        now = times.get("", float("nan"))
        print(f"{known[i].name}: {now * 1e6:.1f} us", flush=True)
        for label, seconds in sorted(times.items(), key=lambda item: item[1])[: options.best]:
            print(f"    {now / seconds:5.2f}x {seconds * 1e6:9.1f} us  {label or 'as it is'}")
        for label, why in list(failed[i].items())[:2]:
            print(f"    {len(failed[i])} failed, as {label}: {why}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
