"""Many requests together on a CPU: what a batch gains, what the engine around it costs, what a known prefix saves.

    python benchmarks/batch.py
    python benchmarks/batch.py --quantize int8 --depth 512 --profile
    python benchmarks/batch.py --kv-dtype int8       # and what that costs in perplexity
    python benchmarks/batch.py --adapters 16 --rows 1 16

Batches of every size take turns (round after round, medians). A step's overhead is its wall time less that of the
replayed plan. With adapters (LoRA of rank 16 on every projection; rows take them in turn) each size takes its turn
without them and with them. Ends in one JSON line.
"""

import argparse
import json
import math
import statistics
import time
from collections import Counter
from dataclasses import replace

import texts
import torch

from fastllm import LLM, SamplingParams
from fastllm.decode.engine import LEAST
from fastllm.decode.scheduler import Sequence
from fastllm.peft.lora import Lora, Pair, modules

PARAMS = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=1)


def ids(count: int, salt: int) -> list[int]:
    return [1000 + (i * 7919 + salt * 104729) % 20000 for i in range(count)]


def adapter(model, seed: int, rank: int = 16) -> Lora:
    """Random, on every projection."""
    torch.manual_seed(seed)
    shapes = {name: shape for stacked in modules(model).values() for name, shape in stacked.items()}
    pairs = {n: Pair(torch.randn(rank, k) * k**-0.5, torch.randn(rows, rank) * 0.01) for n, (rows, k) in shapes.items()}
    return Lora(pairs, r=rank, lora_alpha=rank)


def begun(engine, batch: int, depth: int, count: int, adapters: int = 0) -> tuple[list[Sequence], dict]:
    """Sequences that decode, and the plans that they run. The first go on while the last are read, a busy machine's in pieces
    of `LEAST` tokens."""
    engine.cache.forget()
    names = [str(i % adapters) if adapters else None for i in range(batch)]
    params = [replace(PARAMS, adapter=name) for name in names]
    room = count + 40 + batch * (depth // LEAST + 2)
    sequences = [Sequence(ids(depth, salt), room, p) for salt, p in enumerate(params)]
    engine.submit(sequences)
    while not all(len(s.tokens) > 2 for s in sequences):
        engine.step()
    return sequences, engine.steps.adapted_plans if adapters else engine.steps.plans


def size_for(engine, batch: int) -> int:
    """Rows of the plan that runs a batch."""
    return next(size for size in engine.sizes if size >= batch)


def steps(engine, batch: int, depth: int, count: int, adapters: int = 0) -> tuple[float, float]:
    """Seconds of a decode step of `batch` sequences, `depth` tokens deep: by the wall, and of the plan alone."""
    sequences, plans = begun(engine, batch, depth, count, adapters)
    size = size_for(engine, batch)
    plan, replay, inside = plans[size], engine.steps.replay, []

    def timed(plan, threads):
        began = time.perf_counter()
        replay(plan, threads)
        inside.append(time.perf_counter() - began)
        return plan

    engine.steps.replay = timed
    wall = []
    for _ in range(count):
        began = time.perf_counter()
        engine.step()
        wall.append(time.perf_counter() - began)
    del engine.steps.replay
    engine.cancel(sequences)
    assert plans[size] is plan
    return statistics.median(wall), statistics.median(inside)


def profile(engine, batch: int, depth: int, adapters: int) -> dict[str, float]:
    """Milliseconds of each kernel in a step."""
    sequences, plans = begun(engine, batch, depth, 200, adapters)
    plan, total = plans[size_for(engine, batch)], Counter()
    for name, seconds in zip(plan.kernels(), plan._plan.profile(engine.threads, 20), strict=True):
        total[name] += seconds * 1e3
    engine.cancel(sequences)
    return dict(total.most_common())


def first_token(engine, prefix: list[int], salt: int) -> float:
    began, s = time.perf_counter(), Sequence(prefix + ids(20, salt), 1, PARAMS)
    engine.run([s])
    return time.perf_counter() - began


def perplexity(llm: LLM, windows: list[list[int]]) -> float:
    scores = [score for window in llm.logprobs(windows) for score in window]
    return math.exp(-sum(scores) / len(scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantize")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--depth", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="*", help="sizes of batches: 1, 2, 4, 8, 16 where none is given")
    parser.add_argument("--adapters", type=int, default=0, help="how many different ones the rows of a batch have")
    parser.add_argument("--profile", action="store_true", help="milliseconds by kernel, for 1 and 16 rows")
    a = parser.parse_args()
    llm = LLM(a.model, quantize=a.quantize, dtype=a.dtype, kv_dtype=a.kv_dtype)
    engine = llm.engine
    sizes = a.rows or engine.sizes
    for i in range(a.adapters):
        engine.load_adapter(str(i), adapter(engine.model, i))
    kinds = (0, a.adapters) if a.adapters else (0,)
    for size in sizes:
        for kind in kinds:
            steps(engine, size, a.depth, 3, kind)  # captures
    every = [
        {kind: {size: steps(engine, size, a.depth, 20, kind) for size in sizes} for kind in kinds}
        for _ in range(a.rounds)
    ]
    rounds = [r[0] for r in every]
    result: dict = {"model": a.model, "quantize": a.quantize, "depth": a.depth, "batch": {}}
    print(f"{'rows':>4} {'ms a step':>10} {'tokens/s':>9} {'over one':>9} {'overhead':>9}")
    for size in sizes:
        wall = statistics.median(r[size][0] for r in rounds)
        gain = statistics.median(size * r[sizes[0]][0] / r[size][0] for r in rounds)
        overhead = statistics.median(1 - r[size][1] / r[size][0] for r in rounds)
        result["batch"][size] = {"ms": wall * 1e3, "gain": gain, "overhead": overhead}
        print(f"{size:4} {wall * 1e3:10.2f} {size / wall:9.0f} {gain:9.2f} {overhead:9.1%}")
    if a.adapters:
        result["adapters"] = {}
        print(
            f"with {a.adapters} adapters of rank 16, {sum(p.nbytes for p in engine.adapters.pools.values()) / 1e6:.0f} MB"
        )
        for size in sizes:
            wall = statistics.median(r[a.adapters][size][0] for r in every)
            over = statistics.median(r[a.adapters][size][0] / r[0][size][0] for r in every)
            result["adapters"][size] = {"ms": wall * 1e3, "over none": over}
            print(f"{size:4} {wall * 1e3:10.2f} {size / wall:9.0f} {over:9.3f} times none")
    cold, warm = [], []
    for turn in range(a.rounds):
        engine.cache.forget()
        cold.append(first_token(engine, ids(1000, turn), 1))
        warm.append(first_token(engine, ids(1000, turn), 2))
    result["prefix"] = statistics.median(c / w for c, w in zip(cold, warm, strict=True))
    print(f"first token after 1,020 tokens: {statistics.median(cold) * 1e3:.0f} ms; with 1,000 of them known: ", end="")
    print(f"{statistics.median(warm) * 1e3:.1f} ms, {result['prefix']:.1f} times as fast")
    if a.profile:
        result["profile"] = {size: profile(engine, size, a.depth, a.adapters) for size in (1, sizes[-1])}
        for name in result["profile"][sizes[-1]]:
            one, all_ = (result["profile"][size].get(name, 0.0) for size in (1, sizes[-1]))
            print(f"{name:>24} {one:8.3f} {all_:8.3f} ms")
    if a.kv_dtype != "auto":
        stream = texts.token_stream(llm.path)
        windows = [stream[i : i + 1024] for i in range(0, 16 * 1024, 1024)]
        plain = LLM(a.model, quantize=a.quantize, dtype=a.dtype)
        result["perplexity"] = [perplexity(model, windows) for model in (plain, llm)]
        print(
            "perplexity of 16 windows of 1,024 tokens, float32 and {}: {:.3f}, {:.3f}".format(
                a.kv_dtype, *result["perplexity"]
            )
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
