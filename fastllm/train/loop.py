"""The step loop under every stage of training.

    batches = Batches(documents, encode, tokens=4096)
    report = fit(model, batches, next_token_loss, "runs/first", LoopOptions(steps=1000, save_every=100))

A step takes `accumulate` batches, adds up their losses token by token, and divides by the weight of all their predictions: the
gradient is that of one large batch, however its tokens fall into small ones. Then it clips and updates (optim.py).

What a step depends on is in a checkpoint: parameters, moments, step, position in the data, torch's generators. So a run that
was cut off, at any moment, goes on with the bits that it would have had, on the same number of threads. The run folder holds
the checkpoints and log.jsonl, a line for each logged step and each validation.

Under torchrun W processes compute a step together (parallel.py): process r takes its batches r, r + W, … of W * accumulate. So
they do what one process does with W times the accumulate, to the rounding of sums, and any number of them goes on with what
others left. The first one writes the log.
"""

import contextlib
import functools
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..files import Replacing
from ..models.blocks import recomputing
from .checkpoint import CheckpointError, Checkpoints, Progress, generators
from .forecast import tokens_of
from .optim import Optimizer, OptimOptions, require
from .parallel import Processes, Share, start

LOG, BAD_BATCH = "log.jsonl", "bad_batch.json"


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says where it stands and what to do."""


class Batch(Protocol):
    """weight: float32, of each prediction, 0 where there is none."""

    @property
    def weight(self) -> Tensor: ...

    def to(self, device: torch.device | str) -> "Batch": ...


class Source(Protocol):
    """An iterator of batches that knows where it is, in plain JSON."""

    def __next__(self) -> Batch: ...
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LoopOptions(OptimOptions):
    """The loop's, beside the optimizer's.

    Args:
        steps: Of the whole run.
        accumulate: Batches of a step, of each process.
        log_every: Steps between lines of the log; 0: only at the end.
        eval_every: Steps between validations; 0: only at the end.
        save_every: Steps between checkpoints; 0: only at the end, and where a validation is the best.
        keep_last: Checkpoints that stay, beside the best.
        patience: Validations without a new best before it stops; 0: never.
        recompute: Keep of each layer its input alone, and compute the rest again in the backward: same bits, less memory.
        compile: The loss by torch.compile.
    """

    steps: int = 1000
    accumulate: int = 1
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep_last: int = 2
    patience: int = 0
    recompute: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"steps": 1, "accumulate": 1, "keep_last": 1}.items():
            require(name, getattr(self, name), getattr(self, name) >= least, f"{least} or more")
        for name in ("log_every", "eval_every", "save_every", "patience"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        self.rate(1, self.steps)


@dataclass(frozen=True)
class Report:
    """How a run ended. reason: "done", "no better" (patience), "interrupted" or "no more data". loss: of the last step, a
    prediction, in nats. checkpoint: its folder."""

    reason: str
    step: int
    loss: float
    best: float | None
    best_step: int | None
    checkpoint: Path


Model = TypeVar("Model", bound=nn.Module)


def fit(
    model: Model,
    batches: Source,
    loss: Callable[[Model, Any], Tensor],
    out: str | os.PathLike,
    options: LoopOptions,
    *,
    validate: Callable[[Model], float | Mapping[str, float]] | None = None,
    resume: bool = False,
    watch: Iterable[Callable[[Mapping[str, Any]], None]] = (),
    figures: Callable[[], Mapping[str, float]] | None = None,
) -> Report:
    """Trains the parameters of `model` that need a gradient, in place.

    loss(model, batch): the sum over its predictions of weight * loss, a scalar. validate(model): a loss, the lower the better, or
    figures with a "loss" among them, called in eval mode without gradients. watch: what gets each line of the log. figures():
    more of a logged step, since the last one. resume: go on from the newest checkpoint.

    Ctrl-C ends the step that runs, saves and returns; a second one stops at once. TrainingError: a loss or gradient that is not
    finite (the model is then as it was before the step). Any other error of the data or the loss is raised as it is, when the
    steps before it are saved. CheckpointError: a checkpoint that cannot be written or read, or a
    folder that has some when resume is not given. ValueError: options, or a batch without a prediction.

    Of several processes all must call it, with the same arguments. The values of `model` are those of the first one; `loss` gets
    a twin of it, and `model` has values in `validate` and in the end alone, in every process. The first one writes, calls
    `watch` and tells its own figures. An error that is not of this list leaves the last checkpoint.
    """
    processes = start()
    with recomputing(model) if options.recompute else contextlib.nullcontext():
        share = Share(model, loss, processes, options.compile)
        with _giving_back(share):
            return _run(share, batches, Path(out), options, processes, validate, resume, tuple(watch), figures)


def _run(
    share: Share,
    batches: Source,
    run: Path,
    options: LoopOptions,
    processes: Processes,
    validate: Callable[[nn.Module], float | Mapping[str, float]] | None,
    resume: bool,
    watch: tuple[Callable[[Mapping[str, Any]], None], ...],
    figures: Callable[[], Mapping[str, float]] | None,
) -> Report:
    checkpoints = Checkpoints(run, options.keep_last, processes)
    optimizer = Optimizer(share.model, options, options.steps)
    progress = _begin(share.model, batches, optimizer, checkpoints, resume)
    step_of = _Step(share, batches, optimizer, options.accumulate, processes)
    reason, saved, told, measured = "done", progress.step if resume else None, progress.step, progress.step
    share.train()
    log = _Log(run, progress.step, watch) if processes.rank == 0 else _Silence()
    value = log.loss

    def tell() -> None:
        nonlocal told
        more, told = figures() if figures else {}, progress.step
        log.write({"step": told, "loss": value, "tokens": progress.tokens, **step_of.since_last(), **more})

    def measure() -> None:
        nonlocal progress, saved, measured
        measured = progress.step
        found, others = _validated(share, validate, processes)
        log.write({"step": measured, "validation": found, **others})
        better = math.isfinite(found) and (progress.best is None or found < progress.best)
        progress = replace(progress, stale=0 if better else progress.stale + 1)
        if better:
            progress = replace(progress, best=found, best_step=measured)
            checkpoints.save(share.model, optimizer, progress)
            saved = measured

    with log, _Interrupt() as interrupt:
        while progress.step < options.steps:
            drawn = generators()
            try:
                value, tokens = step_of()
            except StopIteration:
                reason = "no more data"
                break
            except _NotFinite as problem:
                processes.first(functools.partial(_say_not_finite, problem, progress, checkpoints, run))
            except Exception:  # of the data or the loss: all is as after the last step, but for what was drawn since
                if processes.count == 1 and saved != progress.step > 0 and optimizer.done == progress.step:
                    with contextlib.suppress(CheckpointError):
                        checkpoints.save(share.model, optimizer, progress, drawn)
                raise
            step = progress.step + 1
            progress = replace(progress, step=step, data=batches.state_dict(), tokens=progress.tokens + tokens)
            last = step == options.steps
            if last or _due(step, options.log_every):
                tell()
            if validate is not None and (last or _due(step, options.eval_every)):
                measure()
            if _due(step, options.save_every) and saved != step:
                checkpoints.save(share.model, optimizer, progress)
                saved = step
            asked = processes.any(interrupt.asked)
            if options.patience and progress.stale >= options.patience:
                reason = "no better"
            elif asked and not last:
                reason = "interrupted"
            if reason != "done":
                break
        if reason == "no more data":  # the step before was the last one, which nobody knew
            if told != progress.step:
                tell()
            if validate is not None and measured != progress.step:
                measure()
        if saved != progress.step:
            checkpoints.save(share.model, optimizer, progress)
    path = checkpoints.path(progress.step)
    return Report(reason, progress.step, value, progress.best, progress.best_step, path)


def _begin(model: nn.Module, batches: Source, optimizer: Optimizer, checkpoints: Checkpoints, resume: bool) -> Progress:
    there, count = checkpoints.steps(), checkpoints.processes.count
    if not resume:
        if there:
            raise CheckpointError(
                f"{checkpoints.folder} has checkpoints up to step {there[-1]}; give resume=True to go on, or another folder"
            )
        _check_alike(batches, checkpoints.processes)
        return Progress(data=batches.state_dict(), processes=count)
    progress = checkpoints.load(model, optimizer)
    batches.load_state_dict(progress.data)
    _check_alike(batches, checkpoints.processes)
    now = {"threads": torch.get_num_threads(), "processes": count}
    for name, number in now.items():
        if getattr(progress, name) != number:
            warnings.warn(
                f"the checkpoint was computed by {getattr(progress, name)} {name}, now there are {number}: the run goes on, "
                "but sums in other orders may change its last bits",
                stacklevel=3,
            )
    return replace(progress, **now)


def _check_alike(batches: Source, processes: Processes) -> None:
    """All processes are to count the same batches."""
    if processes.any(processes.first(batches.state_dict) != batches.state_dict()):
        raise TrainingError(
            "the processes do not stand at the same place of the same data; give all of them the same files and options"
        )


@contextlib.contextmanager
def _giving_back(share: Share) -> Iterator[None]:
    """The values to the model that was given; also where all processes stop alike."""
    try:
        yield
    except (TrainingError, CheckpointError):
        share.fill()
        raise
    share.fill()


# ------------------------------------------------------------------------------------------------------------ one step


class _NotFinite(Exception):
    """batch: its number in the step, from 1."""

    def __init__(self, what: str, batch: int | None, data: Any):
        self.what, self.batch, self.data = what, batch, data


class _Step:
    """A step: its loss a prediction, and the tokens that it read. StopIteration when there is no more data."""

    def __init__(
        self, share: Share, batches: Source, optimizer: Optimizer, accumulate: int, processes: Processes | None = None
    ):
        self.share, self.batches, self.optimizer = share, batches, optimizer
        self.processes = processes or Processes()
        self.accumulate = accumulate * self.processes.count
        self.device = next(iter(optimizer.parameters.values())).device
        self._clear()

    def __call__(self) -> tuple[float, int]:
        began, data = time.perf_counter(), self.batches.state_dict()
        group = self._group()
        total = sum(float(batch.weight.double().sum()) for batch in group)
        if not total > 0:
            raise ValueError(
                f"the {len(group)} batches of a step have predictions of weight {total}; leave out examples of which nothing "
                "is trained"
            )
        self._waited += time.perf_counter() - began
        self._forget_gradients()  # of the caller, or of a step that an error cut off
        value = 0.0
        for number, loss in enumerate(self._losses(group, total), 1):
            value += loss
            if not math.isfinite(value):
                self._forget_gradients()
                raise _NotFinite(f"the loss is {value}", number, data)
        self._rate = self.optimizer.rate
        self._norm = float(self.optimizer.step())
        if not math.isfinite(self._norm):
            raise _NotFinite(f"the gradients' norm is {self._norm}", None, data)
        tokens = sum(map(tokens_of, group))
        self._tokens += tokens
        return value, tokens

    def _losses(self, group: list[Batch], total: float) -> list[float]:
        """Each batch's part of the loss. This process goes back through its own, and all know all of them."""
        count, rank = self.processes.count, self.processes.rank
        parts: dict[int, Tensor] = {}
        for first in range(0, len(group), count):
            number = first + rank
            own = number < len(group)
            batch = group[number if own else first].to(self.device)
            part = self.share(batch) / total
            if own:
                parts[number] = part.detach()
            else:  # the data end here; the others' layers need this process, and its gradients are 0
                part = part * 0
            part.backward()
        return self.processes.sum([float(parts[n]) if n in parts else 0.0 for n in range(len(group))])

    def since_last(self) -> dict[str, float]:
        """Figures of the steps since the last call: rate and norm of the last one, tokens read a second, and the share of time
        that was spent on waiting for data."""
        seconds = time.perf_counter() - self._since
        record = {
            "lr": self._rate,
            "grad_norm": self._norm,
            "tokens_per_s": self._tokens / seconds,
            "data_share": self._waited / seconds,
        }
        self._clear()
        return record

    def _clear(self) -> None:
        self._since, self._waited, self._tokens = time.perf_counter(), 0.0, 0

    def _group(self) -> list[Batch]:
        """What is left, where the data end within a step."""
        group: list[Batch] = []
        for _ in range(self.accumulate):
            try:
                group.append(next(self.batches))
            except StopIteration:
                break
        if not group:
            raise StopIteration
        return group

    def _forget_gradients(self) -> None:
        for p in self.optimizer.parameters.values():
            p.grad = None


def _say_not_finite(problem: _NotFinite, progress: Progress, checkpoints: Checkpoints, run: Path) -> None:
    step = progress.step + 1
    where = "" if problem.batch is None else f", in its batch {problem.batch}"
    record = {"step": step, "batch": problem.batch, "what": problem.what, "data": problem.data}
    try:
        (run / BAD_BATCH).write_text(json.dumps(record, indent=1))
        place = f"its place in the data is in {run / BAD_BATCH}"
    except OSError as error:
        place = f"its place in the data could not be written to {run / BAD_BATCH} ({error})"
    last = checkpoints.steps()
    good = f"the last checkpoint is {checkpoints.path(last[-1])}" if last else "there is no checkpoint yet"
    raise TrainingError(
        f"step {step}: {problem.what}{where}; nothing was updated, {good}, {place}. Look at that text, lower lr or clip, or "
        "lengthen the warm-up"
    ) from None


def _validated(share: Share, validate: Callable, processes: Processes) -> tuple[float, dict[str, float]]:
    """The loss, and what else was found."""
    with share.whole() as model:
        model.eval()
        try:
            with torch.no_grad():
                found = validate(model)
        finally:
            model.train()
    if not isinstance(found, Mapping):
        found = {"loss": found}
    loss = processes.first(lambda: float(found["loss"]))
    return loss, {f"validation_{name}": v for name, v in found.items() if name != "loss"}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


# ------------------------------------------------------------------------------------------------ the log, and Ctrl-C


class _Log:
    """log.jsonl: lines behind the step where a run goes on are those of one that was cut off, and go."""

    def __init__(self, run: Path, step: int, watch: tuple[Callable[[Mapping[str, Any]], None], ...]):
        self.path, self.watch = run / LOG, watch
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        losses = [loss for line in kept if (loss := json.loads(line).get("loss")) is not None]
        self.loss = losses[-1] if losses else math.nan  # the last one that is known
        with Replacing(run) as files:
            files.write(LOG, "".join(f"{line}\n" for line in kept))

    def _lines(self) -> list[str]:
        """The whole ones."""
        text = self.path.read_text() if self.path.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def __enter__(self) -> "_Log":
        self._file = self.path.open("a")
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for each in self.watch:
            each(record)


class _Silence(contextlib.nullcontext):
    """The log of a process that is not the first."""

    loss = math.nan

    def write(self, record: Mapping[str, Any]) -> None:
        pass


class _Interrupt:
    """The first Ctrl-C is a wish, the second one KeyboardInterrupt. Only the main thread can hear it."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "_Interrupt":
        self._heard = threading.current_thread() is threading.main_thread()
        if self._heard:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if self._heard:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
