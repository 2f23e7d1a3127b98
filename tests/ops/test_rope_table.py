"""rope_table: the angles, and every scaling against the frequencies that transformers computes."""

import math

import pytest
import torch

from fastllm import ops
from fastllm.ops.rope_table import frequencies


def test_table_holds_cosines_then_sines_of_float64_angles():
    table = ops.rope_table(5000, 8, theta=500.0)
    assert table.shape == (5000, 8) and table.dtype == torch.float32
    for position in (0, 1, 4999):
        for i in range(4):
            angle = position * 500.0 ** (-2 * i / 8)
            assert table[position, i].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert table[position, 4 + i].item() == pytest.approx(math.sin(angle), abs=1e-7)


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
DEEPSEEK = {**YARN, "factor": 40.0, "beta_fast": 16, "beta_slow": 2, "mscale": 0.707, "mscale_all_dim": 1.0}
LONG = {
    "rope_type": "longrope", "original_max_position_embeddings": 4096,
    "short_factor": [1.0 + 0.01 * i for i in range(32)], "long_factor": [1.0 + 0.5 * i for i in range(32)],
}  # fmt: skip

# (parameters, theta, the model's max_position_embeddings, length of the table)
SCALINGS = {
    "none": ({"rope_type": "default"}, 1e4, 4096, 4096),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 1e4, 4096, 4096),
    "llama3": (LLAMA3, 5e5, 131072, 131072),
    "llama3, other bands": ({**LLAMA3, "factor": 32.0, "high_freq_factor": 8.0}, 1e6, 131072, 131072),
    "yarn": (YARN, 1e6, 16384, 16384),
    "yarn, given attention factor": ({**YARN, "attention_factor": 1.5}, 1e4, 16384, 16384),
    "yarn, not truncated": ({**YARN, "truncate": False}, 1e4, 16384, 16384),
    "yarn, mscale": (DEEPSEEK, 1e4, 163840, 163840),
    "dynamic, within": ({"rope_type": "dynamic", "factor": 2.0}, 1e4, 4096, 4096),
    "dynamic, beyond": ({"rope_type": "dynamic", "factor": 2.0}, 1e4, 4096, 10000),
    "longrope, short": (LONG, 1e4, 131072, 4096),
    "longrope, long": (LONG, 1e4, 131072, 131072),
    "longrope, given factor": ({**LONG, "factor": 16.0}, 1e4, 131072, 131072),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, theta, max_position, length = SCALINGS[name]
    scaling = ops.RopeScaling.from_config(parameters, max_position)
    w, attention = frequencies(length, 64, theta, scaling)
    if scaling is None:
        expected, factor = theta ** -(torch.arange(0, 64, 2) / 64), 1.0
    else:
        config = transformers.LlamaConfig(
            hidden_size=256, num_attention_heads=4, max_position_embeddings=max_position,
            rope_parameters={**parameters, "rope_theta": theta},
        )  # fmt: skip
        expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)
    torch.testing.assert_close(w.float(), expected, rtol=1e-6, atol=0)
    assert attention == pytest.approx(factor, rel=1e-12)


def test_the_attention_factor_scales_the_table():
    scaling = ops.RopeScaling("yarn", 4.0, 4096)
    table = ops.rope_table(16, 64, scaling=scaling)
    assert table[0, 0].item() == pytest.approx(0.1 * math.log(4) + 1, rel=1e-7)
    assert table.view(16, 2, 32).square().sum(1).sqrt().allclose(table[0, :32])


def test_linear_scaling_is_a_table_of_fractions_of_positions():
    plain, scaled = ops.rope_table(8, 16), ops.rope_table(29, 16, scaling=ops.RopeScaling("linear", 4.0))
    torch.testing.assert_close(scaled[::4], plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ntk",), "kind is 'ntk'; allowed: linear, llama3, yarn, dynamic, longrope"),
        (("linear", 0.0), "factor is 0.0; it must be positive"),
        (("yarn", 4.0), "yarn needs original_max_position"),
        (("llama3", 8.0, 8192, 4.0, 4.0), "low_freq_factor 4.0 must be below high_freq_factor 4.0"),
    ],
)
def test_scaling_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.RopeScaling(*arguments)


@pytest.mark.parametrize("arguments", [(4, 3), (4, 0), (0, 8), (4, 8, -1.0), (4, 8, math.nan), (4, 8, math.inf)])
def test_table_errors(arguments):
    with pytest.raises(ValueError, match="rope_table"):
        ops.rope_table(*arguments)


@pytest.mark.parametrize(
    "scaling",
    [
        ops.RopeScaling("longrope", 4.0, 4, short_factor=(0.0, 1.0), long_factor=(0.0, 1.0)),
        ops.RopeScaling("longrope", 4.0, 4, short_factor=(1.0, 1.0), long_factor=(1.0, math.nan)),
        ops.RopeScaling("yarn", 4.0, 4, attention_factor=math.nan),
    ],
)
def test_a_scaling_of_no_number(scaling):
    """A table of NaN makes a model of NaN."""
    with pytest.raises(ValueError, match=r"rope_table: theta 10000.0 and RopeScaling\(.* not finite; mend them"):
        ops.rope_table(8, 4, scaling=scaling)


def test_longrope_needs_a_divisor_for_each_pair():
    scaling = ops.RopeScaling("longrope", 4.0, 4096, short_factor=(1.0,) * 4, long_factor=(2.0,) * 4)
    with pytest.raises(ValueError, match="short_factor of longrope has 4 values; 16 dimensions take 8"):
        ops.rope_table(64, 16, scaling=scaling)
