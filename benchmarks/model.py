"""Writes the predicted rows of ``benchmarks/predictions/``: what the op should take on GPUs.

The model is ``fastpref/costs.py``: per launch the larger of arithmetic time and memory time, at the
part of the stated peaks that is expected, and a launch gap; launches do not overlap. Nothing here
is measured, and nothing here is written to ``benchmarks/results``.

    python benchmarks/model.py            # writes benchmarks/predictions/MACHINE.json
    python benchmarks/model.py --table    # prints the ratios to the floor instead
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastpref.bench import FIELDS
from fastpref.costs import HEADS, MACHINES, SCHEDULES, Machine, plan_of, predict, scratch_bytes

HERE = Path(__file__).parent
ROWS = (1024, 4096, 8192, 32768)
BUDGETS = {"default budget": None, "budget holds all of E": 1 << 40}
"""A trainable head that keeps E is 6 N*H*V; with the default budget part of E is recomputed."""
ITEMSIZE = 2


def predicted(machine: Machine) -> Iterator[dict[str, Any]]:
    """Rows for every head, number of rows, schedule and budget, in bf16."""
    for head in HEADS.values():
        for n in ROWS:
            for schedule in SCHEDULES:
                for label, budget in BUDGETS.items():
                    if budget is not None and schedule != "trainable":
                        continue
                    t = predict(machine, schedule, n, head, ITEMSIZE, budget)
                    p = plan_of(schedule, n, head, ITEMSIZE, "cuda", budget)
                    working, kept = scratch_bytes(p, n, head, ITEMSIZE, "cuda")
                    peak = working + (kept if schedule == "trainable" else 0)
                    values = (
                        *("fastpref", "logprobs", schedule, n, head.hidden_size, head.vocab_size),
                        *("bf16", machine.name, False),
                        *(round(t.forward, 3), round(t.backward, 3), round(t.total, 3), None),
                        *(round(t.floor_ratio, 3), peak, None, None, None),
                        *({"model": f"fastpref/costs.py, {label}"}, None),
                        "python benchmarks/model.py",
                    )
                    yield dict(zip(FIELDS, values, strict=True))


def main() -> None:
    """Write the predictions, or print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print ratios at 8,192 rows; no files")
    asked = parser.parse_args()
    for key, machine in MACHINES.items():
        rows = list(predicted(machine))
        if asked.table:
            _print(machine, rows)
            continue
        path = HERE / "predictions" / f"{key}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        print(f"{path}: {len(rows)} rows")


def _print(machine: Machine, rows: list[dict[str, Any]]) -> None:
    print(f"{machine.name}, bf16, N=8192: total ms, and ratio to the GEMMs of the schedule")
    for row in (row for row in rows if row["N"] == 8192):
        label = row["versions"]["model"].rpartition(", ")[2]
        print(
            f"  H={row['H']:<5} V={row['V']:<7} {row['schedule']:10} {row['ms_total']:8.2f} ms  "
            f"{row['floor_ratio']:.3f}x  {row['peak_extra_bytes'] / 2**20:6.0f} MiB  {label}"
        )


if __name__ == "__main__":
    main()
