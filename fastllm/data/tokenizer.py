"""Text to token ids and back, on the `tokenizers` library, from a GGUF's metadata or a folder with tokenizer.json.

    tok = Tokenizer.from_gguf(GGUFFile(path))
    ids = tok.encode("Hello")                    # special tokens typed in the text stay text
    tok.encode(prompt, parse_special=True)       # "<|im_start|>" becomes its one token, as chat templates need
    tok.encode_after(ids, " there")              # what goes on behind these tokens
    stream = tok.stream()                        # token by token: stream.push(id), at the end stream.flush()

Decoding joins the tokens' bytes and reads them as UTF-8, a broken sequence giving U+FFFD, so a stream adds up to the
text of the whole. Tokenizers without bytes of their own (WordPiece, Unigram) decode through the library.

Longer than 500 lines, by a few: training, reading and writing share what is known of one vocabulary.
"""

import json
import operator
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from ..files import Replacing
from . import HasMetadata
from .literal import literal_model
from .pieces import LONG, encode_long, encode_short
from .prefix import Unprefixed, unprefixed
from .stream import StreamDecoder

ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
DEFAULT_ROLES: Mapping[str, str] = {"eos": "<|endoftext|>", "pad": "<|pad|>"}  # of a tokenizer that is trained

# Special tokens that end a turn or a document under these names, whatever a file calls its eos.
# fmt: off
END_TOKENS = frozenset((
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot|>", "<|return|>",
    "<|call|>", "<|end_of_turn|>", "<end_of_turn>", "<end_of_utterance>", "<EOT>", "[EOT]", "[EOS]", "</s>", "<eos>",
    "<｜end▁of▁sentence｜>",
))
# fmt: on


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level vocabulary cuts text into words: regexes applied in turn, each match a piece of its own."""

    splits: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token needs no merges
    add_bos: bool = False  # when the file does not say
    nfc: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS % r"\p{N}{1,3}"

PRE_TOKENIZERS = {  # tokenizer.ggml.pre -> rule
    name: rule
    for names, rule in (
        ("default", PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
        ("gpt-2 mpt olmo jais", PreTokenizer((_GPT2,))),
        ("smollm starcoder refact command-r codeshell exaone", PreTokenizer((r"\p{N}", _GPT2))),
        ("llama-bpe llama3 llama-v3", PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)),
        ("dbrx smaug-bpe", PreTokenizer((_LLAMA3,))),
        ("qwen2 deepseek-r1-qwen", PreTokenizer((_WORDS % r"\p{N}",), nfc=True)),
        ("stablelm2", PreTokenizer((_WORDS % r"\p{N}",))),
    )
    for name in names.split()
}

# Decoders of the library that look at one token after the other, and at what comes before it.
_APART = ("WordPiece", "Metaspace", "BPEDecoder", "CTC", "Replace", "Strip")

# tokenizer.ggml.token_type
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4


@cache
def byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable bytes stand for themselves, the others take the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class Tokenizer:
    """A vocabulary with its rules. Safe to share between threads.

    bos_id, eos_id, pad_id, unk_id, cls_id, sep_id, mask_id: int, or None where the vocabulary has no such token.
    eos_ids: frozenset of every id that ends a generation; special_ids: of all special tokens. backend: of `tokenizers`.
    """

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    cls_id: int | None
    sep_id: int | None
    mask_id: int | None

    def __init__(self, backend: Backend, roles: Mapping[str, int | None], eos_ids: Iterable[int] = ()):
        """roles: a token id for the names in ROLES. eos_ids: ends besides the eos and the tokens of END_TOKENS."""
        backend.no_truncation()  # a tokenizer.json may carry both; encode() gives the whole text, unpadded
        backend.no_padding()
        self.backend = backend
        vocab = backend.get_vocab(with_added_tokens=True)
        self._size = 1 + max(vocab.values(), default=-1)
        for role in ROLES:
            setattr(self, f"{role}_id", self._check_id(roles[role], role) if roles.get(role) is not None else None)
        added = backend.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in added.items()}
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        ends = {id for id in self.special_ids if self._added[id] in END_TOKENS}
        ends |= {self._check_id(id, "eos") for id in eos_ids}
        self.eos_ids = frozenset(ends | ({self.eos_id} if self.eos_id is not None else set()))
        self._mode, self._strip, self._joined = _decoder_mode(backend)
        self._bytes: dict[int, bytes] = {}
        self._lock = threading.Lock()  # `encode_special_tokens` is a setting of the backend, not an argument
        self._process = os.getpid()

    # Encode

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """The token ids of `text`.

        add_special_tokens: put bos, eos, [CLS] ... around it as the vocabulary's rules say. parse_special: read special
        tokens written in the text as such; keep it off for text of users. A byte that the vocabulary has no token for
        is left out, as in transformers (SmolLM2 lacks 21, all of rare control characters and private planes).
        TypeError: not a str. ValueError: lone surrogates, which are no text.
        """
        return self.encode_batch([text], add_special_tokens, parse_special)[0]

    def encode_batch(
        self, texts: Iterable[str], add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[list[int]]:
        """`encode` for many texts, in parallel."""
        texts = list(texts) if not isinstance(texts, str) else texts
        with self._set_for(texts, parse_special) as backend:
            if add_special_tokens:
                return [one.ids for one in backend.encode_batch_fast(texts)]
            short = iter(encode_short(backend, [text for text in texts if len(text) <= LONG]))
            return [encode_long(backend, text) if len(text) > LONG else next(short) for text in texts]

    def encode_after(self, before: Sequence[int], text: str, parse_special: bool = False) -> list[int]:
        """The token ids of `text` where it goes on behind the tokens `before`, which stay as they are.

        Vocabularies of SentencePiece put a space in front of a text: it is left out here, unless an added token ends `before`
        and the space comes anew behind such. So [*before, *after] are the tokens of the whole text wherever those have a border
        at this place. before: a text's tokens, without what encode() puts around them; none of them: `text` is the first.
        """
        rule = self._unprefixed
        if rule is None or not before or before[-1] in rule.again:
            return self.encode(text, add_special_tokens=False, parse_special=parse_special)
        with self._set_for([text], parse_special) as backend:
            found = backend.encode(text, add_special_tokens=False)
            added = (at for at, id in enumerate(found.ids) if id in rule.added)
            first = next(added, None)  # from there on, the space is as it should be
            if first is None:
                return rule.backend.encode(text, add_special_tokens=False).ids
            begin = found.offsets[first][0]
            return rule.backend.encode(text[:begin], add_special_tokens=False).ids + found.ids[first:]

    @contextmanager
    def _set_for(self, texts: Iterable[str], parse_special: bool) -> Iterator[Backend]:
        """What encodes, while this thread has it. RuntimeError: another had it when the process was forked. TypeError,
        ValueError: no text."""
        for text in [texts] if isinstance(texts, str) else texts:
            if not isinstance(text, str) or text is texts:
                raise TypeError(f"encode takes a str, encode_batch a list of str; got {type(text).__name__}")
        if self._process != os.getpid():  # a child of that one
            if self._lock.locked():
                raise RuntimeError(
                    f"process {os.getpid()} was forked while another thread encoded a text; load the tokenizer in the child"
                )
            self._process = os.getpid()
        try:
            with self._lock:
                backend = self.backend if parse_special else self._literal
                backend.encode_special_tokens = not parse_special
                yield backend
        except (UnicodeEncodeError, TypeError):
            bad = next(c for text in texts for c in text if "\ud800" <= c <= "\udfff")
            raise ValueError(f"the text holds a lone surrogate {bad!r}, which no encoding has; remove it") from None

    @cached_property
    def _literal_model(self) -> models.Unigram | None:
        return literal_model(self.backend, self.special_ids)

    @cached_property
    def _literal(self) -> Backend:
        """What encodes text in which special tokens are text."""
        if self._literal_model is None:
            return self.backend
        made = Backend.from_str(self.backend.to_str())
        made.model = self._literal_model
        return made

    @cached_property
    def _unprefixed(self) -> Unprefixed | None:
        rule = unprefixed(self.backend, self.unk_id)
        if rule is not None and self._literal_model is not None:
            rule.backend.model = self._literal_model
        return rule

    @cached_property
    def special_text(self) -> re.Pattern[str] | None:
        """Finds special tokens in a text; None where there are none."""
        spelled = sorted((self._added[id] for id in self.special_ids), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spelled))) if spelled else None

    @property
    def add_bos(self) -> bool:
        """Whether encode() puts bos in front."""
        return self.bos_id is not None and self.encode("a")[0] == self.bos_id

    # Decode

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids` (a list, or an array or tensor of one dimension). ValueError: an id out of range."""
        checked = [self._check_id(id) for id in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        if self._mode == "text":
            with self._lock:
                return self.backend.decode(checked, skip_special_tokens=skip_special_tokens)
        kept = [id for id in checked if not (skip_special_tokens and id in self.special_ids)]
        text = b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._strip else text

    def stream(self, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> StreamDecoder:
        """A decoder for one sequence, fed token by token. after: the ids that it continues, such as a prompt's."""
        return StreamDecoder(self, skip_special_tokens, after)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that the token stands for; they need not be UTF-8 by themselves. ValueError: no such id."""
        known = self._bytes.get(id)
        if known is None:
            known = self._bytes[id] = self._find_bytes(self._check_id(id))
        return known

    def _find_bytes(self, id: int) -> bytes:
        if id in self._added and self._mode != "byte_fallback":
            return self._added[id].encode()
        # an added token too has "▁" for its spaces, also those that a normalizer put there; "": a hole in the vocabulary
        token = self.backend.id_to_token(id) or ""
        if self._mode == "byte_level":
            alphabet = byte_of_char()
            return bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) else token.encode()
        if self._mode == "byte_fallback":
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes.fromhex(token[3:5])
            return token.replace("▁", " ").encode()
        with self._lock:
            return self.backend.decode([id], skip_special_tokens=False).encode()

    # Vocabulary

    def __len__(self) -> int:
        """One more than the largest id."""
        return self._size

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)} tokens, {self._mode}, eos_ids={sorted(self.eos_ids)})"

    def token(self, id: int) -> str | None:
        """The token as the vocabulary spells it, or None for a hole. ValueError: an id out of the vocabulary."""
        return self.backend.id_to_token(self._check_id(id))

    def token_id(self, token: str) -> int | None:
        """The id of a token spelled exactly so, or None."""
        return self.backend.token_to_id(token)

    def _check_id(self, id: Any, role: str = "") -> int:
        try:
            number = operator.index(id)
        except TypeError:
            raise TypeError(f"a token id is an int, got {type(id).__name__} {id!r}") from None
        if not 0 <= number < self._size:
            what = f"{role}_id" if role else "token id"
            raise ValueError(f"{what} {number} is out of the vocabulary; allowed: 0 to {self._size - 1}")
        return number

    # Train and extend

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        roles: Mapping[str, str] = DEFAULT_ROLES,
        more: Iterable[str] = (),
        pre: str = "smollm",
    ) -> "Tokenizer":
        """Byte-level BPE (Sennrich et al. 2015, arXiv 1508.07909) learned from texts; every text can be encoded by it.

        vocab_size: tokens in all, fewer where the texts give no more pairs to merge. roles: the special tokens, by the names in
        ROLES. more: further special tokens, such as those of a chat template or T5's sentinels. pre: how text is cut into
        words, a name in PRE_TOKENIZERS. encode() puts cls and sep around a text, or bos in front, where there are such roles;
        eos is put by `fastllm.data.batch`. ValueError: no text, an unknown role or rule, a size without room for the 256 bytes.
        """
        if unknown := set(roles) - set(ROLES):
            raise ValueError(f"roles name {', '.join(sorted(unknown))}; allowed: {', '.join(ROLES)}")
        if pre not in PRE_TOKENIZERS:
            raise ValueError(f"pre is {pre!r}; allowed: {', '.join(sorted(PRE_TOKENIZERS))}")
        special = list(dict.fromkeys([*roles.values(), *more]))
        if vocab_size < 256 + len(special):
            raise ValueError(
                f"vocab_size is {vocab_size}; allowed: from {256 + len(special)}, 256 bytes and the special tokens"
            )
        backend = _byte_level(models.BPE(), PRE_TOKENIZERS[pre])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        count = 0

        def counted() -> Iterator[str]:
            nonlocal count
            for text in texts:
                count += bool(text)
                yield text

        backend.train_from_iterator(counted(), trainer)
        if not count:
            raise ValueError("there is no text to train a tokenizer on; give a source with documents")
        ids = {role: backend.token_to_id(token) for role, token in roles.items()}
        around = ("cls", "sep") if {"cls", "sep"} <= roles.keys() else ("bos", None)
        _surround(backend, *(ids.get(role) for role in around))
        return cls(backend, ids)

    def extended(self, tokens: Iterable[str], special: bool = True) -> "Tokenizer":
        """A copy with further tokens behind the last one; those that are there already stay as they are.

        special: never read out of a text of users (see `encode`). The model's tables grow by
        `fastllm.models.resize.resize_vocab`. ValueError: an empty token.
        """
        tokens = list(tokens)
        if "" in tokens:
            raise ValueError("a token is empty; give the text that it stands for")
        backend = Backend.from_str(self.backend.to_str())
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
        return Tokenizer(backend, {role: getattr(self, f"{role}_id") for role in ROLES}, self.eos_ids)

    # Load and save

    @classmethod
    def from_gguf(cls, file: HasMetadata) -> "Tokenizer":
        """From the metadata of a GGUF: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

        ValueError: there is no tokenizer in the file, or one of another kind, or it contradicts itself.
        """
        meta = file.metadata
        kind = _value(meta, "model", str)
        builder = {"gpt2": _byte_level_backend, "llama": _sentencepiece_backend}.get(kind)
        if builder is None or "tokenizer.ggml.tokens" not in meta:
            what = "no tokenizer" if kind is None else f"a tokenizer of kind {kind!r} without support here or tokens"
            raise ValueError(f"{file.path} holds {what}; supported: gpt2, llama; else use a folder with tokenizer.json")
        tokens = [token or f"[EMPTY_{id}]" for id, token in enumerate(_value(meta, "tokens", list, item=str))]
        vocab = {token: id for id, token in enumerate(tokens)}
        if len(vocab) != len(tokens):
            twice = next(token for id, token in enumerate(tokens) if vocab[token] != id)
            raise ValueError(f"{file.path}: the vocabulary has the token {twice!r} twice")
        kinds = _value(meta, "token_type", list, [], int)
        names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "sep": "seperator", "mask": "mask"}
        roles = {role: _value(meta, f"{name}_token_id", int) for role, name in (names | {"cls": "cls"}).items()}
        for role, id in roles.items():
            if id is not None and not 0 <= id < len(tokens):
                raise ValueError(f"{file.path}: {role} is token {id}, out of a vocabulary of {len(tokens)}")
        try:
            backend, add_bos = builder(meta, vocab)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{file.path}: the tokenizer cannot be built: {error}") from error
        backend.add_tokens(
            [
                AddedToken(token, special=kind != USER_DEFINED, normalized=False)
                for token, kind in zip(tokens, kinds, strict=False)
                if kind in (UNKNOWN, CONTROL, USER_DEFINED)
            ]
        )
        first = roles["bos"] if _value(meta, "add_bos_token", bool, add_bos) else None
        last = roles["eos"] if _value(meta, "add_eos_token", bool, False) else None
        _surround(backend, first, last)
        ends = [_value(meta, f"{name}_token_id", int) for name in ("eot", "eom")]
        return cls(backend, roles, [id for id in ends if id is not None])

    @classmethod
    def from_folder(cls, path: str | os.PathLike) -> "Tokenizer":
        """From tokenizer.json, with the roles of tokenizer_config.json and special_tokens_map.json beside it.

        FileNotFoundError: no tokenizer.json. ValueError: a file that cannot be read as what it should be.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json, which this tokenizer is read from")
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{file} is not a tokenizer: {error}") from error
        config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        roles = {}
        for role in ROLES:
            token = config.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            roles[role] = backend.token_to_id(token) if isinstance(token, str) else None
        ends = _read_json(folder / "generation_config.json").get("eos_token_id")
        if ends is None:  # as transformers does
            ends = _read_json(folder / "config.json").get("eos_token_id")
        return cls(backend, roles, [*_ids(ends, folder), *_ids(config.get("eos_token_ids"), folder)])

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `from_folder` and transformers read."""
        with Replacing(folder) as files:
            self.write(files)

    def write(self, files: Replacing) -> None:
        """The same among other files."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for role in ROLES:
            id = getattr(self, f"{role}_id")
            if id is not None:
                config[f"{role}_token"] = self.token(id)
        config["eos_token_ids"] = sorted(self.eos_ids)
        files.write("tokenizer.json", self.backend.to_str(pretty=True))
        files.write("tokenizer_config.json", json.dumps(config, indent=2))


def _surround(backend: Backend, first: int | None, last: int | None) -> None:
    """The tokens that encode() puts in front of a text and behind it."""
    around = [
        {"id": f"{id}", "ids": [id], "tokens": [backend.id_to_token(id)]} for id in {first, last} if id is not None
    ]
    if around:
        single = [f"{id}" for id in (first,) if id is not None] + ["$A"]
        single += [f"{id}" for id in (last,) if id is not None]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)


def _decoder_mode(backend: Backend) -> tuple[str, bool, str]:
    """How tokens become text ("byte_level", "byte_fallback" or, by the library, "text"); whether a first space goes; which
    tokens the library may make one text of ("", "bytes": those in a row, "all")."""
    if backend.decoder is None:
        return "text", False, ""
    state = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte_level", False, ""
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0]["pattern"] == {"String": "▁"}:
        if kinds[3:] == []:
            return "byte_fallback", False, ""
        if kinds[3:] == ["Strip"] and (steps[3]["content"], steps[3]["start"], steps[3]["stop"]) == (" ", 1, 0):
            return "byte_fallback", True, ""
    if "Fuse" in kinds[:-1] or not {"Fuse", "ByteFallback", *_APART}.issuperset(kinds):
        return "text", False, "all"
    return "text", False, "bytes" if "ByteFallback" in kinds else ""


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _ids(value: Any, folder: Path) -> list[int]:
    """Token ids of a file: one, a list, or none."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(id) is int for id in ids):
        raise ValueError(f"{folder}: eos_token_id is {value!r}; wanted a token id, or a list of them")
    return ids


def _value(meta: Mapping[str, Any], name: str, kind: type, default: Any = None, item: type | None = None) -> Any:
    """tokenizer.ggml.<name>. ValueError for one of another type, or a list of other items."""
    value = meta.get(f"tokenizer.ggml.{name}", default)
    if value is not default and (type(value) is not kind or (item and not set(map(type, value)) <= {item})):
        wanted = f"a list of {item.__name__}" if item else kind.__name__
        raise ValueError(f"tokenizer.ggml.{name} is {repr(value)[:40]}; wanted {wanted}")
    return value


def _byte_level_backend(meta: Mapping[str, Any], vocab: dict[str, int]) -> tuple[Backend, bool]:
    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}; supported: {', '.join(sorted(PRE_TOKENIZERS))}")
    rule = PRE_TOKENIZERS[pre]
    merges = [tuple(merge.split(" ")) for merge in meta.get("tokenizer.ggml.merges", [])]
    return _byte_level(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.ignore_merges), rule), rule.add_bos


def _byte_level(model: models.Model, rule: PreTokenizer) -> Backend:
    backend = Backend(model)
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in rule.splits]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_backend(meta: Mapping[str, Any], vocab: dict[str, int]) -> tuple[Backend, bool]:
    """SentencePiece joins the adjacent pair that makes the best-scored piece: BPE with merges in order of score."""
    scores = meta.get("tokenizer.ggml.scores", [])
    if len(scores) != len(vocab):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(vocab)} tokens")
    kinds = meta.get("tokenizer.ggml.token_type", [1] * len(vocab))
    whole = {token for token, kind in zip(vocab, kinds, strict=True) if kind != 1}  # control, byte, unused ...
    merges = []
    for token in sorted(vocab.keys() - whole, key=lambda token: (-scores[vocab[token]], vocab[token])):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += [pair for pair in pairs if all(part in vocab and part not in whole for part in pair)]
    unknown = meta.get("tokenizer.ggml.unknown_token_id")
    unk_token = next((token for token, id in vocab.items() if id == unknown), None)
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    steps = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *steps])
    return backend, True
