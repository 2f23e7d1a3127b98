"""The models of history: Kneser-Ney by hand and against its formula in plain Python, states that end where a document ends,
vectors, the common measure, and a ladder of a few rungs."""

import json
import math
import signal
from collections import Counter, defaultdict
from itertools import pairwise

import ladder
import numpy as np
import pytest
import torch
from _assets import packaged
from _training import VOCAB, batches, decoder, equal, parameters

from fastllm.data.batch import Example, collate
from fastllm.data.packed import Packed
from fastllm.data.sources import Documents
from fastllm.data.tokenizer import Tokenizer
from fastllm.models.baselines import (
    FeedForward,
    FeedForwardConfig,
    KneserNey,
    Recurrent,
    RecurrentConfig,
    SkipGram,
    SkipGramConfig,
    analogies,
    gradient_by_distance,
    held_out_nats,
    skip_gram_loss,
    windows,
)
from fastllm.models.baselines.harness import token_nats
from fastllm.train.loop import LoopOptions, fit
from fastllm.train.objective import next_token_loss

HALVES = (0.5, 1.0, 1.5)
NEURAL = {
    "feed-forward": lambda: FeedForward(FeedForwardConfig(VOCAB, 16, 24, 3)),
    "rnn": lambda: Recurrent(RecurrentConfig(VOCAB, 16, 24, 2, "rnn")),
    "lstm": lambda: Recurrent(RecurrentConfig(VOCAB, 16, 24, 1, "lstm")),
    "gru": lambda: Recurrent(RecurrentConfig(VOCAB, 16, 24, 1, "gru")),
    "lstm-attention": lambda: Recurrent(RecurrentConfig(VOCAB, 16, 24, 1, "lstm", attention=True)),
}


def made(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return NEURAL[name]()


# ---------------------------------------------------------------------------------------------------------- Kneser-Ney

TINY = [[0, 1, 2, 0], [0, 1, 1, 0]]  # 0 is the border


def test_bigrams_by_hand():
    """Continuations of 0, 1, 2: 2, 2, 1 of 5, g = (.5 + 2) / 5 = 1/2, and 1/3 below: 11/30, 11/30, 8/30."""
    model = KneserNey(TINY, 3, 2, discounts=[HALVES] * 2)
    unigram = np.array([11, 11, 8]) / 30
    after_1 = np.full(3, 0.5 / 3) + 0.5 * unigram  # each seen once
    after_0 = np.array([0, 1 / 2, 0]) + 0.5 * unigram  # "0 1" twice: (2 - 1) / 2, and g = 1/2
    np.testing.assert_allclose(model.distribution([0, 2, 1]), after_1, rtol=1e-12)
    np.testing.assert_allclose(model.distribution([0]), after_0, rtol=1e-12)
    expected = [after_0[1], after_1[2], 0.5 + 0.5 * unigram[0]]
    np.testing.assert_allclose(model.log_probabilities(TINY[0]), np.log(expected), rtol=1e-12)


def test_trigrams_by_hand():
    """Nothing stands before "0 1" at a document's start, so at order 2 it counts its two occurrences."""
    model = KneserNey(TINY, 3, 3, discounts=[HALVES] * 3)
    unigram = np.array([11, 11, 8]) / 30
    np.testing.assert_allclose(model.distribution([0])[1], 1 / 2 + 0.5 * unigram[1], rtol=1e-12)
    np.testing.assert_allclose(model.distribution([0, 1])[2], 0.25 + 0.5 * (0.5 / 3 + 0.5 * unigram[2]), rtol=1e-12)


def by_formula(documents: list[list[int]], vocab: int, order: int) -> tuple[callable, list]:
    """p(history, word) by dictionaries of tuples, and the discounts: the formula as it is written."""
    raw, before = defaultdict(Counter), defaultdict(set)
    for d in documents:
        for t in range(1, len(d)):
            for n in range(1, min(t + 1, order + 1) + 1):
                gram = tuple(d[t - n + 1 : t + 1])
                raw[n][gram] += 1
                if n > 1:
                    before[gram[1:]].add(gram[0])
    starts = Counter(tuple(d[:n]) for d in documents for n in range(2, len(d) + 1))
    counts, discounts = {}, []
    for n in range(1, order + 1):
        counts[n] = {g: c if n == order else len(before[g]) + starts[g] for g, c in raw[n].items()}
        n1, n2, n3, n4 = (sum(c == i for c in counts[n].values()) for i in range(1, 5))
        y = n1 / (n1 + 2 * n2)
        discounts.append((1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3))

    def p(history: tuple[int, ...], word: int) -> float:
        n = len(history) + 1
        lower = p(history[1:], word) if history else 1 / vocab
        mine = {g: c for g, c in counts[n].items() if g[:-1] == history}
        if not mine:
            return lower
        d = (0.0, *discounts[n - 1])
        c = mine.get((*history, word), 0)
        left = sum(d[min(x, 3)] for x in mine.values())
        return (c - d[min(c, 3)] + left * lower) / sum(mine.values())

    return p, discounts


def test_it_is_the_formula():
    random, vocab = np.random.default_rng(0), 200
    rare = 1 / np.arange(1, vocab)
    documents = []
    for _ in range(200):  # a text of frequent and rare words with habits, so that all counts of counts occur
        d = [0]
        for _ in range(int(random.integers(1, 30))):
            new = int(random.choice(np.arange(1, vocab), p=rare / rare.sum()))
            d.append(new if random.random() < 0.4 else 1 + (7 * d[-1] + int(random.integers(2))) % (vocab - 1))
        documents.append([*d, 0])
    model = KneserNey(documents, vocab, 4)
    p, discounts = by_formula(documents, vocab, 4)
    assert not model.fallback
    np.testing.assert_allclose(model.discounts, discounts, rtol=1e-12)
    for d in ([0, 1, 8, 57, 2, 15, 0], documents[0], [0, 11, 11, 11, 11, 11], [0, 0]):
        expected = [math.log(p(tuple(d[max(0, t - 3) : t]), d[t])) for t in range(1, len(d))]
        np.testing.assert_allclose(model.log_probabilities(d), expected, rtol=1e-10)


@pytest.fixture(scope="module")
def passages():
    """(training and test documents of token ids, the size of the vocabulary) of real text."""
    texts = [d.text for d in Documents(packaged("passages") / "owt_5.jsonl", text="0")][:300]
    tokenizer = Tokenizer.train(texts[:270], 600)
    ids = [[tokenizer.eos_id, *t, tokenizer.eos_id] for t in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return ids[:270], ids[270:], len(tokenizer)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_probabilities_add_up_to_one_on_real_text(passages, order):
    train, test, vocab = passages
    model = KneserNey(train, vocab, order)
    document = test[0]
    logs = model.log_probabilities(document)
    for t in (1, 2, 3, 20, len(document) - 1):
        whole = model.distribution(document[:t])
        assert whole.sum() == pytest.approx(1, abs=1e-12) and (whole > 0).all()
        assert logs[t - 1] == pytest.approx(math.log(whole[document[t]]), abs=1e-12)


def test_it_beats_add_one_and_stupid_backoff_on_real_text(passages):
    train, test, vocab = passages
    order, test = 3, test[:8]
    count = sum(len(d) - 1 for d in test)
    ours = min(held_out_nats(KneserNey(train, vocab, n), test) for n in (2, 3, 4, 5)) / count
    follow = defaultdict(Counter)
    for d in train:
        for t in range(1, len(d)):
            for n in range(min(order, t + 1)):
                follow[tuple(d[t - n : t])][d[t]] += 1
    add_one, backoff = 0.0, 0.0
    for d in test:
        for t in range(1, len(d)):
            bigram = follow[(d[t - 1],)]  # the better one of add-one's orders
            add_one -= math.log((bigram[d[t]] + 1) / (bigram.total() + vocab))
            score = np.full(vocab, 1e-9)
            for n in range(
                min(order, t + 1)
            ):  # Brants et al. 2007: the longest that was seen, times .4 for each step back
                seen = follow.get(tuple(d[t - n : t]))
                if seen:
                    score *= 0.4
                    score[list(seen)] = np.array(list(seen.values())) / seen.total()
            backoff -= math.log(score[d[t]] / score.sum())
    assert ours < backoff / count - 0.1 and ours < add_one / count - 0.1


@pytest.mark.parametrize(
    ("documents", "kwargs", "message"),
    [
        ([[0, 3]], {}, "ids from 0 to 3; allowed: one token or more, ids 0 to 2"),
        ([[0], [1]], {}, "no document has a token after its first one"),
        (TINY, {"order": 0}, "order=0; allowed: 1 or more"),
        (TINY, {"order": 2, "discounts": [HALVES]}, "discounts for 1 orders; give them for all 2"),
        (
            TINY,
            {"order": 1, "discounts": [(1.5, 1, 1)]},
            r"discounts of order 1 are \(1.5, 1, 1\); allowed: D1 in \[0, 1\]",
        ),
    ],
)
def test_what_it_refuses(documents, kwargs, message):
    with pytest.raises(ValueError, match=message):
        KneserNey(documents, 3, **kwargs)


def test_a_small_text_takes_the_stated_discounts():
    model = KneserNey(TINY, 3, 7)  # longer than any document, too
    assert model.fallback == [1, 2, 3, 4, 5, 6, 7] and model.discounts == [HALVES] * 7
    assert model.distribution([0, 1, 1, 0, 2, 2, 2, 1]).sum() == pytest.approx(1, abs=1e-12)


# ------------------------------------------------------------------------------------------------- neural models: borders


@pytest.mark.parametrize("name", NEURAL)
def test_nothing_crosses_a_border_or_comes_from_the_future(name):
    """The gradient of the losses of a sequence's first tokens reaches those tokens alone."""
    model = made(name)
    random = np.random.default_rng(1)
    sequences = [random.integers(0, VOCAB, n) for n in (5, 9, 2, 7)]
    batch = collate([Example.next_tokens(s) for s in sequences])
    grabbed = []
    model.embedding.register_forward_hook(lambda m, i, o: grabbed.append(o))
    nats = token_nats(model, batch)
    begin, end = batch.packed.cu[1:3].tolist()
    (gradient,) = torch.autograd.grad(nats[begin : begin + 5].sum(), grabbed[0])
    reached = gradient.norm(dim=1) > 0
    assert reached[begin : begin + 5].all() and reached.sum() == 5 and end - begin == 8
    alone = [token_nats(model, collate([Example.next_tokens(s)])) for s in sequences]
    torch.testing.assert_close(nats, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NEURAL)
def test_it_learns_in_the_common_loop(name, tmp_path):
    model = made(name)
    options = LoopOptions(steps=30, lr=2e-2, warmup=3, log_every=1)
    seen = []
    fit(model, batches(tmp_path), next_token_loss, tmp_path / "run", options, watch=[seen.append])
    assert seen[-1]["loss"] < 0.75 * seen[0]["loss"]


def interrupt_at(step: int):
    def watch(record):
        if record["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return watch


@pytest.mark.parametrize("name", ["lstm", "word2vec"])
def test_a_run_goes_on_with_the_same_bits(name, tmp_path):
    """Also one whose loss draws at random."""

    def start(seed: int):
        torch.manual_seed(seed)
        counts = torch.ones(VOCAB)
        return SkipGram(SkipGramConfig(VOCAB, 16), counts) if name == "word2vec" else NEURAL[name]()

    loss = skip_gram_loss if name == "word2vec" else next_token_loss
    options = LoopOptions(steps=8, lr=1e-2, warmup=2, log_every=1)
    whole = start(0)
    fit(whole, batches(tmp_path), loss, tmp_path / "whole", options)
    first = start(0)
    report = fit(first, batches(tmp_path), loss, tmp_path / "cut", options, watch=[interrupt_at(3)])
    assert (report.reason, report.step) == ("interrupted", 3) and not equal(parameters(whole), parameters(first))
    again = start(1)
    fit(again, batches(tmp_path), loss, tmp_path / "cut", options, resume=True)
    assert equal(parameters(whole), parameters(again))


@pytest.mark.parametrize(
    ("config", "kwargs", "message"),
    [
        (RecurrentConfig, {"hidden": 0}, "every size must be at least 1"),
        (RecurrentConfig, {"hidden": 8, "cell": "tanh"}, "cell='tanh'; allowed: rnn, lstm, gru"),
        (FeedForwardConfig, {"hidden": 8, "context": 0}, "every size must be at least 1"),
        (SkipGramConfig, {"sample": 0.0}, "sample above 0"),
    ],
)
def test_sizes_that_are_refused(config, kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(vocab=8, dim=8, **kwargs)


# ------------------------------------------------------------------------------------------------------------ word2vec


def test_tokens_that_stand_together_become_neighbours(tmp_path):
    """Eight circles of four tokens, each document within one."""
    torch.manual_seed(0)
    model = SkipGram(SkipGramConfig(32, 16, sample=1.0), torch.ones(32))
    random = np.random.default_rng(0)
    parts = [collate([Example.next_tokens(4 * g + random.integers(0, 4, 20)) for g in range(8)]) for _ in range(40)]
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for part in parts:
        optimizer.zero_grad()
        (skip_gram_loss(model, part) / part.weight.sum()).backward()
        optimizer.step()
    for token in range(32):
        assert {near // 4 for near, _ in model.neighbours(token, 3)} == {token // 4}


def test_pairs_are_of_one_sequence():
    model = SkipGram(SkipGramConfig(8, 4, window=3, sample=1.0), torch.ones(8))
    single = Packed.of_lists([[1], [2], [3]])
    batch = collate([Example.next_tokens([i, 0]) for i in (1, 2, 3)])
    assert torch.equal(batch.packed.ids, single.ids) and skip_gram_loss(model, batch).detach() == 0
    joined = collate([Example.next_tokens([1, 2, 3, 0])])
    assert skip_gram_loss(model, joined).detach() > 0


def test_analogies_of_vectors_that_are_known():
    model = SkipGram(SkipGramConfig(6, 3), torch.ones(6))
    vectors = [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1], [-1, 0, 0], [0, -1, 0]]
    model.embedding.weight.data = torch.tensor(vectors, dtype=torch.float32)
    assert model.analogy(0, 1, 2)[0][0] == 3 and model.neighbours(0, 1)[0][0] == 1
    assert analogies(model, [(0, 1, 2, 3), (0, 1, 2, 5)]) == 0.5
    with pytest.raises(ValueError, match="no question"):
        analogies(model, [])


# ---------------------------------------------------------------------------------------------------------- the measure


@pytest.mark.parametrize("length", [2, 5, 8, 9, 10, 11, 12, 13, 40])
def test_windows_predict_every_token_once_and_with_a_past(length):
    document, longest = np.arange(length), 8
    said = []
    for number, part in enumerate(windows(document, longest)):
        counted = part.weight.nonzero()[0]
        assert len(part) <= longest and (number == 0 or counted[0] >= longest // 2)
        said += part.target[counted].tolist()
    assert said == list(range(1, length))


def test_held_out_nats_of_a_model_that_knows_nothing():
    model = made("lstm")
    for p in model.parameters():
        p.data.zero_()
    documents = [list(range(n)) for n in (2, 30, 100)]
    assert held_out_nats(model, documents, 16, 64) == pytest.approx(129 * math.log(VOCAB), rel=1e-6)
    assert held_out_nats(decoder(), documents, 128, 128) == pytest.approx(
        sum(token_nats(decoder(), collate([Example.next_tokens(d)])).sum().item() for d in documents), rel=1e-6
    )


def test_a_gradient_reaches_as_far_as_the_model_looks():
    sequences = np.random.default_rng(0).integers(0, VOCAB, (3, 13))
    reach = {name: gradient_by_distance(made(name), sequences) for name in NEURAL}
    assert all(r.shape == (12,) and torch.isfinite(r).all() and r[0] > 0 for r in reach.values())
    assert (reach["feed-forward"] > 0).tolist() == [True] * 3 + [False] * 9
    assert (reach["rnn"] > 0).all() and reach["rnn"][11] < 1e-2 * reach["rnn"][0]
    with pytest.raises(ValueError, match="all of one length"):
        gradient_by_distance(made("rnn"), [[1, 2, 3], [1, 2]])


def test_a_ladder_of_rungs(tmp_path, capsys):
    words = [f"{a} and {b} are {a + b}" for a, b in pairwise(range(400))]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": w}) + "\n" for w in words))
    arguments = (
        f"--data {tmp_path}/text.jsonl --steps 6 --seeds 0 1 --vocab 300 --dim 32 --layers 1 --tokens 256 --longest 8"
    )
    arguments += f" --points 2 --rungs unigram kneser-ney word2vec lstm transformer --out {tmp_path / 'out'}"
    assert ladder.main(arguments.split()) == 0
    result = json.loads((tmp_path / "out" / "ladder.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    bits = {name: row["bits"] for name, row in rows.items()}
    assert bits["kneser-ney"][0] < bits["unigram"][0] and bits["word2vec"] == []
    assert len(bits["lstm"]) == 2 and bits["lstm"][0] != bits["lstm"][1]
    assert all(1 < value < math.log2(300) for name in ("lstm", "transformer") for value in bits[name])
    assert rows["lstm"]["parameters"] == pytest.approx(rows["transformer"]["parameters"], rel=0.05)
    assert rows["lstm"]["tokens"] == rows["transformer"]["tokens"] and all(row["memory"] > 0 for row in rows.values())
    assert {len(g) for g in rows["lstm"]["gradients"].values()} == {2}
    for name in ("ladder.png", "gradient.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "Kneser-Ney, order" in capsys.readouterr().out
