"""Curation: each rule alone, the report, and real corpora."""

import json

import numpy as np
import pytest
from _assets import packaged

from fastllm.data.curate import (
    Contamination,
    NearDuplicates,
    Report,
    Rules,
    curate,
    length_fault,
    normalise,
    quality_fault,
    redact,
    repetition_fault,
    toxic_share,
)
from fastllm.data.sources import Document, Documents

PROSE = (
    "The river rises in the hills and flows to the sea. Along its banks people have built mills that grind corn, and "
    "with the years a town grew around them. Few of the old houses are left; those that stand are looked after by a "
    "trust, which opens two of them in summer. Visitors come by train, walk up the valley and return in the evening."
)
WORDS = ["harbour", "stone", "letter", "garden", "winter", "market", "doctor", "silver", "window", "bridge", "captain"]
WORDS += ["forest", "music", "candle", "island", "mirror", "engine", "pepper", "ladder", "basket"]


def prose(seed: int, length: int = 120) -> str:
    draw = np.random.default_rng(seed)
    words = [f"{draw.choice(WORDS)}{draw.integers(50)}" if i % 3 else "the" for i in range(length)]
    return (
        " ".join(f"{w}." if i % 9 == 8 else w for i, w in enumerate(words)).replace("the", "the", 1) + " and so it is."
    )


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("cafe\u0301  \t x\u00a0y", "café x y"),
        ("\ufeffa\x00b\u200bc\x1b", "abc"),
        (" a \n\n\n\n b ", "a\n\n b"),
        ("\n \n", ""),
    ],
)
def test_normalise(raw, clean):
    assert normalise(raw) == clean == normalise(clean)


FAULTS = {
    "quality: mean word of not 3 to 10 letters": "a I to of it " * 20 + "and the be",
    "quality: a symbol in 10 words": PROSE + " #tag" * 12,
    "quality: 90 % of the lines are bullets": "\n".join(f"- item {w} and the rest of it to be had." for w in WORDS),
    "quality: 30 % of the lines end in an ellipsis": "\n".join(
        f"the {w} and all of that was with it, and to be had in the shop next door ..." for w in WORDS
    ),
    "quality: 20 % of the words have no letter": PROSE + " 12 34 56 78" * 6,
    "quality: fewer than 2 of 8 stop words": " ".join(f"{a} {b}" for a in WORDS for b in WORDS[:3]) + ".",
    "quality: lorem ipsum": PROSE + " Lorem ipsum dolor.",
    "quality: braces, as in code": PROSE + " {x} {y}",
    "quality: lines that are no sentences": "\n".join(f"menu of the {w} and that" for w in WORDS),
    "repetition: lines": "\n".join(
        [f"This is about the {w} and the rest." for w in WORDS[:6]] + ["Click here to buy it."] * 5
    ),
    "repetition: one 2-gram": PROSE + " very good" * 20,
    "repetition: 5-grams": PROSE + " " + " ".join(PROSE.split()[8:20]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_quality(fault):
    found = quality_fault(FAULTS[fault])
    assert found == fault or (fault.startswith("repetition") and found == repetition_fault(FAULTS[fault]) is not None)


def test_prose_is_fine():
    assert quality_fault(PROSE) is None and length_fault(PROSE) is None
    assert length_fault("too few words") == "quality: not 50 to 100,000 words"


def test_toxicity_is_a_share_of_words():
    assert toxic_share(["what", "a", "SHIT", "day"]) == 0.25 and toxic_share([]) == 0
    assert toxic_share(["Scunthorpe", "assess", "cocktail"]) == 0  # whole words


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("write to jo.doe+x@mail.example.org, or", "write to <EMAIL>, or"),
        ("card 4111 1111 1111 1111 ok", "card <CARD> ok"),
        ("card 4111 1111 1111 1112 is none", "card 4111 1111 1111 1112 is none"),
        ("SSN 078-05-1120.", "SSN <SSN>."),
        ("call (555) 123-4567 or +44 20 7946 0958!", "call <PHONE> or <PHONE>!"),
        ("from 192.168.0.1 to 300.1.1.1", "from <IP> to 300.1.1.1"),
        ("in 1914-1918, 3.14159, ISBN 978-0-306-40615-7, v1.2.3, 12 000 000", None),
        ("a@b and 10-12-2020 at 10:30", None),
    ],
)
def test_personal(text, clean):
    found, counts = redact(text)
    assert found == (clean or text) and (sum(counts.values()) > 0) == (found != text)


def test_near_duplicates():
    pytest.importorskip("datasketch")
    index, text = NearDuplicates(0.8), prose(1, 300)
    assert index.add(text, "first") is None
    words = text.split()
    assert index.add(" ".join([*words[:150], "changed", *words[151:]]).upper(), "second") == "first"
    assert index.add(" ".join(words[:100] + prose(2, 200).split()), "third") is None  # a third of it is the same
    assert all(index.add(prose(seed), str(seed)) is None for seed in range(10, 60))


def test_contamination():
    tests = ["too short", "In winter the harbour is closed", " ".join(f"w{i}" for i in range(40))]
    index = Contamination(tests)
    assert index.find("They say: IN winter, the harbour is closed!") == 1
    assert index.find("in winter the harbour was closed") is None
    assert index.find("x " + " ".join(f"W{i}," for i in range(20, 33)) + " y") == 2
    assert index.find("x " + " ".join(f"w{i}" for i in range(20, 32)) + " y") is None  # 12 of 13
    assert index.find("too short") is None
    assert Contamination([]).find(PROSE) is None


def test_report(tmp_path):
    pytest.importorskip("datasketch")
    test = "What is the name of the hill on which the old mill of the town was built?"
    texts = [PROSE, PROSE.upper(), "", "short", prose(1), prose(1) + " indeed", f"{prose(2)} {test} {prose(3)}",
             PROSE.replace("trust", "trust (a@b.org)") + " shit" * 5, prose(4) + " mail me@home.net"]  # fmt: skip
    documents = [Document({"text": t, "n": i}, "some/where/f.jsonl", i + 1) for i, t in enumerate(texts)]
    report = curate(documents, tmp_path / "out" / "clean.jsonl", Rules(), tests=[test])
    kept = [json.loads(line) for line in (tmp_path / "out" / "clean.jsonl").read_text().splitlines()]
    assert [r["n"] for r in kept] == [0, 4, 8] and kept[2]["text"].endswith("mail <EMAIL>")
    assert report.documents == {
        "kept": 3,
        "exact duplicate": 1,
        "empty": 1,
        "quality: not 50 to 100,000 words": 1,
        "near duplicate": 1,
        "contamination: shares words with a test text": 1,
        "toxicity: more than 2% of the words": 1,
    }
    assert report.excerpts["near duplicate"][0].startswith("f.jsonl:6 (of some/where/f.jsonl:5): ")
    assert report.excerpts["contamination: shares words with a test text"][0].startswith("f.jsonl:7 (test text 0): ")
    table = report.table()
    assert table.splitlines()[1].split()[:3] == ["kept", "3", "33.3%"] and "replaced: EMAIL 1" in table
    report.save(tmp_path / "report.json")
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["documents"] == report.documents and again["replaced"] == {"EMAIL": 1}
    assert curate(documents, None, tests=[test]).documents == report.documents
    assert Report().table().splitlines()[-1].split() == ["all", "0", "0.0%", "0", "0.0%"]


def test_language():
    pytest.importorskip("py3langid")
    german = (
        "Der Fluss entspringt in den Bergen und fließt ins Meer. An seinen Ufern haben die Menschen Mühlen gebaut. " * 3
    )
    documents = [Document({"text": PROSE}), Document({"text": german})]
    assert curate(documents, None, Rules(languages=("en",))).documents == {"kept": 1, "language: de": 1}
    found = curate(documents, None, Rules(languages=("de",), quality=False)).documents
    assert found == {"kept": 1, "language: en": 1}


@pytest.mark.parametrize(("module", "rules"), [("py3langid.langid", {"languages": ("en",)}), ("datasketch", {})])
def test_a_missing_library_names_the_extra(monkeypatch, module, rules):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "fastllm\[train\]"'):
        curate([Document({"text": PROSE})], None, Rules(**rules))
    if not rules:
        assert curate([Document({"text": PROSE})], None, Rules(near=None)).documents == {"kept": 1}


@pytest.mark.parametrize(
    "wrong", [{"certainty": 2}, {"words": (5, 1)}, {"near": 0}, {"contamination": 0}, {"toxic_share": 0}]
)
def test_rules_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rules(**wrong)


def test_real_corpora():
    """Passages of OpenWebText and Wikipedia: most are kept, what is in another language or is no text is not; and a test set
    drawn out of them is found."""
    pytest.importorskip("datasketch"), pytest.importorskip("py3langid")
    folder = packaged("passages")
    web = list(Documents(folder / "owt_5.jsonl", text="0"))
    report = curate(web, None, Rules(languages=("en",)), tests=[d.text for d in web[:20]])
    assert 840 < report.documents["kept"] < 930
    assert 14 <= report.documents["contamination: shares words with a test text"] <= 20
    assert {"language: ru", "language: es", "language: it"} <= report.documents.keys()
    wiki = curate(Documents(folder / "wikipedia_5.jsonl", text="0"), None, Rules(languages=("en",)))
    assert 800 < wiki.documents["kept"] < 900


def test_a_real_dump():
    pytest.importorskip("datasketch"), pytest.importorskip("py3langid")
    report = curate(Documents(packaged("wiki")), None, Rules(languages=("en",)))
    assert sum(report.documents.values()) == 106 and report.documents["kept"] >= 100
