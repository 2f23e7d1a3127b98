"""The Triton kernels of `sample`. Its meaning and arithmetic are in sample.py; here is how a GPU gets there.

A row is read twice. First for its maxima: the largest logit, and the largest of each of 4096 groups. The k-th largest
group maximum bounds the k-th largest logit, so the second pass, which sums the weights, puts all logits above the
bound on a list of some k candidates. One program then decides on the list: a truncation is a cut in the order "larger
first, lower index first", which is one 64-bit integer a logit, and cuts and draws are found by comparing all pairs of
candidates. No sort. Where the list does not hold the answer (a wide nucleus, a large k, a flat row), the search halves
the range of the order by passes over the row until what is left fits on the list; no answer depends on the way.

With rows for every multiprocessor one program takes a row, in one launch. Few rows are split over several programs
each, in two launches (the maximum must be known before the first weight, and programs of one launch cannot wait for
each other), and the last program to arrive decides.
"""

import torch

from ._logits import (
    BLOCK,
    LIST,
    OPTIONS,
    any_nan,
    bound_of_best,
    collect,
    exponent,
    exponential,
    finite_top,
    fixed,
    key,
    load_list,
    log_probability,
    log_weight,
    maxima,
    order,
    sum_ahead,
    total,
    value,
    weight,
)
from ._sample_penalties import changes, penalise, settings_of
from ._triton import programs, tl, triton

_GROUPS = tl.constexpr(BLOCK)
_SPLITS = 16
_WANTED = tl.constexpr(64)  # candidates to look for where no top_k says how many
# int32 words of scratch a row, after its group maxima: the list and how long it is, programs that arrived
_KEYS = tl.constexpr(BLOCK)
_INDEX = tl.constexpr(BLOCK + LIST)
_COUNT = tl.constexpr(BLOCK + 2 * LIST)
_ARRIVED = tl.constexpr(BLOCK + 2 * LIST + 1)
_WORDS = BLOCK + 2 * LIST + 8
_PARTS = tl.constexpr(6)  # int64 a program: sum, moment, tempered sum, finite logits; largest raw key, NaN
_LOWEST = tl.constexpr(-0x7F7FFFFF)  # key of the least finite float
_LARGEST = tl.constexpr(3.4028234663852886e38)
_STEP = tl.constexpr(2048)  # logits that are weighed at a time, and in a search
_PASS = tl.constexpr(1024)


@triton.jit
def _scan(
    words, parts, raw, x, counts, settings, history, suppress, which, room, suppressed, split, begin, end,
    PENALTIES: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The first pass over [begin, end): penalties, maxima. Leaves group maxima in words, the rest in parts."""
    top = maxima(raw, begin, end, BLOCK)
    nan = any_nan(top)
    raw_top = tl.max(key(tl.where(top != top, float("-inf"), top)), 0)
    if PENALTIES:
        _s, f, i = settings_of(settings, which)
        if changes(f, i, suppressed):
            penalise(
                x, counts, raw, f, i, history + which * room, suppress + which * suppressed, room, suppressed,
                begin, end, BLOCK,
            )  # fmt: skip
            top = maxima(x, begin, end, BLOCK)
            nan = nan | any_nan(top)
    group = key(tl.where(top != top, float("-inf"), top))
    if SPLITS > 1:
        group = tl.max(tl.reshape(group, [SPLITS, GROUPS // SPLITS]), 0)
    tl.store(words + split * (GROUPS // SPLITS) + tl.arange(0, GROUPS // SPLITS), group)
    tl.store(parts + 4, raw_top.to(tl.int64))
    tl.store(parts + 5, nan.to(tl.int64))
    if split == 0:
        tl.store(words + _COUNT, 0)
        tl.store(words + _ARRIVED, 0)


@triton.jit
def _random_bits(s):
    """64 bits of Philox: counter (position, index), key seed; words 0 and 1."""
    seed, index, position = tl.load(s), tl.load(s + 1), tl.load(s + 2)
    low, high, _, _ = tl.philox(
        seed, position.to(tl.uint32), (position >> 32).to(tl.uint32), index.to(tl.uint32), (index >> 32).to(tl.uint32)
    )
    return high.to(tl.uint64) << 32 | low.to(tl.uint64)


@triton.jit
def _weigh(
    words, parts, raw, x, changed, raw_top, top, scale, bound, tempered, begin, end,
    PENALTIES: tl.constexpr, ENTROPY: tl.constexpr, PASS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """The second pass over [begin, end): sums of weights, and the list of logits that reach the bound."""
    none = tl.zeros([PASS], tl.int32)
    nothing = (begin * 0).to(tl.int64)
    sum, moment, tempered_sum, finite = nothing, nothing, nothing, begin * 0
    for first in range(begin, end, 1 << 21):  # lanes of 32 bits hold the sum of as many
        last = tl.minimum(first + (1 << 21), end)
        high, low, moment_high, moment_low = none, none, none, none
        tempered_high, tempered_low, count = none, none, none
        at = first + tl.arange(0, PASS)
        ahead = tl.load(raw + at, mask=at < last, other=float("-inf"))
        for _start in range(first, last, PASS):
            v = ahead  # the next block is on its way while this one is weighed
            ahead = tl.load(raw + at + PASS, mask=at + PASS < last, other=float("-inf"))
            z = exponent(v, raw_top, 1.0)
            e = exponential(z)
            a, b = fixed(e)
            high += a
            low += b
            if ENTROPY:
                a, b = fixed(e * (0.0 - z))
                moment_high += a
                moment_low += b
            if PENALTIES:  # noqa: SIM102  (known when it is compiled, the other is not)
                if changed:
                    v = tl.load(x + at, mask=at < last, other=float("-inf"))
            if tempered:
                a, b = fixed(exponential(exponent(v, top, scale)))
                tempered_high += a
                tempered_low += b
            count += (v >= -_LARGEST).to(tl.int32)
            collect(v, at, v >= bound, words + _KEYS, words + _INDEX, words + _COUNT, LIST)
            at += PASS
        sum += total(high, low)
        moment += total(moment_high, moment_low)
        tempered_sum += total(tempered_high, tempered_low)
        finite += tl.sum(count, 0)
    tl.store(parts, sum)
    tl.store(parts + 1, moment)
    tl.store(parts + 2, tl.where(tempered, tempered_sum, sum))
    tl.store(parts + 3, finite.to(tl.int64))


@triton.jit
def _kept_weights(x, start, vocab, top, scale, cut, least, PASS: tl.constexpr):
    """(weight, order, kept) of a block of logits; kept: from the cut up, and 2^20 exp at or above `least`."""
    at = start + tl.arange(0, PASS)
    v = tl.load(x + at, mask=at < vocab, other=float("-inf"))
    w, e = weight(v, top, scale)
    o = order(key(v), at)
    return w, o, (o >= cut) & (e >= least) & (v >= -_LARGEST)


@triton.jit
def _list_weights(words, count, top, scale, cut, least, LIST: tl.constexpr):
    """The same of the list. It is loaded where it is used: kept in registers it would fill them."""
    keys, orders, exist = load_list(words + _KEYS, words + _INDEX, tl.minimum(count, LIST), LIST)
    w, e = weight(value(keys), top, scale)
    return w, orders, exist & (orders >= cut) & (e >= least)


@triton.jit
def _rebuild_list(
    words, x, vocab, most, top, scale, weighted, target, cut, finite, PASS: tl.constexpr, LIST: tl.constexpr
):
    """A list of the few logits around the place in the order where the running sum reaches the target.

    Returns how many, and the sum before them. Keeps lo < place <= hi, in orders of logits, and cuts the range in four:
    by powers of four below the largest until the place is enclosed, then evenly in value, then (for scales that lie
    far apart, and for ties) evenly in the order itself, which must end.
    """
    lo, hi = cut - 1, key(most).to(tl.int64) << 24
    before, step, enclosed = tl.zeros_like(lo), tl.full((), 0, tl.int32), False
    above_lo, above_hi = finite.to(tl.int32), finite.to(tl.int32) * 0  # how many; at first no less than that
    while (above_lo - above_hi > LIST) & (hi - lo > 1):
        low, high = value((-(-lo >> 24)).to(tl.int32)), value((-(-hi >> 24)).to(tl.int32))
        if step < 8:
            if enclosed:
                t1, t2, t3 = low + (high - low) * 0.25, low + (high - low) * 0.5, low + (high - low) * 0.75
            else:
                width = tl.exp2((6 * step).to(tl.float32))
                t1, t2, t3 = top - 16.0 * width, top - 4.0 * width, top - width
            c1 = key(t1).to(tl.int64) << 24
            c2, c3 = key(t2).to(tl.int64) << 24, key(t3).to(tl.int64) << 24
        else:
            quarter = (hi - lo) // 4
            c1, c2, c3 = lo + quarter, lo + (hi - lo) // 2, hi - quarter
        c1 = tl.minimum(tl.maximum(c1, lo + 1), hi - 1)
        c2 = tl.minimum(tl.maximum(c2, c1), hi - 1)
        c3 = tl.minimum(tl.maximum(c3, c2), hi - 1)
        zero = tl.zeros([PASS], tl.int32)
        s1, s2, s3 = zero.to(tl.int64), zero.to(tl.int64), zero.to(tl.int64)
        n1, n2, n3 = zero, zero, zero
        at = tl.arange(0, PASS)
        ahead = tl.load(x + at, mask=at < vocab, other=float("-inf"))
        for _start in range(0, vocab, PASS):
            v = ahead
            ahead = tl.load(x + at + PASS, mask=at + PASS < vocab, other=float("-inf"))
            o = order(key(v), at)
            w = tl.full([PASS], 1, tl.int64)
            if weighted:
                w, _ = weight(v, top, scale)
            s1 += tl.where(o > c1, w, 0)
            s2 += tl.where(o > c2, w, 0)
            s3 += tl.where(o > c3, w, 0)
            n1 += (o > c1).to(tl.int32)
            n2 += (o > c2).to(tl.int32)
            n3 += (o > c3).to(tl.int32)
            at += PASS
        a1, a2, a3 = tl.sum(s1, 0), tl.sum(s2, 0), tl.sum(s3, 0)
        m1, m2, m3 = tl.sum(n1, 0), tl.sum(n2, 0), tl.sum(n3, 0)
        in4, in3, in2 = a3 >= target, a2 >= target, a1 >= target  # the quarter that holds the place, from above
        lo = tl.where(in4, c3, tl.where(in3, c2, tl.where(in2, c1, lo)))
        above_lo = tl.where(in4, m3, tl.where(in3, m2, tl.where(in2, m1, above_lo)))
        hi = tl.where(in4, hi, tl.where(in3, c3, tl.where(in2, c2, c1)))
        above_hi = tl.where(in4, above_hi, tl.where(in3, m3, tl.where(in2, m2, m1)))
        before = tl.where(in4, before, tl.where(in3, a3, tl.where(in2, a2, a1)))
        enclosed = enclosed | in2
        step += 1
    tl.debug_barrier()
    tl.store(words + _COUNT, 0)
    tl.debug_barrier()
    for start in range(0, vocab, PASS):
        at = start + tl.arange(0, PASS)
        v = tl.load(x + at, mask=at < vocab, other=float("-inf"))
        o = order(key(v), at)
        collect(v, at, (o > lo) & (o <= hi), words + _KEYS, words + _INDEX, words + _COUNT, LIST)
    tl.debug_barrier()
    return tl.load(words + _COUNT), before


@triton.jit
def _decide(
    words, parts, x, s, f, i, chunk, vocab, most, top, scale, bound, top_k, top_p, min_p, all_on, tempered_known,
    SPLITS: tl.constexpr, PASS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Truncation and draw: token, size of the kept set, its sum. For a temperature above 0."""
    p = tl.arange(0, SPLITS) * _PARTS
    finite = tl.sum(tl.load(parts + p + 3), 0)
    tempered = tl.sum(tl.load(parts + p + 2), 0)
    count = tl.load(words + _COUNT)
    has_k = (top_k > 0) & (top_k < finite)
    has_p, has_min = top_p < 1.0, min_p > 0.0
    least = tl.where(has_min, tl.minimum(min_p, 1.0) * 1048576.0 * 0.99999976158142090, 0.0)  # less 2^-22 of it
    complete = count <= LIST  # the list holds all that reaches the bound
    listed = complete & (bound == -_LARGEST)  # the kept set lies on the list
    uncut = (tl.full((), _LOWEST, tl.int64) << 24) - 0x800000  # below every finite logit
    cut = uncut
    kept_sum, kept = tempered, finite
    for stage in range(3):  # top-k, top-p, min-p
        weighted = stage == 1
        if ((stage == 0) & has_k) | (weighted & has_p) | (stage == 2):
            floor = tl.where(stage == 2, least, 0.0)
            if stage == 2:
                outside = tl.max(weight_below(bound, top, scale, LIST), 0)
                listed = listed | (complete & has_min & (cut == uncut) & (outside < least))
            if stage > 0:
                if listed:
                    w, _, mine = _list_weights(words, count, top, scale, cut, floor, LIST)
                    kept_sum = tl.sum(tl.where(mine, w, 0), 0)
                    kept = tl.sum(mine.to(tl.int64), 0)
                else:
                    if tempered_known & (cut == uncut) & (floor == 0.0):
                        kept_sum, kept = tempered, finite
                    else:
                        sums, counts = tl.zeros([PASS], tl.int64), tl.zeros([PASS], tl.int64)
                        for start in range(0, vocab, PASS):
                            wb, _, mine = _kept_weights(x, start, vocab, top, scale, cut, floor, PASS)
                            sums += tl.where(mine, wb, 0)
                            counts += mine.to(tl.int64)
                        kept_sum, kept = tl.sum(sums, 0), tl.sum(counts, 0)
            if stage < 2:
                target = top_k.to(tl.int64)
                if weighted:
                    part = (tl.maximum(top_p, 0.0).to(tl.float64) * kept_sum.to(tl.float64)).to(tl.int64)
                    slack = kept_sum >> 22
                    target = tl.where(part > slack + 1, part - slack, 1)
                w, _, mine = _list_weights(words, count, top, scale, cut, 0.0, LIST)
                before = tl.zeros_like(target)
                listed = complete & (tl.sum(tl.where(mine, tl.where(weighted, w, 1), 0), 0) >= target)
                if not listed:
                    count, before = _rebuild_list(
                        words, x, vocab, most, top, scale, weighted, target, cut, finite, PASS, LIST
                    )
                    complete = False
                w, orders, mine = _list_weights(words, count, top, scale, cut, 0.0, LIST)
                units = tl.where(mine, tl.where(weighted, w, 1), 0)
                ahead = before + sum_ahead(orders, units)
                last = (units > 0) & (ahead < target) & (ahead + units >= target)
                cut = tl.max(tl.where(last, orders, cut), 0)

    left = tl.umulhi(_random_bits(s), kept_sum.to(tl.uint64)).to(tl.int64)
    token = vocab - 1
    if listed:
        w, orders, mine = _list_weights(words, count, top, scale, cut, least, LIST)
        index = -orders & 0xFFFFFF
        units = tl.where(mine, w, 0)
        running = sum_ahead(-index, units)  # of those with a lower index
        token = tl.min(tl.where((running <= left) & (left < running + units), index, vocab), 0).to(tl.int32)
    else:
        start = -PASS
        if tempered_known & (cut == uncut) & (least == 0.0):
            split, here = 0, tl.load(parts + 2)
            while (left >= here) & (split < SPLITS - 1):
                left -= here
                split += 1
                here = tl.load(parts + split * _PARTS + 2)
            start = split * chunk - PASS
        block, here = tl.zeros([PASS], tl.int64), tl.zeros_like(left)
        while (left >= here) & (start + PASS < vocab):
            left -= here
            start += PASS
            wb, _, mine = _kept_weights(x, start, vocab, top, scale, cut, least, PASS)
            block = tl.where(mine, wb, 0)
            here = tl.sum(block, 0)
        passed = tl.cumsum(block, 0) > left
        token = tl.min(tl.where(passed, start + tl.arange(0, PASS), vocab - 1), 0)
    return token, kept, kept_sum


@triton.jit
def weight_below(bound, top, scale, LIST: tl.constexpr):
    """2^20 exp at the bound, which no logit outside the list exceeds (in every lane)."""
    return exponential(exponent(bound + tl.zeros([LIST], tl.float32), top, scale))


@triton.jit
def _first_of(x, vocab, most, PASS: tl.constexpr):
    """The lowest index of the largest logit."""
    start, found = 0, vocab
    while found == vocab:
        at = start + tl.arange(0, PASS)
        v = tl.load(x + at, mask=at < vocab, other=float("-inf"))
        found = tl.min(tl.where((v == most) & (at < vocab), at, vocab), 0)
        start += PASS
    return found


@triton.jit
def _draw(
    token, logprob, truncated, kept, entropy, words, row_parts, parts, raw, x, settings, which, suppressed,
    split, chunk, begin, end, vocab,
    PENALTIES: tl.constexpr, SPLITS: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, PASS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """From the maxima of the first pass to the token."""
    s, f, i = settings_of(settings, which)
    changed = False
    if PENALTIES:
        changed = changes(f, i, suppressed)
        if not changed:
            x = raw
    else:
        x = raw
    p = tl.arange(0, SPLITS) * _PARTS
    groups = value(tl.load(words + tl.arange(0, GROUPS)))
    most = tl.max(groups, 0)
    raw_most = value(tl.max(tl.load(row_parts + p + 4), 0).to(tl.int32))
    nan = tl.max(tl.load(row_parts + p + 5), 0) > 0
    if nan | (most < -_LARGEST):
        if split == 0:
            tl.store(token, 0)
            tl.store(logprob, float("nan"))
            tl.store(truncated, float("nan"))
            tl.store(kept, 0)
            if ENTROPY:
                tl.store(entropy, float("nan"))
    else:
        top, raw_top = finite_top(most), finite_top(raw_most)
        temperature, top_p, min_p, top_k = tl.load(f + 6), tl.load(f + 7), tl.load(f + 8), tl.load(i + 12)
        greedy = (temperature > 0.0) == False  # noqa: E712  (a NaN is greedy too)
        scale = tl.minimum(tl.div_rn(1.0, tl.where(greedy, 1.0, temperature)), _LARGEST)
        some_k, has_p, has_min = (top_k > 0) & (top_k < vocab), top_p < 1.0, min_p > 0.0
        all_on = (some_k | has_p | has_min) == False  # noqa: E712
        needed = (greedy == False) & (all_on | (has_p & (some_k == False)))  # noqa: E712
        tempered = needed & (changed | (scale != 1.0))
        bound = float("inf") + tl.zeros_like(most)  # no list
        if greedy:
            bound = most
        elif (top_k > 0) & (top_k <= _WANTED):
            bound = bound_of_best(groups, top_k, top)
        elif (some_k == False) & (has_p | has_min):  # noqa: E712
            bound = bound_of_best(groups, _WANTED, top)
        _weigh(
            words, parts, raw, x, changed, raw_top, top, scale, bound, tempered, begin, end,
            PENALTIES, ENTROPY, _STEP, LIST,
        )  # fmt: skip
        tl.debug_barrier()
        arrived = 0
        if SPLITS > 1:
            arrived = tl.atomic_add(words + _ARRIVED, 1)
            tl.debug_barrier()
        if arrived == SPLITS - 1:
            sum, moment = tl.sum(tl.load(row_parts + p), 0), tl.sum(tl.load(row_parts + p + 1), 0)
            picked, size, mass = 0, tl.full((), 1, tl.int64), sum
            if greedy:
                picked = _first_of(x, vocab, most, PASS)
            else:
                picked, size, mass = _decide(
                    words, row_parts, x, s, f, i, chunk, vocab, most, top, scale, bound, top_k, top_p, min_p,
                    all_on, needed | ((changed == False) & (scale == 1.0)), SPLITS, PASS, LIST,  # noqa: E712
                )  # fmt: skip
            tl.store(token, picked.to(tl.int64))
            tl.store(logprob, log_probability(tl.load(raw + picked), raw_most, sum, tl.full((), 1.0, tl.float32)))
            spread = log_probability(tl.load(x + picked), most, mass, tl.where(greedy, 1.0, temperature))
            tl.store(truncated, tl.where(greedy, 0.0, spread))
            tl.store(kept, size.to(tl.int32))
            if ENTROPY:
                nats = log_weight(sum) + moment.to(tl.float64) / sum.to(tl.float64)
                tl.store(entropy, nats.to(tl.float32))


@triton.jit(do_not_specialize=["vocab", "chunk", "logits_stride", "records", "room", "suppressed"])
def sample_kernel(
    token, logprob, truncated, kept, entropy, words, parts, adjusted, counts,
    logits, settings, rows, history, suppress, vocab, chunk, logits_stride, records, room, suppressed,
    ROWS: tl.constexpr, PENALTIES: tl.constexpr, ENTROPY: tl.constexpr, SPLITS: tl.constexpr,
    SCAN: tl.constexpr, DRAW: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Grid (rows, SPLITS). SCAN: the first pass; DRAW: the second, and the token; both in one launch without splits."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    which = row
    if ROWS:
        which = tl.load(rows + row).to(tl.int64)
    if (which >= 0) & (which < records):
        begin, end = split * chunk, tl.minimum((split + 1) * chunk, vocab)
        words += row * WORDS
        row_parts = parts + row * SPLITS * _PARTS
        mine = row_parts + split * _PARTS
        raw = logits + row * logits_stride
        x, c = raw, counts
        if PENALTIES:
            x, c = adjusted + row * vocab, counts + row * vocab
        if SCAN:
            _scan(
                words, mine, raw, x, c, settings, history, suppress, which, room, suppressed, split, begin, end,
                PENALTIES, SPLITS, BLOCK, BLOCK,
            )  # fmt: skip
            tl.debug_barrier()
        if DRAW:
            _draw(
                token + row, logprob + row, truncated + row, kept + row, entropy + row, words, row_parts, mine,
                raw, x, settings, which, suppressed, split, chunk, begin, end, vocab,
                PENALTIES, SPLITS, ENTROPY, BLOCK, BLOCK, _PASS, LIST,
            )  # fmt: skip
    elif DRAW:  # noqa: SIM102
        if split == 0:
            lost = which >= records
            tl.store(token + row, 0)
            tl.store(logprob + row, tl.where(lost, float("nan"), 0.0))
            tl.store(truncated + row, tl.where(lost, float("nan"), 0.0))
            tl.store(kept + row, tl.where(lost, -1, 0))
            if ENTROPY:
                tl.store(entropy + row, tl.where(lost, float("nan"), 0.0))


def splits(count: int, vocab: int, device: torch.device) -> int:
    """Programs a row: one, or 16 where the device has room for them, so that two sets of kernels serve all sizes."""
    return _SPLITS if count * _SPLITS <= max(programs(device), _SPLITS) and vocab >= _SPLITS * 2048 else 1


def launch(outputs, logits, settings, history, suppress, rows) -> None:
    """Fills the outputs of `sample` (of any number of rows above zero). Nothing waits for the device."""
    token, logprob, truncated, kept, entropy = outputs
    x = logits if logits.stride(1) == 1 else logits.contiguous()
    count, vocab, device = x.shape[0], x.shape[1], x.device
    n = splits(count, vocab, device)
    words = torch.empty(count, _WORDS, dtype=torch.int32, device=device)
    parts = torch.empty(count, n, 6, dtype=torch.int64, device=device)
    penalties = history.shape[1] + suppress.shape[1] > 0
    # The rows that have penalties are copied: which they are is known to the device alone.
    adjusted = torch.empty(count, vocab, dtype=torch.float32, device=device) if penalties else x
    counts = torch.empty(count, vocab, dtype=torch.int32, device=device) if penalties else words
    chunk = triton.cdiv(vocab, n)
    for scan, draw in ((True, False), (False, True)) if n > 1 else ((True, True),):
        sample_kernel[(count, n)](
            token, logprob, truncated, kept, entropy, words, parts, adjusted, counts,
            x, settings, token if rows is None else rows, history, suppress,
            vocab, chunk, x.stride(0), settings.shape[0], history.shape[1], suppress.shape[1],
            ROWS=rows is not None, PENALTIES=penalties, ENTROPY=entropy.numel() > 0, SPLITS=n,
            SCAN=scan, DRAW=draw, WORDS=_WORDS, BLOCK=BLOCK, LIST=LIST, **OPTIONS,
        )  # fmt: skip
