"""sample: the next token of every row of logits.

Penalties -> greedy at temperature 0, else temperature -> top-k -> top-p -> min-p -> draw, in the order and meaning of
transformers' logits processors:

- repetition_penalty (Keskar et al. 2019) over prompt and completion: x < 0 ? x * penalty : x / penalty; then, over the
  completion alone (OpenAI's definition), x -= frequency_penalty * count and x -= presence_penalty. `suppress` lists
  ids that are kept out (x = -inf) while fewer than min_new_tokens were generated. Ids outside the vocabulary change
  nothing.
- order: the larger logit first, the lower index first among equals. Every kept set is a beginning of this order, so
  `kept`, its size, names it. Greedy takes the first.
- top_k: the first k, exactly. (transformers keeps all that tie with the k-th: more than k where logits are coarse.)
- top_p (Holtzman et al. 2020): the shortest beginning whose probability, after top-k, reaches p: at least one token.
  Sums are compared with a slack of 2^-22 of the total: .2 + .1 reaches p = .3.
- min_p: tokens at least min_p times as likely as the first, less the same slack. Always keeps the first.
- logits of -inf are never kept; where the largest is +inf, those that are +inf share the mass.

Arithmetic: weights w = round(2^40 exp((x - max) * (1 / temperature))) as 64-bit integers, exp and its argument in
fp32; S = sum of w over the kept set; u = 64 bits of Philox4x32-10 with key seed and counter (position, index), words
0 and 1; r = floor(u S / 2^64); the token is the first, in order of the vocabulary, whose running sum of w exceeds r.
Integer sums are associative: threads, batch neighbours and places in memory change no bit. A token less likely than
the first by more than 2^-41 is never drawn.

Shapes: logits [B, V] fp32 with any row stride, V <= 2^23; every result [B].
Results: token int64; logprob fp32: log-probability of the token under softmax(logits) as given, before penalties,
temperature and truncation; truncated_logprob fp32: under the distribution that it was drawn from (0 when greedy); kept
int32; entropy fp32: of softmax(logits) as given, in nats. logprob and entropy come from integer sums at temperature 1.
Errors: a row with a NaN, or without any finite or +inf logit, has no distribution: LogitsError names the rows. The
other rows do not depend on them, so drop them and call again: the same tokens come out. (In a replayed plan: status
2, and such a row gets token 0, NaN and kept = 0.) On a GPU nothing waits for the device, so nothing is raised: such a
row gets the same results, a record that does not exist kept = -1, and `raise_for(logprob, kept)` raises for them where
the tokens are read.
No gradient: differentiate the log-probability of the token that came out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import _cuda, _sample_gpu
from ._op import Op, check, check_dtype, pointer

MAX_VOCAB = 1 << 23  # 2^23 weights of 2^40 stay below 2^63
_INDEX_OUT_OF_RANGE, _NOT_A_NUMBER = 1, 2  # csrc/common.h: Status


class LogitsError(ValueError):
    """Rows of logits without a distribution; `rows` lists them."""

    def __init__(self, rows: list[int], op: str = "sample") -> None:
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        super().__init__(
            f"{op}: logits of row {shown} hold a NaN or nothing above -inf; look for an overflow in the model"
        )
        self.rows, self.op = rows, op

    def __reduce__(self) -> tuple:
        return type(self), (self.rows, self.op), self.__dict__


# -------------------------------------------------------------------------------------------------------------- state


def _field(dtype: torch.dtype, place: int) -> property:
    return property(lambda self: self.settings.view(dtype)[:, place])


_NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}


@dataclass(frozen=True, eq=False)
class SampleState:
    """What every row asks of the sampler, in memory that a replayed step reads and `advance` moves on.

    settings: int64 [N, 8], one 64-byte record a row (csrc/records/sample.h: SampleRow); the fields below are views of it, [N]
        each, to be read and written in place.
    history: int32 [N, H]: prompt, then what was generated; prompt_len and history_len count them.
    suppress: int32 [N, E], unused places are -1.
    rows: int32 [B] or None: the record that each row of logits uses; negative leaves the row out; None: row b uses b.
    """

    settings: Tensor
    history: Tensor
    suppress: Tensor
    rows: Tensor | None = None

    seed = _field(torch.int64, 0)
    index = _field(torch.int64, 1)  # number of the completion among the n of its prompt
    position = _field(torch.int64, 2)  # of the token to come
    temperature = _field(torch.float32, 6)
    top_p = _field(torch.float32, 7)
    min_p = _field(torch.float32, 8)
    repetition_penalty = _field(torch.float32, 9)
    presence_penalty = _field(torch.float32, 10)
    frequency_penalty = _field(torch.float32, 11)
    top_k = _field(torch.int32, 12)
    prompt_len = _field(torch.int32, 13)
    history_len = _field(torch.int32, 14)
    min_new_tokens = _field(torch.int32, 15)

    def __post_init__(self) -> None:
        s, h, e, rows = self.settings, self.history, self.suppress, self.rows
        check(
            s.dtype == torch.int64
            and h.dtype == e.dtype == torch.int32
            and (rows is None or rows.dtype == torch.int32),
            lambda: "SampleState: settings are int64; history, suppress and rows int32; SampleState.create makes them",
            TypeError,
        )
        check(
            s.shape[1:] == (8,) and h.dim() == e.dim() == 2 and h.shape[0] == e.shape[0] == s.shape[0]
            and (rows is None or rows.dim() == 1),
            lambda: f"SampleState: settings {tuple(s.shape)}, history {tuple(h.shape)}, suppress {tuple(e.shape)}"
            " must be [N, 8], [N, H], [N, E], and rows [B]",
        )  # fmt: skip
        given = [t for t in (s, h, e, rows) if t is not None]
        check(all(t.is_contiguous() for t in given), lambda: "SampleState: its tensors must be contiguous")
        check(all(t.device == s.device for t in given), lambda: "SampleState: its tensors are on several devices")

    @classmethod
    def create(
        cls,
        count: int,
        *,
        history: int = 0,
        suppress: int = 0,
        device: str | torch.device = "cpu",
        **fields: float | Tensor,
    ) -> "SampleState":
        """`count` records with room for `history` tokens and `suppress` ids each; fields are numbers or [count]
        tensors, the rest is neutral: plain sampling with seed 0."""
        state = cls(
            torch.zeros(count, 8, dtype=torch.int64, device=device),
            torch.zeros(count, history, dtype=torch.int32, device=device),
            torch.full((count, suppress), -1, dtype=torch.int32, device=device),
        )
        for name, value in {**_NEUTRAL, **fields}.items():
            if not isinstance(getattr(cls, name, None), property):
                allowed = ", ".join(n for n, v in vars(cls).items() if isinstance(v, property))
                raise TypeError(f"SampleState: no field {name!r}; the fields are {allowed}")
            view = getattr(state, name)
            view.copy_(value) if isinstance(value, Tensor) else view.fill_(value)
        return state

    def set(
        self, row: int, params: Any, *, index: int = 0, seed: int | None = None,
        prompt: Sequence[int] = (), eos: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Writes record `row` from a SamplingParams.

        seed: params.seed, or drawn from torch's generator where both are None. prompt: the ids that the completion
        follows. eos: the ids that min_new_tokens keeps out."""
        seed = params.seed if seed is None else seed
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        check(
            len(prompt) <= self.history.shape[1] or not self.history.shape[1],
            lambda: f"SampleState: the prompt has {len(prompt)} tokens, a history {self.history.shape[1]}",
        )
        check(
            len(eos) <= self.suppress.shape[1] or not params.min_new_tokens,
            lambda: f"SampleState: {len(eos)} ids to suppress, room for {self.suppress.shape[1]}",
        )
        record = torch.zeros(1, 8, dtype=torch.int64, device="cpu")
        floats, integers = record.view(torch.float32)[0], record.view(torch.int32)[0]
        record[0, :3] = torch.tensor([seed, index, len(prompt)], dtype=torch.int64, device="cpu")
        floats[6:12] = torch.tensor(
            [
                params.temperature, params.top_p, params.min_p,
                params.repetition_penalty, params.presence_penalty, params.frequency_penalty,
            ],
            dtype=torch.float32,
            device="cpu",
        )  # fmt: skip
        counts = [params.top_k, len(prompt), len(prompt), params.min_new_tokens]
        integers[12:] = torch.tensor(counts, dtype=torch.int32, device="cpu")
        self.settings[row] = record[0]
        if self.history.shape[1]:
            self.history[row, : len(prompt)] = torch.as_tensor(prompt, dtype=torch.int32, device="cpu")
        if params.min_new_tokens:
            self.suppress[row] = -1
            self.suppress[row, : len(eos)] = torch.as_tensor(eos, dtype=torch.int32, device="cpu")

    def with_rows(self, rows: Tensor) -> "SampleState":
        """The same memory, read by rows of logits in another order or number."""
        return replace(self, rows=rows)

    def __getitem__(self, rows: slice) -> "SampleState":
        """The state of a slice of the rows of logits: the same memory."""
        if self.rows is not None:
            return replace(self, rows=self.rows[rows])
        return SampleState(self.settings[rows], self.history[rows], self.suppress[rows])


# ---------------------------------------------------------------------------------------------------------- reference


def philox(key: int, counter: int) -> list[int]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words of a 64-bit key and a 128-bit counter."""
    mask = 2**32 - 1
    c, k = [counter >> 32 * i & mask for i in range(4)], [key & mask, key >> 32 & mask]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q & mask, p >> 32 ^ c[3] ^ k[1], p & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def random_bits(seed: int, index: int, position: int) -> int:
    """64 bits for one token."""
    words = philox(seed % 2**64, position % 2**64 | (index % 2**64) << 64)
    return words[1] << 32 | words[0]


def fixed_weights(x: Tensor, temperature: float) -> Tensor:
    """round(2^40 exp((x - max) / temperature)), int64."""
    top = x.max()
    e = (x == top).double() if top == math.inf else ((x.double() - top.double()) / temperature).exp()
    return (e * 2.0**40).round().long()


def draw(weights: Tensor, bits: int) -> int:
    """Inverse CDF on integers: the index at which the running sum of the weights passes bits / 2^64 of their total."""
    running = weights.cumsum(0)
    return int(torch.searchsorted(running, bits * int(running[-1]) >> 64, right=True))


def kept_tokens(x: Tensor, weights: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The ids that truncation keeps, in order: larger logit first, lower index first among equals."""
    order = torch.sort(x, descending=True, stable=True).indices
    order = order[: int((x > -math.inf).sum())]
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1:
        running = weights[order].cumsum(0)
        total = int(running[-1])
        target = max(int(max(top_p, 0.0) * total) - (total >> 22), 1)
        order = order[: int(torch.searchsorted(running, target)) + 1]
    if min_p > 0:
        ratio = torch.exp((x[order].double() - x[order[0]].double()).nan_to_num(0.0) / temperature)
        order = order[ratio >= min(min_p, 1.0) * (1 - 2.0**-22)]
    return order


def penalised(x: Tensor, state: SampleState, row: int) -> Tensor:
    x = x.clone()
    n, prompt = int(state.history_len[row]), int(state.prompt_len[row])
    history = state.history[row, :n].long()
    seen, completion = (h[(h >= 0) & (h < len(x))] for h in (history, history[prompt:]))
    seen = seen.unique()
    v = x[seen]
    x[seen] = torch.where(v < 0, v * state.repetition_penalty[row], v / state.repetition_penalty[row])
    ids, counts = completion.unique(return_counts=True)
    x[ids] -= state.frequency_penalty[row] * counts.to(x.dtype)
    x[ids] -= state.presence_penalty[row]
    if n - prompt < state.min_new_tokens[row]:
        ids = state.suppress[row].long()
        x[ids[(ids >= 0) & (ids < len(x))]] = -math.inf
    return x


def sample_one(logits: Tensor, state: SampleState, row: int) -> tuple[int, float, float, int, float]:
    """One row of logits [V] under record `row`."""
    x = penalised(logits, state, row)
    if x.isnan().any() or logits.isnan().any() or not (x > -math.inf).any():
        return 0, math.nan, math.nan, 0, math.nan
    temperature = float(state.temperature[row])
    if not temperature > 0:
        token, kept, truncated = int((x == x.max()).nonzero()[0]), 1, 0.0
    else:
        weights = fixed_weights(x, temperature)
        limits = (int(state.top_k[row]), float(state.top_p[row]), float(state.min_p[row]))
        order = kept_tokens(x, weights, temperature, *limits)
        mask = torch.zeros_like(weights)
        mask[order] = 1
        bits = random_bits(int(state.seed[row]), int(state.index[row]), int(state.position[row]))
        token, kept = draw(weights * mask, bits), len(order)
        chosen = x[order].double()
        scaled = (
            torch.where(chosen == math.inf, 0.0, -math.inf).double() if chosen[0] == math.inf else chosen / temperature
        )
        truncated = float(scaled.log_softmax(0)[order == token])
    wide = logits.double()
    if wide.max() == math.inf:
        wide = torch.where(wide == math.inf, 0.0, -math.inf).double()
    logprobs = wide.log_softmax(0)
    entropy = -torch.where(logprobs > -math.inf, logprobs.exp() * logprobs, 0.0).sum()
    return token, float(logprobs[token]), truncated, kept, float(entropy)


def reference(
    logits: Tensor, settings: Tensor, history: Tensor, suppress: Tensor, rows: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    state = SampleState(settings, history, suppress)
    which = range(len(logits)) if rows is None else rows.tolist()
    if max(which, default=-1) >= len(settings):
        raise _no_record(settings)
    found = [(0, 0.0, 0.0, 0, 0.0) if r < 0 else sample_one(logits[b], state, r) for b, r in enumerate(which)]
    columns = zip(*found, strict=True) if found else ((),) * 5
    outputs = _outputs(logits, entropy)
    for output, column in zip(outputs, columns, strict=True):
        if output.numel():
            wide = torch.float64 if output.is_floating_point() else output.dtype
            output.copy_(torch.tensor(column, dtype=wide, device="cpu"))
    raise_for(outputs[1], outputs[3])
    return outputs


# ----------------------------------------------------------------------------------------------------------- launchers


def _outputs(logits: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, device = logits.shape[0], logits.device
    return (
        torch.empty(n, dtype=torch.int64, device=device),
        torch.empty(n, dtype=logits.dtype, device=device),
        torch.empty(n, dtype=logits.dtype, device=device),
        torch.empty(n, dtype=torch.int32, device=device),
        torch.empty(n if entropy else 0, dtype=logits.dtype, device=device),
    )


def _no_record(settings: Tensor) -> IndexError:
    return IndexError(f"sample: state.rows names a record beyond the {settings.shape[0]} of the state")


def raise_for(logprob: Tensor, kept: Tensor) -> None:
    """Raises for rows that `sample` found without a distribution (LogitsError) or without a record (IndexError).

    On a GPU it waits for the results: call it where the tokens are read. On a CPU `sample` has called it already."""
    bad, lost = torch.stack((logprob.isnan(), kept < 0)).cpu()
    if lost.any():
        raise IndexError(f"sample: state.rows names a record beyond those of the state, in {int(lost.sum())} rows")
    if bad.any():
        raise LogitsError(bad.nonzero().flatten().tolist())


def cpu(
    logits: Tensor, settings: Tensor, history: Tensor, suppress: Tensor, rows: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = logits.shape[0]
    outputs = _outputs(logits, entropy)
    if n:
        x = logits if logits.stride(1) == 1 else logits.contiguous()
        status = _C.sample(*_fields(outputs, x, settings, history, suppress, rows, entropy))
        if status == _INDEX_OUT_OF_RANGE:
            raise _no_record(settings)
        if status == _NOT_A_NUMBER:  # without torch's ops: a step that is captured may end here
            raise LogitsError([row for row, value in enumerate(outputs[1].tolist()) if value != value])
    return outputs


def _fields(outputs, x, settings, history, suppress, rows, entropy) -> tuple:
    """The record (csrc/records/sample.h); x: logits with unit stride. The caller holds the tensors."""
    token, logprob, truncated, kept, spread = outputs
    return (
        token.data_ptr(), logprob.data_ptr(), truncated.data_ptr(), spread.data_ptr() if entropy else 0,
        kept.data_ptr(), x.data_ptr(), settings.data_ptr(), pointer(rows), history.data_ptr(), suppress.data_ptr(),
        x.shape[0], x.shape[1], x.stride(0), settings.shape[0], history.shape[1], suppress.shape[1],
    )  # fmt: skip


def gpu(
    logits: Tensor, settings: Tensor, history: Tensor, suppress: Tensor, rows: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Does not wait for the device, so it raises nothing: see `raise_for`."""
    outputs = _outputs(logits, entropy)
    if logits.shape[0]:
        _sample_gpu.launch(outputs, logits, settings, history, suppress, rows)
    return outputs


# Of 256 rows CUDA C++ takes .57 of Triton's time at V = 32,000, 1.4 times it at 128,256.
MANY_ROWS, LONG_ROW = 128, 1 << 16


def cuda(
    logits: Tensor, settings: Tensor, history: Tensor, suppress: Tensor, rows: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """csrc/cuda/sample.cu; like `gpu` it raises nothing. Many long rows are Triton's."""
    if logits.shape[0] >= MANY_ROWS and logits.shape[1] >= LONG_ROW:
        return gpu(logits, settings, history, suppress, rows, entropy)
    outputs = _outputs(logits, entropy)
    if logits.shape[0]:
        x = logits if logits.stride(1) == 1 else logits.contiguous()
        penalties = history.shape[1] + suppress.shape[1] > 0  # then a count and a logit for each that may be changed
        scratch = torch.empty(2, *x.shape, dtype=torch.int32, device=x.device) if penalties else None
        _cuda.launch("sample", _fields(outputs, x, settings, history, suppress, rows, entropy), scratch, x.device)
    return outputs


# -------------------------------------------------------------------------------------------------------- registration

forward = Op(
    "sample(Tensor logits, Tensor settings, Tensor history, Tensor suppress, Tensor? rows, bool entropy)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=lambda logits, settings, history, suppress, rows, entropy: _outputs(logits, entropy),
    cpu=cpu,
    triton=gpu,
    cuda=cuda,
    cuda_name=f"CUDA C++ (but for {MANY_ROWS} rows of {LONG_ROW} and more: Triton)",
)


def check_logits(op: str, logits: Tensor) -> None:
    if logits.dtype != torch.float32:
        check_dtype(op, "logits", logits, (torch.float32,))
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_VOCAB:
        raise ValueError(f"{op}: logits {tuple(logits.shape)} must be [B, V] with 1 <= V <= {MAX_VOCAB}")


def check_rows(op: str, state: SampleState, rows: Tensor) -> None:
    """The state fits the rows of logits or tokens; what it is made of was checked when it was made."""
    used = state.settings if state.rows is None else state.rows
    if used.shape[0] != rows.shape[0]:
        mine = "records in the state; set state.rows" if state.rows is None else "in state.rows"
        raise ValueError(f"{op}: {rows.shape[0]} rows, but {used.shape[0]} {mine}")
    if used.device != rows.device:
        raise ValueError(f"{op}: the state is on {used.device}, the rows are on {rows.device}")


def sample(logits: Tensor, state: SampleState, entropy: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draws a token for every row of logits [B, V]: token, logprob, truncated_logprob, kept, entropy, each [B].

    entropy=False leaves the entropy out (its result is empty). Nothing is changed: move the state on with ops.advance.
    Raises LogitsError for rows without a distribution. See the head of this file for the meaning of every result.
    """
    check_logits("sample", logits)
    check_rows("sample", state, logits)
    if logits.requires_grad:
        logits = logits.detach()
    return forward(logits, state.settings, state.history, state.suppress, state.rows, entropy)
