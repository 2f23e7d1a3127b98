"""The oracle: what every op must satisfy, driven by its suite in fastllm/bench/cases.

- forward and every gradient against float64: our error is at most twice (suite.error times, the forward) that of plain
  PyTorch at the same dtype;
- nothing is written outside the outputs (guard bands around every allocation), no input is changed;
- opcheck on the registered op; compile(fullgraph) gives the eager result;
- the contract: a row alone equals the same row in its batch, bit for bit, and so do 1 and 2 threads.
"""

import contextlib
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastllm import _C, ops
from fastllm.bench.case import Case, Make, Suite, as_tuple
from fastllm.bench.cases import suites

GUARDS = 64, 65  # elements before and after each allocation: aligned outputs, and such as are not
SENTINEL = 113


def table(chosen: Callable[[Suite, Case, torch.dtype], bool] = lambda suite, case, dtype: True) -> list:
    """Every case of every op in every dtype, as parameters (suite, case, dtype)."""
    return [
        pytest.param(suite, case, dtype, id=f"{name} {case.label} {str(dtype).removeprefix('torch.')}")
        for name, suite in suites().items()
        for case in suite.correct
        for dtype in suite.dtypes
        if chosen(suite, case, dtype)
    ]


def cases(suite: Suite) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", suite.correct, ids=[c.label for c in suite.correct])


def dtypes(suite: Suite) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", suite.dtypes, ids=[str(d).removeprefix("torch.") for d in suite.dtypes])


def draw(suite: Suite, case: Case, dtype: torch.dtype, device: str = "cpu") -> dict:
    return case.inputs(Make(device, dtype, seed=zlib.crc32(f"{suite.op} {case.label}".encode())))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """torch.equal, of float8 too, which it does not take."""
    float8 = a.is_floating_point() and a.itemsize == 1
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if float8 else torch.equal(a, b)


def _floating(inputs: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}


def _with_gradient(function, inputs: dict, names: list[str], upstream: tuple):
    """Outputs and the gradients of sum(output * upstream) with respect to the named inputs."""
    inputs = {k: v.detach().requires_grad_() if k in names else v for k, v in inputs.items()}
    outputs = as_tuple(function(**inputs))
    total = sum((o.to(u.dtype) * u).sum() for o, u in zip(outputs, upstream, strict=True))
    gradients = torch.autograd.grad(total, [inputs[n] for n in names])
    return [o.detach() for o in outputs], list(gradients)


def assert_close(label: str, ours, plain, exact, dtype: torch.dtype, factor: float = 2.0, floor: float = 0.0) -> None:
    """|ours - exact| <= factor * |plain - exact| + half a unit of the dtype + two of fp32 + floor, largest and mean."""
    assert ours.shape == exact.shape, f"{label}: shape {tuple(ours.shape)}, want {tuple(exact.shape)}"
    if not exact.numel():
        return
    if not exact.is_floating_point():
        assert torch.equal(ours, exact), f"{label}: integers differ"
        return
    ours, plain = ours.double(), plain.double()
    assert torch.equal(ours.isnan(), exact.isnan()), f"{label}: NaN in other places than the reference"
    finite = exact.isfinite()
    assert torch.equal(ours[~finite & ~exact.isnan()], exact[~finite & ~exact.isnan()]), f"{label}: infinities differ"
    ours, plain, exact = ours[finite], plain[finite], exact[finite]
    if not exact.numel():
        return
    unit = torch.finfo(dtype).eps / 2 + 2 * torch.finfo(torch.float32).eps
    for name, reduce in (("largest", torch.Tensor.max), ("mean", torch.Tensor.mean)):
        error, theirs = reduce((ours - exact).abs()).item(), reduce((plain - exact).abs()).item()
        allowed = factor * theirs + unit * reduce(exact.abs()).item() + floor
        assert error <= allowed, (
            f"{label}: {name} error {error:.3e} exceeds {allowed:.3e} (plain PyTorch: {theirs:.3e})"
        )


def check_forward_and_gradients(suite: Suite, case: Case, dtype: torch.dtype, device: str = "cpu", run=None) -> None:
    run = run or suite.run
    inputs = draw(suite, case, dtype, device)
    before = {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
    exact = as_tuple(suite.reference(**_floating(inputs, torch.float64)))
    generator = torch.Generator().manual_seed(1)
    upstream = tuple(torch.randn(e.shape, generator=generator).to(device, dtype) for e in exact)
    names = [n for n in suite.gradients if n in inputs]

    ours = as_tuple(run(**inputs))
    plain = as_tuple(suite.reference(**inputs))
    for i, (o, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert o.dtype == p.dtype, f"output {i}: dtype {o.dtype}, want {p.dtype}"
        assert_close(f"output {i}", o, p, e, dtype, suite.error)
    if names:
        _, exact_g = _with_gradient(
            suite.reference, _floating(inputs, torch.float64), names, tuple(u.double() for u in upstream)
        )
        _, plain_g = _with_gradient(suite.reference, inputs, names, upstream)
        outputs, ours_g = _with_gradient(run, inputs, names, upstream)
        for o, again in zip(ours, outputs, strict=True):
            assert torch.equal(o, again) or o.isnan().any(), "forward with and without gradient differ"
        for name, o, p, e in zip(names, ours_g, plain_g, exact_g, strict=True):
            assert o.dtype == inputs[name].dtype, f"d{name}: dtype {o.dtype}"
            floor = suite.cancelled * (1 if dtype == torch.float32 else 2**9)
            assert_close(f"d{name}", o, p, e, dtype, suite.gradient_error, floor)
    for name, value in before.items():
        assert same(inputs[name], value) or value.isnan().any(), f"input {name} was changed"


@contextlib.contextmanager
def guarded_allocations(guard: int):
    """Every CPU tensor that torch.empty or empty_like gives out lies between guard bands; leaving the block checks
    them."""
    original, original_like, bands = torch.empty, torch.empty_like, []

    def empty(*size, **options):
        probe = original(*size, **{**options, "device": "meta"})
        if torch.device(options.get("device") or "cpu").type != "cpu" or probe.dtype == torch.bool:
            return original(*size, **options)
        whole = torch.full((probe.numel() + 2 * guard,), SENTINEL, dtype=probe.dtype)
        bands.append(whole)
        return whole[guard : guard + probe.numel()].view(probe.shape)

    def empty_like(x, **options):
        return empty(x.shape, **{"dtype": x.dtype, "device": x.device, **options})

    torch.empty, torch.empty_like = empty, empty_like
    try:
        yield
    finally:
        torch.empty, torch.empty_like = original, original_like
    for whole in bands:
        assert (whole[:guard] == SENTINEL).all() and (whole[-guard:] == SENTINEL).all(), "written outside an output"


def check_guards(suite: Suite, case: Case, dtype: torch.dtype) -> None:
    inputs = draw(suite, case, dtype)
    expected = as_tuple(suite.run(**inputs))
    names = [n for n in suite.gradients if n in inputs]
    upstream = tuple(torch.ones_like(e) for e in expected)
    for guard in GUARDS:
        with guarded_allocations(guard):
            outputs = as_tuple(suite.run(**inputs))
            if names:
                _with_gradient(suite.run, inputs, names, upstream)
        for o, e in zip(outputs, expected, strict=True):
            assert torch.equal(o, e) or e.isnan().any(), "an unaligned output changes the result"


def check_contract(suite: Suite, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    inputs = draw(suite, case, dtype, device)
    names = [n for n in suite.rows if n in inputs]
    count = inputs[names[0]].shape[0]
    whole = as_tuple(suite.run(**inputs))
    for i in sorted({0, count // 2, count - 1}) if count else ():
        alone = as_tuple(suite.run(**{k: v[i : i + 1] if k in names else v for k, v in inputs.items()}))
        for w, a in zip(whole, alone, strict=True):
            if w.dim() == 0:  # a sum over rows
                continue
            assert torch.equal(w[i : i + 1], a) or a.isnan().any(), f"row {i} alone differs from the row in its batch"
    previous = _C.set_thread_limit(1)
    try:
        serial = as_tuple(suite.run(**inputs))
    finally:
        _C.set_thread_limit(previous)
    for w, s in zip(whole, serial, strict=True):
        assert torch.equal(w, s) or w.isnan().any(), "1 thread and all threads differ"


def check_autocast(suite: Suite, inputs: dict) -> None:
    """The same bits and dtypes where torch's own products are made in 16 bits."""
    names = [n for n in suite.gradients if n in inputs]
    expected = as_tuple(suite.run(**inputs))
    upstream = tuple(torch.ones_like(e) for e in expected)
    gradients = _with_gradient(suite.run, inputs, names, upstream)[1] if names else []
    with torch.autocast("cpu", torch.bfloat16):
        found = as_tuple(suite.run(**inputs))
        found_gradients = _with_gradient(suite.run, inputs, names, upstream)[1] if names else []
    for f, e in zip((*found, *found_gradients), (*expected, *gradients), strict=True):
        assert f.dtype == e.dtype and (same(f, e) or e.isnan().any())


def check_float16_gradients(rows=256, depth=16, vocab=6000):
    """Under a loss scale those of tokens that are nowhere a target, each p / T, are as accurate as plain PyTorch's."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, depth, generator=generator).half()
    weight = (torch.randn(vocab, depth, generator=generator) * 0.2).half()
    target = torch.randint(vocab, (rows,), generator=generator)
    others = torch.ones(vocab, dtype=torch.bool).index_fill_(0, target, False)

    def found(loss, dtype, scale):
        inputs = [t.to(dtype).requires_grad_() for t in (x, weight)]
        dx, dweight = torch.autograd.grad(loss(*inputs) * scale, inputs)
        return [dx.double() / scale, dweight.double()[others] / scale]

    exact = found(lambda x, w: torch.nn.functional.cross_entropy(x @ w.t(), target), torch.float64, 1.0)
    plain = found(lambda x, w: torch.nn.functional.cross_entropy((x @ w.t()).float(), target), torch.float16, 4096.0)
    for retain in (False, True):

        def loss(x, w, retain=retain):
            y = ops.linear_cross_entropy(x, w, target)
            if retain:
                torch.autograd.grad(y, x, retain_graph=True)
            return y

        ours = found(loss, torch.float16, 65536.0)
        for o, p, e in zip(ours, plain, exact, strict=True):
            assert (o - e).norm() <= 2 * (p - e).norm() + 2**-11 * e.norm()


def check_compiled_calls(function, inputs: list[torch.Tensor]) -> None:
    """Of a dropout's calls, one a step, function(call, *inputs) compiles the first and all that follow."""
    compiles = []

    def backend(module, example):
        compiles.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for call in range(2, 13):
        assert torch.equal(compiled(call, *inputs), function(call, *inputs))
    assert len(compiles) <= 2
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for call in (2, 3, 4):
        both = (torch.autograd.grad(f(call, *inputs).sum(), inputs) for f in (compiled, function))
        for c, e in zip(*both, strict=True):
            torch.testing.assert_close(c, e)


def check_compile(suite: Suite, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    inputs = draw(suite, case, dtype, device)
    names = [n for n in suite.gradients if n in inputs]
    torch._dynamo.reset()
    compiled = torch.compile(lambda **kw: suite.run(**kw), fullgraph=True)
    with torch.no_grad():
        for c, e in zip(as_tuple(compiled(**inputs)), as_tuple(suite.run(**inputs)), strict=True):
            assert torch.equal(c, e), "compiled and eager forward differ"
    if names:
        upstream = tuple(torch.ones_like(o) for o in as_tuple(suite.run(**inputs)))
        _, compiled_g = _with_gradient(compiled, inputs, names, upstream)
        _, eager_g = _with_gradient(suite.run, inputs, names, upstream)
        for name, c, e in zip(names, compiled_g, eager_g, strict=True):
            torch.testing.assert_close(c, e, msg=lambda m, n=name: f"compiled d{n}: {m}")


LOWER_TIERS = [tier for tier in ("avx2", "generic") if tier in _C.isas() and tier != _C.isa()]


SOME_OPS = os.environ.get("FASTLLM_TEST_OPS")  # "rope,swiglu": of which the table is, where a lower tier is tested


def in_table(suite: Suite) -> bool:
    return SOME_OPS is None or suite.op in SOME_OPS.split(",")


def check_lower_tier(files: list[Path], table: Path, tier: str) -> None:
    """Runs test files and the table of the ops that they are of again under FASTLLM_ISA=tier, but for what does not depend on
    it. Several in a process: one takes 5 seconds to begin."""
    ops = {file.stem.removeprefix("test_") for file in files} & suites().keys()
    command = [sys.executable, "-m", "pytest", str(table), *map(str, files), "-x", "-p", "no:cacheprovider"]
    apart = ("lower_tiers", "compile", "opcheck", "errors", "fork", "functorch", "export")
    apart += ("defaults", "autocast", "tangents", "second_derivative", "batch_of_gradients")
    command += ["-k", " and ".join(f"not {name}" for name in apart)]
    environment = {**os.environ, "FASTLLM_ISA": tier, "FASTLLM_TEST_OPS": ",".join(sorted(ops))}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
