"""How many tokens a text has at least, told from its bytes: what is far too long is refused before it is encoded, which would
take seconds and a hundred bytes for each of the text's."""

import json
from functools import cached_property
from typing import Any

from tokenizers import models

from .tokenizer import Tokenizer, byte_of_char


class Bound:
    """Of one tokenizer. Where a text may be shortened before it is cut, or one token stand for any number of characters, nothing
    is certain."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def least(self, text: str) -> int:
        """Tokens that `Tokenizer.encode` gives at least, where it does not parse special ones; 0 where nothing is certain."""
        if self._known is None:
            return 0
        longest, lost = self._known
        return -(-len(text.encode("utf-8", "ignore").translate(None, lost)) // longest)

    @cached_property
    def _known(self) -> tuple[int, bytes] | None:
        """Bytes that a token stands for at most, and those that none does: they are left out, or many of them are one token."""
        backend, mode = self._tokenizer.backend, self._tokenizer._mode
        model, own = backend.model, backend.get_vocab(with_added_tokens=False)
        around = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
        if around or not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
            return None
        normalizers, cutters = _steps(backend.normalizer, "normalizers"), _steps(backend.pre_tokenizer, "pretokenizers")
        kinds = {step["type"] for step in cutters}
        if any(step.get("behavior") == "Removed" for step in cutters):
            return None
        if mode == "byte_level":
            certain = not normalizers and "ByteLevel" in kinds and kinds <= {"ByteLevel", "Split", "Digits"}
            lost = bytes(byte for char, byte in byte_of_char().items() if char not in own)
        else:
            spaces = all(step["type"] == "Prepend" or _is_space(step) for step in normalizers)
            certain = (
                mode == "byte_fallback" and model.byte_fallback and spaces and kinds <= {"Metaspace", "Split", "Digits"}
            )
            certain, lost = certain and all(f"<0x{byte:02X}>" in own for byte in range(256)), b""
        # As a vocabulary spells them, tokens are no shorter than what they stand for.
        return (max(len(token.encode()) for token in backend.get_vocab()), lost) if certain else None


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """What a normaliser or a pre-tokenizer of the library does, one after the other."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    return state[name] if state["type"] == "Sequence" else [state]


def _is_space(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁"
