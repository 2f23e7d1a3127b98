"""What fine-tuning on a task buys, and what it costs: SmolLM2-135M asked whether a review is positive or negative.

    python benchmarks/reviews.py --out runs/reviews            # 100, 500, 1,000 and all examples, three seeds
    python benchmarks/reviews.py --out runs/reviews --counts 100 500 --seeds 0
    python benchmarks/reviews.py --out runs/reviews --keep     # goes on where an earlier run ended

Sentences of product reviews with the mean of twenty people's ratings (Hutto and Gilbert 2014), the split by a hash of their text.
Before: the majority label, and the model prompted with 0, 1 and 5 solved examples. After: `fastllm sft` on so many examples, the
checkpoint chosen on the validation split, the accuracy read once on the test split, by the likelihood of the two labels.

Beside it, what the model forgets: sarcastic headlines, MMLU questions, and bits per byte of Wikipedia passages, before and after;
and again for all examples mixed with other tasks' training records and passages (`data` with several sources).

OUT gets reviews.json, reviews.png, a table reviews.md, and the run folder of each training, without its checkpoints: .6 GB each.
"""

import argparse
import itertools
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpora import packaged

from fastllm import LLM, hub
from fastllm.data.instruct import REVIEWS, Instructions, read_reviews
from fastllm.data.questions import HEADLINES, LABELS, headline, lettered
from fastllm.data.sources import Documents, split_of, write_jsonl
from fastllm.evaluate.choice import score, summarise
from fastllm.evaluate.perplexity import perplexity
from fastllm.files import Replacing
from fastllm.models.text import read_text
from fastllm.train import SftOptions, sft
from fastllm.train.checkpoint import Checkpoints

MODEL = "smollm2-135m"
FRACTIONS = {"train": 0.7, "validation": 0.1, "test": 0.2}
NAMES = ("negative", "positive")
LONGEST = 512
PASSAGES = 40  # whose bits per byte are measured
PASSES = {100: 12, 500: 2}  # over the examples; 1 where there are more


class Reviews:
    """The sentences by split, and what a model is asked about them."""

    def __init__(self, seed: int):
        records = read_reviews(packaged("reviews") / "amazonReviewSnippets_GroundTruth.txt")
        self.splits: dict[str, list[dict[str, Any]]] = {name: [] for name in FRACTIONS}
        for record in records:
            self.splits[split_of(record["text"], FRACTIONS)].append(record)
        self.seed = seed

    def instructions(self, tokenizer, shots: int = 0) -> Instructions:
        return Instructions(REVIEWS["classify"], tokenizer, LONGEST, self.splits["train"], shots, self.seed)

    def questions(self, tokenizer, split: str, shots: int = 0) -> list[dict[str, Any]]:
        make = self.instructions(tokenizer, shots)
        return [make.options(r, "label", NAMES, i) for i, r in enumerate(self.splits[split])]

    def write(self, tokenizer, folder: Path, count: int) -> tuple[Path, Path]:
        """The first `count` records to train on, and those of the validation split."""
        make = self.instructions(tokenizer)
        paths = folder / f"train-{count}.jsonl", folder / "validation.jsonl"
        chosen = self.splits["train"][:count], self.splits["validation"]
        for path, records in zip(paths, chosen, strict=True):
            write_jsonl(path, (make(r, i) for i, r in enumerate(records)))
        return paths


class Others:
    """What was not trained on, and may be forgotten; and records of the same kinds to train on beside."""

    def __init__(self, seed: int, count: int):
        questions = packaged("questions")
        self.headlines = [d.fields for d in Documents(questions / "sarcasm/samples.jsonl", apply=headline)]
        self.mmlu = [d.fields for d in Documents(questions / "sandbagging/samples-all-large.jsonl", apply=lettered)]
        self.passages = [d.text for d in Documents(packaged("passages") / "wikipedia_5.jsonl", text="0")]
        self.count, self.seed = count, seed

    def measure(self, llm: LLM) -> dict[str, float]:
        make = Instructions(HEADLINES, llm.tokenizer, LONGEST, seed=self.seed)
        asked = [make.options(h, "label", list(LABELS.values()), i) for i, h in enumerate(self.headlines[: self.count])]
        texts = [{"text": p} for p in self.passages[:PASSAGES]]
        return {
            "sarcasm": summarise(score(llm, asked))["accuracy"],
            "mmlu": summarise(score(llm, self.mmlu[: self.count]))["accuracy"],
            "bits_per_byte": perplexity(llm, texts).bits_per_byte,
        }

    def write(self, tokenizer, folder: Path) -> dict[str, str]:
        """Records behind those that are measured, by source."""
        make = Instructions(HEADLINES, tokenizer, LONGEST, seed=self.seed)
        sources = {
            "headlines": (make(h, i) for i, h in enumerate(self.headlines[self.count :][: self.count])),
            "questions": (
                {"prompt": q["prompt"], "completion": q["choices"][q["answer"]]}
                for q in self.mmlu[self.count :][: self.count]
            ),
            "passages": ({"text": p} for p in self.passages[PASSAGES:][: self.count]),
        }
        return {name: str(_written(folder / f"{name}.jsonl", records)) for name, records in sources.items()}


def _written(path: Path, records) -> Path:
    write_jsonl(path, records)
    return path


def train(options, out: Path, data: Any, validation: Path, steps: int, seed: int) -> dict[str, Any]:
    begun = time.perf_counter()
    report = sft(
        SftOptions(
            model=MODEL, data=data, out=str(out), validation=str(validation), test=0, steps=steps, seed=seed, lr=options.lr,
            warmup=min(10, steps // 4), tokens=options.tokens, max_length=LONGEST, eval_every=max(1, steps // 4), samples=0,
            validation_tokens=8000, lint="off", mix_temperature=2.0,
        ),
        resume=bool(Checkpoints(out).steps()),
    )  # fmt: skip
    return {
        "steps": report.steps,
        "best_step": report.best_step,
        "seconds": time.perf_counter() - begun,
        "model": report.model,
    }


def steps_of(path: Path, tokenizer, tokens: int, passes: float) -> int:
    total = sum(len(tokenizer.encode(r["prompt"] + r["completion"])) + 1 for r in map(json.loads, path.open()))
    return max(4, math.ceil(passes * total / tokens))


def before(reviews: Reviews, others: Others, shots: list[int]) -> dict[str, Any]:
    """The majority, the model prompted, and what it knows of the other tasks."""
    llm = LLM(MODEL, dtype="float32")
    answers = [NAMES.index(r["label"]) for r in reviews.splits["test"]]
    prompted = {str(k): summarise(score(llm, reviews.questions(llm.tokenizer, "test", k)))["accuracy"] for k in shots}
    return {
        "examples": {name: len(records) for name, records in reviews.splits.items()},
        "majority": max(answers.count(0), answers.count(1)) / len(answers),
        "prompted": prompted,
        "before": others.measure(llm),
        "tuned": [],
    }


def after(options, out: Path, reviews: Reviews, others: Others, count: int, mixed: bool) -> dict[str, Any]:
    """A training, and the same measures of what came of it."""
    tokenizer = read_text(hub.resolve(MODEL))[0]
    data, validation = reviews.write(tokenizer, out, count)
    steps = steps_of(data, tokenizer, options.tokens, PASSES.get(count, 1))
    sources: Any = {"reviews": str(data), **others.write(tokenizer, out)} if mixed else str(data)
    folder = out / named(count, mixed)
    made = train(options, folder, sources, validation, steps * (2 if mixed else 1), reviews.seed)
    shutil.rmtree(folder / "checkpoints")  # 1.6 GB each; the best one is in `model`
    llm = LLM(made["model"], dtype="float32")
    accuracy = summarise(score(llm, reviews.questions(tokenizer, "test")))["accuracy"]
    return {"count": count, "mixed": mixed, "accuracy": accuracy, "after": others.measure(llm)} | made


def named(count: int, mixed: bool) -> str:
    return f"{count}-mixed" if mixed else str(count)


def run(options, seed: int, found: dict[str, Any], keep: Callable[[], None]) -> None:
    """What is missing of a seed; `keep` is called when something was added."""
    out = Path(options.out) / f"seed-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    reviews, others = Reviews(seed), Others(seed, options.others)
    if not found:
        found |= before(reviews, others, options.shots)
        told = {name: found[name] for name in ("majority", "prompted", "before")}
        print(f"seed {seed}: {told}", flush=True)
        keep()
    everything = len(reviews.splits["train"])
    runs = [(min(count or everything, everything), False) for count in options.counts]
    there = [(row["count"], row["mixed"]) for row in found["tuned"]]
    for count, mixed in [*runs, (everything, True)][: len(runs) + options.mix]:
        if (count, mixed) not in there:
            row = after(options, out, reviews, others, count, mixed)
            found["tuned"].append(row)
            told = f"{row['accuracy']:.3f} after {row['seconds']:.0f} s, others {row['after']}"
            print(f"  {named(count, mixed)}: {told}", flush=True)
            keep()


# -------------------------------------------------------------------------------------------------------------- report


def table(results: list[dict[str, Any]]) -> str:
    """Means over the seeds, with the half of the spread where there are several."""

    def shown(values: list[float]) -> str:
        spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    def others(rows: list[dict[str, float]]) -> str:
        return " | ".join(shown([row[name] for row in rows]) for name in ("sarcasm", "mmlu", "bits_per_byte"))

    lines = ["| | reviews | sarcasm | MMLU | Wikipedia, bits a byte |", "|---|---|---|---|---|"]
    lines.append(f"| majority | {shown([r['majority'] for r in results])} | | | |")
    for shots in results[0]["prompted"]:
        last = others([r["before"] for r in results]) if shots == "0" else " | | "
        lines.append(f"| {shots} shots | {shown([r['prompted'][shots] for r in results])} | {last} |")
    for rows in zip(*(r["tuned"] for r in results), strict=True):
        name = f"{rows[0]['count']:,} examples" + (", mixed" if rows[0]["mixed"] else "")
        lines.append(f"| {name} | {shown([r['accuracy'] for r in rows])} | {others([r['after'] for r in rows])} |")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), dpi=140)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    counts = [row["count"] for row in results[0]["tuned"] if not row["mixed"]]
    means = [statistics.mean(r["tuned"][i]["accuracy"] for r in results) for i in range(len(counts))]
    left.plot(counts, means, marker="o", color="#0b62c4", label="fine-tuned")
    for result in results:
        left.plot(counts, [row["accuracy"] for row in result["tuned"][: len(counts)]], ".", color="#9fb8d8")
    levels = [("majority", statistics.mean(r["majority"] for r in results))]
    levels += [(f"{k} shots", statistics.mean(r["prompted"][k] for r in results)) for k in results[0]["prompted"]]
    for (name, level), style in zip(levels, itertools.cycle((":", "--", "-.", "-"))):
        left.axhline(level, color="#6b7280", linestyle=style, linewidth=1, label=name)
    left.set(xscale="log", xlabel="examples", ylabel="accuracy on the test split", title="What fine-tuning buys")
    left.legend(frameon=False, fontsize=8)
    last = [row for row in results[0]["tuned"] if row["count"] == max(counts)]
    names = ["before", *("mixed" if row["mixed"] else "reviews alone" for row in last)]
    for offset, task in enumerate(("sarcasm", "mmlu")):
        values = [statistics.mean(r["before"][task] for r in results)]
        for one in last:
            place = results[0]["tuned"].index(one)
            values.append(statistics.mean(r["tuned"][place]["after"][task] for r in results))
        right.bar(
            [i + 0.4 * offset for i in range(len(names))],
            values,
            0.36,
            label=task,
            color=("#0b62c4", "#9fb8d8")[offset],
        )
    right.set_xticks([i + 0.2 for i in range(len(names))], names)
    right.set(ylabel="accuracy", title="What it forgets")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, format="png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 500, 1000, 0], help="examples; 0: all")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 1, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--others", type=int, default=200, help="records of each other task")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--no-mix", dest="mix", action="store_false", help="leave the mixture out")
    parser.add_argument("--keep", action="store_true", help="go on where an earlier run to --out ended")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    found = kept(out / "reviews.json", vars(options)) if options.keep else {}

    def keep() -> None:
        whole = shared(list(found.values()))
        with Replacing(out) as files:
            files.write("reviews.json", json.dumps({"options": vars(options), "seeds": found}, indent=1) + "\n")
            if whole:
                files.write("reviews.md", table(whole))
                draw(whole, files.part("reviews.png"))

    for seed in options.seeds:
        run(options, seed, found.setdefault(str(seed), {}), keep)
    print(table(shared(list(found.values()))))


def shared(seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of those that have begun, the trainings that all of them have, in one order."""

    def kind(row: dict[str, Any]) -> tuple[bool, int]:
        return row["mixed"], row["count"]

    begun = [seed for seed in seeds if seed.get("tuned")]
    common = set.intersection(*({kind(row) for row in seed["tuned"]} for seed in begun)) if begun else set()
    return [seed | {"tuned": sorted((r for r in seed["tuned"] if kind(r) in common), key=kind)} for seed in begun]


def kept(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The seeds of an earlier run by the same options; an exit that says why, where they differ."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    differ = [k for k in given.keys() - {"keep", "out", "seeds"} if earlier["options"].get(k) != given[k]]
    if differ:
        raise SystemExit(
            f"--keep: {path} has other {', '.join(sorted(differ))}; leave --keep out, or give another --out"
        )
    return earlier["seeds"]


if __name__ == "__main__":
    main()
