"""SELM: DPO on updated pairs that also makes the reference's own answers less likely.

Each round the policy answers once, greedily; of its answer, the chosen and the rejected response of
the data, the best and the worst make the pair. Zhang et al. 2024, arXiv:2405.19332.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastpref.rounds.pairs import Filter, build_pairs, filter_samples, made
from fastpref.rounds.recipe import OnPolicy
from fastpref.rounds.run import Policy, Row, Rows, Run
from fastpref.rounds.sampling import Sampling, sample
from fastpref.rounds.scorers import make_scorer
from fastpref.rounds.training import Loss, train


@dataclass(kw_only=True)
class SELM(OnPolicy):
    """Self-exploring language models. ``alpha=0`` is iterative DPO on the updated pairs.

    Attributes:
        scorer: Ranks the three responses; as :func:`fastpref.rounds.make_scorer` takes it.
        alpha: Weight of the exploration term, in units of beta.
    """

    scorer: Any
    alpha: float = 0.001
    beta: float = 0.01
    sampling: Any = field(default_factory=lambda: Sampling(n=1, temperature=0.0))
    filter: Any = field(default_factory=lambda: Filter(min_responses=1))

    def __post_init__(self) -> None:
        """See :class:`Recipe`."""
        super().__post_init__()
        if self._sampling.n != 1:
            raise ValueError(
                f"sampling.n must be 1, one answer to explore from, got {self._sampling.n}"
            )
        self._scorer = make_scorer(self.scorer)
        self._loss = Loss("selm", self.beta, {"alpha": self.alpha})

    def play(self, run: Run, start: Policy) -> Policy:
        """See :meth:`Recipe.play`."""
        examples, held_out = self.examples(run, "chosen", "rejected")
        evaluator = self.evaluator(
            run, start, held_out, self._scorer, self._sampling.max_new_tokens
        )
        policy = start
        for number, part in enumerate(self.parts(examples), 1):
            name = f"round-{number}"
            samples = sample(run, f"{name}/samples", policy, part, self._sampling)
            kept = filter_samples(run, f"{name}/kept", samples, self._filter)
            three = _beside(run, f"{name}/candidates", kept, part)
            scores = self._scorer.score(run, f"{name}/scores", three)
            pairs = build_pairs(run, f"{name}/pairs", three, scores)
            own = {row["id"]: row["responses"][0]["ids"] for row in kept if row["responses"]}
            new = train(
                run,
                f"{name}/train",
                [{**row, "third_ids": own[row["id"]]} for row in made(pairs)],
                start=policy,
                reference=policy,
                loss=self._loss,
                training=self._training,
            )
            self.report(
                run, number, evaluator, policy, new, data=examples, pairs=pairs, filtered=kept
            )
            policy = self.made_policy(name, new)
        return policy


def _beside(run: Run, name: str, kept: Rows, part: Rows) -> Rows:
    """The policy's answer, the chosen and the rejected response of each prompt, as a stage."""

    def make() -> list[Row]:
        return [
            {**row, "responses": [*row["responses"], *own["responses"]] if row["responses"] else []}
            for row, own in zip(kept, part, strict=True)
        ]

    return run.table(name, {"samples": kept.digest, "data": part.digest}, make)
