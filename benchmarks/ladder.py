"""What each step of history bought: language models from n-grams to the Transformer on the same text, to the same measure.

    python benchmarks/ladder.py --steps 1500 --seeds 0 1 2 --out ladder
    python benchmarks/ladder.py --seconds 60 --seeds 0 --rungs unigram kneser-ney lstm transformer --out ladder
    python benchmarks/ladder.py --data "corpus/*.jsonl" --text body --steps 5000 --out ladder

All share the text, its splits by hash, the tokenizer (BPE, learned from the training split), and sequences of `--longest` tokens.
The neural ones share the step loop, the loss, AdamW and its schedule, the order of the batches of a seed, the width of a token's
vector and, within a few percent, the number of parameters: their hidden width is fitted to the Transformer's. The budget is the
same number of tokens (`--steps` batches of `--tokens`) or, with `--seconds`, the same time: each then takes as many steps as its
speed allows. Of each run the checkpoint with the lowest validation loss is kept; the order of the n-grams is chosen on it,
too. Test is read once, at the end: bits per byte, end of text included, over the same bytes for all.

A folder OUT gets ladder.json (all figures), ladder.png (bits per byte of each, and over the tokens seen), gradient.png (how far
back a gradient reaches, at the beginning and after training), and the runs. Memory: weights, moments and the most that a step
allocates beside them; of n-grams the most that counting holds. Years are those of the first known language model of a kind:
Shannon 1948; Chen & Goodman 1998; Bengio et al. 2003; Mikolov et al. 2010; Sundermeyer et al. 2012; word2vec 2013; Cho et al.
2014; Cheng et al. 2016; Vaswani et al. 2017. word2vec predicts no text: its neighbours and analogies are printed.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from corpora import packaged
from ladder_plots import draw_gradients, draw_ladder
from ladder_words import neighbours, questions
from workers import aligned, machine, versions

from fastllm.bench.harness import peak_memory
from fastllm.data.batch import Batches, Example
from fastllm.data.sources import Documents
from fastllm.data.tokenizer import Tokenizer
from fastllm.files import Replacing
from fastllm.models import baselines
from fastllm.models.baselines import FeedForward, FeedForwardConfig, KneserNey, Recurrent, RecurrentConfig
from fastllm.models.baselines.word2vec import SkipGram, SkipGramConfig, skip_gram_loss
from fastllm.models.decoder import Decoder, DecoderConfig
from fastllm.models.initial import initialise
from fastllm.train.checkpoint import Checkpoints
from fastllm.train.loop import LoopOptions, fit
from fastllm.train.objective import next_token_loss

PASSAGES = ("owt_5.jsonl", "wikipedia_5.jsonl")  # where no --data is given
FRACTIONS = {"train": 0.9, "validation": 0.05, "test": 0.05}
ORDERS = range(2, 9)
PROBES, REACH = 32, 96  # sequences, and how far back a gradient is looked for
WARM = 8  # steps from which the speed is told, where the budget is a time


@dataclass(frozen=True)
class Sizes:
    """Of the Transformer, and what the others share with it."""

    vocab: int
    dim: int
    layers: int
    longest: int

    def decoder(self) -> DecoderConfig:
        heads = max(1, self.dim // 32)
        ffn = -(-8 * self.dim // 3 // 32) * 32
        return DecoderConfig(
            vocab=self.vocab, layers=self.layers, dim=self.dim, ffn=ffn, heads=heads, kv_heads=heads, head_dim=32,
            max_position=self.longest, tied=True,
        )  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """A neural model. make(sizes, hidden): of that hidden width; None: it has none to choose."""

    title: str
    year: int
    lr: float
    make: Callable[[Sizes, int], torch.nn.Module]
    fitted: bool = True


def recurrent(cell: str, attention: bool = False) -> Callable[[Sizes, int], Recurrent]:
    return lambda s, hidden: Recurrent(RecurrentConfig(s.vocab, s.dim, hidden, 1, cell, attention))


NEURAL = {
    "feed-forward": Rung(
        "feed-forward, 5 tokens", 2003, 8e-3, lambda s, hidden: FeedForward(FeedForwardConfig(s.vocab, s.dim, hidden, 5))
    ),
    "rnn": Rung("Elman RNN", 2010, 5e-3, recurrent("rnn")),
    "lstm": Rung("LSTM", 2012, 1e-2, recurrent("lstm")),
    "gru": Rung("GRU", 2014, 8e-3, recurrent("gru")),
    "lstm-attention": Rung("LSTM with attention", 2016, 8e-3, recurrent("lstm", True)),
    "transformer": Rung("Transformer", 2017, 6e-3, lambda s, _: Decoder(s.decoder()), False),
}  # fmt: skip
COUNTED = {"unigram": ("unigram", 1948), "kneser-ney": ("Kneser-Ney", 1998)}
WORD2VEC = "word2vec"
RUNGS = ("unigram", "kneser-ney", "feed-forward", "rnn", "lstm", WORD2VEC, "gru", "lstm-attention", "transformer")


# ------------------------------------------------------------------------------------------------------------- the data


class Text:
    """The documents of every split as token ids, end of text on both sides, and how many bytes they are."""

    def __init__(self, options):
        self.paths = options.data or [packaged("passages") / name for name in PASSAGES]
        self.field = options.text if options.data else "0"
        self.longest, self.tokens = options.longest, options.tokens
        found = {split: [d.text for d in self.documents(split)] for split in FRACTIONS}
        self.tokenizer = Tokenizer.train(found["train"], options.vocab)
        self.eos = self.tokenizer.eos_id
        encoded = {s: self.tokenizer.encode_batch(t, add_special_tokens=False) for s, t in found.items()}
        self.ids = {s: [np.array([self.eos, *ids, self.eos]) for ids in e] for s, e in encoded.items()}
        self.bytes = {split: sum(len(t.encode()) for t in each) for split, each in found.items()}

    def documents(self, split: str, **more) -> Documents:
        return Documents(self.paths, text=self.field, bad="skip", split=split, fractions=FRACTIONS, **more)

    def encode(self, document, index: int) -> list[Example]:
        ids = self.tokenizer.encode(document.text, add_special_tokens=False)
        return Example.next_tokens([self.eos, *ids, self.eos]).pieces(self.longest)

    def batches(self, seed: int) -> Batches:
        return Batches(
            self.documents("train", shuffle=4096, epochs=None, seed=seed), self.encode, self.tokens, seed=seed
        )

    def bits(self, nats: float, split: str) -> float:
        """Per byte."""
        return nats / math.log(2) / self.bytes[split]

    def count(self, split: str) -> int:
        """Predictions."""
        return sum(len(d) - 1 for d in self.ids[split])

    def probes(self) -> list[np.ndarray]:
        """Sequences for `gradient_by_distance`, out of the test split: real text, never trained on."""
        length = min(REACH, self.longest) + 1
        cut = [d[at : at + length] for d in self.ids["test"] for at in range(0, len(d) - length + 1, length)]
        if not cut:
            raise SystemExit(
                f"no document of the test split has {length} tokens; give longer ones, or a smaller --longest"
            )
        return cut[:: max(1, len(cut) // PROBES)][:PROBES]


# ----------------------------------------------------------------------------------------------------------- the rungs


@dataclass
class Row:
    """A rung and what was measured of it; bits, seconds, ...: one a seed."""

    name: str
    title: str
    year: int
    parameters: int = 0
    bits: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: int = 0
    curves: list[list[tuple[int, float]]] = field(default_factory=list)
    gradients: dict[str, list[list[float]]] = field(default_factory=dict)
    notes: dict = field(default_factory=dict)


def count_ngrams(name: str, text: Text) -> Row:
    """Unigrams, or the Kneser-Ney model of the order that is best on validation."""
    orders, tried, best = [1] if name == "unigram" else ORDERS, {}, None
    for order in orders:
        start = time.perf_counter()
        model = KneserNey(text.ids["train"], len(text.tokenizer), order)
        seconds = time.perf_counter() - start
        tried[order] = text.bits(baselines.held_out_nats(model, text.ids["validation"]), "validation")
        if best is None or tried[order] < tried[best[1].order]:
            best = seconds, model
    seconds, model = best
    tracemalloc.start()
    KneserNey(text.ids["train"], len(text.tokenizer), model.order)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    title, year = COUNTED[name]
    row = Row(name, title if name == "unigram" else f"{title}, order {model.order}", year, model.size, memory=memory)
    row.bits = [text.bits(baselines.held_out_nats(model, text.ids["test"]), "test")]
    row.validation, row.tokens, row.seconds = [tried[model.order]], [text.count("train")], [seconds]
    row.notes = {"validation_by_order": tried, "discounts": model.discounts, "fallback": model.fallback}
    return row


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def fitted(rung: Rung, sizes: Sizes) -> int:
    """The hidden width, a multiple of 8, with which a rung has about as many parameters as the Transformer."""
    with torch.device("meta"):
        wanted = parameters(Decoder(sizes.decoder()))
        low, high = 1, 1
        while parameters(rung.make(sizes, 8 * high)) < wanted:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if parameters(rung.make(sizes, 8 * middle)) < wanted else (low, middle)
        return min((8 * low, 8 * high), key=lambda h: abs(parameters(rung.make(sizes, h)) - wanted))


def step_memory(model: torch.nn.Module, batch, loss) -> int:
    """Bytes of the weights, their two moments and the most that a step allocates beside them."""
    static = 3 * sum(p.nbytes for p in model.parameters())

    def step() -> None:
        loss(model, batch).backward()

    step()  # what is made once
    model.zero_grad()
    peak = peak_memory(step, "cpu")
    model.zero_grad()
    return static + peak


@dataclass
class Course:
    """One training: tokens seen, seconds without those of validation, the best validation and its step, all of them."""

    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)


def train(
    model, text: Text, seed: int, options, lr: float, loss, out: Path, validate=None, decay: float = 0.1
) -> Course:
    """Trains a model with the order of a seed, from nothing."""
    course, spent = Course(), 0.0

    def timed(m) -> float:
        nonlocal spent
        start = time.perf_counter()
        found = validate(m)
        spent += time.perf_counter() - start
        return found

    def watch(record) -> None:
        course.tokens = record.get("tokens", course.tokens)
        if "validation" in record:
            course.curve.append((course.tokens, record["validation"]))

    steps = steps_in(model, text, seed, loss, options.seconds) if options.seconds else options.steps
    every = max(1, steps // options.points)
    loop = LoopOptions(
        steps=steps, lr=lr, warmup=min(steps // 3, 100), final_lr=0.05, weight_decay=decay, log_every=every,
        eval_every=every if validate else 0, keep_last=1,
    )  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    report = fit(model, text.batches(seed), loss, out, loop, validate=timed if validate else None, watch=[watch])
    course.seconds = time.perf_counter() - start - spent
    course.best, course.best_step = report.best, report.best_step
    return course


def steps_in(model, text: Text, seed: int, loss, seconds: float) -> int:
    """How many steps a time allows, by a few that change nothing; an update costs little beside them."""
    batches = text.batches(seed)
    start = 0.0
    for number in range(WARM + 1):
        loss(model, next(batches)).backward()
        start = start if number else time.perf_counter()
    model.zero_grad(set_to_none=True)
    return max(1, round(seconds * WARM / (time.perf_counter() - start)))


def climb(name: str, text: Text, sizes: Sizes, options) -> Row:
    """Trains a neural rung with every seed."""
    rung = NEURAL[name]
    hidden = fitted(rung, sizes) if rung.fitted else 0
    row = Row(name, rung.title, rung.year, notes={"hidden": hidden, "lr": rung.lr})
    probes = text.probes()

    def validate(model) -> float:
        return text.bits(baselines.held_out_nats(model, text.ids["validation"], text.longest), "validation")

    for seed in options.seeds:
        print(f"  {name}, seed {seed}", file=sys.stderr, flush=True)
        torch.manual_seed(seed)
        model = rung.make(sizes, hidden)
        if isinstance(model, Decoder):
            initialise(model, seed)
        row.parameters = parameters(model)
        row.memory = row.memory or step_memory(model, next(text.batches(seed)), next_token_loss)
        row.gradients.setdefault("initial", []).append(baselines.gradient_by_distance(model, probes).tolist())
        out = options.out / "runs" / f"{name}-{seed}"
        course = train(model, text, seed, options, rung.lr, next_token_loss, out, validate)
        Checkpoints(out).load(model, step=course.best_step)
        row.gradients.setdefault("trained", []).append(baselines.gradient_by_distance(model, probes).tolist())
        row.bits.append(text.bits(baselines.held_out_nats(model, text.ids["test"], text.longest), "test"))
        row.validation.append(course.best)
        row.tokens.append(course.tokens)
        row.seconds.append(course.seconds)
        row.curves.append(course.curve)
    return row


# ------------------------------------------------------------------------------------------------------------ word2vec


def embed(text: Text, options) -> Row:
    """Trains vectors with every seed; neighbours and analogies are those of the first."""
    row = Row(WORD2VEC, "word2vec", 2013)
    counts = torch.from_numpy(np.bincount(np.concatenate(text.ids["train"]), minlength=len(text.tokenizer)))
    asked = questions(text.tokenizer)
    for seed in options.seeds:
        print(f"  {WORD2VEC}, seed {seed}", file=sys.stderr, flush=True)
        torch.manual_seed(seed)
        model = SkipGram(SkipGramConfig(len(text.tokenizer), options.dim), counts)
        row.parameters = parameters(model)
        row.memory = row.memory or step_memory(model, next(text.batches(seed)), skip_gram_loss)
        out = options.out / "runs" / f"{WORD2VEC}-{seed}"
        course = train(model, text, seed, options, 5e-3, skip_gram_loss, out, decay=0.0)
        row.tokens.append(course.tokens)
        row.seconds.append(course.seconds)
        scores = {kind: baselines.analogies(model, each) for kind, each in asked.items() if each}
        row.notes.setdefault("analogies", []).append(scores)
        row.notes.setdefault("neighbours", neighbours(model, text.tokenizer))
    row.notes["questions"] = {kind: len(each) for kind, each in asked.items()}
    row.notes["chance"] = 1 / (len(text.tokenizer) - 3)
    return row


def vectors_report(row: Row) -> str:
    """Neighbours and analogies as text."""
    lines = ["word2vec, the nearest tokens:"]
    lines += [f"  {w}: {', '.join(near)}" for w, near in row.notes["neighbours"].items()]
    scores = row.notes["analogies"]
    for kind, count in row.notes["questions"].items():
        if count:
            mean = statistics.mean(s[kind] for s in scores)
            lines.append(
                f"  analogies of {kind}: {mean:.1%} of {count} questions (by chance {row.notes['chance']:.2%})"
            )
        else:
            lines.append(f"  analogies of {kind}: too few of its words are tokens")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- the report


def spread(values: list[float]) -> str:
    """mean ± half of the range."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def table(rows: list[Row]) -> str:
    lines = [["rung", "year", "parameters", "bits per byte", "tokens", "seconds", "tokens/s", "memory MB"]]
    for r in rows:
        speed = statistics.mean(t / s for t, s in zip(r.tokens, r.seconds, strict=True))
        cells = [r.title, str(r.year), f"{r.parameters:,}", spread(r.bits) if r.bits else "-"]
        cells += [f"{statistics.mean(r.tokens):,.0f}", f"{statistics.mean(r.seconds):.1f}", f"{speed:,.0f}"]
        lines.append([*cells, f"{r.memory / 1e6:.0f}"])
    return aligned(lines, left=1)


def verdict(rows: list[Row]) -> str:
    """Who beats Kneser-Ney, and after how many tokens on validation."""
    found = {r.name: r for r in rows}
    if "kneser-ney" not in found:
        return ""
    bar, lines = found["kneser-ney"], []
    for r in rows:
        if r.name in NEURAL:
            worst, margin = max(r.bits), statistics.mean(r.bits) - bar.bits[0]
            word = "below" if worst < bar.bits[0] else "not in every seed below"
            passed = [next((t for t, bits in c if bits < bar.validation[0]), None) for c in r.curves]
            after = [t for t in passed if t is not None]
            when = f"; on validation after {max(after):,} tokens" if len(after) == len(passed) else ""
            lines.append(f"{r.title}: {margin:+.3f} bits per byte, {word} {bar.title}{when}")
    return "\n".join(lines)


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", help="files, folders or globs; default: OpenWebText and Wikipedia")
    parser.add_argument("--text", default="text", help="the field of a record that holds the text")
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS), choices=RUNGS)
    parser.add_argument("--steps", type=int, default=1500, help="of every neural rung")
    parser.add_argument("--seconds", type=float, help="of training for every neural rung, in place of --steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch")
    parser.add_argument("--longest", type=int, default=128, help="tokens of a sequence, even")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=128, help="of a token's vector, a multiple of 32")
    parser.add_argument("--layers", type=int, default=4, help="of the Transformer")
    parser.add_argument("--points", type=int, default=8, help="validations of a run")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--keep", action="store_true", help="go on where an earlier run to --out ended")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    least = {"steps": 1, "tokens": 2, "longest": 2, "dim": 32, "layers": 1, "points": 1}
    for flag, low in least.items():
        if getattr(options, flag) < low:
            parser.error(f"--{flag}: {getattr(options, flag)}; allowed: at least {low}")
    if options.dim % 32 or options.longest % 2 or options.longest > options.tokens:
        parser.error(
            f"--dim {options.dim}, --longest {options.longest}, --tokens {options.tokens}; allowed: a multiple of 32, an even "
            "number, at least --longest"
        )
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds: {options.seconds}; allowed: above 0")
    options.rungs = [name for name in RUNGS if name in options.rungs]
    return options


def main(arguments=None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    text = Text(options)
    sizes = Sizes(len(text.tokenizer), options.dim, options.layers, options.longest)
    budget = f"{options.seconds:g} seconds" if options.seconds else f"{options.steps * options.tokens:,} tokens at most"
    print(
        f"{len(text.ids['train'])} documents, {text.count('train'):,} tokens of {len(text.tokenizer)} kinds to train on; test: "
        f"{len(text.ids['test'])} documents, {text.bytes['test']:,} bytes. Budget of a neural rung and seed: {budget}"
    )
    result = {
        "command": " ".join(["ladder.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "machine": machine(),
        "versions": versions(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "documents": {split: len(d) for split, d in text.ids.items()},
        "tokens": {split: text.count(split) for split in text.ids},
        "bytes": text.bytes,
    }
    found = kept(options.out / "ladder.json", result["settings"]) if options.keep else {}
    for name in options.rungs:
        if name in found:
            continue
        if name in COUNTED:
            found[name] = count_ngrams(name, text)
        else:
            found[name] = embed(text, options) if name == WORD2VEC else climb(name, text, sizes, options)
        write(result, found, options.out)  # what is there, if it is cut off
    rows = write(result, found, options.out)
    print(table(rows))
    print(verdict(rows))
    print("\n".join(vectors_report(row) for row in rows if row.name == WORD2VEC))
    print(json.dumps({"benchmark": "ladder", "bits": {row.name: row.bits for row in rows if row.bits}}))
    return 0


def kept(path: Path, settings: dict) -> dict[str, Row]:
    """Rungs of an earlier run by the same settings; an exit that says why, where they differ."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    free = ("rungs", "keep", "out")
    differ = [key for key, value in settings.items() if key not in free and earlier["settings"].get(key) != value]
    if differ:
        raise SystemExit(
            f"--keep: {path} was measured with other {', '.join(differ)}; leave --keep out, or give another --out"
        )
    return {row["name"]: Row(**row) for row in earlier["rows"]}


def write(result: dict, found: dict[str, Row], out: Path) -> list[Row]:
    """ladder.json and the pictures, whole or not at all; the rows in the order of history."""
    rows = [found[name] for name in RUNGS if name in found]
    with Replacing(out) as files:
        files.write("ladder.json", json.dumps(result | {"rows": [vars(row) for row in rows]}, indent=1) + "\n")
        if any(row.bits for row in rows):
            draw_ladder(rows, files.part("ladder.png"))
        if any(row.gradients for row in rows):
            draw_gradients(rows, files.part("gradient.png"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
