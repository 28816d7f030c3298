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
    "win_rate": ("win rate against the start", "share of answers"),
}
"""Title and unit of each measure."""

COLUMNS = {
    "accuracy": "accuracy [95 %]",
    "margin": "margin [95 %]",
    "kl": "KL",
    "length": "length",
    "ended": "ended",
    "win_rate": "win rate [95 %]",
    "train_loss": "training loss",
}
"""Heads of the table."""

Row = dict[str, Any]


def report(sweep: Row) -> str:
    """The table, in Markdown; ``*`` marks each loss's best beta.

    Args:
        sweep: Cells and settings, as :func:`fastpref.sweep.sweep` returns them.
    """
    results: list[Row] = sweep["cells"]
    best = {loss: _best(results, loss) for loss in {row["loss"] for row in results} - {START}}
    start = next(row for row in results if row["loss"] == START)
    columns = [key for key in COLUMNS if any(key in row for row in results)]
    head = ["loss", "beta", *(COLUMNS[key] for key in columns)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in results:
        name, beta = row["loss"], "" if row["beta"] is None else f"{row['beta']:g}"
        mark = "*" if row is best.get(name) else ""
        numbers = [_written(row, key) for key in columns]
        if "error" in row:
            numbers[0] = "diverged"
        lines.append(f"| {' | '.join([name, beta + mark, *numbers])} |")
    lines += ["", _explained(sweep, start)]
    return "\n".join(lines)


def _written(row: Row, key: str) -> str:
    value = row.get(key, "")
    if isinstance(value, dict):
        return str(Interval(**value))
    formats = {"kl": ".2e", "length": ".1f", "ended": ".0%", "train_loss": ".4g"}
    return "" if value == "" else format(value, formats[key])


def _explained(sweep: Row, start: Row) -> str:
    """What the columns of the table are."""
    parts = [
        f"{start['pairs']} held-out pairs; {sweep['steps']} steps of {sweep['batch_size']} "
        f"pairs, learning rate {sweep['learning_rate']:g}. Accuracy: share of pairs whose "
        "chosen response has the larger log-ratio to the reference, a tie counting 1/2. Margin: "
        "difference of the two log-ratios, nats. KL: of the model from the reference, estimated "
        "as half the mean squared log-ratio of a held-out response's token, nats a token.",
    ]
    if "length" in start:
        parts.append(
            f"Length: mean tokens of the greedy answers to {start['answers']} held-out prompts, at "
            f"most {sweep['new_tokens']}, and the share of them that ended."
        )
    if "win_rate" in start:
        parts.append(
            f"Win rate: of these answers against the start's, by {sweep['judge']}, a tie counting "
            "1/2."
        )
    parts.append("Training loss: mean over the steps. *: each loss's best accuracy, then margin.")
    return " ".join(parts)


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
