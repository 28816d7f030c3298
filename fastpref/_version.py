"""The version: from the installed metadata, or ``pyproject.toml`` in a checkout not installed."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("fastpref")
except PackageNotFoundError:
    _project = Path(__file__).parents[1] / "pyproject.toml"
    __version__ = re.findall(r'^version = "(.+)"', _project.read_text(), re.MULTILINE)[0]
