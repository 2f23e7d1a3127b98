"""Masked tokens and corrupted spans: the statistics of the papers, and nothing lost."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm import ops
from fastllm.data.batch import IGNORE, Batches
from fastllm.data.corrupt import (
    Words,
    corrupt_spans,
    encode_masked,
    encode_spans,
    generator,
    mask_tokens,
    sentinel_ids,
)
from fastllm.data.sources import Documents, write_jsonl
from fastllm.data.tokenizer import Tokenizer
from fastllm.models.encoder import Encoder, EncoderConfig

ROLES = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]", "eos": "[SEP]"}
TEXTS = [f"the unbelievable cat number {i} sat on the mats; naïve cats!" for i in range(100)]
TOKENIZER = Tokenizer.train(TEXTS, 330, ROLES, more=[f"<extra_id_{i}>" for i in range(30)])
WORDS = Words.of(TOKENIZER)


@pytest.mark.parametrize("whole_words", [False, True])
def test_masking_statistics(whole_words):
    ids = np.array(TOKENIZER.encode(" ".join(TEXTS[:40])))
    plain = np.isin(ids, WORDS.plain)
    chosen = masked = kept = drawn = 0
    for index in range(100):
        example = mask_tokens(ids, WORDS, generator(1, index), whole_words=whole_words)
        at = example.target != IGNORE
        assert (example.target[at] == ids[at]).all() and (example.ids[~at] == ids[~at]).all()
        assert not at[~plain].any() and (example.weight == at).all()
        assert np.isin(example.ids[at], [*WORDS.plain, WORDS.mask_id]).all()
        chosen += at.sum()
        masked += (example.ids[at] == WORDS.mask_id).sum()
        kept += (example.ids[at] == ids[at]).sum()
        drawn += ((example.ids[at] != ids[at]) & (example.ids[at] != WORDS.mask_id)).sum()
    assert chosen == pytest.approx(100 * round(0.15 * plain.sum()), rel=0.01 if whole_words else 1e-9)
    by_chance = 0.1 / len(WORDS.plain)  # drawn, and the same
    for count, share in ((masked, 0.8), (kept, 0.1 + by_chance), (drawn, 0.1 - by_chance)):
        assert abs(count - chosen * share) < 4 * (chosen * share * (1 - share)) ** 0.5


def test_whole_words():
    ids = np.array(TOKENIZER.encode("the unbelievable cats (unbelievable) naïve 42 mats", add_special_tokens=False))
    starts = WORDS.starts[ids]
    starts[1:] |= WORDS.ends[ids[:-1]]
    words = [TOKENIZER.decode(g).strip() for g in np.split(ids, starts.nonzero()[0]) if len(g)]
    wanted = ["the", "unbelievable", "cats", "(", "unbelievable", ")", "naïve", "42", "mats"]
    assert [w for w in words if w] == wanted and len(ids) > len(words)
    group = np.cumsum(starts)
    for index in range(50):
        at = mask_tokens(ids, WORDS, generator(0, index), rate=0.4, whole_words=True).target != IGNORE
        for g in np.unique(group[at]):
            assert at[group == g].all()


def test_masking_of_little():
    special = mask_tokens([0, 1], WORDS, generator(0, 0))
    assert (special.target == IGNORE).all()
    one = mask_tokens([0, int(WORDS.plain[5]), 1], WORDS, generator(0, 0))
    assert (one.target != IGNORE).tolist() == [False, True, False]
    assert not len(mask_tokens([], WORDS, generator(0, 0)))
    with pytest.raises(ValueError, match="rate is 0"):
        mask_tokens([1], WORDS, generator(0, 0), rate=0)
    with pytest.raises(ValueError, match="no mask token"):
        Words.of(Tokenizer.train(TEXTS, 300))


def test_drawn_by_seed_and_index():
    ids = TOKENIZER.encode(TEXTS[0])
    first, again, other = (mask_tokens(ids, WORDS, generator(3, i)).target.tolist() for i in (5, 5, 6))
    assert first == again != other


SENTINELS = sentinel_ids(TOKENIZER)
EOS = 1


def restored(source, target) -> list[int]:
    """The text, put together again."""
    spans, current = {}, None
    for id in target[:-1]:
        if id in SENTINELS:
            current = spans.setdefault(id, [])
        else:
            current.append(id)
    assert target[-1] == EOS == source[-1] and list(spans) == SENTINELS[: len(spans)] and not current
    return [x for id in source[:-1] for x in (spans[id] if id in SENTINELS else [id])]


@given(st.integers(2, 300), st.floats(0.05, 0.6), st.floats(1, 6), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_spans_restore_the_text(length, rate, mean, index):
    ids = list(range(1000, 1000 + length))
    many = range(length)
    source, target = corrupt_spans(ids, list(many), 5000, generator(0, index), rate, mean)
    taken = [i for i in target if 1000 <= i < 5000]
    assert len(taken) == min(max(round(length * rate), 1), length - 1)
    kept = [i for i in source if 1000 <= i < 5000]
    assert sorted(kept + taken) == ids and kept == sorted(kept) and taken == sorted(taken)
    if length <= 120:
        assert restored(*corrupt_spans(ids, SENTINELS, EOS, generator(0, index))) == ids


def test_span_statistics():
    """15 % of the tokens, spans of 3 on the mean, of many lengths, anywhere."""
    ids, lengths, where = np.arange(1000, 1160), [], np.zeros(160)
    for index in range(500):
        source, target = corrupt_spans(ids, SENTINELS, EOS, generator(2, index))
        borders = np.isin(target, SENTINELS).nonzero()[0]
        lengths += (np.diff(borders) - 1).tolist()
        where[target[target >= 1000] - 1000] += 1
        assert np.isin(source, SENTINELS).sum() == 8 == len(borders) - 1
    assert where.sum() == 500 * 24 and np.mean(lengths) == 3.0
    assert 0.25 < np.mean(np.array(lengths) == 1) < 0.35  # C(22, 6) / C(23, 7) = 7 / 23
    assert where[20:140].min() > 40 and where[20:140].max() < 115  # 75 on the mean


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([5], {}, "1 tokens"),
        ([5, 6], {"rate": 1.0}, r"rate=1\.0"),
        ([5, 6], {"mean": 0.5}, r"mean=0\.5"),
        (range(2000), {}, "100 spans need 101 sentinels, there are 30"),
    ],
)
def test_span_errors(ids, options, words):
    with pytest.raises(ValueError, match=words):
        corrupt_spans(list(ids), SENTINELS, EOS, generator(0, 0), **options)


def test_sentinels_are_missing():
    with pytest.raises(ValueError, match=r"no <extra_id_0> in the vocabulary; tokenizer\.extended"):
        sentinel_ids(Tokenizer.train(TEXTS, 300))


def unmasked(example) -> list[int]:
    return np.where(example.target == IGNORE, example.ids, example.target).tolist()


def test_documents_in_windows():
    """Each window is masked for itself, and put together they are the document."""
    text = " ".join(TEXTS[:5])
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    windows = encode_masked(TOKENIZER, WORDS, text, 4, longest=16, seed=1)
    assert [len(w) for w in windows[:-1]] == [16] * (len(windows) - 1) and all(w.weight.sum() >= 1 for w in windows)
    inner = [unmasked(w) for w in windows]
    assert all(w[0] == TOKENIZER.cls_id and w[-1] == TOKENIZER.sep_id for w in inner)
    assert [id for w in inner for id in w[1:-1]] == ids
    again, other = (encode_masked(TOKENIZER, WORDS, text, i, longest=16, seed=1) for i in (4, 5))
    assert [w.ids.tolist() for w in again] == [w.ids.tolist() for w in windows] != [w.ids.tolist() for w in other]
    assert not encode_masked(TOKENIZER, WORDS, "", 0, longest=16)
    with pytest.raises(ValueError, match="room for 0 tokens"):
        encode_masked(TOKENIZER, WORDS, text, 0, longest=2)


def test_spans_in_windows():
    text = " ".join(TEXTS[:5])
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    size = 16 if len(ids) % 16 != 1 else 15
    pairs = encode_spans(TOKENIZER, SENTINELS, text, 0, start_id=2, longest=size)
    assert all(p.target.ids[0] == 2 and (p.target.ids[1:] == p.target.target[:-1]).all() for p in pairs)
    assert [id for p in pairs for id in restored(p.source.tolist(), p.target.target.tolist())] == ids
    left = encode_spans(TOKENIZER, SENTINELS, text, 0, start_id=2, longest=len(ids) - 1)
    assert len(left) == 1 and len(left[0].source) > len(ids) // 2  # of the second window nothing can be taken out


# ---------------------------------------------------------------------------------------------------------------- models


def masked_batches(folder, epochs=2):
    def encode(document, index):
        draw = generator(7, index)
        return [mask_tokens(TOKENIZER.encode(document.text), WORDS, draw, whole_words=True)]

    return Batches(Documents(folder, shuffle=10, epochs=epochs), encode, tokens=128, window=30)


def test_an_encoder_reads_masked_batches(tmp_path):
    """Drawn anew in each epoch, the same after a resume; and it learns what belongs into the holes."""
    write_jsonl(tmp_path / "f.jsonl", ({"text": text} for text in TEXTS))
    targets = [b.target.tolist() for b in masked_batches(tmp_path)]
    first, again = masked_batches(tmp_path), masked_batches(tmp_path)
    list(itertools.islice(first, 5))
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [b.target.tolist() for b in again] == targets[5:]
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(len(TOKENIZER), 1, 32, 64, 2, 64, head="mlm"))
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for batch in itertools.islice(masked_batches(tmp_path, epochs=None), 60):
        logits = model.head(model.packed_hidden(batch.packed))
        loss = ops.cross_entropy(logits, batch.target, token_weight=batch.weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1
