"""Many requests together on a CPU: what a batch gains, what the engine around it costs, what a known prefix saves.

    python benchmarks/batch.py
    python benchmarks/batch.py --quantize int8 --depth 512 --profile
    python benchmarks/batch.py --kv-dtype int8       # and what that costs in perplexity

Batches of every size take turns (round after round, medians). A step's overhead is its wall time less that of the
replayed plan. Ends in one JSON line.
"""

import argparse
import json
import math
import statistics
import time
from collections import Counter

import texts

from fastllm import LLM, SamplingParams
from fastllm.decode.scheduler import Sequence

PARAMS = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=1)


def ids(count: int, salt: int) -> list[int]:
    return [1000 + (i * 7919 + salt * 104729) % 20000 for i in range(count)]


def steps(engine, batch: int, depth: int, count: int) -> tuple[float, float]:
    """Seconds of a decode step of `batch` sequences, `depth` tokens deep: by the wall, and of the plan alone."""
    engine.cache.forget()
    sequences = [Sequence(ids(depth, salt), count + 40 + batch, PARAMS) for salt in range(batch)]
    engine.submit(sequences)
    while not all(len(s.tokens) > 2 for s in sequences):
        engine.step()
    plan, replay, inside = engine._plans[batch], engine._replay, []

    def timed(plan):
        began = time.perf_counter()
        outputs = replay(plan)
        inside.append(time.perf_counter() - began)
        return outputs

    engine._replay = timed
    wall = []
    for _ in range(count):
        began = time.perf_counter()
        engine.step()
        wall.append(time.perf_counter() - began)
    del engine._replay
    engine.cancel(sequences)
    assert engine._plans[batch] is plan
    return statistics.median(wall), statistics.median(inside)


def profile(engine, batch: int, depth: int) -> dict[str, float]:
    """Milliseconds of each kernel in a step."""
    engine.cache.forget()
    sequences = [Sequence(ids(depth, salt), 200, PARAMS) for salt in range(batch)]
    engine.submit(sequences)
    while not all(len(s.tokens) > 2 for s in sequences):
        engine.step()
    plan, total = engine._plans[batch], Counter()
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
    parser.add_argument("--profile", action="store_true", help="milliseconds by kernel, for 1 and 16 rows")
    a = parser.parse_args()
    llm = LLM(a.model, quantize=a.quantize, dtype=a.dtype, kv_dtype=a.kv_dtype)
    engine = llm.engine
    sizes = engine.sizes
    for size in sizes:
        steps(engine, size, a.depth, 3)  # captures
    rounds = [{size: steps(engine, size, a.depth, 20) for size in sizes} for _ in range(a.rounds)]
    result: dict = {"model": a.model, "quantize": a.quantize, "depth": a.depth, "batch": {}}
    print(f"{'rows':>4} {'ms a step':>10} {'tokens/s':>9} {'over one':>9} {'overhead':>9}")
    for size in sizes:
        wall = statistics.median(r[size][0] for r in rounds)
        gain = statistics.median(size * r[1][0] / r[size][0] for r in rounds)
        overhead = statistics.median(1 - r[size][1] / r[size][0] for r in rounds)
        result["batch"][size] = {"ms": wall * 1e3, "gain": gain, "overhead": overhead}
        print(f"{size:4} {wall * 1e3:10.2f} {size / wall:9.0f} {gain:9.2f} {overhead:9.1%}")
    cold, warm = [], []
    for turn in range(a.rounds):
        engine.cache.forget()
        cold.append(first_token(engine, ids(1000, turn), 1))
        warm.append(first_token(engine, ids(1000, turn), 2))
    result["prefix"] = statistics.median(c / w for c, w in zip(cold, warm, strict=True))
    print(f"first token after 1,020 tokens: {statistics.median(cold) * 1e3:.0f} ms; with 1,000 of them known: ", end="")
    print(f"{statistics.median(warm) * 1e3:.1f} ms, {result['prefix']:.1f} times as fast")
    if a.profile:
        result["profile"] = {size: profile(engine, size, a.depth) for size in (1, sizes[-1])}
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
