"""``fastpref bench``: this package, the floor and its peers side by side, in one process run.

Per shape, dtype and schedule: every system first shows that it is right (no speed for a wrong
result), then they take turns for a number of rounds. A ratio to the floor is the median of the
ratios within a round. ``--out`` appends one JSON object a row to a file that holds a JSON list, one
row a line; the file is replaced whole, so a reader never sees half of it.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastpref import backends, costs, measure
from fastpref.case import OPS, Passes, System
from fastpref.costs import HEADS, SCHEDULES, UNITS, Head
from fastpref.disk import write_text
from fastpref.measure import Check, Problem, Times
from fastpref.peers import systems
from fastpref.provenance import commit, device_name, versions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

FIELDS = (
    *("system", "op", "schedule", "N", "H", "V", "dtype", "device", "measured"),
    *("ms_forward", "ms_backward", "ms_total", "ms_spread", "floor_ratio", "peak_extra_bytes"),
    *("error_nats_per_1024", "relative_gradient_error", "deterministic"),
    *("versions", "commit", "command"),
)
"""Fields of a row. ``ms_*`` are medians, ``ms_spread`` is the interquartile range of the total;
null where the result was wrong. Predictions (``measured`` false) are rows of the same fields."""


@dataclass(frozen=True)
class Entry:
    """A system in one table."""

    system: System
    note: str = ""
    """Why it has no speed; empty if it has."""
    found: Check = field(default_factory=Check)
    times: Times = field(default_factory=list)
    floor_ratio: float | None = None
    peak_extra_bytes: int | None = None

    def median(self, part: Callable[[tuple[float, float]], float]) -> float | None:
        """Median over the rounds of a part of the time, milliseconds."""
        return statistics.median(map(part, self.times)) if self.times else None

    @property
    def total(self) -> float | None:
        """Median of forward and backward together, milliseconds."""
        return self.median(sum)

    @property
    def spread(self) -> float | None:
        """Interquartile range of the total, milliseconds."""
        if len(self.times) < 2:
            return None
        low, _, high = statistics.quantiles(map(sum, self.times), n=4, method="inclusive")
        return high - low


def parse_shape(text: str, rows: int) -> tuple[int, Head]:
    """Rows and head of ``"NAME"`` (with ``rows`` rows), ``"NAME@N"`` or ``"NxHxV"``.

    Raises:
        ValueError: The text is none of them.
    """
    sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if sizes:
        n, h, v = (int(size) for size in sizes.groups())
        return n, Head(h, v)
    name, _, count = text.partition("@")
    if name in HEADS and (not count or count.isdigit()):
        return int(count or rows), HEADS[name]
    raise ValueError(f"shape {text!r}: expected NxHxV, or NAME[@N] with one of {', '.join(HEADS)}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastpref bench", description=__doc__)
    many: dict[str, Any] = {"nargs": "+", "default": None}
    parser.add_argument("--shape", metavar="NAME[@N]|NxHxV", **many)
    parser.add_argument("--dtype", choices=DTYPES, **many)
    parser.add_argument("--schedule", choices=SCHEDULES, **many)
    parser.add_argument("--op", choices=OPS, help="default: all", **many)
    parser.add_argument("--backend", choices=backends.NAMES, help="default: all", **many)
    parser.add_argument("--peers", help="names, 'all' (default) or 'none'", **many)
    parser.add_argument("--plugin", metavar="MODULE:FUNCTION", nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="on a CPU")
    parser.add_argument(
        "--budget", type=int, metavar="MIB", help="memory budget (default: the op's)"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="append the rows to this file"
    )
    parser.add_argument("--commit", help="recorded in the rows (default: asked from git)")
    parser.add_argument("--list", action="store_true", help="list the systems and stop")
    parser.add_argument(
        "--explain", metavar="SHAPE", help="print the plan of a shape; runs nothing"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the bench as asked: 0, or 1 if a result was wrong."""
    asked = _parse(argv)
    if asked.list:
        print(listing(asked.plugin))
        return 0
    if asked.rounds < 1:
        raise ValueError(f"--rounds: expected at least 1, got {asked.rounds}")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    device = asked.device or _device()
    clock = "device" if device == "cuda" else asked.clock
    budget = None if asked.budget is None else asked.budget << 20
    shapes = [asked.explain] if asked.explain else asked.shape or ["smollm2-135m"]
    failed = False
    for n, head in (parse_shape(s, 8192 if device == "cuda" else 1024) for s in shapes):
        for dtype in asked.dtype or (["bf16"] if device == "cuda" else ["fp32"]):
            for schedule in asked.schedule or SCHEDULES:
                problem = Problem(n, head, DTYPES[dtype], device, schedule, budget)
                if asked.explain:
                    itemsize = problem.dtype.itemsize
                    print(costs.explain(schedule, n, head, itemsize, device, budget))
                    continue
                entries = run(problem, _chosen(asked), asked.rounds, clock)
                if not asked.no_memory:
                    entries = weigh(problem, entries, asked.plugin)
                print(render(problem, entries, clock), flush=True)
                failed |= any(e.found.verdict for e in entries)
                if asked.out:
                    command = shlex.join(["fastpref", "bench", *argv])
                    append(
                        asked.out, rows(problem, entries, clock, asked.commit or commit(), command)
                    )
    return int(failed)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def listing(plugins: list[str]) -> str:
    """Every system, its op and schedules, and whether it runs here; if not, why, and what adds
    it."""
    case = Problem(2, Head(8, 16), torch.bfloat16, _device(), "none").case()
    return "\n".join(
        f"{s.name:27} {s.op:13} {' '.join(s.schedules):31} {s.why_not(case) or 'ok'}"
        for s in systems(plugins)
    )


def _chosen(asked: argparse.Namespace) -> list[System]:
    """The systems that were asked for; the floor always."""
    chosen = []
    known = systems(asked.plugin)
    unknown = {*(asked.peers or [])} - {"all", "none"} - {s.name for s in known}
    if unknown:
        names = ", ".join(sorted({s.name for s in known}))
        raise ValueError(f"--peers: no system {', '.join(sorted(unknown))}; there are {names}")
    for system in known:
        own = re.fullmatch(r"fastpref\[(\w+)\]", system.name)
        if system.op != "gemms" and asked.op and system.op not in asked.op:
            continue
        if own and asked.backend and own[1] not in asked.backend:
            continue
        if not own and system.op != "gemms" and asked.peers:
            if "all" not in asked.peers and system.name not in asked.peers:
                continue
        chosen.append(system)
    return chosen


def run(problem: Problem, chosen: list[System], rounds: int, clock: str) -> list[Entry]:
    """Check every system, then let those that are right take turns.

    Args:
        problem: Shape, dtype, device and schedule.
        chosen: Systems, ``gemms`` among them if ratios to the floor are wanted.
        rounds: How often each is timed.
        clock: One of :data:`fastpref.measure.CLOCKS`.

    Returns:
        An entry per system that knows the schedule; those that cannot run, or are wrong, say why
        and have no times.
    """
    torch._dynamo.reset()  # past a number of shapes it would stop compiling, in silence
    case = problem.case()
    gate = problem.case(seed=1, rows=problem.gate_rows(), like=case)
    chosen = [s for s in chosen if problem.schedule in s.schedules]
    entries: list[Entry] = []
    ready: dict[int, Passes] = {}
    truths = {}
    with _progress(f"checking {len(chosen)} systems", len(chosen)) as tick:
        for i, system in enumerate(chosen):
            entry = Entry(system, system.why_not(case))
            try:
                if not entry.note and system.op in OPS:
                    if system.op not in truths:
                        truths[system.op] = measure.truth(gate, system.op)
                    found = measure.check(system, gate, truths[system.op])
                    entry = replace(entry, found=found, note=found.verdict)
                if not entry.note:
                    ready[i] = system.start(case)
                    measure.once(ready[i], clock)
            except Exception as error:  # a peer may fail in any way it likes; the others go on
                ready.pop(i, None)
                words = str(error).strip().splitlines() or [""]
                entry = replace(entry, note=f"failed: {type(error).__name__}: {words[0][:120]}")
            entries.append(entry)
            tick()
    truths.clear()
    with _progress(f"{rounds} rounds", rounds * len(ready)) as tick:
        raced = measure.race(list(ready.values()), rounds, clock, tick)
    times = dict(zip(ready, raced, strict=True))
    floor = next((times[i] for i in ready if chosen[i].op == "gemms"), None)
    for i, mine in times.items():
        ratios = [sum(a) / sum(b) for a, b in zip(mine, floor or [], strict=False)]
        ratio = statistics.median(ratios) if ratios else None
        entries[i] = replace(entries[i], times=mine, floor_ratio=ratio)
    return entries


def weigh(problem: Problem, entries: list[Entry], plugins: list[str]) -> list[Entry]:
    """The entries with their peak extra memory, each measured apart from the others."""
    weighed = []
    with _progress("peak memory", len(entries)) as tick:
        for entry in entries:
            if entry.times and entry.system.op in OPS:
                peak = measure.peak_extra_bytes(problem, entry.system, plugins)
                entry = replace(entry, peak_extra_bytes=peak)
            weighed.append(entry)
            tick()
    return weighed


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, where rich is installed; yields the function that advances it."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def rows(
    problem: Problem, entries: list[Entry], clock: str, commit: str, command: str
) -> list[dict[str, Any]]:
    """The measured rows of a table; a system that could not run has none."""
    dtype = next(name for name, value in DTYPES.items() if value == problem.dtype)
    made = []
    for entry in entries:
        if not entry.times and not entry.found.verdict:
            continue
        system, found = entry.system, entry.found
        values = (
            *(system.name, system.op, problem.schedule),
            *(problem.rows, problem.head.hidden_size, problem.head.vocab_size),
            *(dtype, device_name(clock), True),
            *map(_round, (entry.median(lambda t: t[0]), entry.median(lambda t: t[1]))),
            *map(_round, (entry.total, entry.spread, entry.floor_ratio)),
            entry.peak_extra_bytes,
            *map(_round, (found.error_nats_per_1024, found.relative_gradient_error)),
            found.deterministic,
            *(versions(problem.device, system.package), commit, command),
        )
        made.append(dict(zip(FIELDS, values, strict=True)))
    return made


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def append(path: Path, new: list[dict[str, Any]]) -> None:
    """Add rows to a JSON list, one row a line, by replacing the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else []
    text = "[\n" + ",\n".join(json.dumps(r) for r in [*kept, *new]) + "\n]\n"
    write_text(path, text)


COLUMNS = (
    *("system", "op", "forward ms", "backward ms", "total ms", "± IQR", "x floor"),
    *("TFLOP/s", "GB/s", "extra MiB", "nats/1024", "gradient error", "repeats"),
)


def needed(problem: Problem, op: str) -> tuple[int, int]:
    """Flops and bytes that the answer takes, the same for every system: work that one repeats does
    not raise its rate.

    Flops: 2 N H V a matrix product (none: 1 product, frozen: 2, trainable: 3). The floor alone is
    credited with the products of its schedule, a recomputed one too. Bytes: hidden, weight and
    targets read once, log-probabilities and gradients written once.
    """
    head, schedule = problem.head, problem.schedule
    units = UNITS[schedule] if op == "gemms" else min(6, UNITS[schedule])
    n, h, v = problem.rows, head.hidden_size, head.vocab_size
    written = {"none": 0, "frozen": n}.get(schedule, n + v)
    moved = problem.dtype.itemsize * h * (n + v + written) + (8 + 4) * n
    return units * n * h * v, moved


def cells(problem: Problem, entry: Entry) -> list[str]:
    """A table row as text, in the order of :data:`COLUMNS`; for a system without times its note.
    The rates count what is :func:`needed`."""
    names = [entry.system.name, entry.system.op]
    if not entry.times:
        return [*names, entry.note]

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    flops, moved = needed(problem, entry.system.op)
    total, peak, found = entry.total, entry.peak_extra_bytes, entry.found
    return [
        *names,
        show(entry.median(lambda t: t[0]), ".2f"),
        show(entry.median(lambda t: t[1]), ".2f"),
        show(total, ".2f"),
        show(entry.spread, ".2f"),
        show(entry.floor_ratio, ".3f"),
        show(flops / total / 1e9 if total else None, ".3g"),
        show(moved / total / 1e6 if total else None, ".3g"),
        show(None if peak is None else peak / 2**20, ".0f"),
        show(found.error_nats_per_1024, ".1e"),
        show(found.relative_gradient_error, ".1e"),
        {True: "yes", False: "no", None: "-"}[found.deterministic],
    ]


def render(problem: Problem, entries: list[Entry], clock: str) -> str:
    """The table as plain text, and below it the systems without a speed, and why."""
    head = problem.head
    title = (
        f"\n{problem.schedule}  N={problem.rows} H={head.hidden_size} V={head.vocab_size} "
        f"{str(problem.dtype).removeprefix('torch.')}  {device_name(clock)}"
    )
    lines = [list(COLUMNS), *(cells(problem, e) for e in entries if e.times)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    absent = [f"  {e.system.name} ({e.system.op}): {e.note}" for e in entries if not e.times]
    return "\n".join([title, *text, *(["not timed:", *absent] if absent else [])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
