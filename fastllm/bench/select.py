"""What to measure: from the words of a command line to jobs, with an error that names what there is."""

import difflib
from collections.abc import Iterable, Sequence

import torch

from .case import Suite
from .cases import suites
from .measure import FORWARD, TRAIN, Job

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPES = ("float32", "bfloat16")


def nearest(word: str, known: Iterable[str]) -> str:
    """ "did you mean a or b?", or the whole list where nothing is near."""
    known = list(known)
    close = (
        difflib.get_close_matches(word, known, n=3, cutoff=0.5) or [k for k in known if word.lower() in k.lower()][:3]
    )
    return f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(known)}"


def pick_ops(names: Sequence[str]) -> list[Suite]:
    known = suites()
    for name in names:
        if name not in known:
            raise ValueError(f"no op {name!r} to measure; {nearest(name, known)}")
    return [known[name] for name in dict.fromkeys(names)] if names else list(known.values())


def pick_dtypes(names: Sequence[str]) -> list[torch.dtype]:
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"no dtype {name!r}; allowed: {', '.join(DTYPES)}")
    return [DTYPES[name] for name in dict.fromkeys(names or DEFAULT_DTYPES)]


def pick_device(device: str) -> str:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"no device {device!r}; allowed: cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device that torch can use; `fastllm info` says why")
    return device


def select(
    ops: Sequence[str] = (), device: str = "cpu", dtypes: Sequence[str] = (), shape: str = "", backward: bool = True
) -> list[Job]:
    """Every job that the filters leave, in the order op, case, dtype, direction."""
    pick_device(device)
    chosen, types = pick_ops(ops), pick_dtypes(dtypes)
    known = [(suite, case) for suite in chosen for case in ((device == "cuda" and suite.gpu) or suite.benchmark)]
    cases = [(suite, case) for suite, case in known if shape.lower() in case.label.lower()]
    if not cases:
        labels = [case.label for _, case in known]
        raise ValueError(
            f"no case of {', '.join(s.op for s in chosen)} has {shape!r} in its label; {nearest(shape, labels)}"
        )
    jobs = [
        Job(suite, case, dtype, direction, device)
        for suite, case in cases
        for dtype in types
        if dtype in suite.dtypes
        for direction in ((FORWARD, TRAIN) if backward and suite.gradients else (FORWARD,))
    ]
    if not jobs:
        taken = {str(d).removeprefix("torch.") for suite in chosen for d in suite.dtypes}
        raise ValueError(
            f"{', '.join(s.op for s in chosen)} takes none of the dtypes asked for, only {', '.join(sorted(taken))}"
        )
    return jobs
