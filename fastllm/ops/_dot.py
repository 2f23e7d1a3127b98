"""A product of blocks, added to what there is: what Triton kernels that walk along a sum share."""

from ._triton import tl, triton


@triton.jit
def accumulate(acc, a, b):
    """acc + a b, float32. Of float32 the block's own sum is made first: one chain over thousands of terms would lose three
    more bits than torch does. (A plain sum Triton would take for one chain: it folds dot + acc into dot(acc).) Of 16 bits
    matrix units go on from acc."""
    if a.dtype == tl.float32:
        acc = tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, acc)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc
