"""The loss of a model that is given labels, without logits [T, V] in memory.

A forward with labels runs `ops.linear_cross_entropy` on the hidden states. `outputs.logits` is made when it is read, by
attribute, key, index or iteration, and then kept; who reads the loss alone never pays for it. They are those of the forward:
under its autocast, with a gradient if it had one, and once the head has changed, by an optimizer's step, reading them is an
error. With `logits=False` it is None in a forward with labels.

The class's own forward runs, logits and all, where `loss_function` is not the class's own or an argument of it is unknown
here, with `return_dict=False` or `logits_to_keep`, and where the head is no plain nn.Linear (quantised, with LoRA, with
hooks). Under torch.compile nothing can be put off: logits are made, and their loss by `ops.cross_entropy`, unless
`logits=False`. One thing differs on purpose: a batch without any target has the loss 0, not NaN.
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithCrossAttentions,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    Seq2SeqLMOutput,
)

from ... import ops
from .forwards import bare, fits, linear

IGNORED = -100

# ------------------------------------------------------------------------------------------------------ logits, when read


class Source:
    """What logits are made of when they are read: a head, hidden states and a cap, as the forward had them."""

    def __init__(self, head: nn.Linear, hidden: Tensor, softcap: float | None):
        self.head, self.hidden, self.softcap = head, hidden, softcap
        self.versions = self._versions()
        kind = hidden.device.type
        self.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self.grad, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def logits(self) -> Tensor:
        """RuntimeError: the head is not the forward's any more."""
        if self._versions() != self.versions:
            raise RuntimeError(
                "outputs.logits is made when it is read, and the head has changed since this forward; read it before "
                "optimizer.step(), or call the model again"
            )
        kind, dtype, enabled = self.autocast
        with (
            torch.inference_mode(self.inference),  # which sets the other one too
            torch.set_grad_enabled(self.grad),
            torch.autocast(kind, dtype, enabled),
        ):
            return capped(self.head(self.hidden), self.softcap)

    def _versions(self) -> list[int | None]:
        tensors = [t for t in (self.head.weight, self.head.bias) if t is not None]
        return [None if t.is_inference() else t._version for t in tensors]


class _Deferred:
    """Mixed into a ModelOutput: the key "logits" stands in its place, and its value is made by the first who reads it."""

    _source: Source | None = None
    _logits: Tensor | None = None

    @property
    def logits(self) -> Tensor | None:
        if self._logits is None and self._source is not None:
            self.logits = self._source.logits()
        return self._logits

    @logits.setter
    def logits(self, value: Tensor | None) -> None:
        self.__dict__["_logits"] = value
        if value is not None:
            OrderedDict.__setitem__(self, "logits", value)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key] if isinstance(key, slice) else self[list(self.keys())[key]]
        if key == "logits":
            return self.logits
        return OrderedDict.__getitem__(self, key) if key in self.keys() else super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def values(self) -> list[Any]:
        return [self[key] for key in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return [(key, self[key]) for key in self.keys()]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __reduce__(self) -> tuple:
        values = (getattr(self, name) for name in self.__dataclass_fields__)
        return type(self).__bases__[1], tuple(values)


@functools.cache
def _deferred(output: type) -> type:
    return type(output.__name__, (_Deferred, output), {"__module__": __name__, "__doc__": output.__doc__})


def output_of(kind: type, loss: Tensor, source: Source | None, fields: Mapping[str, Any]) -> Any:
    """An output of a kind, with those of the fields that it has, and logits to be made from the source, or without."""
    fields = {k: v for k, v in fields.items() if k in kind.__dataclass_fields__}
    if source is None:
        return kind(loss=loss, **fields)
    made = _deferred(kind)(loss=loss)
    made.__dict__["_source"] = source
    OrderedDict.__setitem__(made, "logits", None)  # its place, behind the loss
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap), or the logits."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


# ---------------------------------------------------------------------------------------------------------------- losses


def refusal(head: nn.Module | None) -> str | None:
    """Why the product with a head cannot be made inside the loss; None when it can."""
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}, not nn.Linear"
    forward = vars(head).get("forward")
    if not bare(head) or (forward is not None and getattr(forward, "__func__", None) is not linear):
        return "the head has hooks or a forward of somebody else's"
    if not fits(head.weight, head.bias):
        return f"the head's weight is {head.weight.dtype} in a {type(head.weight).__name__}"
    return None


def finish(
    output: type,
    fields: Mapping[str, Any],
    head: nn.Linear,
    hidden: Tensor,
    target: Tensor,
    logits: bool,
    softcap: float | None = None,
    items: Tensor | int | None = None,
    ignored: int = IGNORED,
) -> Any:
    """The output of a forward: its fields, logits, and the cross-entropy of hidden [..., H] against target [...], the mean,
    or the sum over `items` where they are given."""
    spec = ops.LossSpec(ignored, softcap=softcap, reduction="mean" if items is None else "sum")
    target, device, more = target.flatten().to(hidden.device), hidden.device, {}
    if logits and torch.compiler.is_compiling():
        scores = head(hidden)
        loss = ops.cross_entropy(scores.flatten(0, -2), target, spec=spec)
        more = {"logits": capped(scores, softcap)}
    else:
        x, weight, bias = hidden.flatten(0, -2), head.weight, head.bias
        if torch.is_autocast_enabled(device.type):  # in its dtype, as the linear would be
            dtype = torch.get_autocast_dtype(device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        loss = ops.linear_cross_entropy(x, weight, target, bias, spec=spec)
    if items is not None:
        loss = loss / (items.to(device) if isinstance(items, Tensor) else items)
    source = Source(head, hidden, softcap) if logits and not more else None
    return output_of(output, loss, source, more | dict(fields))


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    """What a class's forward calls its arguments."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _named(self: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(_names(type(self)), args, strict=False)) | kwargs


def ours(self: nn.Module, head: nn.Module, given: dict[str, Any]) -> bool:
    """Whether the loss of a call with these arguments is made here."""
    if (
        given.get("labels") is None
        or given.get("return_dict") is False
        or not getattr(self.config, "return_dict", True)
    ):
        return False
    keep = given.get("logits_to_keep", 0)
    return not isinstance(keep, Tensor) and keep == 0 and refusal(head) is None


def _own_loss(self: nn.Module) -> bool:
    """Whether the loss is the causal one of transformers (without asking for `loss_function`, which may log)."""
    own = vars(self).get("_loss_function") or LOSS_MAPPING.get(self.loss_type, ForCausalLMLoss)
    return own is ForCausalLMLoss


def causal(self: nn.Module, logits: bool, output: type, args: tuple, kwargs: dict[str, Any]) -> Any:
    """LlamaForCausalLM and its like, GPT2LMHeadModel."""
    given, head = _named(self, args, kwargs), self.get_output_embeddings()
    if (
        not _own_loss(self)
        or self.config.vocab_size != getattr(head, "out_features", None)
        or not ours(self, head, given)
    ):
        return type(self).forward(self, *args, **kwargs)
    labels, ignored = given.pop("labels"), given.pop("ignore_index", IGNORED)
    target, _ = given.pop("shift_labels", None), given.pop("logits_to_keep", 0)
    if target is None:  # at each position the label of the next one
        target = nn.functional.pad(labels, (0, 1), value=ignored)[..., 1:]
    inner = self.transformer if hasattr(self, "transformer") else self.model
    outputs = inner(**given | {"return_dict": True})
    hidden, softcap = outputs.last_hidden_state, getattr(self.config, "final_logit_softcapping", None)
    items = given.get("num_items_in_batch")
    return finish(output, outputs, head, hidden, target, logits, softcap, items, ignored)


def masked(self: nn.Module, logits: bool, output: type, args: tuple, kwargs: dict[str, Any]) -> Any:
    """BertForMaskedLM."""
    given, head, over = _named(self, args, kwargs), self.get_output_embeddings(), self.cls.predictions
    if not (bare(self.cls) and bare(over)) or not ours(self, head, given):
        return type(self).forward(self, *args, **kwargs)
    labels = given.pop("labels")
    outputs = self.bert(**given | {"return_dict": True})
    hidden = over.transform(outputs.last_hidden_state)
    return finish(output, outputs, head, hidden, labels, logits)


_MODES = {"output_attentions", "output_hidden_states"}
_CACHING = {"cache", "past_key_values", "use_cache"}
_SEQ2SEQ = {"input_ids", "inputs_embeds", "attention_mask", "encoder_outputs", "labels", "return_dict", *_MODES}
_SEQ2SEQ |= {"decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "num_items_in_batch", *_CACHING}


def seq2seq(self: nn.Module, logits: bool, output: type, args: tuple, kwargs: dict[str, Any]) -> Any:
    """T5ForConditionalGeneration. A call with any other argument than these is left to the class."""
    given = {k: v for k, v in _named(self, args, kwargs).items() if v is not None}
    if given.keys() - _SEQ2SEQ or not ours(self, self.lm_head, given):
        return type(self).forward(self, *args, **kwargs)
    modes = {k: given[k] for k in given.keys() & _MODES} | {"return_dict": True}
    mask, encoded = given.get("attention_mask"), given.get("encoder_outputs")
    if encoded is None:
        encoded = self.encoder(
            input_ids=given.get("input_ids"), inputs_embeds=given.get("inputs_embeds"), attention_mask=mask, **modes
        )
    elif not isinstance(encoded, BaseModelOutput):
        encoded = BaseModelOutput(*encoded[:3])
    ids, embeddings = given.get("decoder_input_ids"), given.get("decoder_inputs_embeds")
    outputs = self.decoder(
        input_ids=self._shift_right(given["labels"]) if ids is None and embeddings is None else ids,
        inputs_embeds=embeddings,
        attention_mask=given.get("decoder_attention_mask"),
        encoder_hidden_states=encoded[0],
        encoder_attention_mask=mask,
        **{k: given[k] for k in given.keys() & _CACHING},
        **modes,
    )
    hidden = outputs.last_hidden_state
    if getattr(self.config, "scale_decoder_outputs", self.config.tie_word_embeddings):
        hidden = hidden * self.model_dim**-0.5
    fields = {f"decoder_{k}" if k in ("hidden_states", "attentions") else k: v for k, v in outputs.items()}
    fields |= {f"encoder_{k}": v for k, v in encoded.items()}
    return finish(output, fields, self.lm_head, hidden, given["labels"], logits)


LOSSES: dict[str, tuple[Callable[..., Any], type]] = {
    "LlamaForCausalLM": (causal, CausalLMOutputWithPast),
    "MistralForCausalLM": (causal, CausalLMOutputWithPast),
    "Qwen2ForCausalLM": (causal, CausalLMOutputWithPast),
    "Qwen3ForCausalLM": (causal, CausalLMOutputWithPast),
    "Gemma3ForCausalLM": (causal, CausalLMOutputWithPast),
    "GPT2LMHeadModel": (causal, CausalLMOutputWithCrossAttentions),
    "BertForMaskedLM": (masked, MaskedLMOutput),
    "T5ForConditionalGeneration": (seq2seq, Seq2SeqLMOutput),
}


@functools.cache
def forward_of(kind: type, logits: bool) -> Callable[..., Any]:
    """The forward with the loss, for models of a class; it has the signature of the class's own, which Trainer reads."""
    make, output = LOSSES[kind.__name__]

    @functools.wraps(kind.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return make(self, logits, output, args, kwargs)

    return forward
