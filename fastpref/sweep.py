"""``fastpref sweep``: losses x betas from one cached reference pass, compared on held-out pairs.

The reference is the model as it starts. It scores every pair once, before the first cell; each cell
then trains the same weights on the same pairs in the same order with its own loss and beta. All are
measured alike, by log-ratios to that reference: accuracy, margin, an estimate of the KL divergence,
and by the answers that the model itself then gives: their length, and how often a judge prefers
them to those of the start. A finished cell is a file, so a sweep that was stopped goes on where it
was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from fastpref.demo import BATCH, HELD_OUT, RATE, STEPS, split_by_prompt, tiny_model, tiny_pairs
from fastpref.disk import write_text
from fastpref.provenance import commit, device_name, versions
from fastpref.sweep_measure import Measure, make_judge, win_rates
from fastpref.sweep_report import START, Row, draw, report

LOSSES, BETAS = ("dpo", "ipo", "kto_pair"), (0.01, 0.1, 0.5)


def _option(default: Any, words: str) -> Any:
    return field(default=default, metadata={"help": f"{words} (default {default})"})


@dataclass(frozen=True)
class Settings:
    """What all cells of a sweep share; each field is an option of the command, with its help."""

    steps: int = _option(STEPS, "optimiser steps of each cell")
    learning_rate: float = _option(RATE, "of the first step; it falls linearly to 0")
    batch_size: int = _option(BATCH, "pairs a step")
    held_out: int = _option(HELD_OUT, "pairs that are measured and not trained on")
    max_length: int = _option(256, "most tokens of prompt and response; the rest is cut")
    answers: int = _option(HELD_OUT, "most held-out prompts that each model answers")
    new_tokens: int = _option(96, "most tokens of an answer; 0: none are asked for")
    seed: int = _option(0, "of the order of the pairs, and of which are held out")


@dataclass(frozen=True)
class Cell:
    """A loss and its beta; None where it has none."""

    loss: str
    beta: float | None

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.loss if self.beta is None else f"{self.loss}-{self.beta!r}"


def cells_of(losses: Sequence[str], betas: Sequence[float]) -> list[Cell]:
    """Every loss with every beta; once, where it has no beta.

    Raises:
        ValueError: No such loss.
    """
    from fastpref.losses import get

    def values(loss: str) -> Sequence[float | None]:
        return betas if "beta" in get(loss).entry.defaults else [None]

    cells = [Cell(get(loss).entry.name, beta) for loss in losses for beta in values(loss)]
    return list(dict.fromkeys(cells))


def main(argv: Sequence[str]) -> int:
    """Runs the sweep; 0."""
    parser = argparse.ArgumentParser(
        prog="fastpref sweep",
        description="Compare losses and betas on held-out pairs, the reference scored once. The "
        "same command again goes on where a sweep was stopped.",
    )
    add = parser.add_argument
    add("--losses", nargs="+", default=LOSSES, help=f"default {' '.join(LOSSES)}")
    add("--betas", nargs="+", type=float, default=BETAS, help=f"default {BETAS}")
    add("--model", help="name or path (default SmolLM2-135M-Instruct)")
    add("--layers", type=int, help="keep the model's first layers only, for time")
    add("--pairs", help="file of preference pairs (default: the demo's)")
    for each in fields(Settings):
        option = f"--{each.name.replace('_', '-')}"
        add(option, type=type(each.default), default=each.default, help=each.metadata["help"])
    add(
        "--judge",
        help="compares each cell's answers with the start's: a function, module:name or "
        "file.py:name, of (prompt, answer, other), the probability that answer is better, or of "
        "(prompt, answer), a score; or a scorer of fastpref rounds, '{kind: ..., ...}'",
    )
    add("--run-dir", type=Path, help="where results go (default runs/sweep-DATE-TIME)")
    add("--ref-cache-dir", default="auto", help="of the reference's log-probs, as for train")
    add("--cpu", action="store_true", help="leave a GPU alone")
    add("--tiny", action="store_true", help="a random model and made-up pairs: offline, seconds")
    given = parser.parse_args(argv)
    run_dir = given.run_dir or Path("runs", time.strftime("sweep-%Y%m%d-%H%M%S"))
    settings = Settings(**{name: getattr(given, name) for name in asdict(Settings())})
    if settings.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {settings.steps}")
    if given.ref_cache_dir == "none":
        raise ValueError("--ref-cache-dir none: the cells share one pass, which has to be kept")
    if given.judge and min(settings.new_tokens, settings.answers) < 1:
        raise ValueError("--judge compares answers: --new-tokens and --answers must be at least 1")
    try:
        results = sweep(
            *_ingredients(given),
            cells_of(given.losses, given.betas),
            settings,
            run_dir=run_dir,
            origin={"model": given.model, "layers": given.layers, "tiny": given.tiny},
            ref_cache_dir=given.ref_cache_dir,
            cpu=given.cpu,
            judge=make_judge(given.judge) if given.judge else None,
            command=shlex.join(["fastpref", "sweep", *argv]),
        )
    except KeyboardInterrupt:
        again = f"finished cells are kept: go on with --run-dir {run_dir}"
        raise KeyboardInterrupt(f"interrupted; {again}") from None
    print(report(results))
    print(f"\n{run_dir}: sweep.png, table.md, results.json, and a folder for each cell")
    return 0


def _ingredients(given: argparse.Namespace) -> tuple[Callable[[], Any], Any, list[Row]]:
    """How to make the model, its tokenizer, and the pairs."""
    from fastpref import assets
    from fastpref.config import PreferenceConfig
    from fastpref.data.load import load_preference_dataset
    from fastpref.models import load_model, load_tokenizer

    if given.tiny and (given.model or given.layers):
        raise ValueError("--tiny has a model of its own: drop --model and --layers, or --tiny")
    if given.pairs:
        rows: list[Row] = list(load_preference_dataset(given.pairs))
    else:
        rows = tiny_pairs(60) if given.tiny else assets.demo_pairs()
    if given.tiny:
        return lambda: tiny_model()[0], tiny_model()[1], rows
    name = given.model or str(assets.demo_model())
    options = {} if given.layers is None else {"num_hidden_layers": given.layers}
    # packing=False: the answers are sampled, for which FlexAttention is slow.
    config = PreferenceConfig(output_dir="unused", use_cpu=given.cpu, packing=False)
    return lambda: load_model(name, config, **options), load_tokenizer(name), rows


def sweep(
    make_model: Callable[[], Any],
    tokenizer: Any,
    rows: Sequence[Row],
    cells: Sequence[Cell],
    settings: Settings,
    *,
    run_dir: Path,
    origin: Mapping[str, Any],
    ref_cache_dir: str = "auto",
    cpu: bool = False,
    judge: Any = None,
    command: str = "",
) -> Row:
    """Train and measure every cell that is not finished.

    Args:
        make_model: The causal language model that every cell starts from.
        tokenizer: Its tokenizer.
        rows: Preference pairs, in a layout of :mod:`fastpref.data.formats`.
        cells: Losses and betas.
        settings: Shared by all.
        run_dir: For results; what a sweep with the same settings left there is taken as it is.
        origin: What else the results depend on, to tell sweeps apart.
        ref_cache_dir: As in :class:`fastpref.PreferenceConfig`.
        cpu: Leave a GPU alone.
        judge: Of :func:`fastpref.sweep_measure.make_judge`; None: nobody compares the answers. It
            reads what the cells keep, so that another one needs no training.
        command: That the numbers come from.

    Returns:
        What is in ``run_dir/results.json``: ``cells``, the start and each of those asked for; the
        settings; and the machine, the versions and the command that made them.

    Raises:
        ValueError: ``run_dir`` holds another sweep, or a loss needs what a cached reference or the
            data does not have.
    """
    from datasets import Dataset

    from fastpref.checkpoint import write_json
    from fastpref.config import PreferenceConfig
    from fastpref.data.formats import extract_prompt
    from fastpref.trainer import PreferenceTrainer

    def options(cell: Cell) -> PreferenceConfig:
        return PreferenceConfig(
            output_dir=str(run_dir / cell.name),
            loss_type="dpo" if cell.loss == START else cell.loss,
            beta=cell.beta,
            max_steps=settings.steps,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch_size,
            max_length=settings.max_length,
            seed=settings.seed,
            precompute_ref_log_probs=True,
            ref_cache_dir=ref_cache_dir,
            logging_steps=1,
            gradient_checkpointing=False,
            save_strategy="no",
            use_cpu=cpu,
            dataloader_pin_memory=torch.cuda.is_available() and not cpu,
        )

    rows = [extract_prompt(row) for row in rows]
    _check(options, cells, rows)
    parts = split_by_prompt(rows, settings.held_out, settings.seed)
    if not all(parts):
        raise ValueError(
            f"{len(rows)} pairs, {settings.held_out} of them held out, leave none to train on or "
            "to measure: give more pairs, or change held_out"
        )
    _claim(run_dir, {**asdict(settings), **origin, "pairs": _digest(rows)})
    train, held_out = map(Dataset.from_list, parts)
    first = PreferenceTrainer(
        make_model(),
        args=options(Cell(START, None)),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    measure, models = Measure(first, tokenizer, parts[1], settings), [first.model]
    device = first.args.device
    del first
    results, finished = [], []
    for number, cell in enumerate([Cell(START, None), *cells]):
        path = run_dir / cell.name / "result.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f"\ncell {number} of {len(cells)}: {cell.name}", flush=True)
            if cell.loss == START:
                found = measure(models[0], path.parent)
            else:
                model = models.pop() if models else make_model()
                found = _train(model, options(cell), train, tokenizer, measure)
            write_json(path, {"loss": cell.loss, "beta": cell.beta, **found})
        results.append(json.loads(path.read_text()))
        finished += [] if "error" in results[-1] else [cell.name]
    models.clear()
    if judge is not None:
        rates = win_rates(judge, run_dir, finished, tokenizer, device, settings.batch_size)
        for row in results:
            name = Cell(row["loss"], row["beta"]).name
            row |= {"win_rate": rates[name]} if name in rates else {}
    everything = {
        "cells": results,
        **asdict(settings),
        **origin,
        "judge": None if judge is None else judge.name,
        "device": device_name("device" if device.type == "cuda" else "wall"),
        "measured": True,
        "versions": versions(device.type, "transformers"),
        "commit": commit(),
        "command": command,
    }
    write_json(run_dir / "results.json", everything)
    write_text(run_dir / "table.md", report(everything) + "\n")
    draw(results, run_dir / "sweep.png")
    return everything


def _train(model: Any, config: Any, train: Any, tokenizer: Any, measure: Measure) -> Row:
    """One cell, from the start weights, or where Ctrl-C stopped it, to its numbers."""
    from fastpref.checkpoint import fault
    from fastpref.recorder import draw_run, record, resolved
    from fastpref.trainer import PreferenceTrainer

    values, folder = resolved(config), Path(config.output_dir)
    resume = any(fault(path) is None for path in folder.glob("checkpoint-*"))
    trainer = PreferenceTrainer(model, args=config, train_dataset=train, processing_class=tokenizer)
    record(trainer, values)
    try:
        trainer.train(resume_from_checkpoint=resume)
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found = {"train_loss": sum(losses) / len(losses), **measure(trainer.model, folder)}
    except FloatingPointError as error:  # that a beta is too large for a loss is a result
        found = {"error": str(error)}
    draw_run(folder)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return found


def _check(options: Callable[[Cell], Any], cells: Sequence[Cell], rows: Sequence[Row]) -> None:
    """Raise ``ValueError`` before anything runs, where a loss lacks what it needs."""
    from fastpref.data.formats import canonical_names, resolve_layout
    from fastpref.objective import check_needs, make_losses

    if not rows or not {"prompt", "chosen", "rejected"} <= rows[0].keys():
        found = ", ".join(rows[0]) if rows else "no rows"
        raise ValueError(f"the sweep needs pairs of prompt, chosen and rejected, got {found}")
    renames = canonical_names(rows[0])
    names = [renames.get(name, name) for name in rows[0]]
    for cell in cells:
        combined = make_losses(options(cell))
        kind: Any = combined.kind
        if kind == "group":
            raise ValueError(f"{cell.loss} takes groups of responses, and the sweep has pairs")
        layout = resolve_layout(names, kind, unpair=kind == "unpaired")
        columns = {*layout.numbers, *(f"{name}_ids" for name in layout.responses)}
        check_needs(combined, columns, references=1, live=False)


def _claim(run_dir: Path, identity: Row) -> None:
    """Raise ``ValueError`` if ``run_dir`` holds another sweep; else it is this one's."""
    from fastpref.checkpoint import write_json

    path = run_dir / "sweep.json"
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, identity)
        return
    before = json.loads(path.read_text())
    changed = [name for name in identity if identity[name] != before.get(name)]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{run_dir} holds a sweep with {name}={before.get(name)!r}, this one has "
            f"{identity[name]!r}: choose another --run-dir, or the same settings to go on"
        )


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
