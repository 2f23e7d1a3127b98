"""A model from nothing, on text.

    report = pretrain(PretrainOptions(arch="decoder", preset="nano", data="corpus/*.jsonl", out="runs/first", steps=2000))

The same as `fastllm pretrain --arch decoder --preset nano --data 'corpus/*.jsonl' --out runs/first --steps 2000`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import hub
from ..data.batch import Example, encode
from ..data.chat import ChatTemplate
from ..data.lint import Finding, lint
from ..data.tokenizer import Tokenizer
from ..llm import LLM
from ..models import decoder
from ..models.decoder import Decoder
from ..models.initial import initialise
from ..models.text import read_text
from ..sampling_params import SamplingParams
from .objective import next_token_loss
from .optim import require
from .stage import Plan, StageOptions, StageReport, run, texts_of

OPENING = 40  # characters of a text that a sample goes on from
FEW_LABELS = 20


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(StageOptions):
    """Pre-training.

    Args:
        arch: decoder, encoder or seq2seq.
        preset: The sizes by name; nano, micro and mini train in minutes on two cores.
        tokenizer: A model's folder, .gguf file, alias or Hub id; empty trains one on the data.
        vocab_size: Tokens of a vocabulary that is trained.
    """

    arch: str
    preset: str
    tokenizer: str = ""
    vocab_size: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        require("arch", self.arch, self.arch in PLANS, ", ".join(PLANS))
        require("preset", self.preset, self.preset in PRESETS[self.arch], ", ".join(PRESETS[self.arch]))
        require("vocab_size", self.vocab_size, self.vocab_size >= 260, "260 or more")


def pretrain(
    options: PretrainOptions, *, resume: bool = False, watch: Iterable[Callable[[Mapping[str, Any]], None]] = ()
) -> StageReport:
    """Trains a model and leaves options, log, checkpoints, samples, a plot, a report and the model in options.out.

    resume: go on from the newest checkpoint. watch: what gets each line of the log. Raises as `fastllm.train.loop.fit`, and
    MemoryError, with what would fit, before the first step.
    """
    tokenizer, text = _tokenizer(options)
    return run(options, PLANS[options.arch](options, tokenizer, text), resume, watch)


def _tokenizer(options: PretrainOptions) -> tuple[Tokenizer, Path]:
    """And where it is."""
    if options.tokenizer:
        path = Path(options.tokenizer) if Path(options.tokenizer).exists() else hub.resolve(options.tokenizer)
        return read_text(path)[0], path
    path = Path(options.out) / "tokenizer"
    if not (path / "tokenizer.json").is_file():
        texts = (texts_of(d.fields) for d in options.documents("train"))
        Tokenizer.train(texts, options.vocab_size, **ROLES[options.arch]).save(path)
    return Tokenizer.from_folder(path), path


# ------------------------------------------------------------------------------------------------------------- decoder


def _decoder(options: PretrainOptions, tokenizer: Tokenizer, text: Path) -> Plan:
    config = decoder.PRESETS[options.preset]
    positions = max(config.max_position, options.max_length)
    model = initialise(Decoder(replace(config, vocab=len(tokenizer), max_position=positions)), options.seed)
    return decoder_plan(options, model, tokenizer, None, text)


def decoder_plan(
    options: StageOptions, model: Decoder, tokenizer: Tokenizer, template: ChatTemplate | None, text: Path
) -> Plan:
    """Next tokens of texts, of completions, or of the assistant's turns, whatever a record is."""

    def opening(fields: Mapping[str, Any]) -> Any:
        prompt, messages = fields.get("prompt"), fields.get("messages")
        if isinstance(messages, list):
            last = max(i for i, m in enumerate(messages) if m.get("role") == "assistant")
            return messages[:last]
        if isinstance(prompt, (str, list)):
            return prompt
        beginning = str(fields.get("text", ""))[:OPENING]
        return beginning.rsplit(" ", 1)[0] or beginning

    def write(model: Decoder, prompts: list[Any]) -> list[str]:
        llm = LLM.of(model, tokenizer, template, max_model_len=min(options.max_length, model.config.max_position))
        room = llm.max_model_len - 1
        ids = [tokenizer.encode(p) if isinstance(p, str) else llm.chat_ids(p) for p in prompts]
        count = min(options.sample_tokens, room)
        params = SamplingParams(max_new_tokens=count, temperature=0.8, top_p=0.95, seed=options.seed)
        return [out.text for out in llm.generate([each[-(room + 1 - count) :] for each in ids], params)]

    def check(
        examples: Sequence[Example], batches: list[Any], records: dict[str, list[Mapping[str, Any]]]
    ) -> list[Finding]:
        train = records["train"]
        pairs = [
            (r["prompt"], r["completion"])
            for r in train
            if all(isinstance(r.get(k), str) for k in ("prompt", "completion"))
        ]
        few = len({label for _, label in pairs}) <= FEW_LABELS
        talks = any(isinstance(r.get("messages"), list) for r in train)
        return lint(
            tokenizer, examples, vocab=model.config.vocab, template=template if talks else None, batches=batches,
            splits={name: [texts_of(r) for r in found] for name, found in records.items()},
            labelled=pairs if few else (),
        )  # fmt: skip

    return Plan(
        model=model,
        loss=next_token_loss,
        encode=lambda document, index: encode(tokenizer, document.fields, template, options.max_length),
        text=text,
        lint=check,
        opening=opening,
        write=write,
        is_text=lambda fields: isinstance(fields.get("text"), str) and not fields.keys() & {"prompt", "messages"},
    )


PLANS: dict[str, Callable[[PretrainOptions, Tokenizer, Path], Plan]] = {"decoder": _decoder}
PRESETS: dict[str, Mapping[str, Any]] = {"decoder": decoder.PRESETS}
ROLES: dict[str, dict[str, Any]] = {"decoder": {}}
