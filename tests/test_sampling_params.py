"""SamplingParams: names, defaults, ranges and messages."""

import dataclasses
import math

import numpy
import pytest

from fastllm import SamplingParams

NAN, INF = math.nan, math.inf


def test_defaults():
    assert dataclasses.asdict(SamplingParams()) == {
        "max_new_tokens": 128, "min_new_tokens": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": None, "stop": (),
        "stop_token_ids": (), "ignore_eos": False, "logprobs": None, "n": 1, "adapter": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({"max_tokens": 7}, {"max_new_tokens": 7, "max_tokens": 7}),
        ({"max_tokens": None}, {"max_new_tokens": 128}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 10**6, "top_p": 0, "min_p": 1}, {"top_k": 10**6, "top_p": 0.0, "min_p": 1.0}),
        ({"stop": "\n\n"}, {"stop": ("\n\n",)}),
        ({"stop": ["a", "b"], "stop_token_ids": [3, 0]}, {"stop": ("a", "b"), "stop_token_ids": (3, 0)}),
        ({"seed": 2**63 - 1, "logprobs": 20, "n": 5}, {"seed": 2**63 - 1, "logprobs": 20, "n": 5}),
        ({"top_k": numpy.int64(5), "top_p": numpy.float32(0.5)}, {"top_k": 5, "top_p": 0.5}),
        ({"min_new_tokens": 4, "max_new_tokens": 4}, {"min_new_tokens": 4}),
    ],
)
def test_accepted(given, stored):
    params = SamplingParams(**given)
    for name, value in stored.items():
        assert getattr(params, name) == value and type(getattr(params, name)) is type(value)


BAD = [
    *(("max_new_tokens", v, "an integer in \\[1, ") for v in (0, -1, 2.0, "5", True, None)),
    *(("min_new_tokens", v, "an integer in \\[0, ") for v in (-1, 1.5, False)),
    *(("temperature", v, "a finite number ≥ 0") for v in (-0.1, NAN, INF, "1", True, None)),
    *(("top_k", v, "an integer in \\[-1, .* where 0 and -1 are off") for v in (-2, 1.0, NAN, True)),
    *((name, v, "a number in \\[0, 1\\]") for name in ("top_p", "min_p") for v in (-0.01, 1.01, NAN, INF, "x", True)),
    *(("repetition_penalty", v, "a finite number > 0") for v in (0, -1, NAN, INF, None)),
    *((n, v, "a number in \\[-2, 2\\]") for n in ("presence_penalty", "frequency_penalty") for v in (-2.1, 3, NAN)),
    *(("seed", v, "an integer in \\[0, .*, or None") for v in (-1, 2**63, 1.0, True)),
    *(("stop", v, "a string or a sequence of strings, none empty") for v in ("", [""], [1], 3, b"x", None)),
    *(("stop_token_ids", v, "a sequence of token ids|an integer in") for v in (3, "3", [-1], [1.0], [True])),
    *(("ignore_eos", v, "True or False") for v in (1, None, "yes")),
    *(("logprobs", v, "an integer in \\[0, 20\\], or None") for v in (-1, 21, True, 2.0)),
    *(("n", v, "an integer in \\[1, ") for v in (0, True, 1.0)),
    ("adapter", 3, "the name of an adapter, or None"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD)
def test_refused(name, value, allowed):
    with pytest.raises((ValueError, TypeError), match=f"{name}=.*allowed: ({allowed})"):
        SamplingParams(**{name: value})


def test_min_above_max():
    with pytest.raises(ValueError, match="min_new_tokens=9, allowed: at most max_new_tokens=8"):
        SamplingParams(min_new_tokens=9, max_new_tokens=8)


def test_frozen_equal_hashable_and_replaceable():
    params = SamplingParams(max_tokens=3, stop=["x"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3
    assert params == SamplingParams(max_new_tokens=3, stop="x") and hash(params) == hash(
        SamplingParams(max_tokens=3, stop="x")
    )
    assert dataclasses.replace(params, max_new_tokens=5, seed=1) == SamplingParams(max_tokens=5, stop="x", seed=1)
    with pytest.raises(TypeError, match="another name of max_new_tokens"):
        SamplingParams(max_tokens=3, max_new_tokens=3)
    with pytest.raises(TypeError, match="topk"):
        SamplingParams(topk=3)
