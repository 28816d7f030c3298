"""Rewrites the table by which ``backend="auto"`` chooses on a GPU, from the rows measured there.

A backend whose result was wrong in any case is left out; the others stand in the order of the
geometric mean of their times over the cases that all of them ran: the op, forward and backward,
every schedule and shape of a device and dtype.

    python benchmarks/auto.py             # rewrites fastpref/backends/measured.json
    python benchmarks/auto.py --check     # status 1 if it is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import geometric_mean
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "fastpref" / "backends" / "measured.json"
BACKENDS = ("triton", "cuda", "torch")

Row = dict[str, Any]


def choices(rows: list[Row]) -> list[Row]:
    """Per GPU and dtype its backends, fastest first: ``device, dtype, order, ms, cases, commits``.

    Args:
        rows: As ``fastpref bench`` writes them. Where several are of one case, the last one counts.
            Rows of a CPU, of peers and of other ops are passed over.
    """
    times: dict[tuple[str, str], dict[str, dict[tuple[Any, ...], Row]]] = {}
    for row in rows:
        own = re.fullmatch(r"fastpref\[(\w+)\]", row["system"])
        if own and own[1] in BACKENDS and row["op"] == "logprobs" and "cuda" in row["versions"]:
            case = tuple(row[field] for field in ("schedule", "N", "H", "V"))
            machine = times.setdefault((row["device"], row["dtype"]), {})
            machine.setdefault(own[1], {})[case] = row
    made = []
    for (device, dtype), found in sorted(times.items()):
        right = {
            name: cases
            for name, cases in found.items()
            if all(row["measured"] and row["ms_total"] for row in cases.values())
        }
        shared = set.intersection(*map(set, right.values())) if right else set()
        if not shared:
            continue
        mean = {
            name: geometric_mean(cases[case]["ms_total"] for case in shared)
            for name, cases in right.items()
        }
        order = sorted(mean, key=mean.__getitem__)
        commits = {cases[case]["commit"] for cases in right.values() for case in shared}
        made.append(
            {
                "device": device,
                "dtype": dtype,
                "order": order,
                "ms": {name: round(mean[name], 4) for name in order},
                "cases": len(shared),
                "commits": sorted(commits),
            }
        )
    return made


def main() -> int:
    """Write the table, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    results = ROOT / "benchmarks" / "results" / "gpu.json"
    rows = json.loads(results.read_text()) if results.exists() else []
    made = choices(rows)
    text = "[\n" + ",\n".join(json.dumps(choice) for choice in made) + "\n]\n" if made else "[]\n"
    if check:
        return int(TABLE.read_text() != text)
    TABLE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
