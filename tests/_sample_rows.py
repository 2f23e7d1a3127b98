"""Rows and settings of `sample` that are hard on a kernel, for the tests that compare kernels bit for bit."""

import math

import torch

from fastllm.bench.cases.sample import PENALTIES, USUAL
from fastllm.ops.sample import SampleState

FIELDS = (
    {}, {"temperature": 0.0}, USUAL, {"top_p": 0.3, "temperature": 1.7}, {"top_k": 590, "top_p": 0.7},
    {"top_k": 6000, "top_p": 0.999}, {"min_p": 1e-30}, {"top_k": 300, "min_p": 1e-3}, {"temperature": 1e-45},
    {"top_k": 40, "min_p": 0.2, "temperature": 1.3}, {"top_k": 40, "top_p": 0.5, "temperature": 1.3},
)  # fmt: skip
HARD_PENALTIES = {**PENALTIES, "frequency_penalty": -0.7, "min_new_tokens": 30}


def hard_rows(fields: dict) -> tuple[torch.Tensor, SampleState]:
    """Equal logits, ties, scales that lie far apart, banned ones, infinities, one logit alone, ten."""
    vocab, inf = 600, math.inf
    ramp = torch.arange(vocab).float()
    rows = torch.stack(
        (
            torch.zeros(vocab), ramp % 2, torch.exp2(ramp % 250 - 125), torch.where(ramp % 3 == 0, -inf, -ramp),
            torch.where(ramp % 50 == 3, inf, 0.0), torch.where(ramp == 521, 5.0, -inf),
            torch.where(ramp < 10, ramp * 0.3, -inf),
        )
    )  # fmt: skip
    return rows, SampleState.create(len(rows), seed=torch.arange(len(rows)) * 2**40 - 7, index=3, **fields)


def penalised(count: int, fields: dict) -> SampleState:
    """Histories that name an id often, and such as a vocabulary of 9000 has not."""
    state = SampleState.create(count, history=20, suppress=3, seed=torch.arange(count), position=2**33, **fields)
    state.history.copy_(
        torch.tensor([5, 5, 8000, 17, 3, 5, 8000, 8000, 9000, -1, 2**31 - 1, 44, 7, 7, 7, 7, 7, 7, 7, 7])
    )
    state.suppress.copy_(torch.tensor([4, 8999, -1]))
    return state
