"""T5, Marian and Whisper in the folders of transformers, both ways; and a form of our own for what transformers has not.

A key without a bias (Whisper) is stored as zeros here and left out of a file: a bias of keys adds the same to all scores of a
query, so that no output and no gradient knows of it.
"""

import dataclasses
from typing import Any

from .blocks import GATED
from .folder import Folder, Names, Writing, fill, skeleton, write
from .hf_encoder import ACTIVATIONS, activation
from .seq2seq import Seq2Seq, Seq2SeqConfig

OWN = "FastllmSeq2Seq"
ARCHITECTURES = ("T5ForConditionalGeneration", "MarianMTModel", "WhisperForConditionalGeneration", OWN)

GATE = {"gelu": "geglu", "gelu_tanh": "geglu_tanh", "silu": "swiglu"}  # an activation -> the gated one
# ours -> theirs, without .weight and .bias
T5_SELF = {
    "attn_norm": ("layer.0.layer_norm",),
    "qkv": ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
    "out": ("layer.0.SelfAttention.o",),
}
T5_CROSS = {
    "cross_norm": ("layer.1.layer_norm",),
    "cross_q": ("layer.1.EncDecAttention.q",),
    "cross_kv": ("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
    "cross_out": ("layer.1.EncDecAttention.o",),
}
BART_SELF = {
    "attn_norm": ("self_attn_layer_norm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.out_proj",),
    "up": ("fc1",),
    "down": ("fc2",),
    "mlp_norm": ("final_layer_norm",),
}
BART_CROSS = {
    "cross_norm": ("encoder_attn_layer_norm",),
    "cross_q": ("encoder_attn.q_proj",),
    "cross_kv": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "cross_out": ("encoder_attn.out_proj",),
}


def t5_names(c: Seq2SeqConfig) -> Names:
    """Of T5 and Flan-T5."""
    ours: dict[str, tuple[str | None, ...]] = {
        "embedding.weight": ("shared.weight",),
        "head.weight": ("lm_head.weight",),
    }
    for side, count in (("encoder", c.encoder_layers), ("decoder", c.decoder_layers)):
        last = 2 if side == "decoder" else 1
        inner = f"layer.{last}.DenseReluDense"
        parts = T5_SELF | (T5_CROSS if side == "decoder" else {}) | {
            "mlp_norm": (f"layer.{last}.layer_norm",),
            "up": (f"{inner}.wi_0", f"{inner}.wi_1") if c.activation in GATED else (f"{inner}.wi",),
            "down": (f"{inner}.wo",),
        }  # fmt: skip
        for i in range(count):
            for name, theirs in parts.items():
                ours[f"{side}.layers.{i}.{name}.weight"] = tuple(f"{side}.block.{i}.{t}.weight" for t in theirs)
        ours[f"{side}.norm.weight"] = (f"{side}.final_layer_norm.weight",)
        ours[f"{side}.relative.weight"] = (f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",)
    unused = [r"(encoder|decoder)\.embed_tokens\.weight", r".*EncDecAttention\.relative_attention_bias\.weight"]
    return Names(ours, unused=(*unused, *([r"lm_head\.weight"] if c.tied else [])))


def bart_names(c: Seq2SeqConfig) -> Names:
    """Of Marian, and of Whisper, whose keys have no bias."""
    whisper, shapes = bool(c.bins), {}
    table = "model.decoder.embed_tokens.weight" if whisper else "model.shared.weight|model.decoder.embed_tokens.weight"
    ours: dict[str, tuple[str | None, ...]] = {"embedding.weight": (table,)}
    for side, count in (("encoder", c.encoder_layers), ("decoder", c.decoder_layers)):
        parts = BART_SELF | (BART_CROSS if side == "decoder" else {})
        for i in range(count):
            for name, theirs in parts.items():
                for kind in ("weight", "bias"):
                    ours[f"{side}.layers.{i}.{name}.{kind}"] = tuple(
                        None
                        if whisper and kind == "bias" and t.endswith("k_proj")
                        else f"model.{side}.layers.{i}.{t}.{kind}"
                        for t in theirs
                    )
        for kind in ("weight", "bias"):
            ours[f"{side}.norm.{kind}"] = (f"model.{side}.layer_norm.{kind}",)
        ours[f"{side}.positions.weight"] = (f"model.{side}.embed_positions.weight",)
    for name, theirs, inputs in (("first", "conv1", c.bins), ("second", "conv2", c.dim)):
        for kind in ("weight", "bias"):
            ours[f"front.{name}.{kind}"] = (f"model.encoder.{theirs}.{kind}",)
        shapes[f"front.{name}.weight"] = (c.dim, inputs, 3)
    ours |= {"head.weight": ("proj_out.weight" if whisper else "lm_head.weight",), "head.bias": ("final_logits_bias",)}
    shapes["head.bias"] = (1, c.vocab)
    unused = [r"model\.(encoder|decoder)\.embed_tokens\.weight"]
    if c.tied:
        unused.append(r"(lm_head|proj_out)\.weight")
    if not whisper:
        unused.append(r"model\.(encoder|decoder)\.embed_positions\.weight")  # sinusoids
    return Names(ours, shapes, tuple(unused))


def _names(c: Seq2SeqConfig, model: Seq2Seq, architecture: str) -> Names:
    if architecture == OWN:
        return Names({name: (name,) for name, _ in model.named_parameters()})
    return t5_names(c) if architecture.startswith("T5") else bart_names(c)


# ------------------------------------------------------------------------------------------------------- config.json, read


def _t5_activation(folder: Folder) -> str:
    """What feed_forward_proj says. ValueError: it is not built, or contradicts what transformers stores beside it and goes by."""
    named = folder.get("feed_forward_proj", str, "relu")
    gated, _, act = named.rpartition("-")
    act = "gelu_new" if named == "gated-gelu" else act
    ours = activation(folder, act)
    if gated not in ("", "gated") or (gated and ours not in GATE):
        raise ValueError(f"{folder.path}: feed_forward_proj {named!r} is not supported")
    for key, meant in (("dense_act_fn", act), ("is_gated_act", bool(gated))):
        if folder.get(key, type(meant), meant) != meant:
            raise ValueError(
                f"{folder.path}: feed_forward_proj {named!r} means {key}={meant!r}, and the file has "
                f"{folder.config[key]!r}; correct the one that is wrong"
            )
    return GATE[ours] if gated else ours


def _read_t5(folder: Folder) -> Seq2SeqConfig:
    get, dim = folder.get, folder.get("d_model")
    scaled = get("scale_decoder_outputs", bool, get("tie_word_embeddings", bool, True))
    return Seq2SeqConfig(
        vocab=get("vocab_size"), dim=dim, ffn=get("d_ff"), heads=get("num_heads"), head_dim=get("d_kv"),
        encoder_layers=get("num_layers"), decoder_layers=get("num_decoder_layers", int, get("num_layers")),
        position="relative", norm="rms", norm_first=True, bias=False, scale=1.0,
        eps=get("layer_norm_epsilon", float, 1e-6),
        activation=_t5_activation(folder),
        head_scale=max(dim, 1) ** -0.5 if scaled else 1.0,
        tied=_is_tied(folder, "shared.weight", "lm_head.weight"),
        buckets=get("relative_attention_num_buckets", int, 32),
        max_distance=get("relative_attention_max_distance", int, 128),
        pad_id=get("pad_token_id", int, 0), eos_id=get("eos_token_id", int, 1),
        start_id=get("decoder_start_token_id", int, get("pad_token_id", int, 0)),
    )  # fmt: skip


def _is_tied(folder: Folder, table: str, head: str) -> bool:
    """Later versions call every T5 tied, so what counts is whether the head has a weight of its own. ValueError: a side has."""
    for own in folder.where:
        if own.endswith("coder.embed_tokens.weight") and folder.differ(table, own):
            raise ValueError(
                f"{folder.path}: {own!r} differs from {table!r}; embeddings that are not shared are not supported"
            )
    return not folder.differ(table, head)


def _read_bart(folder: Folder) -> Seq2SeqConfig:
    get, dim = folder.get, folder.get("d_model")
    whisper = folder.architecture.startswith("Whisper")
    for key in ("attention_heads", "ffn_dim"):
        pair = get(f"encoder_{key}"), get(f"decoder_{key}")
        if pair[0] != pair[1]:
            raise ValueError(f"{folder.path}: {key} of encoder and decoder are {pair}; they must be the same")
    if not get("share_encoder_decoder_embeddings", bool, True) or not get("tie_word_embeddings", bool, True):
        raise ValueError(f"{folder.path}: embeddings that are not shared are not supported")
    heads = get("encoder_attention_heads")
    table = folder.find("model.shared.weight|model.decoder.embed_tokens.weight") or ""
    return Seq2SeqConfig(
        vocab=get("vocab_size"), dim=dim, ffn=get("encoder_ffn_dim"), heads=heads, head_dim=dim // max(heads, 1),
        encoder_layers=get("encoder_layers"), decoder_layers=get("decoder_layers"),
        max_position=get("max_target_positions" if whisper else "max_position_embeddings"),
        position="learned" if whisper else "halves", norm_first=whisper,
        activation=activation(folder, get("activation_function", str, "gelu")),
        # Whisper's config has the key too, and transformers does nothing by it
        embed_scale=max(dim, 0) ** 0.5 if get("scale_embedding", bool, False) and not whisper else 1.0,
        head_bias=not whisper,
        tied=_is_tied(folder, table, "proj_out.weight" if whisper else "lm_head.weight"),
        bins=get("num_mel_bins") if whisper else 0,
        source_position=get("max_source_positions") if whisper else None,
        pad_id=get("pad_token_id"), start_id=get("decoder_start_token_id"), eos_id=get("eos_token_id"),
    )  # fmt: skip


def read_config(folder: Folder) -> Seq2SeqConfig:
    """ValueError for a variant that is not built here."""
    name = folder.architecture
    if name == OWN:
        try:
            return Seq2SeqConfig(**folder.config["config"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder.path}/config.json is not what this version writes: {error}") from error
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{folder.path}: architecture {name!r} is no encoder-decoder; supported: {', '.join(ARCHITECTURES)}"
        )
    return _read_t5(folder) if name.startswith("T5") else _read_bart(folder)


def load(folder: Folder) -> Seq2Seq:
    """The model in a folder, its weights float32 Parameters."""
    config = read_config(folder)
    folder.check_layers(max(config.encoder_layers, config.decoder_layers))
    model = skeleton(lambda: Seq2Seq(config), folder.path)
    fill(model, _names(config, model, folder.architecture), folder)
    model.tie()
    return model


# ---------------------------------------------------------------------------------------------------- config.json, written


def _architecture(c: Seq2SeqConfig) -> str:
    """What of transformers this is, or our own."""
    shape = (c.position, c.norm, c.norm_first, c.bias, c.scale, bool(c.bins), c.tied, c.head_bias)
    if shape[:6] == ("relative", "rms", True, False, 1.0, False) and not c.head_bias and c.embed_scale == 1.0:
        return "T5ForConditionalGeneration"
    if c.activation in GATED or c.heads * c.head_dim != c.dim or c.eps != 1e-5:
        return OWN
    if c.embed_scale not in ((1.0,) if c.bins else (1.0, c.dim**0.5)):
        return OWN
    bart = {
        ("halves", "layer", False, True, None, False, True, True): "MarianMTModel",
        ("learned", "layer", True, True, None, True, True, False): "WhisperForConditionalGeneration",
    }
    return bart.get(shape, OWN)


def _write_config(c: Seq2SeqConfig, name: str) -> dict[str, Any]:
    if name == OWN:
        return {"config": dataclasses.asdict(c)}
    plain = next((act for act, gated in GATE.items() if gated == c.activation), c.activation)
    act = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == plain)
    common = {
        "vocab_size": c.vocab, "d_model": c.dim, "is_encoder_decoder": True,
        "pad_token_id": c.pad_id, "eos_token_id": c.eos_id, "decoder_start_token_id": c.start_id,
    }  # fmt: skip
    if name.startswith("T5"):
        gated = "gated-gelu" if c.activation == "geglu_tanh" else f"gated-{act}"
        return common | {
            "model_type": "t5", "d_ff": c.ffn, "d_kv": c.head_dim, "num_heads": c.heads,
            "num_layers": c.encoder_layers, "num_decoder_layers": c.decoder_layers,
            "feed_forward_proj": gated if c.activation in GATED else act, "layer_norm_epsilon": c.eps,
            "relative_attention_num_buckets": c.buckets, "relative_attention_max_distance": c.max_distance,
            "tie_word_embeddings": c.head_scale != 1.0, "scale_decoder_outputs": c.head_scale != 1.0,
        }  # fmt: skip
    sides = {
        f"{side}_{key}": value
        for side, layers in (("encoder", c.encoder_layers), ("decoder", c.decoder_layers))
        for key, value in (("layers", layers), ("attention_heads", c.heads), ("ffn_dim", c.ffn))
    }
    common |= sides | {"activation_function": act, "scale_embedding": c.embed_scale != 1.0, "tie_word_embeddings": True}
    if not c.bins:
        return common | {"model_type": "marian", "max_position_embeddings": c.max_position, "forced_eos_token_id": None}
    return common | {
        "model_type": "whisper", "num_mel_bins": c.bins,
        "max_source_positions": c.source_limit, "max_target_positions": c.max_position,
    }  # fmt: skip


def save(model: Seq2Seq, path, how: Writing) -> None:
    """Writes a folder that `load` reads, and transformers where it has such a model."""
    name = _architecture(model.config)
    config = {"architectures": [name]} | _write_config(model.config, name)
    write(path, model, _names(model.config, model, name), config, how)
