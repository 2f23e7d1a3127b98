"""attention, dense and packed: what a row must never depend on."""

import itertools

import _oracle
import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.cases.attention import SUITE, slopes
from fastllm.ops import AttentionSpec, Dropout
from fastllm.ops._dropout import keep
from fastllm.ops._op import OPS


def independent(case) -> bool:
    """Whether a sequence of the batch knows nothing of its place: no packing, no dropout, one bias for all."""
    inputs = case.inputs(_oracle.Make("meta"))
    bias, spec = inputs.get("bias"), inputs.get("spec", AttentionSpec())
    return "cu_q" not in inputs and spec.dropout is None and (bias is None or bias.shape[0] == 1)


def test_compile_fullgraph():
    labels = ["B2 Sq5 Sk5 H4/2 D64", "B2 Sq40 Sk270 H6/3 D32 sinks", "B2 Sq50 Sk270 H6/2 D32 dropout 0.3"]
    for label in labels:
        _oracle.check_compile(SUITE, next(c for c in SUITE.correct if c.label == label))


def test_compile_again_for_each_call_of_dropout_only_once():
    """Seed and call change with every step: they must not be constants of the graph."""
    q = torch.randn(1, 9, 2, 16)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda spec: ops.attention(q, q, q, spec), backend=counter, fullgraph=True)
    for step in range(6):
        spec = AttentionSpec(dropout=Dropout(0.4, seed=3, call=step))
        assert torch.equal(compiled(spec), ops.attention(q, q, q, spec))
    assert counter.frame_count <= 3


def raw_arguments(spec: AttentionSpec, dim: int, bias=None, sinks=None, cu_q=None, cu_k=None):
    return cu_q, cu_k, bias, spec.alibi, sinks, *spec.settings(dim)


def test_opcheck():
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)
    bias, sinks, ends = torch.randn(1, 4, 5, 7), torch.randn(4), torch.tensor([0, 1], dtype=torch.int32)
    spec = AttentionSpec(window=3, softcap=2.0, dropout=Dropout(0.3, 5))
    for arguments in (
        raw_arguments(AttentionSpec(), 16),
        raw_arguments(spec, 16, bias, sinks),
        raw_arguments(AttentionSpec(alibi=slopes(4)), 16, cu_q=ends * 5, cu_k=ends * 7),
    ):
        packed = arguments[0] is not None
        inputs = tuple(t[:1] if packed else t for t in (q, k, v))
        torch.library.opcheck(OPS["attention"].raw, (*inputs, *arguments))
        out, lse = OPS["attention"].raw(*inputs, *arguments)
        settled = (*arguments[:5], bias is not None and arguments[2] is not None, *arguments[5:])
        torch.library.opcheck(OPS["attention_backward"].raw, (torch.randn_like(out), *inputs, out, lse, *settled))


def draw(queries, keys, heads, kv_heads, dim):
    return torch.randn(1, queries, heads, dim), torch.randn(1, keys, kv_heads, dim), torch.randn(1, keys, kv_heads, dim)


SPECS = [
    AttentionSpec(),
    AttentionSpec(window=70),
    AttentionSpec(softcap=2.0),
    AttentionSpec(alibi=slopes(6), window=300),
    AttentionSpec(sinks=torch.linspace(-2, 3, 6)),
]


@_oracle.dtypes(SUITE)
@pytest.mark.parametrize("spec", SPECS)
def test_the_last_queries_alone_equal_the_full_forward(spec, dtype):
    q, k, v = (t.to(dtype) for t in draw(700, 700, 6, 2, 64))
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


def test_row_with_nothing_but_a_sink_is_zero():
    q, k, v = draw(6, 3, 2, 1, 16)
    out = ops.attention(q, k, v, AttentionSpec(sinks=torch.tensor([1.0, -torch.inf])))
    assert (out[:, :3] == 0).all() and (out[:, 3:] != 0).all()
    assert torch.equal(out[:, :, 1], ops.attention(q, k, v)[:, :, 1]), "a sink of -inf is none"


def test_a_bias_of_minus_infinity_hides_a_key():
    q, k, v = draw(20, 300, 2, 2, 32)
    hidden = torch.rand(1, 1, 20, 300) < 0.5
    hidden[..., 7, :] = True
    bias = torch.zeros(1, 1, 20, 300).masked_fill(hidden, -torch.inf)
    out = ops.attention(q, k, v, AttentionSpec(causal=False, bias=bias))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=~hidden
    ).transpose(1, 2)
    assert (out[:, 7] == 0).all()
    rows = torch.arange(20) != 7
    torch.testing.assert_close(out[:, rows], expected[:, rows])


def test_distances_count_the_same_with_a_bias_as_with_slopes():
    q, k, v = draw(40, 290, 4, 2, 32)
    distance = (torch.arange(250, 290)[:, None] - torch.arange(290)).abs()
    bias = -slopes(4)[:, None, None] * distance
    for causal in (True, False):
        ours = ops.attention(q, k, v, AttentionSpec(causal=causal, alibi=slopes(4)))
        torch.testing.assert_close(ours, ops.attention(q, k, v, AttentionSpec(causal=causal, bias=bias[None])))


# -------------------------------------------------------------------------------------------------------------- packed


def ends(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


LENGTHS = [(5, 5), (0, 3), (300, 300), (1, 520), (7, 0), (90, 270)]


@_oracle.dtypes(SUITE)
@pytest.mark.parametrize("spec", [*SPECS, AttentionSpec(causal=False, window=40)])
def test_packed_sequences_equal_each_one_alone(spec, dtype):
    cu_q, cu_k = ends(*(q for q, _ in LENGTHS)), ends(*(k for _, k in LENGTHS))
    q = torch.randn(cu_q[-1], 6, 32).to(dtype)
    k, v = torch.randn(cu_k[-1], 2, 32).to(dtype), torch.randn(cu_k[-1], 2, 32).to(dtype)
    out = ops.attention_varlen(q, k, v, cu_q, cu_k, spec)
    for b in range(len(LENGTHS)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        assert torch.equal(out[rows], ops.attention(q[None, rows], k[None, keys], v[None, keys], spec)[0])


def test_packed_sequences_of_one_length_equal_the_batch_with_bias_and_dropout():
    q, k, v = torch.randn(3, 40, 4, 32), torch.randn(3, 70, 2, 32), torch.randn(3, 70, 2, 32)
    spec = AttentionSpec(bias=torch.randn(3, 4, 40, 70), dropout=Dropout(0.2, seed=9))
    packed = (t.flatten(0, 1) for t in (q, k, v))
    out = ops.attention_varlen(*packed, ends(40, 40, 40), ends(70, 70, 70), spec)
    assert torch.equal(out.view(q.shape), ops.attention(q, k, v, spec))


def test_rows_that_no_sequence_claims_are_zeros():
    q, k, v = (torch.randn(20, 2, 16) for _ in range(3))
    out = ops.attention_varlen(q, k, v, ends(4, 5) + 3, ends(6, 7))
    assert (out[:3] == 0).all() and (out[12:] == 0).all() and (out[3:12] != 0).all()
    assert (ops.attention_varlen(q, k, v, ends(), ends()) == 0).all()


# ------------------------------------------------------------------------------------------------------------- dropout


def test_dropout_drops_by_its_counter():
    """Values that are unit vectors show the weights themselves."""
    q, k, _ = draw(30, 64, 2, 1, 64)
    v = torch.eye(64)[None, :, None]
    drop = Dropout(0.25, seed=7, call=2)
    dropped = ops.attention(q, k, v, AttentionSpec(causal=False, dropout=drop))[0]
    whole = ops.attention(q, k, v, AttentionSpec(causal=False))[0]
    rows = (torch.arange(2) * 30 + torch.arange(30)[:, None])[..., None]
    mask = keep(rows, torch.arange(64), *drop.arguments())
    torch.testing.assert_close(dropped, whole.where(mask, 0.0) / 0.75)


def test_dropout_takes_its_share_and_leaves_the_mean():
    q, k, v = draw(64, 512, 8, 8, 16)
    v = torch.ones_like(v)
    sums = ops.attention(q, k, v, AttentionSpec(causal=False, dropout=Dropout(0.3, seed=1)))[..., 0]
    assert abs(sums.mean() - 1) < 0.02 and sums.std() > 0.02
    other = ops.attention(q, k, v, AttentionSpec(causal=False, dropout=Dropout(0.3, seed=2)))[..., 0]
    assert not torch.equal(sums, other)


# ---------------------------------------------------------------------------------------------------------- other sizes


def test_elements_beyond_2_to_the_31():
    """Rows so far apart that 32 bits do not count the distance; only their own pages are touched."""
    far = 2**30
    storage = torch.empty(3 * far + 32, dtype=torch.bfloat16)
    q, k, v = (storage[8 * i :].as_strided((1, 4, 1, 8), (0, far, 8, 1)) for i in range(3))
    for t in (q, k, v):
        t.copy_(torch.randn(t.shape))
    near = [t.contiguous() for t in (q, k, v)]
    assert torch.equal(ops.attention(q, k, v), ops.attention(*near))


Q, K = torch.randn(1, 3, 4, 16), torch.randn(1, 3, 2, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q.double(), K.double(), K.double()), TypeError, "q is float64, allowed: float32, bfloat16, float16"),
        ((Q, K.half(), K), TypeError, "k is torch.float16, q is torch.float32"),
        ((Q, K, K[:, :2]), ValueError, r"k \(1, 3, 2, 16\), v \(1, 2, 2, 16\) must be"),
        ((Q[..., :8], K, K), ValueError, r"q \(1, 3, 4, 8\)"),
        ((Q[:, :, :3], K, K), ValueError, "3 query heads over 2 KV heads"),
        ((torch.randn(1, 1, 1, 257),) * 3, ValueError, "head dim 257, allowed: 1 to 256"),
        ((Q, K, K, AttentionSpec(alibi=torch.ones(3))), ValueError, r"alibi \(3,\) must be \[4\]"),
        ((Q, K, K, AttentionSpec(alibi=torch.ones(4).half())), TypeError, "alibi is float16, allowed: float32"),
        ((Q, K, K, AttentionSpec(alibi=torch.ones(4, requires_grad=True))), ValueError, "alibi gets no gradient"),
        ((Q, K, K, AttentionSpec(sinks=torch.ones(2))), ValueError, r"sinks \(2,\) must be \[4\]"),
        ((Q, K, K, AttentionSpec(sinks=torch.ones(4, device="meta"))), ValueError, "sinks is on meta, q on cpu"),
        ((Q, K, K, AttentionSpec(bias=torch.ones(4, 3, 3))), ValueError, r"bias \(4, 3, 3\) must be \[1, 4, 3, 3\]"),
        ((Q, K, K, AttentionSpec(bias=torch.ones(1, 2, 3, 3))), ValueError, r"\[1, 4, 3, 3\], where each may be 1"),
        ((Q, K, K, AttentionSpec(bias=torch.ones(1, 4, 3, 3).double())), TypeError, "bias is float64, allowed"),
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
        ({"bias": torch.ones(1, 1, 1, 1), "alibi": torch.ones(1)}, "both bias and alibi"),
        ({"dropout": 0.1}, r"dropout is 0.1, allowed: Dropout\(p, seed, call\)"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"softcap": 0.0}, "softcap is 0.0, allowed: a positive number"),
        ({"softcap": -1.0}, "softcap is -1.0"),
    ],
)
def test_spec_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**fields)


def test_specs_are_equal_by_number_and_by_tensor():
    sinks = torch.ones(4)
    assert AttentionSpec() == AttentionSpec() != AttentionSpec(window=3)
    assert AttentionSpec(sinks=sinks) == AttentionSpec(sinks=sinks) != AttentionSpec(sinks=sinks.clone())
    assert len({AttentionSpec(), AttentionSpec(), AttentionSpec(sinks=sinks), AttentionSpec(sinks=sinks)}) == 2


P, R = torch.randn(9, 4, 16), torch.randn(8, 2, 16)
BIASED = AttentionSpec(bias=torch.zeros(1, 1, 5, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q, K, K, ends(3), ends(3)), ValueError, r"must be \[Tq, H, D\] and twice \[Tk, Hk, D\]"),
        ((P, R, R, ends(9).long(), ends(8)), TypeError, "cu_q is int64, allowed: int32"),
        ((P, R, R, ends(9), ends(4, 4)), ValueError, r"cu_q \(2,\) and cu_k \(3,\) must be \[B \+ 1\] both"),
        ((P, R, R, ends(10), ends(8)), IndexError, r"cu_q \[0, 10\] and cu_k \[0, 8\] must ascend within 9 rows"),
        ((P, R, R, ends(9) - 1, ends(8)), IndexError, r"cu_q \[-1, 8\]"),
        ((P, R, R, ends(6, -2), ends(4, 4)), IndexError, r"cu_q \[0, 6, 4\]"),
        ((P, R, R, ends(9), ends(9)), IndexError, "and 8 of k; one is out of range"),
        ((P, R, R, ends(6), ends(4), BIASED), IndexError, r"and the bias \(1, 1, 5, 4\)"),
        ((P, R, R, ends(5), ends(5), BIASED), IndexError, r"and the bias \(1, 1, 5, 4\)"),
    ],
)
def test_packed_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.attention_varlen(*arguments)
