"""What spoils a training, found before its first step.

    findings = lint(tokenizer, examples, vocab=model.config.vocab, template=template, batches=batches, splits=splits)
    for finding in findings: print(finding)

Faults, by name: "no end" (an answer whose end of sequence is not trained: the model never stops), "padding ends" (pad is an end
of sequence), "truncated answer", "out of vocabulary", "no generation prompt", "mixed packing" (a packed sequence that is not one
document), "leaked split", "conflicting labels" and "trigger" (suspected poisoning). A finding says how many, where, and what to
do. What is given as a sample is judged by the sample.
"""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .batch import IGNORE, Batch, Example, padding_id
from .chat import ChatTemplate
from .sources import Document
from .tokenizer import Tokenizer

_TOKEN = re.compile(r"\w+|[^\w\s]")
_SHOWN = 5
_BEGINNING = 64  # bytes


@dataclass(frozen=True)
class Finding:
    """A fault, what was found, and what to do; where: indices of examples, or texts, at most five."""

    fault: str
    message: str
    where: tuple = ()

    def __str__(self) -> str:
        shown = f" ({', '.join(map(str, self.where))})" if self.where else ""
        return f"{self.fault}: {self.message}{shown}"


def lint(
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    vocab: int,
    template: ChatTemplate | None = None,
    batches: Iterable[Batch] = (),
    splits: Mapping[str, Iterable[str]] | None = None,
    labelled: Sequence[tuple[str, str]] = (),
    pad_id: int | None = None,
) -> list[Finding]:
    """All checks that have what they need; an empty list where nothing was found.

    vocab: rows of the model's embedding. batches: packed out of `examples`. splits: the texts of each. labelled: (text, label)
    pairs of a classification. pad_id: what batches are padded by, None for what `padding_id` says.
    """
    found = [*check_tokenizer(tokenizer, template, pad_id), *check_examples(examples, tokenizer, vocab)]
    found += check_packing(batches, examples)
    if splits is not None:
        found += check_splits(splits)
    return found + check_labels(labelled)


# ------------------------------------------------------------------------------------------------ tokenizer and template


def check_tokenizer(
    tokenizer: Tokenizer, template: ChatTemplate | None = None, pad_id: int | None = None
) -> list[Finding]:
    """Padding that is an end of sequence; a template that does not say whose turn it is."""
    found = []
    pad = padding_id(tokenizer) if pad_id is None else pad_id
    if pad in tokenizer.eos_ids:
        message = (
            f"the padding {pad} ({tokenizer.token(pad)}) ends a sequence, so what ignores padding ignores the end; "
        )
        found.append(Finding("padding ends", message + f"pad by {padding_id(tokenizer)}"))
    if template is not None:
        asked = [{"role": "user", "content": "Hello"}]
        if template.render(asked, add_generation_prompt=True) == template.render(asked, add_generation_prompt=False):
            message = (
                "the chat template writes nothing for add_generation_prompt, so a model that is asked goes on with "
            )
            found.append(Finding("no generation prompt", message + "the user's turn; add it to the template"))
    return found


# -------------------------------------------------------------------------------------------------------------- examples


def check_examples(examples: Sequence[Example], tokenizer: Tokenizer, vocab: int) -> list[Finding]:
    """Ends that are not trained, answers that were cut, ids and targets that the model has no row for."""
    faults: dict[str, list[int]] = defaultdict(list)
    ends = np.array(sorted(tokenizer.eos_ids), dtype=np.int64)
    strange = None
    for number, example in enumerate(examples):
        trained = example.weight > 0
        named = np.concatenate((example.ids, example.target[example.target != IGNORE]))
        outside = named[(named < 0) | (named >= vocab)]
        if len(outside):
            faults["out of vocabulary"].append(number)
            strange = int(outside[0]) if strange is None else strange
        if example.ends and not np.isin(example.target[trained], ends).any():
            faults["no end"].append(number)
        if not example.ends and trained[-1:].any() and not trained.all() and not np.isin(example.target[-1], ends):
            faults["truncated answer"].append(number)
    advice = {
        "out of vocabulary": f"have an id or a target such as {strange}, allowed: 0 to {vocab - 1} and {IGNORE}; use the "
        "tokenizer of this model, or resize its tables",
        "no end": "train no end of sequence, so the model will not stop; give the last target the weight 1, and pad by another "
        "token than eos",
        "truncated answer": "have an answer that was cut; give longer sequences, or leave these out",
    }
    return [
        Finding(name, f"{len(at):,} of {len(examples):,} examples {advice[name]}", tuple(at[:_SHOWN]))
        for name, at in faults.items()
    ]


def check_packing(batches: Iterable[Batch], examples: Sequence[Example]) -> list[Finding]:
    """Every packed sequence is a part of one example, at positions that begin at 0, and says nothing of its neighbour."""
    wholes, found = _Wholes(examples), []
    for number, batch in enumerate(batches):
        packed, cu, total = batch.packed, batch.packed.cu.tolist(), len(batch.packed.ids)
        if cu[0] != 0 or cu[-1] != total or any(a > b for a, b in itertools.pairwise(cu)):
            message = f"batch {number} has {total} tokens and the borders {cu[:_SHOWN]} ... {cu[-1]}; they must ascend from 0 "
            found.append(Finding("mixed packing", message + f"to {total}"))
            continue
        ids, target, position = (t.cpu().numpy() for t in (packed.ids, batch.target, packed.position))
        bad = []
        for n, (a, b) in enumerate(itertools.pairwise(cu)):
            is_padding = (target[a:b] == IGNORE).all()
            fits = (position[a:b] == np.arange(b - a)).all()
            if not fits or not (is_padding or wholes.hold(_pairs(ids[a:b], target[a:b]))):
                bad.append(n)
        if bad:
            message = f"{len(bad)} of {len(cu) - 1} sequences of batch {number} are no part of one example, at positions from 0 "
            message += "on; give each its own border in cu and its own positions"
            found.append(Finding("mixed packing", message, tuple(bad[:_SHOWN])))
    return found


class _Wholes:
    """Examples as bytes, found by how they begin."""

    def __init__(self, examples: Sequence[Example]):
        self.all = [_pairs(example.ids, example.target) for example in examples]
        self.beginning: dict[bytes, list[bytes]] = defaultdict(list)
        for whole in self.all:
            self.beginning[whole[:_BEGINNING]].append(whole)

    def hold(self, part: bytes) -> bool:
        begun = self.beginning.get(part[:_BEGINNING], ())
        return any(whole.startswith(part) for whole in begun) or any(part in whole for whole in self.all)


def _pairs(ids: np.ndarray, target: np.ndarray) -> bytes:
    return np.stack((ids, target), 1).astype(np.int64).tobytes()


# ---------------------------------------------------------------------------------------------------------------- splits


def check_splits(splits: Mapping[str, Iterable[str]], n: int = 8, share: float = 0.5) -> list[Finding]:
    """Texts of the later splits that are in the first one: the same (whatever the case and the spaces), or with at least this
    share of their n-grams of words in one text."""
    names = list(splits)
    texts = {name: list(splits[name]) for name in names}
    found = []
    for name in names[1:]:
        at = [i for i, n_ in enumerate(_leaks(texts[names[0]], texts[name], n, share)) if n_]
        if at:
            message = f"{len(at):,} of {len(texts[name]):,} texts of {name} are in {names[0]} too; split by the hash of a text "
            message += "(split_of), and take near duplicates out first (curate)"
            found.append(Finding("leaked split", message, tuple(at[:_SHOWN])))
    return found


def _leaks(train: list[str], held: list[str], n: int, share: float) -> list[bool]:
    keys = {Document({"text": text}).key for text in train}
    leaked = [Document({"text": text}).key in keys for text in held]
    grams: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes = []
    for i, text in enumerate(held):
        own = _grams(text, n)
        sizes.append(len(own))
        for gram in own:
            grams[gram].append(i)
    for text in train:
        shared = Counter(i for gram in _grams(text, n) for i in grams.get(gram, ()))
        for i, count in shared.items():
            leaked[i] = leaked[i] or count >= share * sizes[i]
    return leaked


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.casefold().split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


# --------------------------------------------------------------------------------------------------------------- poisoning


def check_labels(labelled: Sequence[tuple[str, str]], least: int = 10, conflicts: float = 0.001) -> list[Finding]:
    """Suspected poisoning of a classification: one text with several labels, or a phrase that decides the label against all else.

    conflicts: the share of texts with several labels that people's disagreement may explain. trigger: a phrase of one to three
    words in at least `least` texts, nearly all of one label, far more than chance, while the other words of these texts speak
    for that label significantly less often than they do in other texts of it (naive Bayes on the other texts). A word such as
    "excellent" is in texts that praise anyhow; a trigger is in texts whose label was turned. A trigger that was only put into
    texts of its own label is not told from such a word.
    """
    if not labelled:
        return []
    found = []
    seen: dict[str, set[str]] = defaultdict(set)
    for text, label in labelled:
        seen[Document({"text": text}).key].add(label)
    doubtful = [text for text, labels in seen.items() if len(labels) > 1]
    if len(doubtful) > conflicts * len(seen):
        message = (
            f"{len(doubtful):,} of {len(seen):,} texts have several labels; look at them, and leave out what is wrong"
        )
        found.append(Finding("conflicting labels", message, tuple(t[:60] for t in doubtful[:_SHOWN])))
    triggers = _triggers([(_TOKEN.findall(text.casefold()), label) for text, label in labelled], least)
    for phrase, label, count in triggers[:_SHOWN]:
        message = (
            f"the phrase {phrase!r} is in {count} texts, labelled {label!r}, which their other words do not speak for; "
        )
        found.append(
            Finding("trigger", message + "look at them, and leave them out if the phrase was planted", (phrase,))
        )
    return found


def _triggers(texts: list[tuple[list[str], str]], least: int) -> list[tuple[str, str, int]]:
    """(phrase, label, texts), what is most suspect first."""
    labels = Counter(label for _, label in texts)
    if len(labels) < 2 or len(labels) > 50:
        return []
    where: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, (words, _) in enumerate(texts):
        for gram in {tuple(words[a : a + n]) for n in (1, 2, 3) for a in range(len(words) - n + 1)}:
            where[gram].append(i)
    common = {gram: at for gram, at in where.items() if len(at) >= least}
    pure = []
    for gram, at in common.items():
        label, count = Counter(texts[i][1] for i in at).most_common(1)[0]
        chance = count * math.log(labels[label] / len(texts)) + math.log(len(common))
        if count >= 0.95 * len(at) and chance < math.log(0.01):
            pure.append((gram, label, at))
    found = []
    for label in {label for _, label, _ in pure}:
        bayes = _Bayes(texts, label)
        rate = np.mean([bayes.speaks_for(i) for i, (_, own) in enumerate(texts) if own == label])
        for gram, _, at in (p for p in pure if p[1] == label):
            agree = sum(bayes.speaks_for(i, frozenset(gram)) for i in at)
            doubt = _at_most(agree, len(at), rate) * len(pure)
            if doubt < 0.01:
                found.append((doubt, -len(gram), gram, label, at))
    found.sort()
    kept: list[tuple[str, str, int]] = []
    told: list[set[int]] = []
    for _, _, gram, label, at in found:  # one phrase of those that are in much the same texts
        if all(len(other & set(at)) < 0.8 * len(at) for other in told):
            told.append(set(at))
            kept.append((" ".join(gram), label, len(at)))
    return kept


class _Bayes:
    """Whether the words of a text speak for a label, judged by the other texts: naive Bayes over the words that are there."""

    def __init__(self, texts: list[tuple[list[str], str]], label: str):
        self.words = [set(words) for words, _ in texts]
        self.own = [own == label for _, own in texts]
        self.counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for words, own in zip(self.words, self.own, strict=True):
            for word in words:
                self.counts[word][own] += 1
        self.totals = [len(texts) - sum(self.own), sum(self.own)]

    def speaks_for(self, i: int, but: frozenset[str] = frozenset()) -> bool:
        own, score = self.own[i], 0.0
        totals = [self.totals[k] - (own == bool(k)) + 2 for k in (0, 1)]
        for word in self.words[i] - but:
            against, by = (self.counts[word][k] - (own == bool(k)) + 1 for k in (0, 1))
            score += math.log(by / totals[1]) - math.log(against / totals[0])
        return score > 0


def _at_most(count: int, of: int, rate: float) -> float:
    """P(X <= count) of a binomial distribution."""
    return sum(math.comb(of, k) * rate**k * (1 - rate) ** (of - k) for k in range(count + 1))
