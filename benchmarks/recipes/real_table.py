"""Finished runs of ``real.py`` as rows of ``results/recipes_real.json`` and as the docs' tables.

    python benchmarks/recipes/real_table.py                # runs/real/*-SEED, newest row counts
    python benchmarks/tables.py                            # the tables anew from committed rows

A row takes the place of an earlier one of its recipe and seed. The tables stand in
``docs/recipes/real-runs.md`` between ``<!-- real:NAME -->`` and ``<!-- /real -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.disk import write_text
from fastpref.rounds.winrate import Estimate, estimate, length_controlled

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "benchmarks" / "results" / "recipes_real.json"
PAGE = ROOT / "docs" / "recipes" / "real-runs.md"
MARKED = re.compile(r"(<!-- real:(\w+) -->\n).*?(<!-- /real -->)", re.DOTALL)
RESAMPLES = 2000

Row = dict[str, Any]


def show(value: Any, form: str = "+.3f") -> str:
    """An estimate with its interval; of an older row's gap, the number alone."""
    return format(Estimate(*value) if isinstance(value, (list, tuple)) else value, form)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    text = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in text)


def by_round(rows: Sequence[Row]) -> str:
    """A line for each round of each run: what its report says."""
    header = [
        *("recipe", "seed", "round", "pairs", "gap, tokens", "gap, characters"),
        *(
            "reward before",
            "reward",
            "win rate",
            "length-controlled",
            "KL from start",
            "characters",
        ),
    ]
    lines = []
    for row in rows:
        for found in row["rounds"]:
            pairs, held_out = found["pairs"], found["held_out"]
            lines.append(
                [
                    row["recipe"],
                    str(row["seed"]),
                    str(found["round"]),
                    f"{pairs['made']} of {pairs['prompts']}",
                    show(pairs["gap_tokens"], "+.1f"),
                    show(pairs["gap_characters"], "+.1f"),
                    f"{held_out['reward_before'][0]:+.3f}",
                    show(held_out["reward"]),
                    show(held_out["win_rate"], ".2f"),
                    show(held_out["lc_win_rate"], ".2f"),
                    show(held_out["kl"]["start"], ".2f"),
                    f"{held_out['characters'][0]:.0f}",
                ]
            )
    return table(header, lines)


def pooled(rows: Sequence[Row]) -> dict[str, Estimate]:
    """The last policy beside the start, over all seeds of one recipe.

    A draw of the bootstrap is one of held-out prompts; a prompt brings its answers of every seed.
    """
    rewards = np.array([row["rewards"] for row in rows]).transpose(1, 2, 0)  # round, prompt, seed
    lengths = np.array([row["characters"] for row in rows], dtype=float).transpose(1, 2, 0)
    change = rewards[-1] - rewards[0]
    wins = 0.5 + 0.5 * np.sign(change)
    longer = lengths[-1] - lengths[0]

    def over_prompts(*values: Any, statistic: Any = np.mean) -> Estimate:
        def of_draw(draw: Any) -> float:
            drawn = draw.astype(int)
            return float(statistic(*(value[drawn].ravel() for value in values)))

        return estimate(of_draw, range(len(change)), resamples=RESAMPLES)

    return {
        "reward, start": over_prompts(rewards[0]),
        "reward, end": over_prompts(rewards[-1]),
        "change": over_prompts(change),
        "win rate against the start": over_prompts(wins),
        "length-controlled": over_prompts(wins, longer, statistic=length_controlled),
        "characters, change": over_prompts(longer),
    }


def summary(rows: Sequence[Row]) -> str:
    """A line for each recipe, over its seeds."""
    lines = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == name]
        found = pooled(own)
        minutes = [row["seconds"] / 60 for row in own]
        forms = {"win rate against the start": ".3f", "length-controlled": ".3f"}
        shown = [show(v, forms.get(k, "+.1f" if "char" in k else "+.3f")) for k, v in found.items()]
        took = f"{min(minutes):.1f} to {max(minutes):.1f}"
        lines.append([name, str(len(own)), *shown, took])
        header = ["recipe", "seeds", *found, "minutes a run"]
    return table(header, lines)


TABLES = {"summary": summary, "rounds": by_round}


def rewritten(text: str) -> str:
    """The page with the tables of the committed rows."""
    rows = json.loads(ROWS.read_text())
    return MARKED.sub(lambda m: f"{m[1]}\n{TABLES[m[2]](rows)}\n\n{m[3]}", text)


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The rows, a recipe and seed once: the newer."""
    found = {(row["recipe"], row["seed"]): row for row in [*old, *new]}
    return [found[key] for key in sorted(found, key=lambda key: (key[0] != "ilr_dpo", *key))]


def main(argv: Sequence[str]) -> int:
    """Writes rows and tables; 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="default: all in runs/real")
    given = parser.parse_args(argv)
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else []
    folders = given.runs or sorted((ROOT / "runs" / "real").glob("*-*"))
    new = [json.loads(path.read_text()) for f in folders if (path := f / "row.json").exists()]
    if any(row["dry"] for row in new):
        raise ValueError("a dry run is no result: its prompts are not the held-out ones")
    rows = merged(rows, new)
    write_text(ROWS, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    write_text(PAGE, rewritten(PAGE.read_text(encoding="utf-8")))
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
