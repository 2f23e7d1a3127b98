"""The families of decoders in the folders of transformers: the keys of config.json and the names of tensors, both ways.

A family is a row of `FAMILIES`: which key of config.json holds which field of `DecoderConfig`, which keys have one value that is
built here, and which tensors of the file each of our parameters is stacked from.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import RopeScaling
from .blocks import GATED
from .decoder import TRAITS, DecoderConfig
from .folder import architecture_of

# ------------------------------------------------------------------------------------------------------- names of tensors

Order = Callable[[DecoderConfig], Tensor]


@dataclass(frozen=True)
class Names:
    """Ours -> the file's, without `.weight` and `.bias`.

    layer: what stands before the parts of layer {}. parts, top: of a layer and outside of layers; parts of several names are
    stacked by rows. base: a prefix that a file may leave out. transposed: the file's parts that lie as [inputs, outputs].
    order: the file's part -> index of its rows that makes them ours. unused: what a file may hold besides, as patterns.
    """

    layer: str
    parts: Mapping[str, tuple[str, ...]]
    top: Mapping[str, str]
    base: str = ""
    transposed: frozenset[str] = frozenset()
    order: Mapping[str, Order] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def of(self, ours: str) -> tuple[str, ...]:
        """The file's names of our parameter, such as `layers.3.qkv.weight`. KeyError for one that the family does not have."""
        *path, part, leaf = ours.split(".")
        if not path:
            return (f"{self.top[part]}.{leaf}",)
        return tuple(f"{self.layer.format(path[1])}{name}.{leaf}" for name in self.parts[part])

    def is_transposed(self, name: str) -> bool:
        return name.endswith(".weight") and any(name.endswith(f".{part}.weight") for part in self.transposed)

    def order_of(self, name: str, config: DecoderConfig) -> Tensor | None:
        """Rows of the file -> our rows; None where they are the same."""
        found = (make for part, make in self.order.items() if f".{part}." in name)
        make = next(found, None)
        return None if make is None else make(config)


def by_head(config: DecoderConfig) -> Tensor:
    """BLOOM stacks q, k and v of a head, then the next head's; ours are all of q, all of k, all of v."""
    c = config
    return torch.arange(3 * c.heads * c.head_dim).view(c.heads, 3, c.head_dim).transpose(0, 1).flatten()


LLAMA = Names(
    layer="model.layers.{}.",
    parts={
        "attn_norm": ("input_layernorm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "q_norm": ("self_attn.q_norm",),
        "k_norm": ("self_attn.k_norm",),
        "out": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    },
    top={"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    base="model.",
    unused=(r".*rotary_emb\.inv_freq",),
)
GEMMA = replace(
    LLAMA,
    parts=dict(LLAMA.parts)
    | {
        "post_attn_norm": ("post_attention_layernorm",),
        "mlp_norm": ("pre_feedforward_layernorm",),
        "post_mlp_norm": ("post_feedforward_layernorm",),
    },
)
GPT2 = Names(
    layer="transformer.h.{}.",
    parts={
        "attn_norm": ("ln_1",),
        "qkv": ("attn.c_attn",),
        "out": ("attn.c_proj",),
        "mlp_norm": ("ln_2",),
        "up": ("mlp.c_fc",),
        "down": ("mlp.c_proj",),
    },
    top={"embedding": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head"},
    base="transformer.",
    transposed=frozenset(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    unused=(r".*\.attn\.(bias|masked_bias)",),
)
BLOOM = Names(
    layer="transformer.h.{}.",
    parts={
        "attn_norm": ("input_layernorm",),
        "qkv": ("self_attention.query_key_value",),
        "out": ("self_attention.dense",),
        "mlp_norm": ("post_attention_layernorm",),
        "up": ("mlp.dense_h_to_4h",),
        "down": ("mlp.dense_4h_to_h",),
    },
    top={
        "embedding": "transformer.word_embeddings",
        "embed_norm": "transformer.word_embeddings_layernorm",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    base="transformer.",
    order={"self_attention.query_key_value": by_head},
)

# ------------------------------------------------------------------------------------------------------------ config.json

ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh", "gelu": "geglu"}  # gated
PLAIN = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
ALWAYS = {"is_causal": (True, None)}  # transformers makes an encoder of any decoder by it, as embedding models want
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Family:
    """keys: field of DecoderConfig -> key, or "new|old", of which the first is written. activation: the key of the MLP's kind.
    fixed: key -> the values that are built. defaults: what transformers takes where a key is left out. windows: the form of
    sliding windows, "" where the family has none: "all" layers, "some" (Qwen: if use_sliding_window), or "pattern" (Gemma)."""

    name: str
    architecture: str
    model_type: str
    names: Names
    keys: Mapping[str, str]
    activation: str = "hidden_act"
    fixed: Mapping[str, tuple] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    windows: str = ""


SIZES = {
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "dim": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position": "max_position_embeddings",
    "eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
BIASES = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
GPT2_SIZES = {
    "vocab": "vocab_size",
    "layers": "n_layer|num_hidden_layers",
    "dim": "n_embd|hidden_size",
    "ffn": "n_inner",
    "heads": "n_head|num_attention_heads",
    "max_position": "n_positions|n_ctx",
    "eps": "layer_norm_epsilon",
    "tied": "tie_word_embeddings",
}
BLOOM_SIZES = {
    "vocab": "vocab_size",
    "layers": "n_layer|num_hidden_layers",
    "dim": "hidden_size|n_embed",
    "heads": "n_head|num_attention_heads",
    "max_position": "seq_length",
    "eps": "layer_norm_epsilon",
    "tied": "tie_word_embeddings",
}
FAMILIES = {
    family.architecture: family
    for family in (
        Family("llama", "LlamaForCausalLM", "llama", LLAMA, SIZES | BIASES | {"mlp_bias": "mlp_bias"}),
        Family(
            "mistral", "MistralForCausalLM", "mistral", LLAMA, SIZES,
            defaults={"sliding_window": 4096}, windows="all",
        ),
        Family("qwen2", "Qwen2ForCausalLM", "qwen2", LLAMA, SIZES, defaults={"max_window_layers": 28}, windows="some"),
        Family(
            "qwen3", "Qwen3ForCausalLM", "qwen3", LLAMA, SIZES | BIASES,
            defaults={"max_window_layers": 28, "head_dim": 128}, windows="some",
        ),
        Family(
            "gemma3", "Gemma3ForCausalLM", "gemma3_text", GEMMA,
            SIZES | BIASES | {"query_scalar": "query_pre_attn_scalar", "softcap": "attn_logit_softcapping"},
            activation="hidden_activation",
            fixed={"final_logit_softcapping": (None,), "use_bidirectional_attention": (False, None)},
            defaults={
                "tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
                "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                "hidden_activation": "gelu_pytorch_tanh",
            },
            windows="pattern",
        ),
        Family(
            "gpt2", "GPT2LMHeadModel", "gpt2", GPT2, GPT2_SIZES,
            activation="activation_function",
            fixed={
                "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
            },
            defaults={"tie_word_embeddings": True, "activation_function": "gelu_new"},
        ),
        Family(
            "bloom", "BloomForCausalLM", "bloom", BLOOM, BLOOM_SIZES,
            activation="",
            fixed={"apply_residual_connection_post_layernorm": (False,)},
            defaults={"tie_word_embeddings": True, "seq_length": 2048},
        ),
    )
}  # fmt: skip
TYPES = {f.name: f.type for f in fields(DecoderConfig)}


def unknown(what: str, known: Iterable[str], where: Any) -> ValueError:
    """An architecture that is not built; the message names the nearest ones."""
    known = list(known)
    near = difflib.get_close_matches(what, known, n=3, cutoff=0.0)
    return ValueError(
        f"{where}: architecture {what!r} is not supported; supported: {', '.join(known)}; nearest: {', '.join(near)}"
    )


def family_of(hf: Mapping[str, Any], where: Any) -> Family:
    """The family of a config.json. ValueError for another architecture."""
    architecture = architecture_of(hf)
    if architecture not in FAMILIES:
        raise unknown(architecture, FAMILIES, where)
    return FAMILIES[architecture]


def read_config(hf: Mapping[str, Any], where: Any) -> DecoderConfig:
    """A config.json as ours. ValueError for a variant that is not built, or a key that is missing or of the wrong type."""
    family = family_of(hf, where)
    try:
        return _read(family, dict(family.defaults) | dict(hf), where)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{where}/config.json cannot be read: {error!r}") from error


def _read(family: Family, hf: Mapping[str, Any], where: Any) -> DecoderConfig:
    for key, allowed in (ALWAYS | dict(family.fixed)).items():
        if hf.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{where}: {key}={hf[key]!r} is not supported; {allowed[0]!r} is")
    values: dict[str, Any] = {}
    for ours, keys in family.keys.items():
        found = [hf[key] for key in keys.split("|") if hf.get(key) is not None]
        if found:
            values[ours] = _typed(ours, keys.split("|")[0], found[0], where)
    _derive(family, values, where)
    traits = TRAITS[family.name]
    mlp = _mlp(family, hf, traits.get("mlp", "swiglu"), where)
    rope = _read_rope(hf, values["max_position"], where) if traits.get("position", "rope") == "rope" else {}
    windows = _read_windows(family, hf, values["layers"], where)
    return DecoderConfig(**(traits | {"mlp": mlp} | values | rope | windows))


def _typed(ours: str, key: str, value: Any, where: Any) -> Any:
    kinds: tuple[type, ...] = (bool,) if TYPES[ours] is bool else (int,) if TYPES[ours] is int else (int, float)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{where}/config.json: {key} is {value!r}, wanted {kinds[-1].__name__}")
    return value


def _derive(family: Family, values: dict[str, Any], where: Any) -> None:
    """What a file may leave open; ValueError for what it may not."""
    wanted = (
        "vocab",
        "layers",
        "dim",
        "heads",
        "max_position",
        "eps",
        *(["ffn"] if family.keys is not GPT2_SIZES else []),
    )
    for ours in wanted:
        if ours not in values and ours in family.keys:
            raise ValueError(f"{where}/config.json lacks {family.keys[ours].split('|')[0]!r}; the file is incomplete")
    values.setdefault("ffn", 4 * values["dim"])
    values.setdefault("kv_heads", values["heads"])
    values.setdefault("head_dim", values["dim"] // max(values["heads"], 1))
    values.setdefault("tied", False)


def _mlp(family: Family, hf: Mapping[str, Any], usual: str, where: Any) -> str:
    if not family.activation:
        return usual
    table = ACTIVATIONS if usual in GATED else PLAIN
    name = hf.get(family.activation) or hf.get("hidden_act") or next(k for k, v in table.items() if v == usual)
    if name not in table:
        raise ValueError(f"{where}: {family.activation} {name!r} is not supported; supported: {', '.join(table)}")
    return table[name]


def _read_rope(hf: Mapping[str, Any], max_position: int, where: Any) -> dict[str, Any]:
    """transformers 5 has `rope_parameters`, of Gemma one for each kind of layer; before, `rope_theta` and `rope_scaling`."""
    main = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    local = hf.get("rope_local_base_freq")
    if FULL in main or SLIDING in main:
        sliding, main = main.get(SLIDING) or {}, main.get(FULL) or {}
        if sliding.get("rope_type", "default") != "default":
            raise ValueError(
                f"{where}: rope scaling {sliding!r} of layers with a window is not supported; plain rope is"
            )
        local = sliding.get("rope_theta", local)
    main = dict(main)
    for place in (hf, main):
        if place.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"{where}: partial_rotary_factor={place['partial_rotary_factor']} is not supported; 1.0 is"
            )
    kind = main.get("rope_type", main.get("type", "default"))
    if (
        kind == "dynamic"
    ):  # which transformers stretches beyond what the config allows, whatever the pre-training's context
        main["original_max_position_embeddings"] = max_position
    elif kind in ("llama3", "yarn", "longrope") and not main.get("original_max_position_embeddings"):
        main["original_max_position_embeddings"] = hf.get("original_max_position_embeddings") or max_position
    try:
        scaling = RopeScaling.from_config(main, max_position)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: rope scaling {main!r} is not supported: {error}") from error
    theta = main.get("rope_theta") or hf.get("rope_theta") or 10000.0
    return {
        "rope_theta": float(theta),
        "rope_scaling": scaling,
        "rope_local_theta": None if local is None else float(local),
    }


def _read_windows(family: Family, hf: Mapping[str, Any], layers: int, where: Any) -> dict[str, Any]:
    window, kinds = hf.get("sliding_window"), hf.get("layer_types")
    if not family.windows or window is None or (family.windows == "some" and not hf.get("use_sliding_window")):
        return {}
    if family.windows == "all":
        full: Iterable[int] = ()
    elif kinds is not None:
        if len(kinds) != layers or not {SLIDING, FULL}.issuperset(kinds):
            raise ValueError(f"{where}: layer_types {kinds!r} must be {layers} times {SLIDING!r} or {FULL!r}")
        full = (i for i, kind in enumerate(kinds) if kind == FULL)
    elif family.windows == "some":
        full = range(min(hf["max_window_layers"], layers))
    else:
        full = (i for i in range(layers) if (i + 1) % hf["sliding_window_pattern"] == 0)
    return {"window": window, "full_layers": tuple(full)}


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of ours, for transformers 4 and 5. ValueError where the family cannot say what the config says."""
    c, family = config, next(f for f in FAMILIES.values() if f.name == config.family)
    if "query_scalar" in family.keys and c.query_scalar is None:
        c = replace(c, query_scalar=c.head_dim)
    hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    hf |= {keys.split("|")[0]: getattr(c, ours) for ours, keys in family.keys.items()}
    hf |= {key: allowed[0] for key, allowed in family.fixed.items()}
    if family.activation:
        table = ACTIVATIONS if c.gated else PLAIN
        hf[family.activation] = next((name for name, mlp in table.items() if mlp == c.mlp), None)
    if c.position == "rope":
        hf |= {"rope_theta": c.rope_theta, "rope_scaling": _write_rope(c.rope_scaling)}
        if c.rope_local_theta is not None:
            hf["rope_local_base_freq"] = c.rope_local_theta
    if family.windows:
        hf["sliding_window"] = c.window
        if family.windows != "all":
            hf["layer_types"] = [FULL if c.window_of(i) is None else SLIDING for i in range(c.layers)]
        if family.windows == "some":
            hf |= {"use_sliding_window": c.window is not None, "max_window_layers": len(c.full_layers)}
    again = read_config(hf, "the folder to be")
    lost = [f.name for f in fields(c) if getattr(again, f.name) != getattr(c, f.name)]
    if lost:
        values = ", ".join(f"{name}={getattr(c, name)!r}" for name in lost)
        raise ValueError(f"a {family.architecture} cannot have {values}; give the config another family")
    return hf


def _write_rope(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    plain = RopeScaling("linear")
    names = {"kind": "rope_type", "original_max_position": "original_max_position_embeddings"}
    always = {"kind", "factor", *(("low_freq_factor", "high_freq_factor") if scaling.kind == "llama3" else ())}
    given = ((f.name, getattr(scaling, f.name)) for f in fields(scaling))
    return {
        names.get(name, name): list(value) if isinstance(value, tuple) else value
        for name, value in given
        if name in always or value != getattr(plain, name)
    }
