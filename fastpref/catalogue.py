"""``fastpref losses``: the registry of losses, as a list or one by one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastpref import losses
from fastpref.losses.core import KINDS


def main(argv: Sequence[str]) -> int:
    """Prints the losses, or one of them in full; 0."""
    parser = argparse.ArgumentParser(prog="fastpref losses", description="List the losses.")
    parser.add_argument("name", nargs="?", help="a loss or one of its aliases, to describe in full")
    name = parser.parse_args(argv).name
    print(describe(name) if name else overview())
    return 0


def overview() -> str:
    """One line a loss, by the kind of data it takes: name, aliases, formula."""
    lines = []
    for kind in KINDS:
        found = [losses.get(name).entry for name in losses.names(kind)]
        if not found:
            continue
        lines.append(f"{kind} losses")
        width = max(len(entry.name) for entry in found)
        for entry in found:
            also = f"  (also {', '.join(entry.aliases)})" if entry.aliases else ""
            lines.append(f"  {entry.name:<{width}}  {entry.formula}{also}")
        lines.append("")
    return "\n".join(
        [*lines, "fastpref losses NAME describes one; fastpref train --loss NAME uses it."]
    )


def describe(name: str) -> str:
    """Everything the registry knows of a loss.

    Raises:
        ValueError: no loss has that name.
    """
    loss = losses.get(name)
    entry = loss.entry
    facts = {
        "also called": ", ".join(entry.aliases),
        "takes": f"{entry.kind} data",
        "when": entry.when,
        "also in": entry.found_in,
    }
    lines = [f"  {label}: {fact}" for label, fact in facts.items() if fact]
    return "\n".join([entry.name, *lines, "", loss.__doc__ or ""]).rstrip()
