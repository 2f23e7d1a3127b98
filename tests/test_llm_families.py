"""LLM over a folder of any family: greedy tokens are those of transformers' generate, text goes through the tokenizer."""

import _families
import _tiny
import pytest
import torch

from fastllm import LLM, SamplingParams
from fastllm.data.tokenizer import Tokenizer
from fastllm.models import load, save
from fastllm.models.gguf import GGUFFile

PROMPTS = ("the inner one", "a thin heron on the other tin then, and the rest of a much longer line in it")
NEW = 24


@pytest.fixture(scope="module", params=_families.CONFIGS)
def pair(request, tmp_path_factory):
    """(transformers' model, a folder with it and a tokenizer)"""
    path = tmp_path_factory.mktemp("model") / "folder"
    theirs = _families.folder(path, request.param, vocab_size=len(_tiny.TOKENS))
    with GGUFFile(_tiny.gguf(path.with_suffix(".gguf"))) as file:
        Tokenizer.from_gguf(file).save(path)
    return theirs, path


def greedy(theirs, ids: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    out = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


def test_greedy_tokens_are_those_of_transformers(pair):
    theirs, path = pair
    llm = LLM(path, max_model_len=256)
    for out in llm.generate(list(PROMPTS), SamplingParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True)):
        assert out.token_ids == greedy(theirs, out.prompt_token_ids)
        assert out.text == llm.tokenizer.decode(out.token_ids)


def test_log_probabilities_are_those_of_the_forward(pair):
    """Also quantised: what decoding reports is what scoring gives, bit for bit."""
    for quantize in (None, "int8"):
        llm = LLM(pair[1], max_model_len=256, quantize=quantize)
        (out,) = llm.generate(PROMPTS[1], SamplingParams(max_new_tokens=NEW, temperature=0.7, seed=3, ignore_eos=True))
        (scored,) = llm.logprobs([out.prompt_token_ids + out.token_ids])
        assert out.logprobs == scored[-NEW:]


def test_a_saved_model_generates_the_same(pair, tmp_path):
    params = SamplingParams(max_new_tokens=NEW, seed=5, ignore_eos=True)
    before = LLM(pair[1], max_model_len=256)
    save(load(pair[1]), tmp_path / "again")
    before.tokenizer.save(tmp_path / "again")
    after = LLM(tmp_path / "again", max_model_len=256)
    assert after.generate(PROMPTS[0], params)[0].token_ids == before.generate(PROMPTS[0], params)[0].token_ids
