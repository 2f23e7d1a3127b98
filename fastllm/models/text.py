"""The text side of a model: tokenizer, chat template and what ends a text, out of the file of its weights and into another."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.chat import ChatTemplate
from ..data.tokenizer import Tokenizer
from ..files import Replacing
from .gguf import GGUFFile

# What transformers, sentence-transformers and we read of a folder beside config.json and the weights.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "generation_config.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "spiece.model", "source.spm", "target.spm", "preprocessor_config.json", "modules.json", "sentence_bert_config.json",
    "1_Pooling/config.json",
)  # fmt: skip


def read_text(path: Path) -> tuple[Tokenizer, ChatTemplate | ValueError]:
    """The tokenizer and the chat template of a folder or a GGUF; a missing template is the error to raise when one is needed."""
    if path.is_dir():
        tokenizer, source, make = Tokenizer.from_folder(path), path, ChatTemplate.from_folder
    else:
        source = GGUFFile(path)
        tokenizer, make = Tokenizer.from_gguf(source), ChatTemplate.from_gguf
    try:
        return tokenizer, make(source)
    except ValueError as error:
        return tokenizer, error


def ends_of(source: Path | None) -> dict[str, Any]:
    """What config.json says of the tokens that begin, end and fill a text, by which transformers ends one: as the source's own
    says, or its tokenizer. Empty where there is none that can be read, of which `write_text` warns."""
    keys = {f"{role}_token_id": role for role in ("bos", "eos", "pad")}
    if source is None:
        return {}
    try:
        config = source / "config.json"
        stored = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if given := {key: stored[key] for key in keys if key in stored}:
            return given
        tokenizer = read_text(source)[0]
    except (ValueError, FileNotFoundError):
        return {}
    ids = {key: getattr(tokenizer, f"{role}_id") for key, role in keys.items()}
    return ids | ({"eos_token_id": sorted(tokenizer.eos_ids)} if len(tokenizer.eos_ids) > 1 else {})


def check_vocab(tokenizer: Tokenizer, vocab: int, who: str | Path) -> None:
    """ValueError: a tokenizer with ids that a model of `vocab` rows does not have. Added special tokens alone may be such, as
    Gemma 3's <image_soft_token> is: no text gives them unless it is asked to, and `check_ids` finds them then."""
    if not tokenizer.special_ids.issuperset(range(vocab, len(tokenizer))):
        raise ValueError(
            f"{who}: the tokenizer has {len(tokenizer)} ids, the model {vocab}; give the model's own, or grow its tables with "
            "fastllm.models.resize.resize_vocab"
        )


def check_ids(ids: Iterable[int], tokenizer: Tokenizer, vocab: int, what: str = "") -> None:
    """ValueError: an id that a model of `vocab` rows does not have; `what` stands in front of the message."""
    for place, token in enumerate(ids):
        if not 0 <= token < vocab:
            advice = "encode the text with this model's tokenizer"
            if token in tokenizer.special_ids:
                advice = f"the model has no row for {tokenizer.token(token)!r}, leave it out"
            raise ValueError(
                f"{what}token id {token} at place {place} is outside the vocabulary [0, {vocab}); {advice}"
            )


def write_text(source: Path, files: Replacing) -> None:
    """A folder's files as they are; of a GGUF the same made of its metadata. What cannot be read is left out with a warning: the
    weights are saved all the same."""
    try:
        if source.is_dir():
            for name in FILES:
                if (source / name).is_file():
                    files.write(name, (source / name).read_bytes())
        else:
            with GGUFFile(source) as file:
                _write_gguf(file, files)
    except (ValueError, FileNotFoundError) as error:
        warnings.warn(
            f"{files.folder} is saved without a tokenizer: {error}; copy tokenizer.json and what belongs to it there, or give "
            "save(text=PATH)",
            stacklevel=2,
        )


def _write_gguf(file: GGUFFile, files: Replacing) -> None:
    if "tokenizer.ggml.model" not in file.metadata:
        return
    tokenizer = Tokenizer.from_gguf(file)
    tokenizer.write(files)
    ends = {"bos": tokenizer.bos_id, "eos": sorted(tokenizer.eos_ids), "pad": tokenizer.pad_id}
    given = {f"{role}_token_id": value for role, value in ends.items() if value not in (None, [])}
    files.write("generation_config.json", json.dumps(given, indent=2))
    if file.metadata.get("tokenizer.chat_template"):
        ChatTemplate.from_gguf(file).write(files)
