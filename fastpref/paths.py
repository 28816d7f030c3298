"""Names of models and datasets: on disk, or on the hub."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection
from pathlib import Path

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def hub_id(name: str | None) -> str | None:
    """The name, if it can be an id on the hub and is nothing on disk; else None."""
    here = not name or Path(name).expanduser().exists()
    return name if not here and _HUB_ID.fullmatch(name or "") else None


def located(name: str | os.PathLike[str], suffixes: Collection[str] = ()) -> str:
    """What a name stands for: the path of what is on disk, or else an id on the hub, as it is.

    Args:
        name: Path, ``~`` expanded, or id.
        suffixes: Ends of file names, in lower case; an id has none of them.

    Raises:
        FileNotFoundError: Nothing on disk has this name, and it is no id.
    """
    text, path = os.fspath(name), Path(name).expanduser()
    if path.exists():
        return str(path)
    if _HUB_ID.fullmatch(text) and path.suffix.lower() not in suffixes:
        return text
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f" Did you mean {path.parent / near[0]}?" if near else ""
    raise FileNotFoundError(f"{text}: no such file or directory.{hint}")
