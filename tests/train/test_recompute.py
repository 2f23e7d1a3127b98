"""Layers that are computed again in the backward: the bits of those that are kept, dropout included, and less to keep."""

import dataclasses

import pytest
import torch
from _training import VOCAB, batches, decoder, equal, parameters
from torch.multiprocessing.reductions import StorageWeakRef

from fastllm import models, ops
from fastllm.data.packed import Packed
from fastllm.models.blocks import activated, recomputing
from fastllm.models.decoder import TRAITS
from fastllm.models.encoder import Encoder, EncoderConfig
from fastllm.models.seq2seq import Seq2Seq, Seq2SeqConfig
from fastllm.ops import Dropout
from fastllm.train.loop import LoopOptions, fit
from fastllm.train.objective import next_token_loss

T5 = {"position": "relative", "norm": "rms", "norm_first": True, "bias": False, "activation": "geglu_tanh"}
BERT = {"vocab": VOCAB, "layers": 3, "dim": 32, "ffn": 48, "heads": 4, "max_position": 64}
SIZES = {"vocab": VOCAB, "encoder_layers": 2, "decoder_layers": 3, "dim": 32, "ffn": 48, "heads": 4, "head_dim": 8}


def hidden_of_encoder(model):
    return model.packed_hidden(Packed.of_lists([list(range(1, 20)), list(range(30, 40))]))


def hidden_of_seq2seq(model):
    source, target = torch.arange(40).view(2, 20), torch.arange(60, 78).view(2, 9)
    return model.hidden(source, target, source % 20 < 15)


MODELS = {
    **{name: (lambda traits=traits: decoder(layers=3, **traits), None) for name, traits in TRAITS.items()},
    "bert": (lambda: Encoder(EncoderConfig(**BERT)), hidden_of_encoder),
    "transformer": (lambda: Seq2Seq(Seq2SeqConfig(**SIZES)), hidden_of_seq2seq),
    "t5": (lambda: Seq2Seq(Seq2SeqConfig(**SIZES, **T5)), hidden_of_seq2seq),
}


@pytest.fixture
def dropping(monkeypatch):
    """Attention with dropout, by a counter of the calls of a step, as a model that has it would draw it."""
    calls = []

    def dropped(op, spec):
        calls.append(op)
        return dataclasses.replace(spec, dropout=Dropout(0.3, seed=11, call=int(spec.causal)))

    dense, packed = ops.attention, ops.attention_varlen
    monkeypatch.setattr(ops, "attention", lambda q, k, v, spec: dense(q, k, v, dropped("dense", spec)))
    monkeypatch.setattr(
        ops, "attention_varlen", lambda q, k, v, a, b, spec: packed(q, k, v, a, b, dropped("packed", spec))
    )
    return calls


def step(model, hidden) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """The loss, all gradients, and the bytes that wait for the backward."""
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        x = model.hidden(torch.arange(100).view(2, 50)) if hidden is None else hidden(model)
        loss = x.square().mean()
    held = sum(kept.values()) - sum(p.nbytes for p in model.parameters() if p.data_ptr() in kept)
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    for p in model.parameters():
        p.grad = None
    return loss.detach(), found, held


@pytest.mark.parametrize("name", MODELS)
def test_the_bits_are_the_same_and_less_is_kept(name, dropping):
    torch.manual_seed(0)
    make, hidden = MODELS[name]
    model = make()
    names = list(model.state_dict())
    loss, wanted, held = step(model, hidden)
    once = len(dropping)
    with recomputing(model):
        again, found, less = step(model, hidden)
        assert list(model.state_dict()) == names and len(dropping) == 3 * once  # one more forward
    assert torch.equal(again, loss) and len(wanted) > 15 and equal(found, wanted)
    assert less < 0.6 * held
    dropping.clear()
    step(model, hidden)
    assert len(dropping) == once  # as before


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name != "transformer"]
)  # whose relu keeps its result itself
def test_activations_are_made_again(name, monkeypatch):
    """What the second projection of an MLP reads is not kept, and the gradients have the same bits."""
    made: list[StorageWeakRef] = []

    def watched(layer, activation, h, last):
        def noted(h):
            y = activation(h)
            made.append(StorageWeakRef(y.untyped_storage()))
            return y

        return activated(layer, noted, h, last)

    torch.manual_seed(0)
    make, hidden = MODELS[name]
    model, found = make(), {}
    ways = {"kept": lambda layer, activation, h, last: last(activation(h)), "again": watched}
    for way, either in ways.items():
        for module in (models.decoder, models.layers):
            monkeypatch.setattr(module, "activated", either)
        x = model.hidden(torch.arange(100).view(2, 50)) if hidden is None else hidden(model)
        once = len(made)
        assert all(ref.expired() for ref in made)
        x.square().mean().backward()
        found[way] = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
    assert once >= 3 and len(made) == 2 * once and equal(found["kept"], found["again"])


def test_where_activations_are_kept():
    """Without a gradient, in a layer that is computed again as a whole, and where two roundings would differ from one."""
    model, calls = decoder(), []
    layer, h = model.layers[0], torch.randn(3, 8, requires_grad=True)

    def activation(h):
        calls.append(h)
        return h * 2

    with torch.no_grad():
        assert not activated(layer, activation, h, lambda y: y * y).requires_grad
    with recomputing(model):
        activated(layer, activation, h, lambda y: y * y).sum().backward()
    assert len(calls) == 2
    activated(layer, activation, h, lambda y: y * y).sum().backward()
    assert len(calls) == 5  # the second factor of a product is kept too
    first = model.layers[0].gate_up
    assert first.gates_apart(torch.ones(1)) and not first.gates_apart(torch.ones(1).half())


def test_a_run_has_the_same_bits(tmp_path):
    models = decoder(), decoder()
    for model, again in zip(models, (False, True), strict=True):
        options = LoopOptions(steps=6, lr=1e-2, recompute=again)
        fit(model, batches(tmp_path), next_token_loss, tmp_path / f"run{again}", options)
        assert not any(layer.recompute for layer in model.layers)
    assert equal(*map(parameters, models))


def test_a_model_without_such_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Linear has no layer that can be recomputed; train it with recompute=False"):
        fit(torch.nn.Linear(2, 2), batches(tmp_path), None, tmp_path / "run", LoopOptions(steps=1, recompute=True))
