"""``python -m fastpref`` is the ``fastpref`` command."""

from __future__ import annotations

import sys

from fastpref.cli import main

if __name__ == "__main__":
    sys.exit(main())
