"""Text to tokens and back, chat templates, batches and the curation of training data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class HasMetadata(Protocol):
    """A file with metadata in the form of a GGUF."""

    @property
    def path(self) -> Path: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
