"""``fastpref losses``: ``docs/losses.md`` in the terminal, the table or the page of one loss."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastpref.losses.docs import page, table


def main(argv: Sequence[str]) -> int:
    """Prints the table of all losses, or all that is known of one; 0."""
    parser = argparse.ArgumentParser(prog="fastpref losses", description="List the losses.")
    parser.add_argument("name", nargs="?", help="a loss or one of its aliases, to describe in full")
    name = parser.parse_args(argv).name
    if name:
        print(page(name))
    else:
        print(table())
        print("fastpref losses NAME describes one; fastpref train --loss NAME uses it.")
    return 0
