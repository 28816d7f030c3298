"""The documentation of the losses, written from the registry: a table, and a page for each.

``python -m fastpref.losses`` prints the table, ``python -m fastpref.losses dpo`` a page, and
``python -m fastpref.losses --write docs/losses.md`` writes both to a file.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastpref.losses.batch import BATCHES, SOURCES
from fastpref.losses.core import Entry, get, names
from fastpref.losses.parameters import COMMON, Parameter

CONFIDENCE = {
    "H": "high: checked against official code, the paper's text or two implementations",
    "M": "medium: one secondary source",
    "L": "low: constants or details could not be verified",
    "": "not stated",
}
_SECTIONS = {
    "pair": "Pairs: a chosen and a rejected response",
    "unpaired": "Single responses with a label",
    "group": "Several scored responses to a prompt",
    "token": "Single tokens",
}
_LOW = "Low confidence"
_NOWHERE = "none of the libraries looked at"
_INTRO = """# Losses

Written from the registry by `python -m fastpref.losses --write docs/losses.md`; do not edit.

A loss is a function of log-probabilities: `losses.get(name)(batch, **hyper_parameters)` gives one
number per example, without reduction. Names in a formula are fields of the batch; `margin` is
`(chosen - ref_chosen) - (rejected - ref_rejected)`, a log-ratio is policy minus reference, `a` and
`b` are `beta` times the log-ratio of the chosen and of the rejected response, `sg` stops the
gradient.

```python
from fastpref import losses

batch = losses.PairLogps(chosen=..., rejected=..., ref_chosen=..., ref_rejected=...)  # (B,), nats
losses.get("dpo")(batch, beta=0.1)  # (B,)
losses.combine(["dpo", "sft"], weights=[1.0, 0.2])(batch)  # a weighted sum, states included


@losses.register("mine", needs={"ref"})  # one of your own
def mine(pairs, *, beta=0.1):
    return -torch.nn.functional.logsigmoid(beta * pairs.margin)
```

- *coupled*: an example's loss depends on the others. The statistic is that of all ranks of one
  micro-batch.
- *Remembers*: what is carried from micro-batch to micro-batch, of all ranks, and saved with the
  run. As with a coupled loss, an update then depends on how its batch is cut into micro-batches.
- A likelihood term is the mean over an example's tokens, then over examples. Under
  `nll_reduction="tokens"` it is the mean over tokens: alone, of this batch; a trainer passes
  `tokens_per_pair`, the chosen tokens of the global accumulation window divided by its pairs, so
  that micro-batches add up to the mean over the window's tokens.
- *Found in* names other systems that have the loss. Looked at: TRL, HALOs, LLaMA-Factory, ms-swift,
  axolotl, OpenRLHF, Unsloth, verl, NeMo-RL, torchtune, open-instruct, oat, Compose-RL, Liger,
  align-anything, and the papers' own code where it was at hand.
- Every number is computed in fp32 or better, whatever the inputs are. Log-ratios up to 10,000 give
  finite values and gradients.
"""


def _code(items: Iterable[str]) -> str:
    return ", ".join(f"`{item}`" for item in items)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), "|" + "---|" * len(head), *(_row(row) for row in rows)]


def _section(entry: Entry) -> str:
    return _LOW if entry.confidence == "L" else _SECTIONS[entry.kind]


def _needs(entry: Entry) -> str:
    return _code(sorted(entry.needs)) + (", coupled" if entry.coupled else "")


def _memory(entry: Entry) -> str:
    """What the state of a loss carries from batch to batch."""
    if entry.state is None or not entry.state.keeps:
        return ""
    lines = (inspect.getdoc(entry.state) or "").split("\n\n")[0]
    return " ".join(lines.split()).replace("``", "`")


def _defaults(entry: Entry) -> str:
    shared = {"f_divergence", "f_alpha", "weighting"}
    values = {key: value for key, value in entry.defaults.items() if value is not None}
    return _code(f"{key}={value!r}" for key, value in values.items() if key not in shared)


def table() -> str:
    """One line for each loss, in Markdown."""
    lines: list[str] = []
    entries = [get(name).entry for name in names()]
    for section in [*_SECTIONS.values(), _LOW]:
        rows = [
            (
                f"[{entry.name}](#{entry.name})",
                _code(entry.aliases),
                _code([entry.formula]),
                _defaults(entry),
                _needs(entry),
            )
            for entry in entries
            if _section(entry) == section
        ]
        head = ("loss", "also", "per example", "defaults", "needs")
        lines += [f"### {section}", "", *_table(head, rows), ""]
    return "\n".join(lines)


def _parameters(entry: Entry) -> list[Sequence[str]]:
    values: dict[str, Any] = dict(entry.defaults)
    if entry.state is not None:
        for name, option in inspect.signature(entry.state).parameters.items():
            values.setdefault(name, option.default)
    rows: list[Sequence[str]] = []
    for name, value in values.items():
        parameter = entry.parameters.get(name, COMMON.get(name, Parameter("")))
        rows.append(
            (f"`{name}`", f"`{value!r}`", _code(filter(None, [parameter.valid])), parameter.meaning)
        )
    return rows


def page(name: str) -> str:
    """All that is known of one loss, in Markdown."""
    entry = get(name).entry
    summary = " ".join(entry.summary.split("\n\n")[0].split())
    facts = {
        "Also called": _code(entry.aliases),
        "Choose it when": entry.when,
        "Needs": _needs(entry),
        "Remembers": _memory(entry),
        "Source": f"{entry.paper} {entry.equation}".strip(),
        "Confidence": CONFIDENCE[entry.confidence],
        "Found in": entry.found_in or (_NOWHERE if entry.confidence else ""),
    }
    lines = [f"### {entry.name}", "", summary, ""]
    lines += ["```text", entry.formula, "```", ""] if entry.formula else []
    lines += [f"- {key}: {value}" for key, value in facts.items() if value]
    rows = _parameters(entry)
    if rows:
        lines += ["", *_table(("hyper-parameter", "default", "range", "meaning"), rows)]
    return "\n".join(lines) + "\n"


def _inputs() -> str:
    rows = [
        (
            f"`{word}`",
            ", ".join(sorted({kind for kind, b in BATCHES.items() if word in b.fields})),
            _code(dict.fromkeys(f for b in BATCHES.values() for f in b.fields.get(word, ()))),
            source,
        )
        for word, source in SOURCES.items()
        if any(word in batch.fields for batch in BATCHES.values())
    ]
    head = ("needs", "batch", "fields", "comes from")
    return "\n".join(["## Inputs", "", *_table(head, rows), ""])


def document() -> str:
    """The whole of ``docs/losses.md``."""
    pages = [page(name) for name in names()]
    return "\n".join([_INTRO, "## All losses", "", table(), _inputs(), "## One by one", "", *pages])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of ``python -m fastpref.losses``."""
    parser = argparse.ArgumentParser(prog="python -m fastpref.losses", description=main.__doc__)
    parser.add_argument(
        "name", nargs="?", help="print the page of this loss; default: the table of all"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the documentation of all")
    options = parser.parse_args(arguments)
    if options.write is not None:
        options.write.write_text(document(), encoding="utf-8")
    elif options.name is not None:
        try:
            print(page(options.name))
        except ValueError as error:
            parser.error(str(error))
    else:
        print(table())
