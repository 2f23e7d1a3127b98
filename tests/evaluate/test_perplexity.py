"""Perplexity: windows, figures worked out by hand, bits that no batch changes, and transformers' figures of a real model."""

import math

import _tiny
import pytest
import torch
from _assets import asset, packaged
from _scores import TEXTS, Counting
from peers import llama_from_gguf

from fastllm import LLM, models
from fastllm.data.sources import Documents
from fastllm.data.tokenizer import Tokenizer
from fastllm.evaluate.perplexity import Perplexity, perplexity, pseudo_perplexity, windows
from fastllm.evaluate.scorer import Scorer
from fastllm.models.encoder import Encoder, EncoderConfig


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return _tiny.gguf(tmp_path_factory.mktemp("evaluate") / "tiny.gguf")


@pytest.fixture(scope="module")
def llm(path):
    return LLM(path)


@pytest.fixture(scope="module")
def scorer(path, llm):
    """The same weights, as parameters."""
    return Scorer(models.load(path), llm.tokenizer)


def bytewise(**roles) -> Tokenizer:
    """A token for each byte."""
    return Tokenizer.train(["a"], 256 + 1 + len(roles), roles={"eos": "<e>", **roles})


# ------------------------------------------------------------------------------------------------------------- windows


def test_windows_by_hand():
    assert list(windows(10, 4, 2)) == [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    assert list(windows(9, 4, 3)) == [(0, 4, 1), (3, 7, 4), (6, 9, 7)]
    assert list(windows(3, 8, 2)) == [(0, 3, 1)] and list(windows(1, 8, 2)) == list(windows(0, 8, 2)) == []


def test_every_token_is_scored_once_and_with_context():
    for window in range(2, 9):
        for stride in range(1, window):
            for count in range(2, 40):
                scored = [
                    (i, i - begin) for begin, stop, first in windows(count, window, stride) for i in range(first, stop)
                ]
                assert [i for i, _ in scored] == list(range(1, count))
                assert all(context >= min(i, window - stride) for i, context in scored)
                assert all(stop - begin <= window for begin, stop, _ in windows(count, window, stride))


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 0), (4, 4), (4, 5)])
def test_windows_that_cannot_be(window, stride):
    with pytest.raises(
        ValueError, match=rf"window={window}, stride={stride}; allowed: a window of 2 or more, a stride of 1"
    ):
        list(windows(10, window, stride))


# -------------------------------------------------------------------------------------------------------------- by hand


def test_the_context_of_each_token():
    """Windows of 4 that move by 2 over 7 tokens: 1, 2, 3, then each pair with 2 and 3 before it, at the end one with 2."""
    model = Counting(bytewise())
    found = perplexity(model, ["abcdefg"], window=4, stride=2)
    assert found == Perplexity(nats=1 + 2 + 3 + 2 + 3 + 2, tokens=6, bytes=6, texts=1)
    assert [len(ids) for ids in model.asked] == [4, 4, 3]
    assert found.perplexity == math.exp(13 / 6) and found.bits_per_byte == pytest.approx(13 / 6 / math.log(2))


def test_bytes_are_those_of_what_is_scored():
    """é is two bytes, each a token here; with bos in front the first token of the text counts, too."""
    assert perplexity(Counting(bytewise()), ["éa", "x"]) == Perplexity(nats=1 + 2, tokens=2, bytes=2, texts=2)
    assert perplexity(Counting(bytewise(bos="<s>")), ["éa", "x"]) == Perplexity(
        nats=1 + 2 + 3 + 1, tokens=4, bytes=4, texts=2
    )


def test_a_model_that_knows_nothing(llm, path):
    """All logits are 0: every token has 1 / V, and the perplexity is V."""
    model = models.load(path)
    torch.nn.init.zeros_(model.head.weight)
    found = perplexity(Scorer(model, llm.tokenizer), TEXTS[:5], window=16)
    assert found.perplexity == pytest.approx(len(_tiny.TOKENS), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(math.log2(len(_tiny.TOKENS)) * found.tokens / found.bytes, rel=1e-6)


def test_figures_without_end():
    assert Perplexity(math.inf, 3, 3, 1).perplexity == Perplexity(4000.0, 2, 3, 1).perplexity == math.inf


# ---------------------------------------------------------------------------------------------------------------- bits


def test_a_batch_changes_no_bit(llm, scorer):
    """The engine's figures and the bare module's, in batches of 1, 16 and 128, packed or each text by itself."""
    found = {
        perplexity(model, TEXTS, window=20, stride=7, batch=batch) for model in (llm, scorer) for batch in (1, 16, 128)
    }
    found |= {
        perplexity(Scorer(scorer.model, llm.tokenizer, rows), TEXTS, window=20, stride=7) for rows in (1, 64, 1 << 20)
    }
    assert len(found) == 1
    whole = perplexity(llm, TEXTS)
    assert whole == perplexity(scorer, TEXTS) and whole.nats != found.pop().nats
    ids = [llm.tokenizer.encode(text) for text in TEXTS]
    assert whole.nats == math.fsum(-value for values in llm.logprobs(ids) for value in values)
    assert perplexity(llm, TEXTS[:1]).perplexity == pytest.approx(llm.perplexity(TEXTS[0])[0], rel=1e-12)


def test_starts(llm, scorer):
    ids = [llm.tokenizer.encode(text) for text in TEXTS[:20]] + [[5]]
    whole, starts = llm.logprobs(ids), [1 + i % len(one) for i, one in enumerate(ids)]
    for model in (llm, scorer):
        for _ in range(2):  # the second time from the prefix cache
            found = model.logprobs(ids, starts=starts)
            assert found == [values[start - 1 :] for values, start in zip(whole, starts, strict=True)]
        assert model.logprobs(ids) == whole
        with pytest.raises(ValueError, match="allowed: 1 to"):
            model.logprobs(ids[:1], starts=0)
        with pytest.raises(ValueError, match="allowed: 1 to"):
            model.logprobs([[3, 4]], starts=[3])


def test_a_scorer_leaves_the_module_as_it_was(scorer):
    model = scorer.model.train()
    before = [p.clone() for p in model.parameters()]
    first = perplexity(scorer, TEXTS[:3])
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with torch.no_grad():
        model.head.weight *= 0.5
    assert perplexity(scorer, TEXTS[:3]) != first  # nothing is kept of the weights
    with torch.no_grad():
        model.head.weight *= 2
    assert perplexity(scorer, TEXTS[:3]) == first
    model.head.weight.data[0] = math.nan
    try:
        with pytest.raises(ValueError, match="NaN"):
            perplexity(scorer, TEXTS[:3])
    finally:
        model.head.weight.data[0] = before[-1][0]


# ---------------------------------------------------------------------------------------------------------- real models


@torch.no_grad()
def test_transformers_has_the_same_perplexity():
    llm = LLM(asset(), dtype="float32")
    source = Documents(packaged("passages") / "wikipedia_5.jsonl", text="0")
    text = " ".join(next(source).text for _ in range(2))[:900]
    ids = llm.tokenizer.encode(text)
    theirs = llama_from_gguf(asset())
    values, end = [], 0
    for begin in range(
        0, len(ids), 24
    ):  # as their documentation has it: the labels of what was scored before are masked
        stop = min(begin + 64, len(ids))
        logits = theirs(torch.tensor([ids[begin:stop]])).logits[0, :-1].double().log_softmax(-1)
        values += logits.gather(1, torch.tensor(ids[begin + 1 : stop])[:, None])[max(end - begin - 1, 0) :, 0].tolist()
        end = stop
        if stop == len(ids):
            break
    assert len(values) == len(ids) - 1 > 150
    found = perplexity(llm, [text], window=64, stride=24)
    assert found.tokens == len(values)
    assert found.perplexity == pytest.approx(math.exp(-sum(values) / len(values)), rel=1e-4)
    size = len(text.encode()) - len(llm.tokenizer.decode(ids[:1]).encode())
    assert found.bytes == size and found.bits_per_byte == pytest.approx(-sum(values) / math.log(2) / size, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- masked


@pytest.fixture(scope="module")
def masked():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(TEXTS, 300, roles={"cls": "[C]", "sep": "[S]", "mask": "[M]", "pad": "[P]"})
    return Encoder(EncoderConfig(300, 2, 64, 96, 4, 32, head="mlm")).eval(), tokenizer


@torch.no_grad()
def test_pseudo_perplexity_masks_each_token_in_turn(masked):
    model, tokenizer = masked
    values = []
    for text in TEXTS[:3]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        for begin in range(0, len(ids), 30):  # pieces of 32 with [C] and [S]
            piece = torch.tensor([[tokenizer.cls_id, *ids[begin : begin + 30], tokenizer.sep_id]])
            for place in range(1, piece.shape[1] - 1):
                asked = piece.clone()
                asked[0, place] = tokenizer.mask_id
                values.append(model(asked)[0, place].double().log_softmax(-1)[piece[0, place]].item())
    found = pseudo_perplexity(model, tokenizer, TEXTS[:3])
    assert (found.tokens, found.texts, found.bytes) == (len(values), 3, sum(len(t.encode()) for t in TEXTS[:3]))
    assert found.perplexity == pytest.approx(math.exp(-sum(values) / len(values)), rel=1e-5)
    for rows in (1, 100, 32 * 128):
        assert pseudo_perplexity(model, tokenizer, TEXTS[:3], rows=rows) == found
    shorter = pseudo_perplexity(model, tokenizer, TEXTS[:3], window=8)
    assert shorter.tokens == found.tokens and shorter.nats != found.nats


# -------------------------------------------------------------------------------------------------------------- errors


def test_errors(llm, scorer, masked, tmp_path):
    with pytest.raises(ValueError, match="window=2000; allowed: 2 to 1024"):
        perplexity(llm, TEXTS, window=2000)
    with pytest.raises(ValueError, match="there is nothing to evaluate"):
        perplexity(llm, [])
    with pytest.raises(ValueError, match="2 texts, and none has two tokens"):
        perplexity(llm, ["a", ""])
    with pytest.raises(ValueError, match="batch=0"):
        perplexity(llm, TEXTS, batch=0)
    with pytest.raises(ValueError, match='record:2: no "text"'):
        perplexity(llm, [{"text": "a b"}, {"txt": "a b"}])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl:0: the file is empty"):
        perplexity(llm, Documents(tmp_path / "empty.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"text": "in the rain"}\n')
    once = Documents(tmp_path / "a.jsonl")
    perplexity(llm, once)
    with pytest.raises(ValueError, match="gives its documents once"):
        perplexity(llm, once)
    with pytest.raises(TypeError, match="Scorer: the model is LLM; it must be a Decoder"):
        Scorer(llm, llm.tokenizer)
    with pytest.raises(ValueError, match="adapter='x'; a module has its adapter in itself"):
        perplexity(scorer, TEXTS, adapter="x")
    with pytest.raises(ValueError, match="Scorer: the tokenizer has 300 ids, the model 109"):
        Scorer(scorer.model, masked[1])
    model, tokenizer = masked
    with pytest.raises(ValueError, match="window=2; allowed: 3 to 32"):
        pseudo_perplexity(model, tokenizer, TEXTS, window=2)
    with pytest.raises(ValueError, match="the vocabulary names no mask"):
        pseudo_perplexity(model, bytewise(), TEXTS)
    with pytest.raises(ValueError, match="1 texts, and none has a token"):
        pseudo_perplexity(model, tokenizer, [""])
    with pytest.raises(ValueError, match="head=None; pseudo-perplexity needs one with head='mlm'"):
        pseudo_perplexity(Encoder(EncoderConfig(300, 1, 64, 96, 4, 32)), tokenizer, TEXTS)
