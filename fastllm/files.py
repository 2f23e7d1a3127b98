"""A file, files of a folder, or a folder of files, that appear whole or not at all.

check_file(path)  # before minutes are spent on what it is to hold
write_file(path, text)

with Replacing(folder) as files:
    files.write("config.json", text)
    save_file(tensors, files.part("model.safetensors"))

new = ReplacingFolder(folder)
save_file(tensors, new.begin() / "tensors.safetensors")
new.finish()
"""

import contextlib
import errno
import glob
import os
import re
import secrets
import shutil
import stat
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows: what a killed process left stays
    fcntl = None

LACK_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Replacing:
    """Files are written under other names, and take theirs, with the permissions of those that stood there, when all of them
    are on the disk. Where that fails, what was written goes and what stood there stays; an OSError names the file, the reason
    and the next step. Of several who write a file at a time one is the last."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.parts: dict[str, Path] = {}  # the name that a file is to have, and where it is now
        self._at = ""
        self._handles: list[int] = []  # by their locks others see that somebody is at work on the parts

    def part(self, name: str) -> Path:
        """Where a file is to be written, to become `name`. What others that were cut off left of it goes."""
        self._at = name
        if name not in self.parts:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.part"):
                _remove_left(left)
            self.parts[name] = self._begin(path)
        return self.parts[name]

    def _begin(self, path: Path) -> Path:
        """An empty file of a name that nobody has, locked where there are locks."""
        while True:
            part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
            handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            if fcntl:
                self._handles.append(handle)
                with contextlib.suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_EX)
                if not os.fstat(handle).st_nlink:  # before, somebody took it for one that was left
                    continue
            else:
                os.close(handle)
            mode = _mode(path)
            if mode is not None:  # from now on: who may not read the one shall not read the other
                os.chmod(part, mode | stat.S_IRUSR | stat.S_IWUSR)
            return part

    def write(self, name: str, content: str | bytes) -> None:
        self.part(name).write_bytes(content.encode() if isinstance(content, str) else content)

    def __enter__(self) -> "Replacing":
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                for name, part in self.parts.items():
                    self._at = name
                    sync(part)
                for name, part in self.parts.items():
                    self._at = name
                    mode = _mode(self.folder / name)
                    if mode is not None:
                        os.chmod(part, mode)
                    os.replace(part, self.folder / name)
        except OSError as failed:
            error = failed
        finally:
            for part in self.parts.values():
                with contextlib.suppress(OSError):
                    part.unlink()
            for handle in self._handles:
                os.close(handle)
        number = _number(error)
        if number is not None:
            raise OSError(number, self._message(number)) from error

    def _message(self, number: int) -> str:
        file = self.folder / self._at
        if number in LACK_OF_ROOM:
            free = f"{shutil.disk_usage(self.folder).free / 1e6:.1f} MB are free there"
            step = f"{free}; free some, or raise the quota or limit, or save to another folder"
        else:
            step = "save to a folder that can be written"
        return f"{file} could not be written ({os.strerror(number)}); what stood there is unchanged. {step}"


class ReplacingFolder:
    """A folder is filled under another name, `part`, and takes its own, and the place of an older one, when all of it is on the
    disk. Three calls, for one that several processes fill."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.part = _part(self.folder)

    def begin(self) -> Path:
        """An empty folder to fill. What others that were cut off left beside it goes."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        for left in self.folder.parent.glob(_part(Path("*")).name):
            shutil.rmtree(left, ignore_errors=True)
        self.part.mkdir()
        return self.part

    def finish(self) -> None:
        """Puts it in place."""
        for path in (*self.part.iterdir(), self.part):
            sync(path)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.replace(self.part, self.folder)
        sync(self.folder.parent)

    def drop(self) -> None:
        """Gives it up; what stands in its place stays."""
        shutil.rmtree(self.part, ignore_errors=True)


def check_file(path: str | os.PathLike) -> None:
    """Raises OSError where write_file could not write."""
    path = Path(path).absolute()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; make it, or name another")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it")
    if not os.access(path.parent if _replaceable(path) else path, os.W_OK):
        raise PermissionError(f"{path} cannot be written; name another place")


def write_file(path: str | os.PathLike, content: str) -> None:
    """Writes a file, whole or not at all. A pipe, a device or a link, as /dev/stdout is, stays one: what is behind it is written
    in place."""
    path = Path(path).absolute()
    if _replaceable(path):
        with Replacing(path.parent) as files:
            files.write(path.name, content)
    else:
        path.write_bytes(content.encode())


def _replaceable(path: Path) -> bool:
    return not path.is_symlink() and (path.is_file() or not path.exists())


def _mode(path: Path) -> int | None:
    """The permissions of a file; None where there is none."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return None


def _remove_left(part: Path) -> None:
    """Removes a file if nobody is at work on it. Where there are no locks it stays."""
    with contextlib.suppress(OSError):
        handle = os.open(part, os.O_RDWR)
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
        finally:
            os.close(handle)


def _part(path: Path) -> Path:
    """What a folder is called until it is whole."""
    return path.with_name(f".{path.name}.part")


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, lie on the disk. A disk that fills up, or a network's file system, may tell
    so only now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _number(error: BaseException | None) -> int | None:
    """The system's number of what failed; safetensors tells it in words alone."""
    if isinstance(error, OSError):
        return error.errno
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        return int(found[1])
    return None
