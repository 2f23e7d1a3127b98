"""Decoder: parity with transformers on random weights and on real ones, and the contract of a whole model: the forward,
prefill in chunks and decoding token by token give the same bits."""

import copy
import dataclasses

import _llama
import pytest
import torch
from _paged import SequenceCache
from transformers import LlamaConfig, LlamaForCausalLM

from fastllm import hub, ops
from fastllm.data.chat import ChatTemplate
from fastllm.data.tokenizer import Tokenizer
from fastllm.models import load
from fastllm.models.decoder import Decoder, DecoderConfig
from fastllm.models.gguf import GGUFFile
from fastllm.models.weights import load_packed

PROMPTS = ("The capital of France is", "Once upon a time")
QUESTION = [{"role": "user", "content": "What is gravity?"}]
CONTINUATION = " Paris.\n\nThe answer is: 2018-01-22 "
TEXT = (
    "The history of the bicycle begins in the early nineteenth century, when Karl von Drais built a running machine with "
    "two wheels and no pedals. Inventors in France added cranks to the front wheel in the 1860s, and the chain drive came "
    "two decades later. Since then the shape of the machine has hardly changed: a frame of two triangles, two wheels of "
    "the same size, and a chain to the rear. Cities that build safe lanes find that many more people ride, that the air "
    "becomes cleaner, and that shops along these streets sell more than before."
)


@pytest.fixture(scope="module", params=[*_llama.CONFIGS, "odd"])
def pair(request, tmp_path_factory):
    """(transformers' model, the folder it was saved to)"""
    theirs = _llama.build(**_llama.CONFIGS.get(request.param, _llama.ODD))
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, folder


def random_ids(model, *shape: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, shape)


def test_logits_and_hidden_equal_transformers(pair):
    theirs, folder = pair
    ours, ids = load(folder), random_ids(theirs, 2, 70)
    with torch.no_grad():
        assert (ours(ids) - _llama.logits(theirs, ids)).abs().max() <= 1e-4
        hidden = ours.norm(ours.hidden(ids))
        assert (hidden - theirs.model(ids).last_hidden_state).abs().max() <= 1e-4
        assert torch.equal(ours.logits(ours.hidden(ids)), ours(ids))


def test_gradients_equal_transformers(pair):
    theirs, folder = pair
    ours, ids = load(folder), random_ids(theirs, 2, 12)
    theirs.requires_grad_()
    ours(ids).log_softmax(-1)[..., 0].sum().backward()
    theirs(ids).logits.log_softmax(-1)[..., 0].sum().backward()
    for mine, wanted in (
        (ours.embedding.weight, theirs.model.embed_tokens.weight),
        (ours.layers[0].attn_norm.weight, theirs.model.layers[0].input_layernorm.weight),
        (ours.layers[1].down.weight, theirs.model.layers[1].mlp.down_proj.weight),
        (ours.norm.weight, theirs.model.norm.weight),
    ):
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-3, atol=1e-4)
    theirs.requires_grad_(False).zero_grad()


def test_packed_weights_give_the_bits_of_the_parameters(pair):
    theirs, folder = pair
    packed, plain, ids = load_packed(folder), load(folder), random_ids(theirs, 2, 40)
    with torch.no_grad():
        assert torch.equal(packed(ids), plain(ids))


def stepwise(model: Decoder, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """Logits [S, V] of one sequence through the paged cache, `chunk` tokens at a time."""
    cache, pieces = SequenceCache(model.config, len(ids)), []
    for start in range(0, len(ids), chunk):
        stop = min(start + chunk, len(ids))
        pieces.append(model.logits(model.step(ids[start:stop], cache.chunk(start, stop))))
    return torch.cat(pieces)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("form", ["float32", "int8", "int4"])
def test_decoding_gives_the_bits_of_the_forward(pair, form, chunk):
    """Over more than one tile of keys: 256."""
    theirs, folder = pair
    quantize = None if form == "float32" else form
    if quantize and theirs.config.hidden_size % 32:
        pytest.skip("rows that are no multiple of 32 cannot be quantised")
    model, ids = load_packed(folder, quantize=quantize), random_ids(theirs, 290)
    with torch.no_grad():
        assert torch.equal(stepwise(model, ids, chunk), model(ids[None])[0])


def test_decode_step_in_place(pair):
    """next_token(): the tensors that a replayed step reads and advances."""
    theirs, folder = pair
    model, ids = load_packed(folder), random_ids(theirs, 40)
    cache = SequenceCache(model.config, 40)
    with torch.no_grad():
        whole = model(ids[None])[0]
        model.step(ids[:30], cache.chunk(0, 30))
        for length in range(31, 41):
            cache.seek(length)
            cache.ids.copy_(ids[length - 1 : length])
            assert torch.equal(model.logits(model.step(cache.ids, cache.next_token())), whole[length - 1 : length])


def test_a_sequence_does_not_depend_on_its_batch(pair):
    theirs, folder = pair
    model, ids = load_packed(folder), random_ids(theirs, 5, 33)
    with torch.no_grad():
        whole = model(ids)
        for i in range(5):
            assert torch.equal(model(ids[i : i + 1])[0], whole[i])
        assert torch.equal(model(ids[:, :20]), whole[:, :20])


def test_errors_of_a_forward(pair):
    theirs, folder = pair
    model, limit = load(folder), theirs.config.max_position_embeddings
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"ids have shape \(5,\); they must be \[B, S\]"):
            model(torch.zeros(5, dtype=torch.int64))
        with pytest.raises(ValueError, match=f"{limit + 1} tokens, the model has {limit} positions"):
            model(torch.zeros(1, limit + 1, dtype=torch.int64))
        for packed in (False, True):
            model = load_packed(folder) if packed else model
            with pytest.raises(IndexError, match=f"{theirs.config.vocab_size}"):
                model(torch.tensor([[theirs.config.vocab_size]]))
        assert model(torch.empty(1, 0, dtype=torch.int64)).shape == (1, 0, theirs.config.vocab_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "every size must be at least 1"),
        ({"ffn": -1}, "every size must be at least 1"),
        ({"heads": 5}, "heads=5 must be a multiple of kv_heads=2"),
    ],
)
def test_errors_of_a_config(change, message):
    config = DecoderConfig(vocab=10, layers=1, dim=8, ffn=8, heads=4, kv_heads=2, head_dim=4, max_position=16)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


# ----------------------------------------------------------------------------------------------------------- real weights


@pytest.fixture(scope="module")
def real():
    """(path, tokenizer, chat template, transformers' model of the dequantised weights)"""
    path = hub.resolve("smollm2-135m", progress=False)  # the main job: where the model cannot be had, this fails
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rope_theta=1e5, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    with GGUFFile(path) as file, torch.device("meta"):
        theirs = LlamaForCausalLM(config)
        state = {}
        with torch.device("cpu"):
            for name, hf in _llama.names(config).items():
                values, heads = file.dequantize(f"{name}.weight"), _llama.heads_of(name, config)
                state[f"{hf}.weight"] = (
                    torch.from_numpy(_llama.deinterleave(values.numpy(), heads)) if heads else values
                )
            theirs.load_state_dict(state, strict=False, assign=True)
            theirs.tie_weights()
            theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
        return path, Tokenizer.from_gguf(file), ChatTemplate.from_gguf(file), theirs.eval().requires_grad_(False)


def prompts(real) -> list[torch.Tensor]:
    _, tokenizer, template, _ = real
    chat = tokenizer.encode(template.render(QUESTION), add_special_tokens=False, parse_special=True)
    return [torch.tensor(ids) for ids in (*map(tokenizer.encode, PROMPTS), chat)]


def test_real_logits_equal_transformers(real):
    path, tokenizer, _, theirs = real
    model = load_packed(path, as_float=True)
    for ids in (*prompts(real), torch.tensor(tokenizer.encode(TEXT))):  # logits of up to 40
        wanted = _llama.logits(theirs, ids[None])
        exact = _llama.logits(copy.deepcopy(theirs).double(), ids[None])
        with torch.no_grad():
            ours = model(ids[None])
        assert (ours - exact).abs().max() <= 1e-4
        assert (ours - wanted).abs().max() <= 1e-4 + (wanted - exact).abs().max()
    assert (ours - exact).square().mean() <= 2 * (wanted - exact).square().mean()  # of the longest text


def test_real_greedy_text_is_that_of_transformers(real):
    path, tokenizer, _, theirs = real
    model = load_packed(path, as_float=True)
    for i, ids in enumerate(prompts(real)):
        wanted = theirs.generate(
            ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=20, do_sample=False
        )
        wanted = wanted[0, len(ids) :].tolist()
        cache, made = SequenceCache(model.config, len(ids) + 20), []
        with torch.no_grad():
            hidden = model.step(ids, cache.chunk(0, len(ids)))[-1:]
            while True:
                made.append(int(model.logits(hidden).argmax()))
                if len(made) == len(wanted):
                    break
                at = len(ids) + len(made)
                hidden = model.step(torch.tensor(made[-1:]), cache.chunk(at - 1, at))
        assert made == wanted, tokenizer.decode(made)
        if i == 0:
            assert tokenizer.decode(made) == CONTINUATION


def loss(model, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood of a text."""
    with torch.no_grad():
        return -ops.target_logprobs(model(ids[None])[0, :-1], ids[1:]).double().mean().item()


def test_real_model_as_stored(real):
    """The goal of quality: perplexity within 1 % of the dequantised weights'. And the contract holds here too."""
    path, tokenizer, _, _ = real
    ids = torch.tensor(tokenizer.encode(TEXT))
    stored, exact = load_packed(path), load_packed(path, as_float=True)
    assert isinstance(stored.layers[0].qkv.weight, ops.QWeight) and isinstance(exact.layers[0].qkv.weight, ops.Panels)
    assert abs(loss(stored, ids) - loss(exact, ids)) < 0.01
    with torch.no_grad():
        whole = stored(ids[None])[0]
        assert torch.equal(stepwise(stored, ids, 50), whole) and torch.equal(stepwise(stored, ids[:9], 1), whole[:9])
