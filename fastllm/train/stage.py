"""What the stages of training share: from options to a finished run folder.

    <out>/
        options.yaml     what the run was asked to do
        tokenizer/       of a run that trained its own
        log.jsonl        a line for each logged step and each validation
        checkpoints/     the newest, and the best
        samples.txt      what the model wrote at each validation
        loss.png         the log as a picture
        tensorboard/     the same as curves
        report.json      how it ended: losses held out and on the test split, speed, sizes
        model/           the best checkpoint, as transformers and LLM read it

Validation chooses the checkpoint; the test split is read once, at the end, by the one that was chosen.
"""

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..data.batch import Groups, examples_of, pack
from ..data.chat import ChatTemplate
from ..data.lint import Finding
from ..data.sources import Document, Documents, Mixture, mixing_rates
from ..files import Replacing
from ..models.arena import available_memory
from . import plots
from .checkpoint import Checkpoints
from .forecast import Footprint, Operations, device_of, footprint, seconds_of, tokens_of
from .loop import LOG, LoopOptions, Report, Source, TrainingError, fit
from .optim import require
from .parallel import start
from .progress import TensorBoard, duration
from .validation import held_out, unigram

OPTIONS, SAMPLES, PICTURE, REPORT = "options.yaml", "samples.txt", "loss.png", "report.json"
LINTS = ("warn", "refuse", "off")
LINTED, COMPARED = 256, 2000  # documents of which the linter sees the tokens, and the text
FREE = frozenset(  # what a run that goes on may have otherwise
    ("out", "steps", "log_every", "eval_every", "save_every", "keep_last", "patience", "bad", "lint", "prompts", "samples",
     "sample_tokens", "plot", "tensorboard")
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StageOptions(LoopOptions):
    """What every stage takes, beside the loop's and the optimizer's.

    Args:
        data: Files, folders or globs; a mapping of names to them mixes several sources.
        out: The run folder.
        seed: Of weights, orders, masks and samples.
        tokens: Of a batch.
        max_length: Tokens of the longest sequence; a text that is longer is cut into several. Of an encoder-decoder, of a source
            and of a target, so that `tokens` must be twice as many.
        validation: The share of the documents that is held out, chosen by a hash of their text; or files of their own.
        test: The same for the test split, which is read once, at the end; 0 for none.
        validation_tokens: How much of it a validation reads at most.
        shuffle: Documents in a block that is shuffled.
        mix_temperature: Of several sources; 1 draws them by their sizes, a large one all alike.
        text: The field that holds the text of a record.
        unit: What of a text file is a document; file, paragraph or line.
        bad: What to do with a record that cannot be read or trained on; raise or skip.
        lint: What to do with what the linter finds; warn, refuse or off.
        samples: How many openings of held-out documents the model continues at each validation.
        sample_tokens: Tokens of a sample; 0 for none.
        prompts: Texts to continue in place of these openings.
        device: auto, cpu or cuda.
        dtype: Of the parameters; auto is float32 on a CPU and bfloat16, with a float32 master, on a GPU.
        plot: Draw loss.png.
        tensorboard: Write curves for TensorBoard.
    """

    data: str | list[str] | dict[str, str]
    out: str
    seed: int = 0
    tokens: int = 4096
    max_length: int = 512
    validation: float | str = 0.02
    test: float | str = 0.02
    validation_tokens: int = 50_000
    shuffle: int = 10_000
    mix_temperature: float = 1.0
    text: str = "text"
    unit: str = "file"
    bad: str = "raise"
    lint: str = "warn"
    samples: int = 2
    sample_tokens: int = 40
    prompts: list[str] = dataclasses.field(default_factory=list)
    device: str = "auto"
    dtype: str = "auto"
    plot: bool = True
    tensorboard: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        leasts = {"tokens": 2, "max_length": 2, "validation_tokens": 1, "samples": 0, "sample_tokens": 0}
        for name, least in leasts.items():
            require(name, getattr(self, name), getattr(self, name) >= least, f"{least} or more")
        require("max_length", self.max_length, self.max_length <= self.tokens, f"at most tokens={self.tokens}")
        mixes = isinstance(self.data, dict) or self.mix_temperature == 1
        require("mix_temperature", self.mix_temperature, mixes, "1 where data is not several sources by name")
        require("seed", self.seed, 0 <= self.seed < 1 << 63, "0 to 2^63 - 1")
        require("data", self.data, bool(self.data), "files, folders or globs")
        require("out", self.out, bool(self.out), "a folder")
        for name in ("validation", "test"):
            value = getattr(self, name)
            fits = bool(value) if isinstance(value, str) else 0 <= value < 1
            require(name, value, fits, "a share from 0 to less than 1, or files")
        shares = self.fractions["validation"] + self.fractions["test"]
        require("validation + test", shares, shares < 1, "less than 1")
        require("lint", self.lint, self.lint in LINTS, ", ".join(LINTS))
        require("device", self.device, self.device in ("auto", "cpu", "cuda"), "auto, cpu, cuda")
        require("dtype", self.dtype, self.dtype in ("auto", "float32", "bfloat16"), "auto, float32, bfloat16")

    @property
    def fractions(self) -> dict[str, float]:
        """Shares of the splits that are taken out of the training data."""
        held = {n: 0.0 if isinstance(v := getattr(self, n), str) else float(v) for n in ("validation", "test")}
        return {"train": 1 - sum(held.values()), **held}

    @property
    def where(self) -> tuple[torch.device, torch.dtype]:
        """The device and the parameters' dtype. ValueError: cuda where there is none."""
        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise ValueError("device='cuda', but torch finds no GPU; give cpu or auto")
        device = torch.device("cuda" if self.device == "cuda" or (self.device == "auto" and cuda) else "cpu")
        auto = torch.bfloat16 if device.type == "cuda" else torch.float32
        return device, auto if self.dtype == "auto" else getattr(torch, self.dtype)

    def documents(self, split: str, **how: Any) -> Documents | Mixture:
        """The documents of a split: train, validation or test. how: of `Documents`, such as shuffle and epochs."""
        own = {"validation": self.validation, "test": self.test}.get(split)
        if isinstance(own, str):
            return self._read(own, None, **how)
        if not isinstance(self.data, dict):
            return self._read(self.data, split, **how)
        sources = {name: self._read(paths, split, **how) for name, paths in self.data.items()}
        return Mixture(sources, self._rates, self.seed)

    @functools.cached_property
    def _rates(self) -> dict[str, float]:
        """Of the sources, by their training documents: counted once."""
        sizes = {name: sum(1 for _ in self._read(paths, "train")) for name, paths in self.data.items()}
        return mixing_rates(sizes, self.mix_temperature)

    def _read(self, paths: Any, split: str | None, **how: Any) -> Documents:
        fractions = self.fractions
        if split is not None and fractions[split] == 1:
            split = None
        return Documents(
            paths, text=self.text, unit=self.unit, bad=self.bad, split=split, fractions=fractions, seed=self.seed, **how
        )

    def has(self, split: str) -> bool:
        """Whether there is such a split."""
        value = getattr(self, split)
        return isinstance(value, str) or value > 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a stage trains.

    encode(document, index): its examples, what is drawn at random by the index; batches, collate: of them. write(model, prompts):
    what the model makes of openings, None where it writes nothing; opening(fields): that of a record. text: the file or folder of
    tokenizer and chat template. lint(examples, batches, records): what spoils it. size(fields): the bytes that the predictions
    of a record stand for, None where they are no text from its beginning to its end; of bits a byte. sides: how many sequences
    of up to max_length tokens an example has. template: what is saved in place of the chat template that `text` has.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    batches: type[Groups]
    collate: Callable[[Sequence[Any]], Any]
    encode: Callable[[Document, int], list[Any]]
    text: Path
    lint: Callable[[Sequence[Any], list[Any], dict[str, list[Mapping[str, Any]]]], list[Finding]]
    opening: Callable[[Mapping[str, Any]], Any] = lambda fields: None
    write: Callable[[nn.Module, list[Any]], list[str]] | None = None
    size: Callable[[Mapping[str, Any]], int | None] = lambda fields: None
    sides: int = 1
    template: ChatTemplate | None = None


@dataclass(frozen=True)
class StageReport:
    """How a stage ended, as in report.json. validation, test: figures of the model that is in `model`, "loss" in nats a
    prediction; None where there is no such split. unigram: by split, what one has that knows no context. tokens: read in
    training, trained on or not."""

    reason: str
    steps: int
    best_step: int | None
    loss: float
    validation: dict[str, float] | None
    test: dict[str, float] | None
    unigram: dict[str, dict[str, float]]
    parameters: int
    tokens: int
    seconds: float
    model: str


# ---------------------------------------------------------------------------------------------------------------- held out


class HeldOut:
    """The batches of a split, read once and kept, so that all validations see the same."""

    def __init__(self, options: StageOptions, split: str, plan: Plan, most: int | None):
        self.openings: list[Any] = []
        examples, sizes, count = [], [], 0
        for index, document in enumerate(options.documents(split)):
            made = examples_of(document, index, plan.encode)
            examples += made
            count += sum(map(len, made))
            if not made:
                continue
            sizes.append(plan.size(document.fields))
            if len(self.openings) < options.samples and (opening := plan.opening(document.fields)):
                self.openings.append(opening)  # an empty text, or a talk that the assistant opens, has none
            if most is not None and count >= most:
                break
        if not examples:
            raise ValueError(f"nothing of the split {split!r} can be trained on; give {split}=FILES, or a larger share")
        self._bytes = None if None in sizes else sum(sizes)
        self.batches = _batched(examples, options.tokens, plan)

    def figures(self, model: nn.Module, plan: Plan) -> dict[str, float]:
        """loss, in nats a prediction; accuracy, of the likeliest; bits_per_byte, of texts that are predicted whole."""
        found = held_out(model, self.batches, plan.loss)
        if self._bytes:
            predictions = math.fsum(float(batch.weight.double().sum()) for batch in self.batches)
            found["bits_per_byte"] = found["loss"] * predictions / math.log(2) / self._bytes
        return found


def _batched(examples: Sequence[Any], tokens: int, plan: Plan) -> list[Any]:
    bins = pack([len(e) for e in examples], tokens)
    return [plan.collate([examples[i] for i in chosen]) for chosen in bins]


# ------------------------------------------------------------------------------------------------------------------- run


def run(
    options: StageOptions,
    plan: Plan,
    resume: bool,
    watch: Iterable[Callable[[Mapping[str, Any]], None]] = (),
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> StageReport:
    """Trains a plan and leaves the run folder complete. See `fit` for what it raises."""
    out, began, processes = Path(options.out), time.perf_counter(), start()
    if processes.rank:
        say = _silence
    if options.plot:
        plots.require()
    device, dtype = options.where
    model = plan.model.to(device, dtype).train()
    validation = HeldOut(options, "validation", plan, options.validation_tokens) if options.has("validation") else None
    train = options.documents("train", shuffle=options.shuffle, epochs=None)
    groups = plan.batches(train, plan.encode, options.tokens, seed=options.seed)
    if not resume:
        groups.read_ahead()
    batches = _Counted(groups, model)

    def prepare() -> Footprint:
        _lint(options, plan, say)
        _keep(options, out, resume, say)
        return _forecast(options, plan, model, say, processes.count)

    size = processes.first(prepare)
    board = None
    if options.tensorboard and processes.rank == 0:
        board = TensorBoard(out / "tensorboard", max(Checkpoints(out).steps(), default=0))
    try:
        report = fit(
            model, batches, plan.loss, out, options, resume=resume, figures=batches.figures,
            validate=validation and _Validation(options, plan, validation, writes=processes.rank == 0),
            watch=(*watch, board) if board else watch,
        )  # fmt: skip
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise TrainingError(f"{_advice(options, size, device)} ({' '.join(str(error).split())[:200]})") from error
    finally:
        if board:
            board.close()
        if options.plot and processes.rank == 0 and (out / LOG).exists():
            plots.draw_losses(plots.read_log(out / LOG), out / PICTURE, f"{out.name}: loss")
    return processes.first(lambda: _finish(options, plan, model, report, validation, time.perf_counter() - began))


def _silence(line: str) -> None:
    """What processes say that are not the first."""


def _finish(
    options: StageOptions, plan: Plan, model: nn.Module, report: Report, validation: HeldOut | None, seconds: float
) -> StageReport:
    """The best checkpoint, measured and saved."""
    out = Path(options.out)
    if report.best_step not in (None, report.step):
        Checkpoints(out).load(model, step=report.best_step)
    test = HeldOut(options, "test", plan, None) if options.has("test") and report.reason != "interrupted" else None
    model.eval()
    with torch.no_grad():
        splits = {"validation": validation, "test": test}
        found = {name: each and each.figures(model, plan) for name, each in splits.items()}
    models.save(model, out / "model", text=plan.text)
    if plan.template:
        plan.template.save(out / "model")
    tokens = [line["tokens"] for line in plots.read_log(out / LOG) if "tokens" in line]
    done = StageReport(
        reason=report.reason,
        steps=report.step,
        best_step=report.best_step,
        loss=report.loss,
        **found,
        unigram={name: unigram(each.batches) for name, each in splits.items() if each},
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=tokens[-1] if tokens else 0,
        seconds=round(seconds, 1),
        model=str(out / "model"),
    )
    with Replacing(out) as files:
        files.write(REPORT, json.dumps(dataclasses.asdict(done), indent=1) + "\n")
    return done


class _Counted:
    """Batches, with the operations that they take: those of all processes."""

    def __init__(self, batches: Source, model: nn.Module):
        self.batches, self.operations = batches, Operations(model)
        self.state_dict, self.load_state_dict = batches.state_dict, batches.load_state_dict
        self._clear()

    def __next__(self) -> Any:
        batch = next(self.batches)
        self._done += self.operations(batch)
        return batch

    def figures(self) -> dict[str, float]:
        """Operations a second since the last call."""
        rate = self._done / (time.perf_counter() - self._since)
        self._clear()
        return {"flops_per_s": rate} if math.isfinite(rate) else {}

    def _clear(self) -> None:
        self._done, self._since = 0.0, time.perf_counter()


class _Validation:
    """Figures of the split that is held out, and samples beside them."""

    def __init__(self, options: StageOptions, plan: Plan, held: HeldOut, writes: bool):
        self.options, self.plan, self.held, self.writes = options, plan, held, writes

    def __call__(self, model: nn.Module) -> dict[str, float]:
        found = self.held.figures(model, self.plan)
        prompts = self.options.prompts or self.held.openings
        if self.writes and self.plan.write is not None and self.options.sample_tokens and prompts:
            texts = self._written(model, prompts)
            with (Path(self.options.out) / SAMPLES).open("a", encoding="utf-8") as file:
                file.write(f"== held out {found['loss']:.4f} nats a prediction\n")
                file.writelines(f"{_shown(p)} | {text}\n" for p, text in zip(prompts, texts, strict=True))
        return found

    def _written(self, model: nn.Module, prompts: list[Any]) -> list[str]:
        """Samples are looked at, and no run ends for their sake; nor does one that cannot be made cost the others."""
        try:
            return self.plan.write(model, prompts)
        except ValueError as error:  # of a template, say
            if len(prompts) == 1:
                return [f"(no sample: {error})"]
            return [text for prompt in prompts for text in self._written(model, [prompt])]


# ------------------------------------------------------------------------------------------------------- before it begins


def _keep(options: StageOptions, out: Path, resume: bool, say: Callable[[str], None]) -> None:
    """Writes options.yaml; for a run that goes on, checks that they are the run's. ValueError: they are not."""
    import yaml

    given = dataclasses.asdict(options)
    path = out / OPTIONS
    if resume and path.exists():
        stored = yaml.safe_load(path.read_text())
        odd = {n for n in given.keys() | stored.keys() if given.get(n) != stored.get(n)}
        if wrong := sorted(odd - FREE):
            name = wrong[0]
            raise ValueError(
                f"{name} is {given.get(name)!r}, the run in {out} began with {stored.get(name)!r} ({len(wrong)} options differ: "
                f"{', '.join(wrong)}); give what it began with, or another folder"
            )
        if "steps" in odd:
            say(
                f"the run goes to step {options.steps}, it was to end at {stored['steps']}: the schedule is the new one's"
            )
    with Replacing(out) as files:
        files.write(OPTIONS, yaml.safe_dump(given, sort_keys=False, allow_unicode=True))


def _lint(options: StageOptions, plan: Plan, say: Callable[[str], None]) -> None:
    if options.lint == "off":
        return
    read = {
        split: list(islice(options.documents(split, **how), COMPARED))
        for split, how in (("train", {"shuffle": options.shuffle}), ("validation", {}), ("test", {}))
        if split == "train" or options.has(split)
    }
    records = {split: [document.fields for document in documents] for split, documents in read.items()}
    examples = [e for i, document in enumerate(read["train"][:LINTED]) for e in examples_of(document, i, plan.encode)]
    findings = plan.lint(examples, _batched(examples, options.tokens, plan)[:8], records)
    for finding in findings:
        say(f"lint: {finding}")
    fatal = [f for f in findings if f.fault == "out of vocabulary" or options.lint == "refuse"]
    if fatal:
        raise ValueError(
            f"the linter found {len(fatal)} faults, the first one {fatal[0]}; mend the data, or give lint=warn"
        )


def _forecast(
    options: StageOptions, plan: Plan, model: nn.Module, say: Callable[[str], None], processes: int
) -> Footprint:
    """Says what the run will take. MemoryError: more than there is."""
    small, full = _first(options, plan, plan.sides * options.max_length), _first(options, plan, options.tokens)
    size = footprint(model, plan.loss, small)
    size = replace(size, state=size.state // processes)
    refusal = size.refuse(options.tokens, options.accumulate, available_memory(device_of(model)))
    if refusal:
        raise MemoryError(refusal)
    seconds = seconds_of(model, plan.loss, full) * options.accumulate
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"{parameters:,} parameters; {options.steps} steps of some {options.tokens * options.accumulate * processes:,} tokens, "
        f"{seconds:.2f} s each: {duration(seconds * options.steps)}, {size.of(options.tokens) / 1e9:.1f} GB"
    )
    return size


def _first(options: StageOptions, plan: Plan, tokens: int) -> Any:
    """A full batch of the training data, of its own reading."""
    documents = options.documents("train", shuffle=options.shuffle)
    made = list(islice(plan.batches(documents, plan.encode, tokens, window=64, seed=options.seed), 4))
    if not made:
        raise ValueError("nothing of the training documents can be trained on; give others, or a larger max_length")
    return max(made, key=tokens_of)  # the last one of a window may hold little, and stand first


def _advice(options: StageOptions, size: Footprint, device: torch.device) -> str:
    most = size.fitting(available_memory(device))
    parts = max(2, -(-options.tokens // max(most, 1)))
    return (
        f"out of memory with tokens={options.tokens}: a step takes some {size.of(options.tokens) / 1e9:.1f} GB; "
        f"tokens={max(options.tokens // parts, 2)} with accumulate={options.accumulate * parts} takes the same step"
    )


def _shown(prompt: Any) -> str:
    content = prompt if isinstance(prompt, str) else prompt[-1].get("content") or ""
    if not isinstance(content, str):  # parts
        content = "".join(part.get("text", "") for part in content)
    return content.replace("\n", "\\n")


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text


def texts_of(fields: Mapping[str, Any]) -> str:
    """All text of a record, for a tokenizer to learn from."""
    parts: list[str] = []
    for name in ("text", "prompt", "completion", "source", "target", "messages"):
        value = fields.get(name)
        if isinstance(value, str):
            parts.append(value)
        elif isinstance(value, list):
            parts += [m["content"] for m in value if isinstance(m, dict) and isinstance(m.get("content"), str)]
    return "\n".join(parts)
