"""Generation by encoder-decoders: the tokens of transformers' `generate`, greedy and by beams, and what batches don't change."""

import dataclasses

import pytest
import torch
import transformers as hf

from fastllm import models, ops
from fastllm.decode.beam import BeamParams, generate
from fastllm.models.layers import pack_weights
from fastllm.models.seq2seq import Seq2Seq, Seq2SeqConfig

T5 = dict(
    vocab_size=60, d_model=48, d_kv=12, num_heads=4, d_ff=80, num_layers=2, num_decoder_layers=2, decoder_start_token_id=0,
    relative_attention_num_buckets=8, relative_attention_max_distance=20,
)  # fmt: skip


@pytest.fixture(scope="module", params=["relu", "gated-gelu"])
def pair(request, tmp_path_factory):
    """(transformers' model, ours of the same weights, packed); what ends a text is a token that comes up at many places."""
    torch.manual_seed(1)
    theirs = hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj=request.param)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=1.5 * weight.shape[1] ** -0.5)
        theirs.shared.weight.mul_(3)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    ours = pack_weights(models.load(folder))
    rows = [h.token_ids for (h,) in generate(ours, *sources(), BeamParams(max_new_tokens=30))]
    places = {token: {row.index(token) for row in rows if token in row} for token in range(2, 60)}
    ours.config = dataclasses.replace(ours.config, eos_id=max(places, key=lambda token: len(places[token])))
    theirs.generation_config.eos_token_id = ours.config.eos_id
    return theirs, ours


def sources() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    ids, mask = torch.randint(2, 60, (12, 18)), torch.ones(12, 18, dtype=torch.int64)
    for row in range(12):
        mask[row, 18 - row :] = 0
    ids[mask == 0] = 0
    return ids, mask


def wanted(theirs, ids, mask, new: int, n: int = 1, **options) -> tuple[list[list[list[int]]], torch.Tensor]:
    with torch.no_grad():
        out = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=new, num_return_sequences=n, do_sample=False,
            return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip
    rows, eos = [], theirs.generation_config.eos_token_id
    for row in out.sequences[:, 1:].tolist():
        rows.append(row[: row.index(eos) + 1] if eos in row else row)
    return [rows[i : i + n] for i in range(0, len(rows), n)], getattr(out, "sequences_scores", None)


def tokens(found) -> list[list[list[int]]]:
    return [[h.token_ids for h in hypotheses] for hypotheses in found]


def test_greedy_tokens_equal_transformers(pair):
    theirs, ours = pair
    ids, mask = sources()
    expected, _ = wanted(theirs, ids, mask, 30)
    found = generate(ours, ids, mask, BeamParams(max_new_tokens=30))
    assert tokens(found) == expected
    lengths = {len(h.token_ids) for (h,) in found}
    assert len(lengths) > 2  # some end early, some do not
    for (h,) in found:
        assert (h.finish_reason == "stop") == (h.token_ids[-1] == ours.config.eos_id)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0, -0.5])
@pytest.mark.parametrize("beams", [2, 4])
def test_beams_equal_transformers(pair, beams, penalty, early_stopping):
    theirs, ours = pair
    ids, mask = sources()
    options = dict(length_penalty=penalty, early_stopping=early_stopping)
    expected, scores = wanted(theirs, ids, mask, 20, beams, num_beams=beams, **options)
    found = generate(ours, ids, mask, BeamParams(max_new_tokens=20, beams=beams, n=beams, **options))
    assert tokens(found) == expected
    torch.testing.assert_close(torch.tensor([h.score for hs in found for h in hs]), scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_source_has_the_same_tokens_alone(pair, beams):
    _, ours = pair
    ids, mask = sources()
    params = BeamParams(max_new_tokens=15, beams=beams, n=beams)
    together = generate(ours, ids, mask, params)
    rows = [row[: int(m.sum())].tolist() for row, m in zip(ids, mask, strict=True)]
    assert generate(ours, ours.encode_lists(rows), params=params) == together
    for i in (0, 5, 11):
        assert generate(ours, ours.encode_lists(rows[i : i + 1]), params=params) == together[i : i + 1]


def test_prompt_and_suppressed_tokens(pair):
    _, ours = pair
    ids, mask = sources()
    plain = tokens(generate(ours, ids, mask, BeamParams(max_new_tokens=12)))
    first = plain[0][0]
    prompted = generate(ours, ids[:1], mask[:1], BeamParams(max_new_tokens=12 - 4, prompt=[0, *first[:4]]))
    assert tokens(prompted)[0][0] == first[4:]
    banned = [first[0], ours.config.eos_id]
    for beams in (1, 3):
        found = generate(ours, ids, mask, BeamParams(max_new_tokens=12, beams=beams, suppress=banned))
        assert all(len(h.token_ids) == 12 and not set(banned) & set(h.token_ids) for (h,) in found)


@pytest.mark.parametrize(
    "kind",
    [
        dict(position="relative", norm="rms", norm_first=True, bias=False, scale=1.0, buckets=8, max_distance=8),
        dict(position="sinusoidal", embed_scale=32**0.5),
    ],
    ids=["t5", "original"],
)
def test_a_small_one_learns_to_sort(kind):
    """Trained by our kernels, it puts five numbers of 2 to 15 in order, greedy and by beams."""

    def task(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.rand(count, 14).argsort(1)[:, :5] + 2
        return numbers, torch.nn.functional.pad(numbers.sort(1).values, (1, 1), value=1)

    model, steps = Seq2Seq(Seq2SeqConfig(16, 1, 1, 32, 64, 2, 16, max_position=16, start_id=1, **kind)), 200
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    for _ in range(steps):
        numbers, target = task(64)
        loss = ops.cross_entropy(model(numbers, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    numbers, target = task(40)
    for beams in (1, 3):
        found = generate(model, numbers, params=BeamParams(max_new_tokens=8, beams=beams))
        right = sum(h.token_ids == wanted for (h,), wanted in zip(found, target[:, 1:].tolist(), strict=True))
        assert right >= 36


def test_a_vocabulary_smaller_than_the_candidates():
    model = Seq2Seq(Seq2SeqConfig(5, 1, 1, 16, 24, 2, 8, max_position=30))
    found = generate(model, torch.tensor([[2, 3]]), params=BeamParams(max_new_tokens=6, beams=10, n=10))
    assert 1 <= len(found[0]) <= 10 and all(len(h.token_ids) <= 6 for h in found[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams=0; allowed: an integer from 1 to 10"),
        ({"beams": 11}, "beams=11; allowed: an integer from 1 to 10"),
        ({"max_new_tokens": 0}, "max_new_tokens=0; allowed: an integer of at least 1"),
        ({"beams": 2, "n": 3}, "n=3; allowed: an integer from 1 to 2"),
        ({"early_stopping": "always"}, "early_stopping='always'; allowed: True, False, 'never'"),
        ({"length_penalty": "1"}, "length_penalty='1'; allowed: a number"),
    ],
)
def test_bad_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        BeamParams(**options)


def test_requests_that_are_refused():
    model = Seq2Seq(Seq2SeqConfig(5, 1, 1, 16, 24, 2, 8, max_position=30))
    source = torch.tensor([[2, 3]])
    with pytest.raises(ValueError, match=r"token 5 of prompt or suppress is outside the vocabulary \[0, 5\)"):
        generate(model, source, params=BeamParams(prompt=[5]))
    with pytest.raises(ValueError, match="32 tokens, the model has 30 positions; ask for fewer"):
        generate(model, source, params=BeamParams(max_new_tokens=32))
    with pytest.raises(TypeError, match="source is a list; it must be a tensor of ids"):
        generate(model, [[2, 3]])
    assert generate(model, source[:0], params=BeamParams(max_new_tokens=3)) == []
