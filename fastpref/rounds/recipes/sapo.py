"""SAPO: self-play without pairs; the rejected response is the chosen one with a segment rewritten.

The segment is written by an average of the policy, and pairs are drawn from a buffer of the last
ones, those that were drawn least first. Yin et al. 2024, arXiv:2405.20830.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastpref import losses
from fastpref.objective import FROM_REFERENCE
from fastpref.rounds.pairs import made, reasons
from fastpref.rounds.recipe import Recipe
from fastpref.rounds.run import Policy, Row, Rows, Run, given_rows
from fastpref.rounds.sampling import Sampling
from fastpref.rounds.self_play import STATE, UNUSABLE, SelfPlay, SelfPlayTrainer
from fastpref.rounds.training import TRAINER, Loss, first_loss, train, uncut


@dataclass(kw_only=True)
class SAPO(Recipe):
    """Self-augmented preference optimisation.

    The dataset has prompts and chosen responses; rejected ones, if any, are not read.

    Attributes:
        loss: ``"dpo"``, ``"orpo"`` or another loss of pairs in :mod:`fastpref.losses`. The paper's
            beta is 0.1 for DPO and 0.05 for ORPO.
        sampling: How a segment is written; ``max_new_tokens`` is the length of the segment.
        ema_decay: Share of its old weights that the average keeps at each step; 0: the average is
            the policy.
        buffer_capacity: Pairs that are kept to be drawn; the oldest go first.
        ref_update_every: Optimiser steps between updates of the reference, where the loss has one;
            None: it stays the start.
        ref_update_mode: What the reference becomes: ``"ema"``, the average, or ``"policy"``.
    """

    loss: str = "dpo"
    sampling: Any = field(
        default_factory=lambda: Sampling(
            n=1, temperature=0.7, top_k=50, top_p=0.95, max_new_tokens=256
        )
    )
    ema_decay: float = 0.5
    buffer_capacity: int = 2000
    ref_update_every: int | None = 108
    ref_update_mode: str = "ema"

    def __post_init__(self) -> None:
        """See :class:`Recipe`."""
        super().__post_init__()
        kind = losses.get(self.loss).entry.kind
        if kind != "pair":
            raise ValueError(
                f"loss: {self.loss!r} is of kind {kind!r}, and self-play makes pairs: choose dpo, "
                "orpo or another loss of pairs"
            )
        self._loss = Loss(self.loss, self.beta)
        for name, why in UNUSABLE.items():
            if self.training.get(name):
                raise ValueError(f"training.{name} cannot be set: {why}")
        self._self_play = SelfPlay(
            sampling=self._options(Sampling, "sampling"),
            ema_decay=self.ema_decay,
            buffer_capacity=self.buffer_capacity,
            ref_update_every=self.ref_update_every,
            ref_update_mode=self.ref_update_mode,
            batch_size=self.batch_size,
        )

    def play(self, run: Run, start: Policy) -> Policy:
        """See :meth:`Recipe.play`."""
        examples, held_out = self.examples(run, "chosen")
        evaluator = self.evaluator(run, start, held_out)
        whole = uncut(examples, self._training)
        rows = responses(run, "round-1/responses", whole)
        needs_reference = losses.get(self.loss).entry.needs & FROM_REFERENCE
        options = asdict(self._self_play)
        new = train(
            run,
            "round-1/train",
            made(rows),
            start=start,
            reference=start if needs_reference else None,
            loss=self._loss,
            training=self._training,
            build=partial(SelfPlayTrainer, self_play=self._self_play),
            pairs_of=SelfPlayTrainer.drawn,
            extra={f"self_play.{name}": value for name, value in options.items()},
        )
        path = Path(new.path).parent / TRAINER / STATE
        dropped = Counter(row["dropped"] for row in rows if row.get("dropped"))
        data = given_rows(made(rows), {**whole.left_out, **dropped})
        shown: Row = {"examples": len(data), **json.loads(path.read_text(encoding="utf-8"))}
        if (begun := first_loss(new)) is not None:
            shown["first loss"] = begun
        self.report(run, 1, evaluator, start, new, data=data, training=shown)
        return self.made_policy("round-1", new)


def responses(run: Run, name: str, examples: Rows) -> Rows:
    """The chosen responses that a segment can be rewritten of, as a stage.

    Args:
        run: The run.
        name: Of the stage.
        examples: Rows of one response.

    Returns:
        For each row ``{"id", "prompt", "prompt_ids", "chosen", "chosen_ids"}``, or ``{"id",
        "dropped": why}``.

    Raises:
        ValueError: no row is left.
    """

    def make() -> list[Row]:
        found: list[Row] = []
        for row in examples:
            (response,) = row["responses"]
            if response["text"].strip() and len(response["ids"]) > 1:
                kept = {key: row[key] for key in ("id", "prompt", "prompt_ids")}
                found.append({**kept, "chosen": response["text"], "chosen_ids": response["ids"]})
            else:
                found.append({"id": row["id"], "dropped": "the chosen response is empty"})
        if all(row.get("dropped") for row in found):
            raise ValueError(f"{name}: there is no chosen response to rewrite: {reasons(found)}")
        return found

    return run.table(name, {"examples": examples.digest}, make)
