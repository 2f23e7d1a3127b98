"""Models: three classes built from blocks, and what reads their weights from files and writes them."""

from .weights import load, save

__all__ = ["load", "save"]
