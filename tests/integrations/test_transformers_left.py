"""accelerate: what a kernel cannot take stays and is named; the report; bad input."""

import pytest
import torch
from _accelerate import VOCAB, assert_same, batch, build, step
from _families import build as decoder
from torch import nn

from fastllm.integrations.transformers import FAMILIES, accelerate

# ------------------------------------------------------------------------------------------------- what is left, and why


class Quantised(nn.Module):
    """A linear of 8-bit weights, as a quantiser puts it in a linear's place."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() * self.scale)


def test_a_quantised_model_keeps_its_linears():
    model, inputs = build("smollm"), batch("left")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Quantised(child))
    with torch.no_grad():
        own = model(**inputs)
        handle = accelerate(model, quiet=True)
        found = model(**inputs)
    torch.testing.assert_close(found.loss, own.loss)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], own.logits[real], atol=1e-4, rtol=0)
    assert handle.report.replaced["LlamaRMSNorm", "rms_norm"] == 5
    assert ("the loss of LlamaForCausalLM", "the head is a Quantised, not nn.Linear") in handle.report.left


def test_hooks_of_a_device_map_stay():
    hooks = pytest.importorskip("accelerate")
    model, inputs = build("qwen3"), batch("left")
    with torch.no_grad():
        own = model(**inputs).logits
        hooks.cpu_offload(model, execution_device="cpu")
        handle = accelerate(model, quiet=True)
        found = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], own[real], atol=1e-4, rtol=0)
    assert any("somebody else" in reason for _, reason in handle.report.left)


def test_float64_meta_and_mixed():
    model, inputs = build("smollm").double(), batch()
    own = step(model, inputs)
    handle = accelerate(model, quiet=True)
    found = step(model, inputs)
    torch.testing.assert_close(found[0], own[0])
    assert ("LlamaRMSNorm", "its weight is float64") in handle.report.left
    handle.undo()
    report = str(accelerate(build("smollm").to("meta"), quiet=True).report)
    assert "device meta" in report
    model = build("smollm")
    accelerate(model, quiet=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
        loss.backward()
    torch.testing.assert_close(loss, own[1], atol=5e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "bert", "t5 gated"])
def test_half_precision(name, dtype):
    """No further from float32 than plain transformers is."""
    wide, inputs = build(name), batch("right")
    truth = wide(**inputs).logits.detach()
    model = wide.to(dtype)
    real = inputs["attention_mask"].bool()
    own = (model(**inputs).logits.float() - truth)[real].abs().mean()
    accelerate(model, quiet=True)
    assert (model(**inputs).logits.float() - truth)[real].abs().mean() <= 1.3 * own


def test_an_unusual_activation_and_hooks():
    model, inputs = build("smollm", hidden_act="relu2"), batch()
    seen = []
    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *_: seen.append(1))
    model.lm_head.register_forward_hook(lambda *_: seen.append(2))
    own = step(model, inputs)
    handle = accelerate(model, quiet=True)
    assert ("LlamaMLP", "its activation is ReLUSquaredActivation") in handle.report.left
    seen.clear()
    assert_same(step(model, inputs), own, inputs)
    assert sorted(seen) == [1, 2]


@pytest.mark.parametrize("name", ["smollm", "gemma3", "gpt2", "bert", "t5 gated"])
@pytest.mark.parametrize("kind", ["forward_hook", "full_backward_pre_hook"])
def test_hooks_are_called_on_every_module(name, kind):
    """Of those whose work a kernel does inside another one's, each alone: a hook on one must not depend on one on another."""
    model, inputs, seen = build(name), batch(), set()
    listened = {n: getattr(m, f"register_{kind}")(lambda *_, n=n: seen.add(n)) for n, m in model.named_modules() if n}
    step(model, inputs)
    for hook in listened.values():
        hook.remove()
    accelerate(model, quiet=True)
    inner = ("act_fn", "act", "LayerNorm", "post_attention_layernorm", "cls", "predictions", "decoder", "lm_head")
    for module in sorted(n for n in seen if n.rsplit(".", 1)[-1] in inner):
        called = []
        hook = getattr(model.get_submodule(module), f"register_{kind}")(lambda *_, called=called: called.append(1))
        step(model, inputs)
        hook.remove()
        assert called, module


def test_an_attention_of_ones_own_stays():
    handle = accelerate(decoder("gemma3 softcap, scaled"), quiet=True)
    assert handle.model.config._attn_implementation == "capped"
    assert any("'capped'" in reason for _, reason in handle.report.left)


# --------------------------------------------------------------------------------------------------- report, bad input


def test_report(capsys):
    model = build("smollm")
    handle = accelerate(model)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "rms_norm" in line and "linear_cross_entropy" in line
    assert handle.report.replaced["LlamaAttention", "rope, attention"] == 2
    assert handle.report.replaced["Linear", "linear"] == 15 and not handle.report.left
    text = str(handle.report)
    assert all(word in text for word in ("replaced", "LlamaMLP: swiglu", "note"))
    handle.undo()
    accelerate(model, quiet=True)
    assert not capsys.readouterr().out


def test_bad_input():
    with pytest.raises(TypeError, match=r"Linear is no transformers.PreTrainedModel"):
        accelerate(nn.Linear(2, 2))
    bloom = decoder("bloom")
    with pytest.raises(ValueError, match=r"'bloom'; known are llama, mistral, qwen2") as error:
        accelerate(bloom)
    assert all(family in str(error.value) for family in FAMILIES)
    model = build("smollm")
    handle = accelerate(model, quiet=True)
    with pytest.raises(ValueError, match="accelerated already; call undo"):
        accelerate(model)
    inner = model.model.norm.forward
    model.model.norm.forward = lambda x: inner(x)
    with pytest.raises(RuntimeError, match="LlamaRMSNorm was replaced after accelerate"):
        handle.undo()
    model.model.norm.forward = inner
    handle.undo()
    assert "forward" not in vars(model.model.norm)


def test_labels_out_of_range_and_none_at_all():
    model, inputs = build("smollm"), batch()
    accelerate(model, quiet=True)
    with pytest.raises(IndexError, match="131"):
        model(**inputs | {"labels": inputs["labels"].clamp_min(0) + VOCAB})
    assert model(**inputs | {"labels": torch.full_like(inputs["labels"], -100)}).loss == 0
