"""Rewrites the tables of README.md, docs/plan.md and, by their own modules in ``recipes/``, of
docs/recipes from committed rows, so that no number in them is typed by hand.

A table stands between ``<!-- bench:FILE FIELD=VALUE ... -->`` and ``<!-- /bench -->``: the rows of
``benchmarks/FILE.json`` whose fields have those values, e.g.
``<!-- bench:results/cpu schedule=trainable dtype=fp32 -->``. Where a file holds several rows of one
case, the last one counts.

    python benchmarks/tables.py             # rewrites them
    python benchmarks/tables.py --check     # status 1 if one is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE.parent / "docs" / "plan.md")
MARKED = re.compile(r"(<!-- bench:(\S+)((?: \S+=\S+)*) -->\n).*?(<!-- /bench -->)", re.DOTALL)
APART = re.compile(r" --(out|commit) \S+")
"""What of a command says where its rows go, and does not change them."""

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


def _show(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _mib(row: Row) -> str:
    size = row["peak_extra_bytes"]
    return _show(None if size is None else size / 2**20, ",.0f")


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}x"


def _reference_pass(row: Row) -> str:
    seconds = row.get("reference_pass_seconds")
    return "–" if seconds is None else f"{seconds:.1f} s, {row['reference_pass_pairs']} pairs"


def _op_caption(row: Row) -> str:
    shape = f"N={row['N']:,}, H={row['H']:,}, V={row['V']:,}"
    return f"{row['schedule']}: {shape}, {row['dtype']}; {row['device']}"


def _step_caption(row: Row) -> str:
    return f"{row['mix']}: {row['model']}; {row['pairs_per_step']} pairs a step; {row['device']}"


class Kind(NamedTuple):
    """What one sort of row looks like as a table."""

    case: tuple[str, ...]
    """Fields that rows of one table share."""
    caption: Callable[[Row], str]
    sorted_by: str
    columns: Columns


OP = Kind(
    ("schedule", "N", "H", "V", "dtype", "device"),
    _op_caption,
    "ms_total",
    {
        "op": lambda row: row["op"],
        "system": lambda row: f"`{row['system']}`",
        "ms forward": lambda row: _show(row["ms_forward"], ",.1f"),
        "ms backward": lambda row: _show(row["ms_backward"], ",.1f"),
        "ms": lambda row: _show(row["ms_total"], ",.1f"),
        "± IQR": lambda row: _show(row["ms_spread"], ",.1f"),
        "over the GEMMs": lambda row: _times(row["floor_ratio"]),
        "extra MiB": _mib,
        "nats per 1,024 tokens": lambda row: _show(row["error_nats_per_1024"], ".1e"),
        "gradient error": lambda row: _show(row["relative_gradient_error"], ".1e"),
    },
)
STEP = Kind(
    ("mix", "model", "pairs_per_step", "device"),
    _step_caption,
    "seconds_per_step",
    {
        "system": lambda row: f"`{row['system']}`",
        "s a step": lambda row: _show(row["seconds_per_step"], ".2f"),
        "slowest - fastest": lambda row: _show(row["seconds_spread"], ".2f"),
        "pairs/s": lambda row: _show(row["pairs_per_second"], ".2f"),
        "over TRL": lambda row: _times(row.get("pairs_per_second_over_trl")),
        "reference, once": _reference_pass,
        "peak GB": lambda row: _show(row["peak_rss_bytes"] / 1e9, ".2f"),
        "peak over TRL": lambda row: _times(row.get("peak_rss_over_trl")),
        "tokens through the model": lambda row: _show(row["backbone_tokens_per_step"], ",d"),
        "through the head": lambda row: _show(row.get("head_rows_per_step"), ",d"),
        "loss, off TRL's by": lambda row: _show(row.get("loss_difference"), ".0e"),
    },
)


PLAN = Kind(
    ("device", "worked_out_on"),
    lambda row: (
        f"{'the counting was worked out on these' if row['worked_out_on'] else 'looked at later'}; "
        f"{row['device']}"
    ),
    "peak_rss_bytes",
    {
        "run": lambda row: row["system"],
        "model": lambda row: row["model"],
        "prompt + response": lambda row: " + ".join(map(str, row["tokens"])),
        "pairs": lambda row: str(row["pairs_per_micro_batch"]),
        "predicted MiB": lambda row: _show(row["predicted_bytes"] / 2**20, ",.0f"),
        "measured MiB": lambda row: _show(row["peak_rss_bytes"] / 2**20, ",.0f"),
        "off by": lambda row: _show(row["error"], "+.1%"),
    },
)


def kind_of(row: Row) -> Kind:
    """How a row is shown: by the fields it has."""
    if "predicted_bytes" in row:
        return PLAN
    return STEP if "seconds_per_step" in row else OP


def rows_of(file: str, filters: dict[str, str]) -> list[Row]:
    """The newest row of every case and system in ``benchmarks/FILE.json`` that the filters let
    through."""
    newest: dict[tuple[Any, ...], Row] = {}
    for row in json.loads((HERE / f"{file}.json").read_text()):
        unknown = set(filters) - set(row)
        if unknown:
            raise ValueError(f"{file}: rows have no field {', '.join(sorted(unknown))}")
        if all(str(row[field]) == value for field, value in filters.items()):
            key = (row["system"], row.get("op"), *(row[field] for field in kind_of(row).case))
            newest[key] = row
    return list(newest.values())


def table(rows: list[Row]) -> str:
    """Markdown: a caption, the command and a table per case. Predictions are called so."""
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[field] for field in kind_of(row).case), []).append(row)
    blocks = []
    for members in cases.values():
        first = members[0]
        kind = kind_of(first)
        status = "measured" if first["measured"] else "predicted, not measured"
        names = dict.fromkeys(f"{r['versions'].get('torch', '')}" for r in members)
        torch = " and ".join(filter(None, names))
        commands = dict.fromkeys(APART.sub("", r["command"]) for r in members)
        lines = [
            *textwrap.wrap(
                f"{kind.caption(first)}{f', torch {torch}' if torch else ''}; {status} by", 124
            ),
            "",
            *(f"    {command}" for command in commands),
            "",
            f"| {' | '.join(kind.columns)} |",
            f"|{'---|' * len(kind.columns)}",
        ]
        for row in sorted(members, key=lambda r: r[kind.sorted_by] or 0.0):
            lines.append(f"| {' | '.join(show(row) for show in kind.columns.values())} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def rewritten(text: str) -> str:
    """``text`` with every marked table made anew."""

    def fill(match: re.Match[str]) -> str:
        filters = dict(item.split("=", 1) for item in match[3].split())
        rows = rows_of(match[2], filters)
        if not rows:
            raise ValueError(f"no rows for <!-- bench:{match[2]}{match[3]} -->")
        return f"{match[1]}\n{table(rows)}\n{match[4]}"

    return MARKED.sub(fill, text)


def pages() -> list[tuple[Path, Callable[[str], str]]]:
    """Every page with tables, and what makes its text anew; those of recipes are made there."""
    sys.path.insert(0, str(HERE / "recipes"))
    import real_table
    import toy

    others = [(module.PAGE, module.rewritten) for module in (toy, real_table)]
    return [*((page, rewritten) for page in PAGES), *others]


def main() -> int:
    """Rewrite, or with ``--check`` compare: 1 if a page is out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    asked = parser.parse_args()
    stale = 0
    for page, made in pages():
        old = page.read_text()
        new = made(old)
        if not asked.check:
            page.write_text(new)
        elif new != old:
            print(f"{page.name} is out of date: python benchmarks/tables.py", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
