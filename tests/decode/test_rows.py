"""Rows that are written on the CPU and copied, as those of a GPU are."""

import random

import torch
from _engine import PENALISED, PROMPT, SAMPLED, Made, alone, engine
from _paged import check

from fastllm.decode.rows import Rows


def staged(e):
    """The engine's rows, written as on a GPU."""
    rows = e.rows
    rows._staged = Rows(e.cache, len(rows.ids), e.capacity, e.eos_ids)
    return rows


def test_rows_are_copied_whole():
    e = engine(max_num_seqs=6)
    rows, plain = staged(e), Rows(e.cache, 6, e.capacity, e.eos_ids)
    for wanted in ([0], [1, 2], [5, 3], [4, 0, 2], [1, 2, 3, 4]):
        sequences = []
        for row in wanted:
            s = Made(PROMPT[row : 3 * row + 20 + len(wanted)], PENALISED if row % 2 else SAMPLED, seed=row)
            s.pages, s.row = e.cache.take(4), row
            sequences.append(s)
        rows.seat(*sequences)
        plain.seat(*reversed(sequences))
        for s in sequences:
            e.cache.release(s.pages)
        for ours, theirs in ((rows, plain), (rows.state, plain.state)):
            for name, tensor in vars(ours).items():
                if isinstance(tensor, torch.Tensor):
                    assert torch.equal(tensor, getattr(theirs, name)), (wanted, name)


def test_sequences_that_come_and_go():
    e, draw = engine(max_num_seqs=4), random.Random(1)
    staged(e)
    sequences = [Made(PROMPT[i : i + draw.randint(1, 40)], PENALISED, draw.randint(1, 20), seed=i) for i in range(14)]
    e.run(sequences)
    assert all(s.made == alone(s) for s in sequences)
    check(e.cache)
