"""Serving: fastllm, llama.cpp and transformers under the same load of requests that come when they come.

    python benchmarks/serve_load.py
    python benchmarks/serve_load.py --rates 0.5,1,2,inf --requests 48 --contenders fastllm,llama.cpp --plot load.png

The load: gaps between arrivals are exponential (a Poisson process) of the given rates in requests a second, `inf` is all
at once; lengths of prompts and of answers are even in the logarithm; prompts are real text, of which no two are alike, but
a share of them begins with one of a few common prefixes. A seed makes it all, and every contender and rate has the same
requests in the same order. Answers are greedy and of fixed length, so that all do the same work.

Every contender waits in a worker process (`servers.py`), stopped by SIGSTOP while another is measured; at each rate they
take turns, each from an empty cache. A round's sample is thrown away when other processes were busy, as in `decode.py`.

Times are counted from when a request was due, not from when it was sent: who keeps the client waiting pays for it, and a
slow answer delays no later request. To the first token: TTFT. Per token: from the first token to the last of a request,
over all but the first. Gap: between two tokens of a request, all together. "Client" is the CPU time of Python threads
outside of the model's steps, in cores; "outside" is the share of the time with a request at hand in which no step ran.

The exit status is 1 when a contender is missing or gives other tokens, or the machine was not quiet. Left out: HTTP.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import texts
from decode import FORMS, REAL, files
from workers import Meter, Worker, aligned, environment, finish, machine, versions

from fastllm import hub

CONTENDERS = ("fastllm", "llama.cpp", "transformers")
AGREE = 0.75  # of the first tokens, at least, are those of the first contender: fewer, and one of them is broken
PERCENTILES = (50, 99)


# ------------------------------------------------------------------------------------------------------------- the load


@dataclass(frozen=True)
class Request:
    """at: seconds after the beginning; new: tokens to generate."""

    at: float
    prompt: list[int]
    new: int


@dataclass(frozen=True)
class Mix:
    """Of what a load is made. prompt, answer: shortest and longest, in tokens; a share of the prompts have one of `prefixes`
    common prefixes of `prefix` tokens before their own."""

    prompt: tuple[int, int] = (32, 512)
    answer: tuple[int, int] = (16, 128)
    shared: float = 0.5
    prefix: int = 128
    prefixes: int = 2

    @property
    def longest(self) -> int:
        return self.prefix * (self.shared > 0) + self.prompt[1] + self.answer[1]


def schedule(stream: list[int], count: int, seed: int, mix: Mix) -> list[Request]:
    """Requests at one a second on average; the first n of them do not depend on how many there are. Prompts are cut from
    `stream` one after the other."""
    random, place = np.random.default_rng(seed), mix.prefixes * mix.prefix
    at, requests = 0.0, []
    for _ in range(count):
        gap, prompt, answer, share, which = random.random(5)
        at -= math.log1p(-gap)
        length, new = (even_in_logarithm(u, *ends) for u, ends in ((prompt, mix.prompt), (answer, mix.answer)))
        if place + length > len(stream):
            raise ValueError(
                f"{count} requests with prompts of {mix.prompt} tokens need more text than the {len(stream)} tokens that "
                "there are; ask for fewer, or shorter ones"
            )
        begin = mix.prefix * int(which * mix.prefixes)
        common = stream[begin : begin + mix.prefix] if share < mix.shared else []
        requests.append(Request(at, common + stream[place : place + length], new))
        place += length
    return requests


def even_in_logarithm(u: float, low: int, high: int) -> int:
    """An integer in [low, high] for u in [0, 1)."""
    return min(high, math.floor(low * ((high + 1) / low) ** u))


def at_rate(requests: list[Request], rate: float) -> list[Request]:
    """The same requests at so many a second; inf: all at once."""
    return [replace(request, at=request.at / rate) for request in requests]


def warm_up(requests: list[Request], slots: int, longest: int) -> list[Request]:
    """As many requests as run together, at once, that end one after the other: every number of rows occurs."""
    prompts = [requests[i % len(requests)].prompt[:32] for i in range(slots)]
    return [Request(0.0, prompt, min(4 * (i + 1), longest - len(prompt))) for i, prompt in enumerate(prompts)]


# --------------------------------------------------------------------------------------------------------- the figures


@dataclass
class Row:
    """A contender at a rate, over all rounds. Latencies are in seconds, each list over requests (`gap`: over tokens)."""

    name: str
    rate: float
    ttft: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)  # from when a request was due to when the contender was given it
    first: list[int] = field(default_factory=list)  # tokens
    span: float = 0.0  # from the first arrival to the last token
    busy: float = 0.0  # with a request at hand
    client: float = 0.0  # CPU seconds
    steps: float | None = 0.0
    tokens: int = 0

    def add(self, requests: list[Request], reply: dict) -> None:
        for request, handed, times in zip(requests, reply["handed"], reply["times"], strict=True):
            gaps = np.diff(times).tolist()
            self.ttft.append(times[0] - request.at)
            self.whole.append(times[-1] - request.at)
            self.late.append(handed - request.at)
            self.gap += gaps
            self.per_token += [sum(gaps) / len(gaps)] if gaps else []
            self.tokens += len(times)
        self.first += [tokens[0] for tokens in reply["tokens"]]
        stays = [(request.at, times[-1]) for request, times in zip(requests, reply["times"], strict=True)]
        self.span += max(end for _, end in stays) - min(begin for begin, _ in stays)
        self.busy += covered(stays)
        self.client += reply["client_s"]
        self.steps = None if reply["steps_s"] is None else self.steps + reply["steps_s"]

    def figures(self) -> dict:
        result = {"name": self.name, "rate": self.rate if math.isfinite(self.rate) else "inf"}
        result |= {"requests": len(self.whole), "tokens": self.tokens, "seconds": self.span}
        result |= {"tokens_per_s": self.tokens / self.span, "requests_per_s": len(self.whole) / self.span}
        for what in ("ttft", "per_token", "gap", "whole", "late"):
            values = getattr(self, what)
            result |= {f"{what}_p{p}": float(np.percentile(values, p)) if values else None for p in PERCENTILES}
        result["client_cores"] = self.client / self.span
        result["outside"] = None if self.steps is None else 1 - self.steps / self.busy
        result["samples"] = {what: getattr(self, what) for what in ("ttft", "per_token", "whole", "late")}
        return result


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def largest_rate(rows: list[dict], name: str, ttft: float, per_token: float) -> float | None:
    """The largest rate at which a contender kept the service level; None for none."""
    kept = [
        float(row["rate"])
        for row in rows
        if row["name"] == name and row["ttft_p99"] <= ttft and (row["per_token_p99"] or 0) <= per_token
    ]
    return max(kept, default=None)


# ---------------------------------------------------------------------------------------------------------- the measuring


def spec(name: str, model: Path, options, mix: Mix) -> dict:
    """What a contender's worker is told."""
    source, kwargs, gguf = files(REAL, options.form, model)
    common = {"threads": options.threads, "slots": options.slots, "context": mix.longest}
    kinds = {
        "fastllm": {"kind": "ours", "path": str(source), **kwargs},
        "llama.cpp": {"kind": "llama.cpp", "path": str(gguf), "batch": options.batch},
        "transformers": {"kind": "transformers", "path": str(model)},
    }
    return kinds[name] | common


def measure(options, model: Path, mix: Mix, rounds: list[list[Request]], meter: Meter) -> tuple[list[dict], list[str]]:
    """(a record for each contender and rate, what went wrong)"""
    workers: dict[str, Worker] = {}
    failures, rows = [], []

    def attempt(name: str, action) -> None:
        try:
            action()
        except (RuntimeError, OSError, psutil.Error) as error:
            failures.append(f"{name} is missing: {error}")
            if name in workers:
                workers.pop(name).close()

    def ask(name: str, requests: list[Request]) -> dict:
        return meter.sample(workers[name], do="serve", requests=[vars(request) for request in requests])

    def load(name: str) -> None:
        script = Path(__file__).with_name("servers.py")
        variables = environment(options.threads, tuned=name != "fastllm")
        workers[name] = Worker(script, spec(name, model, options, mix), variables)
        workers[name].ask(do="load")
        warming = warm_up(rounds[0], options.slots, mix.longest)
        workers[name].ask(do="serve", requests=[vars(request) for request in warming])

    try:
        for name in options.contenders:
            print(f"  loading {name}", file=sys.stderr, flush=True)
            attempt(name, lambda name=name: load(name))
        for rate in options.rates:
            found = {name: Row(name, rate) for name in workers}
            for number, requests in enumerate(rounds):
                sent = at_rate(requests, rate)
                for name in list(workers):
                    print(f"  {rate:g} a second, round {number + 1}: {name}", file=sys.stderr, flush=True)
                    attempt(name, lambda name=name, sent=sent, row=found[name]: row.add(sent, ask(name, sent)))
            rows += compared([row for name, row in found.items() if name in workers], failures)
    finally:
        for worker in workers.values():
            worker.close()
    return rows, failures


def compared(rows: list[Row], failures: list[str]) -> list[dict]:
    """The rows of a rate as records; a failure for each that is too far from the first one's tokens."""
    records = [row.figures() | {"same_first": None} for row in rows]
    for row, record in zip(rows[1:], records[1:], strict=True):
        same = record["same_first"] = float(np.mean([a == b for a, b in zip(row.first, rows[0].first, strict=True)]))
        if same < AGREE:
            failures.append(
                f"{row.name} at {row.rate:g} a second: {same:.0%} of the first tokens are those of {rows[0].name}, "
                f"at least {AGREE:.0%} should be"
            )
    return records


# ------------------------------------------------------------------------------------------------------------- the report


def table(rows: list[dict]) -> str:
    """The rows as text: times to the first token and of whole requests in s, per token and gaps in ms."""

    def number(value, places, scale=1.0, suffix=""):
        return "-" if value is None else f"{value * scale:.{places}f}{suffix}"

    titles = [
        "contender",
        "rate",
        "tokens/s",
        "requests/s",
        "TTFT s p50",
        "p99",
        "per token ms p50",
        "p99",
        "gap ms p99",
    ]
    lines = [[*titles, "whole s p50", "p99", "client cores", "outside", "same first"]]
    for row in rows:
        cells = [
            row["name"],
            f"{float(row['rate']):g}",
            number(row["tokens_per_s"], 1),
            number(row["requests_per_s"], 2),
        ]
        cells += [number(row[f"ttft_p{p}"], 3) for p in PERCENTILES]
        cells += [number(row[f"per_token_p{p}"], 1, 1e3) for p in PERCENTILES]
        cells += [number(row["gap_p99"], 0, 1e3)]
        cells += [number(row[f"whole_p{p}"], 2) for p in PERCENTILES]
        cells += [number(row["client_cores"], 3), number(row["outside"], 1, 100, " %")]
        lines.append([*cells, number(row["same_first"], 0, 100, " %")])
    return aligned(lines, left=1)


def plot(rows: list[dict], options, path: Path) -> None:
    """Latencies and throughput over the rate: p50 drawn through, p99 dashed, the service level dotted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, rates = {row["name"] for row in rows}, sorted({float(row["rate"]) for row in rows})
    names = [f"{rate:g}" if math.isfinite(rate) else "all at once" for rate in rates]
    panels = {
        "ttft": ("time to first token, s", 1.0, options.ttft),
        "per_token": ("time per token, ms", 1e3, options.per_token),
        "whole": ("whole request, s", 1.0, None),
        "tokens_per_s": ("output, tokens/s", 1.0, None),
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8.5))
    colors = {name: f"C{i}" for i, name in enumerate(CONTENDERS)}
    for axis, (what, (label, scale, limit)) in zip(axes.flat, panels.items(), strict=True):
        for name in found:
            mine = sorted((row for row in rows if row["name"] == name), key=lambda row: float(row["rate"]))
            x = [rates.index(float(row["rate"])) for row in mine]
            for part, style in [("", "-")] if what == "tokens_per_s" else [("_p50", "-"), ("_p99", "--")]:
                y = [math.nan if row[what + part] is None else row[what + part] * scale for row in mine]
                axis.plot(x, y, style, marker="o", markersize=4, color=colors[name])
        if limit:
            axis.axhline(limit * scale, color="black", linestyle=":", linewidth=1)
        if what != "tokens_per_s":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axis.set_ylim(bottom=0)
        axis.set_xticks(range(len(rates)), names)
        axis.set_xlabel("requests/s")
        axis.set_title(label)
        axis.grid(alpha=0.3)
    shown = [pyplot.Line2D([], [], color=colors[name], marker="o", label=name) for name in CONTENDERS if name in found]
    for style, word in (("-", "p50"), ("--", "p99"), (":", "service level")):
        shown.append(pyplot.Line2D([], [], color="black", linestyle=style, label=word))
    figure.legend(handles=shown, ncols=len(shown), loc="lower center")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    part = path.with_name(f".{path.name}")
    figure.savefig(part, dpi=130, format=path.suffix[1:] or "png")
    part.replace(path)


def earlier(path: Path, settings: dict) -> list[dict]:
    """Rows of a result that was measured with the same settings; an exit that says why, where they differ or it had failures."""
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    if kept["failures"]:
        raise SystemExit(f"--keep: {path} holds failures ({kept['failures'][0]}); measure it again without --keep")
    differ = [key for key, value in settings.items() if kept["settings"].get(key) != value]
    if differ:
        raise SystemExit(
            f"--keep: {path} was measured with other {', '.join(differ)}; leave --keep out, or name another"
        )
    return kept["rows"]


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    pair = lambda text: tuple(map(int, text.split(",")))  # noqa: E731
    mix = Mix()
    parser.add_argument("--model", default=REAL, help="alias or GGUF file")
    parser.add_argument("--form", default="stored", choices=[f for f in FORMS if FORMS[f][0] is not None])
    parser.add_argument("--contenders", type=names, default=list(CONTENDERS), help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--rates", type=lambda text: [float(r) for r in names(text)], default=[1.0, 2.0, 4.0, math.inf])
    parser.add_argument("--requests", type=int, default=48, help="in a round")
    parser.add_argument("--rounds", type=int, default=1, help="each with other requests")
    parser.add_argument("--prompt", type=pair, default=mix.prompt, help="shortest,longest, in tokens")
    parser.add_argument("--answer", type=pair, default=mix.answer, help="shortest,longest")
    parser.add_argument("--shared", type=float, default=mix.shared, help="share of prompts with a common prefix")
    parser.add_argument("--prefix", type=int, default=mix.prefix, help="tokens of a common prefix")
    parser.add_argument("--prefixes", type=int, default=mix.prefixes, help="how many different ones there are")
    parser.add_argument("--slots", type=int, default=16, help="requests that run together")
    parser.add_argument("--batch", type=int, default=2048, help="tokens of llama.cpp's batches; its server's default")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ttft", type=float, default=1.0, help="service level: p99 to the first token, seconds")
    parser.add_argument("--per-token", type=float, default=0.1, help="service level: p99 per token, seconds")
    parser.add_argument("--quiet", type=float, default=0.1, help="cores that other processes may use")
    parser.add_argument("--patience", type=float, default=600, help="seconds to spend on waiting for quiet")
    parser.add_argument("--keep", action="store_true", help="keep the rows of --json that are not measured again")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "serve_load.json")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    if unknown := set(options.contenders) - set(CONTENDERS):
        parser.error(f"--contenders: unknown {', '.join(sorted(unknown))}; choose from {', '.join(CONTENDERS)}")
    least = {"requests": 1, "rounds": 1, "slots": 1, "batch": options.slots, "threads": 1, "prefix": 0, "prefixes": 1}
    for flag, low in least.items():
        if getattr(options, flag) < low:
            parser.error(f"--{flag}: {getattr(options, flag)}; allowed: at least {low}")
    for flag in ("prompt", "answer"):
        ends = getattr(options, flag)
        if len(ends) != 2 or not 1 <= ends[0] <= ends[1]:
            parser.error(f"--{flag}: {ends}; allowed: two integers, shortest,longest, of at least 1")
    if not options.rates or not all(rate > 0 for rate in options.rates):
        parser.error(f"--rates: {options.rates}; allowed: numbers above 0, or inf")
    if not 0 <= options.shared <= 1:
        parser.error(f"--shared: {options.shared}; allowed: in [0, 1]")
    return options


def main(arguments=None) -> int:
    options = parse(arguments)
    mix = Mix(options.prompt, options.answer, options.shared, options.prefix, options.prefixes)
    model = hub.resolve(options.model)
    named = ("model", "form", "requests", "rounds", "slots", "threads", "batch", "seed")
    settings = {key: getattr(options, key) for key in named} | json.loads(json.dumps({"mix": vars(mix)}))
    kept = earlier(options.json, settings) if options.keep else []
    result = {"machine": machine(), "versions": versions(), "settings": settings}
    result["level"] = {"ttft_p99": options.ttft, "per_token_p99": options.per_token}
    result["command"] = " ".join(["serve_load.py", *(sys.argv[1:] if arguments is None else arguments)])
    stream = texts.token_stream(model)
    rounds = [schedule(stream, options.requests, options.seed + i, mix) for i in range(options.rounds)]
    meter = Meter(options.quiet, options.patience)
    rows, failures = measure(options, model, mix, rounds, meter)
    again = {(row["name"], row["rate"]) for row in rows}
    rows += [row for row in kept if (row["name"], row["rate"]) not in again]
    rows.sort(key=lambda row: (float(row["rate"]), CONTENDERS.index(row["name"])))
    result |= {"rows": rows, "failures": failures, "missed": []}
    prompts = [len(request.prompt) for requests in rounds for request in requests]
    answers = [request.new for requests in rounds for request in requests]
    print(
        f"{options.model} {options.form}, {options.slots} slots, {options.threads} threads; {len(prompts)} requests, prompts "
        f"of {min(prompts)} to {max(prompts)} tokens (mean {np.mean(prompts):.0f}), answers of {min(answers)} to "
        f"{max(answers)} ({np.mean(answers):.0f})\n{table(rows)}"
    )
    result["largest_rate"] = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        rate = result["largest_rate"][name] = largest_rate(rows, name, options.ttft, options.per_token)
        word = f"up to {rate:g} requests/s" if rate else "at none of these rates"
        print(f"{name}: TTFT p99 <= {options.ttft:g} s and p99 per token <= {options.per_token * 1e3:g} ms {word}")
        result["largest_rate"][name] = "inf" if rate == math.inf else rate
    finish(result, meter, options.json)
    if options.plot and rows:
        plot(rows, options, options.plot)
    print(json.dumps({"benchmark": "serve_load", "ok": result["ok"], "largest_rate": result["largest_rate"]}))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
