"""LoRA adapters in PEFT's folder, adapter_config.json and adapter_model.safetensors, both ways (Hu et al. 2021).

A `Lora` holds A and B of each module under the name that transformers gives it. `parts` maps them onto our projections, of
which some stack several modules (q, k and v; gate and up) and some order their rows in another way than the file (BLOOM).
Weights of a GGUF lie in the order of transformers once they are loaded, and so do the rows of B.

What would change the meaning and is not built here is refused: adapters of the embedding or of the head, modules that were
trained whole, biases, initialisations that change the base, keys of later formats that are switched on. Pickles never load.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import Replacing
from ..models.decoder import Decoder
from ..models.families import FAMILIES, Names
from ..models.folder import KINDS, lengths, read_json

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
ROLES = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
ROLES |= {"lora_magnitude_vector.weight": "magnitude"}
# Keys of adapter_config.json that do not change what the adapter computes; of the others that we do not read, each must be off.
HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "runtime_config",
}  # fmt: skip
READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out", "init_lora_weights",
}  # fmt: skip
INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others leave another base behind


@dataclass(frozen=True)
class Pair:
    """The adapter of one module: a [R, K], b [N, R] and, of DoRA, magnitude [N]; float32."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Lora:
    """pairs: by the module's name in transformers, such as model.layers.0.self_attn.q_proj. The other fields are those of
    PEFT's config under its names; patterns are regular expressions of the end of a module's name."""

    pairs: Mapping[str, Pair]
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str = ()
    exclude_modules: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None
    base: str | None = None

    @property
    def use_dora(self) -> bool:
        """Whether it has magnitudes."""
        return any(pair.magnitude is not None for pair in self.pairs.values())

    def rank(self, name: str) -> int:
        """What the config says of a module."""
        return _matched(self.rank_pattern, name, self.r)

    def scale(self, name: str) -> float:
        """alpha / r, or alpha / sqrt(r) of a rank-stabilised adapter (Kalajdzievski 2023, arXiv 2312.03732)."""
        alpha, rank = _matched(self.alpha_pattern, name, self.lora_alpha), self.rank(name)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, name: str) -> bool:
        """Whether the config names a module. As in PEFT no layers are all of them, and a whole name counts in any layer."""
        if not _named(self.target_modules, name) or _named(self.exclude_modules, name):
            return False
        if not self.layers or name in self.target_modules:
            return True
        index = re.search(r"\.(\d+)\.", f".{name}")
        return index is not None and int(index[1]) in self.layers


def _matched(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _named(targets: tuple[str, ...] | str, name: str) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


# --------------------------------------------------------------------------------------------------------------- read


def read(path: str | os.PathLike) -> Lora:
    """The adapter of a folder. FileNotFoundError where there is none; ValueError for what cannot be used, with the reason."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; give a folder that PEFT's save_pretrained wrote, with {CONFIG} and {WEIGHTS} "
            "(one of the Hub is fetched by huggingface_hub.snapshot_download)"
        )
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}; an adapter is a folder that PEFT's save_pretrained wrote")
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise ValueError(
                f"{folder}: {PICKLE} is a pickle, and loading one runs code of whoever made it; it is refused. Where you "
                "trust it, load it with PEFT and save it again: save_pretrained writes safetensors"
            )
        raise ValueError(f"{folder} has no {WEIGHTS}; fetch the adapter again")
    config = _config(folder / CONFIG)
    lora = Lora(_pairs(folder / WEIGHTS), **config)
    for name, pair in lora.pairs.items():
        if not lora.targets(name):
            raise ValueError(
                f"{folder}: {WEIGHTS} holds an adapter of {name!r}, which target_modules of {CONFIG} does not name; the "
                "two files do not belong together"
            )
        if lora.rank(name) != pair.a.shape[0]:
            raise ValueError(
                f"{folder}: {name!r} has rank {pair.a.shape[0]}, {CONFIG} says {lora.rank(name)}; the two files do not "
                "belong together"
            )
    return lora


def _config(file: Path) -> dict[str, Any]:
    """Fields of `Lora`."""
    try:
        stored = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}; fetch the adapter again") from error

    def get(key: str, kind: Any, default: Any) -> Any:
        value = stored.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{file}: {key} is {value!r}, of another type than PEFT writes")
        return value

    def strings(key: str) -> tuple[str, ...] | str:
        value = get(key, (str, list), ())
        return value if isinstance(value, str) else tuple(map(str, value))

    def refuse(key: str, allowed: str) -> None:
        raise ValueError(f"{file}: {key}={stored[key]!r} is not supported; allowed: {allowed}")

    if stored.get("peft_type") != "LORA":
        stored.setdefault("peft_type", None)
        refuse("peft_type", "'LORA'")
    if stored.get("bias", "none") != "none":
        refuse("bias", "'none'; a bias that was trained is part of the base, merge it there")
    if stored.get("modules_to_save"):
        refuse("modules_to_save", "None; modules that were trained whole are part of the base, merge them there")
    if stored.get("init_lora_weights", True) not in INITS:
        refuse(
            "init_lora_weights",
            "those that leave the base as it was; save the adapter with path_initial_model_for_weight_conversion",
        )
    for key, value in stored.items():
        if key not in READ | HARMLESS and value:
            refuse(key, f"None or False; it changes what the adapter computes, and {file.parent.name} was made with it")
    layers = get("layers_to_transform", (int, list), None)
    ranks, alphas = get("rank_pattern", dict, {}), get("alpha_pattern", dict, {})
    values = [get("r", int, 8), *ranks.values()]
    if not all(type(v) is int and v >= 1 for v in values):
        raise ValueError(f"{file}: ranks are {values}; allowed: integers of at least 1")
    alpha = get("lora_alpha", (int, float), 8)
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in (alpha, *alphas.values())):
        raise ValueError(f"{file}: alphas are {[alpha, *alphas.values()]}; allowed: finite numbers")
    return {
        "r": values[0],
        "lora_alpha": alpha,
        "use_rslora": get("use_rslora", bool, False),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": strings("target_modules"),
        "exclude_modules": strings("exclude_modules"),
        "layers": layers if layers is None else tuple(layers) if isinstance(layers, list) else (layers,),
        "base": get("base_model_name_or_path", str, None),
    }


def _pairs(file: Path) -> dict[str, Pair]:
    from safetensors import SafetensorError, safe_open

    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(str(file), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118, it is no mapping
                name, role = _split(key, file)
                if (kind := opened.get_slice(key).get_dtype()) not in KINDS:
                    raise ValueError(f"{file}: {key!r} is stored as {kind}; supported: {', '.join(KINDS)}")
                found.setdefault(name, {})[role] = opened.get_tensor(key).float()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}{lengths(file)}; fetch the adapter again") from error
    if not found:
        raise ValueError(f"{file} holds no adapter; fetch it again")
    for name, tensors in found.items():
        if missing := {"a", "b"} - tensors.keys():
            raise ValueError(f"{file}: {name!r} has no lora_{missing.pop().upper()}; fetch the adapter again")
        a, b, magnitude = tensors["a"], tensors["b"], tensors.get("magnitude")
        if a.dim() != 2 or b.dim() != 2 or not 0 < a.shape[0] == b.shape[1]:
            raise ValueError(
                f"{file}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} of {name!r} are no [R, K] and [N, R]"
            )
        if magnitude is not None and magnitude.shape != b.shape[:1]:
            raise ValueError(
                f"{file}: lora_magnitude_vector of {name!r} has shape {tuple(magnitude.shape)}, want {(b.shape[0],)}"
            )
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"{file}: the adapter of {name!r} has NaN or infinite entries; its training has failed")
    return {name: Pair(**tensors) for name, tensors in found.items()}


def _split(key: str, file: Path) -> tuple[str, str]:
    """Module and role of a tensor."""
    for suffix, role in ROLES.items():
        if key.startswith(PREFIX) and key.endswith(f".{suffix}"):
            return key[len(PREFIX) : -len(suffix) - 1], role
    raise ValueError(
        f"{file}: tensor {key!r} is not supported; allowed: {PREFIX}MODULE with .lora_A.weight, .lora_B.weight and "
        ".lora_magnitude_vector (no adapters of the embedding or the head, no biases, no modules that were trained whole)"
    )


# -------------------------------------------------------------------------------------------------------------- write


def write(path: str | os.PathLike, lora: Lora, dtype: torch.dtype | None = None) -> None:
    """Writes a folder that `read` and PEFT read; dtype: of the tensors, None keeps float32. Nothing is replaced before all is
    written."""
    from safetensors.torch import save_file

    tensors = {}
    for name, pair in lora.pairs.items():
        given = {"lora_A.weight": pair.a, "lora_B.weight": pair.b, "lora_magnitude_vector": pair.magnitude}
        tensors |= {f"{PREFIX}{name}.{role}": t for role, t in given.items() if t is not None}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora.base,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "target_modules": _list(lora.target_modules) or sorted({name.rsplit(".", 1)[1] for name in lora.pairs}),
        "exclude_modules": _list(lora.exclude_modules),
        "layers_to_transform": lora.layers and list(lora.layers),
        "fan_in_fan_out": any(_transposed(name) for name in lora.pairs),
        "bias": "none",
    }
    stored = {k: t.detach().to("cpu", dtype or torch.float32).contiguous() for k, t in tensors.items()}
    with Replacing(path) as files:
        save_file(stored, files.part(WEIGHTS), {"format": "pt"})
        files.write(CONFIG, json.dumps(config, indent=2))


def _list(targets: tuple[str, ...] | str) -> list[str] | str | None:
    return targets if isinstance(targets, str) else list(targets) or None


def _transposed(name: str) -> bool:
    """Whether transformers keeps the module's weight as [inputs, outputs]: GPT-2 does."""
    return any(name.endswith(f".{part}") for family in FAMILIES.values() for part in family.names.transposed)


# -------------------------------------------------------------------------------------------------- onto our projections

Place = tuple[int, str]  # layer, and the name of its projection
Parts = tuple[tuple[Pair, float] | None, ...]  # of what a projection stacks: the adapter and its scale


def modules(model: Decoder) -> dict[Place, dict[str, tuple[int, int]]]:
    """Every projection of the layers, and what it stacks: modules by their names in transformers, and their weights' shapes."""
    names, found = _names(model), {}
    for index, layer in enumerate(model.layers):
        for ours in ("qkv", "out", layer.first, "down"):
            stacked = names.of(f"layers.{index}.{ours}.weight")
            rows, depth = layer.get_submodule(ours).weight.shape
            sizes = model.config.stacks[ours] if len(stacked) > 1 else (rows,)
            held = zip(stacked, sizes, strict=True)
            found[index, ours] = {name.removesuffix(".weight"): (size, depth) for name, size in held}
    return found


def parts(lora: Lora, model: Decoder) -> dict[Place, Parts]:
    """The adapter of each of the model's projections that it has one for; rows of B as our weights have them.

    ValueError for an adapter of another base, of a module that cannot have one, or one that is incomplete.
    """
    names, places = _names(model), modules(model)
    table = {name for stacked in places.values() for name in stacked}
    full = {name if name in table else names.base + name: name for name in lora.pairs}
    strange = [name for given, name in full.items() if given not in table]
    if strange:
        known = sorted({name.split(".", names.layer.count("."))[-1] for name in table})
        raise ValueError(
            f"the adapter is for {strange[0]!r}, which no layer of this {model.config.family} has; allowed are "
            f"{', '.join(known)} of its {model.config.layers} layers"
        )
    absent = [name for name in sorted(table) if name not in full and lora.targets(name)]
    if absent:
        raise ValueError(f"the adapter is incomplete: its config names {absent[0]!r}, its file does not hold it")
    found: dict[Place, Parts] = {}
    for place, stacked in places.items():
        each = []
        for name, shape in stacked.items():
            order = names.order_of(f"{name}.weight", model.config)
            each.append(_ordered(lora, full[name], shape, order) if name in full else None)
        if any(each):
            found[place] = tuple(each)
    return found


def _names(model: Decoder) -> Names:
    return next(f.names for f in FAMILIES.values() if f.name == model.config.family)


def _ordered(lora: Lora, name: str, shape: tuple[int, int], order: Tensor | None) -> tuple[Pair, float]:
    pair = lora.pairs[name]
    if (pair.b.shape[0], pair.a.shape[1]) != shape:
        raise ValueError(
            f"the adapter of {name!r} is for a weight {(pair.b.shape[0], pair.a.shape[1])}, this model's is {shape}; it was "
            f"trained on another base{f' ({lora.base})' if lora.base else ''}"
        )
    if order is not None:
        pair = Pair(pair.a, pair.b[order], None if pair.magnitude is None else pair.magnitude[order])
    return pair, lora.scale(name)
