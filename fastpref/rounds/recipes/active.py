"""Active learning: the policy chooses which of its pairs an oracle is asked about.

Each round gets labels up to a target and trains from the start model on all labels so far.
Muldrew et al. 2024, arXiv:2402.08114.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from fastpref.rounds.acquire import entropy, keep, uncertainty
from fastpref.rounds.pairs import build_pairs, filter_samples, made, reasons
from fastpref.rounds.people import People
from fastpref.rounds.policies import log_likelihoods
from fastpref.rounds.recipe import Sampled
from fastpref.rounds.run import Policy, Row, Rows, Run, given_rows, seed_of
from fastpref.rounds.sampling import Sampling, sample
from fastpref.rounds.scorers import Implicit, make_scorer
from fastpref.rounds.training import Loss, train

logger = logging.getLogger("fastpref")

ACQUISITIONS = {
    "random": (False, False),
    "entropy": (True, False),
    "certainty": (False, True),
    "hybrid": (True, True),
}
"""Rules by name: whether they choose among prompts by entropy, and among pairs by certainty."""
PAIRS = ("smallest", "largest", "middle", "tails")


@dataclass(kw_only=True)
class Active(Sampled):
    """Active preference learning. With factors of 1 every acquisition is random.

    Attributes:
        oracle: Says which response of a pair is better; as :func:`fastpref.rounds.make_scorer`
            takes it. ``{"kind": "people"}`` writes the pairs to a file and waits for labels.
        targets: Number of labels at the end of each round, rising; a label for each prompt.
        acquisition: ``"entropy"``: prompts whose answers vary most; ``"certainty"``: pairs whose
            implicit rewards are farthest apart; ``"hybrid"``: pairs by certainty of prompts by
            entropy; ``"random"``.
        prompt_factor: Prompts that are looked at for each that entropy keeps.
        pair_factor: Pairs that are sampled for each that certainty keeps.
        keep_pairs: Which of them, by how undecided they are: ``"smallest"``, ``"largest"``,
            ``"middle"`` or ``"tails"``.
        entropy_samples: Answers at temperature 1 behind a prompt's entropy.
        loss: Of :mod:`fastpref.losses`.
    """

    oracle: Any
    targets: Sequence[int] = (128, 256, 512, 768, 1024)
    acquisition: str = "certainty"
    prompt_factor: int = 4
    pair_factor: int = 8
    keep_pairs: str = "smallest"
    entropy_samples: int = 32
    loss: str = "dpo"
    beta: float = 0.2
    sampling: Any = field(default_factory=lambda: Sampling(n=2, temperature=0.7))

    def __post_init__(self) -> None:
        """See :class:`Recipe`."""
        super().__post_init__()
        for name, known in {"acquisition": tuple(ACQUISITIONS), "keep_pairs": PAIRS}.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        for name in ("prompt_factor", "pair_factor", "entropy_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        rising = [0, *self.targets]
        if not self.targets or sorted(set(rising)) != rising:
            raise ValueError(
                f"targets are numbers of labels, each above the one before, got {self.targets!r}"
            )
        if self._sampling.n != 2:
            raise ValueError(
                f"sampling.n must be 2, a pair for each prompt, got {self._sampling.n}"
            )
        self._oracle = make_scorer(self.oracle)
        self._loss = Loss(self.loss, self.beta)

    def play(self, run: Run, start: Policy) -> Policy:
        """See :meth:`Recipe.play`."""
        prompts, held_out = self.examples(run)
        if self.targets[-1] > len(prompts):
            raise ValueError(
                f"targets ask for {self.targets[-1]} labels, one for each prompt, and there are "
                f"{len(prompts)} prompts to label: lower targets or held_out"
            )
        judge = None if isinstance(self._oracle, People) else self._oracle
        evaluator = self.evaluator(run, start, held_out, judge, self._sampling.max_new_tokens)
        policy = start
        labelled: set[Any] = set()
        known: list[Row] = []
        for number, target in enumerate(self.targets, 1):
            name = f"round-{number}"
            left = given_rows([row for row in prompts if row["id"] not in labelled])
            count = target - len(labelled)
            kept, acquired = self._acquire(run, name, start, policy, left, count)
            labels = self._oracle.score(run, f"{name}/labels", acquired)
            pairs = build_pairs(run, f"{name}/pairs", acquired, labels, may_be_empty=bool(known))
            labelled |= {row["id"] for row in acquired}
            if not made(pairs):
                logger.warning("%s: all %d labels are ties and teach nothing", name, len(acquired))
            known += made(pairs)
            new = train(
                run,
                f"{name}/train",
                known,
                start=start,
                reference=start,
                loss=self._loss,
                training=self._training,
            )
            shown: Row = {"labels": len(labelled)}
            for value, what in (("entropy", "entropy, nats"), ("undecided", "undecided, 0 to 1")):
                if value in acquired.rows[0]:
                    shown[f"{what}, of the labelled"] = fmean(r[value] for r in acquired)
            self.report(
                run,
                number,
                evaluator,
                start,
                new,
                data=prompts,
                pairs=pairs,
                filtered=kept,
                training=shown,
            )
            policy = self.made_policy(name, new)
        return policy

    def _acquire(
        self, run: Run, name: str, start: Policy, policy: Policy, prompts: Rows, count: int
    ) -> tuple[Rows, Rows]:
        """Samples that count, and ``count`` of their pairs to be labelled (or all there are)."""
        by_entropy, by_certainty = ACQUISITIONS[self.acquisition]
        wanted = count * (self.pair_factor if by_certainty else 1)
        size = wanted * (self.prompt_factor if by_entropy else 1)
        if size > len(prompts):
            logger.warning(
                "%s: %d prompts are left to choose from, the factors ask for %d",
                name,
                len(prompts),
                size,
            )
        draw = random.Random(seed_of(run.seed, name, "pool"))
        pool = given_rows(draw.sample(prompts.rows, min(size, len(prompts))))
        if by_entropy:
            pool = self._by_entropy(run, name, policy, pool, wanted)
        samples = sample(run, f"{name}/samples", policy, pool, self._sampling)
        kept = filter_samples(run, f"{name}/kept", samples, self._filter)
        scores = None
        if by_certainty:
            implicit = Implicit(policy, start, self.beta)
            scores = implicit.score(run, f"{name}/implicit", kept)

        def make() -> list[Row]:
            rows = [row for row in kept if not row["dropped"]]
            if scores is not None:
                undecided = {s["id"]: uncertainty(*s["scores"]) for s in scores if s["scores"]}
                rows = [{**row, "undecided": undecided[row["id"]]} for row in rows]
            values = [row.get("undecided", 1.0) for row in rows]
            seed = seed_of(run.seed, name, "pairs")
            return [rows[i] for i in keep(values, count, self.keep_pairs, seed)]

        inputs = {
            "pairs": kept.digest,
            "rewards": None if scores is None else scores.digest,
            "count": count,
            "keep_pairs": self.keep_pairs,
            "seed": run.seed,
        }
        acquired = run.table(f"{name}/acquired", inputs, make)
        if len(acquired) < count:
            logger.warning(
                "%s: %d of %d labels are asked for, no more pairs are there (%s); the next round "
                "makes up for it",
                name,
                len(acquired),
                count,
                reasons(kept.rows),
            )
        return kept, acquired

    def _by_entropy(self, run: Run, name: str, policy: Policy, pool: Rows, count: int) -> Rows:
        """The ``count`` prompts whose answers have the largest entropy, as a stage."""
        sampling = Sampling(
            n=self.entropy_samples,
            temperature=1.0,
            max_new_tokens=self._sampling.max_new_tokens,
            backend=self._sampling.backend,
        )
        samples = sample(run, f"{name}/entropy/samples", policy, pool, sampling)
        logps = log_likelihoods(run, f"{name}/entropy/logps", policy, samples)

        def make() -> list[Row]:
            values = [entropy(row["logps"]) for row in logps]
            kept = keep(values, count, "largest", seed_of(run.seed, name, "prompts"))
            return [{**pool.rows[i], "entropy": values[i]} for i in kept]

        inputs = {"pool": pool.digest, "logps": logps.digest, "count": count, "seed": run.seed}
        return run.table(f"{name}/entropy/prompts", inputs, make)
