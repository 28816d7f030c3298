"""iLR-DPO: sample, let a reward model pick best and worst, train with a price on length, iterate.

Liu et al. 2024, arXiv:2406.11817.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastpref.rounds.pairs import build_pairs, check_rule, filter_samples, made
from fastpref.rounds.recipe import OnPolicy
from fastpref.rounds.run import Policy, Run
from fastpref.rounds.sampling import sample
from fastpref.rounds.scorers import make_scorer
from fastpref.rounds.training import Loss, train


@dataclass(kw_only=True)
class ILRDPO(OnPolicy):
    """Iterative length-regularised DPO. ``alpha=0`` is iterative DPO.

    Attributes:
        scorer: What makes a response better; as :func:`fastpref.rounds.make_scorer` takes it.
        alpha: Price of a token of length, in nats.
        reference: ``"current"``: the policy that each round starts from; ``"initial"``: the first.
        rule: How a pair is chosen: ``"best_worst"`` or ``"best_random"``.
    """

    scorer: Any
    alpha: float = 0.01
    reference: str = "current"
    rule: str = "best_worst"

    def __post_init__(self) -> None:
        """See :class:`Recipe`."""
        super().__post_init__()
        if self.reference not in ("current", "initial"):
            raise ValueError(f"reference must be 'current' or 'initial', got {self.reference!r}")
        check_rule(self.rule)
        self._scorer = make_scorer(self.scorer)
        self._loss = Loss("lr_dpo", self.beta, {"alpha": self.alpha})

    def play(self, run: Run, start: Policy) -> Policy:
        """See :meth:`Recipe.play`."""
        prompts, held_out = self.examples(run)
        evaluator = self.evaluator(
            run, start, held_out, self._scorer, self._sampling.max_new_tokens
        )
        policy = start
        for number, part in enumerate(self.parts(prompts), 1):
            name = f"round-{number}"
            samples = sample(run, f"{name}/samples", policy, part, self._sampling)
            kept = filter_samples(run, f"{name}/kept", samples, self._filter)
            scores = self._scorer.score(run, f"{name}/scores", kept)
            pairs = build_pairs(run, f"{name}/pairs", kept, scores, self.rule)
            new = train(
                run,
                f"{name}/train",
                made(pairs),
                start=policy,
                reference=policy if self.reference == "current" else start,
                loss=self._loss,
                training=self._training,
            )
            self.report(
                run, number, evaluator, policy, new, data=prompts, pairs=pairs, filtered=kept
            )
            policy = self.made_policy(name, new)
        return policy
