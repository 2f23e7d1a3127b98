"""adamw: what only this op must promise."""

import dataclasses
import math

import _contract
import _oracle
import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.cases.adamw import SPEC, SUITE
from fastllm.ops import AdamWSpec, AdamWState
from fastllm.ops._op import OPS
from fastllm.ops._tensor_list import BLOCK, device_table


def drawn(*shape, dtype=torch.float32, moments=torch.float32):
    param, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    state = AdamWState.new(param, moments)
    state.exp_avg.copy_(0.1 * torch.randn(shape))
    state.exp_avg_sq.copy_(0.1 * torch.rand(shape))
    return param, grad, state


def tensors(param, state):
    return [t for t in (param, state.exp_avg, state.exp_avg_sq, state.master) if t is not None]


@_oracle.dtypes(SUITE)
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_the_formula_to_the_bit(moments, dtype):
    param, grad, state = drawn(3, 701, dtype=dtype, moments=moments)
    expected = _contract.adamw(
        param if state.master is None else state.master, grad.float() * 0.5, state.exp_avg.float(),
        state.exp_avg_sq.float(), 4, SPEC.lr, SPEC.beta1, SPEC.beta2, SPEC.eps, SPEC.weight_decay,
    )  # fmt: skip
    ops.adamw(param, grad, state, 4, SPEC, grad_scale=0.5)
    assert torch.equal(param, expected[0].to(dtype)) and (
        state.master is None or torch.equal(state.master, expected[0])
    )
    assert torch.equal(state.exp_avg, expected[1].to(moments)) and torch.equal(
        state.exp_avg_sq, expected[2].to(moments)
    )


def test_each_tensor_at_its_own_rate():
    """The bits of calls of one tensor whose spec has that rate; a rate of 0 moves moments alone."""
    lists = [drawn(*shape) for shape in SHAPES]
    copies = [(p.clone(), g, AdamWState(*(t.clone() for t in tensors(p, s)[1:]))) for p, g, s in lists]
    rates = torch.tensor([1.0, 0.5, 7.0, 0.3, 0.0, 1e-3])
    ops.adamw(*(list(x) for x in zip(*lists, strict=True)), 3, SPEC, rates=rates)
    for (p, _, s), (q, g, r), rate in zip(lists, copies, rates.double().tolist(), strict=True):
        before = q.clone()
        ops.adamw(q, g, r, 3, dataclasses.replace(SPEC, lr=SPEC.lr * rate))
        assert all(torch.equal(a, b) for a, b in zip(tensors(p, s), tensors(q, r), strict=True))
        assert torch.equal(q, before) == (rate == 0 or not q.numel())


def test_ten_steps_are_those_of_torch():
    ours = [torch.randn(50, 40), torch.randn(7)]
    theirs = [torch.nn.Parameter(p.clone()) for p in ours]
    spec = AdamWSpec(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    states = [AdamWState.new(p) for p in ours]
    for step in range(1, 11):
        grads = [torch.randn_like(p) for p in ours]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        ops.adamw(ours, grads, states, step, spec)
    for p, q, s in zip(ours, theirs, states, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=2e-6, atol=2e-7)
        torch.testing.assert_close(s.exp_avg, optimizer.state[q]["exp_avg"], rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(s.exp_avg_sq, optimizer.state[q]["exp_avg_sq"], rtol=2e-6, atol=1e-9)


SHAPES = [(3, 7), (1,), (0,), (40000,), (16384,), (5, 33, 2)]


@pytest.mark.parametrize("threads", [0, 1])
def test_a_list_gives_the_bits_of_its_tensors(threads):
    lists = [drawn(*shape, dtype=torch.bfloat16) for shape in SHAPES]
    copies = [(p.clone(), g, AdamWState(*(t.clone() for t in tensors(p, s)[1:]))) for p, g, s in lists]
    previous = _C.set_thread_limit(threads)
    try:
        ops.adamw(*(list(x) for x in zip(*lists, strict=True)), 3, SPEC)
    finally:
        _C.set_thread_limit(previous)
    for (p, _, s), (q, g, r) in zip(lists, copies, strict=True):
        ops.adamw(q, g, r, 3, SPEC)
        assert all(torch.equal(a, b) for a, b in zip(tensors(p, s), tensors(q, r), strict=True))


def test_nothing_beside_the_tensors_is_written():
    whole = [torch.full((3, 67), 7.0) for _ in range(3)]
    param, m, v = (t[1, :65] for t in whole)
    for t in (param, m, v):
        t.fill_(0.5)
    ops.adamw(param, torch.ones(65), AdamWState(m, v), 1, SPEC)
    for t in whole:
        t[1, :65] = 7
        assert (t == 7).all()


def test_step_and_scale_may_be_tensors():
    a, b = drawn(9, 50), drawn(9, 50)
    for t, u in zip(tensors(a[0], a[2]), tensors(b[0], b[2]), strict=True):
        u.copy_(t)
    ops.adamw(a[0], a[1], a[2], 12, SPEC, 0.25)
    ops.adamw(b[0], a[1], b[2], torch.tensor(12.0), SPEC, torch.tensor(0.25))
    assert all(torch.equal(t, u) for t, u in zip(tensors(a[0], a[2]), tensors(b[0], b[2]), strict=True))


def test_not_finite_gradients_stay_in_their_element_or_are_skipped():
    param, grad, state = drawn(4, 20)
    before = [t.clone() for t in tensors(param, state)]
    grad[1, 3], grad[2, 5] = math.nan, math.inf
    skip = 1 - ops.grad_norm(grad).isfinite().float()
    ops.adamw(param, grad, state, 1, SPEC, skip=skip)
    assert all(torch.equal(t, b) for t, b in zip(tensors(param, state), before, strict=True))
    ops.adamw(param, grad, state, 1, SPEC, skip=torch.zeros(()))
    assert param.isnan().nonzero().tolist() == [[1, 3], [2, 5]]  # inf / inf
    assert state.exp_avg_sq[2, 5] == math.inf and state.exp_avg[1].isnan().sum() == 1


def test_zero_gradients_without_moments_only_decay():
    param = torch.randn(30)
    expected = param * torch.tensor(1 - SPEC.lr * SPEC.weight_decay)
    ops.adamw(param, torch.zeros(30), AdamWState.new(param), 1, SPEC)
    assert torch.equal(param, expected)


def test_parameters_that_require_gradients_and_their_version():
    param = torch.nn.Parameter(torch.randn(5, 8))
    state = AdamWState.new(param)
    versions = [t._version for t in tensors(param, state)]
    ops.adamw(param, torch.ones(5, 8), state, 1, SPEC)
    assert all(t._version > v for t, v in zip(tensors(param, state), versions, strict=True))
    assert param.requires_grad and param.grad_fn is None


def test_the_state_of_a_parameter():
    wide, narrow = torch.randn(3, 4), torch.randn(4, 3).bfloat16().t()
    assert AdamWState.new(wide).master is None and AdamWState.new(narrow, master=False).master is None
    state = AdamWState.new(narrow, moments=torch.bfloat16)
    assert torch.equal(state.master, narrow.float()) and state.master.is_contiguous()
    assert state.exp_avg.dtype == torch.bfloat16 and state.exp_avg.is_contiguous()


def test_opcheck_and_compile():
    param, grad, state = drawn(4, 33, dtype=torch.bfloat16)
    lists = [param], [grad], [state.exp_avg], [state.exp_avg_sq], [state.master]
    torch.library.opcheck(OPS["adamw"].raw, (*lists, None, 3, None, None, None, 1e-3, 0.9, 0.95, 1e-8, 0.1))
    scalars = torch.tensor(2.0), 0, torch.tensor(0.5), torch.tensor(0.0), torch.tensor([0.1])
    torch.library.opcheck(OPS["adamw"].raw, (*lists, *scalars, 1e-3, 0.9, 0.95, 1e-8, 0.1))
    copy, other = param.clone(), AdamWState(*(t.clone() for t in tensors(param, state)[1:]))
    torch._dynamo.reset()
    torch.compile(lambda p, g, s: ops.adamw(p, g, s, 3, SPEC), fullgraph=True)(copy, grad, other)
    ops.adamw(param, grad, state, 3, SPEC)
    assert all(torch.equal(a, b) for a, b in zip(tensors(param, state), tensors(copy, other), strict=True))


P, G, S = torch.randn(2, 3), torch.randn(2, 3), AdamWState(torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], [], [], 1, SPEC), ValueError, "param is an empty list"),
        (([P, P], [G], [S, S], 1, SPEC), ValueError, "1 tensors in grad, 2 in param"),
        (([P, P], [G, G], [S], 1, SPEC), ValueError, "1 states for 2 parameters"),
        ((P, G[:1], S, 1, SPEC), ValueError, r"grad\[0\] is \(1, 3\), param\[0\] \(2, 3\)"),
        ((P, G.half(), S, 1, SPEC), TypeError, "grad is float16, allowed: float32"),
        ((P.double(), G, S, 1, SPEC), TypeError, "param is float64"),
        (([P, P.half()], [G, G], [S, S], 1, SPEC), TypeError, r"param\[1\] is torch.float16, param\[0\] torch.float32"),
        ((P, G, AdamWState(P.half(), P.half()), 1, SPEC), TypeError, "exp_avg is float16, allowed: float32, bfloat16"),
        ((P, G, AdamWState(P, P, P), 1, SPEC), ValueError, "a float32 parameter is its own master"),
        ((P.t(), G.t(), AdamWState(P.t(), P.t()), 1, SPEC), ValueError, r"param\[0\] is not contiguous"),
        ((P, G, S, 0, SPEC), ValueError, "step is 0; the first is 1"),
        ((P, G, S, 1, SPEC, torch.ones(2)), ValueError, "grad_scale is .* must be one number"),
        ((P, G, S, 1, SPEC, None, torch.tensor(True)), TypeError, "skip is bool, allowed: float32"),
        (
            (P, G, S, 1, SPEC, None, None, torch.ones(2)),
            ValueError,
            r"rates is \(2,\) on cpu; it must be \(1,\) on cpu",
        ),
        ((P, G, S, 1, SPEC, None, None, torch.ones(1).double()), TypeError, "rates is float64, allowed: float32"),
        ((P, G.to("meta"), S, 1, SPEC), ValueError, r"grad\[0\] is on meta, param\[0\] on cpu"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.adamw(*arguments)


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"beta1": 1.0}, {"beta2": -0.1}, {"eps": math.nan}, {"weight_decay": -1}]
)
def test_spec_errors(wrong):
    with pytest.raises(ValueError, match=f"AdamWSpec: {next(iter(wrong))} is"):
        AdamWSpec(**wrong)


def test_tables_for_a_gpu_are_kept():
    """Of the same tensors the same ones, which hold every pointer and every block."""
    params, grads = [torch.ones(BLOCK + 1), torch.ones(3)], [torch.ones(BLOCK + 1), torch.ones(3)]
    table, owner, aligned = device_table([params, grads])
    again = device_table([params, grads])
    assert again[0] is table and again[1] is owner and aligned is again[2] is True
    assert table.tolist() == [[p.data_ptr(), g.data_ptr(), p.numel()] for p, g in zip(params, grads, strict=True)]
    assert owner.tolist() == [0, 1, 1 << 32]
    other = [torch.ones(BLOCK + 1), torch.ones(5)[1:4]]
    table, owner_of_others, aligned = device_table([params, other])
    assert table[:, 1].tolist() == [t.data_ptr() for t in other] and owner_of_others is owner and not aligned
