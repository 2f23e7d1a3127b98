"""A model that exists, on prompts and completions, talks, or more text.

    report = sft(SftOptions(model="smollm2-135m", data="reviews.jsonl", out="runs/reviews", steps=200, lr=2e-5))

The same as `fastllm sft --model smollm2-135m --data reviews.jsonl --out runs/reviews --steps 200 --lr 2e-5`. The weights of a
GGUF are dequantised; what is saved is a folder of safetensors with the GGUF's tokenizer and chat template.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import hub, models
from ..data.chat import ChatTemplate
from ..models.text import read_text
from .optim import require
from .plans import plan_of
from .stage import StageOptions, StageReport, run


@dataclass(frozen=True, kw_only=True)
class SftOptions(StageOptions):
    """Fine-tuning of all weights.

    Args:
        model: Alias, .gguf file (which is dequantised), folder of safetensors, or Hub id.
        template: A file with a chat template (Jinja), in place of the model's own; it is saved with the model.
    """

    model: str
    template: str = ""
    lr: float = 2e-5
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("model", self.model, bool(self.model), "an alias, a file, a folder or a Hub id")


def sft(
    options: SftOptions, *, resume: bool = False, watch: Iterable[Callable[[Mapping[str, Any]], None]] = ()
) -> StageReport:
    """Trains a model on completions alone, with the token that ends them, and leaves a run folder as `pretrain` does.

    Records: {"prompt", "completion"}, {"messages"}, {"text"}; of an encoder-decoder {"source", "target"} too; of an encoder
    {"text"} alone. Raises as `pretrain`; ValueError: a record of another form, a tokenizer that does not fit.
    """
    path = hub.resolve(options.model)
    model = models.load(path)
    if options.max_length > model.config.max_position:
        raise ValueError(f"max_length is {options.max_length}; allowed: up to {model.config.max_position}, the model's")
    tokenizer, template = read_text(path)
    known = None if isinstance(template, ValueError) else template
    if options.template:
        bos, eos = ("" if id is None else tokenizer.token(id) for id in (tokenizer.bos_id, tokenizer.eos_id))
        known = ChatTemplate(Path(options.template).read_text(encoding="utf-8"), bos, eos)
    plan = plan_of(options, model, tokenizer, known, path)
    return run(options, replace(plan, template=known if options.template else None), resume, watch)
