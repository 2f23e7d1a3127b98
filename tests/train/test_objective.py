"""Losses beside transformers in float64 and beside the plain forward; training, and the folder that comes out of it."""

import json
import math

import pytest
import torch
import transformers as hf
from _training import batches, decoder, encoder, equal, masked_batches, pair_batches, parameters, seq2seq

from fastllm import models
from fastllm.data.batch import IGNORE
from fastllm.models import hf_encoder, hf_seq2seq
from fastllm.train.loop import LOG, LoopOptions, fit
from fastllm.train.objective import masked_loss, masked_tokens, next_token_loss, pair_loss
from fastllm.train.validation import held_out, unigram

OPTIONS = LoopOptions(steps=40, lr=1e-2, warmup=5, log_every=1)
ENCODERS = {
    "bert": {},
    "roberta": {"skip_padding": True, "pad_id": 0, "types": 1, "eps": 1e-5},
    "head of its own": {"tied": False},
}
SEQ2SEQS = {"t5": {}, "flan": {"activation": "geglu_tanh", "tied": False, "head_scale": 1.0}}
ORIGINAL = {
    "position": "sinusoidal", "norm": "layer", "norm_first": False, "bias": True, "scale": None, "eps": 1e-5,
    "head_scale": 1.0, "embed_scale": 8.0,
}  # fmt: skip


def padded(packed, values=None, fill=0):
    """What belongs to packed sequences, in rows; and where it is."""
    rows = (packed.ids if values is None else values).split(packed.cu.diff().tolist())
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def mask_of(packed):
    return padded(packed, torch.ones_like(packed.ids)).bool()


def masked_inputs(batch):
    return {"input_ids": padded(batch.packed), "attention_mask": mask_of(batch.packed).long()}, padded(
        batch.packed, batch.target, IGNORE
    )


def pair_inputs(batch):
    said = batch.said
    inputs = {"input_ids": padded(batch.source), "attention_mask": mask_of(batch.source).long()}
    return inputs | {"decoder_input_ids": padded(said.packed)}, padded(said.packed, said.target, IGNORE)


def plain_loss(logits, target):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")


def check_against_transformers(ours, loss, names, theirs, inputs, target):
    """The value and all gradients, ours in float32, theirs in float64."""
    wanted = plain_loss(theirs(**inputs).logits, target)
    wanted.backward()
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    found, norm = dict(theirs.named_parameters()), math.sqrt(sum(p.grad.square().sum() for p in theirs.parameters()
                                                                 if p.grad is not None))  # fmt: skip
    seen = set()
    for name, parameter in ours.named_parameters():
        stored = [n.split("|")[0] for n in names.ours[name]]
        seen.update(stored)
        wanted = torch.cat([found[n].grad for n in stored])
        assert (parameter.grad - wanted).norm() <= 2e-6 * norm, name
    assert seen >= {n for n, p in found.items() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("kind", ENCODERS)
def test_masked_loss_is_that_of_transformers(kind, tmp_path):
    ours, batch = encoder(seed=1, **ENCODERS[kind]), next(masked_batches(tmp_path))
    models.save(ours, tmp_path / "model")
    family = hf.RobertaForMaskedLM if kind == "roberta" else hf.BertForMaskedLM
    theirs = family.from_pretrained(tmp_path / "model", attn_implementation="eager").double().eval()
    names = hf_encoder.names(ours.config, "roberta." if kind == "roberta" else "bert.")
    check_against_transformers(ours, masked_loss(ours, batch), names, theirs, *masked_inputs(batch))


@pytest.mark.parametrize("kind", SEQ2SEQS)
def test_pair_loss_is_that_of_transformers(kind, tmp_path):
    ours, batch = seq2seq(seed=1, **SEQ2SEQS[kind]), next(pair_batches(tmp_path))
    models.save(ours, tmp_path / "model")
    theirs = hf.T5ForConditionalGeneration.from_pretrained(tmp_path / "model").double().eval()
    names = hf_seq2seq.t5_names(ours.config)
    check_against_transformers(ours, pair_loss(ours, batch), names, theirs, *pair_inputs(batch))


def gradients(model, loss) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def check_against_forward(model, loss, plain):
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for (name, _), got, wanted in zip(
        model.named_parameters(), gradients(model, loss), gradients(model, plain), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()) + 1e-6, msg=name)


def test_masked_loss_is_that_of_the_forward(tmp_path):
    model, batch = encoder(seed=1), next(masked_batches(tmp_path))
    inputs, target = masked_inputs(batch)
    check_against_forward(model, masked_loss(model, batch), plain_loss(model(*inputs.values()), target))


@pytest.mark.parametrize("changed", [{}, ORIGINAL, ORIGINAL | {"position": "learned", "head_bias": True}])
def test_pair_loss_is_that_of_the_forward(changed, tmp_path):
    model, batch = seq2seq(seed=1, **changed), next(pair_batches(tmp_path))
    inputs, target = pair_inputs(batch)
    logits = model(inputs["input_ids"], inputs["decoder_input_ids"], inputs["attention_mask"])
    check_against_forward(model, pair_loss(model, batch), plain_loss(logits, target))


def test_weights_count(tmp_path):
    model, batch = encoder(), next(masked_batches(tmp_path))
    whole = masked_loss(model, batch).item()
    chosen = batch.weight.nonzero()[:, 0]
    parts = []
    for n in (0, 1):
        batch.weight.zero_()
        batch.weight[chosen[n::2]] = 1.0
        parts.append(masked_loss(model, batch).item())
    batch.weight[chosen[0::2]] = 0.5
    assert masked_loss(model, batch).item() == pytest.approx(0.5 * parts[0] + parts[1], rel=1e-5)
    assert sum(parts) == pytest.approx(whole, rel=1e-5)


def test_only_chosen_places_go_through_the_head(tmp_path):
    model, batch = encoder(), next(masked_batches(tmp_path))
    chosen = int((batch.target != IGNORE).sum())
    assert masked_tokens(model, batch).hidden.shape == (chosen, 64) and chosen < len(batch.target) / 4
    batch.weight.zero_()  # a batch among others in which nothing is said
    nothing = masked_loss(model, batch)
    nothing.backward()
    assert nothing.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_models_without_what_it_takes(tmp_path):
    with pytest.raises(ValueError, match="the model's head is None; masked tokens need"):
        masked_loss(encoder(head=None), next(masked_batches(tmp_path)))
    with pytest.raises(ValueError, match="10 tokens, the model has 8 positions"):
        masked_loss(encoder(max_position=8), next(masked_batches(tmp_path)))
    batch = next(pair_batches(tmp_path))
    model = seq2seq()
    with pytest.raises(ValueError, match="targets for 1 sources"):
        model.decode_packed(batch.said.packed, model.encode_lists([[1, 2]]))


# -------------------------------------------------------------------------------------------------------------- training

STAGES = {
    "encoder": (encoder, masked_batches, masked_loss, hf.BertForMaskedLM, masked_inputs),
    "seq2seq": (seq2seq, pair_batches, pair_loss, hf.T5ForConditionalGeneration, pair_inputs),
}


@pytest.mark.parametrize("arch", STAGES)
def test_it_learns_goes_on_and_transformers_reads_it(arch, tmp_path):
    make, source, loss, family, inputs_of = STAGES[arch]
    held = list(source(tmp_path, epochs=1, seed=9))[:4]
    model, before = make(), held_out(make(), held, loss)
    fit(model, source(tmp_path), loss, tmp_path / "run", OPTIONS, validate=lambda m: held_out(m, held, loss)["loss"])
    after, baseline = held_out(model, held, loss), unigram(held)
    assert after["loss"] < baseline["loss"] < before["loss"] and after["accuracy"] > baseline["accuracy"]
    log = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert log[-1]["validation"] == pytest.approx(after["loss"])

    short, other = LoopOptions(**{**vars(OPTIONS), "save_every": 15}), make(seed=5)

    def stop(record):
        if record["step"] == 17:  # two behind the checkpoint
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(make(), source(tmp_path), loss, tmp_path / "cut", short, watch=[stop])
    fit(other, source(tmp_path), loss, tmp_path / "cut", OPTIONS, resume=True)
    assert equal(parameters(other), parameters(model))

    models.save(model, tmp_path / "model")
    theirs = family.from_pretrained(tmp_path / "model").eval()
    inputs, target = inputs_of(held[0])
    with torch.no_grad():
        logits = theirs(**inputs).logits
        ours = model(*(inputs[k] for k in ("input_ids", "decoder_input_ids", "attention_mask") if k in inputs))
    kept = target != IGNORE
    assert (ours[kept] - logits[kept]).abs().max() <= 1e-5 * logits[kept].abs().max()


# ------------------------------------------------------------------------------------------------------------ validation


@pytest.mark.parametrize(
    ("make", "source", "loss"),
    [(decoder, batches, next_token_loss), *(stage[:3] for stage in STAGES.values())],
)
def test_held_out(make, source, loss, tmp_path, monkeypatch):
    model, held = make(), list(source(tmp_path, epochs=1))[:3]
    weight = sum(float(b.weight.sum()) for b in held)
    wanted = sum(loss(model, b).item() for b in held) / weight
    whole = held_out(model, held, loss)
    assert whole["loss"] == pytest.approx(wanted, rel=1e-6) and model.training
    monkeypatch.setattr("fastllm.train.validation.LOGITS", 1000)  # blocks of three rows
    blocks = held_out(model, held, loss)
    assert blocks["loss"] == pytest.approx(whole["loss"]) and blocks["accuracy"] == whole["accuracy"]


def test_accuracy_counts(tmp_path):
    model, (batch, *_) = encoder(), list(masked_batches(tmp_path, epochs=1))
    inputs, target = masked_inputs(batch)
    best = model(*inputs.values()).argmax(-1)
    kept = target != IGNORE
    share = (best[kept] == target[kept]).float().mean().item()
    assert held_out(model, [batch], masked_loss)["accuracy"] == pytest.approx(share)
    batch.target[batch.weight > 0] = best[kept]
    assert held_out(model, [batch], masked_loss)["accuracy"] == 1.0


def test_what_cannot_be_validated(tmp_path):
    with pytest.raises(ValueError, match="allowed: next_token_loss, masked_loss, pair_loss"):
        held_out(encoder(), [], lambda model, batch: None)
    for figures in (lambda: held_out(encoder(), [], masked_loss), lambda: unigram([])):
        with pytest.raises(ValueError, match=r"weigh 0\.0; give batches"):
            figures()


def test_unigram(tmp_path):
    """By hand: a, a, b, and one that does not count."""
    batch = next(batches(tmp_path))
    batch.target[:4], batch.weight[:] = torch.tensor([7, 7, 9, 3]), 0
    batch.weight[:3] = 1
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert unigram([batch]) == {"loss": pytest.approx(entropy), "accuracy": pytest.approx(2 / 3)}
    batch.weight[2] = 2
    assert unigram([batch, batch])["accuracy"] == pytest.approx(0.5)
    pairs = list(pair_batches(tmp_path, epochs=1))
    target = torch.cat([b.said.target for b in pairs])
    assert unigram(pairs)["accuracy"] == pytest.approx(target.bincount().max().item() / len(target))
