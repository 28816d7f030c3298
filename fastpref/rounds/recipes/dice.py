"""DICE: a DPO-tuned policy ranks its own samples by its implicit reward, and is trained on them.

Two things keep it from running away: a length penalty under which chosen and rejected responses are
equally long on average, and offline pairs mixed in. Chen et al. 2024, arXiv:2406.09760.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

from fastpref.rounds.pairs import (
    Filter,
    build_pairs,
    debiased_scores,
    filter_samples,
    made,
    pair_row,
)
from fastpref.rounds.policies import check_ids
from fastpref.rounds.recipe import OnPolicy
from fastpref.rounds.replay import replay_counts, replay_mix
from fastpref.rounds.run import Policy, Rows, Run, given_rows, policy_of, seed_of
from fastpref.rounds.sampling import Sampling, sample
from fastpref.rounds.scorers import Implicit
from fastpref.rounds.training import Loss, train


@dataclass(kw_only=True)
class DICE(OnPolicy):
    """Bootstrapping with the implicit reward. ``gamma=0`` trains on generated pairs alone.

    The dataset holds the offline pairs, whose prompts are also the ones that are sampled for.

    Attributes:
        initial_reference: What ``model`` was tuned from by DPO; a folder or hub name.
        gamma: Share of offline pairs, in [0, 1].
        convention: How counts are made whole, ``"round"`` or ``"truncate"`` (as released).
        penalty: ``"search"``: the length penalty that closes the gap; or a number, in nats a
            character; 0: none.
        penalty_step: Between penalties that are tried.
        penalty_limit: Penalties are below it.
        loss: Of :mod:`fastpref.losses`.
    """

    initial_reference: str
    rounds: int = 2
    gamma: float = 0.5
    convention: str = "round"
    penalty: Any = "search"
    penalty_step: float = 0.001
    penalty_limit: float = 1.0
    loss: str = "dpo"
    sampling: Any = field(default_factory=lambda: Sampling(n=16, temperature=0.9))
    filter: Any = field(
        default_factory=lambda: Filter(min_characters=4, max_characters=6699, min_responses=8)
    )

    def __post_init__(self) -> None:
        """See :class:`Recipe`."""
        super().__post_init__()
        self._loss = Loss(self.loss, self.beta)
        replay_counts(0, 0, self.gamma, self.convention)  # says what is wrong with these
        number = isinstance(self.penalty, (int, float)) and not isinstance(self.penalty, bool)
        if self.penalty != "search" and not number:
            raise ValueError(f"penalty must be 'search' or a number, got {self.penalty!r}")
        if number and not math.isfinite(self.penalty):
            raise ValueError(f"penalty must be a finite number, got {self.penalty}")
        for name in ("penalty_step", "penalty_limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")

    def play(self, run: Run, start: Policy) -> Policy:
        """See :meth:`Recipe.play`."""
        examples, held_out = self.examples(run, "chosen", "rejected")
        offline = [pair_row(row, 0, 1) for row in examples]
        evaluator = self.evaluator(
            run, start, held_out, max_new_tokens=self._sampling.max_new_tokens
        )
        older, policy = policy_of(self.initial_reference), start
        check_ids(run, older)
        for number in range(1, self.rounds + 1):
            name = f"round-{number}"
            prompts = self._prompts(examples, number)
            samples = sample(run, f"{name}/samples", policy, prompts, self._sampling)
            kept = filter_samples(run, f"{name}/kept", samples, self._filter)
            scores = Implicit(policy, older).score(run, f"{name}/scores", kept)
            fair = debiased_scores(run, f"{name}/debiased", kept, scores, self._penalties())
            pairs = build_pairs(run, f"{name}/pairs", kept, fair)
            seed = seed_of(run.seed, name, "replay")
            mixed = replay_mix(offline, made(pairs), self.gamma, seed, self.convention)
            new = train(
                run,
                f"{name}/train",
                mixed,
                start=policy,
                reference=policy,
                loss=self._loss,
                training=self._training,
            )
            found = fair.rows[0]
            shown = {
                "length penalty, nats/character": found["alpha"],
                "gap without it, characters": found["gap_at_zero"],
                "gap with it, characters": found["gap"],
            }
            self.report(
                run,
                number,
                evaluator,
                policy,
                new,
                data=examples,
                pairs=pairs,
                filtered=kept,
                training=shown,
            )
            older, policy = policy, self.made_policy(name, new)
        return policy

    def _prompts(self, examples: Rows, number: int) -> Rows:
        """The prompts a round samples for: all, or as many as asked for, drawn anew each round."""
        count = self.prompts_per_round or len(examples)
        draw = random.Random(seed_of(self.seed, number, "prompts"))
        return given_rows(draw.sample(examples.rows, min(count, len(examples))))

    def _penalties(self) -> list[float]:
        """Length penalties to try."""
        if self.penalty != "search":
            return [float(self.penalty)]
        count = math.ceil(self.penalty_limit / self.penalty_step)
        return [k * self.penalty_step for k in range(count)]
