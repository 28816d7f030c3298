"""The op inside other people's trainers. Each module here needs the library it is named after."""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = ("trl",)


def __getattr__(name: str) -> ModuleType:
    """The integration ``name``, imported on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: one of {_MODULES}")
    return importlib.import_module(f"{__name__}.{name}")
