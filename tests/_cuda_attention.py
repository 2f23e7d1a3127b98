"""attention in CUDA C++ (WGMMA, TMA) against its formula in float64: on a GPU, or on this processor with the library that
tests/cuda_host makes of the same sources, which FASTLLM_CUDA_HOST names. tests/test_cuda.py runs this file."""

import ctypes
import os

import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.cases.attention import plain
from fastllm.ops import AttentionSpec, _cuda
from fastllm.ops._op import OPS
from fastllm.ops.attention import hopper
from fastllm.ops.attention.reference import reference

HOST = os.environ.get("FASTLLM_CUDA_HOST")
DEVICE = "cpu" if HOST else "cuda"
SEEDS = (0, 1, 2, 3) if HOST else (0, 0)  # when copies and products run: at once, or as late as they may

if HOST:
    _C.load_cuda(HOST)
    host = ctypes.CDLL(HOST)
    host.cuda_host_device(9, 227 << 10)
else:
    assert _cuda.library()[0], _cuda.library()[1]
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a kernel of sm_90a alone", allow_module_level=True)


def draw(batch, queries, keys, heads, kv_heads, dim, dtype, seed=0):
    make = torch.Generator().manual_seed(seed)
    shapes = ((batch, queries, heads, dim), *2 * ((batch, keys, kv_heads, dim),))
    return [torch.randn(s, generator=make).to(dtype).to(DEVICE) for s in shapes]


def run(q, k, v, spec, seed=0, multiprocessors=132):
    if HOST:
        host.cuda_host_seed(ctypes.c_uint64(seed))
        host.cuda_host_multiprocessors(multiprocessors)
    assert hopper.refusal(q, k, v, None, None, None, None, spec.settings(q.shape[3])) is None
    return hopper.cuda(q, k, v, *(None,) * 5, *spec.settings(q.shape[3]), train=True)


def error(x, wanted) -> float:
    return float((x.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def check(q, k, v, spec, **options):
    """No further from float64 than twice torch's own, with the same bits whatever ran first."""
    wide = [t.double() for t in (q, k, v)]
    wanted = plain(*wide, spec)
    out, lse = run(q, k, v, spec, SEEDS[0], **options)
    assert error(out, wanted) <= 2 * max(error(plain(q, k, v, spec), wanted), 1e-3)
    seen = wanted.abs().amax(-1).transpose(1, 2) > 0
    _, log = reference(*wide, *(None,) * 5, *spec.settings(q.shape[3]))
    assert torch.equal(lse == -torch.inf, ~seen)
    assert (lse[seen].double() - log[seen].double()).abs().max() < 1e-4 if seen.any() else not out.any()
    for seed in SEEDS[1:]:
        again, lse_again = run(q, k, v, spec, seed, **options)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)


CAUSAL, FULL = AttentionSpec(), AttentionSpec(causal=False)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@DTYPES
@pytest.mark.parametrize("dim", hopper.DIMS)
@pytest.mark.parametrize(
    ("sizes", "spec"),
    [
        ((1, 128, 128, 1, 1), CAUSAL),
        ((1, 1, 1, 1, 1), CAUSAL),
        ((2, 200, 200, 4, 2), CAUSAL),
        ((1, 450, 450, 2, 1), CAUSAL),
        ((1, 90, 400, 2, 2), CAUSAL),
        ((1, 300, 140, 1, 1), CAUSAL),  # rows that see no key
        ((2, 130, 375, 2, 1), FULL),
        ((1, 64, 700, 1, 1), FULL),
        ((1, 130, 256, 1, 1), CAUSAL),  # the last key of a tile is hidden from one row
        ((1, 70, 255, 1, 1), FULL),  # a tile without its last key
        ((1, 70, 351, 1, 1), FULL),
        ((1, 400, 400, 1, 1), AttentionSpec(window=255)),  # and without its first
        ((1, 260, 300, 1, 1), AttentionSpec(causal=False, window=70)),
        ((1, 150, 150, 1, 1), AttentionSpec(scale=3.0)),
    ],
    ids=str,
)
def test_attention(sizes, spec, dim, dtype):
    check(*draw(*sizes, dim, dtype), spec)


@pytest.mark.parametrize("dim", hopper.DIMS)
@pytest.mark.parametrize("spec", [CAUSAL, FULL], ids=["causal", "full"])
@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_blocks_that_stay(spec, dim, multiprocessors):
    """More work than blocks: rings, phases and turns go on from one piece to the next, with pieces that see nothing between."""
    check(*draw(2, 300, 260, 4, 2, dim, torch.bfloat16), spec, multiprocessors=multiprocessors)


@pytest.mark.parametrize("dim", hopper.DIMS)
def test_heads_in_sections(dim):
    """More keys and values than the L2 cache holds: some heads come after the others."""
    check(*draw(1, 130, 4000, 36, 36, dim, torch.bfloat16), AttentionSpec(window=64))


def test_strides():
    """Views of one tensor, heads before tokens, a gap between rows."""
    make = torch.Generator().manual_seed(1)
    qkv = torch.randn(2, 150, 6, 64, generator=make).bfloat16().to(DEVICE)
    check(qkv[:, :, :4], qkv[:, :, 4:5], qkv[:, :, 5:], CAUSAL)
    check(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in draw(2, 70, 200, 2, 2, 128, torch.float16)), CAUSAL)


@pytest.mark.parametrize("dim", hopper.DIMS)
def test_odd_numbers(dim):
    """A NaN or an infinite score makes its row NaN; a row whose scores are all -inf is zeros; large scores stay finite."""
    q, k, v = draw(1, 200, 200, 1, 1, dim, torch.bfloat16)
    q[0, 7, 0, 3], q[0, 150] = float("nan"), q[0, 150] * 1e4
    out, lse = run(q, k, v, CAUSAL)
    assert out[0, 7].isnan().all() and lse[0, 0, 7].isnan()
    rest = torch.arange(200) != 7
    assert out[0, rest].isfinite().all() and lse[0, 0, rest].isfinite().all()
    q, k, v = draw(1, 100, 160, 1, 1, dim, torch.bfloat16)
    q[0, :, 0], k[0, :, 0, 0] = q[0, :, 0].abs(), -float("inf")
    q[0, 5, 0, 0] = -q[0, 5, 0, 0]
    out, lse = run(q, k, v, FULL)
    assert not out[0, torch.arange(100) != 5].any() and (lse[0, 0, :5] == -torch.inf).all() and out[0, 5].isnan().all()


def test_the_op_runs_it_and_leaves_the_rest():
    """Through the op, whose kernel it is for a while; what it refuses goes on to Triton."""
    q, k, v = draw(1, 140, 140, 2, 1, 64, torch.bfloat16)
    op, kind = OPS["attention"], "cpu" if HOST else "cuda"
    kernel = op.gpu_kernel(True, "of a test")
    with op.using(kind, kernel):
        assert torch.equal(ops.attention(q, k, v), run(q, k, v, CAUSAL)[0])
    if HOST:
        return
    k.requires_grad_()
    with op.using(kind, kernel):
        ops.attention(q, k, v).float().sum().backward()
        ops.attention(q, k, v, AttentionSpec(softcap=5.0))
    assert k.grad.isfinite().all()
