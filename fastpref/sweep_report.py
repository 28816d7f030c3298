"""What a sweep found, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpref.demo import Interval
from fastpref.plots import save

START = "start"
"""Name of the cell that trains nothing."""
PANELS = {
    "accuracy": ("held-out accuracy", "share of pairs"),
    "margin": ("held-out margin", "log-ratio, nats"),
    "kl": ("KL estimate", "nats per token"),
    "length": ("length of answers", "tokens"),
}
"""Title and unit of each measure."""

Row = dict[str, Any]


def report(sweep: Row) -> str:
    """The table, in Markdown; ``*`` marks each loss's best beta.

    Args:
        sweep: Cells and settings, as :func:`fastpref.sweep.sweep` returns them.
    """
    results: list[Row] = sweep["cells"]
    best = {loss: _best(results, loss) for loss in {row["loss"] for row in results} - {START}}
    lines = [
        "| loss | beta | accuracy [95 %] | margin [95 %] | KL | length | ended |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        name, beta = row["loss"], "" if row["beta"] is None else f"{row['beta']:g}"
        if "error" in row:
            lines.append(f"| {name} | {beta} | diverged | | | | |")
            continue
        mark = "*" if row is best.get(name) else ""
        accuracy, margin = (Interval(**row[key]) for key in ("accuracy", "margin"))
        answers = f"{row['length']:.1f} | {row['ended']:.0%}" if "length" in row else " | "
        numbers = f"{accuracy} | {margin} | {row['kl']:.2e} | {answers}"
        lines.append(f"| {name} | {beta}{mark} | {numbers} |")
    start = next(row for row in results if row["loss"] == START)
    lines += [
        "",
        f"{start['pairs']} held-out pairs; {sweep['steps']} steps of {sweep['batch_size']} "
        f"pairs, learning rate {sweep['learning_rate']:g}. Accuracy: share of pairs whose "
        "chosen response has the larger log-ratio to the reference, a tie counting 1/2. Margin: "
        "difference of the two log-ratios, nats. KL: of the model from the reference, k3 estimate "
        "over the held-out responses, nats a token. Length: mean tokens of the greedy answers, at "
        f"most {sweep['new_tokens']}, and the share of them that ended. *: each loss's best "
        "accuracy, then margin.",
    ]
    return "\n".join(lines)


def _best(results: Sequence[Row], loss: str) -> Row | None:
    found = [row for row in results if row["loss"] == loss and "error" not in row]
    key = ("accuracy", "margin")
    if len(found) < 2:
        return None
    return max(found, key=lambda row: [row[name]["mean"] for name in key])


def draw(results: Sequence[Row], path: Path) -> None:
    """Write a PNG: a panel for each measure, a line for each loss over beta.

    The start, and losses without a beta, are lines across.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in results if "error" not in row]
    panels = {key: words for key, words in PANELS.items() if key in rows[0]}
    figure = Figure(figsize=(4.2 * len(panels), 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, (title, unit)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for number, loss in enumerate(dict.fromkeys(row["loss"] for row in rows)):
            own = [row for row in rows if row["loss"] == loss]
            values = [row[key]["mean"] if isinstance(row[key], dict) else row[key] for row in own]
            color = "0.5" if loss == START else f"C{number - 1}"
            if own[0]["beta"] is None:
                axes.axhline(values[0], color=color, linestyle="--", label=loss)
            else:
                order = sorted(range(len(own)), key=lambda i: own[i]["beta"])
                betas = [own[i]["beta"] for i in order]
                axes.plot(betas, [values[i] for i in order], "o-", color=color, label=loss)
                axes.set_xscale("log")
        axes.set(title=title, xlabel="beta", ylabel=unit)
        axes.grid(alpha=0.3)
    axes.legend(framealpha=0.8)
    save(figure, path)
