"""advance: in place, so a case runs on copies and returns them."""

from dataclasses import replace

import torch

from ... import ops
from ...ops.advance import reference
from ...ops.sample import SampleState
from ..case import Case, Suite


def _on_copies(function):
    def run(token, state, position, context_len, block_table, slot, next_ids):
        state = replace(state, settings=state.settings.clone(), history=state.history.clone())
        position, context_len, slot, next_ids = (t.clone() for t in (position, context_len, slot, next_ids))
        function(token, state, position, context_len, block_table, slot, next_ids)
        return state.settings, state.history, position, context_len, slot, next_ids

    return run


def _reference(token, state, position, context_len, block_table, slot, next_ids):
    reference(token, state.settings, state.history, state.rows, position, context_len, block_table, slot, next_ids, 16)


def case(batch: int, dtype: torch.dtype = torch.int64) -> Case:
    def inputs(make):
        length = make.integers(0, 63, batch, dtype=torch.int32)
        return {
            "token": make.integers(0, 1000, batch),
            "state": SampleState.create(
                batch, history=64, device=make.device, history_len=length, position=length.long()
            ),
            "position": length.to(dtype),
            "context_len": length + 1,
            "block_table": make.integers(0, 99, batch, 4, dtype=torch.int32),
            "slot": length.long(),
            "next_ids": length.long(),
        }

    return Case(f"{batch} {str(dtype).removeprefix('torch.')}", inputs, bytes=lambda size: 100 * batch)


SUITE = Suite(
    op="advance",
    run=_on_copies(ops.advance),
    reference=_on_copies(_reference),
    rows=("token", "state", "position", "context_len", "block_table", "slot", "next_ids"),
    dtypes=(torch.float32,),
    correct=(case(1), case(7), case(5, torch.int32), case(0)),
    benchmark=(case(1), case(64)),
)
