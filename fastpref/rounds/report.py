"""What a person sees after each round: a small table, and a picture of all rounds so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpref import checkpoint
from fastpref.plots import save
from fastpref.rounds.run import Row, Run
from fastpref.rounds.winrate import Estimate

FILE, PICTURE = "report.json", "report.png"


def report(run: Run, number: int, inputs: Mapping[str, Any], content: Callable[[], Row]) -> Row:
    """Write a round's report as a stage, draw it with those before, and print its table.

    Args:
        run: The run.
        number: Of the round, from 1.
        inputs: All that the content depends on.
        content: Makes it: any of ``left_out`` (rows of the dataset by reason), ``pairs`` (of
            ``describe_pairs``), ``trained_on`` (of the function of that name), ``held_out`` (of
            ``Evaluator.compare``) and ``training`` (numbers by name).

    Returns:
        The report, as it is in ``round-N/report/report.json``.
    """

    def make(folder: Path) -> None:
        found = json.loads(json.dumps({"round": number, **content()}, allow_nan=False))
        checkpoint.write_json(folder / FILE, found)
        draw([*_earlier(run, number), found], folder / PICTURE)

    folder = run.stage(f"round-{number}/report", inputs, make)
    found: Row = json.loads((folder / FILE).read_text(encoding="utf-8"))
    show(found, folder)
    return found


def _earlier(run: Run, number: int) -> list[Row]:
    paths = [run.folder / f"round-{k}" / "report" / FILE for k in range(1, number)]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def lines(content: Row) -> list[tuple[str, str]]:
    """A report as labels and values."""
    found: list[tuple[str, str]] = []
    found += _counts("left out of the data", content.get("left_out"))
    pairs = content.get("pairs")
    if pairs:
        found.append(("pairs", f"{pairs['made']} of {pairs['prompts']} prompts"))
        found += _counts("  dropped", pairs["dropped"])
        found += _counts("  responses dropped", pairs["faults"])
        found += _gaps(pairs)
    trained = content.get("trained_on")
    if trained:
        found.append(("trained on", f"{trained['pairs']} pairs"))
        found += _counts("  dropped", trained["left_out"])
        found += _counts("  noted", trained["notes"])
        if not pairs or _gaps(pairs) != _gaps(trained):
            found += _gaps(trained)
    for name, value in (content.get("training") or {}).items():
        found.append((name, _shown(value)))
    held_out = content.get("held_out")
    if held_out:
        found.append(("held-out prompts", str(held_out["prompts"])))
        if "reward" in held_out:
            found.append((f"reward ({held_out['reward_name']})", _interval(held_out["reward"])))
            found.append(("  before", _interval(held_out["reward_before"])))
        if "win_rate" in held_out:
            found.append((f"win rate ({held_out['judge']})", _interval(held_out["win_rate"])))
            found.append(("  length-controlled", _interval(held_out["lc_win_rate"])))
        else:
            found.append(("win rate", "not measured: no judge is given"))
        found.append(("KL from previous, nats", _interval(held_out["kl"]["previous"])))
        found.append(("KL from start, nats", _interval(held_out["kl"]["start"])))
        found.append(("response tokens", _interval(held_out["tokens"])))
        if held_out["unfinished"]:
            found.append(("  unfinished", f"{held_out['unfinished']:.0%}"))
    return found


def _counts(label: str, counts: Mapping[str, int] | None) -> list[tuple[str, str]]:
    return [(label, f"{count}: {why}") for why, count in (counts or {}).items()]


def _gaps(pairs: Row) -> list[tuple[str, str]]:
    """How much longer chosen responses are, where there are any."""
    units = [unit for unit in ("tokens", "characters") if f"gap_{unit}" in pairs]
    return [
        (f"  chosen - rejected, {unit}", f"{Estimate(*pairs[f'gap_{unit}']):+.1f}")
        for unit in units
    ]


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return _interval(value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _interval(values: Sequence[Any]) -> str:
    return str(Estimate(*values))


def show(content: Row, folder: Path) -> None:
    """Print a report's table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"round {content['round']}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column()
    for label, value in lines(content):
        table.add_row(escape(label), escape(value))
    console = Console()
    console.print(table)
    picture = escape(f"picture: {folder / PICTURE}")
    console.print(picture, soft_wrap=True, highlight=False)


def draw(reports: Sequence[Row], path: Path) -> None:
    """Draw the rounds so far as a PNG: a panel for each thing that was measured.

    Args:
        reports: By round.
        path: The PNG, replaced in one go.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [
        (title, unit, lines, level)
        for title, unit, lines, level in _panels(reports)
        if any(points for _, points in lines)
    ]
    if not panels:
        panels = [("rounds", "", [("made", [(r["round"], 1.0, 1.0, 1.0) for r in reports])], None)]
    columns = min(3, len(panels))
    figure = Figure(
        figsize=(4.2 * columns, 3.0 * -(-len(panels) // columns)), dpi=120, layout="constrained"
    )
    FigureCanvasAgg(figure)
    for index, (title, unit, curves, level) in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // columns), columns, index + 1)
        for label, points in curves:
            if not points:
                continue
            x, y, low, high = zip(*points, strict=True)
            below = [a - b for a, b in zip(y, low, strict=True)]
            above = [b - a for a, b in zip(y, high, strict=True)]
            axes.errorbar(x, y, [below, above], marker="o", markersize=4, capsize=3, label=label)
        if level is not None:
            axes.axhline(level, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="round", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(framealpha=0.8)
    save(figure, path)


Point = tuple[int, float, float, float]


def _panels(reports: Sequence[Row]) -> list[tuple[str, str, list[tuple[str, list[Point]]], Any]]:
    def held_out(*keys: str) -> list[Point]:
        return [point for r in reports if (point := _point(r, "held_out", *keys)) is not None]

    def plain(part: str, key: str) -> list[Point]:
        return [point for r in reports if (point := _point(r, part, key)) is not None]

    first = reports[0]
    reward = held_out("reward")
    if reward and "reward_before" in first["held_out"]:
        start = Estimate(*first["held_out"]["reward_before"])
        reward = [(first["round"] - 1, start.value, *start.ends), *reward]
    names = dict.fromkeys(name for r in reports for name in r.get("training") or {})
    return [
        ("reward of held-out answers", "mean, 95 %", [("reward", reward)], None),
        (
            "against the previous policy",
            "win rate, 95 %",
            [("as they are", held_out("win_rate")), ("length-controlled", held_out("lc_win_rate"))],
            0.5,
        ),
        (
            "KL estimate",
            "nats per response",
            [
                ("from previous", held_out("kl", "previous")),
                ("from start", held_out("kl", "start")),
            ],
            0.0,
        ),
        ("response length", "tokens", [("held-out answers", held_out("tokens"))], None),
        (
            "pairs",
            "number",
            [
                ("prompts", plain("pairs", "prompts")),
                ("made", plain("pairs", "made")),
                ("trained on", plain("trained_on", "pairs")),
            ],
            None,
        ),
        (
            "chosen - rejected",
            "tokens",
            [
                ("pairs made", plain("pairs", "gap_tokens")),
                ("trained on", plain("trained_on", "gap_tokens")),
            ],
            0.0,
        ),
        *((name, "", [(name, plain("training", name))], None) for name in names),
    ]


def _point(report: Row, *keys: str) -> Point | None:
    value: Any = report
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None or isinstance(value, str):
        return None
    if isinstance(value, list):
        found = Estimate(*value)
        return (report["round"], found.value, *found.ends)
    return report["round"], float(value), float(value), float(value)
