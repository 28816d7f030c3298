"""What a round did to the policy, measured on prompts that no round trains on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpref.rounds.pairs import made
from fastpref.rounds.policies import log_likelihoods
from fastpref.rounds.run import Policy, Row, Rows, Run, given_rows
from fastpref.rounds.sampling import Sampling, sample
from fastpref.rounds.scorer import Scorer
from fastpref.rounds.training import PAIRS
from fastpref.rounds.winrate import (
    RESAMPLES,
    Estimate,
    gap,
    length_controlled_win_rate,
    mean,
    win_rate,
)


@dataclass
class Evaluator:
    """Answers of each round's policy to held-out prompts, and how they compare.

    A policy answers once, at temperature 1, and its answers are scored once, whatever they are
    compared with.

    Attributes:
        run: The run.
        prompts: Held out.
        start: The policy the run began with.
        max_new_tokens: Longest answer.
        judge: Compares answers; None: only lengths and KL are measured.
        reward: Scores single answers; None: the judge, if it scores single answers.
        resamples: Of the bootstrap.
    """

    run: Run
    prompts: Rows
    start: Policy
    max_new_tokens: int
    judge: Scorer | None = None
    reward: Scorer | None = None
    resamples: int = RESAMPLES
    _names: dict[str, str] = field(default_factory=dict)
    _answers: dict[str, Rows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take the judge as the reward where there is none and it can be."""
        if self.reward is None and self.judge is not None and not self.judge.comparative:
            self.reward = self.judge
        self.name(self.start, "round-0")

    def describe(self) -> Row:
        """What its numbers depend on beside the policies."""
        return {
            "held_out": self.prompts.digest,
            "start": self.start.digest,
            "max_new_tokens": self.max_new_tokens,
            "dtype": str(self.run.dtype),
            "batch_size": self.run.batch_size,
            "judge": None if self.judge is None else self.judge.describe(),
            "reward": None if self.reward is None else self.reward.describe(),
            "resamples": self.resamples,
        }

    def name(self, policy: Policy, name: str) -> str:
        """Folder of a policy's answers: that of the round that made it, whoever asks first."""
        return self._names.setdefault(policy.digest, name)

    def answers(self, policy: Policy) -> Rows:
        """A policy's answers, as a stage."""
        if policy.digest not in self._answers:
            once = Sampling(n=1, temperature=1.0, max_new_tokens=self.max_new_tokens)
            name = f"{self.name(policy, 'other')}/answers"
            self._answers[policy.digest] = sample(self.run, name, policy, self.prompts, once)
        return self._answers[policy.digest]

    def rewards(self, policy: Policy) -> list[float]:
        """Their rewards, a number each, as a stage."""
        assert self.reward is not None
        return self.scores(self.reward, "rewards", policy)

    def scores(self, scorer: Scorer, name: str, policy: Policy) -> list[float]:
        """Scores of a policy's answers, as a stage; as another one, if they have been scored.

        Args:
            scorer: Not comparative.
            name: Of the stage, in the policy's folder.
            policy: Whose answers.
        """
        stage = f"{self.name(policy, 'other')}/{name}"
        return [row["scores"][0] for row in scorer.score(self.run, stage, self.answers(policy))]

    def compare(self, name: str, before: Policy, after: Policy) -> Row:
        """Numbers of a policy beside those of the policy before it.

        Args:
            name: Of the round.
            before: What the round began with.
            after: What it made.

        Returns:
            ``tokens`` and ``characters`` (mean response length), ``unfinished`` (share), ``kl``
            from the policy before and from the run's start (nats, summed over a response; a
            Monte-Carlo mean over the answers), ``reward`` and ``reward_before``, ``win_rate`` and
            ``lc_win_rate``; estimates as ``[value, low, high]``.
        """
        self.name(after, name)
        new, old = self.answers(after), self.answers(before)
        own = [row["responses"][0] for row in new]
        found: Row = {
            "prompts": len(new),
            "tokens": self._mean([len(r["ids"]) for r in own]),
            "characters": self._mean([len(r["text"]) for r in own]),
            "unfinished": sum(not r["finished"] for r in own) / len(own),
            "kl": {"previous": self._kl(name, after, before, "previous")},
        }
        if self.start.digest != before.digest:
            found["kl"]["start"] = self._kl(name, after, self.start, "start")
        else:
            found["kl"]["start"] = found["kl"]["previous"]
        if self.reward is not None:
            found["reward"] = self._mean(self.rewards(after))
            found["reward_before"] = self._mean(self.rewards(before))
            found["reward_name"] = self.reward.name
        if self.judge is not None:
            preferences = self._preferences(name, new, old, before, after)
            longer = [
                len(a["responses"][0]["text"]) - len(b["responses"][0]["text"])
                for a, b in zip(new, old, strict=True)
            ]
            found["judge"] = self.judge.name
            found["win_rate"] = win_rate(preferences, self.resamples)
            found["lc_win_rate"] = length_controlled_win_rate(preferences, longer, self.resamples)
        return found

    def _preferences(
        self, name: str, new: Rows, old: Rows, before: Policy, after: Policy
    ) -> list[float]:
        """Probability, by prompt, that the new answer is the better one."""
        assert self.judge is not None
        if not self.judge.comparative:
            return _wins(*(self.scores(self.judge, "judged", p) for p in (after, before)))
        both = [
            {**a, "responses": [a["responses"][0], b["responses"][0]]}
            for a, b in zip(new, old, strict=True)
        ]
        judged = self.judge.score(self.run, f"{name}/judged", given_rows(both))
        first, second = zip(*(row["scores"] for row in judged), strict=True)
        return list(first) if self.judge.probability else _wins(first, second)

    def _kl(self, name: str, policy: Policy, other: Policy, which: str) -> Any:
        if policy.digest == other.digest:
            return Estimate(0.0, 0.0, 0.0)
        answers, folder = self.answers(policy), self.name(policy, name)
        own = log_likelihoods(self.run, f"{folder}/likelihood/own", policy, answers)
        against = log_likelihoods(self.run, f"{folder}/likelihood/{which}", other, answers)
        ratios = [a["logps"][0] - b["logps"][0] for a, b in zip(own, against, strict=True)]
        return self._mean(ratios)

    def _mean(self, values: Sequence[float]) -> Estimate:
        return mean(values, self.resamples)


def _wins(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """1 where the first score is higher, 0 where the second is, 0.5 for a tie."""
    return [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(first, second, strict=True)]


def describe_pairs(pairs: Rows, filtered: Rows | None = None, resamples: int = RESAMPLES) -> Row:
    """Pairs made and dropped and why, and how much longer the chosen responses are.

    Args:
        pairs: Of :func:`fastpref.rounds.pairs.build_pairs`.
        filtered: Of :func:`fastpref.rounds.pairs.filter_samples`.
        resamples: Of the bootstrap.

    Returns:
        ``prompts``, ``made``, ``dropped`` (prompts by reason), ``faults`` (responses by reason),
        and where any was made ``gap_tokens`` and ``gap_characters`` of the pairs (mean of chosen
        minus rejected, ``[value, low, high]``).
    """
    dropped: dict[str, int] = {}
    faults: dict[str, int] = {}
    for row in pairs:
        if row.get("dropped"):
            dropped[row["dropped"]] = dropped.get(row["dropped"], 0) + 1
    for row in filtered or []:
        for why, count in row["faults"].items():
            faults[why] = faults.get(why, 0) + count
    good = made(pairs)
    found: Row = {"prompts": len(pairs), "made": len(good), "dropped": dropped, "faults": faults}
    for unit, suffix in (("tokens", "_ids"), ("characters", "")) if good else ():
        chosen, rejected = (
            [len(row[side + suffix]) for row in good] for side in ("chosen", "rejected")
        )
        found[f"gap_{unit}"] = gap(chosen, rejected, resamples)
    return found


def trained_on(policy: Policy, resamples: int = RESAMPLES) -> Row:
    """What a policy was trained on, whatever the recipe: its training stage wrote it down.

    Args:
        policy: Of :func:`fastpref.rounds.training.train`.
        resamples: Of the bootstrap.

    Returns:
        ``pairs``, ``left_out`` (rows given and not trained on, by reason), ``notes`` (rows by what
        was done to them), and ``gap_tokens`` and ``gap_characters`` (mean of chosen minus rejected
        responses as they were cut, ``[value, low, high]``).

    Raises:
        FileNotFoundError: an earlier version trained it, which wrote nothing down.
    """
    path = Path(policy.path).with_name(PAIRS)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: an earlier version trained this policy. Remove {path.parent} to "
            "train it again, or give another run_dir"
        )
    stored = json.loads(path.read_text(encoding="utf-8"))
    found: Row = {name: stored[name] for name in ("left_out", "notes")}
    found["pairs"] = len(stored["tokens"]["chosen"])
    for unit in ("tokens", "characters"):
        found[f"gap_{unit}"] = gap(**stored[unit], resamples=resamples, paired=stored["paired"])
    return found
