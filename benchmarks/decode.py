"""End-to-end speed and quality on a CPU: fastllm beside transformers and llama.cpp on the same weights.

    python benchmarks/decode.py
    python benchmarks/decode.py --shapes smollm2-135m --rows stored,int4 --peers llama.cpp --repeats 9
    python benchmarks/decode.py --peers ours                    # ours alone, nothing to compare with
    python benchmarks/decode.py --device cuda --help            # on a GPU: decode_gpu.py, with flags of its own

Every contender waits in a worker process (`peers.py`), stopped by SIGSTOP while another one is measured. A round asks
each once, for a prefill and for a decode; a sample during which other processes used more than a tenth of a core is
thrown away and taken again. Figures are medians over the rounds; R is the DRAM read bandwidth of the same run.

A goal is a speed on the machine that the goals were set on, scaled by what this machine reaches at best in the same run:
by R for a decode, by the peak of multiply-adds or of 8-bit dot products for a prefill. Besides, ours must be ahead of
every peer of the same form, by the factor that the goal names.

The exit status is 1 when a contender is missing, a goal is missed or the machine was not quiet. Left out: sampling,
batches.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import decode_gpu
import numpy as np
import psutil
import texts
from workers import Meter, Worker, aligned, environment, finish, machine, versions

from fastllm import hub

# The forms of the weights: how ours is asked for one (None: not at all), and the GGUF type that llama.cpp gets.
FORMS = {
    "stored": ({}, None),
    "int4": ({"quantize": "int4"}, "Q4_0"),
    "int8": ({"quantize": "int8"}, "Q8_0"),
    "fp32": ({"dtype": "float32"}, "F32"),
    "f16": (None, "F16"),
}
BITS = {"stored": 5.8, "int4": 4.5, "int8": 8.5, "fp32": 32, "f16": 16}  # a weight, to plan memory
REAL, RANDOM = "smollm2-135m", "tinyllama-1.1b"
PEERS = ("transformers", "transformers-compile", "llama.cpp")


@dataclass(frozen=True)
class Goal:
    """Tokens/s on the machine of the goals; `lead`: decode over the best peer of the same form, at least."""

    decode: float
    prefill: float
    lead: float = 1.0


GOALS = {
    REAL: {"stored": Goal(225, 1700, 2.0), "int4": Goal(290, 1700), "int8": Goal(150, 1700), "fp32": Goal(43, 850)},
    RANDOM: {"int4": Goal(38, 300), "int8": Goal(21, 300), "fp32": Goal(5, 110)},
}
CEILINGS = {"read": 29.0, "fma": 320.0, "dot": 1240.0}  # of that machine: GB/s, GFLOP/s, GOP/s (2 cores of an Ice Lake)
AT_CEILING = 0.98  # decode within 2 % of R is at its goal whatever a peer does
# Perplexity: percent over fp32, at most.
QUALITY = {"stored": 1.0, "int8": 0.5}  # int4: no worse than llama.cpp's Q4_0
WINDOW, WINDOWS = 512, 8


@dataclass
class Contender:
    """One row of the table: a worker, and what was measured of it."""

    name: str
    form: str
    spec: dict
    bytes_per_token: int | None = None
    prefill: list[float] = field(default_factory=list)  # tokens/s, a round each
    decode: list[float] = field(default_factory=list)
    nll: list[float] | None = None  # a window each
    greedy: list[int] = field(default_factory=list)  # the tokens after the first prompt
    ceilings: dict[str, float] = field(default_factory=dict)  # by the names of CEILINGS, in the rounds of this row

    worker: Worker | None = None

    @property
    def ours(self) -> bool:
        return self.spec["kind"] == "ours"

    @property
    def label(self) -> str:
        return f"{self.name} {self.form}"


def files(shape: str, form: str, model: Path) -> tuple[Path, dict, Path | None]:
    """(file that ours reads, how it is asked for the form, llama.cpp's file of the form); missing files are made.

    int4 and int8 of the real model start from its dequantised weights on both sides, since a file of 5 bits is not
    quantised further. The random model exists as Q4_0 and as Q8_0 and is read as stored, or as fp32 from Q8_0.
    """
    kwargs, kind = FORMS[form]
    if shape == RANDOM:
        path = texts.gguf_tinyllama("Q4_0" if form == "int4" else "Q8_0")
        return (path, kwargs, None) if form == "fp32" else (path, {}, path)
    wide = texts.gguf_variant(model, "F32") if "quantize" in (kwargs or {}) else model
    return wide, kwargs, texts.gguf_variant(model, kind) if kind else model


def contenders(shape: str, model: Path, options) -> list[Contender]:
    """Who takes part, with the files they read."""
    result = []
    for form in options.rows:
        if shape == RANDOM and form not in GOALS[RANDOM]:
            continue
        source, kwargs, gguf = files(shape, form, model)
        common = {"threads": options.threads}
        if kwargs is not None:
            result.append(Contender("fastllm", form, {"kind": "ours", "path": str(source), **kwargs} | common))
        for name in options.peers if form == "fp32" else ():
            if name.startswith("transformers"):
                spec = {"kind": "transformers", "path": str(source), "compiled": name.endswith("compile")}
                result.append(Contender(name, form, spec | common, 4 * texts.weight_bytes(source)[1]))
        if "llama.cpp" in options.peers and gguf:
            spec = {"kind": "llama.cpp", "path": str(gguf)}
            result.append(Contender("llama.cpp", form, spec | common, texts.weight_bytes(gguf)[0]))
    return result


def fitting_groups(entrants: list[Contender], weights: int) -> list[list[Contender]]:
    """Entrants in groups that fit the free memory; a form stays whole, since ratios are taken within it."""
    budget = 0.85 * psutil.virtual_memory().available
    groups, used = [], math.inf
    for form in dict.fromkeys(entrant.form for entrant in entrants):
        same = [entrant for entrant in entrants if entrant.form == form]
        need = len(same) * (1.1 * weights * BITS[form] / 8 + 0.7e9)
        if need > budget:
            raise SystemExit(f"the {form} rows need {need / 1e9:.1f} GB together, {budget / 1e9:.1f} GB are free")
        if used + need > budget:
            groups.append([])
            used = 0
        groups[-1] += same
        used += need
    return groups


class Prompts:
    """Slices of one long token stream, none asked twice of a contender, so that no prefix cache can help."""

    def __init__(self, stream: list[int]):
        self.stream, self.used = stream, {}

    def take(self, who: str, length: int, count: int) -> list[list[int]]:
        first = self.used.get((who, length), 0)
        self.used[who, length] = first + count
        starts = [i * (length + 1) % (len(self.stream) - length) for i in range(first, first + count)]
        return [self.stream[start : start + length] for start in starts]


def measure(group: list[Contender], prompts: Prompts, windows: list[list[int]], options, meter: Meter) -> list[str]:
    """Load a group, warm it up, score the windows, then interleave the rounds. Returns what went wrong."""
    failures = []
    ceiling = Contender("R", "", {"kind": "ceiling", "path": "", "threads": options.threads})
    everyone = [ceiling, *group]
    repeats = {}  # (label, request) -> prompts a sample, so that it lasts about a second

    def speed(entrant, do):
        length, extra = (options.prompt, {}) if do == "prefill" else (options.depth, {"new": options.new})
        count = repeats.get((entrant.label, do), 1)
        reply = meter.sample(entrant.worker, do=do, prompts=prompts.take(entrant.label, length, count), **extra)
        return reply["tokens"] / reply["seconds"], reply

    def warm_up(entrant):
        script = Path(__file__).with_name("peers.py")
        entrant.worker = Worker(script, entrant.spec, environment(options.threads, tuned=not entrant.ours))
        loaded = entrant.worker.ask(do="load")["bytes_per_token"]
        entrant.bytes_per_token = loaded or entrant.bytes_per_token
        if entrant is ceiling:
            return
        if windows:
            entrant.nll = entrant.worker.ask(do="nll", windows=windows)["nll"]
        for do, length in (("prefill", options.prompt), ("decode", options.depth)):
            for _ in range(3):  # torch.compile builds twice
                request = {"do": do, "prompts": prompts.take(entrant.label, length, 1)}
                reply = entrant.worker.ask(**request, **({"new": options.new} if do == "decode" else {}))
                entrant.greedy = entrant.greedy or reply.get("ids", [[]])[0]
            repeats[entrant.label, do] = max(1, min(8, round(options.seconds / reply["seconds"])))

    def attempt(entrant, action):
        try:
            return action(entrant)
        except (RuntimeError, OSError, psutil.Error) as error:
            failures.append(f"{entrant.label.strip()} is missing: {error}")
            entrant.worker.close()
            entrant.worker = None

    try:
        for entrant in everyone:
            print(f"  loading {entrant.label.strip()}", file=sys.stderr, flush=True)
            attempt(entrant, warm_up)
        ceilings: dict[str, list[float]] = {name: [] for name in CEILINGS}
        for number in range(options.repeats):
            print(f"  round {number + 1} of {options.repeats}", file=sys.stderr, flush=True)
            for entrant in everyone:
                if entrant.worker is None:
                    continue
                if entrant is ceiling:
                    for name, rate in (
                        attempt(entrant, lambda who: meter.sample(who.worker, do="ceilings")) or {}
                    ).items():
                        ceilings[name].append(rate)
                    continue
                for do in ("prefill", "decode"):
                    taken = entrant.worker and attempt(entrant, lambda who, do=do: speed(who, do)[0])
                    getattr(entrant, do).extend([taken] if taken else [])
        for entrant in group:
            entrant.ceilings = {name: median(rates) for name, rates in ceilings.items() if rates}
    finally:
        for entrant in everyone:
            if entrant.worker:
                entrant.worker.close()
                entrant.worker = None
    return failures


def middle(samples: list[float]) -> float | None:
    return median(samples) if samples else None


def perplexity(entrant: Contender | None) -> float | None:
    return math.exp(sum(entrant.nll) / len(entrant.nll)) if entrant and entrant.nll else None


def judge(shape: str, entrants: list[Contender], compare: bool) -> tuple[list[dict], list[str]]:
    """One record a row, ours with its goals, and a line for every goal missed."""
    rows, missed = [], []
    truth = next((e for e in entrants if e.name == "transformers"), None)
    truth = truth or next((e for e in entrants if e.ours and e.form == "fp32"), None)
    true_ppl = perplexity(truth)
    for entrant in entrants:
        rivals = [e for e in entrants if e.form == entrant.form and not e.ours]
        row = {"name": entrant.name, "form": entrant.form, "bytes_per_token": entrant.bytes_per_token}
        row |= {"prefill": middle(entrant.prefill), "decode": middle(entrant.decode), "ceilings": entrant.ceilings}
        row |= {"prefill_samples": entrant.prefill, "decode_samples": entrant.decode}
        if row["decode"] and entrant.bytes_per_token:
            row["gb_per_s"] = row["decode"] * entrant.bytes_per_token / 1e9
            row["of_read"] = row["gb_per_s"] / entrant.ceilings["read"] if entrant.ceilings else None
        if ppl := perplexity(entrant):
            row["perplexity"] = ppl
            row["perplexity_over_fp32"] = 100 * (ppl / true_ppl - 1) if true_ppl else None
        if shape == REAL and truth and truth.greedy and entrant.greedy:
            same = (a == b for a, b in zip(entrant.greedy, truth.greedy, strict=True))
            row["same_greedy_tokens"] = next((i for i, equal in enumerate(same) if not equal), len(truth.greedy))
        if entrant.ours and compare:
            missed += [
                f"{shape} {entrant.form} {line}" for line in judge_speed(GOALS[shape][entrant.form], row, rivals)
            ]
        if entrant.ours and entrant.nll:
            missed += judge_quality(entrant, row, entrants)
        rows.append(row)
    return rows, missed


def judge_speed(goal: Goal, row: dict, rivals: list[Contender]) -> list[str]:
    """Adds goals and ratios to our row; a line for each that is missed."""
    missed = []
    scaled_by = {"decode": "read", "prefill": "fma" if row["form"] == "fp32" else "dot"}
    for do, ceiling in scaled_by.items():
        best = max((middle(getattr(rival, do)) or 0 for rival in rivals), default=0)
        ratio = row[do] / best if row[do] and best else None
        wanted = getattr(goal, do) * row["ceilings"][ceiling] / CEILINGS[ceiling] if row["ceilings"] else None
        lead = goal.lead if do == "decode" else 1.0
        at_ceiling = do == "decode" and (row.get("of_read") or 0) >= AT_CEILING
        row |= {f"{do}_ratio": ratio, f"{do}_lead": lead, f"{do}_goal": wanted}
        row[f"{do}_met"] = at_ceiling or bool(row[do] and wanted and row[do] >= wanted and (ratio or 0) >= lead)
        if not row[f"{do}_met"]:
            found = f"{row[do] or 0:.1f} tokens/s and {ratio or 0:.2f}x the best peer"
            missed.append(f"{do}: {found}, the goal is {wanted or 0:.1f} and {lead}x")
    return missed


def judge_quality(entrant: Contender, row: dict, entrants: list[Contender]) -> list[str]:
    """A line if ours lost more perplexity in this form than it may."""
    worse, limit = row.get("perplexity_over_fp32"), QUALITY.get(entrant.form)
    if None not in (worse, limit) and worse > limit:
        return [f"perplexity {entrant.form}: {worse:+.2f} %, the goal is at most +{limit} % over fp32"]
    if entrant.form == "int4":
        theirs = perplexity(next((e for e in entrants if e.label == "llama.cpp int4"), None))
        if theirs and row["perplexity"] > theirs:
            return [f"perplexity int4: {row['perplexity']:.3f}, llama.cpp's Q4_0 has {theirs:.3f}"]
    return []


def describe(ceilings: dict[str, float]) -> str:
    if not ceilings:
        return "ceilings not measured"
    return f"R = {ceilings['read']:.1f} GB/s, {ceilings['fma']:.0f} GFLOP/s fp32, {ceilings['dot']:.0f} GOP/s 8-bit"


def table(rows: list[dict]) -> str:
    """The rows as text; speed as a share of its goal, with a mark where it is missed."""

    def number(value, places=0, suffix=""):
        return "-" if value is None else f"{value:.{places}f}{suffix}"

    def goal(row, do):
        if row.get(f"{do}_goal") is None:
            return ["-", "-"]
        share = 100 * row[do] / row[f"{do}_goal"]
        return [f"{share:.0f} % {'met' if row[f'{do}_met'] else 'MISSED'}", number(row[f"{do}_ratio"], 2, "x")]

    titles = ["contender", "form", "MB/token", "prefill tok/s", "decode tok/s", "GB/s", "of R"]
    titles += ["decode of goal", "over peer", "prefill of goal", "over peer", "perplexity", "over fp32", "same tokens"]
    lines = [titles]
    for row in rows:
        megabytes = row["bytes_per_token"] and row["bytes_per_token"] / 1e6
        cells = [row["name"], row["form"], number(megabytes, 1), number(row["prefill"]), number(row["decode"], 1)]
        cells += [number(row.get("gb_per_s"), 1), number(row.get("of_read"), 2)]
        cells += [*goal(row, "decode"), *goal(row, "prefill"), number(row.get("perplexity"), 3)]
        cells += [number(row.get("perplexity_over_fp32"), 2, " %"), number(row.get("same_greedy_tokens"))]
        lines.append(cells)
    return aligned(lines)


def plot(result: dict, path: Path) -> None:
    """Decode speed of every row as bars, with the bandwidth's limit of that form as a tick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(result["shapes"]), figsize=(7 * len(result["shapes"]), 6), squeeze=False)
    for axis, (shape, rows) in zip(axes[0], result["shapes"].items(), strict=True):
        rows = sorted((row for row in rows if row["decode"]), key=lambda row: row["decode"])
        for y, row in enumerate(rows):
            axis.barh(y, row["decode"], color="tab:orange" if row["name"] == "fastllm" else "tab:gray")
            axis.text(row["decode"], y, f" {row['decode']:.0f}", va="center", fontsize=8)
            if row["ceilings"]:
                axis.plot(row["ceilings"]["read"] * 1e9 / row["bytes_per_token"], y, "k|", markersize=14)
        axis.set_yticks(range(len(rows)), [f"{row['name']} {row['form']}" for row in rows])
        axis.set_xlabel("decode, tokens/s (mark: bytes at the measured DRAM bandwidth)")
        axis.set_title(shape)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser.add_argument("--model", default=REAL, help=f"alias or GGUF file with real weights, shown as {REAL}")
    parser.add_argument("--shapes", type=names, default=[REAL, RANDOM], help=f"of {REAL}, {RANDOM} (random weights)")
    parser.add_argument("--rows", type=names, default=list(FORMS), help=f"forms of the weights, of {', '.join(FORMS)}")
    parser.add_argument("--peers", type=names, default=list(PEERS), help=f"of {', '.join(PEERS)}; `ours` for none")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prefill")
    parser.add_argument("--depth", type=int, default=128, help="prompt tokens in the cache when decoding starts")
    parser.add_argument("--new", type=int, default=64, help="tokens decoded")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--seconds", type=float, default=1.0, help="least length of a sample (up to 8 prompts)")
    parser.add_argument("--quiet", type=float, default=0.1, help="cores that other processes may use")
    parser.add_argument("--patience", type=float, default=600, help="seconds to spend on waiting for quiet")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "decode.json")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    options.peers = [] if options.peers == ["ours"] else options.peers
    for flag, allowed in (("shapes", (REAL, RANDOM)), ("rows", tuple(FORMS)), ("peers", PEERS)):
        if unknown := set(getattr(options, flag)) - set(allowed):
            parser.error(f"--{flag}: unknown {', '.join(sorted(unknown))}; choose from {', '.join(allowed)}")
    return options


def device(arguments: list[str]) -> tuple[str, list[str]]:
    """Which, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    known, rest = parser.parse_known_args(arguments)
    return known.device, rest


def main() -> int:
    where, rest = device(sys.argv[1:])
    if where == "cuda":
        return decode_gpu.main(rest)
    options = parse(rest)
    result = {"machine": machine(), "versions": versions(), "command": " ".join(["decode.py", *sys.argv[1:]])}
    result |= {"shapes": {}, "failures": [], "missed": []}
    meter = Meter(options.quiet, options.patience)
    model = hub.resolve(options.model)
    for shape in options.shapes:
        entrants = contenders(shape, model, options)
        if shape == REAL:
            stream = texts.token_stream(model)
            windows = [stream[i * WINDOW : (i + 1) * WINDOW] for i in range(WINDOWS)]
            stream = stream[WINDOW * WINDOWS :]
        else:
            stream, windows = np.random.default_rng(0).integers(259, texts.TINYLLAMA_VOCAB, 150_000).tolist(), []
        if not entrants:
            raise SystemExit(f"nobody takes part in {shape} with --rows {','.join(options.rows)}")
        for group in fitting_groups(entrants, texts.weight_bytes(Path(entrants[0].spec["path"]))[1]):
            print(f"{shape}: {', '.join(entrant.label for entrant in group)}", file=sys.stderr, flush=True)
            failures = measure(group, Prompts(stream), windows, options, meter)
            result["failures"] += [f"{shape}: {failure}" for failure in failures]
        rows, missed = judge(shape, entrants, compare=bool(options.peers))
        result["shapes"][shape] = rows
        result["missed"] += missed
        reached = dict.fromkeys(describe(row["ceilings"]) for row in rows)  # one line for each group of rows
        print(f"\n{shape}: {'; '.join(reached)}\n{table(rows)}\n", flush=True)
    finish(result, meter, options.json)
    if options.plot:
        plot(result, options.plot)
    short = {"benchmark": "decode", "ok": result["ok"]}
    for shape, rows in result["shapes"].items():
        short[shape] = {f"{row['name']} {row['form']}": [row["prefill"], row["decode"]] for row in rows}
    print(json.dumps(short))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
