"""A model that is saved brings its tokenizer and its chat template: transformers and LLM read the folder alone."""

import shutil
import warnings
from pathlib import Path

import _tiny
import pytest
import torch
import transformers
from _assets import asset

from fastllm import LLM, SamplingParams, models
from fastllm.data.chat import ChatTemplate
from fastllm.data.tokenizer import Tokenizer
from fastllm.decode.embed import TextEncoder
from fastllm.decode.text2text import Text2Text
from fastllm.evaluate.scorer import Scorer
from fastllm.files import Replacing
from fastllm.models.decoder import Decoder
from fastllm.models.encoder import Encoder, EncoderConfig
from fastllm.models.gguf import GGUFFile
from fastllm.models.initial import initialise
from fastllm.models.seq2seq import Seq2Seq, Seq2SeqConfig
from fastllm.models.text import write_text

TEXTS = ("the hen", "  on a tin roof, at 12:30!\n\n\tin the attic", "café", "a" * 50, "", " ", "don't\nain't")
MORE = ("naïve 漢字 и кириллица 🙂", "for i in range(1000):\n    print(i)  # done")
TALK = [
    {"role": "user", "content": "in the tin"},
    {"role": "assistant", "content": "on it"},
    {"role": "user", "content": "a?"},
]


def check_text(folder: Path, tokenizer: Tokenizer, template: ChatTemplate, texts=TEXTS) -> None:
    """What transformers and we read there is what the base has."""
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    for text in texts:
        ids = tokenizer.encode(text)
        assert ours.encode(text) == ids == theirs(text)["input_ids"], text
        assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=False), text
    assert ours.eos_ids == tokenizer.eos_ids and theirs.eos_token_id == tokenizer.eos_id
    rendered = template.render(TALK)
    assert theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == rendered
    assert ChatTemplate.from_folder(folder).render(TALK) == rendered
    ids = tokenizer.encode(rendered, add_special_tokens=False, parse_special=True)
    assert theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False) == ids


def text_side(path: Path) -> tuple[Tokenizer, ChatTemplate]:
    if path.is_dir():
        return Tokenizer.from_folder(path), ChatTemplate.from_folder(path)
    with GGUFFile(path) as file:
        return Tokenizer.from_gguf(file), ChatTemplate.from_gguf(file)


@pytest.mark.parametrize("make", [_tiny.gguf, _tiny.folder], ids=["GGUF", "folder"])
def test_a_saved_model_is_whole(make, tmp_path):
    base = make(tmp_path / ("base.gguf" if make is _tiny.gguf else "base"))
    model, saved = models.load(base), tmp_path / "saved"
    with torch.no_grad():
        model.layers[0].down.weight.mul_(0.5)  # tuned
    models.save(model, saved)
    check_text(saved, *text_side(base))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert set(theirs.generation_config.eos_token_id or [2]) == {0, 2} or make is _tiny.folder
    tokenizer, llm = transformers.AutoTokenizer.from_pretrained(saved), LLM(saved, max_num_seqs=1)
    given = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = theirs.generate(**given, max_new_tokens=12, do_sample=False)[0, given["input_ids"].shape[1] :]
    params = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=make is _tiny.folder)
    ours = llm.chat(TALK, params).token_ids
    assert made.tolist()[: len(ours)] == ours[: len(made)]
    models.save(models.load(saved), tmp_path / "again")
    check_text(tmp_path / "again", *text_side(base))


def test_the_real_default_model(tmp_path):
    path = asset()
    with Replacing(tmp_path) as files:
        write_text(path, files)
    check_text(tmp_path, *text_side(path), TEXTS + MORE)


def test_whose_text_is_written(tmp_path):
    base = _tiny.folder(tmp_path / "base")
    model, plain = models.load(base), tmp_path / "plain"
    model.origin = None
    models.save(model, plain)  # made in memory, say
    assert sorted(p.name for p in plain.iterdir()) == ["config.json", "model.safetensors"]
    models.save(model, plain, text=_tiny.gguf(tmp_path / "other.gguf"))
    check_text(plain, *text_side(tmp_path / "other.gguf"))
    (plain / "added_tokens.json").write_text("{}")  # of what stood there before
    (plain / "notes.txt").write_text("kept")
    models.save(model, plain, text=base)
    assert not (plain / "added_tokens.json").exists() and (plain / "notes.txt").exists()
    check_text(plain, *text_side(base))
    models.save(models.load(plain), plain)  # in its own place
    check_text(plain, *text_side(base))


def test_a_base_that_is_gone(tmp_path):
    base = _tiny.gguf(tmp_path / "base.gguf")
    model = models.load(base)
    base.unlink()
    with pytest.warns(
        UserWarning, match=r"saved is saved without a tokenizer: .*base.gguf.*; copy tokenizer.json .*save\(text="
    ):
        models.save(model, tmp_path / "saved")
    assert models.load(tmp_path / "saved").config == model.config
    bare = _tiny.gguf(tmp_path / "bare.gguf", tokenizer=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.save(models.load(bare), tmp_path / "bare")  # it never had one
    shutil.rmtree(tmp_path / "bare")


# ---------------------------------------------------------------------------------- a tokenizer of more ids than rows

IMAGE = "<image_soft_token>"  # Gemma 3: the one id behind its 262,144 rows
VOCAB = len(_tiny.TOKENS)
SMALL = {"layers": 1, "dim": 16, "ffn": 16, "heads": 2}
DOORS = {  # made of a tokenizer -> what takes its ids
    "LLM": lambda tokenizer: LLM.of(initialise(Decoder(_tiny.CONFIG), 1), tokenizer, max_num_seqs=1).logprobs,
    "Scorer": lambda tokenizer: Scorer(initialise(Decoder(_tiny.CONFIG), 1), tokenizer).logprobs,
    "TextEncoder": lambda tokenizer: (
        TextEncoder(Encoder(EncoderConfig(VOCAB, max_position=32, **SMALL)), tokenizer).embed
    ),
    "Text2Text": lambda tokenizer: (
        Text2Text(Seq2Seq(Seq2SeqConfig(VOCAB, 1, 1, 16, 16, 2, 8, max_position=256)), tokenizer).generate
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_special_tokens_that_the_model_has_no_row_for(door, tmp_path):
    base = text_side(_tiny.gguf(tmp_path / "base.gguf"))[0]
    with pytest.raises(ValueError, match=f"the tokenizer has {VOCAB + 2} ids, the model {VOCAB}; give the model's own"):
        DOORS[door](base.extended([IMAGE]).extended(["plain"], special=False))
    more = base.extended([IMAGE])
    take = DOORS[door](more)
    assert len(take([more.encode("the hen"), more.encode(IMAGE)])) == 2  # written in a text, it is text
    with pytest.raises(
        ValueError, match=rf"id {VOCAB} at place 1 .*\[0, {VOCAB}\); the model has no row for '{IMAGE}'"
    ):
        take([[5, VOCAB, 6]])
    with pytest.raises(ValueError, match=f"id {VOCAB + 1} at place 1 .*; encode the text with this model's tokenizer"):
        take([[5, VOCAB + 1, 6]])


def test_a_folder_whose_tokenizer_has_more(tmp_path):
    base = _tiny.folder(tmp_path / "base")
    params = SamplingParams(max_new_tokens=12, temperature=0.0, min_new_tokens=12)
    wanted = LLM(base).generate("the hen", params)[0].token_ids
    Tokenizer.from_folder(base).extended([IMAGE, "<end_of_turn>"]).save(base)  # the second ends a text
    llm = LLM(base)
    assert VOCAB + 1 in llm.tokenizer.eos_ids and len(llm.tokenizer) == VOCAB + 2
    assert llm.generate("the hen", params)[0].token_ids == wanted
    with pytest.raises(ValueError, match=f"the model has no row for '{IMAGE}', leave it out"):
        llm.chat([{"role": "assistant", "content": IMAGE}])
    assert llm.chat([{"role": "user", "content": IMAGE}], params).token_ids  # typed by a user it is text
    drawn = llm.generate("the hen", SamplingParams(max_new_tokens=200, temperature=100.0, seed=1))[0].token_ids
    assert max(drawn) < VOCAB
