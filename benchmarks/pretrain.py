"""What a decoder, an encoder and an encoder-decoder learn from the same text in minutes, beside what counting knows of it.

    python benchmarks/pretrain.py --out runs/pretrain                       # three seeds
    python benchmarks/pretrain.py --out runs/pretrain --seeds 0 --only encoder
    python benchmarks/pretrain.py --out runs/pretrain --keep                # goes on where an earlier run ended

Text: articles of Wikipedia, curated out of a dump, and 2,000 openings of OpenWebText and Wikipedia (`corpora.py`), split by hash.
Each class is pre-trained as by `fastllm pretrain`, with a vocabulary of its own; its run folder holds options, log and plot. The
checkpoint is chosen on the validation split, figures are those of the test split, read once.

decoder        bits per byte, beside a Kneser-Ney model of the same tokens, its order chosen on the validation split.
encoder        how often a masked token is found, and nats a token, beside the unigram that is fitted to the very tokens asked
               for.
seq2seq        nats a token of the spans that were taken out, beside that unigram, and beside a Kneser-Ney model of such answers,
               which knows how they are written but not the text around them.
translation    that encoder-decoder, tuned as by `fastllm sft` on messages of a web framework, in nine languages; a message is
               in one split in all languages. BLEU and ROUGE-L of test messages by four beams, beside the message left as
               it is (names and placeholders stay in a translation), and beside a model that was not pre-trained; nats a
               token of the two models.

OUT gets pretrain.json, pretrain.md, pretrain.png, and a folder a seed.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from corpora import articles, passages, translations
from workers import machine, versions

from fastllm.bench.roofline import ACCENT, INK, MUTED
from fastllm.data.batch import Example, encode_text
from fastllm.data.corrupt import encode_spans, sentinel_ids
from fastllm.data.sources import Documents, split_of, write_jsonl
from fastllm.data.tokenizer import Tokenizer
from fastllm.decode.text2text import Text2Text
from fastllm.evaluate import tasks
from fastllm.evaluate.text import bleu, rouge
from fastllm.files import Replacing
from fastllm.models.baselines import KneserNey, held_out_nats
from fastllm.train import PretrainOptions, SftOptions, pretrain, sft
from fastllm.train.checkpoint import Checkpoints
from fastllm.train.plots import read_log

FRACTIONS = {"train": 0.9, "validation": 0.05, "test": 0.05}
ORDERS = range(2, 11)
PASSES = 4  # over the training text, with other spans each time, that answers are counted in
COMMON: dict[str, Any] = {
    "validation": FRACTIONS["validation"], "test": FRACTIONS["test"], "max_length": 128, "warmup": 100, "lint": "off",
    "validation_tokens": 60_000,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "decoder": {"preset": "nano", "vocab_size": 2048, "tokens": 2048, "steps": 4000, "lr": 6e-3},
    "encoder": {"preset": "nano", "vocab_size": 2048, "tokens": 2048, "steps": 4000, "lr": 1e-3, "mask_rate": 0.3},
    "seq2seq": {
        "preset": "nano", "vocab_size": 2048, "tokens": 2048, "steps": 4000, "lr": 2e-2, "scale_parameter": True,
    },
    "translation": {"tokens": 2048, "steps": 3000, "lr": 2e-3},
}  # fmt: skip
CLASSES = ("decoder", "encoder", "seq2seq")
WORK = (*CLASSES, "translation")


class Corpus:
    """The text on disk, and its splits."""

    def __init__(self, folder: Path):
        self.paths = [str(folder / "passages.jsonl"), str(folder / "wiki.jsonl")]
        for path, texts in zip(self.paths, (passages, articles), strict=True):
            if not Path(path).exists():
                write_jsonl(path, ({"text": text} for text in texts()))
        self.pairs = {split: folder / f"pairs-{split}.jsonl" for split in FRACTIONS}
        if not all(path.exists() for path in self.pairs.values()):
            found: dict[str, list[dict[str, str]]] = {split: [] for split in FRACTIONS}
            for each in translations():
                source = f"translate English to {each['language']}: {each['english']}"
                found[split_of(each["english"], FRACTIONS)].append({"source": source, "target": each["translation"]})
            for split, records in found.items():
                write_jsonl(self.pairs[split], records)

    def texts(self, split: str) -> list[str]:
        return [d.text for d in Documents(self.paths, split=split, fractions=FRACTIONS)]


def whole(example: Example) -> np.ndarray:
    """What an example reads and says: [n + 1]."""
    return np.append(example.ids, example.target[-1])


def counted(documents: Callable[[str], list[np.ndarray]], vocab: int) -> tuple[KneserNey, float]:
    """The Kneser-Ney model of the order that is best on validation, and its nats on test."""
    train, validation = documents("train"), documents("validation")
    models = (KneserNey(train, vocab, order) for order in ORDERS)
    model = min(models, key=lambda m: held_out_nats(m, validation))
    return model, held_out_nats(model, documents("test"))


def decoder_baseline(corpus: Corpus, out: Path) -> dict[str, float]:
    tokenizer = Tokenizer.from_folder(out / "tokenizer")  # that of every seed: it is trained on the same text

    def documents(split: str) -> list[np.ndarray]:
        return [whole(encode_text(tokenizer, text)[0]) for text in corpus.texts(split)]

    model, nats = counted(documents, len(tokenizer))
    # the first token is context, to the decoder too
    first = sum(len(tokenizer.token_bytes(int(document[0]))) for document in documents("test"))
    size = sum(len(text.encode()) for text in corpus.texts("test")) - first
    return {"kneser_ney_bits_per_byte": nats / math.log(2) / size, "kneser_ney_order": model.order}


def spans_baseline(corpus: Corpus, out: Path, seed: int) -> dict[str, float]:
    tokenizer = Tokenizer.from_folder(out / "tokenizer")
    holes, start = sentinel_ids(tokenizer), tokenizer.pad_id

    def documents(split: str) -> list[np.ndarray]:
        texts = corpus.texts(split)
        return [
            whole(pair.target)
            for turn in range(PASSES if split == "train" else 1)
            for index, text in enumerate(texts, turn * len(texts))
            for pair in encode_spans(tokenizer, holes, text, index, start, COMMON["max_length"], seed)
        ]

    model, nats = counted(documents, len(tokenizer))
    count = sum(len(document) - 1 for document in documents("test"))
    return {"kneser_ney_loss": nats / count, "kneser_ney_order": model.order}


def class_run(arch: str, corpus: Corpus, out: Path, seed: int, changed: dict[str, Any]) -> dict[str, Any]:
    options = PretrainOptions(
        arch=arch, data=corpus.paths, out=str(out), seed=seed, eval_every=250, **COMMON | SIZES[arch] | changed
    )
    report = pretrain(options, resume=begun(out))
    found = dataclasses.asdict(report) | {"curve": curve(out)}
    if arch == "decoder":
        found |= decoder_baseline(corpus, out)
    if arch == "seq2seq":
        found |= spans_baseline(corpus, out, seed)
    return found


def translation_run(corpus: Corpus, out: Path, seed: int, changed: dict[str, Any]) -> dict[str, Any]:
    """Tuned, and from nothing with the same vocabulary and steps."""
    trained, nothing = out.parent / "seq2seq" / "model", out.parent / "translation-bare"
    files = {
        "data": str(corpus.pairs["train"]),
        "validation": str(corpus.pairs["validation"]),
        "test": str(corpus.pairs["test"]),
    }
    given = COMMON | SIZES["translation"] | files | {"eval_every": 250, "seed": seed} | changed
    tuned = sft(SftOptions(model=str(trained), out=str(out), **given), resume=begun(out))
    bare = pretrain(
        PretrainOptions(
            arch="seq2seq", preset=SIZES["seq2seq"]["preset"], tokenizer=str(trained), out=str(nothing),
            **given,
        ),
        resume=begun(nothing),
    )  # fmt: skip
    records = [d.fields for d in Documents(corpus.pairs["test"])]
    wanted, left = [r["target"] for r in records], [r["source"].split(": ", 1)[1] for r in records]
    found: dict[str, Any] = {"records": len(records), "left": {"bleu": bleu(left, wanted)[0], **rouge(left, wanted)}}
    for name, report in (("tuned", tuned), ("bare", bare)):
        made = tasks.run(
            Text2Text.load(report.model), "generate", Documents(corpus.pairs["test"]), tasks.Options(beams=4, max_new_tokens=64)
        )  # fmt: skip
        found[name] = made.figures | {"loss": report.test["loss"], "seconds": report.seconds}
        found[f"{name}_examples"] = [
            {"source": r["source"], "wanted": r["target"], "found": o["text"]}
            for r, o in zip(records[::40], made.records[::40], strict=True)
        ]
    return found | {"curve": curve(out)}


def begun(out: Path) -> bool:
    """Whether a run was cut off there, after it had kept something."""
    return bool(Checkpoints(out).steps())


def curve(out: Path) -> list[dict[str, float]]:
    """The validations of a run."""
    return [line for line in read_log(out / "log.jsonl") if "validation" in line]


# -------------------------------------------------------------------------------------------------------------- report


def shown(values: list[float], digits: int = 3) -> str:
    """mean ± half of the range."""
    half = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{half}"


def rows(seeds: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[float], dict[str, list[float]], bool]]:
    """(work, measure, the model's by seed, the baselines' by seed, whether more is better)"""

    def of(*path: str) -> list[float]:
        values = []
        for seed in seeds:
            value: Any = seed if path[0] in seed else None  # a run that was cut off has not all of them
            for key in path if value else ():
                value = value[key]
            values += [] if value is None else [value]
        return values

    done = [name for name in WORK if any(name in seed for seed in seeds)]
    if "decoder" in done:
        counted_ = {"Kneser-Ney": of("decoder", "kneser_ney_bits_per_byte")}
        yield "decoder", "bits per byte", of("decoder", "test", "bits_per_byte"), counted_, False
    if "encoder" in done:
        for measure, more in (("accuracy", True), ("loss", False)):
            unigram = {"unigram": of("encoder", "unigram", "test", measure)}
            yield "encoder", f"masked tokens, {measure}", of("encoder", "test", measure), unigram, more
    if "seq2seq" in done:
        known = {
            "unigram": of("seq2seq", "unigram", "test", "loss"),
            "Kneser-Ney of answers": of("seq2seq", "kneser_ney_loss"),
        }
        yield "seq2seq", "spans, nats a token", of("seq2seq", "test", "loss"), known, False
    if "translation" in done:
        for measure, name in (("bleu", "BLEU"), ("rougeL", "ROUGE-L")):
            known = {
                "left as it is": of("translation", "left", measure),
                "not pre-trained": of("translation", "bare", measure),
            }
            yield "translation", name, of("translation", "tuned", measure), known, True
        known = {"not pre-trained": of("translation", "bare", "loss")}
        yield "translation", "nats a token", of("translation", "tuned", "loss"), known, False


def table(seeds: list[dict[str, Any]]) -> str:
    lines = ["| | measure | seeds | model | without | ahead in every seed |", "|---|---|---|---|---|---|"]
    for work, measure, ours, others, more in rows(seeds):
        digits = 1 if measure == "BLEU" else 3
        known = ", ".join(f"{name} {shown(values, digits)}" for name, values in others.items())
        ahead = all((o > t) == more and o != t for values in others.values() for o, t in zip(ours, values, strict=True))
        lines.append(
            f"| {work} | {measure} | {len(ours)} | {shown(ours, digits)} | {known} | {'yes' if ahead else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def draw(seeds: list[dict[str, Any]], path: Path) -> None:
    """A panel for each kind of work: validations of all seeds, and the baselines of the test split as lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measures = {"decoder": "bits_per_byte", "encoder": "accuracy", "seq2seq": "loss"}
    labels = {"bits_per_byte": "bits per byte", "accuracy": "masked tokens found", "loss": "nats a token of a span"}
    done = {work: (ours, others) for work, _, ours, others, _ in reversed(list(rows(seeds)))}
    figure = Figure(figsize=(4.2 * len(done), 3.8), dpi=140)
    FigureCanvasAgg(figure)
    for axes, work in zip(figure.subplots(1, len(done), squeeze=False)[0], [w for w in WORK if w in done], strict=True):
        ours, others = done[work]
        if work == "translation":
            others = {
                "left as\nit is": others["left as it is"],
                "not pre-\ntrained": others["not pre-trained"],
                "tuned": ours,
            }
            for place, (name, values) in enumerate(others.items()):
                axes.bar(place, statistics.mean(values), 0.6, color=ACCENT if name == "tuned" else "#c9d6e8")
                axes.plot([place] * len(values), values, ".", color=INK)
            axes.set_xticks(range(len(others)), others.keys())
            axes.set_ylabel("BLEU of test messages")
        else:
            name = "validation" if measures[work] == "loss" else f"validation_{measures[work]}"
            for number, seed in enumerate(each for each in seeds if work in each):
                xs, ys = zip(*((line["step"], line[name]) for line in seed[work]["curve"]), strict=True)
                axes.plot(xs, ys, color=ACCENT, linewidth=1.3, label=None if number else "model (validation)")
            for style, (known, values) in zip(("--", ":"), others.items(), strict=False):
                axes.axhline(
                    statistics.mean(values), color=INK, linestyle=style, linewidth=1.1, label=f"{known} (test)"
                )
            axes.plot([xs[-1]] * len(ours), ours, "o", color=INK, ms=4, label="model (test)")
            axes.set(xlabel="step", ylabel=labels[measures[work]])
            axes.legend(frameon=False, fontsize=8)
        axes.set_title(work, loc="left", weight="bold", color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=MUTED)
    figure.tight_layout()
    figure.savefig(path, format="png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--steps", type=int, help="of every run, in place of its own number")
    parser.add_argument("--keep", action="store_true", help="go on where an earlier run to --out ended")
    options = parser.parse_args(arguments)
    if "translation" in options.only and "seq2seq" not in options.only:
        parser.error("--only translation: it tunes the encoder-decoder; give seq2seq too")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps: {options.steps}; allowed: 1 or more")
    kept = options.out / "pretrain.json"
    found = json.loads(kept.read_text())["seeds"] if options.keep and kept.exists() else {}
    corpus, changed = Corpus(options.out / "corpus"), _steps(options.steps)
    for seed in options.seeds:
        done = found.setdefault(str(seed), {})
        for work in [name for name in WORK if name in options.only and name not in done]:
            print(f"seed {seed}: {work}", file=sys.stderr, flush=True)
            out = options.out / f"seed-{seed}" / work
            run = translation_run if work == "translation" else None
            done[work] = run(corpus, out, seed, changed) if run else class_run(work, corpus, out, seed, changed)
            write(options, found)  # what is there, if it is cut off
    print(table(list(found.values())))


def _steps(count: int | None) -> dict[str, Any]:
    return {} if count is None else {"steps": count, "warmup": min(COMMON["warmup"], count // 4)}


def write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """The reports, whole or not at all."""
    whole_ = [seed for seed in found.values() if seed]
    about = {"options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}}
    with Replacing(options.out) as files:
        content = about | {"machine": machine(), "versions": versions(), "seeds": found}
        files.write("pretrain.json", json.dumps(content, indent=1) + "\n")
        files.write("pretrain.md", table(whole_))
        if any(True for _ in rows(whole_)):
            draw(whole_, files.part("pretrain.png"))


if __name__ == "__main__":
    main()
