"""Parameters in bfloat16 with a float32 master of each: the whole loop, on a CPU."""

import pytest
import safetensors.torch
import torch
from _training import batches, decoder, equal, parameters

from fastllm.train.checkpoint import TENSORS, CheckpointError, Checkpoints
from fastllm.train.loop import LoopOptions, fit
from fastllm.train.objective import next_token_loss

OPTIONS = LoopOptions(steps=60, lr=5e-3, warmup=5, accumulate=2, log_every=1, save_every=30)


def trained(tmp_path, name: str, dtype: torch.dtype) -> tuple[float, torch.nn.Module]:
    model = decoder().to(dtype)
    losses = []
    fit(model, batches(tmp_path), next_token_loss, tmp_path / name, OPTIONS, watch=[lambda r: losses.append(r["loss"])])
    return sum(losses[-10:]) / 10, model


def test_it_learns_what_float32_learns_and_goes_on_with_the_same_bits(tmp_path):
    wide, _ = trained(tmp_path, "float32", torch.float32)
    narrow, model = trained(tmp_path, "bfloat16", torch.bfloat16)
    assert wide < 2 and narrow == pytest.approx(wide, rel=0.03)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    checkpoints = Checkpoints(tmp_path / "bfloat16")
    whole = safetensors.torch.load_file(checkpoints.path(60) / TENSORS)
    masters = [name for name in whole if name.endswith(".master")]
    assert len(masters) == len(parameters(model))
    for name in masters:
        weight = whole["model." + name.removeprefix("optimizer.").removesuffix(".master")]
        assert whole[name].dtype == torch.float32 and torch.equal(whole[name].bfloat16(), weight)
    for path in (checkpoints.path(60) / TENSORS, checkpoints.path(60) / "state.json"):
        path.unlink()
    checkpoints.path(60).rmdir()
    other = decoder(seed=1).bfloat16()
    fit(other, batches(tmp_path), next_token_loss, tmp_path / "bfloat16", OPTIONS, resume=True)
    assert equal(parameters(other), parameters(model))
    again = safetensors.torch.load_file(checkpoints.path(60) / TENSORS)
    assert all(torch.equal(again[name], whole[name]) for name in whole if not name.startswith("random."))


def test_a_checkpoint_in_another_dtype_is_refused(tmp_path):
    options = LoopOptions(steps=2)
    fit(decoder(), batches(tmp_path), next_token_loss, tmp_path / "run", options)
    with pytest.raises(CheckpointError, match=r"torch.float32, the model's is .*torch.bfloat16"):
        fit(decoder().bfloat16(), batches(tmp_path), next_token_loss, tmp_path / "run", options, resume=True)
