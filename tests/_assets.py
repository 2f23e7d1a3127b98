"""Real models: the default one must be there, as the main job is nothing without it; a test of another is skipped by name."""

from pathlib import Path

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
