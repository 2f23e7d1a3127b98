"""Weights from files and to files: GGUF as stored, folders of transformers; tensor by tensor, into panels or into Parameters."""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..ops import Panels, QWeight
from ..ops.linear import unpack
from ..ops.quant_linear import GROUP, STORED
from .arena import Arena
from .blocks import Embedding, Projection, make_gains
from .decoder import Decoder
from .families import FAMILIES, write_config
from .folder import Stored, Writing, check_memory, skeleton, write_tensors
from .sources import Source, float_rows, open_source
from .text import ends_of

FEW_BITS = ("Q4_0", "Q4_1", "Q4_K", "Q5_0")  # 5 or fewer: quantising them again only loses quality
WIDENED = {"Q5_0": "Q8_0"}  # what a source hands over without loss as another type


# --------------------------------------------------------------------------------------------------------------- load


def load(path: str | Path) -> nn.Module:
    """The model in a .gguf file or a folder of transformers, its weights float32 Parameters (a GGUF is dequantised)."""
    source = open_source(path)
    model = skeleton(lambda: Decoder(source.config), Path(path))
    _check(source, model)
    check_memory(model, Path(path))
    for ours, module, leaf in _parameters(model):
        setattr(module, leaf, nn.Parameter(float_rows(source, ours)))
        _release(source, ours)
    if source.config.tied:
        model.head.weight = model.embedding.weight
    return model.eval()


def load_packed(path: str | Path, quantize: str | None = None, as_float: bool = False) -> Decoder:
    """The model with weights packed for decoding on a CPU, in one arena, read tensor by tensor.

    quantize: None keeps what is stored (Q4_0, Q4_1, Q5_0, Q8_0 without loss; other types become float32 panels); "int8",
    "int4" quantise in groups of 32 what is not stored so already. as_float: float32 panels whatever is stored. What is stored
    in 5 bits or fewer is never quantised to int4 again: ValueError.
    """
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"quantize={quantize!r}; allowed: None, 'int8', 'int4'")
    if quantize and as_float:
        raise ValueError(f"quantize={quantize!r} and float32 weights exclude each other; give one of the two")
    source = open_source(path)
    model = skeleton(lambda: Decoder(source.config), Path(path))
    _check(source, model)
    forms = {ours: _form(source, ours, model, module, quantize, as_float) for ours, module, _ in _parameters(model)}
    try:
        arena = Arena(sum(-(-f.nbytes // 4096) * 4096 for f in forms.values() if f))
    except MemoryError as error:
        raise MemoryError(
            f"the weights of {path}: {error}; quantize them to int8 or int4, or take a smaller model"
        ) from error
    for ours, module, leaf in _parameters(model):
        form = forms[ours]
        if form is None:
            setattr(module, leaf, nn.Parameter(float_rows(source, ours), requires_grad=False))
        else:
            module.pack(form.build(source, ours, arena.take(form.nbytes)))
        _release(source, ours)
    if source.config.tied:
        model.head.pack(model.embedding.weight)
    model.arena = arena
    model.eval().requires_grad_(False)
    make_gains(model)
    return model


def load_decoding(
    path: str | Path, device: torch.device, quantize: str | None = None, as_float: bool = False
) -> Decoder:
    """`load_packed`, on a CPU or a GPU; there weights that are not quantised are bfloat16, or float32 where as_float."""
    model = load_packed(path, quantize, as_float)
    return model if device.type == "cpu" else to_device(model, device, torch.float32 if as_float else torch.bfloat16)


def to_device(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Moves a model to a GPU, packed or not: panels, which are a CPU's, become row-major again, quantised weights go as they
    are. The rest takes `dtype`, or float32 where any weight is quantised: that is what their kernels take."""
    moved: dict[int, nn.Parameter | QWeight] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, (Panels, QWeight)):
            continue
        if id(weight) not in moved:
            if isinstance(weight, QWeight):
                moved[id(weight)] = replace(weight, data=weight.data.to(device))
            else:
                dense = unpack(weight.data, weight.rows, weight.swiglu)
                moved[id(weight)] = nn.Parameter(dense, requires_grad=False)
        module.weight = moved[id(weight)]
    if any(isinstance(weight, QWeight) for weight in moved.values()):
        dtype = torch.float32
    model.arena = None
    model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    make_gains(model)
    return model


@dataclass(frozen=True)
class Form:
    """How a weight is held: float32 panels (bits 32), or quantised with bits and minima."""

    rows: int
    depth: int
    swiglu: bool
    bits: int = 32
    has_min: bool = False

    @property
    def nbytes(self) -> int:
        if self.bits == 32:
            return Panels.nbytes_for(self.rows, self.depth, self.swiglu)
        return QWeight.nbytes_for(self.rows, self.depth, self.bits, self.has_min, self.swiglu)

    def holds(self, kind: str) -> bool:
        """Whether blocks of this type go in without loss."""
        kind = WIDENED.get(kind, kind)
        return kind in STORED and STORED[kind][0] <= self.bits and STORED[kind][1] <= self.has_min

    def build(self, source: Source, ours: str, out: Tensor) -> Panels | QWeight:
        if self.bits == 32:
            return Panels.pack(float_rows(source, ours), self.swiglu, out)
        packed = QWeight.empty(self.rows, self.depth, self.bits, self.has_min, self.swiglu, out)  # the arena is zeros
        first = 0
        for name in source.names(ours):
            if self.holds(source.kind(name)):
                kind, pieces = source.stored_rows(name)
                for blocks in pieces:
                    first = packed.fill(first, blocks, kind)
            else:
                first = packed.fill_quantized(first, source.float_rows(name))
        return packed


def _form(
    source: Source, ours: str, model: Decoder, module: nn.Module, quantize: str | None, as_float: bool
) -> Form | None:
    """None for what stays a float32 Parameter: norms, biases, and positions, which are only looked up."""
    if not isinstance(module, (Projection, Embedding)) or ours.endswith("bias") or module is model.positions:
        return None
    shape = module.weight.shape
    plain = Form(*shape, getattr(module, "swiglu", False))
    kinds = {name: source.kind(name) for name in source.names(ours)}
    if quantize:
        for name, kind in kinds.items():
            if shape[1] % GROUP:
                raise ValueError(
                    f"quantize={quantize!r}: {name} has rows of {shape[1]}, no multiple of {GROUP}; leave it out"
                )
            if quantize == "int4" and kind in FEW_BITS:
                raise ValueError(
                    f"{name} is stored as {kind}: quantising 5 bits or fewer again only loses quality; "
                    "leave quantize out to run the file as stored, or take a file with more bits"
                )
        return replace(plain, bits=8 if quantize == "int8" else 4)
    stored = [STORED.get(WIDENED.get(kind, kind)) for kind in kinds.values()]
    if as_float or None in stored:
        return plain
    return replace(plain, bits=max(s[0] for s in stored), has_min=any(s[1] for s in stored))


def _parameters(model: Decoder) -> list[tuple[str, nn.Module, str]]:
    """Every parameter that a file holds: our name, its module, and its name there; the head only where it has its own."""
    found = []
    for ours, _ in model.named_parameters():
        path, leaf = ours.rsplit(".", 1)
        found.append((ours, model.get_submodule(path), leaf))
    return found


def _check(source: Source, model: Decoder) -> None:
    """Every tensor of the model is in the file with the config's shape, and nothing else is: a bias that is left out,
    say, would change the model silently."""
    known: set[str] = set()
    for ours, module, leaf in _parameters(model):
        rows, *cols = getattr(module, leaf).shape
        names = source.names(ours)
        known.update(names)
        parts = model.config.stacks[ours.split(".")[-2]] if len(names) > 1 else (rows,)
        for name, part in zip(names, parts, strict=True):
            source.kind(name)
            if source.shape(name) != (part, *cols):
                raise ValueError(f"tensor {name!r} has shape {source.shape(name)}, the config wants {(part, *cols)}")
    left = source.extra_names(known)
    if left:
        raise ValueError(
            f"the file holds {len(left)} tensors that a plain {model.config.family} does not have, {left[0]!r} first; "
            "it is another model"
        )


def _release(source: Source, ours: str) -> None:
    for name in source.names(ours):
        source.release(name)


# --------------------------------------------------------------------------------------------------------------- save


def save(model: Decoder, path: str | os.PathLike, how: Writing) -> None:
    """Writes a folder that `load` and transformers read. TypeError for packed weights; ValueError for a config that
    transformers has no class for."""
    if any(isinstance(getattr(m, "weight", None), (Panels, QWeight)) for m in model.modules()):
        raise TypeError("save: the weights are packed for decoding; load the model with fastllm.models.load to save it")
    write_tensors(path, list(stored_parts(model)), write_config(model.config) | ends_of(how.text), how)


def stored_parts(model: Decoder) -> Iterator[Stored]:
    """Every tensor of the folder of a model."""
    c = model.config
    names = next(f.names for f in FAMILIES.values() if f.name == c.family)

    def as_stored(name: str, part: Tensor) -> Tensor:
        order = names.order_of(name, c)
        part = part if order is None else part[order.argsort().to(part.device)]
        return part.t() if names.is_transposed(name) else part

    for ours, parameter in model.named_parameters():
        stored = names.of(ours)
        parts = parameter.detach().split(c.stacks[ours.split(".")[-2]]) if len(stored) > 1 else [parameter.detach()]
        for name, part in zip(stored, parts, strict=True):
            yield name, part, functools.partial(as_stored, name, part)
