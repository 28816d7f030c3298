"""The picture of a run: loss, margins, accuracy and lengths, drawn from ``metrics.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PANELS: dict[str, tuple[str, dict[str, str]]] = {
    "loss": ("nats", {"loss": "train", "eval_loss": "held-out"}),
    "reward margin": (
        "β · log-ratio, nats",
        {"rewards/margins": "train", "eval_rewards/margins": "held-out"},
    ),
    "rewards": (
        "β · log-ratio, nats",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    ),
    "accuracy": (
        "share of pairs",
        {"rewards/accuracies": "train", "eval_rewards/accuracies": "held-out"},
    ),
    "log-probability": (
        "nats per response",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    ),
    "response length": ("tokens", {"len/chosen": "chosen", "len/rejected": "rejected"}),
}
"""Title -> (unit, {logged key: label})."""


def read_metrics(path: Path) -> list[Row]:
    """The rows of a ``metrics.jsonl``; a last line cut short by a killed process is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def series(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have ``key``; of a step logged twice the later counts."""
    found = {row["step"]: row[key] for row in rows if "step" in row and row.get(key) is not None}
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def draw_curves(rows: Sequence[Row], path: Path) -> bool:
    """Whether there was something to draw; writes a PNG with a panel for each group of keys.

    Args:
        rows: Logged rows with ``step``, as :func:`read_metrics` returns.
        path: The PNG, replaced in one go.

    Returns:
        False if no row has any known key; then nothing is written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = {
        title: (unit, {key: label for key, label in keys.items() if series(rows, key)[0]})
        for title, (unit, keys) in PANELS.items()
    }
    shown = {title: (unit, keys) for title, (unit, keys) in shown.items() if keys}
    if not shown:
        return False
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * lines), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for index, (title, (unit, keys)) in enumerate(shown.items()):
        axes = figure.add_subplot(lines, columns, index + 1)
        for number, (key, label) in enumerate(keys.items()):
            steps, values = series(rows, key)
            marker = "o" if len(steps) < 4 else None
            axes.plot(steps, values, f"C{number}", marker=marker, markersize=4, label=label)
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(framealpha=0.8)
    save(figure, path)
    return True


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a PNG, replaced in one go."""
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
