"""benchmarks/pretrain.py: all four kinds of work on a small text, the report, and a run that goes on."""

import json
import math
from itertools import pairwise

import numpy as np
import pretrain
import pytest

from fastllm.models.baselines import KneserNey

WORDS = [f"{a} and {b} are {a + b}, says the book." for a, b in pairwise(range(300))]
LANGUAGES = {"Latin": "et", "German": "und"}


@pytest.fixture
def corpus(monkeypatch):
    monkeypatch.setattr(pretrain, "passages", lambda: iter(WORDS[::2]))
    monkeypatch.setattr(pretrain, "articles", lambda: iter(WORDS[1::2]))
    pairs = [
        {"language": name, "english": f"{i} and {i}", "translation": f"{i} {word} {i}"}
        for name, word in LANGUAGES.items()
        for i in range(200)
    ]
    monkeypatch.setattr(pretrain, "translations", lambda: iter(pairs))


def test_a_message_is_in_one_split(corpus, tmp_path):
    found = pretrain.Corpus(tmp_path)
    sources = {
        split: {json.loads(line)["source"].split(": ")[1] for line in path.read_text().splitlines()}
        for split, path in found.pairs.items()
    }
    assert sum(map(len, sources.values())) == 200 and all(sources.values())
    assert sum(len(path.read_text().splitlines()) for path in found.pairs.values()) == 400


def test_the_baseline_is_that_of_the_order_best_on_validation():
    draw = np.random.default_rng(0)
    chain = {split: [np.cumsum(draw.integers(1, 3, 40)) % 7 for _ in range(20)] for split in pretrain.FRACTIONS}
    model, nats = pretrain.counted(chain.__getitem__, 7)
    assert model.order == 2  # what comes next depends on the last one alone
    assert nats == pytest.approx(
        -sum(KneserNey(chain["train"], 7, 2).log_probabilities(d).sum() for d in chain["test"])
    )


def test_four_kinds_of_work(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "COMMON", pretrain.COMMON | {"max_length": 32, "plot": False, "tensorboard": False})
    for name, sizes in pretrain.SIZES.items():
        monkeypatch.setitem(
            pretrain.SIZES, name, sizes | {"tokens": 256} | ({"vocab_size": 400} if "preset" in sizes else {})
        )
    arguments = ["--out", str(tmp_path), "--steps", "8"]
    pretrain.main([*arguments, "--seeds", "0"])
    pretrain.main([*arguments, "--seeds", "0", "1", "--keep"])
    result = json.loads((tmp_path / "pretrain.json").read_text())["seeds"]
    assert list(result) == ["0", "1"] and all(tuple(seed) == pretrain.WORK for seed in result.values())
    first, second = result.values()
    assert first["decoder"]["test"] != second["decoder"]["test"]
    for seed in result.values():
        assert (
            0 < seed["decoder"]["kneser_ney_bits_per_byte"] < seed["decoder"]["test"]["bits_per_byte"] < math.log2(400)
        )
        assert 0 < seed["seq2seq"]["kneser_ney_loss"] < seed["seq2seq"]["unigram"]["test"]["loss"]
        tried = seed["translation"]
        assert (
            tried["left"]["rougeL"] > 0.5
            and tried["tuned"]["bleu_signature"]
            and tried["tuned"]["loss"] != tried["bare"]["loss"]
        )
    shown = capsys.readouterr().out
    assert (tmp_path / "pretrain.md").read_text() in shown
    for part in ("| decoder | bits per byte |", "Kneser-Ney of answers", "| translation | BLEU |", "| no |"):
        assert part in shown
    assert (tmp_path / "pretrain.png").read_bytes().startswith(b"\x89PNG")
    del second["translation"]  # a run that was cut off
    assert [line.split(" | ")[2] for line in pretrain.table([first, second]).splitlines()[2:]] == [*"2222111"]


def test_wrong_arguments(tmp_path, capsys):
    for arguments, message in (
        (["--only", "translation"], "it tunes the encoder-decoder; give seq2seq too"),
        (["--steps", "0"], "--steps: 0; allowed: 1 or more"),
    ):
        with pytest.raises(SystemExit):
            pretrain.main(["--out", str(tmp_path), *arguments])
        assert message in capsys.readouterr().err
