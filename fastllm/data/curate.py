"""What of a corpus is worth training on, and a report of what was dropped and why.

    report = curate(Documents("dump/*.jsonl"), "clean.jsonl", Rules(languages=("en",)), tests=benchmark_texts)
    print(report.table())

In this order, the first rule that a document breaks naming the reason: normalise; empty; exact duplicate; language; quality
(rules of Gopher and C4); toxicity; personal data, which is replaced, not dropped; contamination by test sets; near duplicate.
Rules of language, quality, toxicity, bias and personal data are heuristics: they err both ways, and a report shows excerpts so
that somebody can look. Sources:
- Gopher: Rae et al. 2021, arXiv 2112.11446, appendix A.1.1 (quality, repetition within a document).
- C4: Raffel et al. 2019, arXiv 1910.10683, section 2.2.
- Near duplicates: MinHash (Broder 1997) and locality-sensitive hashing; 5-grams and a Jaccard similarity of 0.8 as in Lee et
  al. 2021, arXiv 2107.06499.
- Contamination: 13-grams as in Brown et al. 2020, arXiv 2005.14165, appendix C.
"""

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .sources import Document, write_jsonl

_EXCERPTS, _WIDTH = 3, 160
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def _terms(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STOP_WORDS = _terms("the be to of and that have with")
_TERMINAL = (".", "!", "?", '"', "”", "'", "’", ")", "…", ":", ";")


@dataclass(frozen=True)
class Rules:
    """What a document must keep to; every number is the largest or smallest that is allowed.

    languages: codes of ISO 639-1, None for any; certainty: least probability of the one that is found. words: least and most.
    quality: apply Gopher's rules and C4's. near: the Jaccard similarity from which on documents are duplicates, None to keep
    them. contamination: words of an n-gram that test texts may not share. toxic: terms, one of which in so many words
    (toxic_share) drops the document; None for the short list of English ones. personal: replace e-mail addresses, telephone,
    card and social security numbers and IP addresses by <EMAIL>, <PHONE> ...
    """

    languages: tuple[str, ...] | None = None
    certainty: float = 0.5
    words: tuple[int, int] = (50, 100_000)
    quality: bool = True
    near: float | None = 0.8
    contamination: int = 13
    toxic: frozenset[str] | None = None
    toxic_share: float = 0.02
    personal: bool = True

    def __post_init__(self) -> None:
        fits = 0 <= self.certainty <= 1 and 0 < self.toxic_share <= 1 and 0 <= self.words[0] <= self.words[1]
        if not fits or self.contamination < 1 or not (self.near is None or 0 < self.near <= 1):
            raise ValueError(f"{self}: shares are between 0 and 1, words (least, most), contamination 1 or more")


@dataclass
class Report:
    """Documents and characters by fate: `kept`, or the reason to drop them; what was replaced, and what was counted.

    excerpts: of the first documents of each reason, with their places. bias: see `count_groups`.
    """

    documents: Counter[str] = field(default_factory=Counter)
    characters: Counter[str] = field(default_factory=Counter)
    replaced: Counter[str] = field(default_factory=Counter)
    bias: dict[str, dict[str, int]] = field(default_factory=dict)
    excerpts: dict[str, list[str]] = field(default_factory=dict)

    def table(self) -> str:
        """For a terminal: a row for each fate, the most documents first."""
        total, size = sum(self.documents.values()), sum(self.characters.values())
        rows = [("", "documents", "share", "characters", "share")]
        kept_first = sorted(self.documents, key=lambda name: (name != "kept", -self.documents[name], name))
        for name in [*kept_first, "all"]:
            n, c = (total, size) if name == "all" else (self.documents[name], self.characters[name])
            rows.append((name, f"{n:,}", f"{n / max(total, 1):.1%}", f"{c:,}", f"{c / max(size, 1):.1%}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{row[0]:<{widths[0]}}  " + "  ".join(f"{v:>{w}}" for v, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        if self.replaced:
            lines.append("replaced: " + ", ".join(f"{name} {n:,}" for name, n in sorted(self.replaced.items())))
        for group, counts in self.bias.items():
            lines.append(f"{group}: " + ", ".join(f"{name} {n:,}" for name, n in counts.items()))
        for name, shown in self.excerpts.items():
            lines += [f"\n{name}:", *(f"  {text}" for text in shown)]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike) -> None:
        """As JSON."""
        part = Path(path).with_name(f".{Path(path).name}.part")
        part.write_text(json.dumps(vars(self), ensure_ascii=False, indent=2), encoding="utf-8")
        os.replace(part, path)


def curate(
    documents: Iterable[Document], out: str | os.PathLike | None, rules: Rules = Rules(), tests: Iterable[str] = ()
) -> Report:
    """Writes the documents that keep to the rules as jsonl, with "text" normalised, and gives the report. out: None only reports.

    tests: texts that must stay unseen. ImportError: languages or near duplicates without the extra that they need.
    """
    report = Report()
    kept = _kept(documents, rules, list(tests), report)
    if out is None:
        for _ in kept:
            pass
    else:
        write_jsonl(out, kept)
    return report


def _kept(documents: Iterable[Document], rules: Rules, tests: list[str], report: Report) -> Iterator[dict[str, Any]]:
    judge = _Judge(rules, tests)
    for document in documents:
        text = normalise(document.text)
        words = _WORD.findall(text)
        fault = judge.of_text(text, words)
        if fault is None and rules.personal:
            text, replaced = redact(text)
            report.replaced.update(replaced)
        fault, note = (fault, "") if fault is not None else judge.among_others(text, document.place)
        fate = fault or "kept"
        report.documents[fate] += 1
        report.characters[fate] += len(text)
        if fault is None:
            _add_groups(report.bias, words)
            yield document.fields | {"text": text}
        elif len(shown := report.excerpts.setdefault(fault, [])) < _EXCERPTS:
            shown.append(f"{Path(document.file).name}:{document.number}{note}: {' '.join(text[:_WIDTH].split())}")


class _Judge:
    """The rules, and what they remember of earlier documents."""

    def __init__(self, rules: Rules, tests: list[str]):
        self.rules, self.seen = rules, set[bytes]()
        self.language = None if rules.languages is None else _language_of()
        self.toxic = TOXIC if rules.toxic is None else frozenset(term.casefold() for term in rules.toxic)
        self.unseen = Contamination(tests, rules.contamination)
        self.near = None if rules.near is None else NearDuplicates(rules.near)

    def of_text(self, text: str, words: list[str]) -> str | None:
        rules = self.rules
        digest = hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()
        if not text:
            return "empty"
        if digest in self.seen:
            return "exact duplicate"
        self.seen.add(digest)
        if rules.quality and (fault := length_fault(text, rules.words)):
            return fault  # before the language, which is not to be told from a few words
        if self.language is not None:
            code, certainty = self.language(text)
            if code not in rules.languages:
                return f"language: {code}"
            if certainty < rules.certainty:
                return "language: uncertain"
        if rules.quality and (fault := quality_fault(text)):
            return fault
        if toxic_share(words, self.toxic) > rules.toxic_share:
            return f"toxicity: more than {rules.toxic_share:.0%} of the words"
        return None

    def among_others(self, text: str, place: str) -> tuple[str | None, str]:
        """The fault, and which other text it is about."""
        test = self.unseen.find(text)
        if test is not None:
            return "contamination: shares words with a test text", f" (test text {test})"
        other = None if self.near is None else self.near.add(text, place)
        return (None, "") if other is None else ("near duplicate", f" (of {other})")


# ------------------------------------------------------------------------------------------------------ text and language


def normalise(text: str) -> str:
    """NFC, line ends as \\n, no control characters, no spaces at the ends of lines, at most one blank line in a row."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff\ufffe\uffff]", "", text)
    text = re.sub(r"[ \t\u00a0]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" *\n", "\n", text)).strip()


def _language_of():
    """text -> (code, probability)."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ImportError('languages are told apart by py3langid; pip install "fastllm[train]"') from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).classify


# --------------------------------------------------------------------------------------------------------------- quality


def length_fault(text: str, words: tuple[int, int] = (50, 100_000)) -> str | None:
    """Gopher's rule on the number of words, broken, in words; or None."""
    return None if words[0] <= len(text.split()) <= words[1] else f"quality: not {words[0]:,} to {words[1]:,} words"


def quality_fault(text: str) -> str | None:
    """The first of Gopher's other rules and of C4's that a text breaks, in words; None where it keeps to all.

    C4's rules drop single lines; here a text is dropped whose lines, of more than five, hardly ever end as sentences do.
    """
    tokens = text.split()
    count, lines = len(tokens), [line.strip() for line in text.split("\n") if line.strip()]
    spelled = [w for token in tokens if (w := token.strip(".,;:!?()[]\"'“”‘’*-–—"))]
    lower = text.casefold()
    share = lambda holds, of: sum(map(holds, of)) / max(len(of), 1)  # noqa: E731
    length = sum(map(len, spelled)) / max(len(spelled), 1)
    checks = (
        (not 3 <= length <= 10, "quality: mean word of not 3 to 10 letters"),
        ((text.count("#") + text.count("...") + text.count("…")) > 0.1 * count, "quality: a symbol in 10 words"),
        (share(lambda line: line[0] in "•●-*‣–", lines) > 0.9, "quality: 90 % of the lines are bullets"),
        (share(lambda line: line.endswith(("...", "…")), lines) > 0.3, "quality: 30 % of the lines end in an ellipsis"),
        (share(lambda token: any(c.isalpha() for c in token), tokens) < 0.8, "quality: 20 % of the words have no letter"),
        (len(_STOP_WORDS & set(_WORD.findall(lower))) < 2, "quality: fewer than 2 of 8 stop words"),
        ("lorem ipsum" in lower, "quality: lorem ipsum"),
        (text.count("{") + text.count("}") > max(2, 0.01 * count), "quality: braces, as in code"),
        (len(lines) > 5 and share(lambda line: line.endswith(_TERMINAL), lines) < 0.1, "quality: lines that are no sentences"),
    )  # fmt: skip
    return next((reason for broken, reason in checks if broken), None) or repetition_fault(text)


# n -> share of the characters in the most frequent n-gram, or in all n-grams that come twice
_TOP_GRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
_TWICE_GRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def repetition_fault(text: str) -> str | None:
    """The first of Gopher's rules on repetition (its table A1) that a text breaks, or None."""
    for name, parts in (("lines", text.split("\n")), ("paragraphs", re.split(r"\n{2,}", text))):
        parts = [part.strip() for part in parts if part.strip()]
        counts = Counter(parts)
        again = sum(n - 1 for n in counts.values())
        size = sum(len(part) * (n - 1) for part, n in counts.items())
        if again > 0.3 * len(parts) or size > 0.2 * len(text):
            return f"repetition: {name}"
    words = text.casefold().split()
    size = max(sum(map(len, words)), 1)
    for n, limit in _TOP_GRAMS.items():
        grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        gram, times = max(grams.items(), key=lambda item: item[1], default=((), 0))
        if times > 1 and times * sum(map(len, gram)) > limit * size:
            return f"repetition: one {n}-gram"
    if len(set(zip(*(words[i:] for i in range(5)), strict=False))) == len(words) - 4:
        return None  # no 5-gram comes twice, so no longer one does
    for n, limit in _TWICE_GRAMS.items():
        first: dict[tuple[str, ...], int] = {}
        covered = [False] * len(words)
        for at, gram in enumerate(zip(*(words[i:] for i in range(n)), strict=False)):
            if first.setdefault(gram, at) != at:
                covered[at : at + n] = [True] * n
        if sum(len(w) for w, c in zip(words, covered, strict=True) if c) > limit * size:
            return f"repetition: {n}-grams"
    return None


# ------------------------------------------------------------------------------------- toxicity, bias, personal data

# A short list of English profanity; give Rules(toxic=...) a longer one, and one of the language at hand.
TOXIC = _terms(
    "arse arsehole ass asshole assholes bastard bastards bitch bitches bollocks bullshit cock cocksucker crap cunt cunts "
    "dick dickhead dipshit dumbass fuck fucked fucker fuckers fucking fucks goddamn jackass motherfucker motherfucking piss "
    "pissed prick pricks pussy shit shits shitty slut sluts tits twat wanker whore whores"
)
GROUPS = {
    "gender": {
        "he": _terms("he him his himself man men boy boys male"),
        "she": _terms("she her hers herself woman women girl girls female"),
    },
    "religion": {
        "christian": _terms("christian christians christianity"),
        "muslim": _terms("muslim muslims islam islamic"),
        "jewish": _terms("jew jews jewish judaism"),
        "hindu": _terms("hindu hindus hinduism"),
        "buddhist": _terms("buddhist buddhists buddhism"),
    },
}


def toxic_share(words: list[str], terms: frozenset[str] = TOXIC) -> float:
    """Words that are such terms, of all: a heuristic that knows neither quotation nor meaning."""
    return sum(word.casefold() in terms for word in words) / max(len(words), 1)


def _add_groups(bias: dict[str, dict[str, int]], words: list[str]) -> None:
    """How often words of each group of people come, so that one sees whom a corpus speaks of: a count, no verdict."""
    counts = Counter(map(str.casefold, words))
    for group, names in GROUPS.items():
        into = bias.setdefault(group, dict.fromkeys(names, 0))
        for name, terms in names.items():
            into[name] += sum(counts[term] for term in terms)


_PERSONAL = {
    "EMAIL": re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b"),
    "SSN": re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])"),
    "CARD": re.compile(r"(?<![\d-])[2-6](?:[ -]?\d){12,18}(?![\d-])"),
    "IP": re.compile(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])"),
    "PHONE": re.compile(
        r"(?<![\w-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]\d{2,4}){1,4}"
        r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-])"
    ),
}


def redact(text: str) -> tuple[str, Counter[str]]:
    """The text with what looks like personal data replaced by <EMAIL>, <SSN>, <CARD> (only where the Luhn sum holds), <IP> and
    <PHONE>, and how often each was. Heuristics by form alone: names and addresses are not found."""
    found: Counter[str] = Counter()

    for name, pattern in _PERSONAL.items():

        def replacement(match: re.Match, name: str = name) -> str:
            if name == "CARD" and not _is_card(match[0]):
                return match[0]
            found[name] += 1
            return f"<{name}>"

        text = pattern.sub(replacement, text)
    return text, found


def _is_card(written: str) -> bool:
    """The check digit of Luhn (ISO/IEC 7812)."""
    digits = [int(c) for c in reversed(written) if c.isdigit()]
    total = sum(d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits))
    return len(set(digits)) > 1 and total % 10 == 0


# ------------------------------------------------------------------------------------------ duplicates and contamination


class NearDuplicates:
    """Texts whose sets of word 5-grams have about this Jaccard similarity or more, by MinHash of 128 permutations."""

    def __init__(self, similarity: float = 0.8, permutations: int = 128):
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ImportError('near duplicates are found by datasketch; pip install "fastllm[train]"') from error
        self._hash = lambda: MinHash(num_perm=permutations, seed=1)
        self._index, self.similarity = MinHashLSH(threshold=similarity, num_perm=permutations), similarity
        self._kept: list[tuple[str, Any]] = []

    def add(self, text: str, name: str) -> str | None:
        """The name of an earlier text that this is a near duplicate of; None, and it is remembered, where there is none."""
        words = [w.casefold() for w in _WORD.findall(text)]
        grams = {" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))}
        made = self._hash()
        made.update_batch(sorted(grams))
        for key in sorted(self._index.query(made)):  # candidates, by buckets
            if self._kept[key][1].jaccard(made) >= self.similarity:
                return self._kept[key][0]
        self._index.insert(len(self._kept), made)
        self._kept.append((name, made))
        return None


class Contamination:
    """Texts that must stay unseen, as n-grams of words (letters and digits alone, whatever the case). One shorter than n words
    is looked for as a whole, from 5 words on."""

    def __init__(self, tests: Iterable[str], n: int = 13):
        self._grams: dict[tuple[str, ...], int] = {}
        self._lengths: set[int] = set()
        for at, text in enumerate(tests):
            words = [w.casefold() for w in _WORD.findall(text)]
            length = min(n, len(words))
            if length < min(5, n):
                continue
            self._lengths.add(length)
            for i in range(len(words) - length + 1):
                self._grams.setdefault(tuple(words[i : i + length]), at)

    def find(self, text: str) -> int | None:
        """The index of the first test that shares an n-gram with the text, or None."""
        words = [w.casefold() for w in _WORD.findall(text)]
        for length in sorted(self._lengths, reverse=True):
            for i in range(len(words) - length + 1):
                if (at := self._grams.get(tuple(words[i : i + length]))) is not None:
                    return at
        return None
