"""Files of a folder, or a folder of files, that appear whole or not at all.

with Replacing(folder) as files:
    files.write("config.json", text)
    save_file(tensors, files.part("model.safetensors"))

new = ReplacingFolder(folder)
save_file(tensors, new.begin() / "tensors.safetensors")
new.finish()
"""

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path
from types import TracebackType

LACK_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Replacing:
    """Files are written under other names, and take theirs when all of them are on the disk. Where that fails, what was written
    goes and what stood there stays; an OSError names the file, the reason and the next step."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.parts: dict[str, Path] = {}  # the name that a file is to have, and where it is now
        self._at = ""

    def part(self, name: str) -> Path:
        """Where a file is to be written, to become `name`."""
        self._at = name
        self.parts[name] = _part(self.folder / name)
        self.parts[name].parent.mkdir(parents=True, exist_ok=True)
        return self.parts[name]

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
                    os.replace(part, self.folder / name)
        except OSError as failed:
            error = failed
        finally:
            for part in self.parts.values():
                with contextlib.suppress(OSError):
                    part.unlink()
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


def _part(path: Path) -> Path:
    """What a file or folder is called until it is whole."""
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
