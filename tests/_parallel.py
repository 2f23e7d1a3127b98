"""What two processes do in the tests of training by several; run by torchrun once, and by the test's own process for comparison.

torchrun --nproc-per-node=2 tests/_parallel.py FOLDER
"""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from _training import VOCAB, batches, decoder, equal, parameters
from torch import nn

from fastllm import ops
from fastllm.data.pairs import Pair, collate_pairs
from fastllm.models.encoder import Encoder, EncoderConfig
from fastllm.models.seq2seq import Seq2Seq, Seq2SeqConfig
from fastllm.train.checkpoint import CheckpointError
from fastllm.train.loop import LOG, LoopOptions, TrainingError, _Step, fit
from fastllm.train.objective import next_token_loss, pair_loss
from fastllm.train.parallel import Share, start

OPTIONS = {"steps": 8, "lr": 1e-2, "warmup": 3, "log_every": 1}
GEMMA = {"layers": 3, "unit_norm": True, "qk_norm": True, "tied": False}  # norms that remember their gains


def told(run: Path, key: str = "loss") -> list[float]:
    return [r[key] for line in (run / LOG).read_text().splitlines() if key in (r := json.loads(line))]


def validate(model: nn.Module) -> float:
    """Of the whole model, whatever processes there are."""
    ids = torch.arange(12)[None]
    return float(model(ids).log_softmax(-1)[0, torch.arange(11), ids[0, 1:]].neg().mean())


def run(folder: Path, name: str, processes: int, model: nn.Module, epochs: int | None = None, **changed) -> dict:
    """Two batches a step, by one process or by two; goes on with what is there."""
    options = LoopOptions(**OPTIONS | {"accumulate": 2 // processes} | changed)
    resume = (folder / name / "checkpoints").exists()
    source = batches(folder, epochs=epochs)
    report = fit(model, source, next_token_loss, folder / name, options, validate=validate, resume=resume)
    return {
        "reason": report.reason,
        "step": report.step,
        "loss": report.loss,
        "losses": told(folder / name),
        "validations": told(folder / name, "validation"),
        "parameters": [p.double().square().sum().item() for p in model.parameters()],
    }


class Listed:
    """Batches of a list, which knows where it is."""

    def __init__(self, parts: list):
        self.parts, self.at = parts, 0

    def __next__(self):
        if self.at == len(self.parts):
            raise StopIteration
        self.at += 1
        return self.parts[self.at - 1]

    def state_dict(self):
        return self.at

    def load_state_dict(self, state):
        self.at = state


class Here:
    """A batch that is where it should be."""

    def __init__(self, weight: torch.Tensor, **fields):
        self.weight = weight
        vars(self).update(fields)

    def to(self, device):
        return self


# ----------------------------------------------------------------------------------------------------------- scenarios


def gradients(folder: Path, processes: int) -> list:
    """Of five uneven batches in float64, the last of which only one process has; before them the loss and the weight."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 3, bias=False)])
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1]).double()
    rows = [Here(torch.rand(n), x=torch.randn(n, 5).double(), y=torch.randn(n, 3).double()) for n in (3, 17, 1, 19, 2)]

    class Optimizer:
        rate, found = 0.0, []

        def __init__(self, model):
            self.parameters = dict(model.named_parameters())

        def step(self):
            grads = [p.grad for p in self.parameters.values()]
            self.found = [g.full_tensor() if processes > 1 else g for g in grads]
            return torch.tensor(1.0)

    def loss(model, batch):
        return (batch.weight * (model(batch.x) - batch.y).square().sum(1)).sum()

    share = Share(model, loss, start())
    optimizer = Optimizer(share.model)
    value, weight = _Step(share, Listed(rows), optimizer, 6 // processes, start())()
    return [value, weight, *(g.tolist() for g in optimizer.found)]


def frozen(folder: Path, processes: int) -> dict:
    """Only a part is trained, and what is not is whole again, too."""
    model = decoder(**GEMMA)
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name or "layers.1" in name)
    return run(folder, "frozen", processes, model, eval_every=2)


def encoder(folder: Path, processes: int) -> dict:
    torch.manual_seed(1)
    model = Encoder(EncoderConfig(VOCAB, 2, 32, 48, 4, 256, head="mlm"))

    def loss(model, batch):
        logits = model.head(model.packed_hidden(batch.packed))
        return ops.cross_entropy(logits, batch.target, token_weight=batch.weight, spec=ops.LossSpec(reduction="sum"))

    return other(folder, "encoder", processes, model, batches(folder), loss)


def seq2seq(folder: Path, processes: int) -> dict:
    torch.manual_seed(2)
    sizes = {"vocab": VOCAB, "encoder_layers": 2, "decoder_layers": 2, "dim": 32, "ffn": 48, "heads": 4, "head_dim": 8}
    model = Seq2Seq(Seq2SeqConfig(**sizes, position="relative", norm="rms", norm_first=True, bias=False, eos_id=0))
    words = np.random.default_rng(0).integers(1, VOCAB, (16, 3, 2, 9)).tolist()
    parts = [collate_pairs([Pair.of(s, t[: 3 + i], 0) for i, (s, t) in enumerate(w)]) for w in words]
    return other(folder, "seq2seq", processes, model, Listed(parts), pair_loss)


def other(folder: Path, name: str, processes: int, model: nn.Module, source, loss) -> dict:
    options = LoopOptions(**OPTIONS | {"accumulate": 2 // processes, "recompute": True})
    report = fit(model, source, loss, folder / name, options)
    return {"step": report.step, "losses": told(folder / name)}


def not_a_number(folder: Path, processes: int) -> str:
    """In the second batch of the third step, which the second process computes."""
    model, count = decoder(), 0

    def loss(model, batch):
        nonlocal count
        count += 1
        bad = count == 6 // processes and start().rank == processes - 1
        return next_token_loss(model, batch) * (float("nan") if bad else 1.0)

    options = LoopOptions(**OPTIONS | {"accumulate": 2 // processes, "save_every": 1})
    try:
        fit(model, batches(folder), loss, folder / "nan", options)
    except TrainingError as error:
        return str(error) + (" whole" if all(p.numel() for p in model.parameters()) else "")
    return "no error"


def interrupted(folder: Path, processes: int) -> list:
    """By a signal to the last process alone, in its third step."""
    count = 0

    def loss(model, batch):
        nonlocal count
        count += 1
        if count == 6 // processes and start().rank == processes - 1:
            signal.raise_signal(signal.SIGINT)
        return next_token_loss(model, batch)

    options = LoopOptions(**OPTIONS | {"accumulate": 2 // processes})
    report = fit(decoder(), batches(folder), loss, folder / "interrupted", options)
    return [report.reason, report.step]


def unwritable(folder: Path, processes: int) -> str:
    run = folder / "unwritable"
    run.mkdir(exist_ok=True)
    (run / "checkpoints").touch()
    try:
        fit(decoder(), batches(folder), next_token_loss, run, LoopOptions(**OPTIONS | {"steps": 1, "warmup": 0}))
    except CheckpointError as error:
        return str(error)
    return "no error"


def damaged(folder: Path, processes: int) -> str:
    """The second shard of two is cut off."""
    path = folder / "straight" / "checkpoints" / "step-00000008" / "shard-00002-model-00001-of-00001.safetensors"
    content = path.read_bytes()
    start().first(lambda: path.write_bytes(content[:-64]))
    model = decoder(seed=1)
    before = parameters(model)
    try:
        fit(model, batches(folder), next_token_loss, folder / "straight", LoopOptions(**OPTIONS), resume=True)
    except CheckpointError as error:
        return str(error) + (" unchanged" if equal(parameters(model), before) else "")
    finally:
        start().first(lambda: path.write_bytes(content))
    return "no error"


HALVES = {"save_every": 4, "eval_every": 3, "keep_last": 9}
SCENARIOS = {
    "gradients": gradients,
    "straight": lambda folder, n: run(folder, "straight", n, decoder(), **HALVES),
    "begun by one": lambda folder, n: run(folder, "begun by one", n, decoder(seed=5), **HALVES),
    "ends": lambda folder, n: run(folder, "ends", n, decoder(), epochs=1, steps=1000),
    "bfloat16": lambda folder, n: run(folder, "bfloat16", n, decoder().bfloat16()),
    "recomputed": lambda folder, n: run(folder, "recomputed", n, decoder(), recompute=True, **HALVES),
    "frozen": frozen,
    "sized": lambda folder, n: run(folder, "sized", n, decoder(), scale_parameter=True, lr=0.1),
    "encoder": encoder,
    "seq2seq": seq2seq,
    "not_a_number": not_a_number,
    "interrupted": interrupted,
    "unwritable": unwritable,
    "damaged": damaged,
}


def main(folder: Path) -> None:
    processes = start()
    found = {name: scenario(folder, processes.count) for name, scenario in SCENARIOS.items()}
    (folder / f"found-{processes.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
