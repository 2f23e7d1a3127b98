"""A model from nothing, on text.

    report = pretrain(PretrainOptions(arch="decoder", preset="nano", data="corpus/*.jsonl", out="runs/first", steps=2000))

The same as `fastllm pretrain --arch decoder --preset nano --data 'corpus/*.jsonl' --out runs/first --steps 2000`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..data.corrupt import MASKED_ROLES, SENTINELS
from ..data.tokenizer import DEFAULT_ROLES, Tokenizer
from ..models.arena import available_memory
from ..models.initial import initialise
from ..models.presets import PRESETS, Config, build, preset
from ..models.text import read_text
from .checkpoint import Checkpoints
from .forecast import refuse_state
from .optim import require
from .parallel import start
from .plans import plan_of
from .stage import StageOptions, StageReport, run, texts_of

# What a vocabulary that is trained has beside words: `roles` and `more` of Tokenizer.train.
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "decoder": {"roles": DEFAULT_ROLES},
    "encoder": {"roles": MASKED_ROLES},
    "seq2seq": {"roles": {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}, "more": SENTINELS},
}


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(StageOptions):
    """Pre-training.

    Args:
        arch: decoder (next tokens), encoder (masked tokens) or seq2seq (corrupted spans, or sources and targets).
        preset: The sizes by name; nano, micro and mini train in minutes on two cores.
        tokenizer: A model's folder, .gguf file, alias or Hub id; empty trains one on the data.
        vocab_size: Tokens of a vocabulary that is trained.
        mask_rate: Of an encoder, the share of the tokens that are masked.
        whole_words: Of an encoder, mask words and not tokens.
    """

    arch: str
    preset: str
    tokenizer: str = ""
    vocab_size: int = 8192
    mask_rate: float = 0.15
    whole_words: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require("arch", self.arch, self.arch in PRESETS, ", ".join(PRESETS))
        require("preset", self.preset, self.preset in PRESETS[self.arch], ", ".join(PRESETS[self.arch]))
        require("vocab_size", self.vocab_size, self.vocab_size >= 260, "260 or more")
        require("mask_rate", self.mask_rate, 0 < self.mask_rate <= 1, "more than 0, up to 1")


def pretrain(
    options: PretrainOptions, *, resume: bool = False, watch: Iterable[Callable[[Mapping[str, Any]], None]] = ()
) -> StageReport:
    """Trains a model and leaves options, log, checkpoints, samples, a plot, a report and the model in options.out.

    resume: go on from the newest checkpoint. watch: what gets each line of the log. Raises as `fastllm.train.loop.fit`, and
    MemoryError, with what would fit, before the first step.
    """
    tokenizer, text = _tokenizer(options, resume)
    config = preset(options.arch, options.preset, tokenizer)
    if options.max_length > getattr(config, "max_position", options.max_length):
        config = preset(options.arch, options.preset, tokenizer, longest=options.max_length)
    _check_memory(options, config, tokenizer)
    model = initialise(build(config), options.seed)
    plan = plan_of(options, model, tokenizer, None, text, options.mask_rate, options.whole_words)
    return run(options, plan, resume, watch)


def _check_memory(options: PretrainOptions, config: Config, tokenizer: Tokenizer) -> None:
    """Before anything is drawn. MemoryError, with the presets that would fit."""
    free, count = available_memory(options.where[0]), start().count
    with torch.device("meta"):
        refusal = refuse_state(build(config), free, count)
        if refusal:
            made = {name: build(preset(options.arch, name, tokenizer)) for name in PRESETS[options.arch]}
            fitting = [name for name, model in made.items() if not refuse_state(model, free, count)]
            raise MemoryError(f"{refusal}; presets that fit: {', '.join(fitting) or 'none'}")


def _tokenizer(options: PretrainOptions, resume: bool) -> tuple[Tokenizer, Path]:
    """And where it is. The one that the run has; an attempt that came to no checkpoint leaves none to keep."""
    if options.tokenizer:
        path = Path(options.tokenizer) if Path(options.tokenizer).exists() else hub.resolve(options.tokenizer)
        return read_text(path)[0], path
    path = Path(options.out) / "tokenizer"

    def train() -> None:
        begun = resume or Checkpoints(options.out).steps()
        if not (begun and (path / "tokenizer.json").is_file()):
            texts = (texts_of(d.fields) for d in options.documents("train"))
            Tokenizer.train(texts, options.vocab_size, **SPECIAL[options.arch]).save(path)

    start().first(train)
    return Tokenizer.from_folder(path), path
