"""Measures of labels and texts, against figures worked out by hand and, where it is installed, scikit-learn."""

import random
import sys

import pytest

from fastllm.evaluate.text import accuracy, bleu, distinct, exact_match, f1, rouge

FOUND, WANTED = list("aabbccab"), list("aaabbcbb")  # a: tp 2, fp 1, fn 1; b: tp 2, fp 1, fn 2; c: tp 1, fp 1, fn 0


def test_labels_by_hand():
    assert accuracy(FOUND, WANTED) == f1(FOUND, WANTED, "micro") == 5 / 8
    assert f1(FOUND, WANTED, "binary", positive="a") == 2 * 2 / (2 * 2 + 1 + 1)
    assert f1(FOUND, WANTED, "binary", positive="b") == 2 * 2 / (2 * 2 + 1 + 2)
    assert f1(FOUND, WANTED) == pytest.approx((4 / 6 + 4 / 7 + 2 / 3) / 3, rel=1e-15)
    assert f1(["x", "x"], ["y", "y"]) == 0 and f1(["x"], ["x"], "binary", positive="z") == 0
    assert accuracy([1, 2], (1, 3)) == 0.5


def test_labels_as_scikit_learn_has_them():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed: pip install scikit-learn")
    draw = random.Random(0)
    for _ in range(50):
        found, wanted = ([draw.choice("abcd") for _ in range(draw.randint(1, 30))] for _ in range(2))
        count = min(len(found), len(wanted))
        found, wanted = found[:count], wanted[:count]
        for average in ("macro", "micro"):
            theirs = metrics.f1_score(wanted, found, average=average, zero_division=0)
            assert f1(found, wanted, average) == pytest.approx(theirs, rel=1e-12)
        theirs = metrics.f1_score([w == "a" for w in wanted], [f == "a" for f in found], zero_division=0)
        assert f1(found, wanted, "binary", positive="a") == pytest.approx(theirs, rel=1e-12)
        assert accuracy(found, wanted) == pytest.approx(metrics.accuracy_score(wanted, found), rel=1e-12)


def test_exact_match():
    assert exact_match([" 42\n", "The cat."], ["42", "cat"]) == 0.5
    assert exact_match(["The cat, a  dog.", "no"], ["cat dog", "yes"], normalise=True) == 0.5


def test_bleu_by_hand():
    """Of 8 words against 8: 6/8 words, 5/7 pairs, 4/6 and 3/5 longer runs, and no penalty for brevity."""
    pytest.importorskip("sacrebleu")
    score, signature = bleu(["the big cat sat on the mat today"], ["a big cat sat on the mat now"])
    assert score == pytest.approx(100 * (6 / 8 * 5 / 7 * 4 / 6 * 3 / 5) ** 0.25) and "version:" in signature
    assert bleu(["a b c d"], [["x y z w", "a b c d"]])[0] == pytest.approx(100)
    assert bleu(["a b c d", "e f g h"], [["x", "a b c d"], ["e f g h"]])[0] == pytest.approx(100)


def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    found = rouge(["the cat sat on the mat"], ["the cat lay on a mat"])
    assert found["rouge1"] == pytest.approx(4 / 6) and found["rouge2"] == pytest.approx(1 / 5)
    assert found["rougeL"] == pytest.approx(4 / 6)
    mean = rouge(["a b", "c d"], ["a b", "x y"])
    assert mean == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}


def test_distinct():
    assert distinct(["a b a b", "a b"], 1) == 2 / 6 and distinct(["a b a b", "a b"], 2) == 2 / 4
    assert distinct(["a b c"]) == 1 and distinct(["a", ""]) == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: accuracy([1], [1, 2]), ValueError, "accuracy: 1 found and 2 wanted"),
        (lambda: accuracy([], []), ValueError, "give as many of both, one or more"),
        (lambda: f1([1], [1], "weighted"), ValueError, "average='weighted'; allowed: binary, macro, micro"),
        (lambda: f1([1], [1], "binary"), ValueError, "give the label for 'binary' alone"),
        (lambda: f1([1], [1], "macro", positive=1), ValueError, "give the label for 'binary' alone"),
        (lambda: distinct(["a"], 0), ValueError, "n=0; allowed: 1 or more"),
        (lambda: bleu(["a"], [[]]), ValueError, "a text has no reference"),
        (lambda: rouge([], []), ValueError, "rouge: 0 found"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("call", "module"), [(bleu, "sacrebleu"), (rouge, "rouge_score")])
def test_what_is_missing_is_named(monkeypatch, call, module):
    for name in [n for n in sys.modules if n.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "fastllm\[eval\]"'):
        call(["a"], ["a"])
