"""The backward of attention: the same bits with any threads, and gradients that stay where they belong.

Its accuracy is in test_attention.py, case by case.
"""

import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.cases.attention import SUITE, slopes
from fastllm.ops import AttentionSpec, Dropout
from fastllm.ops._op import OPS

NAN, INF = float("nan"), float("inf")


def draw(batch, queries, keys, heads, kv_heads, dim):
    shapes = (batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, dim)
    return tuple(torch.randn(s) for s in shapes)


def gradients(q, k, v, spec, dout, *packed):
    """Of q, k, v and what the spec has to learn."""
    learned = [t for t in (spec.bias, spec.sinks) if t is not None]
    inputs = [t.detach().requires_grad_() for t in (q, k, v, *learned)]
    names = [n for n in ("bias", "sinks") if getattr(spec, n) is not None]
    spec = AttentionSpec(**{**vars(spec), **dict(zip(names, inputs[3:], strict=True))})
    out = ops.attention_varlen(*inputs[:3], *packed, spec) if packed else ops.attention(*inputs[:3], spec)
    return torch.autograd.grad(out, inputs, dout)


FEATURES = [
    AttentionSpec(),
    AttentionSpec(causal=False, window=60, softcap=3.0),
    AttentionSpec(alibi=slopes(6), sinks=torch.linspace(-1, 2, 6)),
    AttentionSpec(bias=torch.randn(1, 6, 300, 700), dropout=Dropout(0.2, 3)),
    AttentionSpec(bias=torch.randn(1, 1, 300, 1), sinks=torch.zeros(6), causal=False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", FEATURES)
@pytest.mark.parametrize("kv_heads", [6, 1])
def test_any_threads_give_the_same_bits(kv_heads, spec, dtype):
    """A plan runs with all the threads it is given."""
    q, k, v = (t.to(dtype) for t in draw(2, 300, 700, 6, kv_heads, 32))
    shaping = (None, None, spec.bias, spec.alibi, spec.sinks)
    settings, dout = spec.settings(32), torch.randn_like(q)
    out, lse = OPS["attention"].raw(q, k, v, *shaping, *settings)
    previous, results = torch.get_num_threads(), []
    try:
        torch.set_num_threads(7)
        for threads in (1, 2, 5, 7):
            limit = _C.set_thread_limit(threads)
            results.append(OPS["attention_backward"].raw(dout, q, k, v, out, lse, *shaping, True, *settings))
            _C.set_thread_limit(limit)
    finally:
        torch.set_num_threads(previous)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("spec", [FEATURES[0], FEATURES[1], FEATURES[2]])
def test_packed_sequences_equal_each_one_alone(spec):
    lengths = [(5, 5), (0, 3), (130, 300), (40, 520), (7, 0)]
    cu_q, cu_k = (torch.tensor([0, *side]).cumsum(0).int() for side in zip(*lengths, strict=True))
    q, k, v = (t[0] for t in draw(1, int(cu_q[-1]), int(cu_k[-1]), 6, 6, 32))
    dout = torch.randn_like(q)
    dq, dk, dv, *_ = gradients(q, k, v, spec, dout, cu_q, cu_k)
    for b in range(len(lengths)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = gradients(q[None, rows], k[None, keys], v[None, keys], spec, dout[None, rows])
        for whole, part in zip((dq[rows], dk[keys], dv[keys]), alone, strict=False):
            torch.testing.assert_close(whole, part[0])


def test_unclaimed_rows_and_keys_have_no_gradient():
    q, k, v = (t[0] for t in draw(1, 12, 20, 2, 1, 16))
    cu_q, cu_k = torch.tensor([2, 5, 9]).int(), torch.tensor([3, 9, 15]).int()
    dout = torch.full_like(q, NAN)
    dout[2:9] = 1.0
    spec = AttentionSpec(sinks=torch.zeros(2))
    dq, dk, dv, dsinks = gradients(q, k, v, spec, dout, cu_q, cu_k)
    for gradient, claimed in ((dq, slice(2, 9)), (dk, slice(3, 15)), (dv, slice(3, 15))):
        outside = torch.ones(len(gradient), dtype=torch.bool)
        outside[claimed] = False
        assert (gradient[outside] == 0).all() and gradient.isfinite().all()
    assert dsinks.isfinite().all()


def test_rows_that_see_nothing_have_no_gradient():
    q, k, v = draw(1, 9, 4, 2, 2, 16)
    for spec in (AttentionSpec(), AttentionSpec(sinks=torch.zeros(2))):
        dq, dk, dv, *_ = gradients(q, k, v, spec, torch.randn_like(q))
        assert (dq[:, :5] == 0).all() and (dq[:, 5:] != 0).any()
    _, dk, dv = gradients(q[:, :5], k, v, AttentionSpec(bias=None, window=1), torch.zeros(1, 5, 2, 16))
    assert (dk == 0).all() and (dv == 0).all()
    bias = torch.zeros(1, 1, 9, 4)
    bias[:, :, 6] = -INF
    dq, dk, dv, dbias = gradients(q, k, v, AttentionSpec(causal=False, bias=bias), torch.randn_like(q))
    assert (dq[:, 6] == 0).all() and (dbias[:, :, 6] == 0).all()
    assert all(t.isfinite().all() for t in (dq, dk, dv, dbias))


@pytest.mark.parametrize("keys", [0, 3])
@pytest.mark.parametrize("queries", [0, 2])
def test_empty_sequences(queries, keys):
    q, k, v = draw(2, queries, keys, 4, 2, 16)
    spec = AttentionSpec(sinks=torch.ones(4), bias=torch.zeros(1, 4, 1, 1))
    for gradient in gradients(q, k, v, spec, torch.ones_like(q)):
        assert gradient.isfinite().all() and (queries * keys > 0 or (gradient == 0).all())


@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(window=20)])
def test_what_a_query_does_not_see_leaves_its_gradient_alone(spec):
    """A NaN in a key, a value or an upstream row reaches those that see it, and no other."""
    tokens = 300
    q, k, v = draw(1, tokens, tokens, 3, 1, 33)
    dout = torch.randn_like(q)
    clean = gradients(q, k, v, spec, dout)
    position = torch.arange(tokens)
    distance = position[:, None] - position
    sees = (distance >= 0) & (distance < (spec.window or tokens))
    for at in (0, 5, 63, 64, 255, 256, 299):
        for name in ("k", "v", "dout"):
            bad = {"q": q, "k": k.clone(), "v": v.clone(), "dout": dout.clone()}
            bad[name][:, at] = NAN
            dq, dk, dv = gradients(bad["q"], bad["k"], bad["v"], spec, bad["dout"])
            row_hit = sees[:, at] if name in "kv" else position == at
            key_hit = sees[row_hit].any(0)
            assert torch.equal(dq[:, ~row_hit], clean[0][:, ~row_hit]), (at, name)
            assert dq[:, row_hit].isnan().all(), (at, name)
            for ours, before in ((dk, clean[1]), (dv, clean[2])):
                assert torch.equal(ours[:, ~key_hit], before[:, ~key_hit]), (at, name)


@pytest.mark.parametrize("shape", [(2, 4, 20, 300), (1, 4, 20, 300), (2, 1, 20, 1), (1, 1, 1, 300), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_that_is_a_view(shape, dtype):
    """Expanded, transposed, or in the dtype of q: the gradient has the bias's own shape."""
    q, k, v = (t.to(dtype) for t in draw(2, 20, 300, 4, 2, 16))
    dout, bias = torch.randn_like(q), torch.randn(shape).to(dtype)
    plain = gradients(q, k, v, AttentionSpec(bias=bias), dout)
    strided = bias.mT.contiguous().mT
    assert all(map(torch.equal, gradients(q, k, v, AttentionSpec(bias=strided), dout), plain))
    expanded = bias.expand(2, 4, 20, 300)
    whole = gradients(q, k, v, AttentionSpec(bias=expanded), dout)
    assert whole[3].shape == expanded.shape
    summed = whole[3].float().sum_to_size(shape)
    tolerance = {"rtol": 2e-2, "atol": 2e-1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(summed, plain[3].float(), **tolerance)


def test_a_constant_bias_gets_no_gradient():
    q, k, v = (t.requires_grad_() for t in draw(1, 5, 5, 2, 1, 8))
    mask = torch.zeros(1, 1, 5, 5)
    ops.attention(q, k, v, AttentionSpec(bias=mask)).sum().backward()
    assert mask.grad is None and all(t.grad.isfinite().all() for t in (q, k, v))


def test_functorch():
    q, k, v = draw(1, 9, 9, 2, 1, 16)
    ours = torch.func.grad(lambda t: ops.attention(t, k, v).sin().sum())(q)
    plain = torch.func.grad(lambda t: SUITE.reference(t, k, v).sin().sum())(q)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
