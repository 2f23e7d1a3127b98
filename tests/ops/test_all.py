"""What every op must satisfy, over the cases of every suite: the oracle, guard bands, the contract, the lower tiers.

An op's own file holds what it alone must promise."""

import contextlib
from pathlib import Path

import _oracle
import pytest
import torch

from fastllm import SamplingParams, ops
from fastllm.ops._op import OPS

HERE = Path(__file__)
ALL = pytest.mark.parametrize(("suite", "case", "dtype"), _oracle.table(lambda s, c, d: _oracle.in_table(s)))
ROWS = pytest.mark.parametrize(
    ("suite", "case", "dtype"),
    _oracle.table(lambda s, c, d: s.rows and c.apart and _oracle.in_table(s)),
)


@ALL
def test_forward_and_gradients(suite, case, dtype):
    _oracle.check_forward_and_gradients(suite, case, dtype)


@ALL
def test_writes_only_its_outputs(suite, case, dtype):
    _oracle.check_guards(suite, case, dtype)


@ROWS
def test_contract(suite, case, dtype):
    _oracle.check_contract(suite, case, dtype)


OTHERS, PARTS = sorted(p for p in HERE.parent.glob("test_*.py") if p != HERE), 4


@pytest.mark.parametrize("tier", _oracle.LOWER_TIERS)
@pytest.mark.parametrize("part", range(PARTS))
def test_lower_tiers(part, tier):
    _oracle.check_lower_tier(OTHERS[part::PARTS], HERE, tier)


def small(suite) -> dict:
    """Inputs of the first case that has something to do."""
    return _oracle.draw(suite, next(c for c in suite.correct if c.bytes(4) or c.flops), suite.dtypes[0])


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize(
    ("suite", "case", "dtype"),
    _oracle.table(lambda s, c, d: _oracle.in_table(s) and d == s.dtypes[0] and c.bytes(4) < 2**13),
)
def test_torch_s_defaults_change_nothing(suite, case, dtype, default):
    """A kernel writes where its launcher pointed it: the dtype and the device of that are the inputs', never torch's."""
    inputs = _oracle.draw(suite, case, dtype)
    names = [n for n in suite.gradients if n in inputs]
    expected = _oracle.as_tuple(suite.run(**inputs))
    upstream = tuple(torch.ones_like(e) for e in expected)
    gradients = _oracle._with_gradient(suite.run, inputs, names, upstream)[1] if names else []
    with DEFAULTS[default]():
        found = _oracle.as_tuple(suite.run(**inputs))
        found_gradients = _oracle._with_gradient(suite.run, inputs, names, upstream)[1] if names else []
    for f, e in zip((*found, *found_gradients), (*expected, *gradients), strict=True):
        assert f.device == e.device and f.dtype == e.dtype
        assert _oracle.same(f, e) or e.isnan().any()


def records() -> list[torch.Tensor]:
    """What holds weights, adapters and settings on a CPU, made of given numbers."""
    weight = torch.arange(64, dtype=torch.float32, device="cpu").view(2, 32)
    pool, state = ops.AdapterPool((33, 32), 32, slots=1, max_rank=2, dora=True), ops.SampleState.create(1, history=3)
    pool.add_parts([None, (weight, weight.t(), 0.3)])
    state.set(0, SamplingParams(temperature=0.7, top_p=0.9, seed=2**40), prompt=[5, 6])
    scaling = ops.RopeScaling("yarn", 4.0, 32)
    return [
        ops.Panels.pack(weight).data, ops.QWeight.quantize(weight, 4).data, ops.QWeight.quantize(weight, 8).dequantize(),
        pool.a, pool.b, pool.rank, pool.scale, pool.gain, pool.part, state.settings, state.history,
        ops.rope_table(9, 8), ops.rope_table(9, 8, scaling=scaling),
    ]  # fmt: skip


@pytest.mark.parametrize("default", DEFAULTS)
def test_torch_s_defaults_change_no_record(default):
    expected = records()
    with DEFAULTS[default]():
        found = records()
    for f, e in zip(found, expected, strict=True):
        assert f.device == e.device and f.dtype == e.dtype and torch.equal(f, e)


SMALL = pytest.mark.parametrize("suite", _oracle.suites().values(), ids=_oracle.suites())


@SMALL
def test_autocast_changes_no_kernel(suite, monkeypatch):
    """Here of the references, whose products are torch's; tests/_triton_interpreter.py asks the same of a GPU's launchers."""
    for op in OPS.values():
        monkeypatch.setitem(op._kernels, "cpu", op._reference("cpu", "test"))
    _oracle.check_autocast(suite, small(suite))


def differentiable(suite, inputs):
    """(sum of sin of the outputs as a function of the inputs that receive a gradient, those inputs)."""
    names = [n for n in suite.gradients if n in inputs]

    def total(*given):
        outputs = _oracle.as_tuple(suite.run(**{**inputs, **dict(zip(names, given, strict=True))}))
        return sum(o.sin().sum() for o in outputs if o.is_floating_point())

    return total, [inputs[n] for n in names]


TRAINED = pytest.mark.parametrize(
    "suite", [pytest.param(s, id=op) for op, s in _oracle.suites().items() if s.gradients]
)


@TRAINED
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functorch_gives_the_gradient_and_no_second_one(suite):
    """By kernels as in eager mode. What an op saves is a number to its backward, so a second derivative would lack a part."""
    total, given = differentiable(suite, small(suite))
    places = tuple(range(len(given)))
    first = torch.func.grad(total, places)
    leaves = [t.clone().requires_grad_() for t in given]
    eager = torch.autograd.grad(total(*leaves), leaves)
    for f, e in zip(first(*given), eager, strict=True):
        torch.testing.assert_close(f, e, equal_nan=True)
    if OPS[suite.op].backward is None:  # then it runs its reference, which has one
        return
    for place in places:
        with pytest.raises(RuntimeError, match="a second derivative was asked for, and there is none"):
            torch.func.grad(lambda *t, place=place: first(*t)[place].square().sum(), place)(*given)


@TRAINED
def test_tangents_are_refused(suite):
    """Not left out in silence; without one a call is a call."""
    total, given = differentiable(suite, small(suite))
    with torch.autograd.forward_ad.dual_level():
        expected = total(*given)
        for i, t in enumerate(given):
            dual = torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))
            with pytest.raises(NotImplementedError, match="no forward-mode derivative; use torch.autograd.grad"):
                total(*given[:i], dual, *given[i + 1 :])
    torch.testing.assert_close(total(*given), expected, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(total, tuple(given), tuple(torch.ones_like(t) for t in given))


@TRAINED
def test_a_second_derivative_is_refused_beside_other_paths(suite):
    """autograd.grad walks to the inputs alone: it must meet the refusal on the way, and not leave a part out in silence."""
    total, given = differentiable(suite, small(suite))
    leaves = [t.clone().requires_grad_() for t in given]
    gradients = torch.autograd.grad(total(*leaves), leaves, create_graph=True)
    if OPS[suite.op].backward is None:
        return
    for g in gradients:
        with pytest.raises(RuntimeError, match="a second derivative was asked for, and there is none"):
            torch.autograd.grad(g.square().sum() + sum(t.square().sum() for t in leaves), leaves, retain_graph=True)


@TRAINED
def test_a_batch_of_gradients_is_refused(suite):
    """torch's older vmap has no memory that a kernel could read."""
    total, given = differentiable(suite, small(suite))
    leaves = [t.clone().requires_grad_() for t in given]
    if OPS[suite.op].backward is None:
        return
    with pytest.raises(NotImplementedError, match=r"a batch of gradients .* use torch.func.jacrev"):
        torch.autograd.grad(total(*leaves), leaves, torch.ones(2), is_grads_batched=True)


@TRAINED
def test_compiled_gradients(suite):
    total, given = differentiable(suite, small(suite))
    leaves = [t.clone().requires_grad_() for t in given]
    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for c, e in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, total)), strict=True):
        torch.testing.assert_close(c, e, equal_nan=True)


Q, W, A, B = (torch.randn(*shape) for shape in ((1, 5, 2, 16), (9, 32), (2, 32), (9, 2)))
NUMBERS = {
    "AttentionSpec": lambda f, x: x.sum() * ops.attention(Q, Q, Q, ops.AttentionSpec(scale=f, softcap=f)),
    "LossSpec": lambda f, x: ops.cross_entropy(x, torch.arange(4), spec=ops.LossSpec(softcap=f, z_loss=f)),
    "LoraSpec": lambda f, x: ops.lora_linear(x, W, A, B, ops.LoraSpec(f)),
    "linear's eps": lambda f, x: ops.linear(x, W, norm=W[0], eps=f),
}


@pytest.mark.parametrize("function", [pytest.param(f, id=name) for name, f in NUMBERS.items()])
def test_a_number_that_changes_from_call_to_call_is_compiled(function):
    torch._dynamo.reset()
    compiled, x = torch.compile(function, fullgraph=True, backend="aot_eager"), torch.randn(4, 32, requires_grad=True)
    for number in (0.5, 0.7, 0.9):  # from the second on a symbol
        assert torch.equal(compiled(number, x), function(number, x))


@pytest.mark.parametrize("given", [torch.randn(3, 4).numpy(), [[1.0]], None])
def test_errors_of_what_is_no_tensor(given):
    x, name = torch.randn(3, 4), type(given).__name__
    for call in (lambda: ops.softmax(given), lambda: ops.linear(x, given), lambda: ops.cross_entropy(x, given)):
        with pytest.raises(TypeError, match=f"(x|weight|target) is a {name}, and must be a torch.Tensor"):
            call()


def test_records_of_tensors_can_be_compared():
    """Each is equal to itself alone: their tensors have no one answer."""
    weight = torch.randn(16, 32)
    for make in (ops.Panels.pack, lambda w: ops.QWeight.quantize(w, 8), ops.AdamWState.new):
        one, other = make(weight), make(weight)
        assert one == one and one != other and one in [other, one] and len({one, other}) == 2


TENSORS = [
    pytest.param(suite, name, id=f"{op} {name}")
    for op, suite in _oracle.suites().items()
    for name in [name for name, value in small(suite).items() if torch.is_tensor(value)][1:]
]


@pytest.mark.parametrize(("suite", "name"), TENSORS)
def test_a_tensor_on_another_device_is_an_error(suite, name):
    """Named, and not read as if it were here."""
    inputs = small(suite)
    inputs[name] = inputs[name].to("meta")
    with pytest.raises(ValueError, match=r"on meta|several devices"):
        suite.run(**inputs)
