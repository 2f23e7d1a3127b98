"""Real models and data: the default model must be there, as the main job is nothing without it; a test of another asset is
skipped by name."""

from pathlib import Path

import corpora
import pytest

from fastllm import hub

DEFAULT = "smollm2-135m"


def asset(name: str = DEFAULT) -> Path:
    try:
        return hub.resolve(name, progress=False)
    except hub.HubError as error:
        if name == DEFAULT:
            raise
        pytest.skip(f"asset {name}: {error}")


def packaged(name: str) -> Path:
    """The folder of a data set, a name of benchmarks/corpora.py."""
    try:
        return corpora.packaged(name)
    except hub.HubError as error:
        pytest.skip(f"asset {name}: {error}")
