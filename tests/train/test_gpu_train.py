"""Training on an NVIDIA GPU: the stages in bfloat16 with a float32 master, the CPU's losses, and `accelerate`."""

import copy
import json
import signal

import _accelerate
import pytest
import safetensors.torch
import torch
from _training import LINES

from fastllm import LLM, models
from fastllm.integrations.transformers import accelerate
from fastllm.train import PretrainOptions, pretrain
from fastllm.train.loop import LOG
from fastllm.train.plots import read_log

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
GIVEN = {
    "preset": "nano", "tokens": 512, "max_length": 64, "vocab_size": 400, "validation": 0.1, "test": 0.1, "sample_tokens": 4,
    "steps": 40, "log_every": 1, "eval_every": 20, "lr": 3e-3, "warmup": 5, "tensorboard": False, "plot": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "sums.jsonl"
    path.write_text("".join(json.dumps({"text": f"{line} It is so."}) + "\n" for line in LINES))
    return str(path)


def run(corpus, out, arch="decoder", watch=(), resume=False, **changed):
    options = PretrainOptions(arch=arch, data=corpus, out=str(out), **GIVEN | {"device": DEVICE} | changed)
    return pretrain(options, watch=watch, resume=resume)


def losses(out) -> list[float]:
    return [line["loss"] for line in read_log(out / LOG) if "loss" in line]


@pytest.mark.parametrize("arch", ["decoder", "encoder", "seq2seq"])
def test_a_stage_learns_and_goes_on_with_the_same_bits(corpus, tmp_path, arch):
    def interrupt(record):
        if record["step"] == 25 and "loss" in record:
            signal.raise_signal(signal.SIGINT)

    report = run(corpus, tmp_path / "whole", arch)
    found = losses(tmp_path / "whole")
    assert report.reason == "done" and found[-1] < 0.8 * found[0]
    assert run(corpus, tmp_path / "cut", arch, [interrupt]).reason == "interrupted"
    run(corpus, tmp_path / "cut", arch, resume=True)
    whole, cut = (safetensors.torch.load_file(tmp_path / n / "model/model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole) and whole.keys() == cut.keys()
    model = models.load(report.model)
    assert next(model.parameters()).dtype == torch.float32
    if arch == "decoder":
        assert max(LLM(report.model, device=DEVICE).perplexity(LINES[:20])) < 200


@pytest.mark.parametrize("arch", ["decoder", "encoder", "seq2seq"])
def test_the_losses_are_those_of_a_cpu(corpus, tmp_path, arch):
    run(corpus, tmp_path / "cpu", arch, device="cpu", steps=6, eval_every=0)
    run(corpus, tmp_path / "wide", arch, dtype="float32", steps=6, eval_every=0)
    run(corpus, tmp_path / "narrow", arch, dtype="bfloat16", steps=6, eval_every=0)
    wanted = losses(tmp_path / "cpu")
    assert losses(tmp_path / "wide") == pytest.approx(wanted, rel=1e-3)
    assert losses(tmp_path / "narrow") == pytest.approx(wanted, rel=2e-2, abs=3e-2)


def test_recompute_and_accumulate(corpus, tmp_path):
    plain = run(corpus, tmp_path / "plain", steps=6)
    again = run(corpus, tmp_path / "again", steps=6, recompute=True)
    parts = run(corpus, tmp_path / "parts", steps=6, tokens=256, accumulate=2)
    assert again.loss == plain.loss and parts.loss == pytest.approx(plain.loss, rel=0.1)


@pytest.mark.parametrize("name", [*_accelerate.DECODERS, *_accelerate.OTHERS])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_accelerate(name, dtype, tolerance):
    model = _accelerate.build(name).to(DEVICE, dtype)
    ids, labels = torch.randint(3, _accelerate.VOCAB, (2, 2, _accelerate.LENGTH), device=DEVICE)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    handle = accelerate(model)
    ours, theirs, truth = (m(input_ids=ids, labels=labels) for m in (model, plain, exact))
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=tolerance)
    span = float(theirs.logits.float().abs().max())
    assert float((ours.logits - theirs.logits).float().abs().max()) < tolerance * span
    ours.loss.backward(), theirs.loss.backward(), truth.loss.backward()
    found = [[p.grad for p in m.parameters()] for m in (model, plain, exact)]
    triples = [[g.double() for g in three] for three in zip(*found, strict=True) if three[2] is not None]
    least = 0.01 * max(float(wanted.norm()) for _, _, wanted in triples)  # some are next to nothing
    for our, their, wanted in triples:
        allowed = (
            2 * tolerance * max(float(wanted.norm()), least)
        )  # a relu's inputs around 0 are on one side or the other
        assert float((our - wanted).norm()) <= max(2 * float((their - wanted).norm()), allowed)
    handle.undo()
    assert torch.equal(model(input_ids=ids, labels=labels).logits, plain(input_ids=ids, labels=labels).logits)
