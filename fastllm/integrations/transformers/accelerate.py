"""accelerate a model, report what was done, and undo it."""

import copy
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from . import attention, loss
from .swaps import ATTENTION, FAMILIES, LAYER, ROTARY, Left, choose, choose_activation

_HANDLE = "_fastllm_handle"
REPLACEABLE = (None, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
NOTES = (
    f"{attention.WEIGHTS} runs attention in torch",
    f"{attention.COMPILED_DROPOUT} runs in torch; otherwise it draws its mask from torch's generator, not torch's own mask",
)


@dataclass
class Report:
    """replaced: (class, kernels) -> how many modules. left: (class, reason) -> how many. notes: what single calls do."""

    family: str
    replaced: Counter = field(default_factory=Counter)
    left: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=lambda: list(NOTES))

    def __str__(self) -> str:
        lines = [f"fastllm: {self.family}"]
        for title, rows in (("replaced", self.replaced), ("left", self.left)):
            lines += [f"  {title:9} {count:4} x {what}: {how}" for (what, how), count in rows.items()]
        return "\n".join([*lines, *(f"  note      {n}" for n in self.notes)])

    def short(self) -> str:
        """One line."""
        kernels: Counter = Counter()
        for (_, names), count in self.replaced.items():
            kernels[names] += count
        done = ", ".join(f"{count} x {names}" for names, count in kernels.items()) or "nothing"
        left = f"; {sum(self.left.values())} modules left, see handle.report" if self.left else ""
        return f"fastllm: {self.family}: {done}{left}"


class Handle:
    """What `accelerate` did to a model: `report`, and `undo()`."""

    def __init__(self, model: PreTrainedModel, report: Report) -> None:
        self.model, self.report = model, report
        self._bound: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._configs: list[tuple[Any, Any, dict[str, Any]]] = []  # (the model's own, the copy, the copy as it began)

    def bind(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Gives one instance another forward."""
        module.forward = types.MethodType(forward, module)
        self._bound.append((module, forward))

    def name_attention(self) -> None:
        """Gives the modules copies of their configs that name our attention: a config may belong to other models too."""
        copies: dict[int, tuple[Any, Any]] = {}
        for module in self.model.modules():
            own = vars(module).get("config")
            if not hasattr(own, "_attn_implementation_internal"):
                continue
            if id(own) not in copies:
                changed = copy.copy(own)
                changed._attn_implementation_internal = attention.NAME
                copies[id(own)] = own, changed
                self._configs.append((own, changed, dict(vars(changed))))
            module.config = copies[id(own)][1]

    def undo(self) -> None:
        """Gives every module its own forward and config back; what was set on a config meanwhile goes along. Once.

        Raises RuntimeError, and changes nothing, where somebody has replaced a forward since.
        """
        taken = [m for m, f in self._bound if getattr(vars(m).get("forward"), "__func__", None) is not f]
        if taken:
            names = ", ".join(sorted({type(m).__name__ for m in taken}))
            raise RuntimeError(
                f"undo: the forward of {names} was replaced after accelerate(model) by somebody else; undo that first "
                "(accelerate's Accelerator: unwrap_model(model, keep_fp32_wrapper=False))"
            )
        for module, _ in self._bound:
            del module.forward
        own_of = {id(changed): own for own, changed, _ in self._configs}
        for module in self.model.modules():
            config = vars(module).get("config")
            if id(config) in own_of:
                module.config = own_of[id(config)]
        for own, changed, before in self._configs:
            for name, value in vars(changed).items():
                if name not in before or before[name] is not value:
                    setattr(own, name, value)
        self._bound, self._configs = [], []
        vars(self.model).pop(_HANDLE, None)


def accelerate(model: nn.Module, *, logits: bool = True, quiet: bool = False) -> Handle:
    """Runs a Hugging Face model on our kernels, in place: a PreTrainedModel of FAMILIES, or a PEFT model around one.

    logits: False leaves `outputs.logits` out (None) of a forward with labels; True makes them when they are read, and under
    torch.compile always. quiet: print nothing. See the heads of `loss.py` and `attention.py` for what runs when.
    `model.config` is a copy from here on; read it from the model. A pickle of the whole model needs `undo()` first
    (save_pretrained and state_dict do not). Raises TypeError for what is no such model, ValueError for another family and
    for a model that is accelerated already.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"accelerate: {type(model).__name__} is no transformers.PreTrainedModel; load one with "
            "AutoModelForCausalLM.from_pretrained(name), and wrap it (compile, DataParallel) afterwards"
        )
    family = base.config.model_type
    if family not in FAMILIES:
        raise ValueError(
            f"accelerate: the model_type of {type(base).__name__} is {family!r}; known are {', '.join(FAMILIES)}"
        )
    if _HANDLE in vars(base):
        raise ValueError("accelerate: this model is accelerated already; call undo() of its handle first")
    handle = Handle(base, Report(family))
    _attention(handle)
    _modules(handle)
    _loss(handle, logits)
    setattr(base, _HANDLE, handle)
    if not quiet:
        print(handle.report.short())
    return handle


def _attention(handle: Handle) -> None:
    """The attention and its mask, through transformers' interface."""
    now = handle.model.config._attn_implementation
    if now not in REPLACEABLE:
        handle.report.left["attention", f"it is the implementation {now!r}, which may mean something of its own"] += 1
        return
    if not handle.model._can_set_attn_implementation():
        reason = f"transformers {transformers.__version__} does not look it up in AttentionInterface for this family"
        handle.report.left["attention", reason] += 1
        return
    handle.name_attention()
    handle.report.replaced["attention and its mask", "attention"] += 1


def _modules(handle: Handle) -> None:
    report, chosen = handle.report, []
    for module in handle.model.modules():
        name = type(module).__name__
        if type(module) is Conv1D or ("linear" in name.lower() and type(module) is not nn.Linear):
            report.left[name, "a product of its own (quantised, LoRA, transposed)"] += 1
        chosen += [(module, choice)] if (choice := choose(module)) else []
        chosen += [inner] if (inner := choose_activation(module)) else []
    rotary = [c for m, c in chosen if type(m).__name__.endswith(("RotaryEmbedding", "Attention"))]
    whole = not any(isinstance(c, Left) for c in rotary) and handle._configs
    norms = {id(m): c for m, c in chosen}
    for module, choice in chosen:
        if choice in (ROTARY, ATTENTION) and not whole:
            choice = Left("its rotation belongs to one of the attentions that are left")
        if choice is LAYER and isinstance(norms[id(module.post_attention_layernorm)], Left):
            choice = Left("its second norm is left")
        if isinstance(choice, Left):
            report.left[type(module).__name__, choice.reason] += 1
            continue
        handle.bind(module, choice.forward)
        report.replaced[type(module).__name__, choice.kernels] += 1


def _loss(handle: Handle, logits: bool) -> None:
    model = handle.model
    kind = type(model)
    reason = None
    if kind.__name__ not in loss.LOSSES:
        reason = "its class has a loss of its own, or none"
    elif "forward" in vars(model):
        reason = "the model's forward was replaced by somebody else (device_map hooks, another library)"
    else:
        reason = loss.refusal(model.get_output_embeddings())
    if reason:
        handle.report.left[f"the loss of {kind.__name__}", reason] += 1
        return
    handle.bind(model, loss.forward_of(kind, logits))
    handle.report.replaced[f"the loss of {kind.__name__}", "linear_cross_entropy"] += 1
