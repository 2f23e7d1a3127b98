"""Folders as transformers writes them, config.json and safetensors, in one file or in shards: read tensor by tensor, written
whole. A model family is a table of names: for each of our parameters, the tensors of the file that it is stacked from."""

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import Replacing
from ..hub import check_no_pickle
from .arena import available_memory
from .text import FILES as TEXT_FILES
from .text import write_text

KINDS = ("F32", "F16", "BF16")
PIECE = 4096  # rows of two tensors that are compared at once
OWN_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Names:
    """ours: parameter -> names in the file, stacked by rows. A name may be "new|old": the first that is there is read, the
    first is written. None stands for zeros, which are not stored. shapes: parameter -> how the file shapes it, where not as
    we do. unused: regular expressions of what else a file of this family may hold."""

    ours: Mapping[str, tuple[str | None, ...]]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file. ValueError, naming the file, where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return content


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first that a config.json names."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else "(none named)"


class Folder:
    """config: the content of config.json. ValueError, naming the file, for what cannot be read; pickles are refused."""

    def __init__(self, path: str | os.PathLike):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        self.where: dict[str, tuple[Path, str, tuple[int, ...]]] = {}  # name -> file, dtype, shape
        for file in self._files():
            try:
                with safe_open(str(file), framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118, it is no mapping
                        part = opened.get_slice(name)
                        self._check_once(name, file)
                        self.where[name] = (file, part.get_dtype(), tuple(part.get_shape()))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read: {error}{lengths(file)}; fetch it again") from error

    def _check_once(self, name: str, file: Path) -> None:
        if name in self.where:
            raise ValueError(
                f"{self.path}: tensor {name!r} is in {self.where[name][0].name} and in {file.name}; remove the one that is not "
                "of this model"
            )

    def _files(self) -> list[Path]:
        index, whole = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if whole.exists():  # beside an index too, as in transformers: the index is of what stood there before
            return [whole]
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} cannot be read: {error!r}; fetch it again") from error
            missing = [name for name in names if not (self.path / name).is_file()]
            if missing:
                raise ValueError(
                    f"{self.path}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}"
                )
            return [self.path / name for name in names]
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            check_no_pickle(self.path)
            raise ValueError(f"{self.path} has no .safetensors file; fetch the model again")
        return files

    @property
    def architecture(self) -> str:
        """The first that config.json names."""
        return architecture_of(self.config)

    def get(self, key: str, kind: type = int, default: Any = None) -> Any:
        """A field of config.json. ValueError where it is missing and has no default, or is of another type."""
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{self.path}/config.json lacks {key!r}; the file is incomplete")
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{self.path}/config.json: {key} is {value!r}, wanted {kind.__name__}")
        return value

    def check_layers(self, count: Any) -> None:
        """ValueError for more layers than the file can hold, before anything is built."""
        if isinstance(count, int) and count > len(self.where):
            raise ValueError(f"{self.path}: config.json wants {count} layers, the files hold {len(self.where)} tensors")

    def find(self, names: str) -> str | None:
        """The first of "new|old" that is there."""
        return next((name for name in names.split("|") if name in self.where), None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is there."""
        return self.where[name][2]

    def read(self, name: str) -> Tensor:
        """A tensor as float32, in memory of its own."""
        from safetensors import safe_open

        file, kind, _ = self.where[name]
        if kind not in KINDS:
            raise ValueError(f"{self.path}: tensor {name!r} is stored as {kind}; supported: {', '.join(KINDS)}")
        with safe_open(str(file), framework="pt") as opened:
            return opened.get_tensor(name).to(torch.float32, copy=True)

    def differ(self, one: str, other: str) -> bool:
        """Whether two tensors are both there and hold other numbers: then a file has untied what its config calls tied."""
        from safetensors import safe_open

        if one not in self.where or other not in self.where:
            return False
        (file, _, shape), (other_file, _, other_shape) = self.where[one], self.where[other]
        if shape != other_shape:
            return True
        with safe_open(str(file), framework="pt") as a, safe_open(str(other_file), framework="pt") as b:
            left, right = a.get_slice(one), b.get_slice(other)
            pieces = (slice(start, start + PIECE) for start in range(0, shape[0] if shape else 0, PIECE))
            return not all(torch.equal(left[rows].float(), right[rows].float()) for rows in pieces)


def lengths(file: Path) -> str:
    """How many bytes a damaged file of safetensors has and should have by its header, where these differ."""
    at_least = "at least "  # the header alone
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            wanted = 8 + int.from_bytes(opened.read(8), "little")
            if size >= wanted:
                at_least, entries = "", json.loads(opened.read(wanted - 8)).items()
                wanted += max((e["data_offsets"][1] for name, e in entries if name != "__metadata__"), default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""
    return "" if size == wanted else f" (it has {size} bytes, by its header it should have {at_least}{wanted})"


def fill(model: nn.Module, names: Names, folder: Any) -> nn.Module:
    """Reads every parameter of `model`, which may lie on the meta device; `folder` has path, where, find, shape and read.

    ValueError for a tensor that is missing, of another shape, or left over: a bias that is not read, say, would change the
    model silently. MemoryError where they would not fit. Nothing is read before that is known.
    """
    known: set[str] = set()
    plan: list[tuple[str, nn.Parameter, list[str | None]]] = []
    for ours, parameter in list(model.named_parameters()):
        stored = []
        for part in names.ours[ours]:
            found = part and folder.find(part)
            if part and not found:
                raise ValueError(
                    f"{folder.path}: there is no tensor {part.split('|')[0]!r}; a shard is missing or it is another model"
                )
            stored.append(found)
        known.update(name for name in stored if name)
        plan.append((ours, parameter, stored))
        wanted = _wanted(names, ours, parameter, stored)
        for name in stored:
            if name and folder.shape(name) != wanted:
                raise ValueError(f"tensor {name!r} has shape {folder.shape(name)}, the config wants {wanted}")
    left = [name for name in folder.where if name not in known and not any(re.fullmatch(u, name) for u in names.unused)]
    if left:
        raise ValueError(
            f"{folder.path}: the file holds {len(left)} tensors that this model does not have, {left[0]!r} first; "
            "it is another model"
        )
    check_memory(model, folder.path)
    for ours, parameter, stored in plan:
        wanted, rows = _wanted(names, ours, parameter, stored), parameter.shape[0] // len(stored)
        read = (folder.read(name) if name else torch.zeros(wanted) for name in stored)
        pieces = [piece.reshape(rows, *parameter.shape[1:]) for piece in read]
        *parents, leaf = ours.split(".")
        owner = model.get_submodule(".".join(parents))
        setattr(owner, leaf, nn.Parameter(pieces[0] if len(pieces) == 1 else torch.cat(pieces)))
    return model.eval()


def _wanted(names: Names, ours: str, parameter: Tensor, stored: Sequence[str | None]) -> tuple[int, ...]:
    """The shape of each tensor that a parameter is stacked from."""
    return names.shapes.get(ours, (parameter.shape[0] // len(stored), *parameter.shape[1:]))


def skeleton(make: Callable[[], nn.Module], path: Path) -> nn.Module:
    """A model without memory for its weights. ValueError for sizes that no memory could hold."""
    try:
        with torch.device("meta"):
            return make()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: a model of these sizes cannot be: {error}") from error


def check_memory(model: nn.Module, path: Path) -> None:
    """MemoryError where a skeleton's weights would not fit, in float32, into what is free."""
    wanted, free = 4 * sum(p.numel() for p in model.parameters()), available_memory(torch.device("cpu"))
    if wanted > free:
        raise MemoryError(
            f"{path}: its weights take {wanted / 1e9:.1f} GB in float32, {free / 1e9:.1f} GB are free; take a smaller model or a "
            "machine with more memory, or decode it by LLM in int8 or int4"
        )


@dataclass(frozen=True)
class Writing:
    """How a folder is written: dtype of the tensors, None keeps the parameters' own; shards of at most shard_bytes; `more`:
    further keys for config.json; text: the file or folder whose tokenizer and chat template go with it."""

    dtype: torch.dtype | None = None
    shard_bytes: int = 5 * 10**9
    more: Mapping[str, Any] | None = None
    text: Path | None = None


def write(folder: str | os.PathLike, model: nn.Module, names: Names, config: dict[str, Any], how: Writing) -> None:
    """config.json and safetensors. Nothing in the folder is replaced before all is written."""
    write_tensors(folder, list(_stored(model, names)), config, how)


def _stored(model: nn.Module, names: Names) -> Iterator["Stored"]:
    for ours, parameter in model.named_parameters():
        stored = names.ours[ours]
        for name, rows in zip(stored, parameter.detach().chunk(len(stored)), strict=True):
            if name:
                yield name.split("|")[0], rows, functools.partial(rows.reshape, names.shapes.get(ours, rows.shape))


# A tensor of a folder: its name, the rows of a parameter that it holds, and what makes it of them.
Stored = tuple[str, Tensor, Callable[[], Tensor]]


def write_tensors(folder: str | os.PathLike, tensors: Sequence[Stored], config: dict[str, Any], how: Writing) -> None:
    """The same of tensors under the file's names; each is made when its shard is written."""
    folder = Path(folder)
    dtype = how.dtype or tensors[0][1].dtype
    config = config | {"torch_dtype": str(dtype).removeprefix("torch.")} | dict(how.more or {})
    with Replacing(folder) as files:
        shards = _write_shards(files, _shards(tensors, dtype, how.shard_bytes), dtype)
        files.write("config.json", json.dumps(config, indent=2))
        if len(shards) > 1:
            total = sum(rows.numel() for _, rows, _ in tensors) * dtype.itemsize
            where = {name: file for file, held in shards.items() for name in held}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            files.write("model.safetensors.index.json", json.dumps(index, indent=2))
        if how.text:
            write_text(how.text, files)
    stood_here = [file.name for file in folder.iterdir() if OWN_FILES.fullmatch(file.name)]
    for name in [*stood_here, *(TEXT_FILES if how.text else ())]:
        if name not in files.parts:
            (folder / name).unlink(missing_ok=True)


def _shards(tensors: Sequence[Stored], dtype: torch.dtype, limit: int) -> list[list[Stored]]:
    """In groups of at most `limit` bytes."""
    plan: list[list[Stored]] = [[]]
    size = 0
    for stored in tensors:
        nbytes = stored[1].numel() * dtype.itemsize
        if plan[-1] and size + nbytes > limit:
            plan.append([])
            size = 0
        plan[-1].append(stored)
        size += nbytes
    return plan


def _write_shards(files: Replacing, plan: list[list[Stored]], dtype: torch.dtype) -> dict[str, list[str]]:
    """Final file name -> names of the tensors in it."""
    from safetensors.torch import save_file

    shards = {}
    for i, shard in enumerate(plan, 1):
        file = "model.safetensors" if len(plan) == 1 else f"model-{i:05}-of-{len(plan):05}.safetensors"
        whole = {name: make().to("cpu", dtype).clone(memory_format=torch.contiguous_format) for name, _, make in shard}
        save_file(whole, files.part(file), {"format": "pt"})
        shards[file] = list(whole)
    return shards
