"""Special tokens that a user typed, which are to stay text."""

import json
from collections.abc import Collection

from tokenizers import Tokenizer as Backend
from tokenizers import models


def literal_model(backend: Backend, special: Collection[int]) -> models.Unigram | None:
    """The model of a backend that finds no special token in a text; None where its own finds none.

    Told that special tokens are text (`encode_special_tokens`), the library leaves them to the model, and one of Unigram finds
    those that are among its pieces, as T5's </s> is. Here such a piece is empty, which matches nothing.
    """
    if not isinstance(backend.model, models.Unigram):
        return None
    state = json.loads(backend.model.__getstate__())
    vocab, unknown = state["vocab"], state["unk_id"]
    found = [id for id in special if id < len(vocab) and id != unknown]
    for id in found:
        vocab[id][0] = ""
    return models.Unigram([tuple(piece) for piece in vocab], unknown, state["byte_fallback"]) if found else None
