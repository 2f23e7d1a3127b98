"""Tokenizer: published definitions and brute force as oracles, round trips, streams, files, the real vocabularies."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from _assets import asset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from fastllm.data.tokenizer import PRE_TOKENIZERS, Tokenizer
from fastllm.models.gguf import GGUFFile

CORPUS = [
    "The capital of France is Paris. I'll pay 12345 dollars, they've said; don't!",
    "Once upon a time, there was a little girl who loved to play with her toys.\n\n  x = [1, 2]\n\tdef f(): pass",
    "Größe, naïve café; 你好世界 こんにちは Привет 🎉👩‍👩‍👧 a\u0301 <tag> | ^ ~ $ 1.5",
] * 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from(
        ["the", " The", "'ll", "12", " 3", "\n", "  ", "\t", "é", "你好", "🎉", "\x00", "\x7f", "a\u0301", "<|im_end|>"]
    )
).map("".join)
RUNS = settings(max_examples=150, deadline=None)


class Stored:
    """What from_gguf reads of a GGUFFile."""

    path = "m.gguf"

    def __init__(self, **metadata):
        self.metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def train(pre=None) -> tuple[dict[str, int], list[str]]:
    """A small byte-level vocabulary with its merges, the special tokens first."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [" ".join(merge) for merge in model["merges"]]


VOCAB, MERGES = train()
TOKENS = sorted(VOCAB, key=VOCAB.get)


def byte_level(pre: str = "gpt-2", **extra) -> Tokenizer:
    given = {
        "model": "gpt2",
        "pre": pre,
        "tokens": TOKENS,
        "merges": MERGES,
        "token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Tokenizer.from_gguf(Stored(**{key: value for key, value in (given | extra).items() if value is not None}))


def published(pre: str, vocab=VOCAB, merges=MERGES, special=SPECIAL) -> Backend:
    """The tokenizer.json of the model's authors, with another vocabulary."""
    split = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
    if pre == "qwen2":
        qwen = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
        split = Regex(qwen.PRETOKENIZE_REGEX)
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = {
        "gpt-2": [own],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), own],
    }.get(pre, [pre_tokenizers.Split(split, "isolated"), bare])
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = Backend(models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    if pre == "llama-bpe":
        bos = SPECIAL[1]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    backend.add_special_tokens(special)
    return backend


PUBLISHED = {pre: published(pre) for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2")}
OURS = {pre: byte_level(pre) for pre in PUBLISHED}


@pytest.mark.parametrize("pre", PUBLISHED)
@RUNS
@given(text=ANY_TEXT)
def test_encode_as_published(pre, text):
    assert OURS[pre].encode(text, parse_special=True) == PUBLISHED[pre].encode(text).ids


TEXT = "I'LL pay 12345 é\n\n  now!"


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["I", "'", "LL", " pay", " 12345", " é", "\n\n ", " now", "!"]),
        ("smollm", ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", "5", " é", "\n\n ", " now", "!"]),
        ("llama-bpe", ["I", "'LL", " pay", " ", "123", "45", " é", "\n\n", " ", " now", "!"]),
        ("dbrx", ["I", "'LL", " pay", " ", "123", "45", " é", "\n\n", " ", " now", "!"]),
        ("qwen2", ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", " é", "\n\n", " ", " now", "!"]),
        ("stablelm2", ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", " é", "\n\n", " ", " now", "!"]),
        ("default", ["I", "'", "LL", " pay", " ", "123", "45", " é", "\n\n ", " now", "!"]),
        (None, ["I", "'", "LL", " pay", " ", "123", "45", " é", "\n\n ", " now", "!"]),
    ],
)
def test_words(pre, words):
    pieces = byte_level(pre).backend.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[start:end] for _, (start, end) in pieces] == words


@pytest.mark.parametrize("pre", [pre for pre, rule in PRE_TOKENIZERS.items() if not rule.nfc])
@settings(RUNS, max_examples=40)
@given(text=ANY_TEXT)
def test_round_trip(pre, text):
    tokenizer = OURS.get(pre) or byte_level(pre)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert not set(ids) & {0, 1, 2}  # text never turns into special tokens unasked


def test_special_tokens():
    tokenizer = OURS["gpt-2"]
    text = "<|im_start|>user\nHi<|im_end|>"
    parsed = tokenizer.encode(text, parse_special=True)
    assert parsed[0] == 1 and parsed[-1] == 2 and tokenizer.encode(text)[0] != 1
    assert tokenizer.decode(parsed) == "user\nHi" and tokenizer.decode(parsed, skip_special_tokens=False) == text
    assert tokenizer.encode_batch([text, "a"], parse_special=True) == [parsed, tokenizer.encode("a")]
    assert tokenizer.encode("") == []
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (1, 2, None, None)
    assert tokenizer.eos_ids == {0, 2} and len(tokenizer) == len(TOKENS)
    assert tokenizer.token(1) == "<|im_start|>" and tokenizer.token_id("<|im_end|>") == 2


def test_ends():
    kinds = [3] * 3 + [1] * (len(TOKENS) - 3)
    assert byte_level(eos_token_id=None, eot_token_id=40, eom_token_id=41, token_type=kinds).eos_ids == {0, 2, 40, 41}
    assert byte_level(token_type=[1] * len(TOKENS)).eos_ids == {2}  # the name alone makes no special token


@pytest.mark.parametrize(
    ("extra", "first", "last"),
    [
        ({"pre": "gpt-2"}, None, None),
        ({"pre": "llama-bpe"}, 1, None),
        ({"pre": "llama-bpe", "add_bos_token": False}, None, None),
        ({"pre": "gpt-2", "add_bos_token": True, "add_eos_token": True}, 1, 2),
        ({"pre": "gpt-2", "add_bos_token": True, "add_eos_token": True, "eos_token_id": 1}, 1, 1),
        ({"pre": "gpt-2", "add_bos_token": True, "bos_token_id": None}, None, None),
    ],
)
def test_bos_and_eos(extra, first, last):
    tokenizer = byte_level(**extra)
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [first] * (first is not None) + plain + [last] * (last is not None)
    assert tokenizer.add_bos == (first is not None)


@pytest.mark.parametrize(("pre", "count"), [("llama-bpe", 1), ("dbrx", 4), ("gpt-2", 4)])
def test_a_word_that_is_a_token_needs_no_merges(pre, count):
    assert "Ġthe" in VOCAB and len(byte_level(pre, merges=[]).encode(" the", add_special_tokens=False)) == count


def test_user_defined_tokens_are_always_parsed():
    kinds = [3, 4, 3] + [1] * (len(TOKENS) - 3)
    tokenizer = byte_level(token_type=kinds)
    ids = tokenizer.encode("a<|im_start|>b<|im_end|>")
    assert 1 in ids and 2 not in ids and tokenizer.decode(ids) == "a<|im_start|>b<|im_end|>"


def test_missing_bytes_are_left_out():
    """As in transformers: SmolLM2's own vocabulary lacks some."""
    kept = [token for token in TOKENS if token != "Ā"]  # byte 0
    tokenizer = byte_level(tokens=kept, merges=[], token_type=[3] * 3 + [1] * (len(kept) - 3))
    assert tokenizer.decode(tokenizer.encode("a\x00b")) == "ab"


# SentencePiece BPE ("llama")

PIECES = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = ["▁", *"abcdehilnortuw", "é", "你"]
WORDS = [
    "he",
    "▁t",
    "▁th",
    "▁the",
    "in",
    "er",
    "re",
    "▁in",
    "her",
    "there",
    "▁there",
    "ou",
    "out",
    "▁▁",
    "or",
    "ll",
    "ell",
]


def sentencepiece(**extra) -> Tokenizer:
    # A piece made of two others, all scores apart, the order of ids unlike the order of scores.
    scores = (
        [0.0] * len(PIECES)
        + [-1000.0 - n for n in range(len(LETTERS))]
        + [-float(n * 7 % 17) for n in range(len(WORDS))]
    )
    given = {
        "model": "llama",
        "tokens": PIECES + LETTERS + WORDS,
        "scores": scores,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(LETTERS) + len(WORDS)),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return Tokenizer.from_gguf(Stored(**given | extra))


SPM = sentencepiece()


def by_brute_force(text: str) -> list[int]:
    """Joins the best-scored adjacent pair, the leftmost of equals, until none makes a piece."""
    tokens = PIECES + LETTERS + WORDS
    rank = {word: -float(n * 7 % 17) for n, word in enumerate(WORDS)}
    symbols = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        pairs = [(rank[a + b], -at) for at, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in rank]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids = []
    for symbol in symbols:
        ids += [tokens.index(symbol)] if symbol in tokens else [3 + byte for byte in symbol.encode()]
    return ids


@RUNS
@given(
    text=st.text(st.sampled_from("abcdehilnortuw é你z\n🎉"), max_size=30)
    | st.sampled_from(["the  there", " her", "tthe"])
)
def test_sentencepiece(text):
    ids = SPM.encode(text)
    assert ids == [1, *by_brute_force(text)]
    assert SPM.decode(ids) == text
    assert SPM.decode(ids, skip_special_tokens=False) == "<s>" + (" " + text if text else "")


def test_sentencepiece_settings():
    assert SPM.add_bos and (SPM.bos_id, SPM.eos_id, SPM.unk_id) == (1, 2, 0) and SPM.eos_ids == {2}
    assert SPM.token_bytes(3 + 0xE2) == b"\xe2" and SPM.token_bytes(SPM.token_id("▁the")) == b" the"
    bare = sentencepiece(add_space_prefix=False, add_bos_token=False)
    assert bare.encode("the") == [bare.token_id(piece) for piece in ("t", "he")]
    assert bare.decode(bare.encode(" the")) == " the"


UNIGRAM = Backend(models.Unigram([("<unk>", 0.0), ("▁", -3.0), ("▁a", -1.0), ("b", -2.0), ("▁ab", -1.5)], unk_id=0))
UNIGRAM.pre_tokenizer, UNIGRAM.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
PIECE = Backend(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, ".": 3, "n": 4, "'": 5}, unk_token="[UNK]"))
PIECE.decoder = decoders.WordPiece()
KINDS = {
    "byte level": OURS["gpt-2"],
    "sentencepiece": SPM,
    "sentencepiece without prefix": sentencepiece(add_space_prefix=False),
    "unigram": Tokenizer(UNIGRAM, {"unk": 0}),
    "wordpiece": Tokenizer(PIECE, {"unk": 0}),
}


def test_added_tokens_keep_the_space_that_a_normalizer_gave_them():
    backend = Backend.from_str(SPM.backend.to_str())
    backend.add_tokens([AddedToken("wort"), AddedToken("▁<M>", normalized=False, special=True)])
    tokenizer = Tokenizer(backend, {})
    for text in ("the wort her", "wort", "the▁<M>her"):
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == backend.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode("the wort her")) == "the wort her"


def test_a_special_token_that_is_a_piece_of_unigram_is_text_where_it_is_not_parsed():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -3.0), *((c, -4.0) for c in "</s>a"), ("▁a", -1.0)]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_tokens([AddedToken("</s>", special=True, normalized=False), AddedToken("word")])
    tokenizer = Tokenizer(backend, {"eos": 1, "unk": 0})
    assert tokenizer.encode("a</s>word", parse_special=True)[1] == 1
    whole = tokenizer.encode("a</s>word")
    assert 1 not in whole and tokenizer.decode(whole, skip_special_tokens=False) == "a</s>word"
    assert [*tokenizer.encode("a"), *tokenizer.encode_after([8], "</s>word")] == whole


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda t: t.encode(5), TypeError, "encode takes a str.*got int"),
        (lambda t: t.encode(b"x"), TypeError, "got bytes"),
        (lambda t: t.encode(["x"]), TypeError, "got list"),
        (lambda t: t.encode_batch("text"), TypeError, "encode_batch a list of str"),
        (lambda t: t.encode("a\ud83d"), ValueError, r"lone surrogate '\\ud83d'"),
        (lambda t: t.decode([0, 10**6]), ValueError, f"token id 1000000 is out of .*0 to {len(TOKENS) - 1}"),
        (lambda t: t.decode([-1]), ValueError, "token id -1"),
        (lambda t: t.decode(["a"]), TypeError, "a token id is an int, got str 'a'"),
        (lambda t: t.decode([1.0]), TypeError, "got float"),
        (lambda t: t.token_bytes(len(t)), ValueError, f"allowed: 0 to {len(TOKENS) - 1}"),
        (lambda t: t.stream().push(2**40), ValueError, "token id 1099511627776"),
        (lambda t: Tokenizer(t.backend, {"eos": 9999}), ValueError, "eos_id 9999"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call(OURS["gpt-2"])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"model": None}, "holds no tokenizer; supported: gpt2, llama"),
        ({"tokens": None}, "without support here or tokens"),
        ({"model": "bert"}, "of kind 'bert'"),
        ({"pre": "martian"}, "pre is 'martian'; supported: .*smollm"),
        ({"tokens": ["a", "b", "a"], "merges": [], "token_type": []}, "token 'a' twice"),
        ({"merges": ["abc"]}, "cannot be built"),
        ({"merges": ["zz zz"]}, "cannot be built"),
        ({"bos_token_id": 10**6}, "bos is token 1000000, out of a vocabulary of"),
        ({"model": "llama", "scores": [1.0]}, "scores has 1 entries"),
    ],
)
def test_bad_gguf(extra, words):
    with pytest.raises(ValueError, match=words) as caught:
        byte_level(**extra)
    assert "m.gguf" in str(caught.value)


def test_empty_tokens_get_a_name():
    tokens = ["a", "", "b", ""]
    tokenizer = byte_level(tokens=tokens, merges=[], token_type=[1] * 4, bos_token_id=None, eos_token_id=None)
    assert len(tokenizer) == 4 and tokenizer.token(1) == "[EMPTY_1]"


def test_arrays_of_ids():
    torch = pytest.importorskip("torch")
    tokenizer = OURS["gpt-2"]
    ids = tokenizer.encode("Once upon a time")
    for given_ids in (torch.tensor(ids), torch.tensor(ids).numpy(), tuple(ids), iter(ids)):
        assert tokenizer.decode(given_ids) == "Once upon a time"


def test_threads():
    """The two ways of encoding share one backend."""
    tokenizer, text = OURS["gpt-2"], "<|im_start|>hello there" * 300
    want = [tokenizer.encode(text, parse_special=flag) for flag in (False, True)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda n: tokenizer.encode(text, parse_special=n % 2 == 1), range(200)))
    assert got == want * 100


# Folders


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_save_and_load(tmp_path, kind):
    tokenizer = KINDS[kind]
    tokenizer.encode("x", parse_special=False)
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    text = "the <|im_end|> 12 é🎉\n"
    for parse in (False, True):
        assert again.encode(text, parse_special=parse) == tokenizer.encode(text, parse_special=parse)
    for name in ("bos_id", "eos_id", "pad_id", "unk_id", "eos_ids", "add_bos"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)["input_ids"] == tokenizer.encode(text, parse_special=True)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_folder_settings(tmp_path):
    OURS["gpt-2"].save(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": "x"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("Once upon a time") == OURS["gpt-2"].encode("Once upon a time")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (1, 2, {0, 2, 9})


def test_bad_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    OURS["gpt-2"].save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("nonsense")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        Tokenizer.from_folder(tmp_path)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Tokenizer, Backend]:
    """Ours, and the rules of SmolLM2's own tokenizer.json with the vocabulary of the file."""
    with GGUFFile(asset("smollm2-135m")) as file:
        meta = file.metadata
        vocab = {token: id for id, token in enumerate(meta["tokenizer.ggml.tokens"])}
        kinds = meta["tokenizer.ggml.token_type"]
        special = [token for token, kind in zip(vocab, kinds, strict=True) if kind == 3]
        return Tokenizer.from_gguf(file), published("smollm", vocab, meta["tokenizer.ggml.merges"], special)


NOT_IN_SMOLLM2 = {4, 6, 19, 20, 22, 29, 192, 193, 241, 242, *range(245, 256)}  # bytes without a token


def test_smollm2(smollm2):
    tokenizer, _ = smollm2
    assert len(tokenizer) == 49152 and not tokenizer.add_bos
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (1, 2, 2, 0)
    assert tokenizer.eos_ids == {0, 2}
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    answer = " Paris.\n\nThe answer is: 2018-01-22 "
    assert tokenizer.decode(tokenizer.encode(answer)) == answer


@RUNS
@given(text=ANY_TEXT)
def test_smollm2_as_transformers(smollm2, text):
    tokenizer, backend = smollm2
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = tokenizer.encode(text, parse_special=True)
    assert ids == theirs(text)["input_ids"]
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    plain = tokenizer.encode(text)
    if not set(text.encode()) & NOT_IN_SMOLLM2:
        assert tokenizer.decode(plain) == text
    stream = tokenizer.stream()
    assert "".join([stream.push(id) for id in plain] + [stream.flush()]) == tokenizer.decode(plain)


def test_minilm():
    folder = asset("minilm-l6")
    tokenizer = Tokenizer.from_folder(folder)
    text = "A man isn't eating food, naïve 你好! [SEP]"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text, parse_special=True)
    assert ids == theirs(text)["input_ids"] and ids[0] == 101 and ids[-2:] == [102, 102]
    assert tokenizer.encode(text) != ids
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id) == (
        101,
        102,
        0,
        100,
        103,
    )
    assert tokenizer.bos_id is None and len(tokenizer) == 30522
    assert len(tokenizer.encode("word " * 1000)) == 1002  # its tokenizer.json cuts at 128
    stream = tokenizer.stream()
    assert "".join([stream.push(id) for id in ids]) + stream.flush() == tokenizer.decode(ids)
