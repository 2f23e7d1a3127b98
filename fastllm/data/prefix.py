"""The space that a vocabulary puts in front of a text, which must not stand where a text goes on behind another.

SentencePiece begins a text with "▁" (Kudo and Richardson 2018, arXiv 1808.06226; Llama 2, TinyLlama, Mistral), so that its
first word has the token of any other word. Of the library's steps a normalizer does it (Prepend) or a pre-tokenizer
(Metaspace; ByteLevel, where it is asked to). An added token cuts a text in two: behind it most of these begin anew.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

_BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Unprefixed:
    """backend: the same rules without the space, for text without added tokens. added: their ids. again: those behind which
    the space comes anew."""

    backend: Backend
    added: frozenset[int]
    again: frozenset[int]


def unprefixed(backend: Backend, unk_id: int | None = None) -> Unprefixed | None:
    """None where nothing is put in front. Where a pre-tokenizer has cut the words before (T5), the space marks each word and
    stays."""
    shell = Backend(models.BPE())  # the steps without the vocabulary, which may be large
    shell.normalizer, shell.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    state = json.loads(shell.to_str())
    normalizer, pre_tokenizer = state["normalizer"], _first(state["pre_tokenizer"])
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    kept = [step for step in steps if step and step["type"] != "Prepend"]
    by_normalizer = kept != [step for step in steps if step]
    state["normalizer"] = {"type": "Sequence", "normalizers": kept}
    scheme = "never"
    if pre_tokenizer.get("type") == "Metaspace":
        scheme, pre_tokenizer["prepend_scheme"] = pre_tokenizer["prepend_scheme"], scheme
    elif pre_tokenizer.get("type") == "ByteLevel" and pre_tokenizer["add_prefix_space"]:
        scheme, pre_tokenizer["add_prefix_space"] = "always", False
    if scheme == "never" and not by_normalizer:
        return None
    made = Backend.from_str(json.dumps(state))
    made.model = backend.model
    # what the model itself says of a character cuts nothing
    own = {unk_id, backend.token_to_id(getattr(backend.model, "unk_token", None) or "")}
    tokens = backend.get_added_tokens_decoder().items()
    added = {id: token for id, token in tokens if id not in own and not _BYTE.fullmatch(token.content)}
    # normalized: found behind the normalizer, which saw no border there
    again = {id for id, token in added.items() if scheme == "always" or (by_normalizer and not token.normalized)}
    return Unprefixed(made, frozenset(added), frozenset(again))


def _first(step: dict[str, Any] | None) -> dict[str, Any]:
    """What reads the text first."""
    while step and step["type"] == "Sequence":
        step = next(iter(step["pretokenizers"]), None)
    return step or {}
