"""Functions by name, for options that a command line or YAML can hold."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any


def find(function: Any) -> Callable[..., Any]:
    """The function that ``"module:name"`` or ``"file.py:name"`` names; a function as it is.

    Raises:
        ValueError: there is no such module, file or name.
    """
    if callable(function):
        return function  # type: ignore[no-any-return]
    where, _, name = str(function).rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        return getattr(module, name)  # type: ignore[no-any-return]
    except (ImportError, FileNotFoundError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{function!r} names no function ({error}): write 'module:name' or 'file.py:name'"
        ) from error
