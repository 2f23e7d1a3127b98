"""A text, and a run on it that has ended: what several files look at and none changes."""

import json

import pytest
from _training import LINES, options

from fastllm.train import pretrain


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "sums.jsonl"
    path.write_text("".join(json.dumps({"text": f"{line} It is so."}) + "\n" for line in LINES))
    return path


@pytest.fixture(scope="session")
def run(corpus, tmp_path_factory):
    """A run folder and its report."""
    out = tmp_path_factory.mktemp("runs") / "first"
    return out, pretrain(options(corpus, out, plot=True, tensorboard=True))
