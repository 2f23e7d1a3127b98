"""The families of decoders in GGUF files: their metadata and the names of their tensors, as llama.cpp writes and reads them.

What its loaders know by the architecture alone (Gemma's sliding windows, its local rope) is stated here as well.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..ops import RopeScaling
from .decoder import TRAITS, DecoderConfig
from .families import Names, unknown
from .gguf import GGUFFile, llama_unpermute_rows


def _q_rows(c: DecoderConfig) -> Tensor:
    return llama_unpermute_rows(c.heads * c.head_dim, c.heads)


def _k_rows(c: DecoderConfig) -> Tensor:
    return llama_unpermute_rows(c.kv_heads * c.head_dim, c.kv_heads)


_TOP = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
_LAYER = {
    "attn_norm": ("attn_norm",),
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "out": ("attn_output",),
    "mlp_norm": ("ffn_norm",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}
_QK_NORM = {"q_norm": ("attn_q_norm",), "k_norm": ("attn_k_norm",)}
_POST_NORM = {"post_attn_norm": ("post_attention_norm",), "post_mlp_norm": ("post_ffw_norm",)}
_ONE_QKV = {
    "attn_norm": ("attn_norm",),
    "qkv": ("attn_qkv",),
    "out": ("attn_output",),
    "mlp_norm": ("ffn_norm",),
    "up": ("ffn_up",),
    "down": ("ffn_down",),
}


@dataclass(frozen=True)
class GGUFFamily:
    """eps: the key of the norms' eps. biases: whether projections may have one, which the tensors say."""

    family: str
    names: Names
    eps: str = "attention.layer_norm_rms_epsilon"
    biases: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": GGUFFamily(
        "llama", Names("blk.{}.", _LAYER, _TOP, order={"attn_q": _q_rows, "attn_k": _k_rows}), biases=True
    ),
    "qwen2": GGUFFamily("qwen2", Names("blk.{}.", _LAYER, _TOP)),
    "qwen3": GGUFFamily("qwen3", Names("blk.{}.", _LAYER | _QK_NORM, _TOP)),
    "gemma3": GGUFFamily("gemma3", Names("blk.{}.", _LAYER | _QK_NORM | _POST_NORM, _TOP)),
    "gpt2": GGUFFamily(
        "gpt2", Names("blk.{}.", _ONE_QKV, _TOP | {"positions": "position_embd"}), eps="attention.layer_norm_epsilon"
    ),
    "bloom": GGUFFamily(
        "bloom",
        Names("blk.{}.", _ONE_QKV, _TOP | {"embed_norm": "token_embd_norm"}),
        eps="attention.layer_norm_epsilon",
    ),
}

# Keys with the values that are built, the first of which is the one that an absent key has.
PLAIN: Mapping[str, tuple] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (1.0, 0.0),
    "embedding_scale": (1.0, 0.0),
    "residual_scale": (1.0, 0.0),
    "attention.scale": (0.0,),
    "rope.scaling.attn_factor": (1.0, 0.0),
    "rope.scaling.yarn_attn_factor": (1.0, -1.0),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.alpha": (0.0, 1.0),
}
BETAS = (("fast", 32.0), ("slow", 1.0))  # turns of YaRN's pairs


def read_metadata(file: GGUFFile) -> DecoderConfig:
    """The config of a GGUF's metadata. ValueError for another architecture, or a variant that is not built."""
    if file.architecture not in FAMILIES:
        raise unknown(file.architecture, FAMILIES, file.path)
    return _Reader(file).config()


class _Reader:
    def __init__(self, file: GGUFFile):
        self.file, self.meta, self.prefix = file, file.metadata, file.architecture
        self.family = FAMILIES[self.prefix]

    def get(self, key: str, default: Any = None) -> Any:
        """A number under the architecture's prefix."""
        value = self.meta.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise ValueError(f"{self.file.path}: the metadata lacks {self.prefix}.{key}; the file is incomplete")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(
                f"{self.file.path}: {self.prefix}.{key} is {value!r}; one number for all layers is supported"
            )
        return value

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    def config(self) -> DecoderConfig:
        self._check_plain()
        traits = TRAITS[self.family.family]
        heads, dim, layers = (int(self.get(k)) for k in ("attention.head_count", "embedding_length", "block_count"))
        if layers > len(self.file.tensors):
            raise ValueError(f"{self.file.path} wants {layers} layers and holds {len(self.file.tensors)} tensors")
        head_dim = int(self.get("attention.key_length", dim // max(heads, 1)))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.get(key, head_dim) != head_dim:
                raise ValueError(
                    f"{self.file.path}: {self.prefix}.{key} is {self.get(key)}, not the head size {head_dim}; not supported"
                )
        values = traits | {
            "vocab": self._rows_of("token_embd.weight"),
            "layers": layers,
            "dim": dim,
            "ffn": int(self.get("feed_forward_length")),
            "heads": heads,
            "kv_heads": int(self.get("attention.head_count_kv", heads)),
            "head_dim": head_dim,
            "max_position": int(self.get("context_length")),
            "eps": float(self.get(self.family.eps)),
            "tied": not self.has("output.weight"),
        }
        if self.family.biases:
            tensors = {"qkv_bias": "attn_q", "out_bias": "attn_output", "mlp_bias": "ffn_down"}
            values |= {ours: self.has(f"blk.0.{name}.bias") for ours, name in tensors.items()}
        if traits.get("position", "rope") == "rope":
            values |= {"rope_theta": float(self.get("rope.freq_base", 10000.0)), "rope_scaling": self._scaling()}
        if self.family.family == "gemma3":
            values |= self._gemma(layers, dim, heads, head_dim)
        return DecoderConfig(**values)

    def _check_plain(self) -> None:
        """ValueError for what changes the arithmetic and is not built, and for a part of a file that was split."""
        if (parts := self.meta.get("split.count", 1)) not in (0, 1):
            raise ValueError(
                f"{self.file.path} is one of {parts} parts of a split file; merge them into one file first"
            )
        for key, allowed in PLAIN.items():
            value = self.meta.get(f"{self.prefix}.{key}", allowed[0])
            if value not in allowed:
                raise ValueError(f"{self.file.path}: {self.prefix}.{key} is {value!r}; supported: {allowed[0]!r}")
        window = self.get("attention.sliding_window", 0)
        if self.family.family != "gemma3" and 0 < window < self.get("context_length"):
            raise ValueError(
                f"{self.file.path}: {self.prefix}.attention.sliding_window is {window}; a window is supported of gemma3 alone, "
                "or of a folder of safetensors"
            )

    def _rows_of(self, name: str) -> int:
        if not self.has(name):
            raise ValueError(
                f"{self.file.path}: there is no tensor {name!r}; the file is incomplete or of another model"
            )
        return self.file.tensors[name].shape[0]

    def _scaling(self) -> RopeScaling | None:
        """As llama.cpp takes it: a factor without a type is linear, `none` is none whatever stands beside it."""
        factor = float(self.get("rope.scaling.factor", self.get("rope.scale_linear", 1.0)))
        kind = self.meta.get(f"{self.prefix}.rope.scaling.type", "none" if factor == 1 else "linear")
        if self.has("rope_freqs.weight"):  # Llama 3: what each pair's frequency is divided by
            if kind != "none" and factor != 1:
                raise ValueError(f"{self.file.path}: rope scaling {kind!r} beside rope_freqs.weight is not supported")
            factors = tuple(self.file.dequantize("rope_freqs.weight").tolist())
            context = int(self.get("context_length"))
            return RopeScaling(
                "longrope", 1.0, context, short_factor=factors, long_factor=factors, attention_factor=1.0
            )
        if kind == "none":
            return None
        if kind == "linear":
            return RopeScaling("linear", factor)
        if kind == "yarn":
            context = int(self.get("rope.scaling.original_context_length"))
            turns = {f"beta_{end}": float(self.get(f"rope.scaling.yarn_beta_{end}", beta)) for end, beta in BETAS}
            return RopeScaling("yarn", factor, context, **turns)
        raise ValueError(f"{self.file.path}: rope scaling {kind!r} is not supported; none, linear and yarn are")

    def _gemma(self, layers: int, dim: int, heads: int, head_dim: int) -> dict[str, Any]:
        every = int(self.get("attention.sliding_window_pattern", 6))
        if every < 1:
            raise ValueError(f"{self.file.path}: a full layer comes every {every} layers; wanted at least 1")
        return {
            "window": int(self.get("attention.sliding_window")),
            "full_layers": tuple(i for i in range(layers) if (i + 1) % every == 0),
            "rope_local_theta": float(self.get("rope.freq_base_swa", 10000.0)),
            # the largest divides by the width of a head that it would have without its own head size
            "query_scalar": dim // heads if layers == 62 else head_dim,
        }
