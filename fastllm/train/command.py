"""What the command line adds to a stage: its options from flags and YAML, by jsonargparse, and the process's memory."""

import contextlib
import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from .stage import OPTIONS, StageOptions

Options = TypeVar("Options", bound=StageOptions)
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")


def parse(name: str, kind: type[Options], arguments: Sequence[str]) -> tuple[Options, bool]:
    """The options, and whether to resume. `--config FILE.yaml` gives what flags do not; with `--resume` so does the run folder's
    own options.yaml. ValueError: an unknown or missing one, or a value that does not fit. SystemExit: `--help`."""
    try:
        from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter
    except ImportError:
        raise ImportError(f"fastllm {name} needs jsonargparse: pip install 'fastllm[train]'") from None

    class Formatter(DefaultHelpFormatter):
        def format_help(self) -> str:
            return _FLAG.sub(lambda flag: flag[0].replace("_", "-"), super().format_help())

    about = (kind.__doc__ or "").split("\n")[0]
    parser = ArgumentParser(prog=f"fastllm {name}", description=about, exit_on_error=False, formatter_class=Formatter)
    parser.add_argument("-c", "--config", action="config", help="A YAML file of these options; flags behind it win.")
    parser.add_argument("--resume", action="store_true", help="Go on from the newest checkpoint in --out.")
    parser.add_class_arguments(kind, None)
    fields = [_FLAG.sub(_field, a, count=1) if a.startswith("--") else a for a in arguments]
    try:
        given = parser.parse_args([*_own_options(fields), *fields]).as_dict()
    except ArgumentError as error:
        raise ValueError(f"{_short(str(error))}; `fastllm {name} --help` lists the options") from None
    resume = given.pop("resume")
    given.pop("config")
    return kind(**given), resume


def _field(flag: re.Match) -> str:
    """--max-length as its field is called."""
    return "--" + flag[0][2:].replace("-", "_")


def _own_options(arguments: Sequence[str]) -> list[str]:
    """What the run in --out began with, first, so that flags win."""
    if "--resume" not in arguments:
        return []
    for i, argument in enumerate(arguments):
        if argument == "--out" or argument.startswith("--out="):
            path = Path(argument[6:] if "=" in argument else "".join(arguments[i + 1 : i + 2])) / OPTIONS
            return ["--config", str(path)] if path.is_file() else []
    return []


def _short(message: str) -> str:
    """jsonargparse's message on one line, naming an option as the command line does."""
    message = re.sub(r"\s+", " ", message).strip()
    message = re.sub(r'^Parser key "([^"]+)": ', lambda key: f"--{key[1].replace('_', '-')}: ", message)
    return message.replace("<class '", "").replace("'>", "")


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees for the next one, in place of a page fault for each page of it. For the whole process, so
    it is the command's to choose and never the package's."""
    trim, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim, (1 << 31) - 1)
        mallopt(mmap_max, 0)
