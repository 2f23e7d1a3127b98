"""The arithmetic contract, proved on plain PyTorch before any kernel: with every sum in one fixed order, decoding token
by token, prefilling in chunks and one full forward give the same bits; so do a row alone and in a batch, and the
sampler and the trainer. The controls at the end break one rule each and must be caught."""

import math
import random
from dataclasses import dataclass
from fractions import Fraction

import _contract
import pytest
import torch
from torch import Tensor

TILE = 8  # small, so that a short text crosses several tiles
LENGTH = 30


@dataclass
class Tiny:
    """A Llama in miniature: grouped queries, rope, rms_norm, swiglu, tied head. `linear` and `relative` let a control
    break a rule: another matmul, or tiles that begin where the chunk begins."""

    seed: int = 0
    layers: int = 2
    hidden: int = 24
    heads: int = 4
    groups: int = 2
    head_dim: int = 6
    wide: int = 40
    vocabulary: int = 47
    linear: object = staticmethod(_contract.linear)
    relative: bool = False

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def matrix(rows: int, cols: int) -> Tensor:
            return torch.randn(rows, cols, generator=generator) / cols**0.5

        self.embedding = 0.3 * torch.randn(self.vocabulary, self.hidden, generator=generator)
        self.norm = [1 + 0.1 * torch.randn(self.hidden, generator=generator) for _ in range(2 * self.layers + 1)]
        self.blocks = [
            {
                "q": matrix(self.heads * self.head_dim, self.hidden),
                "k": matrix(self.groups * self.head_dim, self.hidden),
                "v": matrix(self.groups * self.head_dim, self.hidden),
                "o": matrix(self.hidden, self.heads * self.head_dim),
                "gate": matrix(self.wide, self.hidden),
                "up": matrix(self.wide, self.hidden),
                "down": matrix(self.hidden, self.wide),
            }
            for _ in range(self.layers)
        ]
        self.table = _contract.rope_table(LENGTH, self.head_dim)

    def __call__(self, ids: Tensor, cache: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """ids [B, S] -> logits [B, S, V]; a cache holds earlier keys and values, and is extended in place."""
        cache = [] if cache is None else cache
        first = cache[0][0].shape[1] if cache else 0
        position = first + torch.arange(ids.shape[1])
        x = self.embedding[ids]  # [B, S, hidden]
        for i, w in enumerate(self.blocks):
            h = _contract.rms_norm(x, self.norm[2 * i])
            q, k, v = (self.linear(h, w[n]).unflatten(-1, (-1, self.head_dim)) for n in "qkv")  # [B, S, heads, D]
            q, k = (_contract.rope(t, position, self.table) for t in (q, k))
            if i < len(cache):
                k, v = torch.cat((cache[i][0], k), 1), torch.cat((cache[i][1], v), 1)
                cache[i] = (k, v)
            else:
                cache.append((k, v))
            a = _contract.attention(q, k, v, first, TILE, origin=first if self.relative else 0)
            x = x + self.linear(a.flatten(-2), w["o"])
            h = _contract.rms_norm(x, self.norm[2 * i + 1])
            x = x + self.linear(_contract.swiglu(self.linear(h, w["gate"]), self.linear(h, w["up"])), w["down"])
        return self.linear(_contract.rms_norm(x, self.norm[-1]), self.embedding)

    def chunked(self, ids: Tensor, chunk: int) -> Tensor:
        cache: list[tuple[Tensor, Tensor]] = []
        return torch.cat([self(part, cache) for part in ids.split(chunk, dim=1)], dim=1)


def text(seed: int, batch: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(0, Tiny.vocabulary, (batch, length), generator=torch.Generator().manual_seed(100 + seed))


# ----------------------------------------------------------------------------------------------------------- the pieces


def test_fma_rounds_once():
    if _contract._C.isa() == "generic":
        pytest.skip("the generic tier has no FMA: two roundings are its arithmetic")
    generator = torch.Generator().manual_seed(5)
    n = 4000
    bits = [torch.randint(0x30000000, 0x50000000, (n,), generator=generator, dtype=torch.int32) for _ in range(3)]
    a, b, c = (t.view(torch.float32) * (1 - 2 * torch.randint(0, 2, (n,), generator=generator)) for t in bits)
    c[::2] = -(a * b)[::2]  # half of them cancel
    a[:2], b[:2], c[:2] = 1 + 2**-12, 1 + 2**-12, torch.tensor([2.0**-80, -(2.0**-80)])  # a tie, but for a far bit of c
    ours = _contract.fma(a, b, c)
    assert ours[0] != ours[1]
    neighbours = (ours.nextafter(torch.tensor(s * math.inf)) for s in (-1, 1))
    for x, y, z, got, *others in zip(*(t.tolist() for t in (a, b, c, ours, *neighbours)), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        assert all(abs(Fraction(got) - exact) <= abs(Fraction(other) - exact) for other in others), (x, y, z)


def test_exp_is_accurate_and_total():
    x = torch.linspace(-110, 95, 20001)
    exact = x.double().exp()
    error = (_contract.exp(x).double() - exact).abs()
    normal = (exact > torch.finfo(torch.float32).tiny) & (exact < torch.finfo(torch.float32).max)
    assert (error[normal] / exact[normal]).max() < 2**-22
    special = _contract.exp(torch.tensor([-math.inf, math.inf, math.nan, 0.0]))
    assert special[0] == 0 and special[1] == math.inf and special[2].isnan() and special[3] == 1


def test_pieces_equal_plain_pytorch_within_rounding():
    x, w = torch.randn(5, 100), torch.randn(100)
    torch.testing.assert_close(_contract.rms_norm(x, w), torch.nn.functional.rms_norm(x, (100,), w, 1e-6))
    torch.testing.assert_close(_contract.swiglu(x, -x), torch.nn.functional.silu(x) * -x)
    torch.testing.assert_close(_contract.linear(x, torch.eye(100)[:9], w[:9]), x[:, :9] + w[:9])
    q, k, v = torch.randn(2, 20, 4, 6), torch.randn(2, 20, 2, 6), torch.randn(2, 20, 2, 6)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(_contract.attention(q, k, v, 0, TILE), plain.transpose(1, 2))
    logits = torch.randn(50) * 5
    ours = torch.tensor([_contract.log_probability(logits, i) for i in range(50)])
    torch.testing.assert_close(ours, logits.log_softmax(-1), rtol=1e-6, atol=1e-6)


def test_philox_known_answers():
    """The vectors that the authors publish with Random123."""
    full, zero = 0xFFFFFFFF, (0, 0, 0, 0)
    assert _contract.philox(zero, (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert _contract.philox((full,) * 4, (full,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert _contract.philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_the_model_is_causal_and_uses_its_cache():
    """A wrong cache could make everything equal and meaningless: later tokens must matter later, and only later."""
    model, ids = Tiny(), text(0)
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % model.vocabulary
    a, b = model(ids), model(changed)
    assert torch.equal(a[:, :20], b[:, :20]) and all((a[:, i] != b[:, i]).any() for i in range(20, LENGTH))


# --------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
def test_decode_equals_chunked_prefill_equals_full_forward(seed, chunk):
    model, ids = Tiny(seed), text(seed)
    assert torch.equal(model.chunked(ids, chunk), model(ids))


def test_mixed_chunks_equal_full_forward():
    model, ids, cache = Tiny(3), text(3), []
    parts = [model(part, cache) for part in ids.split([16, 1, 1, 7, 3, 2], dim=1)]
    assert torch.equal(torch.cat(parts, 1), model(ids))


def test_rows_in_a_batch_equal_rows_alone():
    model, ids = Tiny(4), text(4, batch=5)
    together = model.chunked(ids, 7)
    for row in range(5):
        assert torch.equal(together[row : row + 1], model(ids[row : row + 1]))


def test_sampled_log_probabilities_equal_the_trainers():
    """Sample 20 tokens by decoding; score the finished text by one full forward. No tolerance."""
    model, prompt, cache = Tiny(5), text(5, length=6), []
    logits, tokens, sampled = model(prompt, cache), [], []
    for position in range(6, 26):
        token, logprob = _contract.sample(logits[0, -1], seed=7, index=2, position=position, temperature=0.8)
        tokens.append(token), sampled.append(logprob)
        logits = model(torch.tensor([[token]]), cache)
    whole = model(torch.cat((prompt, torch.tensor([tokens])), 1))
    scored = [_contract.log_probability(whole[0, 5 + i], token) for i, token in enumerate(tokens)]
    assert sampled == scored and len(set(tokens)) > 5
    again = [_contract.sample(whole[0, 5 + i], 7, 2, 6 + i, 0.8)[0] for i in range(20)]
    assert again == tokens


@pytest.mark.parametrize("seed", range(4))
def test_integer_sum_has_no_order(seed):
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(seed)) * 4
    weight = _contract.fixed_point(logits)
    total, order = int(weight.sum()), random.Random(seed)
    for chunk in (1, 7, 16, 1000):
        parts = [int(p.sum()) for p in weight[torch.randperm(5000)].split(chunk)]
        order.shuffle(parts)
        assert sum(parts) == total
    # a partition must not move the draw either: walk the chunks, then inside the one that holds the point
    words = _contract.philox((3, 0, 0, 0), (seed, 0))
    point = (words[0] | words[1] << 32) * total >> 64
    expected = _contract.sample(logits, seed, 0, 3)[0]
    for chunk in (1, 64, 999):
        before = 0
        for begin in range(0, 5000, chunk):
            part = weight[begin : begin + chunk]
            if before + int(part.sum()) > point:
                assert begin + int((before + part.cumsum(0) > point).nonzero()[0]) == expected
                break
            before += int(part.sum())


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -math.inf, 0.5])
    draws = torch.tensor([_contract.sample(logits, seed=1, index=0, position=i)[0] for i in range(800)])
    frequency = torch.bincount(draws, minlength=5) / 800
    assert frequency[3] == 0 and (frequency - logits.softmax(-1)).abs().max() < 0.06


# --------------------------------------------------------------------------------------------------------- the controls


def test_control_tiles_relative_to_the_chunk_are_caught():
    """Pure arithmetic: fails in the same way on every machine."""
    assert any(
        not torch.equal(model.chunked(ids, 3), model(ids))
        for model, ids in ((Tiny(s, relative=True), text(s)) for s in range(4))
    )


def test_control_a_library_matmul_is_caught():
    """torch's matmul picks its order of additions by the number of rows."""

    def matmul(x, weight):
        return x @ weight.t()

    size = {"hidden": 96, "head_dim": 24, "wide": 160}
    pairs = [(torch.randn(LENGTH, k), torch.randn(n, k)) for k, n in ((96, 96), (96, 160), (160, 96)) for _ in range(4)]
    if all(torch.equal(matmul(x, w)[i], matmul(x[i : i + 1], w)[0]) for x, w in pairs for i in range(LENGTH)):
        pytest.skip("the BLAS of this machine gives a row alone the bits that it has in a batch: nothing to catch")
    assert any(
        not torch.equal(model.chunked(ids, 1), model(ids))
        for model, ids in ((Tiny(s, linear=matmul, **size), text(s)) for s in range(4))
    )


def test_control_a_float_sum_is_caught():
    """What the integers are for: the same weights in fp32 have a sum that depends on order."""
    weight = _contract.exp(torch.randn(5000) * 4)

    def chain(values):
        total = torch.zeros(())
        for v in values:
            total = total + v
        return total

    assert chain(weight) != chain(weight.flip(0))
