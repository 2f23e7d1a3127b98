"""Loads models from files: GGUF as stored, HF safetensors folders; tensor by tensor, into panels or into Parameters.

A foreign file is a name table: for each of our parameters, the tensors of the file that make it up, stacked by rows.
"""

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..ops import Panels, QWeight
from ..ops.quant_linear import GROUP, STORED
from .arena import Arena
from .decoder import Decoder, DecoderConfig
from .gguf import GGUFFile, check_supported, llama_unpermute_rows

# ours -> the file's names, stacked by rows
GGUF_LAYER = {
    "attn_norm": ("attn_norm",),
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "out": ("attn_output",),
    "mlp_norm": ("ffn_norm",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}
GGUF_TOP = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
HF_LAYER = {
    "attn_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
HF_TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
GGUF_ARCHITECTURES = ("llama",)
HF_ARCHITECTURES = ("LlamaForCausalLM",)
HF_KINDS = ("F32", "F16", "BF16")
FEW_BITS = ("Q4_0", "Q4_1", "Q4_K", "Q5_0")  # 5 or fewer: quantising them again only loses quality
PIECE = 4096  # rows of blocks copied out of a file at once


def _unknown(what: str, known: Iterable[str], path: Path) -> ValueError:
    near = difflib.get_close_matches(what, list(known), n=3, cutoff=0.0)
    return ValueError(
        f"{path}: architecture {what!r} is not supported; supported: {', '.join(known)}; nearest: {near[0]}"
    )


class Source(Protocol):
    """A file of weights under the file's own names."""

    config: DecoderConfig

    def all_names(self) -> Iterable[str]: ...
    def names(self, ours: str) -> tuple[str, ...]: ...
    def kind(self, name: str) -> str: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def float_rows(self, name: str) -> Tensor: ...
    def stored_rows(self, name: str) -> Iterator[Tensor]: ...
    def release(self, name: str) -> None: ...


class GGUFSource:
    """Weights of a GGUF of the Llama family."""

    def __init__(self, file: GGUFFile):
        self.file = file
        if file.architecture not in GGUF_ARCHITECTURES:
            raise _unknown(file.architecture, GGUF_ARCHITECTURES, file.path)
        meta = file.metadata
        self.config = self._config(meta)
        check_supported(file.tensors.values())

    def _config(self, meta: Any) -> DecoderConfig:
        def get(key: str, default: Any = None) -> Any:
            value = meta.get(f"llama.{key}", default)
            if value is None:
                raise ValueError(f"{self.file.path}: the metadata lacks llama.{key}; the file is incomplete")
            if not isinstance(value, (int, float)):
                raise ValueError(f"{self.file.path}: llama.{key} is {value!r}; one number for all layers is supported")
            return value

        scaling = meta.get("llama.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self.file.tensors:
            raise ValueError(f"{self.file.path}: rope scaling {scaling!r} is not supported; plain rope is")
        heads, dim = int(get("attention.head_count")), int(get("embedding_length"))
        head_dim = int(get("attention.key_length", dim // max(heads, 1)))
        for key in ("attention.value_length", "rope.dimension_count"):
            if get(key, head_dim) != head_dim:
                raise ValueError(
                    f"{self.file.path}: llama.{key} is {get(key)}, not the head size {head_dim}; not supported"
                )
        return DecoderConfig(
            vocab=self.shape("token_embd.weight")[0],
            layers=int(get("block_count")),
            dim=dim,
            ffn=int(get("feed_forward_length")),
            heads=heads,
            kv_heads=int(get("attention.head_count_kv", heads)),
            head_dim=head_dim,
            max_position=int(get("context_length")),
            rope_theta=float(get("rope.freq_base", 10000.0)),
            eps=float(get("attention.layer_norm_rms_epsilon")),
            tied="output.weight" not in self.file.tensors,
        )

    def all_names(self) -> Iterable[str]:
        return self.file.tensors

    def names(self, ours: str) -> tuple[str, ...]:
        if ours in GGUF_TOP:
            return (f"{GGUF_TOP[ours]}.weight",)
        _, index, part = ours.split(".")
        return tuple(f"blk.{index}.{n}.weight" for n in GGUF_LAYER[part])

    def kind(self, name: str) -> str:
        return self._info(name).type

    def _info(self, name: str):
        info = self.file.tensors.get(name)
        if info is None:
            raise ValueError(
                f"{self.file.path}: there is no tensor {name!r}; the file is incomplete or of another model"
            )
        return info

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._info(name).shape)

    def _order(self, name: str) -> Tensor | None:
        for part, heads in (("attn_q", self.config.heads), ("attn_k", self.config.kv_heads)):
            if f".{part}." in name:
                return llama_unpermute_rows(self.shape(name)[0], heads)
        return None

    def float_rows(self, name: str) -> Tensor:
        values, order = self.file.dequantize(name), self._order(name)
        return values if order is None else values[order]

    def stored_rows(self, name: str) -> Iterator[Tensor]:
        """The blocks as uint8 [n, bytes a row], in pieces."""
        blocks, order = self.file.rows(name), self._order(name)
        for start in range(0, len(blocks), PIECE):
            piece = slice(start, start + PIECE)
            yield torch.from_numpy(blocks[piece].copy() if order is None else blocks[order[piece].numpy()])

    def release(self, name: str) -> None:
        self.file.release(name)


class FolderSource:
    """Weights of an HF folder: config.json and safetensors, one file or sharded."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        try:
            self.hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}/config.json cannot be read: {error}") from error
        architecture = (self.hf.get("architectures") or ["(none named)"])[0]
        if architecture not in HF_ARCHITECTURES:
            raise _unknown(architecture, HF_ARCHITECTURES, folder)
        self.where: dict[str, tuple[Path, str, tuple[int, ...]]] = {}  # name -> file, dtype, shape
        for file in self._files():
            try:
                with safe_open(str(file), framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118, it is no mapping
                        part = opened.get_slice(name)
                        self.where[name] = (file, part.get_dtype(), tuple(part.get_shape()))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read: {error}; fetch it again") from error
        self.config = self._config()

    def _files(self) -> list[Path]:
        """The shards of the index, or model.safetensors, or what there is."""
        index, whole = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} cannot be read: {error!r}; fetch it again") from error
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise ValueError(
                    f"{self.folder}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}"
                )
            return [self.folder / name for name in names]
        files = [whole] if whole.exists() else sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{self.folder} has no .safetensors file; pickled checkpoints are refused, since loading one runs code"
            )
        return files

    def _config(self) -> DecoderConfig:
        hf = self.hf
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"{self.folder}: rope scaling {rope!r} is not supported; plain rope is")
        if hf.get("attention_bias") or hf.get("mlp_bias"):
            raise ValueError(f"{self.folder}: projections with a bias are not supported for Llama")
        if hf.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{self.folder}: hidden_act {hf['hidden_act']!r} is not supported; silu is")
        try:
            heads = hf["num_attention_heads"]
            return DecoderConfig(
                vocab=hf["vocab_size"],
                layers=hf["num_hidden_layers"],
                dim=hf["hidden_size"],
                ffn=hf["intermediate_size"],
                heads=heads,
                kv_heads=hf.get("num_key_value_heads") or heads,
                head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
                max_position=hf["max_position_embeddings"],
                rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
                eps=hf["rms_norm_eps"],
                tied=bool(hf.get("tie_word_embeddings")),
            )
        except KeyError as error:
            raise ValueError(f"{self.folder}/config.json lacks {error}; the file is incomplete") from error

    def all_names(self) -> Iterable[str]:
        """Without what older checkpoints hold besides the weights, and a tied head that is stored all the same."""
        tied = f"{HF_TOP['head']}.weight" if self.config.tied else None
        return [name for name in self.where if name != tied and not name.endswith("rotary_emb.inv_freq")]

    def names(self, ours: str) -> tuple[str, ...]:
        if ours in HF_TOP:
            return (f"{HF_TOP[ours]}.weight",)
        _, index, part = ours.split(".")
        return tuple(f"model.layers.{index}.{n}.weight" for n in HF_LAYER[part])

    def _entry(self, name: str) -> tuple[Path, str, tuple[int, ...]]:
        if name not in self.where:
            raise ValueError(f"{self.folder}: there is no tensor {name!r}; a shard is missing or it is another model")
        return self.where[name]

    def kind(self, name: str) -> str:
        kind = self._entry(name)[1]
        if kind not in HF_KINDS:
            raise ValueError(f"{self.folder}: tensor {name!r} is stored as {kind}; supported: {', '.join(HF_KINDS)}")
        return kind

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[2]

    def float_rows(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(str(self._entry(name)[0]), framework="pt") as opened:  # closed again: its pages leave the memory
            return opened.get_tensor(name).to(torch.float32, copy=True)

    def stored_rows(self, name: str) -> Iterator[Tensor]:
        raise TypeError(f"{name!r} holds {self.kind(name)}, no quantised blocks")

    def release(self, name: str) -> None:
        pass


def open_source(path: str | Path) -> GGUFSource | FolderSource:
    """A .gguf file or an HF folder; ValueError says what is wrong with it."""
    path = Path(path)
    return FolderSource(path) if path.is_dir() else GGUFSource(GGUFFile(path))


# --------------------------------------------------------------------------------------------------------------- load


def load(path: str | Path) -> nn.Module:
    """The model in a .gguf file or an HF folder, its weights float32 Parameters (a GGUF is dequantised)."""
    source = open_source(path)
    model = _skeleton(source.config)
    _check(source, model)
    for ours, module in _modules(model):
        module.weight = nn.Parameter(_float_rows(source, ours))
        _release(source, ours)
    if source.config.tied:
        model.head.weight = model.embedding.weight
    return model.eval()


def load_packed(path: str | Path, quantize: str | None = None, as_float: bool = False) -> Decoder:
    """The model with weights packed for decoding on a CPU, in one arena, read tensor by tensor.

    quantize: None keeps what is stored (Q4_0, Q4_1, Q8_0 without loss; other types become float32 panels); "int8", "int4"
    quantise in groups of 32 what is not stored so already. as_float: float32 panels whatever is stored. What is stored
    in 5 bits or fewer is never quantised to int4 again: ValueError.
    """
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"quantize={quantize!r}; allowed: None, 'int8', 'int4'")
    if quantize and as_float:
        raise ValueError(f"quantize={quantize!r} and float32 weights exclude each other; give one of the two")
    source = open_source(path)
    model = _skeleton(source.config)
    _check(source, model)
    forms = {ours: _form(source, ours, module, quantize, as_float) for ours, module in _modules(model)}
    arena = Arena(sum(-(-f.nbytes // 4096) * 4096 for f in forms.values() if f))
    for ours, module in _modules(model):
        form = forms[ours]
        if form is None:
            module.weight = nn.Parameter(_float_rows(source, ours), requires_grad=False)
        else:
            module.pack(form.build(source, ours, arena.take(form.nbytes)))
        _release(source, ours)
    if source.config.tied:
        model.head.pack(model.embedding.weight)
    model.arena = arena
    return model.eval().requires_grad_(False)


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
        return kind in STORED and STORED[kind][0] <= self.bits and STORED[kind][1] <= self.has_min

    def build(self, source: Source, ours: str, out: Tensor) -> Panels | QWeight:
        if self.bits == 32:
            return Panels.pack(_float_rows(source, ours), self.swiglu, out)
        packed = QWeight.empty(self.rows, self.depth, self.bits, self.has_min, self.swiglu, out)  # the arena is zeros
        first = 0
        for name in source.names(ours):
            if self.holds(source.kind(name)):
                for blocks in source.stored_rows(name):
                    first = packed.fill(first, blocks, source.kind(name))
            else:
                first = packed.fill_quantized(first, source.float_rows(name))
        return packed


def _form(source: Source, ours: str, module: nn.Module, quantize: str | None, as_float: bool) -> Form | None:
    shape = module.weight.shape
    if len(shape) == 1:
        return None
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
    if as_float or not all(kind in STORED for kind in kinds.values()):
        return plain
    stored = [STORED[kind] for kind in kinds.values()]
    return replace(plain, bits=max(s[0] for s in stored), has_min=any(s[1] for s in stored))


def _skeleton(config: DecoderConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


def _modules(model: Decoder) -> list[tuple[str, nn.Module]]:
    """Every module with a weight of the file, by our name; the head only where it has its own."""
    layers = [
        (f"layers.{i}.{part}", getattr(layer, part)) for i, layer in enumerate(model.layers) for part in GGUF_LAYER
    ]
    head = [] if model.config.tied else [("head", model.head)]
    return [("embedding", model.embedding), *layers, ("norm", model.norm), *head]


def _check(source: Source, model: Decoder) -> None:
    """Every tensor of the model is in the file with the config's shape, and nothing else is: a bias that is left out, say,
    would change the model silently."""
    c, known = model.config, set()
    parts = {"qkv": (c.heads * c.head_dim, *[c.kv_heads * c.head_dim] * 2), "gate_up": (c.ffn, c.ffn)}
    for ours, module in _modules(model):
        rows, *cols = module.weight.shape
        names = source.names(ours)
        known.update(names)
        for name, part in zip(names, parts.get(ours.split(".")[-1], (rows,)), strict=True):
            source.kind(name)
            if source.shape(name) != (part, *cols):
                raise ValueError(f"tensor {name!r} has shape {source.shape(name)}, the config wants {(part, *cols)}")
    left = [name for name in source.all_names() if name not in known]
    if left:
        raise ValueError(
            f"the file holds {len(left)} tensors that a plain Llama does not have, {left[0]!r} first; it is another model"
        )


def _float_rows(source: Source, ours: str) -> Tensor:
    parts = [source.float_rows(name) for name in source.names(ours)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _release(source: Source, ours: str) -> None:
    for name in source.names(ours):
        source.release(name)
