"""Rates, clipping, decay: the optimizer beside torch's."""

import math

import pytest
import torch

from fastllm.train.optim import Optimizer, OptimOptions


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", {1: 0.5, 2: 1.0, 6: 1.0, 10: 1.0}),
        ("linear", {1: 0.5, 2: 1.0, 6: 0.55, 10: 0.1}),
        ("cosine", {1: 0.5, 2: 1.0, 6: 0.55, 4: 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 10: 0.1}),
        ("wsd", {1: 0.5, 2: 1.0, 8: 1.0, 9: 0.55, 10: 0.1}),
    ],
)
def test_rates(schedule, rates):
    options = OptimOptions(lr=3.0, schedule=schedule, warmup=2, final_lr=0.1)
    for step, share in rates.items():
        assert options.rate(step, 10) == pytest.approx(3 * share)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))


def test_steps_are_torchs(monkeypatch):
    ours, theirs = model(), model()
    optimizer = Optimizer(ours, OptimOptions(lr=0.1, warmup=2, clip=0.5, weight_decay=0.2), steps=8)
    kinds = [p for p in theirs.parameters() if p.dim() >= 2], [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": kinds[0], "weight_decay": 0.2}, {"params": kinds[1], "weight_decay": 0.0}]
    torchs = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(1, 9):
        x = torch.randn(4, 6)
        for group in torchs.param_groups:
            group["lr"] = optimizer.options.rate(step, 8)
        for m in (ours, theirs):
            (m(x).square().sum() * (10 if step % 2 else 0.01)).backward()  # clipped, and not
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        torchs.step()
        torchs.zero_grad()
        torch.testing.assert_close(optimizer.step(), norm)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert optimizer.done == 8 and all(p.grad is None for p in ours.parameters())


def test_the_rate_of_a_parameter_by_its_size():
    ours, theirs = model(), model()
    with torch.no_grad():
        for m in (ours, theirs):
            m[0].weight.mul_(30)
            m[2].bias.zero_()
    optimizer = Optimizer(ours, OptimOptions(lr=0.01, clip=None, weight_decay=0.2, scale_parameter=True), steps=8)
    torchs = torch.optim.AdamW([{"params": [p]} for p in theirs.parameters()], betas=(0.9, 0.95), eps=1e-8)
    for step in range(1, 9):
        x = torch.randn(4, 6)
        for group in torchs.param_groups:
            (p,) = group["params"]
            group["lr"] = optimizer.options.rate(step, 8) * max(1e-3, p.detach().square().mean().sqrt().item())
            group["weight_decay"] = 0.2 if p.dim() >= 2 else 0.0
        for m in (ours, theirs):
            m(x).square().sum().backward()
        optimizer.step()
        torchs.step()
        torchs.zero_grad()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert (ours[2].bias != 0).all()


def test_a_gradient_that_is_not_finite_changes_nothing():
    m = model()
    optimizer = Optimizer(m, OptimOptions(lr=0.1), steps=4)
    m(torch.ones(2, 6)).sum().backward()
    m[0].weight.grad[1, 2] = math.inf
    before = [t.clone() for t in (*m.parameters(), *(t for _, t in optimizer.tensors()))]
    assert optimizer.step() == math.inf
    assert all(
        torch.equal(a, b) for a, b in zip(before, (*m.parameters(), *(t for _, t in optimizer.tensors())), strict=True)
    )


def test_parameters_in_bfloat16_have_a_master():
    m = model().bfloat16()
    m[1].requires_grad_(False)
    optimizer = Optimizer(m, OptimOptions(lr=1e-4), steps=100)
    assert {name for name, _ in optimizer.tensors() if name.endswith("master")} == {
        f"{n}.master" for n, p in m.named_parameters() if p.requires_grad
    }
    for _ in range(20):
        m(torch.ones(2, 6, dtype=torch.bfloat16)).float().sum().backward()
        optimizer.step()
    master = optimizer.states["0.weight"].master
    assert torch.equal(master.bfloat16(), m[0].weight) and not torch.equal(master, m[0].weight.float())


def test_what_cannot_be_trained_is_refused():
    frozen = model().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that needs a gradient"):
        Optimizer(frozen, OptimOptions(), steps=1)
    optimizer = Optimizer(model(), OptimOptions(), steps=1)
    with pytest.raises(RuntimeError, match="no parameter has a gradient; call backward"):
        optimizer.step()
    with pytest.raises(ValueError, match="another model's: 0.bias.exp_avg"):
        optimizer.load({}, done=1)
