"""Tokenizers that are trained, and extended with new tokens."""

import pytest
from _assets import asset
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.data.tokenizer import Tokenizer
from fastllm.models.gguf import GGUFFile

TEXTS = [f"the cat number {i} sat on the mat; naïve cats, the mats!\n" for i in range(200)]
SMALL = Tokenizer.train(TEXTS, 400)


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
@settings(max_examples=100, deadline=None)
def test_every_text_comes_back(text):
    assert SMALL.decode(SMALL.encode(text), skip_special_tokens=False) == text


def test_training():
    assert (SMALL.token(0), SMALL.eos_id, SMALL.pad_id, SMALL.eos_ids) == ("<|endoftext|>", 0, 1, {0})
    assert len(SMALL) <= 400 and len(SMALL.encode(" the")) == 1 and not SMALL.add_bos
    assert SMALL.encode("<|endoftext|>") != [0] and SMALL.encode("<|endoftext|>", parse_special=True) == [0]
    assert len(SMALL.encode("12")) == 2  # digits stand alone
    again = Tokenizer.train(iter(TEXTS), 400)
    assert again.backend.to_str() == SMALL.backend.to_str()
    tight = Tokenizer.train(TEXTS, 258)
    assert len(tight) == 258 and len(tight.encode("the")) == 3


def test_roles_and_more(tmp_path):
    roles = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]", "eos": "[SEP]"}
    made = Tokenizer.train(TEXTS, 300, roles, more=["<extra_id_0>"], pre="gpt-2")
    ids = made.encode("the mat")
    assert (ids[0], ids[-1], made.mask_id, made.eos_id) == (made.cls_id, made.sep_id, 3, 1)
    assert made.token_id("<extra_id_0>") == 4
    made.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).encode("the mat") == ids
    bos = Tokenizer.train(TEXTS, 300, {"bos": "<s>", "eos": "</s>"})
    assert bos.add_bos and bos.eos_ids == {1}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"texts": []}, "no text to train"),
        ({"texts": ["", ""]}, "no text to train"),
        ({"vocab_size": 257}, "vocab_size is 257; allowed: from 258"),
        ({"roles": {"end": "x"}}, "roles name end; allowed: bos, eos"),
        ({"pre": "martian"}, "pre is 'martian'; allowed: .*gpt-2"),
    ],
)
def test_training_errors(given, words):
    with pytest.raises(ValueError, match=words):
        Tokenizer.train(**{"texts": TEXTS, "vocab_size": 300} | given)


def test_extended(tmp_path):
    more = SMALL.extended(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    first = len(SMALL)
    assert len(more) == first + 2 and len(SMALL) == first and more.pad_id == 1
    assert more.encode("<|im_start|>the<|im_end|>", parse_special=True) == [first, *SMALL.encode("the"), first + 1]
    assert more.eos_ids == {0, first + 1}  # its name says what it is
    assert more.encode(TEXTS[0]) == SMALL.encode(TEXTS[0])
    assert more.encode("<|im_end|>") == SMALL.encode("<|im_end|>")
    word = SMALL.extended(["catmat"], special=False)
    assert word.encode("catmat") == [first] and word.decode([first]) == "catmat"
    more.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert (len(again), again.eos_ids) == (first + 2, more.eos_ids)
    with pytest.raises(ValueError, match="a token is empty"):
        SMALL.extended(["a", ""])


def test_extending_a_gguf():
    with GGUFFile(asset()) as file:
        tokenizer = Tokenizer.from_gguf(file)
    more = tokenizer.extended([f"<extra_id_{i}>" for i in range(100)])
    text = "Once upon a time, naïve 🎉"
    assert len(more) == 49252 and more.encode(text) == tokenizer.encode(text) and more.eos_ids == tokenizer.eos_ids
