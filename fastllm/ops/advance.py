"""advance: what a decode step changes between its sampled token and the next forward, in place.

For every row b of the step, with record r = state.rows[b] (or b):
    history[r, history_len[r]] = token[b]; history_len[r] += 1; state.position[r] += 1
    next_ids[b] = token[b]; position[b] += 1; context_len[b] += 1;
    slot[b] = block_table[b, position[b] // page] * page + position[b] % page
The second line is for tensors that were given: where the token stands, how many keys it sees, and where the cache
takes it. The next forward reads `token`, `position`, `context_len` and `slot`; so a replayed step needs no work from
the host but to look at the tokens. A row that is left out (r < 0) changes nothing and gets slot -1: its keys are
written nowhere.

Shapes: token int64 [B]; position int64 or int32 [B]; context_len int32 [B]; block_table int32 [B, P]; slot int64 [B].
Errors: IndexError where a history of H > 0 places is full, a record does not exist, or a position lies beyond the block
table; the rest of the step is done all the same. On a GPU nothing waits for the device, so nothing is raised: a full
history shows as history_len > H, the others as slot -1.
"""

import torch
from torch import Tensor

from .. import _C
from ._op import Op, check, check_dtype, pointer
from ._triton import tl, triton
from .sample import SampleState, check_rows

_MESSAGE = "advance: a history is full, a record does not exist or a position lies beyond the block table"


def reference(
    token: Tensor, settings: Tensor, history: Tensor, rows: Tensor | None, position: Tensor | None,
    context_len: Tensor | None, block_table: Tensor | None, slot: Tensor | None, next_ids: Tensor | None, page: int,
) -> None:  # fmt: skip
    state, bad = SampleState(settings, history, history[:, :0]), False
    for b in range(len(token)):
        r = b if rows is None else int(rows[b])
        if not 0 <= r < len(settings):
            bad |= r >= 0
            if slot is not None:
                slot[b] = -1
            continue
        n = int(state.history_len[r])
        if n < history.shape[1]:
            history[r, n] = token[b]
        else:
            bad |= history.shape[1] > 0
        if next_ids is not None:
            next_ids[b] = token[b]
        state.history_len[r] += 1
        state.position[r] += 1
        if context_len is not None:
            context_len[b] += 1
        if position is not None:
            position[b] += 1
        if slot is not None:
            column, offset = divmod(int(position[b]), page)
            inside = column < block_table.shape[1]
            slot[b] = int(block_table[b, column]) * page + offset if inside else -1
            bad |= not inside
    if bad:
        raise IndexError(_MESSAGE)


@triton.jit(do_not_specialize=["count", "records", "room", "table_stride", "pages", "page"])
def advance_kernel(
    token, settings, history, rows, position, context_len, block_table, slot, next_ids,
    count, records, room, table_stride, pages, page, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < count
    which = b.to(tl.int64)
    if rows is not None:
        which = tl.load(rows + b, mask=inside, other=-1).to(tl.int64)
    mine = inside & (which >= 0) & (which < records)
    t = tl.load(token + b, mask=mine, other=0)
    s = settings + which * 8
    history_len = s.to(tl.pointer_type(tl.int32), bitcast=True) + 14  # csrc/records/sample.h: SampleRow
    n = tl.load(history_len, mask=mine, other=0)
    tl.store(history + which * room + n, t.to(tl.int32), mask=mine & (n >= 0) & (n < room))
    tl.store(history_len, n + 1, mask=mine)
    tl.store(s + 2, tl.load(s + 2, mask=mine, other=0) + 1, mask=mine)
    if next_ids is not None:
        tl.store(next_ids + b, t, mask=mine)
    if context_len is not None:
        tl.store(context_len + b, tl.load(context_len + b, mask=mine, other=0) + 1, mask=mine)
    if position is not None:
        p = tl.load(position + b, mask=mine, other=0) + 1
        tl.store(position + b, p, mask=mine)
        if slot is not None:
            column, offset = p // page, p % page
            held = mine & (p >= 0) & (column < pages)
            first = tl.load(block_table + b.to(tl.int64) * table_stride + column, mask=held, other=0).to(tl.int64)
            tl.store(slot + b, tl.where(held, first * page + offset, -1), mask=inside)


def cpu(
    token: Tensor, settings: Tensor, history: Tensor, rows: Tensor | None, position: Tensor | None,
    context_len: Tensor | None, block_table: Tensor | None, slot: Tensor | None, next_ids: Tensor | None, page: int,
) -> None:  # fmt: skip
    if _C.advance(
        settings.data_ptr(), history.data_ptr(), pointer(position), pointer(context_len), pointer(slot), pointer(next_ids),
        token.data_ptr(), pointer(rows), pointer(block_table),
        token.shape[0], settings.shape[0], history.shape[1], 0 if block_table is None else block_table.stride(0),
        0 if block_table is None else block_table.shape[1], page,
        int(position is not None and position.dtype == torch.int64),
    ):  # fmt: skip
        raise IndexError(_MESSAGE)


def gpu(
    token: Tensor, settings: Tensor, history: Tensor, rows: Tensor | None, position: Tensor | None,
    context_len: Tensor | None, block_table: Tensor | None, slot: Tensor | None, next_ids: Tensor | None, page: int,
) -> None:  # fmt: skip
    count, block = token.shape[0], 128
    if count:
        advance_kernel[(triton.cdiv(count, block),)](
            token, settings, history, rows, position, context_len, block_table, slot, next_ids,
            count, settings.shape[0], history.shape[1], 0 if block_table is None else block_table.stride(0),
            0 if block_table is None else block_table.shape[1], page, BLOCK=block, num_warps=4,
        )  # fmt: skip


forward = Op(
    "advance(Tensor token, Tensor(a!) settings, Tensor(b!) history, Tensor? rows, Tensor(c!)? position,"
    " Tensor(d!)? context_len, Tensor? block_table, Tensor(e!)? slot, Tensor(f!)? next_ids, int page) -> ()",
    reference=reference,
    fake=lambda *arguments: None,
    cpu=cpu,
    triton=gpu,
)


def advance(
    token: Tensor, state: SampleState, position: Tensor | None = None, context_len: Tensor | None = None,
    block_table: Tensor | None = None, slot: Tensor | None = None, next_ids: Tensor | None = None, page: int = 16,
) -> None:  # fmt: skip
    """Moves the state, and the tensors of the next decode step, on by one token. See the head of this file."""
    check_dtype("advance", "token", token, (torch.int64,))
    check(token.dim() == 1, lambda: f"advance: token {tuple(token.shape)} must be [B]")
    check_rows("advance", state, token)
    wanted = (("position", position, (torch.int64, torch.int32)), ("context_len", context_len, (torch.int32,)))
    for name, tensor, dtypes in (*wanted, ("slot", slot, (torch.int64,)), ("next_ids", next_ids, (torch.int64,))):
        if tensor is not None:
            check_dtype("advance", name, tensor, dtypes)
            check(
                tensor.shape == token.shape and tensor.is_contiguous(),
                lambda n=name, t=tensor: f"advance: {n} {tuple(t.shape)} must be contiguous, {tuple(token.shape)}",
            )
    if slot is not None:
        check(block_table is not None and position is not None, lambda: "advance: slot needs block_table and position")
        check_dtype("advance", "block_table", block_table, (torch.int32,))
        check(
            block_table.dim() == 2 and block_table.shape[0] == token.shape[0] and block_table.stride(1) == 1,
            lambda: (
                f"advance: block_table {tuple(block_table.shape)} must be [{token.shape[0]}, P] with unit stride in P"
            ),
        )
        check(page > 0, lambda: f"advance: page is {page}, allowed: ≥ 1")
    forward(
        token.contiguous(),
        state.settings,
        state.history,
        state.rows,
        position,
        context_len,
        block_table,
        slot,
        next_ids,
        page,
    )
