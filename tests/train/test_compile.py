"""The loss by torch.compile: what it is without, for batches of all shapes, from one compilation or two."""

import pytest
import torch
from _training import batches, decoder

from fastllm.train.loop import LoopOptions, fit
from fastllm.train.objective import next_token_loss


def test_losses_are_the_same_and_shapes_do_not_compile_again(tmp_path, monkeypatch):
    """All but the last stage of the compiler, which takes half a minute."""
    compile, counts = torch.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch, "compile", lambda loss: compile(loss, backend="aot_eager"))
    found = {False: trained(tmp_path / "plain", compiled=False)}
    torch._dynamo.reset()
    counts.clear()
    found[True] = trained(tmp_path / "compiled", compiled=True)
    assert len(found[True]) == 12 and found[True] == pytest.approx(found[False], rel=1e-5)
    assert counts["stats"]["unique_graphs"] == 2 and not counts["graph_break"]  # one shape, then any


@pytest.mark.slow
def test_losses_of_the_whole_compiler(tmp_path):
    torch._dynamo.reset()
    found = trained(tmp_path / "plain", compiled=False), trained(tmp_path / "compiled", compiled=True)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def trained(folder, compiled: bool) -> list[float]:
    folder.mkdir()
    losses = []
    options = LoopOptions(steps=12, lr=1e-2, log_every=1, compile=compiled)
    fit(
        decoder(layers=1), batches(folder), next_token_loss, folder, options, watch=[lambda r: losses.append(r["loss"])]
    )
    return losses
