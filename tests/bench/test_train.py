"""The contenders of `benchmarks/train.py` take the same steps, and what it says of them."""

import itertools

import pytest
import torch
import train
from trainers import KINDS, SHAPES

TINY = [name for name in SHAPES if "tiny" in name]


def losses(kind: str, shape: str, **more) -> list[float]:
    contender = KINDS[kind](shape=shape, threads=torch.get_num_threads(), device="cpu", **more)
    return contender.step(4)["losses"]


@pytest.mark.parametrize("shape", TINY)
def test_contenders_agree(shape):
    pytest.importorskip("peft")
    ours = losses("ours", shape)
    assert ours == pytest.approx(losses("transformers", shape), rel=2e-6)
    assert all(a - b > 1e-4 * a for a, b in itertools.pairwise(ours))  # it learns


def test_factors_alone_are_trained():
    import low_rank

    from fastllm.models.decoder import Decoder, DecoderConfig

    model = low_rank.with_factors(Decoder(DecoderConfig(50, 2, 32, 48, 4, 2, 8, 16)), 3)
    trained = {name.removeprefix("layers.") for name, p in model.named_parameters() if p.requires_grad}
    parts = {"qkv": 3, "out": 1, "gate_up": 2, "down": 1}
    assert trained == {
        f"{layer}.{name}.{factor}"
        for layer in range(2)
        for name, count in parts.items()
        for factor in ("a", *(f"b.{i}" for i in range(count)))
    }


def test_a_step_is_counted_once():
    """GPT-2 of 124 M: 6 N for each token, the head among them, positions not."""
    gpt2 = SHAPES["gpt2-124m"]
    weights = 12 * 12 * 768 * 768 + 50257 * 768
    assert train.flops(gpt2) == 4 * 256 * (6 * weights + 6 * 12 * 768 * 256)
    lora, tokens = SHAPES["llama-3.6b-lora"], 4 * 1024
    frozen, factors = 3.62e9, 21e6
    assert train.flops(lora) == pytest.approx(tokens * (4 * frozen + 6 * factors + 6 * 16 * 4096 * 1024), rel=0.01)


def test_what_is_missed_is_said():
    def contender(name, seconds, peak, losses=(2.0, 1.5)):
        return train.Contender(name, {}, [seconds], list(losses), int(peak))

    shape = SHAPES["llama-1.2b"]
    ours, wide = contender("fastllm", 0.12, 18e9), contender(train.MASTER, 0.15, 28e9)
    rows, missed = train.judge("llama-1.2b", shape, [ours, wide, contender("transformers", 0.14, 1e9)], None)
    assert [round(row["tokens_per_s"]) for row in rows] == [68267, 54613, 58514]
    assert [line.split(", the goal")[0] for line in missed] == [
        "llama-1.2b fastllm-master: 0.93x the best peer's speed",
        "llama-1.2b fastllm-master: 54613 tokens/s",
    ]
    wrong = contender("fastllm", 0.12, 19e9, (2.0, 1.8))
    _, missed = train.judge("llama-1.2b", shape, [wrong, contender("transformers", 0.1, 1e9)], None)
    assert [line.split(":")[1].split()[0] for line in missed] == ["losses", "0.83x", "19.00"]
    assert len(train.judge("gpt2-124m", SHAPES["gpt2-124m"], [contender("fastllm", 3.0, 2.7e9)], 400.0)[1]) == 1
