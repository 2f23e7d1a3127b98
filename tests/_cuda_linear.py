"""linear of few rows in CUDA C++ against its formula in float64: on a GPU, or on this processor with the library that
tests/cuda_host makes of the same source, which FASTLLM_CUDA_HOST names. tests/test_cuda.py runs this file."""

import pytest
import torch
from _cuda_host import DEVICE, HOST, order, pose

from fastllm.ops._op import OPS
from fastllm.ops.linear import CUDA_ROWS, cuda_refusal

SEEDS = (0, 1, 3) if HOST else (0, 0)  # threads take turns in another order with each
DTYPES, EPS = [torch.bfloat16, torch.float16], 1e-3

pose()


def draw(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed + shape[0])
    return (torch.randn(*shape, generator=make) * scale).to(dtype).to(DEVICE)


def formula(x, weight, bias=None, residual=None, swiglu=False, norm=None) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    if norm is not None:
        x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * norm.double()).to(norm.dtype).double()
    y = x @ weight.t()
    if bias is not None:
        y = y + bias.double()
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = torch.nn.functional.silu(gate) * up
    return y if residual is None else y + residual.double()


def check(x, weight, bias=None, residual=None, swiglu=False, wide=False, norm=None) -> torch.Tensor:
    """Rounded once, so within half a step of float64 and what float32 sums lose; the same bits whatever ran first. Of a norm an
    element in some thousands is rounded the other way."""
    assert cuda_refusal(x, weight, bias, norm, swiglu) is None
    exact, out = formula(x, weight, bias, residual, swiglu, norm), None
    for seed in SEEDS:
        order(seed)
        again = OPS["linear"].cuda(x, weight, bias, norm, EPS, residual, swiglu, wide)
        assert out is None or torch.equal(again, out)
        out = again
    assert out.dtype == (torch.float32 if wide else x.dtype) and out.shape == exact.shape
    if norm is not None:
        x = formula(x, torch.eye(x.shape[1], device=DEVICE), norm=norm)
    lost = (x.double().abs() @ weight.double().abs().t()).max() * 2e-6  # of a float32 sum
    if norm is not None:
        lost = lost + x.abs().max() * weight.double().abs().max() * torch.finfo(weight.dtype).eps
    step = 0 if wide else torch.finfo(x.dtype).eps / 2 * 1.01
    assert ((out.double() - exact).abs() <= exact.abs() * step + lost * 4).all()
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "depth", "cols"),
    [
        (1, 8, 1), (1, 32, 16), (1, 64, 17), (2, 40, 15), (3, 264, 33), (7, 520, 40), (8, 2048, 16), (9, 96, 31), (16, 72, 48),
        (1, 2400, 20), (5, 4104, 18), (16, 2056, 9),
    ],
)  # fmt: skip
def test_rows_columns_and_depths(rows, depth, cols, dtype):
    check(draw(rows, depth, dtype=dtype), draw(cols, depth, seed=1, scale=depth**-0.5, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(1, 7), (3, 24), (16, 33)])
def test_fused(rows, cols, wide, dtype):
    x, weight = draw(rows, 328, dtype=dtype), draw(2 * cols, 328, seed=1, scale=0.06, dtype=dtype)
    bias, residual = draw(2 * cols, seed=2, dtype=dtype), draw(rows, cols, seed=3, dtype=dtype)
    check(x, weight, bias, wide=wide)
    check(x, weight[:cols], bias[:cols], residual, wide=wide)
    check(x, weight, swiglu=True, wide=wide)
    check(x, weight, residual=residual, swiglu=True, wide=wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "depth", "cols"), [(1, 8, 3), (2, 264, 17), (9, 2056, 20), (16, 328, 33)])
def test_norm(rows, depth, cols, dtype):
    x, weight = draw(rows, depth, scale=3, dtype=dtype), draw(2 * cols, depth, seed=1, scale=depth**-0.5, dtype=dtype)
    x[0] *= 0.01  # eps counts
    norm, residual = draw(depth, seed=5, dtype=dtype), draw(rows, cols, seed=3, dtype=dtype)
    check(x, weight, norm=norm)
    check(x, weight[:cols], residual=residual, norm=norm, wide=True)
    check(x, weight, swiglu=True, norm=norm)


@pytest.mark.parametrize("normed", [False, True])
def test_a_row_has_the_same_bits_alone(normed):
    x, weight = draw(CUDA_ROWS, 1096), draw(50, 1096, seed=1, scale=0.03)
    norm = draw(1096, seed=2) if normed else None
    whole = check(x, weight, norm=norm)
    for rows in (slice(0, 1), slice(3, 4), slice(7, 12), slice(15, 16), slice(2, 10)):
        assert torch.equal(check(x[rows], weight, norm=norm), whole[rows])


def test_strides_and_more_dimensions():
    wide = draw(9, 3 * 128)
    x, weight = wide[1:6, 128:256], draw(40, 512, seed=1)[::2, 256:384]
    expected = check(x, weight, residual=draw(5, 60, seed=4)[:, 7:27])
    assert expected.shape == (5, 20)
    order(0)
    shaped = OPS["linear"].cuda(draw(2, 3, 64), draw(10, 64, seed=1), None, None, 0.0, None, False, False)
    assert torch.equal(shaped.flatten(0, 1), check(draw(2, 3, 64).flatten(0, 1), draw(10, 64, seed=1)))


def test_a_nan_and_an_infinity_stay_in_their_rows():
    x, weight = draw(9, 80), draw(24, 80, seed=1)
    plain = check(x, weight)
    x[2, 17], x[8, 3] = float("nan"), float("inf")
    order(1)
    out = OPS["linear"].cuda(x, weight, None, None, 0.0, None, False, False)
    assert out[2].isnan().all() and not out[8].isfinite().any()
    kept = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(out[kept], plain[kept])


@pytest.mark.parametrize(
    ("x", "weight", "bias", "swiglu", "reason"),
    [
        (torch.zeros(1, 8), torch.zeros(4, 8), None, False, "float32"),
        (torch.zeros(17, 8).half(), torch.zeros(4, 8).half(), None, False, "17 rows: 1 to 16"),
        (torch.zeros(0, 8).half(), torch.zeros(4, 8).half(), None, False, "0 rows: 1 to 16"),
        (torch.zeros(1, 12).half(), torch.zeros(4, 12).half(), None, False, "no multiples of 8"),
        (torch.zeros(2, 0).half(), torch.zeros(4, 0).half(), None, False, "no multiples of 8"),
        (torch.zeros(1, 8).half(), torch.zeros(8, 8).half().t(), None, False, "no multiples of 8"),
        (torch.zeros(1, 16).half()[:, 4:12], torch.zeros(4, 8).half(), None, False, "multiples of 16 bytes"),
        (torch.zeros(1, 8).half(), torch.zeros(4, 8).half(), torch.zeros(4).half(), True, "a bias of gate and up"),
    ],
)  # fmt: skip
def test_what_it_leaves_to_cublas(x, weight, bias, swiglu, reason):
    assert reason in cuda_refusal(x, weight, bias, None, swiglu)
