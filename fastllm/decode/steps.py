"""The decode steps of an engine: captured for 1, 2, 4, 8, ... rows, without adapters and with, and launched."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..models.decoder import Decoder
from .adapters import AdapterTable
from .graph import Captured, CapturedGraph, capture
from .rows import Rows
from .scheduler import Sequence
from .speculate import Draft, Speculator

Plan = Captured | CapturedGraph


@dataclass
class Flight:
    """A step that was launched, of these sequences in the first rows. captures: it made the plan. numbers: waits for the
    tokens and log-probabilities of all its rows."""

    running: list[Sequence]
    drafts: list[Draft]
    captures: bool
    plan: Plan
    numbers: Callable[[], list[list]]


class Steps:
    """Of an engine's rows. speculator: chooses the drafts that a step tries."""

    def __init__(self, model: Decoder, rows: Rows, adapters: AdapterTable, speculator: Speculator):
        self.model, self.rows, self.adapters, self.speculator = model, rows, adapters, speculator
        self.plans: dict[int, Plan] = {}  # by number of rows
        self.adapted_plans: dict[int, Plan] = {}  # where any row has an adapter
        self._pools = adapters.pools  # that those read

    def launch(self, running: list[Sequence], threads: int) -> Flight:
        """The next step of these, which have the first rows."""
        adapted = bool(self.adapters.pools) and any(s.adapter for s in running)
        plans = self.adapted_plans if adapted else self.plans
        size, drafts = self.speculator.choose(running, plans)
        captures = size not in plans
        for draft in drafts:
            self.rows.draft(running[draft.row], draft.first, draft.tokens)
        plan = self.capture(size, plans) if captures else self.replay(plans[size], threads)
        return Flight(running, drafts, captures, plan, plan.fetch(2))

    def capture(self, size: int, plans: dict[int, Plan]) -> Plan:
        plans[size] = capture(lambda: self.forward(size, plans is self.adapted_plans), self.rows.device)
        return plans[size]

    def replay(self, plan: Plan, threads: int) -> Plan:
        if plan.replay(threads) and not plan.outputs[1].isnan().any():
            raise IndexError("a decode step found a row, a page or a position out of range")
        return plan

    def forward(self, size: int, adapted: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(token, logprob, logits) of so many rows."""
        rows = slice(0, size)
        batch = self.rows.batch(rows, self.adapters.pools if adapted else None)
        return self.rows.draw(self.model.step_logits(self.model.step(self.rows.ids[rows], batch)), rows)

    def drop_plans(self) -> None:
        """Those whose pools have gone."""
        if self._pools is not self.adapters.pools:
            self.adapted_plans.clear()
            self._pools = self.adapters.pools
