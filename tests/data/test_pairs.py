"""Sources and targets: what is read and said, packed; positions to go on from."""

import itertools
import json

import pytest
import torch
from _training import documents, pair_batches, tokenizer

from fastllm.data.pairs import Pair, PairBatches, collate_pairs, encode_pair

START = 90


def test_a_batch_of_pairs():
    batch = collate_pairs([Pair.of([5, 6, 1], [7, 1], START), Pair.of([5, 1], [8, 9, 10, 1], START)])
    assert batch.source.ids.tolist() == [5, 6, 1, 5, 1] and batch.source.cu.tolist() == [0, 3, 5]
    assert batch.source.position.tolist() == [0, 1, 2, 0, 1] and batch.source.longest == 3
    said = batch.said
    assert said.packed.ids.tolist() == [START, 7, START, 8, 9, 10] and said.packed.cu.tolist() == [0, 2, 6]
    assert said.target.tolist() == [7, 1, 8, 9, 10, 1] and batch.weight.tolist() == [1] * 6
    moved = batch.to("meta")
    assert moved.source.ids.is_meta and moved.said.packed.cu.is_meta and moved.weight.is_meta
    assert (moved.source.longest, moved.said.packed.longest) == (3, 4)


@pytest.mark.parametrize(("source", "target"), [([1], []), ([], [1])])
def test_a_side_without_a_token_is_refused(source, target):
    with pytest.raises(
        ValueError, match=rf"a source of {len(source)} tokens, a target of {len(target)}; each needs one"
    ):
        Pair.of(source, target, START)


@pytest.mark.parametrize("names", [("source", "target"), ("prompt", "completion")])
def test_records(names):
    eos = tokenizer().eos_id
    ids = [tokenizer().encode(text, add_special_tokens=False) for text in (LONG, "is 9.")]
    fields = dict(zip(names, (LONG, "is 9."), strict=True)) | {"label": 1}
    (pair,) = encode_pair(tokenizer(), fields, START)
    assert pair.source.tolist() == [*ids[0], eos] and pair.target.target.tolist() == [*ids[1], eos]
    assert len(pair) == len(ids[0]) + len(ids[1]) + 2
    (cut,) = encode_pair(tokenizer(), fields, START, longest=2)
    assert (
        cut.source.tolist() == [ids[0][0], eos] and cut.target.target.tolist() == ids[1][:2]
    )  # no early end is taught


LONG = "3 plus 6 plus 1"


def test_other_records_are_refused():
    with pytest.raises(
        ValueError, match='a record of text; allowed: "source" and "target" or "prompt" and "completion"'
    ):
        encode_pair(tokenizer(), {"text": "x"}, START)
    with pytest.raises(ValueError, match="a record of nothing"):
        encode_pair(tokenizer(), {}, START)


def flat(made) -> list[tuple]:
    return [
        (b.source.ids.tolist(), b.source.cu.tolist(), b.said.packed.ids.tolist(), b.said.target.tolist()) for b in made
    ]


def test_goes_on_at_any_batch(tmp_path):
    """Spans are drawn anew in each epoch, and the same after a resume."""
    whole = flat(pair_batches(tmp_path, tokens=128, epochs=2))
    assert max(len(b[0]) + len(b[2]) for b in whole) <= 128
    texts = [sorted(itertools.chain(*(b[0] for b in part))) for part in (whole[: len(whole) // 2], whole)]
    assert len(texts[1]) > len(texts[0])
    for stop in range(0, len(whole) + 1, 9):
        first, again = (pair_batches(tmp_path, tokens=128, epochs=2) for _ in range(2))
        assert flat(itertools.islice(first, stop)) == whole[:stop]
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert flat(again) == whole[stop:] == flat(first)


def test_batches_are_full(tmp_path):
    sizes = [len(b.source.ids) + len(b.said.target) for b in pair_batches(tmp_path, epochs=1)]
    assert sum(sizes) / (len(sizes) * 256) > 0.75  # four windows, each with a rest
    with pytest.raises(ValueError, match="tokens=0, window=512; allowed: 1 or more each"):
        PairBatches(documents(tmp_path), lambda document, index: [], tokens=0)


def test_what_cannot_be_encoded_is_named(tmp_path):
    made = PairBatches(documents(tmp_path), lambda d, i: encode_pair(tokenizer(), d.fields, START), tokens=64)
    with pytest.raises(ValueError, match=r"lines\.txt:\d+: a record of text"):
        next(made)


def test_packed_pairs_are_the_padded_ones(tmp_path):
    """The bits of every prediction, one pair at a time and together."""
    from _training import seq2seq

    model, batch = seq2seq(), next(pair_batches(tmp_path))
    with torch.no_grad():
        packed = model.decode_packed(batch.said.packed, model.encode_packed(batch.source))
        sides = (batch.source, batch.said.packed)
        for (source, target), hidden in zip(
            zip(*(p.ids.split(p.cu.diff().tolist()) for p in sides), strict=True),
            packed.split(batch.said.packed.cu.diff().tolist()),
            strict=True,
        ):
            assert torch.equal(model.hidden(source[None], target[None])[0], hidden)
