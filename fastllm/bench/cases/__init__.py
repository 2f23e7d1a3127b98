"""One file an op; `suites()` finds them all."""

import importlib
import pkgutil

from ..case import Suite


def suites() -> dict[str, Suite]:
    """Op name -> suite, in alphabetical order."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").SUITE for name in names}
