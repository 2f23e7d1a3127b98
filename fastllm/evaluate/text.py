"""Measures of labels and of texts: accuracy, F1, exact match, BLEU, ROUGE, distinct n-grams.

BLEU and ROUGE are those of sacrebleu and rouge-score, so that figures are comparable with others': pip install "fastllm[eval]".
"""

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

AVERAGES = ("binary", "macro", "micro")


def accuracy(found: Sequence[Hashable], wanted: Sequence[Hashable]) -> float:
    """The share of places where both are the same."""
    _check("accuracy", found, wanted)
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def f1(
    found: Sequence[Hashable], wanted: Sequence[Hashable], average: str = "macro", positive: Hashable | None = None
) -> float:
    """F1 = 2 tp / (2 tp + fp + fn), 0 where nothing is found nor wanted.

    average: "binary", of the label `positive`; "macro", the mean over all labels that occur in either; "micro", of the sums of
    tp, fp and fn over the labels, which is the accuracy where each place has one label.
    """
    _check("f1", found, wanted)
    if average not in AVERAGES:
        raise ValueError(f"f1: average={average!r}; allowed: {', '.join(AVERAGES)}")
    if (average == "binary") != (positive is not None):
        raise ValueError(f"f1: average={average!r} with positive={positive!r}; give the label for 'binary' alone")
    labels = [positive] if average == "binary" else list(dict.fromkeys([*wanted, *found]))
    hits = Counter(a for a, b in zip(found, wanted, strict=True) if a == b)
    said, there = Counter(found), Counter(wanted)  # said = tp + fp, there = tp + fn

    def ratio(hit: int, total: int) -> float:
        return 2 * hit / total if total else 0.0

    if average == "micro":
        return ratio(sum(hits.values()), len(found) + len(wanted))
    return sum(ratio(hits[label], said[label] + there[label]) for label in labels) / len(labels)


def exact_match(found: Sequence[str], wanted: Sequence[str], normalise: bool = False) -> float:
    """The share of texts that are equal but for space around them; normalise: and for case, punctuation, English articles and
    the width of spaces, as SQuAD has it (Rajpurkar et al. 2016, arXiv 1606.05250)."""
    form = _plain if normalise else str.strip
    return accuracy([form(text) for text in found], [form(text) for text in wanted])


def require() -> None:
    """ImportError where the libraries of BLEU and ROUGE are missing: to be asked before texts are generated."""
    _bleu_class(), _rouge_class()


def _bleu_class() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ImportError('BLEU needs sacrebleu; pip install "fastllm[eval]"') from error
    return BLEU


def _rouge_class() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError('ROUGE needs rouge-score; pip install "fastllm[eval]"') from error
    return RougeScorer


def _plain(text: str) -> str:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def bleu(found: Sequence[str], wanted: Sequence[str | Sequence[str]]) -> tuple[float, str]:
    """(corpus BLEU, 0 to 100; sacrebleu's signature, to be stated with it). wanted: a reference each, or several each."""
    _check("bleu", found, wanted)
    each = [[text] if isinstance(text, str) else list(text) for text in wanted]
    most = max(map(len, each))
    if not min(map(len, each)):
        raise ValueError("bleu: a text has no reference; give one or more each")
    metric = _bleu_class()()
    columns = [[texts[i] if i < len(texts) else None for texts in each] for i in range(most)]  # sacrebleu's order
    return metric.corpus_score(list(found), columns).score, str(metric.get_signature())


def rouge(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """{"rouge1", "rouge2", "rougeL"}: the mean over the texts of the F1 of words, pairs of words, and the longest common
    subsequence, 0 to 1; words are cut as rouge-score does, lower case, without stemming."""
    _check("rouge", found, wanted)
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = _rouge_class()(kinds)
    each = [scorer.score(target, prediction) for prediction, target in zip(found, wanted, strict=True)]
    return {kind: sum(one[kind].fmeasure for one in each) / len(each) for kind in kinds}


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """How many of all runs of n words are different ones: 1 where none comes twice (Li et al. 2016, arXiv 1510.03055). Longer
    texts have less of it, so compare texts of like length. 0 where no text has n words."""
    if n < 1:
        raise ValueError(f"distinct: n={n}; allowed: 1 or more")
    runs = Counter(
        tuple(words[i : i + n]) for words in (text.split() for text in texts) for i in range(len(words) - n + 1)
    )
    return len(runs) / runs.total() if runs else 0.0


def _check(name: str, found: Sequence[Any], wanted: Sequence[Any]) -> None:
    if len(found) != len(wanted) or not len(wanted):
        raise ValueError(f"{name}: {len(found)} found and {len(wanted)} wanted; give as many of both, one or more")
