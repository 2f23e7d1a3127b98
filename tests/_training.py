"""A small decoder on a small text, for tests of training."""

import numpy as np
import torch

from fastllm.data.batch import Batches, Example
from fastllm.data.sources import Documents
from fastllm.models.decoder import Decoder, DecoderConfig
from fastllm.models.initial import initialise

VOCAB = 128
LINES = [f"{i} plus {i % 7} is {i + i % 7}." for i in range(200)]


def decoder(seed: int = 0, **changed) -> Decoder:
    sizes = {"layers": 2, "dim": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "max_position": 256}
    config = DecoderConfig(**{"vocab": VOCAB, **sizes, "rope_theta": 1e4, "eps": 1e-5, "tied": True} | changed)
    return initialise(Decoder(config), seed)


def encode(document, index: int) -> list[Example]:
    """Bytes as tokens, 0 at both ends."""
    return [Example.next_tokens(np.array([0, *document.text.encode(), 0]))]


def batches(folder, tokens: int = 256, epochs: int | None = None, seed: int = 0) -> Batches:
    path = folder / "lines.txt"
    if not path.exists():
        path.write_text("\n".join(LINES) + "\n")
    documents = Documents(path, unit="line", shuffle=64, epochs=epochs, seed=seed)
    return Batches(documents, encode, tokens=tokens, window=32, seed=seed)


def parameters(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
