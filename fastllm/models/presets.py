"""Models to train from scratch, by name, for a vocabulary.

    config = preset("encoder", "nano", tokenizer, longest=512)
    model = initialise(build(config), seed=0)

Every class has "nano", "micro" and "mini": about 1, 4 and 11 million parameters without embeddings, which two cores train in
minutes. The decoder's have the traits of Llama, the encoder's of BERT, the encoder-decoder's of T5. Any field of a config may
be changed by `dataclasses.replace`.
"""

import dataclasses
from collections.abc import Mapping

from ..data.batch import end_id, padding_id
from ..data.tokenizer import Tokenizer
from . import decoder, encoder, seq2seq
from .decoder import Decoder, DecoderConfig
from .encoder import Encoder, EncoderConfig
from .seq2seq import Seq2Seq, Seq2SeqConfig

Config = DecoderConfig | EncoderConfig | Seq2SeqConfig
PRESETS: Mapping[str, Mapping[str, Config]] = {
    "decoder": decoder.PRESETS,
    "encoder": encoder.PRESETS,
    "seq2seq": {name: config for name, config in seq2seq.PRESETS.items() if not config.bins},
}


def preset(arch: str, name: str, tokenizer: Tokenizer, longest: int | None = None) -> Config:
    """The config of a name with this vocabulary: its size and special tokens; an encoder has the head for masked tokens.

    longest: positions, those of the preset where not given; relative ones have no end. An encoder-decoder begins its targets
    with its padding, as T5 does.
    ValueError: an arch or a name that is not in PRESETS, with those that are; a vocabulary without the eos of an encoder-decoder.
    """
    if arch not in PRESETS:
        raise ValueError(f"arch is {arch!r}; allowed: {', '.join(PRESETS)}")
    if name not in PRESETS[arch]:
        raise ValueError(f"preset is {name!r}; of a {arch} there are {', '.join(PRESETS[arch])}")
    config = PRESETS[arch][name]
    changed: dict[str, object] = {"vocab": len(tokenizer)}
    if longest is not None and getattr(config, "position", None) != "relative":
        changed["max_position"] = longest
    if isinstance(config, EncoderConfig):
        changed |= {"pad_id": padding_id(tokenizer), "head": "mlm", "pooler": False}
    if isinstance(config, Seq2SeqConfig):
        pad = padding_id(tokenizer)
        changed |= {"pad_id": pad, "start_id": pad, "eos_id": end_id(tokenizer)}
    return dataclasses.replace(config, **changed)


def build(config: Config) -> Decoder | Encoder | Seq2Seq:
    """The model of a config, on the CPU; `initialise` draws its weights."""
    if isinstance(config, DecoderConfig):
        return Decoder(config)
    return Encoder(config) if isinstance(config, EncoderConfig) else Seq2Seq(config)
