"""What a sweep over the weights of several objectives found, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastpref.disk import write_text
from fastpref.plots import save
from fastpref.rounds.run import Row, write_jsonl
from fastpref.rounds.winrate import Estimate

ROWS, TABLE, PICTURE = "front.jsonl", "front.md", "front.png"


def optimal(points: Sequence[Sequence[float]]) -> list[bool]:
    """Whether no other point is at least as high in every coordinate and higher in one."""

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        return list(a) != list(b) and all(x >= y for x, y in zip(a, b, strict=True))

    return [not any(beats(other, point) for other in points) for point in points]


def write_front(folder: Path, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Write the front as JSON lines, as a table and as a picture.

    Args:
        folder: Where ``front.jsonl``, ``front.md`` and ``front.png`` go, each replaced in one go.
        rows: A dict for each policy: ``policy`` (what it is called), ``objectives`` (estimates
            ``[value, low, high]`` by name), ``kl`` and ``tokens``, and where answers were judged
            ``judge`` (by what), ``win_rate`` and ``lc_win_rate`` (against the start).
        notes: Lines below the table.

    Returns:
        The table.
    """
    points = [[value for value, _, _ in row["objectives"].values()] for row in rows]
    found = [{**row, "front": best} for row, best in zip(rows, optimal(points), strict=True)]
    text = "\n".join([*table(found), "", *notes, ""])
    write_jsonl(folder / ROWS, found)
    write_text(folder / TABLE, text)
    draw(found, folder / PICTURE)
    return text


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of a Markdown table."""
    objectives = list(rows[0]["objectives"])
    judged = "win_rate" in rows[0]
    wins = [f"win rate ({rows[0]['judge']})", "length-controlled"] if judged else []
    means = [f"{name} [95 %]" for name in objectives]
    heads = ["policy", *means, *wins, "KL, nats", "tokens", "front"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [
            row["policy"],
            *(str(Estimate(*row["objectives"][name])) for name in objectives),
            *(str(Estimate(*row[name])) for name in ("win_rate", "lc_win_rate") if judged),
            str(Estimate(*row["kl"])),
            f"{row['tokens'][0]:.1f}",
            "*" if row["front"] else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG: a panel for each objective over the first, a point for each policy.

    Policies on the front are filled; the line goes through the sweep in its order, without the
    first row, which is where it began.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first, *others = rows[0]["objectives"]
    figure = Figure(figsize=(4.6 * len(others), 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, other in zip(figure.subplots(1, len(others), squeeze=False)[0], others, strict=True):
        spots = [[Estimate(*row["objectives"][name]) for name in (first, other)] for row in rows]
        axes.plot(*([spot[i].value for spot in spots[1:]] for i in (0, 1)), color="C0", alpha=0.4)
        for number, (row, (x, y)) in enumerate(zip(rows, spots, strict=True)):
            color = "C0" if number else "0.5"
            bars = [[[abs(end - at.value)] for end in at.ends] for at in (x, y)]
            axes.errorbar(
                *(x.value, y.value, bars[1], bars[0]),
                fmt="o",
                color=color,
                markerfacecolor=color if row["front"] else "white",
                elinewidth=0.6,
            )
            axes.annotate(row["policy"], (x.value, y.value), (4, 4), textcoords="offset points")
        axes.set(title="held-out, mean and 95 %", xlabel=first, ylabel=other)
        axes.grid(alpha=0.3)
    save(figure, path)
