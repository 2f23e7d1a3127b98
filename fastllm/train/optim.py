"""AdamW over a model's parameters: a schedule, clipping, and which of them decay.

    optimizer = Optimizer(model, OptimOptions(lr=3e-4), steps=1000)
    loss.backward()
    norm = optimizer.step()  # clips, updates, drops the gradients

Step t of n, from 1, has the rate lr * f(t) with f rising to 1 over the warm-up and then, p running from 0 to 1 over the rest,

    constant  1                          linear  1 - (1 - e) p
    cosine    e + (1 - e) (1 + cos(pi p)) / 2      (Loshchilov & Hutter 2017, arXiv 1608.03983)
    wsd       1, over the last fifth of all steps down to e in a line      (Hu et al. 2024, arXiv 2404.06395)

where e is what is left of it at the end. Matrices decay; vectors (biases, gains of norms) do not. `scale_parameter` is
Adafactor's (Shazeer & Stern 2018, arXiv 1804.04235): a parameter that is about s large moves by about lr s.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import AdamWSpec, AdamWState
from .parallel import local, norm_over_processes

SCHEDULES = ("cosine", "linear", "constant", "wsd")
DECAY_SHARE = 0.2  # of all steps, at the end of "wsd"
SMALLEST = 1e-3  # that scale_parameter takes a parameter for; Adafactor's


def require(name: str, value: object, fits: bool, allowed: str) -> None:
    """ValueError for an option that does not fit."""
    if not fits:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """AdamW, its schedule and clipping.

    Args:
        lr: The highest rate.
        schedule: cosine, linear, constant or wsd.
        warmup: Steps in which the rate rises.
        final_lr: What is left of lr at the end, a share.
        weight_decay: Of matrices.
        beta1: AdamW's, of the mean.
        beta2: AdamW's, of the mean square.
        eps: AdamW's.
        clip: The largest norm of all gradients; null for none.
        scale_parameter: Each parameter's rate is lr times its root mean square, at least .001: T5's embeddings are drawn with
            deviation 1, its queries with .01, and one rate is too low for those or too high for these.
    """

    lr: float = 3e-4
    schedule: str = "cosine"
    warmup: int = 0
    final_lr: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float | None = 1.0
    scale_parameter: bool = False

    def __post_init__(self) -> None:
        require("lr", self.lr, 0 < self.lr < math.inf, "a positive number")
        require("schedule", self.schedule, self.schedule in SCHEDULES, ", ".join(SCHEDULES))
        require("warmup", self.warmup, self.warmup >= 0, "0 steps or more")
        require("final_lr", self.final_lr, 0 <= self.final_lr <= 1, "a share, 0 to 1")
        require("clip", self.clip, self.clip is None or 0 < self.clip < math.inf, "a positive number, or None")
        AdamWSpec(beta1=self.beta1, beta2=self.beta2, eps=self.eps, weight_decay=self.weight_decay)  # checks its own

    def rate(self, step: int, steps: int) -> float:
        """The rate of a step, from 1, of so many. ValueError: a warm-up that is longer than the run."""
        require("warmup", self.warmup, self.warmup <= steps, f"at most the {steps} steps of the run")
        if step <= self.warmup:
            return self.lr * step / self.warmup
        rest = steps - self.warmup
        p = min(1.0, (step - self.warmup) / rest) if rest else 1.0
        if self.schedule == "constant":
            left = 1.0
        elif self.schedule == "linear":
            left = 1 - (1 - self.final_lr) * p
        elif self.schedule == "cosine":
            left = self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * p)) / 2
        else:
            late = 1 - (steps - step) / (DECAY_SHARE * steps)
            left = 1 - (1 - self.final_lr) * min(1.0, max(0.0, late))
        return self.lr * left


class Optimizer:
    """The parameters of a model that need a gradient, with AdamW's moments of each, and a float32 master beside 16-bit ones.
    Of parameters in shards each process updates its own."""

    def __init__(self, model: nn.Module, options: OptimOptions, steps: int):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("the model has no parameter that needs a gradient, so there is nothing to train")
        options.rate(1, steps)
        self.options, self.steps = options, steps
        self.states = {name: AdamWState.new(p) for name, p in self.parameters.items()}
        self.done = 0

    @property
    def rate(self) -> float:
        """Of the step that comes next."""
        return self.options.rate(self.done + 1, self.steps)

    def step(self) -> Tensor:
        """Updates every parameter that has a gradient, and drops the gradients; the norm of all of them, before clipping.

        Where that norm is not finite, nothing is written: no parameter, no moment. A scalar on the parameters' device; nobody
        waits for it here. RuntimeError: no gradient at all.
        """
        named = {name: p for name, p in self.parameters.items() if p.grad is not None}
        if not named:
            raise RuntimeError("no parameter has a gradient; call backward() on a loss of this model first")
        norm = global_norm([p.grad for p in named.values()])
        limit = self.options.clip
        scale = None if limit is None else (limit / norm).clamp(max=1.0)
        skip = torch.isfinite(norm).logical_not().float()
        o, rate = self.options, self.rate
        self.done += 1
        for decays, names in _groups(named).items():
            decay = o.weight_decay if decays[0] else 0.0
            spec = AdamWSpec(lr=rate, beta1=o.beta1, beta2=o.beta2, eps=o.eps, weight_decay=decay)
            group = [local(named[name]) for name in names]
            gradients = [local(named[name].grad) for name in names]
            rates = torch.stack([_size(named[name]) for name in names]) if o.scale_parameter else None
            ops.adamw(
                group, gradients, [_local_state(self.states[n]) for n in names], self.done, spec, scale, skip, rates
            )
        for p in named.values():
            p.grad = None
        return norm

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that a later step depends on, beside the parameters: ("<parameter>.<exp_avg, exp_avg_sq or master>", tensor)."""
        for name, state in self.states.items():
            for kind, tensor in vars(state).items():
                if tensor is not None:
                    yield f"{name}.{kind}", tensor

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Goes on after `done` steps. ValueError: tensors of another model or another dtype."""
        own = dict(self.tensors())
        if own.keys() != tensors.keys():
            odd = ", ".join(sorted(own.keys() ^ tensors.keys())[:3])
            raise ValueError(f"the optimizer's state is another model's: {odd} in one of the two only")
        for name, tensor in own.items():
            if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
                found, wanted = tensors[name], tensor
                raise ValueError(
                    f"{name} is {tuple(found.shape)} {found.dtype} in the state, {tuple(wanted.shape)} {wanted.dtype} here"
                )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.done = done


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all of them together, a float32 scalar."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault(gradient.dtype, []).append(local(gradient))
    norms = [ops.grad_norm(kind) for kind in kinds.values()]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    return norm_over_processes(norm, gradients[0])


@torch.no_grad()
def _size(parameter: nn.Parameter) -> Tensor:
    """Its root mean square, or SMALLEST: zeros must be able to leave, a float32 scalar."""
    return (global_norm([parameter]) / max(1, parameter.numel()) ** 0.5).clamp(min=SMALLEST)


def _local_state(state: AdamWState) -> AdamWState:
    return AdamWState(*(None if t is None else local(t) for t in vars(state).values()))


def _groups(named: Mapping[str, nn.Parameter]) -> dict[tuple, list[str]]:
    """Names by (whether it decays, dtype, the gradient's dtype): a list that one launch can update."""
    groups: dict[tuple, list[str]] = {}
    for name, p in named.items():
        groups.setdefault((p.dim() >= 2, p.dtype, p.grad.dtype), []).append(name)
    return groups
