"""SamplingParams: what a request asks of decoding, checked when it is made."""

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


def _integer(name: str, value: object, low: int, high: int | None = None, also: str = "") -> int:
    allowed = f"an integer {f'≥ {low}' if high is None else f'in [{low}, {high}]'}{also}"
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"SamplingParams: {name}={value!r}, allowed: {allowed}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"SamplingParams: {name}={value!r}, allowed: {allowed}")
    return int(value)


def _number(name: str, value: object, low: float, high: float | None = None, above: bool = False) -> float:
    allowed = f"a finite number {'>' if above else '≥'} {low:g}" if high is None else f"a number in [{low:g}, {high:g}]"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"SamplingParams: {name}={value!r}, allowed: {allowed}")
    value = float(value)
    inside = math.isfinite(value) and value >= low and (high is None or value <= high) and not (above and value == low)
    if not inside:
        raise ValueError(f"SamplingParams: {name}={value!r}, allowed: {allowed}")
    return value


def _items(name: str, value: object, kind: str) -> tuple:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"SamplingParams: {name}={value!r}, allowed: {kind}")
    return tuple(value)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample one request. Frozen: derive another with dataclasses.replace(params, ...).

    max_new_tokens: how many to generate at most, ≥ 1; max_tokens is accepted as its name.
    min_new_tokens: no end of sequence before so many, ≥ 0; nor does a stop string end the completion that lies within them.
    temperature: ≥ 0; 0 takes the most likely token and leaves the rest of the sampler out.
    top_k: the k most likely tokens, ≥ 1; 0 and -1 are off.
    top_p: the fewest most likely tokens that together have probability p, in [0, 1]; 1 is off, 0 keeps one.
    min_p: tokens at least p times as likely as the most likely one, in [0, 1]; 0 is off.
    repetition_penalty: divides positive logits of tokens seen in prompt or completion, multiplies negative ones; > 0.
    presence_penalty, frequency_penalty: taken off a logit once, and for every time its token was generated; in [-2, 2].
    seed: the completion is a function of it, of the prompt and of the model; None draws one. An integer in [0, 2^63).
    stop: strings that end the completion (not part of its text); stop_token_ids: tokens that do.
    ignore_eos: go on after the end of sequence.
    logprobs: how many alternatives to report for every token, 0 to 20; None: none. The token's own is always reported.
    n: completions of the prompt, ≥ 1.
    adapter: name of a loaded adapter.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    adapter: str | None = None
    if TYPE_CHECKING:
        max_tokens: int = 128  # with _accept_max_tokens, the other name of max_new_tokens
    else:
        max_tokens = property(lambda self: self.max_new_tokens)

    def __post_init__(self) -> None:
        largest = 2**31 - 1
        checked = {
            "max_new_tokens": _integer("max_new_tokens", self.max_new_tokens, 1, largest),
            "min_new_tokens": _integer("min_new_tokens", self.min_new_tokens, 0, largest),
            "temperature": _number("temperature", self.temperature, 0),
            "top_k": max(_integer("top_k", self.top_k, -1, largest, ", where 0 and -1 are off"), 0),
            "top_p": _number("top_p", self.top_p, 0, 1),
            "min_p": _number("min_p", self.min_p, 0, 1),
            "repetition_penalty": _number("repetition_penalty", self.repetition_penalty, 0, above=True),
            "presence_penalty": _number("presence_penalty", self.presence_penalty, -2, 2),
            "frequency_penalty": _number("frequency_penalty", self.frequency_penalty, -2, 2),
            "n": _integer("n", self.n, 1, largest),
        }
        if checked["min_new_tokens"] > checked["max_new_tokens"]:
            raise ValueError(
                f"SamplingParams: min_new_tokens={self.min_new_tokens}, "
                f"allowed: at most max_new_tokens={self.max_new_tokens}"
            )
        if self.seed is not None:
            checked["seed"] = _integer("seed", self.seed, 0, 2**63 - 1, ", or None")
        if self.logprobs is not None:
            checked["logprobs"] = _integer("logprobs", self.logprobs, 0, 20, ", or None")
        kind = "a string or a sequence of strings, none empty"
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop, kind)
        for s in stop:
            if not isinstance(s, str):
                raise TypeError(f"SamplingParams: stop={self.stop!r}, allowed: {kind}")
            if not s:
                raise ValueError(f"SamplingParams: stop={self.stop!r}, allowed: {kind}")
        checked["stop"] = stop
        ids = _items("stop_token_ids", self.stop_token_ids, "a sequence of token ids")
        checked["stop_token_ids"] = tuple(_integer("stop_token_ids", i, 0, largest) for i in ids)
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"SamplingParams: ignore_eos={self.ignore_eos!r}, allowed: True or False")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise TypeError(f"SamplingParams: adapter={self.adapter!r}, allowed: the name of an adapter, or None")
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def _accept_max_tokens(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: SamplingParams, *, max_tokens: int | None = None, **fields: Any) -> None:
        if max_tokens is not None:
            if "max_new_tokens" in fields:
                raise TypeError("SamplingParams: max_tokens is another name of max_new_tokens; give one of them")
            fields["max_new_tokens"] = max_tokens
        init(self, **fields)

    return __init__


SamplingParams.__init__ = _accept_max_tokens(SamplingParams.__init__)
