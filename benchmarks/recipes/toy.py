"""The recipes' claims at toy scale: every expectation as a measured row, whatever its sign.

    python benchmarks/recipes/toy.py                    # all of them, on two cores
    python benchmarks/recipes/toy.py --only lr_dpo --seeds 8
    python benchmarks/tables.py                         # the page, from the rows there are

Rows go to ``benchmarks/results/recipes.json``, one an experiment and seed; the table of
``docs/recipes/experiments.md`` is made of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import experiments  # noqa: F401 (registers its experiments)
import iterated  # noqa: F401 (as well)
import torch
from claims import EXPERIMENTS

from fastpref.disk import write_text
from fastpref.provenance import commit, device_name, versions
from fastpref.rounds.winrate import Estimate, mean

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "recipes.json"
PAGE = ROOT / "docs" / "recipes" / "experiments.md"
BEGIN, END = "<!-- table: toy.py -->\n", "<!-- end -->\n"

Row = dict[str, Any]


def measure(task: tuple[str, int, str]) -> Row:
    """The row of an experiment, a seed and the commit it is noted with; on one thread."""
    name, seed, made_at = task
    torch.set_num_threads(1)
    started = time.perf_counter()
    numbers = EXPERIMENTS[name].run(seed)
    return {
        "experiment": name,
        "seed": seed,
        "numbers": {key: float(f"{value:.6g}") for key, value in numbers.items()},
        "seconds": round(time.perf_counter() - started, 2),
        "device": device_name("wall"),
        "measured": True,
        "versions": versions("cpu"),
        "commit": made_at,
        "command": shlex.join(["python", *sys.argv]),
    }


def read(path: Path) -> list[Row]:
    """The rows there are."""
    return json.loads(path.read_text()) if path.exists() else []


def keep(path: Path, row: Row) -> None:
    """Put a row into the file, in the place of an older one of its experiment and seed."""
    rows = {(r["experiment"], r["seed"]): r for r in [*read(path), row]}
    names = list(EXPERIMENTS)
    ordered = sorted(rows.values(), key=lambda r: (names.index(r["experiment"]), r["seed"]))
    write_text(path, "[\n" + ",\n".join(map(json.dumps, ordered)) + "\n]\n")


def verdict(found: Estimate) -> str:
    """What an interval says of a claim that its number is above 0."""
    if found.low is None or found.high is None:
        return "not clear"
    return "yes" if found.low > 0 else "no" if found.high < 0 else "not clear"


def table(rows: list[Row]) -> str:
    """Every claim with its mean, its interval and whether it came out, as Markdown."""
    lines = ["| experiment | expected | seeds | by how much | came out |", "|---|---|---|---|---|"]
    for name, experiment in EXPERIMENTS.items():
        own = [row["numbers"] for row in rows if row["experiment"] == name]
        for claim in experiment.claims if own else ():
            found = mean([claim.advantage(numbers) for numbers in own])
            cells = (f"`{name}`", claim.text, str(len(own)), f"{found:.3g}", verdict(found))
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| experiment | mean of each number over the seeds |", "|---|---|"]
    for name in EXPERIMENTS:
        own = [row["numbers"] for row in rows if row["experiment"] == name]
        if own:
            means = {key: sum(n[key] for n in own) / len(own) for key in own[0]}
            listed = "; ".join(f"{key} {value:.3g}" for key, value in means.items())
            lines.append(f"| `{name}` | {listed} |")
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    total = sum(row["seconds"] for row in rows)
    lines += ["", f"The seconds of the {len(rows)} rows sum to {total:.0f} ({devices})."]
    return "\n".join(lines) + "\n"


def page(text: str, rows: list[Row]) -> str:
    """The page with the table of these rows."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table(rows) + END + rest.split(END)[1]


def rewritten(text: str) -> str:
    """The page with the table of the committed rows."""
    return page(text, read(RESULTS))


def main() -> None:
    """Run experiments, keep their rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 (default 5)")
    parser.add_argument("--processes", type=int, default=2, help="at a time (default 2)")
    parser.add_argument("--commit", help="recorded in the rows (default: asked from git)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    started, made_at = time.perf_counter(), options.commit or commit()
    tasks = [(name, seed, made_at) for name in options.only for seed in range(options.seeds)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for row in pool.imap_unordered(measure, tasks):
            keep(options.out, row)
            print(f"{row['experiment']}, seed {row['seed']}: {row['seconds']} s", flush=True)
    print(f"{time.perf_counter() - started:.0f} s in all\n")
    print(table([row for row in read(options.out) if row["experiment"] in options.only]))


if __name__ == "__main__":
    main()
