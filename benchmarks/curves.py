"""Cost curves: time and peak memory against N and against V, as rows and as a picture.

    python benchmarks/curves.py                                # both curves; hours on a CPU
    python benchmarks/curves.py --along V --sizes 1048576      # one point
    python benchmarks/curves.py --along N --sizes 65536 --systems trl
    python benchmarks/curves.py --plot                         # draws the rows there are

A trainable head. Along N the vocabulary is the head's, along V the number of rows is fixed. Rows
are appended to ``benchmarks/results/curves-DEVICE.json``; the picture is
``docs/curves-DEVICE.png``. Where a point was measured twice, the newest row counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastpref import bench
from fastpref.case import Case, System
from fastpref.costs import HEADS, Head
from fastpref.measure import Problem
from fastpref.peers import systems
from fastpref.provenance import commit

ROOT = Path(__file__).parents[1]
SYSTEMS = ("gemms", "fastpref[cpp]", "fastpref[triton]", "fastpref[cuda]", "torch", "trl")
SIZES = {"N": [1024 << i for i in range(7)], "V": [32_768 << i for i in range(6)]}
ROWS = {"cpu": 512, "cuda": 8192}
"""N of the curve along V."""
COPIES = 3
"""fp32 copies of the logits that plain PyTorch holds at its peak, at most."""


def problems(along: str, sizes: list[int], head: Head, device: str) -> list[Problem]:
    """The points of a curve."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = {
        "N": [(size, head) for size in sizes],
        "V": [(ROWS[device], replace(head, vocab_size=size)) for size in sizes],
    }
    return [Problem(n, h, dtype, device, "trainable") for n, h in shapes[along]]


def within(memory: int, system: System) -> System:
    """The system, which does not start where materialised logits would take more than ``memory``
    bytes; the table then says so."""
    if system.name != "torch":
        return system

    def why_not(case: Case) -> str:
        needed = COPIES * 4 * case.targets.numel() * case.weight.shape[0]
        if needed > memory:
            return f"needs up to {needed / 1e9:.3g} GB for logits; {memory / 1e9:.3g} are allowed"
        return system.why_not(case)

    return replace(system, why_not=why_not)


def measure(
    path: Path, points: list[Problem], chosen: list[System], asked: argparse.Namespace
) -> None:
    """Append the rows of every system that runs, point by point."""
    command = shlex.join(["python", *sys.argv])
    clock = "device" if points[0].device == "cuda" else "wall"
    for problem in points:
        entries = bench.weigh(problem, bench.run(problem, chosen, asked.rounds, clock), [])
        print(bench.render(problem, entries, clock), flush=True)
        bench.append(path, bench.rows(problem, entries, clock, asked.commit, command))


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Four panels: time and memory, against N and against V."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["ms_total"] is not None]
    vocab = max({r["V"] for r in rows}, key=lambda v: len({r["N"] for r in rows if r["V"] == v}))
    at = max({r["N"] for r in rows}, key=lambda n: len({r["V"] for r in rows if r["N"] == n}))
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r["system"] for r in rows))}
    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for column, (axis, fixed, value) in enumerate((("N", "V", vocab), ("V", "N", at))):
        chosen = [row for row in rows if row[fixed] == value]
        for panel, field, unit, label in (
            (panels[0][column], "ms_total", 1.0, "forward and backward, ms"),
            (panels[1][column], "peak_extra_bytes", 2.0**20, "peak extra memory, MiB"),
        ):
            for name, colour in colours.items():
                mine = {r[axis]: r[field] for r in chosen if r["system"] == name and r[field]}
                if mine:
                    x, y = zip(*sorted(mine.items()), strict=True)
                    panel.plot(x, [value / unit for value in y], "o-", color=colour, label=name)
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
            ticks = sorted({row[axis] for row in chosen})
            panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize="small")
            panel.minorticks_off()
            panel.set_title(f"{fixed} = {value:,}", fontsize="medium")
            panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize="small")
    first = rows[0]
    figure.suptitle(f"trainable head, H = {first['H']:,}, {first['dtype']}, {first['device']}")
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Measure and draw."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--along", choices=SIZES, nargs="+", default=[*SIZES])
    parser.add_argument("--sizes", type=int, nargs="+", help="points of each curve (default: all)")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=SYSTEMS)
    parser.add_argument("--plot", action="store_true", help="draw existing rows only")
    parser.add_argument("--head", choices=HEADS, default="smollm2-135m")
    parser.add_argument("--device", choices=ROWS, default=device)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory",
        type=float,
        default=torch.cuda.mem_get_info()[1] / 1e9 if device == "cuda" else ram / 1.5e9,
        metavar="GB",
        help="what plain PyTorch's logits may take (default: two thirds of the memory)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the picture is beside it")
    parser.add_argument("--commit", default=commit(), help="recorded in the rows")
    asked = parser.parse_args()
    name = f"curves-{asked.device}"
    path = asked.out or ROOT / "benchmarks" / "results" / f"{name}.json"
    picture = asked.out.with_suffix(".png") if asked.out else ROOT / "docs" / f"{name}.png"
    named = [s for s in systems() if s.name in asked.systems and s.op in ("gemms", "logprobs")]
    chosen = [within(int(1e9 * asked.memory), system) for system in named]
    for along in [] if asked.plot else asked.along:
        points = problems(along, asked.sizes or SIZES[along], HEADS[asked.head], asked.device)
        measure(path, points, chosen, asked)
    draw(json.loads(path.read_text()), picture)
    print(picture)


if __name__ == "__main__":
    main()
