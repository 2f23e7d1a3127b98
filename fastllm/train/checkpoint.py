"""Checkpoints of a run: all that the next step depends on, whole or not there at all.

    <run>/checkpoints/step-00000200/
        tensors.safetensors   model.<parameter or buffer>, optimizer.<parameter>.<moment>, random.<generator>
        state.json            step, position in the data, losses, number of threads, versions

A checkpoint is written to a folder beside its place and renamed when it lies on the disk, so a process killed at any moment
leaves the older ones and at most an unfinished folder, which the next one removes. The last few are kept, and the best.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .. import __version__
from ..files import sync
from .optim import Optimizer

TENSORS, STATE = "tensors.safetensors", "state.json"
PART = ".part"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands. step: how many are done. data: the position of the batches after them. best: the lowest validation
    loss so far and the step that had it. stale: validations since then. tokens: predictions trained on so far."""

    step: int = 0
    data: Any = None
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    tokens: int = 0


class Checkpoints:
    """The checkpoints of a run folder. keep_last: how many of the newest stay; the best one stays besides."""

    def __init__(self, run: str | os.PathLike, keep_last: int = 2):
        self.folder, self.keep_last = Path(run) / "checkpoints", keep_last

    def steps(self) -> list[int]:
        """Of those that are there, ascending."""
        names = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(m[1]) for p in names if (m := re.fullmatch(r"step-(\d+)", p.name)))

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def save(self, model: nn.Module, optimizer: Optimizer, progress: Progress) -> Path:
        """Writes one and removes those that are not kept. CheckpointError: it cannot be written; older ones are untouched."""
        final = self.path(progress.step)
        part = final.with_name(f".{final.name}{PART}")
        state = asdict(progress) | {
            "threads": torch.get_num_threads(),
            "versions": {"fastllm": __version__, "torch": torch.__version__},
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(f".*{PART}"):
                shutil.rmtree(left, ignore_errors=True)
            part.mkdir()
            content = {name: t.detach().contiguous() for name, t in _tensors(model, optimizer)}
            safetensors.torch.save_file(content, part / TENSORS)
            (part / STATE).write_text(json.dumps(state, indent=1))
            for path in (part / TENSORS, part / STATE, part):
                sync(path)
            if final.exists():  # the same step, reached again
                shutil.rmtree(final)
            os.replace(part, final)
            sync(self.folder)
        except (OSError, safetensors.SafetensorError) as error:
            shutil.rmtree(part, ignore_errors=True)
            last = self.steps()
            left = f"the last one is {self.path(last[-1])}" if last else "there is none yet"
            raise CheckpointError(
                f"no checkpoint of step {progress.step} could be written in {self.folder}: {error}. Make room, or give "
                f"another folder; {left}"
            ) from error
        for step in self.steps()[: -self.keep_last]:
            if step not in (progress.best_step, progress.step):
                shutil.rmtree(self.path(step), ignore_errors=True)
        return final

    def load(self, model: nn.Module, optimizer: Optimizer | None = None, step: int | None = None) -> Progress:
        """Puts a checkpoint, the newest where none is named, into the model and the optimizer, and gives torch's generators the
        state they had. CheckpointError: there is none, it is damaged, or it is another model's; nothing is changed then."""
        found = self.steps()
        if not found or (step is not None and step not in found):
            there = f"there are steps {', '.join(map(str, found))}" if found else "there is none"
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise CheckpointError(f"no {wanted} in {self.folder}; {there}")
        path = self.path(found[-1] if step is None else step)
        try:
            state = json.loads((path / STATE).read_text())
            tensors = safetensors.torch.load_file(path / TENSORS)
            progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__})
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            older = [s for s in found if s < int(path.name[5:])]
            advice = f"go on from step {older[-1]}" if older else "start anew"
            raise CheckpointError(f"{path} is damaged ({error}); remove it, and {advice}") from error
        kinds: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            kinds[kind][rest] = tensor
        _check_model(dict(_model_tensors(model)), kinds["model"], path)
        if optimizer is not None:
            try:
                optimizer.load(kinds["optimizer"], progress.step)
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}; give the options that the run began with") from error
        with torch.no_grad():
            for name, tensor in _model_tensors(model):
                tensor.copy_(kinds["model"][name])
        if optimizer is not None:
            _set_random(kinds["random"])
        return progress

    def threads(self, step: int) -> int:
        """How many computed a checkpoint."""
        return json.loads((self.path(step) / STATE).read_text())["threads"]


def _model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each once: a tied weight has one name."""
    yield from model.named_parameters()
    persistent = model.state_dict(keep_vars=True)
    yield from ((name, b) for name, b in model.named_buffers() if name in persistent)


def _tensors(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"model.{name}", t) for name, t in _model_tensors(model))
    yield from ((f"optimizer.{name}", t) for name, t in optimizer.tensors())
    yield "random.cpu", torch.get_rng_state()
    if torch.cuda.is_initialized():
        yield from ((f"random.cuda{i}", t) for i, t in enumerate(torch.cuda.get_rng_state_all()))


def _set_random(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for i in range(len(states) - 1):
        if torch.cuda.is_available() and i < torch.cuda.device_count():
            torch.cuda.set_rng_state(states[f"cuda{i}"], i)


def _check_model(own: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    if own.keys() != found.keys():
        odd = ", ".join(sorted(own.keys() ^ found.keys())[:3])
        raise CheckpointError(
            f"{path} is another architecture's: {odd} in one of the two only; give the model it was made of"
        )
    for name, tensor in own.items():
        if tensor.shape != found[name].shape or tensor.dtype != found[name].dtype:
            raise CheckpointError(
                f"{path}: {name} is {tuple(found[name].shape)} {found[name].dtype}, the model's is {tuple(tensor.shape)} "
                f"{tensor.dtype}; give the model that it was made of"
            )
