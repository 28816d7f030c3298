"""SPO: one preference dimension a round; what earlier rounds learned is a margin to be kept.

Lou et al. 2024, arXiv:2405.12739.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpref.rounds.evaluation import Evaluator
from fastpref.rounds.examples import by_name, one_each, read_examples
from fastpref.rounds.pairs import pair_row
from fastpref.rounds.policies import log_likelihoods, log_ratio_margins
from fastpref.rounds.recipe import Recipe
from fastpref.rounds.run import Policy, Row, Rows, Run, given_rows
from fastpref.rounds.training import Loss, first_loss, train, uncut
from fastpref.rounds.winrate import accuracy, mean

Dimensions = dict[str, Rows]


@dataclass(kw_only=True)
class SPO(Recipe):
    """Sequential preference optimisation. ``alpha=0`` is DPO, each round against the last.

    Attributes:
        dataset: Pairs: a mapping of dimensions to datasets, in the order of the rounds, or one
            dataset with the column ``dimension_column``.
        eval_dataset: Held-out pairs in the same form; None: those of ``held_out`` prompts of each
            dimension, which no round trains on.
        dimensions: The dimensions in the order of the rounds; None: as the dataset has them.
        dimension_column: Where a row says its dimension.
        alpha: Weight of an earlier dimension's reward: a number, or one for each by its name.
        current_coef: Two-coefficient form, from the second round on: factor of the round's own
            log-ratio, in the place of ``beta``.
        prior_coef: Its factor of an earlier round's log-ratio, in the place of ``alpha``; a number,
            or one for each dimension by its name.
    """

    dimensions: list[str] | None = None
    dimension_column: str = "dimension"
    alpha: Any = 0.5
    current_coef: float | None = None
    prior_coef: Any = None

    def __post_init__(self) -> None:
        """See :class:`Recipe`."""
        super().__post_init__()
        _check_numbers("alpha", self.alpha)
        if (self.current_coef is None) != (self.prior_coef is None):
            raise ValueError(
                "current_coef and prior_coef are one form of the loss: give both, or neither"
            )
        if self.current_coef is not None:
            _check_numbers("prior_coef", self.prior_coef)
            if not 0 < self.current_coef < math.inf:
                raise ValueError(
                    f"current_coef must be finite and above 0, got {self.current_coef}"
                )

    def play(self, run: Run, start: Policy) -> Policy:
        """See :meth:`Recipe.play`."""
        dimensions, held_out = self._dimensions(run)
        names = list(dimensions)
        losses = [self._loss(names, number) for number in range(len(names))]
        evaluator = self._evaluator(run, start, held_out)
        policies = [start]
        for number, (dimension, pairs) in enumerate(dimensions.items(), 1):
            name = f"round-{number}"
            new = train(
                run,
                f"{name}/train",
                with_sums(run, name, policies, pairs),
                start=policies[-1],
                reference=None,
                loss=losses[number - 1],
                training=self._training,
            )
            shown: Row = {"dimension": dimension, "pairs": len(pairs)}
            begun = first_loss(new)
            if begun is not None:
                shown["first loss"] = begun
            shown |= self._rewards(run, name, new, start, held_out)
            self.report(run, number, evaluator, policies[-1], new, data=pairs, training=shown)
            policies.append(self.made_policy(name, new))
        return policies[-1]

    def _loss(self, names: Sequence[str], earlier: int) -> Loss:
        """The loss of the round after the first ``earlier`` dimensions."""
        if self.current_coef is None or not earlier:
            return Loss("spo", self.beta, {"alpha": _numbers("alpha", self.alpha, names, earlier)})
        coefs = _numbers("prior_coef", self.prior_coef, names, earlier)
        arguments = {"current_coef": self.current_coef, "prior_coefs": coefs}
        return Loss("spo", self.beta, arguments)

    def _dimensions(self, run: Run) -> tuple[Dimensions, Dimensions]:
        """Pairs to train on, and pairs held out (none: evaluation is off), by dimension."""
        found = self._read(run, self.dataset, "dataset")
        held_out: Dimensions = {}
        if self.eval_dataset is not None:
            held_out = self._read(run, self.eval_dataset, "eval_dataset", list(found))
        elif self.held_out:
            found, held_out = hold_out(found, self.held_out, self.seed)
        return {name: uncut(rows, self._training) for name, rows in found.items()}, held_out

    def _read(
        self, run: Run, dataset: Any, what: str, names: Sequence[str] | None = None
    ) -> Dimensions:
        found = by_name(dataset, self.dimension_column)
        names = list(self.dimensions or found) if names is None else names
        for name in (*names, *found):
            if name not in found or name not in names:
                raise ValueError(
                    f"{what} has the dimensions {', '.join(map(repr, found))}, the rounds are "
                    f"those of {', '.join(map(repr, names))}: {name!r} is in one of them only"
                )
        pairs, limit = ("chosen", "rejected"), self.max_prompt_tokens
        return {name: read_examples(found[name], run.tokenizer, pairs, limit) for name in names}

    def _evaluator(self, run: Run, start: Policy, held_out: Dimensions) -> Evaluator | None:
        """What compares answers to the held-out prompts of all dimensions, if there are any."""
        if not held_out:
            return None
        rows = given_rows([row for rows in held_out.values() for row in rows])
        return self.evaluator(run, start, one_each(rows))

    def _rewards(
        self, run: Run, name: str, policy: Policy, start: Policy, held_out: Dimensions
    ) -> Row:
        """How well a policy's log-ratio to the start orders each dimension's held-out pairs."""
        found: Row = {}
        for number, (dimension, pairs) in enumerate(held_out.items(), 1):
            stage = f"held-out/dimension-{number}"
            new = log_likelihoods(run, f"{name}/{stage}", policy, pairs)
            old = log_likelihoods(run, f"round-0/{stage}", start, pairs)
            margins = log_ratio_margins(new, old)
            found[f"accuracy, {dimension}"] = accuracy(margins, self.resamples)
            found[f"reward margin, {dimension}"] = mean(
                [self.beta * m for m in margins], self.resamples
            )
        return found


def with_sums(run: Run, name: str, policies: Sequence[Policy], pairs: Rows) -> list[Row]:
    """Pairs with their log-probabilities under the policies of earlier rounds, frozen.

    Args:
        run: The run.
        name: Of the round; a stage for each policy is made below it.
        policies: The start and each round's policy; the last is the reference.
        pairs: Rows with chosen and rejected ``responses``.

    Returns:
        Rows to train on, with ``prior_chosen`` and ``prior_rejected`` (a sum for each policy) and
        ``ref_chosen_logps`` and ``ref_rejected_logps`` (the last of them); nats.
    """
    scored = [
        log_likelihoods(run, f"{name}/sums/round-{number}", policy, pairs)
        for number, policy in enumerate(policies)
    ]
    found = []
    for row, *sums in zip(pairs, *scored, strict=True):
        chosen, rejected = zip(*(own["logps"] for own in sums), strict=True)
        found.append(
            {
                **pair_row(row, 0, 1),
                "prior_chosen": list(chosen),
                "prior_rejected": list(rejected),
                "ref_chosen_logps": chosen[-1],
                "ref_rejected_logps": rejected[-1],
            }
        )
    return found


def hold_out(dimensions: Dimensions, count: int, seed: int) -> tuple[Dimensions, Dimensions]:
    """Pairs to train on and pairs held out; a prompt held out of one dimension is out of all.

    Args:
        dimensions: Pairs by dimension.
        count: Prompts of each dimension to hold out; where dimensions share prompts, the same.
        seed: Of what is drawn.

    Raises:
        ValueError: fewer than half of a dimension's prompts would be left to train on.
    """
    prompts = {name: {repr(row["prompt"]) for row in rows} for name, rows in dimensions.items()}
    order = sorted(set().union(*prompts.values()))
    random.Random(seed).shuffle(order)
    out: set[str] = set()
    for own in prompts.values():
        out |= set([prompt for prompt in order if prompt in own][:count])
    for name, own in prompts.items():
        if len(own & out) * 2 > len(own):
            raise ValueError(
                f"held_out={count} leaves {len(own - out)} of {len(own)} different prompts of "
                f"{name!r}, too few to train on: lower held_out, or give the held-out pairs as "
                "eval_dataset"
            )

    def part(rows: Rows, held: bool) -> Rows:
        kept = [row for row in rows if (repr(row["prompt"]) in out) == held]
        return given_rows(kept, None if held else rows.left_out)

    left = {name: part(rows, held=False) for name, rows in dimensions.items()}
    return left, {name: part(rows, held=True) for name, rows in dimensions.items()}


def _check_numbers(option: str, given: Any) -> None:
    """Raise for anything but a number of at least 0, or several by name."""
    for value in given.values() if isinstance(given, Mapping) else [given]:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{option}: expected a number, or one by dimension, got {given!r}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{option} must be finite and at least 0, got {value}")


def _numbers(option: str, given: Any, names: Sequence[str], earlier: int) -> list[float]:
    """A number for each of the first ``earlier`` dimensions."""
    if not isinstance(given, Mapping):
        return [float(given)] * earlier
    wanted = names[:-1]
    if set(given) - set(names) or set(wanted) - set(given):
        raise ValueError(
            f"{option} by dimension: expected a number for {', '.join(map(repr, wanted))}, whose "
            f"rounds are not the last, got {dict(given)}"
        )
    return [float(given[name]) for name in names[:earlier]]
