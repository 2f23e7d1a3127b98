"""accelerate: the same numbers as plain transformers, in every way that a model is used; and undo."""

import copy

import pytest
import torch
import transformers
from _accelerate import DECODERS, OTHERS, assert_same, batch, build, step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from fastllm.integrations.transformers import accelerate

# ------------------------------------------------------------------------------------------------- the same, and undone


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", DECODERS + OTHERS)
def test_logits_loss_and_gradients(name, side):
    model, inputs = build(name), batch(side)
    plain = step(model, inputs)
    handle = accelerate(model, quiet=True)
    assert_same(step(model, inputs), plain, inputs)
    handle.undo()
    again = step(model, inputs)
    assert torch.equal(again[0], plain[0]) and all(torch.equal(again[2][n], g) for n, g in plain[2].items())


@pytest.mark.parametrize("name", ["smollm", "bert", "t5"])
def test_eager_attention_too(name):
    """Padded on the right: on the left rows that see nothing differ, zeros as SDPA has them, not a mean."""
    model, inputs = build(name, "eager"), batch("right")
    plain = step(model, inputs)
    accelerate(model, quiet=True)
    assert_same(step(model, inputs), plain, inputs)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "bert", "t5 gated"])
def test_undo_leaves_no_trace(name):
    model = build(name)
    objects = {n: (id(m), id(m.config) if hasattr(m, "config") else 0, set(vars(m))) for n, m in model.named_modules()}
    state, implementation = model.state_dict(keep_vars=True), model.config._attn_implementation
    handle = accelerate(model, quiet=True)
    assert model.config._attn_implementation == "fastllm"
    assert all(v is state[n] for n, v in model.state_dict(keep_vars=True).items())
    model.config.use_cache = False
    handle.undo()
    assert model.config._attn_implementation == implementation and model.config.use_cache is False
    after = {n: (id(m), id(m.config) if hasattr(m, "config") else 0, set(vars(m))) for n, m in model.named_modules()}
    assert after == objects
    handle.undo()  # once more changes nothing
    accelerate(model, quiet=True).undo()


def test_two_models_of_one_config():
    config = build("smollm").config
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    inputs = batch("left")
    before = step(second, inputs)
    accelerate(first, quiet=True)
    twin = copy.deepcopy(first)
    assert second.config is config and config._attn_implementation == "sdpa"
    after = step(second, inputs)
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(step(twin, inputs)[0], step(first, inputs)[0], atol=0, rtol=0)
    assert twin.model.layers[0].mlp.forward.__self__ is twin.model.layers[0].mlp


# ------------------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("name", ["smollm", "mistral", "qwen2 sliding", "qwen3", "gemma3", "gpt2", "t5 gated"])
def test_generate(name):
    model = build(name)
    model.generation_config = GenerationConfig(
        max_new_tokens=12, pad_token_id=0, eos_token_id=None, decoder_start_token_id=0
    )
    inputs = {k: v for k, v in batch("right" if name.startswith("t5") else "left").items() if k != "labels"}
    ways = [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}]
    with torch.no_grad():
        plain = [model.generate(**inputs, do_sample=False, **way) for way in ways]
        accelerate(model, quiet=True)
        for way, own in zip(ways, plain, strict=True):
            assert torch.equal(model.generate(**inputs, do_sample=False, **way), own), way


def test_static_cache_without_padding_and_chunks():
    model = build("mistral")
    ids = batch()["input_ids"]
    accelerated = copy.deepcopy(model)
    accelerate(accelerated, quiet=True)
    found = []
    for m in (model, accelerated):
        cache = transformers.StaticCache(config=m.config, max_cache_len=40)
        parts, at = [], 0
        with torch.no_grad():
            for piece in (7, 6, 1, 10):
                part = ids[:, at : at + piece]
                keyword = (
                    "cache" if "cache" in m.prepare_inputs_for_generation.__code__.co_varnames else "past_key_values"
                )
                position = torch.arange(at, at + piece)[None]
                parts.append(m(part, position_ids=position, **{keyword: cache}).logits)
                at += piece
        found.append(torch.cat(parts, 1))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------------------- the outputs


@pytest.mark.parametrize("name", ["smollm", "gemma3", "gpt2", "bert", "t5"])
def test_logits_are_made_when_read(name):
    model, inputs = build(name), batch("right")
    own = model(**inputs)
    accelerate(model, quiet=True)

    def call():
        outputs = model(**inputs)
        assert vars(outputs)["_logits"] is None if "_logits" in vars(outputs) else True
        return outputs

    assert list(call().keys()) == list(own.keys())
    reads = (lambda o: o.logits, lambda o: o["logits"], lambda o: o[1], lambda o: o.to_tuple()[1], lambda o: o[:2][1],
             lambda o: dict(o)["logits"], lambda o: dict(o.items())["logits"], lambda o: o.get("logits"),
             lambda o: list(o.values())[1], lambda o: copy.copy(o).logits)  # fmt: skip
    real = inputs["attention_mask"].bool()
    for read in reads:
        torch.testing.assert_close(read(call())[real], own.logits[real], atol=1e-4, rtol=0)
    outputs = call()
    assert outputs["loss"] is outputs.loss is outputs[0] and outputs.__dict__.get("_logits") is None
    assert isinstance(outputs, type(own)) and outputs.logits is outputs.logits
    outputs.logits.sum().backward()
    assert model(**inputs, return_dict=False)[1].shape == own.logits.shape
    if name != "t5":
        assert model(**inputs | {"labels": None}).logits.shape == own.logits.shape


@pytest.mark.parametrize("name", ["smollm", "bert"])
def test_logits_are_those_of_the_forward(name):
    """Not of a head that has changed since, which is an error, and in the forward's autocast."""
    model, inputs = build(name), batch("right")
    accelerate(model, quiet=True)
    outputs, kept = model(**inputs), model(**inputs)
    before = kept.logits
    outputs.loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    with pytest.raises(RuntimeError, match=r"the head has changed since this forward; read it before optimizer\.step"):
        outputs.logits  # noqa: B018
    assert kept.logits is before and model(**inputs).logits.shape == before.shape
    with torch.autocast("cpu", torch.bfloat16):
        outputs, plain = model(**inputs), model(**{k: v for k, v in inputs.items() if k != "labels"})
    assert outputs.logits.dtype == plain.logits.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.logits, plain.logits)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        outputs = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert outputs.logits.dtype == torch.float32
    with torch.inference_mode():
        assert model(**inputs).logits.shape == before.shape


def test_logits_have_a_gradient_where_the_forward_had_one():
    """Wherever they are read."""
    model, inputs = build("smollm"), batch()
    accelerate(model, quiet=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outputs = model(**inputs)
        assert not outputs.logits.requires_grad and outputs.logits.numpy().shape == (3, 24, 131)
        outputs = model(**inputs)
        with mode():
            outputs.logits.argmax(-1)
        outputs.logits.sum().backward()


def test_without_logits():
    model, inputs = build("smollm"), batch()
    own = model(**inputs)
    accelerate(model, logits=False, quiet=True)
    outputs = model(**inputs)
    assert outputs.logits is None and "logits" not in outputs
    torch.testing.assert_close(outputs.loss, own.loss)


def test_logits_are_not_in_memory(monkeypatch):
    """No tensor of [T, V] is made by a step that reads the loss alone."""
    monkeypatch.setattr("fastllm.ops._head.CPU_BYTES", 1 << 18)
    model, inputs = build("smollm"), batch()
    model.lm_head = nn.Linear(64, 4096, bias=False)
    model.config.vocab_size = 4096
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            results = out if isinstance(out, tuple) else (out,)
            made.extend((t.numel(), str(function)) for t in results if isinstance(t, torch.Tensor))
            return out

    accelerate(model, quiet=True)
    with Watch():
        model(**inputs).loss.backward()
    assert max(made)[0] < inputs["input_ids"].numel() * 4096, max(made)


@pytest.mark.parametrize(
    "arguments", [{"num_items_in_batch": 17}, {"shift_labels": True}, {"ignore_index": 7}, {"logits_to_keep": 0}]
)
def test_arguments_of_the_loss(arguments):
    model, inputs = build("qwen3"), batch("left")
    if "shift_labels" in arguments:
        arguments = {"shift_labels": inputs["labels"].roll(3, 1)}
    inputs["labels"] = inputs["labels"].clamp_min(7) if "ignore_index" in arguments else inputs["labels"]
    inputs |= arguments
    plain = step(model, inputs)
    accelerate(model, quiet=True)
    assert_same(step(model, inputs), plain, inputs)


def test_another_loss_is_left_alone():
    model, inputs = build("smollm"), batch()
    accelerate(model, quiet=True)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.mean() * 0 + 42
    assert model(**inputs).loss == 42


@pytest.mark.parametrize("name", ["smollm", "gpt2", "bert", "t5"])
def test_attention_weights_and_hidden_states(name):
    model, inputs = build(name, "eager"), batch("right")
    inputs |= {"output_attentions": True, "output_hidden_states": True}
    own = model(**inputs)
    accelerate(model, quiet=True)
    outputs = model(**inputs)
    real = inputs["attention_mask"].bool()
    keys = ("encoder_attentions", "encoder_hidden_states") if name == "t5" else ("attentions", "hidden_states")
    for key in keys:
        assert len(outputs[key]) == len(own[key]) > 0
        for found, wanted in zip(outputs[key], own[key], strict=True):
            found, wanted = (t.transpose(1, 2) if key.endswith("attentions") else t for t in (found, wanted))
            torch.testing.assert_close(found[real], wanted[real], atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "more",
    [
        {},
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"label_smoothing_factor": 0.1}, marks=pytest.mark.slow),
    ],
)
def test_trainer(tmp_path, more):
    rows = [{k: v[0] for k, v in batch(rows=1).items()} for _ in range(16)]

    def losses(accelerated):
        model = build("qwen2")
        if accelerated:
            accelerate(model, quiet=True)
        settings = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2,
            logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, eval_strategy="steps", eval_steps=3,
            save_steps=3, **more,
        )  # fmt: skip
        trainer = transformers.Trainer(model, settings, train_dataset=rows, eval_dataset=rows[:4])
        trainer.train()
        predicted = trainer.predict(rows[:4])
        history = [h[k] for h in trainer.state.log_history for k in ("loss", "eval_loss") if k in h]
        return torch.tensor(history), torch.tensor(predicted.predictions)

    (found, logits), (wanted, own) = losses(True), losses(False)
    assert len(found) == 4
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, own, atol=2e-3, rtol=0)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "bert", "t5"])
def test_gradient_checkpointing(name):
    model, inputs = build(name).train(), batch("right")
    plain = step(model, inputs)
    accelerate(model, quiet=True)
    model.gradient_checkpointing_enable()
    assert_same(step(model, inputs), plain, inputs)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_dropout_of_attention(name):
    changes = {"gpt2": {"attn_pdrop": 0.5}, "bert": {"attention_probs_dropout_prob": 0.5}, "t5": {"dropout_rate": 0.3}}[
        name
    ]
    model, inputs = build(name, **changes), batch("right")
    accelerate(model, quiet=True)
    still = step(model, inputs)
    model.train()

    def drawn(seed):
        torch.manual_seed(seed)
        return step(model, inputs)

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(first[0], again[0]) and all(torch.equal(first[2][n], again[2][n]) for n in first[2])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], still[0])
    model.gradient_checkpointing_enable()  # draws the same mask again
    assert_same(drawn(1), first, inputs)


@pytest.mark.parametrize("first", ["peft", "accelerate"])
def test_peft(first):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    inputs = batch("left")

    def wrapped(accelerated):
        model = build("qwen2")
        torch.manual_seed(1)
        if accelerated and first == "accelerate":
            accelerate(model, quiet=True)
        model = peft.get_peft_model(model, settings)
        handle = accelerate(model, quiet=True) if accelerated and first == "peft" else None
        return model, handle

    plain = step(wrapped(False)[0], inputs)
    model, handle = wrapped(True)
    assert_same(step(model, inputs), plain, inputs)
    assert set(plain[2]) and all("lora" in n for n in plain[2])
    if handle:
        assert any("lora" in what.lower() or "Linear" in what for what, _ in handle.report.left)
        handle.undo()
        assert torch.equal(step(model, inputs)[0], plain[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm", "gemma3", "gpt2", "bert", "t5 gated"])
def test_compiles_into_one_graph(name):
    model, inputs = build(name), batch("left" if name != "bert" else "right")
    plain = step(model, inputs)
    accelerate(model, quiet=True)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(step_of(compiled, model, inputs), plain, inputs)


def step_of(compiled, model, inputs):
    model.zero_grad(set_to_none=True)
    outputs = compiled(**inputs)
    outputs.loss.backward()
    return (
        outputs.logits.detach(),
        outputs.loss.detach(),
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    )


def test_compiles_without_logits():
    model, inputs = build("llama with biases"), batch()
    plain = step(model, inputs)
    accelerate(model, logits=False, quiet=True)
    torch.compiler.reset()
    model.zero_grad(set_to_none=True)
    loss = torch.compile(model, fullgraph=True, backend="eager")(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, plain[1])
    torch.testing.assert_close(model.lm_head.weight.grad, plain[2]["lm_head.weight"], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm", "gpt2"])
def test_compiles_with_inductor(name):
    model, inputs = build(name), batch("left")
    plain = step(model, inputs)
    accelerate(model, quiet=True)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    assert_same(step_of(compiled, model, inputs), plain, inputs)
