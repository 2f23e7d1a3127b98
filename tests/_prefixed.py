"""Tokenizers that put a space in front of a text, in each of the forms that files have, over one small vocabulary."""

import itertools
import json
from types import SimpleNamespace

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from fastllm.data.tokenizer import Tokenizer

TEXT = ["the answer is four and five and six, so two and two is four. Is it positive or negative? it is negative."] * 50
ADDED = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _learned() -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges of BPE."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    model = json.loads(backend.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(pair) for pair in model["merges"]]


PIECES, MERGES = _learned()
TOKENS = ADDED + BYTES + PIECES
ROLES = {"unk": 0, "bos": 1, "eos": 2}


def backend(normalizer=None, pre_tokenizer=None, **flags) -> Backend:
    """flags: of the added tokens."""
    vocab = {token: id for id, token in enumerate(TOKENS)}
    made = Backend(models.BPE(vocab=vocab, merges=MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer:
        made.normalizer = normalizer
    if pre_tokenizer:
        made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_tokens([AddedToken(token, special=True, **{"normalized": False} | flags) for token in ADDED])
    return made


def _gguf() -> Tokenizer:
    merged = {a + b: -float(rank) for rank, (a, b) in enumerate(MERGES)}
    given = {
        "model": "llama",
        "tokens": TOKENS,
        "scores": [merged.get(token, -1e6) for token in TOKENS],
        "token_type": [2] + [3] * (len(ADDED) - 1) + [6] * 256 + [1] * len(PIECES),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in given.items()}
    return Tokenizer.from_gguf(SimpleNamespace(metadata=metadata, path="m.gguf"))


def _unigram() -> Backend:
    """Without bytes: what it does not know is <unk>."""
    scored = [("<unk>", 0.0), *((piece, -0.1 * n) for n, piece in enumerate(PIECES))]
    made = Backend(models.Unigram(scored, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED])
    return made


def _bytes() -> Backend:
    made = Tokenizer.train(TEXT, 330, {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}, ADDED[3:]).backend
    made.pre_tokenizer, made.post_processor = pre_tokenizers.ByteLevel(add_prefix_space=True), None
    return made


def _named(backend: Backend) -> Tokenizer:
    return Tokenizer(backend, {"unk": 0, "bos": backend.token_to_id("<s>"), "eos": backend.token_to_id("</s>")})


def prepend() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def metaspace(scheme: str, split: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)


FORMS = {
    "gguf": _gguf(),
    "prepend": Tokenizer(backend(prepend()), ROLES),
    "always": Tokenizer(backend(None, metaspace("always")), ROLES),
    "first": Tokenizer(backend(None, metaspace("first")), ROLES),
    "split": Tokenizer(backend(None, pre_tokenizers.Sequence([metaspace("first", True)])), ROLES),
    "unigram": _named(_unigram()),
    "bytes": _named(_bytes()),
}
FLAGS = {
    f"{name} {' '.join(flags)}": Tokenizer(backend(*steps, **flags), ROLES)
    for (name, steps), flags in itertools.product(
        (("prepend", (prepend(),)), ("always", (None, metaspace("always"))), ("first", (None, metaspace("first")))),
        ({"rstrip": True}, {"lstrip": True}),
    )
}
