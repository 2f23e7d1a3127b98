"""The weights that a model begins with."""

import math

import pytest
import torch
from _training import decoder, encoder, seq2seq

from fastllm.models.initial import STD, initialise


def check(model, wanted) -> None:
    """wanted(name, parameter): the deviation of each matrix, or of each of its blocks of rows."""
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            stds = wanted(name, p)
            for std, part in zip(stds, p.chunk(len(stds)), strict=True):
                slack = 4 / math.sqrt(2 * part.numel())
                assert part.std().item() == pytest.approx(std, rel=slack), name
                assert abs(part.mean().item()) < 4 * std / math.sqrt(part.numel()), name


def test_a_decoder_is_drawn_as_gpt2():
    model = decoder(dim=256, ffn=512, layers=8, norm="layer", qkv_bias=True, tied=False)
    depth = 1 / math.sqrt(2 * 8)
    check(model, lambda name, p: [STD * depth if name.endswith(("out.weight", "down.weight")) else STD])


@pytest.mark.parametrize("changed", [{}, {"tied": False}, {"head": "classify", "pooler": True, "labels": 5}])
def test_an_encoder_is_drawn_as_bert(changed):
    check(encoder(**changed), lambda name, p: [STD])


@pytest.mark.parametrize("changed", [{}, {"activation": "geglu_tanh", "tied": False, "head_scale": 1.0}])
def test_relative_positions_are_drawn_as_t5(changed):
    n = 64**-0.5

    def wanted(name, p):
        if "embedding" in name:
            return [1.0]
        if "relative" in name:
            return [n]
        if "cross_q" in name:
            return [n / 4]
        return [n / 4, n, n] if "qkv" in name else [p.shape[1] ** -0.5]

    model = seq2seq(**changed)
    check(model, wanted)
    with torch.no_grad():  # whatever the head is, the first logits are of about 1
        logits = model(torch.randint(278, (4, 20)), torch.randint(278, (4, 20)))
    assert 0.5 < logits.std().item() < 2


def test_others_are_drawn_as_the_original_transformer():
    uniform = {"qkv": 3, "cross_kv": 2}

    def wanted(name, p):
        if "embedding" in name or "head" in name:
            return [64**-0.5]
        if "positions" in name:
            return [0.02]
        parts = uniform.get(name.split(".")[-2], 1)
        bound = math.sqrt(6 / (p.shape[1] + p.shape[0] // parts))
        assert p.abs().max() <= bound and p.abs().max() > 0.99 * bound
        return [bound / math.sqrt(3)] * parts

    common = {"norm": "layer", "norm_first": False, "bias": True, "scale": None, "head_scale": 1.0}
    for position in ("sinusoidal", "learned"):
        check(seq2seq(**common, position=position), wanted)


def test_norms_that_add_one_change_nothing_either():
    model = decoder(unit_norm=True)
    assert (model.norm.gain == 1).all() and not model.norm.weight.any()


@pytest.mark.parametrize("make", [decoder, encoder, seq2seq])
def test_the_draw_is_the_seeds_alone(make):
    a, b, c = make(seed=3), make(seed=3), make(seed=4)
    state = torch.get_rng_state()
    initialise(a, 3)
    assert torch.equal(torch.get_rng_state(), state)
    names = [name for name, p in a.named_parameters() if p.dim() == 2]
    for name in names:
        x, y, z = (m.get_parameter(name) for m in (a, b, c))
        assert torch.equal(x, y) and not torch.equal(x, z)
    assert (a.head.words if make is encoder else a.head).weight is a.embedding.weight


def test_what_cannot_be_drawn_is_refused():
    from fastllm.ops import Panels

    with pytest.raises(TypeError, match="Linear is not a Decoder, an Encoder or a Seq2Seq"):
        initialise(torch.nn.Linear(2, 2), 0)
    model = decoder(tied=False)
    model.layers[0].qkv.pack(Panels.pack(model.layers[0].qkv.weight.detach()))
    with pytest.raises(TypeError, match=r"the weight of layers\.0\.qkv is packed for decoding; draw before"):
        initialise(model, 0)
