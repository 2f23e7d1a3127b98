"""What bits that depend on the text alone cost on a GPU: `exact=True` beside the default, a Llama of random weights in bfloat16.

    python benchmarks/exact.py                       # Llama 1.24 G on a GPU
    python benchmarks/exact.py --shape micro --device cpu --tokens 64 --texts 2 --repeats 1    # only to see it run

forward: of training, packed texts with gradients, the two in turns: without the head, and with it and the log-probability and
entropy of each next token. decode: tokens a second of one request and of sixteen, in the steps. delta: the largest difference
between the log-probability that a request was given and the one that training finds of it in a forward over the whole text.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from decode_gpu import SAMPLING, SHAPES, draw, prompts
from torch import Tensor

from fastllm import SamplingParams, ops
from fastllm.data.packed import Packed
from fastllm.decode.engine import Engine
from fastllm.decode.scheduler import Sequence
from fastllm.info import machine, versions
from fastllm.models.decoder import Decoder

GOAL = 1.10  # of the default forward's time


def packed(vocab: int, texts: int, tokens: int, device: str) -> Packed:
    ids = torch.randint(vocab, (texts * tokens,), generator=torch.Generator().manual_seed(1)).to(device)
    position = torch.arange(tokens, device=device).repeat(texts)
    return Packed(ids, position, torch.arange(texts + 1, dtype=torch.int32, device=device) * tokens, tokens)


def seconds(call, device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def logprobs(model: Decoder, hidden: Tensor, target: Tensor) -> Tensor:
    """As training finds them."""
    return ops.token_logprobs(model.norm(hidden), model.head.weight, target, exact=model.exact)[0]


def forward_times(model: Decoder, forward: Callable[[], Tensor], repeats: int, device: str) -> dict[bool, float]:
    """Seconds by mode, medians of turns."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(repeats + 1):
        for exact in times:
            model.exact = exact
            took = seconds(forward, device)
            if turn:  # the first one compiles
                times[exact].append(took)
    return {exact: statistics.median(found) for exact, found in times.items()}


def decoded(model: Decoder, batch: int, new: int) -> tuple[float, float]:
    """(tokens a second in the steps, the largest difference of a log-probability)"""
    given = prompts(batch, model.config.vocab)
    engine = Engine(
        model, len(given[0]) + new + 1, frozenset(), batch, prefix_cache=False, chunk=2048, kv_dtype=model.norm.weight.dtype
    )  # fmt: skip
    found: list[list[tuple[int, float]]] = []
    for _ in range(2):  # the first one captures
        found = [[] for _ in given]
        sequences = [
            Sequence(
                ids, new, SamplingParams(**SAMPLING), seed=i, receive=lambda s, to=to: to.append((s.token, s.logprob))
            )
            for i, (ids, to) in enumerate(zip(given, found, strict=True))
        ]
        engine.run(sequences)
    steps, spent = max(s.timing.steps for s in sequences), statistics.mean(s.timing.decode_s for s in sequences)
    worst = 0.0
    for ids, made in zip(given, found, strict=True):
        text = torch.tensor([*ids, *(token for token, _ in made)], device=engine.device)
        with torch.no_grad():
            wanted = logprobs(model, model.hidden(text[None, :-1])[0, len(ids) - 1 :], text[len(ids) :]).tolist()
        worst = max(worst, *(abs(a - b) for (_, a), b in zip(made, wanted, strict=True)))
    return batch * steps / spent, worst


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1.2b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of a text")
    parser.add_argument("--new", type=int, default=128, help="tokens that a request is given")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args(arguments)
    model, rows = draw(SHAPES[o.shape], o.device), {}
    batch = packed(model.config.vocab, o.texts, o.tokens, o.device)
    forwards = {
        "forward": lambda: model.packed_hidden(batch),
        "forward and log-probabilities": lambda: logprobs(model, model.packed_hidden(batch), batch.ids.roll(-1)),
    }
    for name, forward in forwards.items():
        times = forward_times(model, forward, o.repeats, o.device)
        default, exact = times[False], times[True]
        rows[name] = {"default_s": default, "exact_s": exact, "ratio": exact / default, "goal": GOAL}
        took = f"default {default * 1e3:.1f} ms, exact {exact * 1e3:.1f} ms, {exact / default:.3f} of its time"
        print(f"{name} {o.texts} x {o.tokens}: {took} (goal {GOAL})", flush=True)
    model.eval().requires_grad_(False)
    for count in (1, 16):
        for exact in (False, True):
            model.exact = exact
            rate, delta = decoded(model, count, o.new)
            name = "exact" if exact else "default"
            rows[f"decode {count} {name}"] = {"tokens_per_s": rate, "delta": delta}
            print(f"decode {count:2} {name:8} {rate:9.0f} tokens/s, delta {delta:.2e}", flush=True)
            if exact and delta:
                print("exact bits differ: a fault", flush=True)
    if o.json:
        o.json.write_text(json.dumps({"machine": machine(), "versions": versions(), "rows": rows}, indent=1) + "\n")
    return int(any(row.get("delta") for name, row in rows.items() if name.endswith("exact")))


if __name__ == "__main__":
    raise SystemExit(main())
