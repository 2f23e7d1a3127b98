"""transformers as it is beside the same model after `fastllm.integrations.transformers.accelerate`: one interleaved run.

    python benchmarks/hugging_face.py                          # generate and a training step, eager and compiled
    python benchmarks/hugging_face.py --work train --modes eager --repeats 9 --json out.json

SmolLM2-135M in fp32 on a CPU: `generate` is 64 tokens after a prompt of 128, a training step 4 x 256 tokens, of real text.
All four contenders run in processes of their own with the malloc that keeps its pages (a win over page faults is no win),
A B A B, medians over the rounds; what was measured beside other work is thrown away, as in `decode.py`. Before anything is
timed the tokens must be the same, and the losses of the first steps. The exit status is 1 where ours is not faster, or
something failed, or the machine was not quiet.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import psutil
from workers import Meter, Worker, environment, finish, machine, versions

from fastllm import hub

NEW = 64
WARM_UP = {"generate": 1, "train": 2}  # also what is compared


def contenders(work: str, modes: list[str], options) -> dict[str, dict]:
    """Name -> what its worker is told. Compiled training leaves logits out: a compiled forward cannot put them off."""
    common = {"kind": "transformers", "path": str(hub.resolve("smollm2-135m")), "threads": options.threads}
    found = {}
    for mode in modes:
        compiled = mode == "compiled"
        for who in ("transformers", "accelerated"):
            ways = {"logits": False} if compiled and work == "train" else {}
            spec = {
                "accelerated": who == "accelerated",
                "compiled": compiled,
                "train": work == "train",
                "options": ways,
            }
            found[f"{who} {mode}"] = common | spec
    return found


def measure(work: str, specs: dict[str, dict], options, meter: Meter) -> tuple[dict[str, dict], list[str]]:
    """(name -> samples, first answer and peak, what went wrong)"""
    script, variables, workers, rows, failures = Path(__file__).with_name("hugging_face_models.py"), {}, {}, {}, []
    variables = environment(options.threads, tuned=True)
    ask = {"do": "generate", "new": NEW} if work == "generate" else {"do": "step", "count": 1}
    try:
        for name, spec in specs.items():
            print(f"  {work}: loading {name}", file=sys.stderr, flush=True)
            try:
                workers[name] = Worker(script, spec, variables)
                workers[name].ask(do="load")
                first = [workers[name].ask(**ask) for _ in range(WARM_UP[work])]
                rows[name] = {"seconds": [], "first": [r.get("losses") or r["tokens"] for r in first]}
            except RuntimeError as error:
                failures.append(f"{work} {name}: {error}")
        for number in range(options.repeats):
            print(f"  {work}: round {number + 1} of {options.repeats}", file=sys.stderr, flush=True)
            for name, row in rows.items():
                reply = meter.sample(workers[name], **ask)
                row["seconds"].append(reply["seconds"])
                row["peak_bytes"] = reply.get("peak_bytes")
    finally:
        for worker in workers.values():
            worker.close()
    return rows, failures


def judge(work: str, modes: list[str], rows: dict[str, dict]) -> list[str]:
    """Adds medians and leads to the rows; a line for each thing that is not as it should be."""
    missed = []
    for row in rows.values():
        row["median"] = median(row["seconds"])
    truth = next(iter(rows.values()))["first"] if rows else None
    for name, row in rows.items():
        if work == "generate":
            same = row["first"] == truth
        else:
            same = all(abs(a[0] - b[0]) <= 1e-4 * b[0] for a, b in zip(row["first"], truth, strict=True))
        if not same:
            missed.append(f"{work} {name}: {row['first']}, transformers eager {truth}")
    for mode in modes:
        ours, theirs = rows.get(f"accelerated {mode}"), rows.get(f"transformers {mode}")
        if ours and theirs:
            ours["lead"] = theirs["median"] / ours["median"]
            if ours["lead"] <= 1:
                missed.append(f"{work} {mode}: {ours['lead']:.2f}x the speed of transformers, the goal is ahead of it")
    return missed


def table(work: str, rows: dict[str, dict]) -> str:
    lines = [f"{work:28}{'seconds':>10}{'tokens/s':>10}{'lead':>7}{'peak GB':>9}"]
    for name, row in rows.items():
        count = NEW if work == "generate" else 1024
        lead = f"{row['lead']:.2f}" if "lead" in row else ""
        peak = f"{row['peak_bytes'] / 1e9:.2f}" if row.get("peak_bytes") else ""
        lines.append(f"{name:28}{row['median']:10.3f}{count / row['median']:10.1f}{lead:>7}{peak:>9}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="generate,train", help="of generate, train")
    parser.add_argument("--modes", default="eager,compiled", help="of eager, compiled")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--quiet", type=float, default=0.1, help="cores that other processes may use")
    parser.add_argument("--patience", type=float, default=600, help="seconds to spend on waiting for quiet")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "accelerate.json")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    modes = options.modes.split(",")
    meter, missed, failures, found = Meter(options.quiet, options.patience), [], [], {}
    for work in options.work.split(","):
        found[work], failed = measure(work, contenders(work, modes, options), options, meter)
        missed += judge(work, modes, found[work])
        failures += failed
        print(f"\n{table(work, found[work])}\n")
    result = {"machine": machine(), "versions": versions(), "command": " ".join(["hugging_face.py", *sys.argv[1:]])}
    result |= {"rows": found, "missed": missed, "failures": failures}
    finish(result, meter, options.json)
    leads = {f"{work} {name}": r["lead"] for work, rows in found.items() for name, r in rows.items() if "lead" in r}
    print(json.dumps({"benchmark": "accelerate", "ok": result["ok"], "lead": leads}))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
