"""attention (dense): the oracle's table, and what a row must never depend on."""

import _oracle
import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.cases.attention import SUITE
from fastllm.ops import AttentionSpec
from fastllm.ops._op import OPS


@_oracle.cases(SUITE)
def test_forward(case):
    _oracle.check_forward_and_gradients(SUITE, case, torch.float32)


@_oracle.cases(SUITE)
def test_writes_only_its_outputs(case):
    _oracle.check_guards(SUITE, case, torch.float32)


@_oracle.cases(SUITE)
def test_contract(case):
    _oracle.check_contract(SUITE, case, torch.float32)


def test_compile_and_opcheck():
    _oracle.check_compile(SUITE, SUITE.correct[2])
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)
    torch.library.opcheck(OPS["attention"].raw, (q, k, v, True, 3, 0.25, 0.0))


def draw(queries, keys, heads, kv_heads, dim):
    return torch.randn(1, queries, heads, dim), torch.randn(1, keys, kv_heads, dim), torch.randn(1, keys, kv_heads, dim)


@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(window=70), AttentionSpec(softcap=2.0)])
def test_the_last_queries_alone_equal_the_full_forward(spec):
    q, k, v = draw(700, 700, 6, 2, 64)
    full = ops.attention(q, k, v, spec)
    for n in (1, 2, 5, 100, 699):
        assert torch.equal(ops.attention(q[:, -n:], k, v, spec), full[:, -n:])
    assert torch.equal(ops.attention(q[:, :300], k[:, :300], v[:, :300], spec), full[:, :300])


def test_a_head_alone_equals_the_head_in_its_group():
    q, k, v = draw(300, 300, 9, 3, 64)
    full = ops.attention(q, k, v)
    for h in range(9):
        alone = ops.attention(q[:, :, h : h + 1], k[:, :, h // 3, None], v[:, :, h // 3, None])
        assert torch.equal(alone[:, :, 0], full[:, :, h])


@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(window=20)])
@pytest.mark.parametrize("dim", [64, 33])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_keys_out_of_sight_never_leak(spec, dim, poison):
    q, k, v = draw(600, 600, 3, 1, dim)
    clean = ops.attention(q, k, v, spec)
    for at in (0, 5, 255, 256, 300, 599):
        for name in ("k", "v"):
            bad_k, bad_v = k.clone(), v.clone()
            (bad_k if name == "k" else bad_v)[:, at] = poison
            out = ops.attention(q, bad_k, bad_v, spec)
            touched = torch.zeros(600, dtype=torch.bool)
            touched[at : at + spec.window if spec.window else None] = True
            assert torch.equal(out[:, ~touched], clean[:, ~touched]), (at, name)
            if poison != poison:
                assert out[:, touched].isnan().all(), (at, name)


def test_rows_without_keys_infinite_scores_and_nan():
    q, k, v = draw(3, 3, 1, 1, 16)
    longer = torch.cat((q, q), 1)
    out = ops.attention(longer, k, v)
    assert (out[:, :3] == 0).all() and torch.equal(out[:, 3:], ops.attention(q, k, v))
    q, k = torch.ones_like(q), torch.ones_like(k)
    k[:, 0] = -torch.inf
    out = ops.attention(q, k, v)
    assert (out[:, 0] == 0).all() and torch.equal(out[:, 1], v[:, 1]), "a score of -inf has no weight"
    k[:, 1] = torch.inf
    out = ops.attention(q, k, v)
    assert (out[:, 0] == 0).all() and out[:, 1:].isnan().all()


def test_a_tile_of_infinitely_low_scores_is_passed_over():
    q, k, v = torch.ones(1, 1, 1, 16), torch.ones(1, 600, 1, 16), torch.randn(1, 600, 1, 16)
    k[:, :256] = -torch.inf
    torch.testing.assert_close(ops.attention(q, k, v)[0, 0, 0], v[0, 256:, 0].mean(0))
    k[:, 256:] = -torch.inf
    assert (ops.attention(q, k, v) == 0).all()


def test_large_scores_do_not_overflow():
    q, k, v = draw(50, 50, 1, 1, 32)
    exact = ops.attention(q.double().float() * 100, k * 100, v)
    scores = torch.einsum("bihd,bjhd->bhij", q.double() * 100, k.double() * 100) / 32**0.5
    scores += torch.full((50, 50), -torch.inf).triu(1)
    torch.testing.assert_close(
        exact[0, :, 0], (scores.softmax(-1) @ v[:, :, 0].double())[0, 0].float(), atol=1e-4, rtol=1e-3
    )


def test_a_plan_gives_the_same_bits_with_any_threads():
    q, k, v = draw(40, 900, 3, 1, 64)
    plan = _C.Plan()
    plan.begin()
    out = ops.attention(q, k, v)
    plan.end()
    expected = out.clone()
    for threads in (1, 2):
        out.zero_()
        assert plan.replay(threads) == 0 and torch.equal(out, expected)


def test_gradient_runs_the_reference():
    q, k, v = (t.requires_grad_() for t in draw(5, 5, 2, 1, 8))
    ops.attention(q, k, v).sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


Q, K = torch.randn(1, 3, 4, 16), torch.randn(1, 3, 2, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q.half(), K.half(), K.half()), TypeError, "q is float16, allowed: float32"),
        ((Q, K.half(), K), TypeError, "k is torch.float16, q is torch.float32"),
        ((Q, K, K[:, :2]), ValueError, r"k \(1, 3, 2, 16\), v \(1, 2, 2, 16\) must be"),
        ((Q[..., :8], K, K), ValueError, r"q \(1, 3, 4, 8\)"),
        ((Q[:, :, :3], K, K), ValueError, "3 query heads over 2 KV heads"),
        ((torch.randn(1, 1, 1, 257),) * 3, ValueError, "head dim 257, allowed: 1 to 256"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.attention(*arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window is 0, allowed: an int >= 1"),
        ({"window": 2.5}, "window is 2.5"),
        ({"window": 4, "causal": False}, "it needs causal=True"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"softcap": 0.0}, "softcap is 0.0, allowed: a positive number"),
        ({"softcap": -1.0}, "softcap is -1.0"),
    ],
)
def test_spec_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**fields)
