"""What a child of os.fork() lacks: all threads but the one that forked.

torch's pool is gone with them, and torch waits for it for ever: in a child one thread must do. Requests that other threads were
serving cannot go on either. So a child may use what its parent loaded, if nobody was using it at the fork.
"""

import os
import warnings

import torch

_forked = False


def _note() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note)


def settle() -> None:
    """In a child: one thread. It warns where that changes anything."""
    if _forked and torch.get_num_threads() > 1:
        warnings.warn(
            "this process was forked, and the threads of torch stayed in its parent: it runs on one thread. For more, start "
            "it with multiprocessing's 'spawn' and load the model there",
            stacklevel=3,
        )
        torch.set_num_threads(1)


class Home:
    """The process that an object is used in."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def left(self) -> bool:
        """Whether this is a child of that process."""
        return self._process != os.getpid()

    def move(self, in_use: bool) -> None:
        """RuntimeError where somebody was using it at the fork."""
        if in_use:
            raise RuntimeError(
                f"process {os.getpid()} was forked from {self._process} while the LLM had requests there, which go on there; "
                "load the model in the child, or fork while no request runs"
            )
        settle()
        self._process = os.getpid()
