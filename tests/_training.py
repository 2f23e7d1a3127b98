"""Small models on a small text, for tests of training."""

from functools import cache

import numpy as np
import torch

from fastllm.data.batch import Batches, Example
from fastllm.data.corrupt import MASKED_ROLES, SENTINELS, Words, encode_masked, encode_spans, sentinel_ids
from fastllm.data.pairs import PairBatches
from fastllm.data.sources import Documents
from fastllm.data.tokenizer import Tokenizer
from fastllm.models.decoder import Decoder, DecoderConfig
from fastllm.models.encoder import Encoder, EncoderConfig
from fastllm.models.initial import initialise
from fastllm.models.seq2seq import Seq2Seq, Seq2SeqConfig
from fastllm.train import PretrainOptions

VOCAB = 128
LINES = [f"{i} plus {i % 7} is {i + i % 7}." for i in range(200)]
SIZES = {"tokens": 256, "max_length": 64, "vocab_size": 300, "validation": 0.1, "test": 0.1, "sample_tokens": 4}
QUICK = {"steps": 6, "log_every": 1, "eval_every": 3, "lr": 3e-3, "tensorboard": False, "plot": False}


def decoder(seed: int = 0, **changed) -> Decoder:
    sizes = {"layers": 2, "dim": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "max_position": 256}
    config = DecoderConfig(**{"vocab": VOCAB, **sizes, "rope_theta": 1e4, "eps": 1e-5, "tied": True} | changed)
    return initialise(Decoder(config), seed)


def encode(document, index: int) -> list[Example]:
    """Bytes as tokens, 0 at both ends."""
    return [Example.next_tokens(np.array([0, *document.text.encode(), 0]))]


def documents(folder, epochs: int | None = None, seed: int = 0) -> Documents:
    path = folder / "lines.txt"
    if not path.exists():
        path.write_text("\n".join(LINES) + "\n")
    return Documents(path, unit="line", shuffle=64, epochs=epochs, seed=seed)


def batches(folder, tokens: int = 256, epochs: int | None = None, seed: int = 0) -> Batches:
    return Batches(documents(folder, epochs, seed), encode, tokens=tokens, window=32, seed=seed)


# ------------------------------------------------------------------------------------------ encoder, encoder and decoder


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(LINES, 300, {**MASKED_ROLES, "eos": "[EOS]"}, more=SENTINELS[:10])


def encoder(seed: int = 0, **changed) -> Encoder:
    sizes = {"layers": 2, "dim": 64, "ffn": 96, "heads": 4, "max_position": 64}
    config = EncoderConfig(**{"vocab": len(tokenizer()), **sizes, "head": "mlm"} | changed)
    return initialise(Encoder(config), seed)


def seq2seq(seed: int = 0, **changed) -> Seq2Seq:
    """With T5's traits."""
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "dim": 64, "ffn": 96, "heads": 4, "head_dim": 16}
    traits = {"position": "relative", "norm": "rms", "norm_first": True, "bias": False, "scale": 1.0, "eps": 1e-6}
    ids = {"pad_id": tokenizer().pad_id, "start_id": tokenizer().pad_id, "eos_id": tokenizer().eos_id}
    config = {"vocab": len(tokenizer()), **sizes, **traits, **ids, "head_scale": 64**-0.5} | changed
    return initialise(Seq2Seq(Seq2SeqConfig(**config)), seed)


def masked_batches(folder, tokens: int = 256, epochs: int | None = None, seed: int = 0) -> Batches:
    words = Words.of(tokenizer())

    def encode(document, index: int) -> list[Example]:
        return encode_masked(tokenizer(), words, document.text, index, longest=10, seed=seed)

    return Batches(documents(folder, epochs, seed), encode, tokens=tokens, window=32, seed=seed)


def pair_batches(folder, tokens: int = 256, epochs: int | None = None, seed: int = 0) -> PairBatches:
    sentinels, start_id = sentinel_ids(tokenizer()), tokenizer().pad_id

    def encode(document, index: int):
        return encode_spans(tokenizer(), sentinels, document.text, index, start_id, longest=12, seed=seed)

    return PairBatches(documents(folder, epochs, seed), encode, tokens=tokens, window=32, seed=seed)


def parameters(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def options(corpus, out, **changed) -> PretrainOptions:
    given = {"arch": "decoder", "preset": "nano", "data": str(corpus), "out": str(out), **SIZES, **QUICK}
    return PretrainOptions(**given | changed)
