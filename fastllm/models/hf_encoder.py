"""BERT and RoBERTa in the folders of transformers: config.json and the names of their tensors, both ways."""

from typing import Any

from .encoder import Encoder, EncoderConfig
from .folder import Folder, Names, Writing, fill, skeleton, write

# architecture -> head
ARCHITECTURES = {
    f"{family}{name}": head
    for family in ("Bert", "Roberta")
    for name, head in {
        "Model": None,
        "ForMaskedLM": "mlm",
        "ForSequenceClassification": "classify",
        "ForTokenClassification": "tokens",
    }.items()
} | {"BertForPreTraining": "mlm"}

# names of transformers -> ours; what is written is the first
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
LAYER = {  # ours -> theirs, under encoder.layer.<i>
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "out": ("attention.output.dense",),
    "attn_norm": ("attention.output.LayerNorm",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
    "mlp_norm": ("output.LayerNorm",),
}
EMBEDDINGS = {"embedding": "word", "positions": "position", "types": "token_type"}


def activation(folder: Folder, name: str) -> str:
    """Our name of an activation of transformers."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{folder.path}: activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def names(config: EncoderConfig, prefix: str) -> Names:
    """prefix: "", "bert." or "roberta." in front of all but the heads."""
    table: dict[str, str] = {}
    for ours, theirs in EMBEDDINGS.items():
        table[f"{ours}.weight"] = f"{prefix}embeddings.{theirs}_embeddings.weight"
    norms = {"norm": f"{prefix}embeddings.LayerNorm"}
    linears = {}
    stacked: dict[str, tuple[str | None, ...]] = {}
    for i in range(config.layers):
        for ours, theirs in LAYER.items():
            parts = [f"{prefix}encoder.layer.{i}.{t}" for t in theirs]
            if ours.endswith("norm"):
                norms[f"layers.{i}.{ours}"] = parts[0]
            for kind in ("weight", "bias"):
                stacked[f"layers.{i}.{ours}.{kind}"] = tuple(f"{p}.{kind}" for p in parts)
    roberta = config.skip_padding
    linears["pooler"] = "classifier.dense" if roberta and config.head == "classify" else f"{prefix}pooler.dense"
    if config.head == "mlm":
        top = "lm_head" if roberta else "cls.predictions"
        linears["head.dense"] = f"{top}.dense" if roberta else f"{top}.transform.dense"
        norms["head.norm"] = f"{top}.layer_norm" if roberta else f"{top}.transform.LayerNorm"
        bias = (f"{top}.bias", f"{top}.decoder.bias")  # both are stored, one is used: which, depends on the tie
        table |= {
            "head.words.weight": f"{top}.decoder.weight",
            "head.words.bias": "|".join(bias[:: 1 if config.tied else -1]),
        }
    elif config.head:
        linears["head"] = "classifier.out_proj" if roberta and config.head == "classify" else "classifier"
    for ours, theirs in (linears | norms).items():
        table |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    ours = {name: (theirs,) for name, theirs in table.items()} | stacked
    for name in norms:  # checkpoints of 2018 spell them gamma and beta
        for kind, old in (("weight", "gamma"), ("bias", "beta")):
            new = ours[f"{name}.{kind}"][0]
            ours[f"{name}.{kind}"] = (f"{new}|{new.removesuffix(kind)}{old}",)
    unused = [r".*position_ids", r"cls\.seq_relationship\..*", r"(cls\.predictions|lm_head)\.(decoder\.)?bias"]
    if config.tied:
        unused.append(r"(cls\.predictions|lm_head)\.decoder\.weight")
    if not config.pooler or config.head == "classify":
        unused.append(r"(bert\.|roberta\.)?pooler\..*")
    return Names(ours, unused=tuple(unused))


def read_config(folder: Folder) -> EncoderConfig:
    """ValueError for a variant that is not built here."""
    if folder.architecture not in ARCHITECTURES:
        raise ValueError(
            f"{folder.path}: architecture {folder.architecture!r} is no encoder; supported: {', '.join(ARCHITECTURES)}"
        )
    head, hf = ARCHITECTURES[folder.architecture], folder.config
    for key, allowed in (
        ("position_embedding_type", "absolute"),
        ("is_decoder", False),
        ("add_cross_attention", False),
    ):
        if hf.get(key, allowed) != allowed:
            raise ValueError(f"{folder.path}: {key}={hf[key]!r} is not supported; {allowed!r} is")
    roberta = folder.architecture.startswith("Roberta")
    labels = 0
    if head in ("classify", "tokens"):
        place = "classifier.out_proj.weight" if roberta and head == "classify" else "classifier.weight"
        if place not in folder.where:
            raise ValueError(f"{folder.path}: there is no tensor {place!r}; a shard is missing or it is another model")
        labels = folder.shape(place)[0]
    pad_id = folder.get("pad_token_id", int, 1 if roberta else 0)
    return EncoderConfig(
        vocab=folder.get("vocab_size"),
        layers=folder.get("num_hidden_layers"),
        dim=folder.get("hidden_size"),
        ffn=folder.get("intermediate_size"),
        heads=folder.get("num_attention_heads"),
        max_position=folder.get("max_position_embeddings") - (pad_id + 1 if roberta else 0),
        types=folder.get("type_vocab_size", int, 2),
        eps=folder.get("layer_norm_eps", float, 1e-12),
        activation=activation(folder, folder.get("hidden_act", str, "gelu")),
        pad_id=pad_id,
        skip_padding=roberta,
        head=head,
        labels=labels,
        label_names=_label_names(folder, labels),
        pooler=head == "classify"
        or (head is None and folder.find(f"{_prefix(folder)}pooler.dense.weight") is not None),
        tied=folder.get("tie_word_embeddings", bool, True) and not _has_own_head(folder, roberta),
    )


def _label_names(folder: Folder, labels: int) -> tuple[str, ...]:
    """Of a classifier whose config names them. ValueError: names that are not those of its labels, one each."""
    named = folder.config.get("id2label")
    if not labels or named is None:
        return ()
    names = [named.get(str(i)) for i in range(labels)] if isinstance(named, dict) and len(named) == labels else [None]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{folder.path}/config.json: id2label is {named!r}; wanted a name for each of 0 to {labels - 1}"
        )
    return tuple(names)


def _has_own_head(folder: Folder, roberta: bool) -> bool:
    """Whatever the config calls tied: transformers goes by the weights, where both are there."""
    head = "lm_head.decoder.weight" if roberta else "cls.predictions.decoder.weight"
    return folder.differ(f"{_prefix(folder)}embeddings.word_embeddings.weight", head)


def _prefix(folder: Folder) -> str:
    """A model without a head is stored with or without the prefix."""
    family = "roberta." if folder.architecture.startswith("Roberta") else "bert."
    return family if folder.find(f"{family}embeddings.word_embeddings.weight") else ""


def load(folder: Folder) -> Encoder:
    """The model in a folder, its weights float32 Parameters."""
    config = read_config(folder)
    folder.check_layers(config.layers)
    model = fill(skeleton(lambda: Encoder(config), folder.path), names(config, _prefix(folder)), folder)
    if config.head == "mlm" and config.tied:
        model.head.words.weight = model.embedding.weight
    return model


def save(model: Encoder, path, how: Writing) -> None:
    """Writes a folder that `load` and transformers read."""
    c = model.config
    family = "roberta" if c.skip_padding else "bert"
    architecture = next(
        name for name, head in ARCHITECTURES.items() if name.lower().startswith(family) and head == c.head
    )
    hf: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": c.vocab,
        "num_hidden_layers": c.layers,
        "hidden_size": c.dim,
        "intermediate_size": c.ffn,
        "num_attention_heads": c.heads,
        "max_position_embeddings": c.max_position + c.first_position,
        "type_vocab_size": c.types,
        "layer_norm_eps": c.eps,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == c.activation),
        "pad_token_id": c.pad_id,
        "tie_word_embeddings": c.tied,
    }
    if c.labels:
        named = c.label_names or [f"LABEL_{i}" for i in range(c.labels)]
        hf["id2label"] = {str(i): name for i, name in enumerate(named)}
        hf["label2id"] = {name: i for i, name in enumerate(named)}
    write(path, model, names(c, "" if c.head is None else f"{family}."), hf, how)
