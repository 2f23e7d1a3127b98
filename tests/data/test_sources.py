"""Streams of documents: every format, every kind of bad input, exact positions, splits and mixtures."""

import bz2
import gzip
import itertools
import json
import re
import warnings
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.data import formats
from fastllm.data.formats import find_files, read_records
from fastllm.data.sources import BadRecord, Documents, Mixture, mixing_rates, split_of, write_jsonl
from fastllm.data.wikitext import plain_text


def texts(documents):
    return [d.text for d in documents]


@pytest.fixture
def corpus(tmp_path):
    """Three files of numbered records: jsonl, gzipped jsonl and text."""
    write_jsonl(tmp_path / "a.jsonl", ({"text": f"a{i}", "i": i} for i in range(23)))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"b{i}"}) + "\n" for i in range(11))
    (tmp_path / "c.txt").write_text("".join(f"c{i}\n" for i in range(7)))
    (tmp_path / "notes.yaml").write_text("not: read")
    return tmp_path


ALL = [f"a{i}" for i in range(23)] + [f"b{i}" for i in range(11)] + [f"c{i}" for i in range(7)]


def test_formats(corpus):
    documents = list(Documents(corpus, unit="line"))
    assert texts(documents) == ALL
    assert (documents[5].place, documents[-1].number) == (f"{corpus / 'a.jsonl'}:6", 7)
    assert documents[5].fields == {"text": "a5", "i": 5}
    assert texts(Documents(corpus / "*.gz")) == ALL[23:34]
    assert find_files([corpus / "c.txt", corpus]) == [corpus / "c.txt", corpus / "a.jsonl", corpus / "b.jsonl.gz"]


def test_the_end_of_a_name_tells_the_format(tmp_path):
    kinds = {
        "a.jsonl": "jsonl", "A.JSONL.GZ": "jsonl", "b.ndjson.xz": "jsonl", "wiki.txt.jsonl": "jsonl", "x.parquet.md": "txt",
        "c.parquet": "parquet", "d.xml": "xml", "d.xml-p1p41242.bz2": "xml", "d.xml-p01p30302-shortened.bz2": "xml",
    }  # fmt: skip
    others = [
        f"a.jsonl{end}"
        for end in (".bak", "~", ".zip", ".zst", ".lock", ".idx", ".1", ".sha256", "-p1p2", ".gz.part", "s", "\n")
    ] + ["c.parquet.gz", ".hidden.jsonl", "jsonl"]
    for name in (*kinds, *others):
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert {file.name for file in find_files(tmp_path)} == set(kinds)
    assert {name: formats._format(tmp_path / name) for name in kinds} == kinds
    assert texts(Documents(tmp_path / "wiki.txt.jsonl")) == ["a"]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "b.TXT.zip", "c.parquet.gz"])
def test_a_compression_that_is_not_known(tmp_path, name):
    (tmp_path / name).write_bytes(b"(\xb5/\xfd")
    end = name.rpartition(".")[2]
    with pytest.raises(
        ValueError, match=rf"{name}: \.{end} behind .* is no compression .*known: \.gz \.bz2 \.xz, .*unpack it"
    ):
        find_files(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="holds no file to read"):
        find_files(tmp_path)


def test_what_apply_refuses_is_a_bad_record(corpus):
    def odd(fields):
        if fields["i"] % 10 == 3:
            raise ValueError(f"{fields['i']} is unlucky")
        return fields if fields["i"] % 2 else None

    with pytest.raises(BadRecord, match=r"a\.jsonl:4: 3 is unlucky; mend it, or give bad='skip'"):
        list(Documents(corpus / "a.jsonl", apply=odd))
    documents = Documents(corpus / "a.jsonl", apply=odd, bad="skip")
    with pytest.warns(UserWarning, match=r"a\.jsonl:14: 13 is unlucky; skipped"):
        found = texts(documents)
    assert found == [f"a{i}" for i in range(1, 23, 2) if i % 10 != 3] and documents.skipped == 2


@pytest.mark.parametrize(
    ("unit", "wanted"),
    [
        ("file", [("\ufeff", 1)]),
        ("paragraph", [("one\r\ntwo", 1), ("three", 2), (" four", 3)]),
        ("line", [("one", 1), ("two", 2), ("three", 4), (" four", 8)]),
    ],
)
def test_units_of_text(tmp_path, unit, wanted):
    whole = "one\r\ntwo\r\n\r\nthree\n \n\n\n four"
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + whole.encode())
    found = [(d.text, d.number) for d in Documents(tmp_path / "t.txt", unit=unit)]
    assert found == ([(whole, 1)] if unit == "file" else wanted)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"content": f"p{i}", "n": i} for i in range(25)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=7)
    documents = list(Documents(tmp_path, text="content"))
    assert [d.fields for d in documents] == [{"text": f"p{i}", "n": i} for i in range(25)]
    for start in (0, 6, 7, 8, 24, 25):
        assert [n for _, _, n in read_records(tmp_path / "p.parquet", start, start)] == list(range(start + 1, 26))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(BadRecord, match=r"broken.parquet:1: no parquet"):
        list(Documents(tmp_path / "broken.parquet"))


def test_a_string_of_parquet_that_is_not_utf_8(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    stored = pyarrow.array([b"good", b"a\xff", b"last"], pyarrow.binary()).buffers()
    strings = pyarrow.Array.from_buffers(pyarrow.string(), 3, stored)
    parquet.write_table(pyarrow.table({"text": strings}), tmp_path / "p.parquet")
    with pytest.raises(BadRecord, match=r"p\.parquet:2: byte 1 of a string \(0xff\) is not UTF-8; mend it"):
        list(Documents(tmp_path))
    with pytest.warns(UserWarning, match=r"p\.parquet:2: byte 1"):
        assert texts(Documents(tmp_path, bad="skip")) == ["good", "last"]


def test_parquet_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "fastllm\[train\]"'):
        next(Documents(tmp_path))


# ------------------------------------------------------------------------------------------------------------- bad input

GOOD = b'{"text": "good"}\n'
BAD = {
    "broken": (b'{"text": "x"\n', r"f\.jsonl:2: no JSON: .*delimiter"),
    "no object": (b"[1, 2]\n", r"f\.jsonl:2: a JSON list; a record is an object"),
    "no utf-8": (b'{"text": "\xff"}\n', r"f\.jsonl:2: byte 10 of the record \(0xff\) is not UTF-8"),
    "enormous": (b'{"text": "' + b"x" * 5000 + b'"}\n', r"f\.jsonl:2: 5013 bytes, more than longest=1000"),
    "nested": (b"[" * 900 + b"\n", r"f\.jsonl:2: no JSON"),
    "half a character": (
        b'{"text": "a", "b": ["\\uD83d"]}\n',
        r"f\.jsonl:2: it holds a lone surrogate '\\ud83d', which no",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_lines(tmp_path, kind):
    """Refused by file and line, or skipped; the good ones around it come all the same."""
    line, words = BAD[kind]
    file = tmp_path / "f.jsonl"
    file.write_bytes(GOOD + line + b"\n" + GOOD + line[:-1])
    refusing = Documents(file, longest=1000)
    assert next(refusing).text == "good"
    for _ in range(2):  # asked again, it does not pass over it
        with pytest.raises(BadRecord, match=words):
            next(refusing)
    skipping = Documents(file, bad="skip", longest=1000)
    with pytest.warns(UserWarning) as said:
        assert texts(skipping) == ["good", "good"]
    assert re.search(words, str(said[0].message)) and "f.jsonl:5: " in str(said[1].message) and skipping.skipped == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("e.jsonl", b"", r"e\.jsonl:0: the file is empty"),
        ("e.txt", b"x" * 1001, r"e\.txt:1: the text has more than longest=1000 bytes; read it by unit='paragraph'"),
        ("e.txt", b"caf\xe9", r"e\.txt:1: byte 3 of the record \(0xe9\) is not UTF-8"),
        ("e.jsonl.gz", gzip.compress(GOOD * 50, mtime=0)[:-9], r"e\.jsonl\.gz:\d+: damaged from here on"),
        ("e.jsonl.bz2", b"no bz2 at all", r"e\.jsonl\.bz2:1: damaged from here on: Invalid data"),
        ("e.xml", b"<mediawiki><page>", r"e\.xml:1: no XML from here on"),
    ],
)
def test_bad_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadRecord, match=words):
        list(Documents(tmp_path / name, longest=1000))
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert set(texts(Documents(tmp_path, longest=1000, bad="skip"))) == {"good"}
    assert len(said) == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("field", ["text", "content"])
def test_a_text_that_is_null(tmp_path, kind, field):
    """Is bad; but not in a record of another form, which has all the columns of a parquet."""
    rows = [{field: "good"}, {field: None, "i": 1}, {field: None, "prompt": "a", "completion": "b"}, {field: "last"}]
    file = tmp_path / f"f.{kind}"
    if kind == "jsonl":
        write_jsonl(file, rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        every = {name: None for row in rows for name in row}
        parquet.write_table(pyarrow.Table.from_pylist([every | row for row in rows]), file)
    refusing = Documents(file, text=field)
    assert next(refusing).text == "good"
    for _ in range(2):
        with pytest.raises(BadRecord, match=rf"f\.{kind}:2: '{field}' is null; mend it, or give bad='skip'"):
            next(refusing)
    skipping = Documents(file, text=field, bad="skip")
    with pytest.warns(UserWarning, match=rf"f\.{kind}:2: '{field}' is null; skipped"):
        assert [d.fields["text"] for d in skipping] == ["good", None, "last"] and skipping.skipped == 1


def test_a_text_under_another_name(tmp_path):
    """What is named is read, and no other field in its place; a text file has no names."""
    rows = [
        {"body": "good"},
        {"text": "a title", "body": "too"},
        {"text": "a title"},
        {"prompt": "a", "completion": "b"},
    ]
    write_jsonl(tmp_path / "f.jsonl", rows)
    (tmp_path / "f.txt").write_text("a file")
    with pytest.raises(
        BadRecord, match=r"f\.jsonl:3: no field 'body'; the record has 'text'; mend it, or give bad='skip'"
    ):
        list(Documents(tmp_path, text="body"))
    with pytest.warns(UserWarning, match=r"f\.jsonl:3"):
        found = [d.fields.get("text") for d in Documents(tmp_path, text="body", bad="skip")]
    assert found == ["good", "too", None, "a file"]


def test_many_bad_lines_are_counted(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(b"?\n" * 100 + GOOD)
    documents = Documents(tmp_path, bad="skip")
    with pytest.warns(UserWarning) as said:
        assert texts(documents) == ["good"]
    assert documents.skipped == 100 and len(said) == 5 and "only counted" in str(said[-1].message)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"paths": "nowhere/*.jsonl"}, FileNotFoundError, "holds no file"),
        ({"paths": []}, FileNotFoundError, "no file was given"),
        ({"paths": __file__}, ValueError, "the format is told by the name; known: .txt"),
        ({"unit": "word"}, ValueError, "unit is 'word'; allowed: file, paragraph, line"),
        ({"bad": "keep"}, ValueError, "bad is 'keep'; allowed: raise, skip"),
        ({"split": "dev"}, ValueError, "split is 'dev'; the fractions name train, validation, test"),
        ({"split": "a", "fractions": {"a": 0.5}}, ValueError, "add up to 1"),
        ({"epochs": 0}, ValueError, "epochs=0"),
        ({"part": (2, 2)}, ValueError, r"part=\(2, 2\)"),
    ],
)
def test_options(corpus, given, error, words):
    with pytest.raises(error, match=words):
        Documents(**{"paths": corpus} | given)


def test_nothing_to_give(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(GOOD)
    with pytest.raises(ValueError, match="0 documents of the split 'b'"):
        next(Documents(tmp_path, split="b", fractions={"a": 1.0, "b": 0.0}, epochs=None))
    with pytest.raises(ValueError, match=r"1 documents .* none for part \(1, 2\)"):
        next(Documents(tmp_path, part=(1, 2), epochs=None))
    with pytest.raises(ValueError, match=r'f\.jsonl:1: no "text" \(a string\); the record has \'txt\''):
        (tmp_path / "f.jsonl").write_text('{"txt": 1}')
        _ = next(Documents(tmp_path)).text


# -------------------------------------------------------------------------------------------------------------- position


@pytest.mark.parametrize("shuffle", [0, 1, 4, 100])
def test_goes_on_at_any_document(corpus, shuffle):
    options = {"unit": "line", "shuffle": shuffle, "seed": 3, "epochs": 2}
    whole = texts(Documents(corpus, **options))
    assert Counter(whole) == Counter(ALL * 2)
    assert (whole[:41] == ALL) == (shuffle == 0)
    if shuffle > 1:
        assert whole[:41] != whole[41:]  # another order in each epoch
    for stop in range(len(whole) + 1):
        first = Documents(corpus, **options)
        assert texts(itertools.islice(first, stop)) == whole[:stop]
        state = json.loads(json.dumps(first.state_dict()))
        again = Documents(corpus, **options)
        again.load_state_dict(state)
        assert texts(again) == whole[stop:]
        assert texts(first) == whole[stop:]  # asking for the state changed nothing


def test_position_among_what_is_left_out(tmp_path):
    """Bad records and those of other splits before, between and behind."""
    lines = [b"?\n" if i % 3 == 0 else b'{"text": "t%d"}\n' % i for i in range(40)]
    (tmp_path / "f.jsonl").write_bytes(b"".join(lines))
    halves = {"a": 0.5, "b": 0.5}
    options = {"bad": "skip", "split": "a", "fractions": halves, "shuffle": 3, "epochs": 3, "part": (1, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = texts(Documents(tmp_path, **options))
        for stop in range(len(whole) + 1):
            first, again = Documents(tmp_path, **options), Documents(tmp_path, **options)
            list(itertools.islice(first, stop))
            again.load_state_dict(first.state_dict())
            assert texts(again) == whole[stop:]


def test_position_of_another_source(corpus):
    state = Documents(corpus, unit="line").state_dict()
    for other in ({"unit": "line", "shuffle": 2}, {"unit": "paragraph"}):
        with pytest.raises(ValueError, match="belongs to another source"):
            Documents(corpus, **other).load_state_dict(state)
    (corpus / "a.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(ValueError, match="belongs to another source"):
        Documents(corpus, unit="line").load_state_dict(state)


def test_parts_share_the_documents(corpus):
    parts = [texts(Documents(corpus, unit="line", shuffle=5, seed=1, part=(r, 3))) for r in range(3)]
    assert sorted(itertools.chain(*parts)) == sorted(ALL) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_order_is_kept_between_versions(corpus):
    """Drawn from hashes: these are the documents that a saved position of today means."""
    assert texts(itertools.islice(Documents(corpus, unit="line", shuffle=8, seed=7), 8)) == FIRST


FIRST = ["a7", "a6", "a5", "a1", "a3", "a2", "a0", "a4"]

# ---------------------------------------------------------------------------------------------------------------- splits

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def test_splits(tmp_path):
    write_jsonl(tmp_path / "f.jsonl", ({"text": f"text {i}"} for i in range(3000)))
    parts = {name: texts(Documents(tmp_path, split=name, fractions=FRACTIONS)) for name in FRACTIONS}
    assert sorted(itertools.chain(*parts.values())) == sorted(f"text {i}" for i in range(3000))
    for name, fraction in FRACTIONS.items():
        assert abs(len(parts[name]) - 3000 * fraction) < 4 * (3000 * fraction * (1 - fraction)) ** 0.5
    # a document stays where it was when others come, and so does its copy in other letters and spaces
    write_jsonl(tmp_path / "g.jsonl", ({"text": f" TEXT  {i}\n"} for i in range(3000)))
    for name in FRACTIONS:
        grown = Counter(
            " ".join(t.lower().split()) for t in texts(Documents(tmp_path, split=name, fractions=FRACTIONS))
        )
        assert grown == Counter(parts[name] * 2)


@given(st.text(max_size=20), st.lists(st.integers(1, 50), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_split_is_one_of_those(text, weights):
    fractions = {str(i): w / sum(weights) for i, w in enumerate(weights)}
    assert split_of(text, fractions) == split_of(text, fractions) in fractions


# --------------------------------------------------------------------------------------------------------------- mixture


def test_rates_of_t5():
    sizes = {"a": 100, "b": 900, "c": 10_000}
    assert mixing_rates(sizes) == pytest.approx({"a": 1 / 110, "b": 9 / 110, "c": 100 / 110})
    assert mixing_rates(sizes, limit=1000) == pytest.approx({"a": 0.05, "b": 0.45, "c": 0.5})
    roots = {"a": 1, "b": 3, "c": 10}
    assert mixing_rates(sizes, temperature=2) == pytest.approx({k: v / 14 for k, v in roots.items()})
    assert mixing_rates(sizes, temperature=1e9) == pytest.approx(dict.fromkeys(sizes, 1 / 3))
    for wrong in ({"temperature": 0.5}, {"temperature": float("nan")}, {"limit": 0}):
        with pytest.raises(ValueError, match="allowed"):
            mixing_rates(sizes, **wrong)


def mixture(corpus, epochs=None):
    parts = {name: Documents(corpus / f"{name}*", unit="line", shuffle=3, epochs=epochs) for name in "abc"}
    return Mixture(parts, {"a": 0.2, "b": 0.3, "c": 0.5}, seed=5)


def test_mixture(corpus):
    drawn = Counter(d.fields["task"] for d in itertools.islice(mixture(corpus), 5000))
    for name, rate in (("a", 0.2), ("b", 0.3), ("c", 0.5)):
        assert abs(drawn[name] - 5000 * rate) < 4 * (5000 * rate * (1 - rate)) ** 0.5
    assert sorted(texts(mixture(corpus, epochs=1))) == sorted(ALL)  # what has ended leaves the rest to the others
    whole = [(d.fields["task"], d.text) for d in mixture(corpus, epochs=2)]
    for stop in range(0, len(whole) + 1, 5):
        first, again = mixture(corpus, epochs=2), mixture(corpus, epochs=2)
        list(itertools.islice(first, stop))
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [(d.fields["task"], d.text) for d in again] == whole[stop:]
    with pytest.raises(ValueError, match="a positive rate for each"):
        Mixture(mixture(corpus).sources, {"a": 1.0})


# ----------------------------------------------------------------------------------------------------------- MediaWiki

PAGE = """{{Infobox|name={{lang|en|x}}}}'''Gravity''' ({{lang|la|gravitas}}) or (, pull) is a [[force|fundamental force]]
<ref name="a">{{cite}}</ref>of [[nature]]<ref name="a" />.<!-- note -->
[[File:Apple.jpg|thumb|An [[apple]] that falls]]
{| class="wikitable"
| cell
|}
== History ==
* [[Isaac Newton|Newton]] &amp; [http://x.org others]
== Empty ==
== References ==
{{reflist}} [1] A book.
[[Category:Physics]] [[de:Gravitation]]"""


def test_markup():
    assert plain_text(PAGE) == (
        "Gravity or (pull) is a fundamental force\nof nature.\n\nHistory\n\nNewton & others"
    )  # fmt: skip


def test_dump(tmp_path):
    pages = "".join(
        f"<page><title>{t}</title><ns>{ns}</ns>{more}<revision><text>text of {t}</text></revision></page>"
        for t, ns, more in (("A", 0, ""), ("B", 0, '<redirect title="A"/>'), ("Talk:A", 1, ""), ("C", 0, ""))
    )
    dump = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{pages}</mediawiki>'
    (tmp_path / "wiki-pages.xml-p1p4.bz2").write_bytes(bz2.compress(dump.encode()))
    documents = list(Documents(tmp_path))
    assert [(d.fields, d.number) for d in documents] == [
        ({"title": "A", "text": "text of A"}, 1),
        ({"title": "C", "text": "text of C"}, 4),
    ]
    again = Documents(tmp_path)
    next(again)
    state, fresh = again.state_dict(), Documents(tmp_path)
    fresh.load_state_dict(state)
    assert texts(fresh) == ["text of C"]
