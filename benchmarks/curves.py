"""Cost curves: time and peak memory against N and against V, as rows and as a picture.

    python benchmarks/curves.py             # what a CPU does in minutes
    python benchmarks/curves.py --full      # N to 64k and V to 1M, for a GPU
    python benchmarks/curves.py --plot      # draw the rows there are; measures nothing

Rows are appended to ``benchmarks/results/curves-DEVICE.json``; the picture is the ``.png`` beside
it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastpref import bench
from fastpref.costs import HEADS, Head
from fastpref.measure import Problem
from fastpref.peers import systems

RESULTS = Path(__file__).parent / "results"
SYSTEMS = ("gemms", "fastpref[cpp]", "fastpref[triton]", "fastpref[cuda]", "torch", "trl")
SMALL = {"N": (128, 256, 512, 1024, 2048), "V": (8_192, 16_384, 32_768, 65_536, 131_072), "at": 256}
FULL = {
    "N": tuple(1024 << i for i in range(7)),
    "V": tuple(32_768 << i for i in range(6)),
    "at": 8192,
}


def problems(sizes: dict[str, Any], head: Head, device: str) -> list[Problem]:
    """The cases of both curves: a trainable head, N varied at the head's V, V varied at N = at."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    along_n = [(n, head.vocab_size) for n in sizes["N"]]
    along_v = [(sizes["at"], v) for v in sizes["V"]]
    return [
        Problem(n, Head(head.hidden_size, v), dtype, device, "trainable")
        for n, v in dict.fromkeys(along_n + along_v)
    ]


def measure(path: Path, sizes: dict[str, Any], head: Head, device: str, rounds: int) -> None:
    """Append the rows of every case that runs."""
    chosen = [s for s in systems() if s.name in SYSTEMS and s.op in ("gemms", "logprobs")]
    command = " ".join(["python", *sys.argv])
    clock = "device" if device == "cuda" else "wall"
    for problem in problems(sizes, head, device):
        entries = bench.weigh(problem, bench.run(problem, chosen, rounds, clock), [])
        print(bench.render(problem, entries, clock), flush=True)
        bench.append(path, bench.rows(problem, entries, clock, bench.commit(), command))


def draw(path: Path) -> None:
    """Four panels: time and memory, against N and against V."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in json.loads(path.read_text()) if row["ms_total"] is not None]
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
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="sizes for a GPU")
    parser.add_argument("--plot", action="store_true", help="draw existing rows only")
    parser.add_argument("--head", choices=HEADS, default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="the JSON file")
    asked = parser.parse_args()
    path = asked.out or RESULTS / f"curves-{asked.device}.json"
    if not asked.plot:
        sizes = FULL if asked.full else SMALL
        measure(path, sizes, HEADS[asked.head], asked.device, asked.rounds)
    draw(path)
    print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
