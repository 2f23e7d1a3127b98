"""The weights that a model begins with."""

import math

import pytest
import torch
from _training import decoder

from fastllm.models.initial import STD, initialise


def test_deviations_and_norms():
    model = decoder(dim=256, ffn=512, layers=8, norm="layer", qkv_bias=True, tied=False)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            writes = name.endswith(("out.weight", "down.weight"))
            wanted = STD / math.sqrt(2 * 8) if writes else STD
            assert p.std().item() == pytest.approx(wanted, rel=0.05), name
            assert abs(p.mean().item()) < wanted / 20, name


def test_norms_that_add_one_change_nothing_either():
    model = decoder(unit_norm=True)
    assert (model.norm.gain == 1).all() and not model.norm.weight.any()


def test_the_draw_is_the_seeds_alone():
    state = torch.get_rng_state()
    a, b, c = decoder(seed=3), decoder(seed=3), decoder(seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    names = [name for name, p in a.named_parameters() if p.dim() == 2]
    for name in names:
        x, y, z = (m.get_parameter(name) for m in (a, b, c))
        assert torch.equal(x, y) and not torch.equal(x, z)
    assert a.head.weight is a.embedding.weight


def test_what_cannot_be_drawn_is_refused():
    from fastllm.ops import Panels

    with pytest.raises(TypeError, match="Linear is not a Decoder"):
        initialise(torch.nn.Linear(2, 2), 0)
    model = decoder(tied=False)
    model.layers[0].qkv.pack(Panels.pack(model.layers[0].qkv.weight.detach()))
    with pytest.raises(TypeError, match=r"the weight of layers\.0\.qkv is packed for decoding; draw before"):
        initialise(model, 0)
