"""Checkpoints of a run: all that the next step depends on, whole or not there at all.

    <run>/checkpoints/step-00000200/
        tensors.safetensors   model.<parameter or buffer>, optimizer.<parameter>.<moment>, random.<process>.<generator>
        state.json            step, position in the data, losses, number of threads and of processes, versions

A checkpoint is written to a folder beside its place and renamed when it lies on the disk, so a process killed at any moment
leaves the older ones and at most an unfinished folder, which the next one removes. The last few are kept, and the best.

Several processes write a file each, shard-00001-… and so on, of what they hold (torch.distributed.checkpoint). Any number of
processes reads either form; each takes its own part.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .. import __version__
from ..files import ReplacingFolder
from .optim import Optimizer
from .parallel import Processes

TENSORS, STATE = "tensors.safetensors", "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands. step: how many are done. data: the position of the batches after them. best: the lowest validation
    loss so far and the step that had it. stale: validations since then. tokens: read so far, as the size of a batch counts
    them. threads, processes: how many compute it."""

    step: int = 0
    data: Any = None
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    tokens: int = 0
    threads: int = field(default_factory=torch.get_num_threads)
    processes: int = 1


class Checkpoints:
    """The checkpoints of a run folder. keep_last: how many of the newest stay; the best one stays besides. processes: those
    that save and load together, each its part of a model."""

    def __init__(self, run: str | os.PathLike, keep_last: int = 2, processes: Processes | None = None):
        self.folder, self.keep_last = Path(run) / "checkpoints", keep_last
        self.processes = processes or Processes()

    def steps(self) -> list[int]:
        """Of those that are there, ascending."""
        names = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(m[1]) for p in names if (m := re.fullmatch(r"step-(\d+)", p.name)))

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        progress: Progress,
        drawn: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Writes one and removes those that are not kept. drawn: `generators()` after that step, where more was drawn since.
        CheckpointError: it cannot be written; older ones are untouched."""
        new = ReplacingFolder(self.path(progress.step))
        state = asdict(progress) | {"versions": {"fastllm": __version__, "torch": torch.__version__}}
        try:
            self.processes.first(new.begin)
            self._write(new.part, dict(self._tensors(model, optimizer, drawn)))
            self.processes.first(lambda: (new.part / STATE).write_text(json.dumps(state, indent=1)))
            self.processes.first(new.finish)
        except (OSError, safetensors.SafetensorError) as error:
            new.drop()
            last = self.steps()
            left = f"the last one is {self.path(last[-1])}" if last else "there is none yet"
            raise CheckpointError(
                f"no checkpoint of step {progress.step} could be written in {self.folder}: {error}. Make room, or give "
                f"another folder; {left}"
            ) from error
        self.processes.first(lambda: self._remove_old(progress))
        return new.folder

    def _write(self, part: Path, tensors: Mapping[str, Tensor]) -> None:
        if self.processes.count == 1:
            safetensors.torch.save_file({name: t.detach().contiguous() for name, t in tensors.items()}, part / TENSORS)
            return
        from torch.distributed import checkpoint

        writer = checkpoint.HuggingFaceStorageWriter(str(part), save_distributed=True)
        try:
            checkpoint.save({name: t.detach() for name, t in tensors.items()}, storage_writer=writer)
        except checkpoint.CheckpointException as error:  # the same one in every process; no Exception
            raise OSError(_reason(error)) from error

    def _remove_old(self, progress: Progress) -> None:
        for step in self.steps()[: -self.keep_last]:
            if step not in (progress.best_step, progress.step):
                shutil.rmtree(self.path(step), ignore_errors=True)

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
            tensors = self._read(path, dict(self._tensors(model, optimizer)))
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
            _set_random(kinds["random"], self.processes.rank)
        return progress

    def _read(self, path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is there by name. Several processes read no more than what they hold of each tensor of theirs; of what fits none
        the shape is told, by a tensor without content."""
        alone = self.processes.count == 1
        if alone and (path / TENSORS).exists():
            return safetensors.torch.load_file(path / TENSORS)
        try:
            from torch.distributed import checkpoint

            reader = checkpoint.HuggingFaceStorageReader(str(path))
        except (ImportError, AttributeError) as error:
            raise CheckpointError(
                f"{path} was written by several processes, which torch {torch.__version__} cannot read; take torch 2.9 or "
                "later"
            ) from error
        found = {}
        for name, stored in reader.read_metadata().state_dict_metadata.items():
            dtype, like = stored.properties.dtype, own.get(name)
            fits = like is not None and like.shape == stored.size
            found[name] = (
                torch.empty_like(like, dtype=dtype) if fits else torch.empty(stored.size, dtype=dtype, device="meta")
            )
        wanted = {name: t for name, t in found.items() if not t.is_meta}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as asked
                checkpoint.load(wanted, storage_reader=reader, no_dist=alone)
        except checkpoint.CheckpointException as error:
            raise OSError(_reason(error)) from error
        return found

    def _tensors(
        self, model: nn.Module, optimizer: Optimizer | None, drawn: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"model.{name}", t) for name, t in _model_tensors(model))
        if optimizer is None:
            return
        yield from ((f"optimizer.{name}", t) for name, t in optimizer.tensors())
        states = generators() if drawn is None else drawn
        yield from ((f"random.{self.processes.rank}.{name}", t) for name, t in states.items())


def generators() -> dict[str, Tensor]:
    """The states of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda{i}": t for i, t in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each once: a tied weight has one name."""
    yield from model.named_parameters()
    persistent = model.state_dict(keep_vars=True)
    yield from ((name, b) for name, b in model.named_buffers() if name in persistent)


def _set_random(states: Mapping[str, Tensor], rank: int) -> None:
    """Of a process that was not there before, nothing is known, and its generators stay as they are."""
    for name, state in states.items():
        process, _, generator = name.partition(".")
        if int(process) != rank:
            continue
        if generator == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available() and (i := int(generator.removeprefix("cuda"))) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, i)


def _reason(error: BaseException) -> str:
    """What went wrong in the first of the processes in which something did."""
    return next((f"{type(e[0]).__name__}: {e[0]}" for e in getattr(error, "failures", {}).values()), str(error))


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
