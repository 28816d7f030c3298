"""MODPO: one objective is learned from its pairs, the others are frozen rewards in the margin; a
policy for each weighting of them, and the front they make.

Zhou et al. 2023, arXiv:2310.03708.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastpref.rounds.evaluation import Evaluator, trained_on
from fastpref.rounds.front import PICTURE, TABLE, write_front
from fastpref.rounds.pairs import pair_row
from fastpref.rounds.policies import log_likelihoods, log_ratio_margins
from fastpref.rounds.recipe import Outcome, Recipe
from fastpref.rounds.report import lines
from fastpref.rounds.run import Policy, Row, Rows, Run
from fastpref.rounds.scorer import Scorer
from fastpref.rounds.scorers import KINDS, make_scorer
from fastpref.rounds.training import Loss, train, uncut
from fastpref.rounds.winrate import accuracy, mean

LEAST = 0.05
"""Least weight of the trained objective, which the loss is divided by."""


@dataclass(kw_only=True)
class MODPO(Recipe):
    """Multi-objective DPO, a policy for each weighting. The weights ``[1, 0]`` are DPO.

    Attributes:
        dataset: Pairs of the objective that is trained.
        margins: The other objectives: a name for each and what rewards it, as
            :func:`fastpref.rounds.make_scorer` takes it. Each scores the pairs once.
        weights: For each policy the weights, the trained objective's first (at least 0.05), then
            those of ``margins`` in their order; or, with one margin, a number w for ``[w, 1 - w]``.
        objective: Name of the trained objective, for tables.
        reward: What rewards it in held-out answers; None: it is measured by the share of held-out
            pairs that the policy's log-ratio to the start orders right.
    """

    margins: dict[str, Any]
    weights: Sequence[Any] = field(default_factory=lambda: [0.1, 0.5, 0.9])
    objective: str = "preference"
    reward: Any = None

    def __post_init__(self) -> None:
        """See :class:`Recipe`."""
        super().__post_init__()
        given = self.margins
        if not isinstance(given, Mapping) or not given or str(given.get("kind")) in KINDS:
            raise TypeError(
                "margins: expected a scorer for each of the other objectives by its name, such as "
                f"{{length: {{kind: length}}}}, got {given!r}"
            )
        if self.objective in given:
            raise ValueError(f"margins: {self.objective!r} is the trained objective's own name")
        self._margins = {name: make_scorer(scorer) for name, scorer in given.items()}
        self._reward: Scorer | None = None if self.reward is None else make_scorer(self.reward)
        for name, scorer in [*self._margins.items(), ("reward", self._reward)]:
            if scorer is not None and scorer.comparative:
                raise ValueError(
                    f"{name}: a ranker compares answers with each other, and what is wanted is a "
                    "reward for each: give a reward model or a function, or make it the judge"
                )
        self._weights = [_weighting(one, list(given)) for one in self.weights]
        names = [_name(weights) for weights in self._weights]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"weights: expected one or more, none twice, got {self.weights!r}")

    def play(self, run: Run, start: Policy) -> Policy:
        """See :meth:`Recipe.play`."""
        examples, held_out = self.examples(run, "chosen", "rejected")
        whole = uncut(examples, self._training)
        pairs = self._with_margins(run, whole)
        evaluator = self.evaluator(run, start, held_out, self._reward)
        policy = start
        if evaluator is not None:
            self._measure(evaluator, "start", start)
        for weights in self._weights:
            name = _name(weights)
            policy = train(
                run,
                f"{name}/train",
                pairs,
                start=start,
                reference=start,
                loss=Loss("modpo", self.beta, {"w": weights}),
                training=self._training,
                draw="train",  # policies differ by their weights alone
            )
            self.made_policy(name, policy)
            if evaluator is not None:
                self._measure(evaluator, name, policy)
        # the pairs are the same for all weights
        trained = {"left_out": whole.left_out, "trained_on": trained_on(policy, self.resamples)}
        notes = [f"{label.strip()}: {value}" for label, value in lines(trained)]
        if evaluator is not None:
            notes = [*notes, *self._meaning(pairs)]
            print(write_front(run.folder, self._reports, notes))
            print(f"picture: {run.folder / PICTURE}")
        else:
            print("\n".join(notes))
        return policy

    def closing(self, outcome: Outcome) -> str:
        """See :meth:`Recipe.closing`."""
        folder = outcome.folder
        found = f"the policies are in {folder / 'w-*'}, one for each weighting"
        return f"{found}; their front is in {folder / TABLE}" if outcome.reports else found

    def _with_margins(self, run: Run, examples: Rows) -> list[Row]:
        """Pairs with the rewards of the other objectives, the same for all weights."""
        scored = [
            scorer.score(run, f"margins/{number}", examples)
            for number, scorer in enumerate(self._margins.values(), 1)
        ]
        found = []
        for row, *scores in zip(examples, *scored, strict=True):
            chosen, rejected = zip(*(own["scores"] for own in scores), strict=True)
            margins = {"chosen_margins": list(chosen), "rejected_margins": list(rejected)}
            found.append({**pair_row(row, 0, 1), **margins})
        return found

    def _measure(self, evaluator: Evaluator, name: str, policy: Policy) -> None:
        """Add a policy's objectives on held-out data to the reports, as a stage."""
        run, start = evaluator.run, evaluator.start
        folder = evaluator.name(policy, name)

        def likelihoods(of: Policy) -> Rows:
            return log_likelihoods(
                run, f"{evaluator.name(of, name)}/held-out", of, evaluator.prompts
            )

        def make() -> list[Row]:
            compared = evaluator.compare(folder, start, policy)
            found: Row = {}
            if self._reward is None:
                margins = log_ratio_margins(likelihoods(policy), likelihoods(start))
                found[self.objective] = accuracy(margins, self.resamples)
            else:
                found[self.objective] = compared["reward"]
            for number, (objective, scorer) in enumerate(self._margins.items(), 1):
                scores = evaluator.scores(scorer, f"objective-{number}", policy)
                found[objective] = mean(scores, self.resamples)
            kl = compared.pop("kl")["start"]
            trained = {} if policy == start else {"trained_on": trained_on(policy, self.resamples)}
            return [{"policy": name, "objectives": found, "kl": kl, **compared, **trained}]

        margins = {key: scorer.describe() for key, scorer in self._margins.items()}
        inputs = {
            "policy": policy.digest,
            "objective": self.objective,
            "margins": margins,
            "evaluation": evaluator.describe(),
        }
        self._reports += run.table(f"{folder}/measured", inputs, make).rows

    def _meaning(self, pairs: Sequence[Row]) -> list[str]:
        """What the columns of the front are."""
        what = (
            "share of held-out pairs that the log-ratio to the start orders right, a tie counting "
            "1/2"
            if self._reward is None
            else f"mean of {self._reward.name} over answers to held-out prompts"
        )
        return [
            f"{self.objective} (trained): {what}.",
            *(
                f"{name}: mean of {scorer.name} over answers to held-out prompts; it differs by "
                f"{_spread(pairs, number):.3g} within a training pair, on average."
                for number, (name, scorer) in enumerate(self._margins.items())
            ),
            "KL: from the start, per answer. *: no other policy here is at least as good in all "
            "objectives and better in one, by these means.",
        ]


def _weighting(given: Any, margins: Sequence[str]) -> list[float]:
    """The weights of one policy, the trained objective's first."""
    numbers = list(given) if isinstance(given, (list, tuple)) else [given]
    for value in numbers:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 <= value < math.inf):
            raise ValueError(f"weights: expected finite numbers of at least 0, got {given!r}")
    if not isinstance(given, (list, tuple)) and len(margins) == 1 and given <= 1:
        numbers.append(round(1 - given, 12))
    if len(numbers) != 1 + len(margins):
        raise ValueError(
            f"weights: expected [trained objective, {', '.join(margins)}]"
            f"{', or a number up to 1' if len(margins) == 1 else ''}, got {given!r}"
        )
    if numbers[0] < LEAST:
        raise ValueError(
            f"weights: the trained objective's is {numbers[0]:g} in {given!r}; below {LEAST} the "
            "margin, divided by it, drowns the preference. For a policy of the other objectives "
            "alone, train on their pairs"
        )
    return [float(value) for value in numbers]


def _name(weights: Sequence[float]) -> str:
    """Of the folder of a policy, and for tables."""
    return "w-" + "-".join(f"{value:g}" for value in weights)


def _spread(pairs: Sequence[Row], margin: int) -> float:
    """Mean size of the difference of a margin reward between chosen and rejected response."""
    gaps = [row["chosen_margins"][margin] - row["rejected_margins"][margin] for row in pairs]
    return float(sum(map(abs, gaps)) / len(gaps))
