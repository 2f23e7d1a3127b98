"""What a record of the sampler's state asks of the logits themselves, as Triton functions: see sample.py."""

from ._triton import tl, triton


@triton.jit
def settings_of(settings, which):
    """A record's floats and integers (csrc/records/sample.h: SampleRow)."""
    s = settings + which * 8
    return s, s.to(tl.pointer_type(tl.float32), bitcast=True), s.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def penalise(x, counts, raw, f, i, history, suppress, room, suppressed, begin, end, BLOCK: tl.constexpr):
    """x[begin:end] = the logits after penalties. Every distinct id once: who takes its count off applies it."""
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(x + at, tl.load(raw + at, mask=at < end), mask=at < end)
    repetition, presence, frequency = tl.load(f + 9), tl.load(f + 10), tl.load(f + 11)
    prompt_len, history_len, min_new = tl.load(i + 13), tl.load(i + 14), tl.load(i + 15)
    length = tl.minimum(history_len, room)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(history + at, mask=at < length, other=-1)
        tl.store(counts + ids, 0, mask=(ids >= begin) & (ids < end))
    tl.debug_barrier()
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(history + at, mask=(at < length) & (at >= prompt_len), other=-1)
        tl.atomic_add(counts + ids, 1, mask=(ids >= begin) & (ids < end), sem="relaxed")
    tl.debug_barrier()
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(history + at, mask=at < length, other=-1)
        count = tl.atomic_xchg(counts + ids, -1, mask=(ids >= begin) & (ids < end), sem="relaxed")
        mine = (ids >= begin) & (ids < end) & (count >= 0)
        v = tl.load(x + ids, mask=mine, other=0.0)
        v = tl.where(v < 0, v * repetition, tl.div_rn(v, repetition + tl.zeros_like(v)))
        v = tl.where(count > 0, v - frequency * count.to(tl.float32) - presence, v)
        tl.store(x + ids, v, mask=mine)
    tl.debug_barrier()
    if history_len - prompt_len < min_new:
        for start in range(0, suppressed, BLOCK):
            at = start + tl.arange(0, BLOCK)
            ids = tl.load(suppress + at, mask=at < suppressed, other=-1)
            tl.store(x + ids, float("-inf"), mask=(ids >= begin) & (ids < end))
    tl.debug_barrier()


@triton.jit
def changes(f, i, suppressed):
    """Whether a record's penalties change any logit."""
    history_len = tl.load(i + 14)
    penalised = (tl.load(f + 9) != 1.0) | (tl.load(f + 10) != 0.0) | (tl.load(f + 11) != 0.0)
    return (penalised & (history_len > 0)) | ((suppressed > 0) & (history_len - tl.load(i + 13) < tl.load(i + 15)))
