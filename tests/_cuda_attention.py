"""attention in CUDA C++ (WGMMA, TMA) against its formula in float64: on a GPU, or on this processor with the library that
tests/cuda_host makes of the same sources, which FASTLLM_CUDA_HOST names. tests/test_cuda.py runs this file."""

import pytest
import torch
from _cuda_host import DEVICE, HOST, order, pose

from fastllm import ops
from fastllm.bench.cases.attention import plain
from fastllm.ops import AttentionSpec
from fastllm.ops._op import OPS
from fastllm.ops.attention import hopper
from fastllm.ops.attention.reference import reference

SEEDS = (0, 1, 2, 3) if HOST else (0, 0)  # when copies and products run: at once, or as late as they may

pose()
if not HOST and torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("a kernel of sm_90a alone", allow_module_level=True)


def draw(batch, queries, keys, heads, kv_heads, dim, dtype, seed=0):
    make = torch.Generator().manual_seed(seed)
    shapes = ((batch, queries, heads, dim), *2 * ((batch, keys, kv_heads, dim),))
    return [torch.randn(s, generator=make).to(dtype).to(DEVICE) for s in shapes]


def run(q, k, v, spec, seed=0, multiprocessors=132):
    order(seed, multiprocessors)
    settings = spec.settings(q.shape[3])
    assert hopper.refusal(q, k, v, None, None, None, None, settings) is None
    return hopper.forward(q, k, v, settings, train=True)


def run_backward(dout, q, k, v, out, lse, spec, seed=0):
    order(seed)
    return hopper.backward(dout, q, k, v, out, lse, spec.settings(q.shape[3]))


def error(x, wanted, least=1e-30) -> float:
    return float((x.double() - wanted).norm() / wanted.norm().clamp(min=least))


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


def check_gradients(q, k, v, spec, dout=None, seeds=(SEEDS[0], SEEDS[-1])):
    """As `check`; dq's last bits follow the order in which blocks add to it."""
    if dout is None:
        dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(9)).to(q.dtype).to(DEVICE)

    def by_torch(*inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(plain(*leaves, spec), leaves, dout.to(inputs[0].dtype))

    wanted, theirs = by_torch(*(t.double() for t in (q, k, v))), by_torch(q, k, v)
    out, lse = run(q, k, v, spec)
    first = run_backward(dout, q, k, v, out, lse, spec, seeds[0])
    least = 1e-2 * float(dout.double().norm())  # a sum of one weight is 1, and its gradient nothing
    for ours, other, best in zip(first, theirs, wanted, strict=True):
        assert ours.isfinite().all() and error(ours, best, least) <= 2 * max(error(other, best, least), 1e-3)
    for seed in seeds[1:]:
        dq, dk, dv = run_backward(dout, q, k, v, out, lse, spec, seed)
        assert torch.equal(dk, first[1]) and torch.equal(dv, first[2])
        assert error(dq, first[0].double(), least) < 4e-3


CAUSAL, FULL = AttentionSpec(), AttentionSpec(causal=False)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
DIMS = pytest.mark.parametrize("dim", hopper.DIMS)
BOTH_WAYS = [  # sizes and spec: forward, and gradients
    ((1, 128, 128, 1, 1), CAUSAL),
    ((1, 1, 1, 1, 1), CAUSAL),
    ((2, 200, 200, 4, 2), CAUSAL),
    ((1, 90, 400, 2, 2), CAUSAL),
    ((1, 300, 140, 1, 1), CAUSAL),  # rows that see no key
    ((1, 400, 400, 1, 1), AttentionSpec(window=255)),  # tiles without their first
    ((1, 150, 150, 1, 1), AttentionSpec(scale=3.0)),
]


@DTYPES
@DIMS
@pytest.mark.parametrize(
    ("sizes", "spec"),
    [
        *BOTH_WAYS,
        ((1, 450, 450, 2, 1), CAUSAL),
        ((2, 130, 375, 2, 1), FULL),
        ((1, 64, 700, 1, 1), FULL),
        ((1, 130, 256, 1, 1), CAUSAL),  # the last key of a tile is hidden from one row
        ((1, 70, 255, 1, 1), FULL),  # a tile without its last key
        ((1, 70, 351, 1, 1), FULL),
        ((1, 260, 300, 1, 1), AttentionSpec(causal=False, window=70)),
    ],
    ids=str,
)
def test_attention(sizes, spec, dim, dtype):
    check(*draw(*sizes, dim, dtype), spec)


@DTYPES
@DIMS
@pytest.mark.parametrize(
    ("sizes", "spec"),
    [
        *BOTH_WAYS,
        ((1, 300, 300, 1, 1), CAUSAL),
        ((2, 130, 375, 3, 1), FULL),
        ((1, 64, 129, 1, 1), FULL),  # one key in a block
        ((1, 400, 130, 1, 1), AttentionSpec(causal=False, window=70)),  # keys that few rows see
        ((1, 130, 400, 1, 1), AttentionSpec(causal=False, window=20)),  # a block of keys that none sees
    ],
    ids=str,
)
def test_gradients(sizes, spec, dim, dtype):
    check_gradients(*draw(*sizes, dim, dtype), spec)


@DIMS
def test_gradients_of_strides(dim):
    """Views of one tensor; heads before tokens; a gradient that is the same for all rows."""
    make = torch.Generator().manual_seed(1)
    qkv = torch.randn(2, 150, 6, dim, generator=make).bfloat16().to(DEVICE)
    views = qkv[:, :, :4], qkv[:, :, 4:5], qkv[:, :, 5:]
    dout = torch.randn(2, 4, 150, dim, generator=make).bfloat16().to(DEVICE).transpose(1, 2)
    check_gradients(*views, CAUSAL, dout)
    check_gradients(*views, CAUSAL, dout[:, :1].expand(2, 150, 4, dim))


@DIMS
def test_gradients_of_low_scores(dim):
    """Of -500: a weight of a key beyond the last, whose score would be 0, is beyond all numbers."""
    q, k, v = draw(1, 70, 129, 1, 1, dim, torch.bfloat16)
    check_gradients(q + 8, k - 8, v, FULL, seeds=SEEDS[:1])


@DIMS
def test_gradients_at_the_edge_of_tiles(dim):
    """The first row of a tile of rows does not see the last key of a warpgroup's, which would be all that it sees."""
    q, k, v = draw(1, 130, 128, 1, 1, dim, torch.bfloat16)
    k[0, 63::64] = 2
    check_gradients(q.abs(), k, v, CAUSAL, seeds=SEEDS[:1])


@DIMS
def test_gradients_of_odd_numbers(dim):
    """A row with a NaN spreads to the keys that it sees, a row that sees none and one whose weights underflow do no harm."""
    q, k, v = draw(1, 200, 130, 1, 1, dim, torch.bfloat16)
    q[0, 199] *= 1e3
    dout = torch.ones_like(q)
    out, lse = run(q, k, v, CAUSAL)
    dq, dk, dv = run_backward(dout, q, k, v, out, lse, CAUSAL)
    assert all(t.isfinite().all() for t in (dq, dk, dv)) and not dq[0, :70].any()
    dout[0, 150] = float("nan")  # at key 80
    dq, dk, dv = run_backward(dout, q, k, v, out, lse, CAUSAL)
    assert dq[0, 150].isnan().all() and dq[0, :128].isfinite().all()
    assert dk[0, :81].isnan().all() and dv[0, :81].isnan().all()


@DIMS
@pytest.mark.parametrize("spec", [CAUSAL, FULL], ids=["causal", "full"])
@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_blocks_that_stay(spec, dim, multiprocessors):
    """More work than blocks: rings, phases and turns go on from one piece to the next, with pieces that see nothing between."""
    check(*draw(2, 300, 260, 4, 2, dim, torch.bfloat16), spec, multiprocessors=multiprocessors)


@DIMS
def test_heads_in_sections(dim):
    """More keys and values than the L2 cache holds: some heads come after the others."""
    check(*draw(1, 130, 4000, 36, 36, dim, torch.bfloat16), AttentionSpec(window=64))


def test_strides():
    """Views of one tensor, heads before tokens, a gap between rows."""
    make = torch.Generator().manual_seed(1)
    qkv = torch.randn(2, 150, 6, 64, generator=make).bfloat16().to(DEVICE)
    check(qkv[:, :, :4], qkv[:, :, 4:5], qkv[:, :, 5:], CAUSAL)
    check(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in draw(2, 70, 200, 2, 2, 128, torch.float16)), CAUSAL)


@DIMS
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


def test_the_op_runs_it_and_leaves_the_rest(monkeypatch):
    """Through the op, whose kernel it is for a while; what it refuses goes on to Triton."""
    monkeypatch.setattr(hopper, "ahead", lambda *_: True)  # of few keys, too, which cuDNN is faster at
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


def test_a_graph_replays_it():
    """The counter of a launch is cleared on the stream, so that a replay begins anew."""
    if HOST:
        pytest.skip("CUDA graphs are a GPU's")
    sizes = (2, 700, 700, 4, 2, 128, torch.bfloat16)
    inputs = draw(*sizes)
    run(*inputs, CAUSAL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(*inputs, CAUSAL)
        gradients = run_backward(inputs[0], *inputs, out, lse, CAUSAL)
    for seed in range(3):
        fresh = draw(*sizes, seed)
        for t, new in zip(inputs, fresh, strict=True):
            t.copy_(new)
        graph.replay()
        wanted, wanted_lse = run(*fresh, CAUSAL)
        assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
        dq, dk, dv = run_backward(fresh[0], *fresh, wanted, wanted_lse, CAUSAL)
        assert error(gradients[0], dq.double()) < 4e-3
        assert torch.equal(gradients[1], dk) and torch.equal(gradients[2], dv)
