"""sample: the distribution of its tokens, and its arithmetic bit for bit."""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import _oracle
import numpy
import pytest
import scipy.stats
import torch

from fastllm import _C, ops
from fastllm.bench.cases.sample import PENALTIES, SUITE, USUAL
from fastllm.ops import SampleState
from fastllm.ops.sample import draw, fixed_weights, kept_tokens, philox, random_bits

INF, NAN = math.inf, math.nan

DISTRIBUTIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.5, "top_k": 12},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 1.1, "top_k": 30, "top_p": 0.95, "min_p": 0.02},
]


# ------------------------------------------------------------------------------------------------------ distribution


def assert_chi_square(tokens, probabilities):
    counts, expected = torch.bincount(tokens, minlength=len(probabilities)).double(), probabilities * len(tokens)
    assert (counts[probabilities == 0] == 0).all()
    large = expected >= 5
    observed = [*counts[large].tolist(), counts[~large].sum().item()]
    expected = [*expected[large].tolist(), expected[~large].sum().item()]
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    if len(expected) > 1:
        p = scipy.stats.chisquare(observed, numpy.array(expected) * (sum(observed) / sum(expected))).pvalue
        assert p > 1e-4, p


@pytest.mark.parametrize("fields", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("vary", ["seed", "index", "position"])
def test_distribution(fields, vary):
    logits, n = torch.randn(1, 70, generator=torch.Generator().manual_seed(11)) * 2, 30000
    state = SampleState.create(n, **{vary: torch.arange(n) + 12345}, **fields)
    tokens = ops.sample(logits.expand(n, -1), state)[0]
    t = fields.get("temperature", 1.0)
    weights = fixed_weights(logits[0], t)
    order = kept_tokens(
        logits[0], weights, t, *(fields.get(k, d) for k, d in (("top_k", 0), ("top_p", 1), ("min_p", 0)))
    )
    exact = torch.zeros(70, dtype=torch.float64)
    exact[order] = (logits[0, order].double() / t).softmax(0)
    assert_chi_square(tokens, exact)
    if vary == "position":  # and one draw does not foretell the next
        pairs = torch.bincount((tokens[:-1] % 4) * 4 + tokens[1:] % 4, minlength=16).double().reshape(4, 4)
        if (pairs.sum(0) > 50).all():
            assert scipy.stats.chi2_contingency(pairs).pvalue > 1e-4


def test_distribution_over_a_vocabulary_of_many_blocks():
    logits, n = torch.randn(1, 33000, generator=torch.Generator().manual_seed(5)), 3000
    tokens = ops.sample(logits.expand(n, -1), SampleState.create(n, position=torch.arange(n)))[0]
    by_group = logits[0].double().softmax(0).reshape(-1, 300).sum(1)
    assert_chi_square(tokens // 300, by_group)


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [  # the known answers that the authors of Philox publish (Random123, kat_vectors, philox4x32 10)
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, 2**128 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822, 0x03707344_13198A2E_85A308D3_243F6A88,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)  # fmt: skip
def test_philox_known_answers(key, counter, words):
    assert tuple(philox(key, counter)) == words
    # The kernel, through equal weights: 2^16 logits weigh 2^56 in all, so the token is the upper 16 bits of the draw.
    seed, index, position = (v - 2**64 if v >= 2**63 else v for v in (key, counter >> 64, counter % 2**64))
    state = SampleState.create(1, seed=seed, index=index, position=position)
    assert ops.sample(torch.zeros(1, 1 << 16), state)[0].item() == (words[1] << 32 | words[0]) >> 48


# -------------------------------------------------------------------------------------------------------- arithmetic


def test_draws_are_exactly_those_of_integer_weights():
    generator = torch.Generator().manual_seed(2)
    logits = torch.where(torch.rand(1, 3000, generator=generator) < 0.3, 5.0, -INF)  # weights 2^40 or 0
    n = 500
    token, _, truncated, kept, _ = ops.sample(
        logits.expand(n, -1), SampleState.create(n, seed=torch.arange(n), index=3)
    )
    weights = fixed_weights(logits[0], 1.0)
    assert token.tolist() == [draw(weights, random_bits(seed, 3, 0)) for seed in range(n)]
    count = int((logits > 0).sum())
    assert (kept == count).all() and torch.allclose(truncated, torch.tensor(-math.log(count)), rtol=1e-7)


def kernel_exp(x: numpy.ndarray) -> numpy.ndarray:
    """exp() of csrc/cpu/simd.h in numpy: an fma of floats is a double product (exact) and sum, rounded to float."""
    f32 = numpy.float32

    def fma(a, b, c):
        return (a.astype(numpy.float64) * numpy.float64(f32(b)) + numpy.float64(c)).astype(f32)

    x = numpy.clip(x, f32(-104), f32(0))
    n = numpy.rint(x * f32(1.44269504088896341))
    f = fma(n, 2.12194440e-4, fma(n, -0.693359375, x))
    p = numpy.full_like(f, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = (p.astype(numpy.float64) * f + numpy.float64(f32(c))).astype(f32)
    square = f * f
    p = (p.astype(numpy.float64) * square + f).astype(f32) + f32(1)
    return numpy.ldexp(p, n.astype(int)).astype(f32)


def kernel_weights(x: numpy.ndarray, temperature: float) -> torch.Tensor:
    scale = numpy.float32(1) / numpy.float32(temperature)
    return torch.from_numpy(
        numpy.rint(kernel_exp((x - x.max()) * scale).astype(numpy.float64) * 2.0**40).astype(numpy.int64)
    )


@pytest.mark.skipif(_C.isa() == "generic", reason="the generic tier rounds an fma twice: its bits are its own")
@pytest.mark.parametrize("fields", DISTRIBUTIONS, ids=str)
def test_every_bit_is_that_of_the_stated_arithmetic(fields):
    n, vocab = 30, 3333
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(8)) * 3
    token, logprob, truncated, kept, _ = ops.sample(logits, SampleState.create(n, seed=torch.arange(n), **fields))
    t = float(torch.tensor(fields.get("temperature", 1.0)))
    k, p, m = (fields.get(name, off) for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)))
    for i in range(n):
        x, weights = logits[i], kernel_weights(logits[i].numpy(), t)
        order = kept_tokens(x, weights, t, k, float(torch.tensor(p)), float(torch.tensor(m)))
        masked = torch.zeros_like(weights).scatter(0, order, weights[order])
        assert (token[i], kept[i]) == (draw(masked, random_bits(i, 0, 0)), len(order))
        above = x[token[i]].double() - x.max().double()
        for ours, sum, temperature in (
            (logprob, kernel_weights(x.numpy(), 1.0).sum(), 1.0),
            (truncated, masked.sum(), t),
        ):
            assert ours[i] == (above / temperature - math.log(int(sum) / 2**40)).float()


def digest() -> str:
    """A digest of every bit that the sampler returns over settings that take each path of the kernel."""
    sha = hashlib.sha256()
    for case in SUITE.correct:
        for output in ops.sample(**_oracle.draw(SUITE, case, torch.float32)):
            sha.update(output.numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.skipif(_C.isa() == "generic", reason="the generic tier rounds an fma twice: its bits are its own")
def test_tiers_agree_bit_for_bit():
    here = Path(__file__).resolve().parent
    imports = f"import sys; sys.path[:0] = {[str(here.parent), str(here)]}; import test_sample_bits"
    environment = {**os.environ, "FASTLLM_ISA": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", f"{imports}; print(test_sample_bits.digest())"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest()


@pytest.mark.parametrize("fields", [*DISTRIBUTIONS, {"temperature": 0.0}, {**PENALTIES, **USUAL}], ids=str)
def test_batch_threads_and_place_change_no_bit(fields):
    n, vocab = 17, 40001
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(1)) * 3
    state = SampleState.create(n, history=12, seed=torch.arange(n), **fields)
    state.history.copy_(torch.randint(0, vocab, (n, 12)))
    whole = ops.sample(logits, state)
    for i in range(n):
        for w, a in zip(whole, ops.sample(logits[i : i + 1], state[i : i + 1]), strict=True):
            assert torch.equal(w[i : i + 1], a)
    previous = _C.set_thread_limit(1)
    try:
        for w, a in zip(whole, ops.sample(logits, state), strict=True):
            assert torch.equal(w, a)
    finally:
        _C.set_thread_limit(previous)
    place = torch.randperm(n).int()
    wide = torch.full((n, vocab + 3), NAN)  # an unaligned row of another stride
    wide[:, 1:-2] = logits[place.long()]
    for w, a in zip(whole, ops.sample(wide[:, 1:-2], state.with_rows(place)), strict=True):
        assert torch.equal(w[place.long()], a)
