"""A space in front of a text: none where the text goes on behind another, the tokens of the whole text being the oracle."""

import pytest
from _prefixed import FLAGS, FORMS, ROLES, TEXT, backend, metaspace, prepend
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from fastllm.data.batch import encode_completion, encode_messages
from fastllm.data.chat import ChatTemplate
from fastllm.data.prefix import unprefixed
from fastllm.data.tokenizer import Tokenizer

WORDS = ["the", "answer", " four", "f", "our", " ", "  ", "\n", "é", "你", "<|user|>", "</s>", "is ", "]"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)


def whole(example) -> list[int]:
    return [*example.ids.tolist(), int(example.target[-1])]


def said(example) -> list[int]:
    return example.target[example.weight > 0].tolist()


# -------------------------------------------------------------------------------------------------------- encode_after


@pytest.mark.parametrize("form", FORMS | FLAGS)
@settings(max_examples=100, deadline=None)
@given(left=TEXTS, right=TEXTS, parse=st.booleans())
def test_the_rest_of_a_text(form, left, right, parse):
    """Where the whole text's tokens have a border, they are those of its halves."""
    tokenizer = (FORMS | FLAGS)[form]
    before = tokenizer.encode(left, add_special_tokens=False, parse_special=parse)
    after = tokenizer.encode_after(before, right, parse_special=parse)
    tokenizer.backend.encode_special_tokens = not parse
    joint = tokenizer.backend.encode(left + right, add_special_tokens=False)
    n, cut = len(before), len(left)
    border = all(stop <= cut for _, stop in joint.offsets[:n]) and all(start >= cut for start, _ in joint.offsets[n:])
    if border and joint.ids[:n] == before:
        assert after == joint.ids[n:]
    if form != "unigram" and not parse:  # wherever it is cut, nothing is lost and nothing comes in
        assert tokenizer.decode([*before, *after], False) == tokenizer.decode(joint.ids, False)


@pytest.mark.parametrize("form", FORMS)
def test_by_hand(form):
    tokenizer = FORMS[form]
    space = "Ġ" if form == "bytes" else "▁"
    before = tokenizer.encode("two and two is", add_special_tokens=False)
    assert [tokenizer.token(id) for id in tokenizer.encode_after(before, " four")] == [f"{space}four"]
    assert tokenizer.token(tokenizer.encode_after(before, "four")[0])[0] == "f"
    assert tokenizer.encode_after([], "four") == tokenizer.encode("four", add_special_tokens=False)
    assert tokenizer.encode_after(before, "") == []
    anew = tokenizer.encode_after([tokenizer.token_id("<|user|>")], "four")
    assert (tokenizer.token(anew[0]) == f"{space}four") == (form not in ("first", "split"))
    with pytest.raises(TypeError, match="encode takes a str"):
        tokenizer.encode_after(before, b"four")
    with pytest.raises(ValueError, match="the text holds a lone surrogate"):
        tokenizer.encode_after(before, "four\ud800")


def test_vocabularies_without_it():
    """Byte-level ones and SentencePiece's without a prefix; and those whose space marks every word, as T5's."""
    plain = Tokenizer.train(TEXT, 300)
    assert unprefixed(plain.backend) is None and unprefixed(backend(None, metaspace("never"))) is None
    assert plain.encode_after([5], "four") == plain.encode("four")
    words = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace("always")])
    assert unprefixed(backend(None, words)) is None
    tokenizer = Tokenizer(backend(None, words), ROLES)
    assert [tokenizer.token(id) for id in tokenizer.encode_after([5], " four and")] == ["▁four", "▁and"]


def test_a_token_that_the_normalizer_saw():
    """Added tokens that are looked for in the normalized text cut it behind the space, so none comes anew."""
    tokenizer = Tokenizer(backend(prepend(), normalized=True), ROLES)
    left, right = "<s>", "four </s>and"
    before = tokenizer.encode(left, add_special_tokens=False, parse_special=True)
    joint = tokenizer.encode(left + right, add_special_tokens=False, parse_special=True)
    assert [*before, *tokenizer.encode_after(before, right, parse_special=True)] == joint


# ------------------------------------------------------------------------------------------------------------- training

PAIRS = [
    ("two and two is", " four"),
    ("the answer\n", "four"),
    ("is it negative?", "\npositive"),
    ("[A]", "five and six"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_completion(form, prompt, completion):
    tokenizer = FORMS[form]
    (example,) = encode_completion(tokenizer, prompt, completion)
    assert whole(example) == [*tokenizer.encode(prompt + completion), tokenizer.eos_id]
    assert whole(example)[: -len(said(example))] == tokenizer.encode(prompt)


@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"unigram", "bytes"}))
def test_a_prompt_stays_as_it_is_asked(form):
    """Though a token of the whole text spans the border: here the space and "four", "s" and "ix"."""
    tokenizer = FORMS[form]
    for prompt, completion in (("two and two is ", "four"), ("five and s", "ix")):
        (example,) = encode_completion(tokenizer, prompt, completion)
        ids, asked = whole(example), tokenizer.encode(prompt)
        assert ids[: len(asked)] == asked and len(said(example)) == len(ids) - len(asked)
        assert tokenizer.decode(ids) == prompt + completion
        assert ids[:-1] != tokenizer.encode(prompt + completion)


TEMPLATES = {
    "lines": "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}",
    "Llama 2": "{% for m in messages %}{% if m.role == 'user' %}<s>[I] {{ m.content }} [/I]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
    "right behind a token": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "plain": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
}
TALK = [
    {"role": "user", "content": "two and two"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "the answer"},
    {"role": "assistant", "content": "six, so five"},
]


@pytest.mark.parametrize("form", FORMS | {"prepend rstrip": 0, "first rstrip": 0})
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("talk", [TALK, TALK[1:]], ids=["user first", "assistant first"])
def test_messages(form, name, talk):
    """The model reads in training what the whole talk has, and before each turn what it is given when asked."""
    tokenizer, template = (FORMS | FLAGS)[form], ChatTemplate(TEMPLATES[name])
    if talk[0]["role"] == "assistant" and name in ("lines", "plain", "right behind a token"):
        talk = [{"role": "assistant", "content": "four"}, *talk[1:]]
    (example,) = encode_messages(tokenizer, template, talk)
    rendered = tokenizer.encode(template.render(talk, add_generation_prompt=False), False, parse_special=True)
    ids = whole(example)
    end = [] if tokenizer.eos_id in rendered else [tokenizer.eos_id]
    assert ids == [*rendered, *end][: len(ids)] and ids[-1] == tokenizer.eos_id
    for n in (i for i, message in enumerate(talk) if message["role"] == "assistant" and i):
        asked = tokenizer.encode(template.render(talk[:n]), add_special_tokens=False, parse_special=True)
        assert ids[: len(asked)] == asked and example.weight[len(asked) - 1] == 1
