"""A training step, end to end: fastllm beside transformers, the same weights, the same tokens, one interleaved run.

    python benchmarks/train.py                               # GPT-2 124M in fp32, 4 x 256 tokens, on a CPU
    python benchmarks/train.py --device cuda                 # a Llama of 1.24 G in bf16, 4 x 2048 tokens
    python benchmarks/train.py --device cuda --shape llama-3.6b-lora    # LoRA of rank 16 on every linear, 4 x 1024, beside PEFT
    python benchmarks/train.py --shape gpt2-124m --repeats 9 --json out.json

Every contender waits in a worker process (`trainers.py`), stopped by SIGSTOP while another one is measured; samples taken
while other processes were busy are thrown away, as in `decode.py`. A step is forward, backward and AdamW; times are medians
over the rounds, memory is the peak beyond what the imports take. The losses of all contenders must agree before anything
is timed: a fast wrong step is none.

The goal on a CPU is a time on the machine that it was set on, scaled by the peak of multiply-adds in this run; besides,
ours must be ahead of every peer, and within the goal's memory. The exit status is 1 when a contender is missing, the losses
disagree, a goal is missed or the machine was not quiet.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil
from trainers import SHAPES, Shape
from workers import Meter, Worker, environment, finish, machine, versions

PEERS = ("transformers", "transformers-compile")
MASTER = "fastllm-master"  # ours with float32 weights and moments beside those of 16 bits
FMA = 320.0  # GFLOP/s of the machine that the goals were set on (2 cores of an Ice Lake)
WARM_UP = 3  # steps; also those whose losses are compared


@dataclass(frozen=True)
class Goal:
    """On a CPU seconds a step (scaled by FMA), on a GPU tokens/s; peak memory in bytes."""

    seconds: float | None = None
    tokens: float | None = None
    memory: float | None = None


GOALS = {
    ("gpt2-124m", "fastllm"): Goal(seconds=3.9, memory=2.6e9),
    ("llama-1.2b", "fastllm"): Goal(tokens=64_000, memory=17 * 2**30),
    ("llama-1.2b", MASTER): Goal(tokens=60_000, memory=27 * 2**30),
    ("llama-3.6b-lora", "fastllm"): Goal(tokens=26_000, memory=15 * 2**30),
}


@dataclass
class Contender:
    """A trainer and what was measured of it."""

    name: str
    spec: dict
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int | None = None
    worker: Worker | None = None


def flops(shape: Shape) -> float:
    """Of a step: 6 for each weight of a product and token, 4 for a frozen one, and attention, whose causal half counts."""
    head = shape.dim // shape.heads
    queries, keys = shape.heads * head, shape.kv_heads * head
    linears = [(shape.dim, queries), (shape.dim, keys), (shape.dim, keys), (queries, shape.dim)]
    linears += [(shape.dim, shape.ffn)] * (2 if shape.kind == "llama" else 1) + [(shape.ffn, shape.dim)]
    weights = shape.layers * sum(k * n for k, n in linears) + shape.vocab * shape.dim
    factors = shape.layers * sum(k + n for k, n in linears) * shape.lora
    attention = 6 * shape.layers * queries * shape.length
    return shape.batch * shape.length * ((4.0 if shape.lora else 6.0) * weights + 6.0 * factors + attention)


def measure(entrants: list[Contender], shape: str, options, meter: Meter) -> tuple[float | None, list[str]]:
    """(peak of multiply-adds, what went wrong); fills in the contenders."""
    failures, ceilings = [], []
    script = Path(__file__).with_name("trainers.py")
    variables = environment(options.threads, tuned=True)
    ceiling = None
    try:
        if options.device == "cpu":
            ceiling = Worker(script, {"kind": "ceiling", "threads": options.threads}, variables)
            ceiling.ask(do="load")
        for who in entrants:
            print(f"  loading {who.name}", file=sys.stderr, flush=True)
            try:
                who.worker = Worker(script, who.spec, variables)
                who.worker.ask(do="load")
                who.losses = who.worker.ask(do="step", count=WARM_UP)["losses"]
            except RuntimeError as error:
                failures.append(f"{who.name}: {error}")
                if who.worker:
                    who.worker.close()
                who.worker = None
        for number in range(options.repeats):
            print(f"  round {number + 1} of {options.repeats}", file=sys.stderr, flush=True)
            if ceiling:
                ceilings.append(meter.sample(ceiling, do="ceilings")["fma"])
            for who in (e for e in entrants if e.worker):
                reply = meter.sample(who.worker, do="step", count=options.steps)
                who.seconds.append(reply["seconds"] / options.steps)
                who.peak = reply["peak_bytes"]
    finally:
        for worker in [ceiling, *(e.worker for e in entrants)]:
            if worker:
                worker.close()
    return median(ceilings) if ceilings else None, failures


def judge(name: str, shape: Shape, entrants: list[Contender], peak: float | None) -> tuple[list[dict], list[str]]:
    """The rows of the report, and a line for each goal that is missed."""
    missed, rows = [], []
    count = shape.batch * shape.length
    truth = next((e.losses for e in entrants if e.name == PEERS[0] and e.losses), None)
    tolerance = 1e-4 if shape.dtype == "float32" else 2e-2
    for who in (e for e in entrants if e.seconds):
        seconds = median(who.seconds)
        row = {"name": who.name, "seconds": seconds, "tokens_per_s": count / seconds, "peak_bytes": who.peak}
        row |= {"samples": who.seconds, "losses": who.losses, "gflop_per_s": flops(shape) / seconds / 1e9}
        row["of_peak"] = row["gflop_per_s"] / peak if peak else None
        if truth and any(abs(a - b) > tolerance * abs(b) for a, b in zip(who.losses, truth, strict=True)):
            missed.append(f"{name} {who.name}: losses {who.losses}, transformers' {truth}")
        rows.append(row)
    best = min((r["seconds"] for r in rows if not r["name"].startswith("fastllm")), default=None)
    for ours in (r for r in rows if r["name"].startswith("fastllm")):
        goal, who = GOALS.get((name, ours["name"]), Goal()), f"{name} {ours['name']}"
        ours["lead"] = best / ours["seconds"] if best else None
        if best and ours["lead"] < 1:
            missed.append(f"{who}: {ours['lead']:.2f}x the best peer's speed, the goal is ahead of it")
        if goal.seconds and peak:
            ours["goal_seconds"] = goal.seconds * FMA / peak
            if ours["seconds"] > ours["goal_seconds"]:
                missed.append(f"{who}: {ours['seconds']:.2f} s a step, the goal is {ours['goal_seconds']:.2f}")
        if goal.tokens and ours["tokens_per_s"] < goal.tokens:
            missed.append(f"{who}: {ours['tokens_per_s']:.0f} tokens/s, the goal is {goal.tokens:.0f}")
        if goal.memory and ours["peak_bytes"] > goal.memory:
            missed.append(f"{who}: {ours['peak_bytes'] / 1e9:.2f} GB at its peak, the goal is {goal.memory / 1e9:.2f}")
    return rows, missed


def table(rows: list[dict], peak: float | None) -> str:
    lines = [f"{'contender':24}{'s a step':>10}{'tokens/s':>10}{'GFLOP/s':>10}{'of peak':>9}{'peak GB':>9}  losses"]
    for row in rows:
        share = "-" if row["of_peak"] is None else f"{row['of_peak']:.2f}"
        losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
        lines.append(
            f"{row['name']:24}{row['seconds']:10.3f}{row['tokens_per_s']:10.0f}{row['gflop_per_s']:10.0f}{share:>9}"
            f"{row['peak_bytes'] / 1e9:9.2f}  {losses}"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="gpt2-124m on a CPU, llama-1.2b on a GPU")
    parser.add_argument(
        "--peers", default=",".join(PEERS), help="of transformers, transformers-compile; `ours` for none"
    )
    parser.add_argument("--steps", type=int, default=1, help="steps in a sample")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--quiet", type=float, default=0.1, help="cores that other processes may use")
    parser.add_argument("--patience", type=float, default=600, help="seconds to spend on waiting for quiet")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "train.json")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    name = options.shape or ("gpt2-124m" if options.device == "cpu" else "llama-1.2b")
    common = {"shape": name, "threads": options.threads, "device": options.device}
    entrants = [Contender("fastllm", {"kind": "ours", **common})]
    if SHAPES[name].dtype != "float32":
        entrants.append(Contender(MASTER, {"kind": "ours", "master": True, **common}))
    for peer in [] if options.peers == "ours" else options.peers.split(","):
        if peer not in PEERS:
            raise SystemExit(f"--peers {peer}: allowed are {', '.join(PEERS)}, or `ours` for none")
        spec = {"kind": "transformers", "compiled": peer.endswith("compile"), **common}
        entrants.append(Contender(peer, spec))
    meter = Meter(options.quiet, options.patience)
    peak, failures = measure(entrants, name, options, meter)
    rows, missed = judge(name, SHAPES[name], entrants, peak)
    result = {"machine": machine(), "versions": versions(), "command": " ".join(["train.py", *sys.argv[1:]])}
    result |= {"shape": name, "device": options.device, "peak_gflop_per_s": peak, "rows": rows}
    result |= {"missed": missed, "failures": failures}
    print(f"\n{name} on {options.device}\n{table(rows, peak)}\n")
    finish(result, meter, options.json)
    print(json.dumps({"benchmark": "train", "ok": result["ok"], name: {r["name"]: r["seconds"] for r in rows}}))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
