"""Numbers of E4M3 (4 bits of exponent, 3 of mantissa, largest 448, no infinity) in Triton, by integers: its own casts want
a GPU of compute capability 8.9."""

from ._triton import tl, triton


@triton.jit
def encode(x):
    """float32 -> uint8: to nearest, ties to even; beyond 448: 448. No NaN."""
    size = tl.minimum(tl.abs(x), 448.0)
    u = size.to(tl.int32, bitcast=True)
    normal = ((u + ((u >> 20) & 1) + 0x7FFFF) >> 20) - (120 << 3)
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # 16384, of which a unit is 2^-9, the least
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (sign | tl.where(size < 0.015625, subnormal, normal)).to(tl.uint8)


@triton.jit
def decode(bits):
    """uint8 -> the number / 256 as float16, whose exponents are biased by 8 more; a NaN reads as 480 / 256."""
    bits = bits.to(tl.int16)
    return (((bits & 0x7F) << 7) | ((bits >> 7) << 15)).to(tl.float16, bitcast=True)
