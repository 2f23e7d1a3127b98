"""The loop of `fastllm chat`: lines in, answers out, commands that begin with a slash."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable

from .conversation import Conversation

HELP = """/reset forgets the conversation, /save FILE and /load FILE keep it and take it up again, /help says this, and /quit or
Ctrl-D leaves. A line that ends with a backslash goes on in the next one. Ctrl-C stops an answer."""


def chat(talk: Conversation, read: Callable[[str], str] = input) -> None:
    """Runs a conversation on the terminal until its input ends. read(prompt) gives a line, or raises EOFError."""
    shown = sys.stdin.isatty()
    if shown:
        import_line_editing()
        print(HELP, file=sys.stderr)
    while True:
        try:
            line = message(read, shown)
        except EOFError:
            break
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)", file=sys.stderr)
            continue
        try:
            if line.startswith("/"):
                if not command(talk, line):
                    break
            elif line.strip():
                answer(talk, line)
        except (ValueError, OSError) as error:  # told, and the conversation goes on
            print(f"fastllm: {error}", file=sys.stderr)
    if shown:
        print(file=sys.stderr)


def message(read: Callable[[str], str], shown: bool) -> str:
    """One message, of one line or of several."""
    lines = [read("> " if shown else "")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read(". " if shown else ""))
    return "\n".join(lines)


def answer(talk: Conversation, text: str) -> None:
    """Prints the answer as it comes; Ctrl-C stops it."""
    pieces = talk.ask(text)
    if talk.dropped:
        size = talk.llm.max_model_len
        print(f"({talk.dropped} earliest messages dropped: the context holds {size} tokens)", file=sys.stderr)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print("\n(stopped)", file=sys.stderr)
    finally:
        pieces.close()


def command(talk: Conversation, line: str) -> bool:
    """Whether to go on. ValueError for a command that there is not, or one without its file."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name == "quit":
        return False
    if name == "help":
        print(HELP, file=sys.stderr)
    elif name == "reset":
        talk.reset()
        print("(forgotten)", file=sys.stderr)
    elif name in ("save", "load"):
        if not rest:
            raise ValueError(f"/{name} needs the name of a file, as in /{name} talk.json")
        getattr(talk, name)(os.path.expanduser(rest))  # there is no shell that would
        print(f"({len(talk.messages)} messages {'saved to' if name == 'save' else 'from'} {rest})", file=sys.stderr)
    else:
        raise ValueError(f"there is no command /{name}; allowed: /reset, /save FILE, /load FILE, /help, /quit")
    return True


def import_line_editing() -> None:
    """Arrow keys and a history of lines, where Python was built with them."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # which is all that turns it on
