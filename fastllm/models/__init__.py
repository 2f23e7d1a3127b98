"""Models: three classes built from blocks, and what reads their weights from files."""

from .weights import load

__all__ = ["load"]
