"""Rewrites the tables of README.md from committed rows, so that no number in it is typed by hand.

A table stands between ``<!-- bench:FILE FIELD=VALUE ... -->`` and ``<!-- /bench -->``: the rows of
``benchmarks/FILE.json`` whose fields have those values, e.g.
``<!-- bench:results/cpu schedule=trainable dtype=fp32 -->``. Where a file holds several rows of one
case, the last one counts.

    python benchmarks/tables.py             # rewrites README.md
    python benchmarks/tables.py --check     # status 1 if it is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
MARKED = re.compile(r"(<!-- bench:(\S+)((?: \S+=\S+)*) -->\n).*?(<!-- /bench -->)", re.DOTALL)
CASE = ("op", "schedule", "N", "H", "V", "dtype", "device")

Row = dict[str, Any]


def _show(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _mib(row: Row) -> str:
    size = row["peak_extra_bytes"]
    return _show(None if size is None else size / 2**20, ",.0f")


COLUMNS = {
    "system": lambda row: f"`{row['system']}`",
    "ms forward": lambda row: _show(row["ms_forward"], ",.1f"),
    "ms backward": lambda row: _show(row["ms_backward"], ",.1f"),
    "ms": lambda row: _show(row["ms_total"], ",.1f"),
    "± IQR": lambda row: _show(row["ms_spread"], ",.1f"),
    "over the GEMMs": lambda row: _show(row["floor_ratio"], ".2f") + "x",
    "extra MiB": _mib,
    "nats per 1,024 tokens": lambda row: _show(row["error_nats_per_1024"], ".1e"),
    "gradient error": lambda row: _show(row["relative_gradient_error"], ".1e"),
}


def rows_of(file: str, filters: dict[str, str]) -> list[Row]:
    """The newest row of every case and system in ``benchmarks/FILE.json`` that the filters let
    through."""
    newest: dict[tuple[Any, ...], Row] = {}
    for row in json.loads((HERE / f"{file}.json").read_text()):
        unknown = set(filters) - set(row)
        if unknown:
            raise ValueError(f"{file}: rows have no field {', '.join(sorted(unknown))}")
        if all(str(row[field]) == value for field, value in filters.items()):
            newest[(row["system"], *(row[field] for field in CASE))] = row
    return list(newest.values())


def table(rows: list[Row]) -> str:
    """Markdown: a caption and a table per case. Predictions are called so."""
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[field] for field in CASE if field != "op"), []).append(row)
    blocks = []
    for case, members in cases.items():
        schedule, n, h, v, dtype, device = case
        kind = "measured" if members[0]["measured"] else "predicted, not measured"
        names = dict.fromkeys(f"{r['versions'].get('torch', '')}" for r in members)
        torch = " and ".join(filter(None, names))
        where = f"{device}, torch {torch}" if torch else device
        lines = [
            f"{schedule}: N={n:,}, H={h:,}, V={v:,}, {dtype}; {where}; {kind}",
            "",
            f"| {' | '.join(['op', *COLUMNS])} |",
            f"|{'---|' * (len(COLUMNS) + 1)}",
        ]
        for row in sorted(members, key=lambda r: r["ms_total"] or 0.0):
            cells = [row["op"], *(show(row) for show in COLUMNS.values())]
            lines.append(f"| {' | '.join(cells)} |")
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


def main() -> int:
    """Rewrite, or with ``--check`` compare: 1 if the README is out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    asked = parser.parse_args()
    old = README.read_text()
    new = rewritten(old)
    if asked.check:
        if new != old:
            print("README.md is out of date: python benchmarks/tables.py", file=sys.stderr)
        return int(new != old)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
