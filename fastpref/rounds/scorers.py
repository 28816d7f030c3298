"""Scorers by kind, and from a config: a function, a length, a model, the implicit reward, a sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

from fastpref.named import find
from fastpref.rounds.people import People
from fastpref.rounds.policies import check_ids, log_likelihoods
from fastpref.rounds.reward_models import Ranker, RewardModel
from fastpref.rounds.run import Policy, Row, Rows, Run, given_rows, policy_of
from fastpref.rounds.scorer import ByFunction, Score, Scorer, distinct, spread


@dataclass
class Function(ByFunction):
    """A Python function of prompt and response, ``(prompt, response) -> float``.

    Attributes:
        function: The function, or where it is: ``"module:name"``, ``"file.py:name"``. The prompt it
            gets is the dataset's, a string or messages; the response is a string. Its source is
            part of what the scores depend on; what it reads from elsewhere is not.
    """

    kind = "function"
    function: Any

    def describe(self) -> dict[str, Any]:
        """Its name and a digest of its source."""
        return {"kind": self.kind, **self._described}

    @property
    def name(self) -> str:
        """The function's."""
        return self._described["function"]

    def open(self, run: Run) -> Score:
        """The function, response by response."""
        function = find(self.function)
        return lambda groups: [
            [float(function(group["prompt"], r["text"])) for r in group["responses"]]
            for group in groups
        ]


@dataclass
class Length(Scorer):
    """The number of a response's tokens (or characters), times ``per_unit``: -1 likes them short.

    Attributes:
        unit: ``"tokens"`` or ``"characters"``.
        per_unit: Reward of each.
    """

    kind = "length"
    unit: str = "tokens"
    per_unit: float = -1.0

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an unknown unit."""
        if self.unit not in ("tokens", "characters"):
            raise ValueError(f"length: unit must be 'tokens' or 'characters', got {self.unit!r}")

    @property
    def reads(self) -> str:
        """Texts, or token ids: equal texts may have been made of different numbers of them."""
        return "ids" if self.unit == "tokens" else "text"

    def describe(self) -> dict[str, Any]:
        """Unit and factor."""
        return {"kind": self.kind, "unit": self.unit, "per_unit": self.per_unit}

    def open(self, run: Run) -> Score:
        """Lengths."""
        return lambda groups: [
            [self.per_unit * len(r[self.reads]) for r in group["responses"]] for group in groups
        ]


@dataclass
class Implicit(Scorer):
    """What a policy has learned: ``beta * (log pi(y|x) - log pi_ref(y|x))``, by the fused head.

    Attributes:
        policy: Path or hub name, or a :class:`~fastpref.rounds.run.Policy`.
        reference: The policy it was trained from.
        beta: Factor; the ranking does not depend on it.
    """

    kind = "implicit"
    policy: Any
    reference: Any
    beta: float = 1.0

    def describe(self) -> dict[str, Any]:
        """Both policies and beta."""
        policies = {name: _policy(getattr(self, name)).digest for name in ("policy", "reference")}
        return {"kind": self.kind, **policies, "beta": self.beta}

    @property
    def name(self) -> str:
        """The implicit reward."""
        return "implicit reward"

    @property
    def reads(self) -> str:
        """Token ids."""
        return "ids"

    def make(self, run: Run, name: str, groups: Rows) -> Rows:
        """See :meth:`Scorer.make`; one policy is in memory at a time.

        Raises:
            ValueError: a policy has another vocabulary than the run's tokenizer.
        """
        for policy in (self.policy, self.reference):
            check_ids(run, _policy(policy))
        different, places = distinct(groups.rows, self.reads)
        shown = given_rows(different)
        new = log_likelihoods(run, f"{name}/policy", _policy(self.policy), shown)
        old = new
        if _policy(self.reference).digest != _policy(self.policy).digest:
            old = log_likelihoods(run, f"{name}/reference", _policy(self.reference), shown)

        def subtract() -> list[Row]:
            found = [
                [self.beta * (a - b) for a, b in zip(p["logps"], q["logps"], strict=True)]
                for p, q in zip(new, old, strict=True)
            ]
            scores = spread(found, places)
            return [self._checked(row, own) for row, own in zip(groups, scores, strict=True)]

        inputs = {
            "responses": groups.digest,
            "policy": new.digest,
            "reference": old.digest,
            "beta": self.beta,
        }
        return run.table(f"{name}/difference", inputs, subtract)


@dataclass
class Weighted(Scorer):
    """A weighted sum of scorers, each a stage of its own: other weights score nothing anew.

    Attributes:
        parts: Scorers and their weights.
    """

    kind = "weighted"
    parts: Sequence[tuple[Scorer, float]]

    @property
    def comparative(self) -> bool:
        """Whether a part is."""
        return any(scorer.comparative for scorer, _ in self.parts)

    def describe(self) -> dict[str, Any]:
        """The parts."""
        return {"kind": self.kind, "parts": [[s.describe(), w] for s, w in self.parts]}

    def own(self) -> Any:
        """Those of the parts."""
        return [scorer.own() for scorer, _ in self.parts]

    @property
    def name(self) -> str:
        """The sum, written out."""
        return " + ".join(f"{weight:g} {scorer.name}" for scorer, weight in self.parts)

    def make(self, run: Run, name: str, groups: Rows) -> Rows:
        """See :meth:`Scorer.make`."""
        parts = [
            scorer.score(run, f"{name}/part-{number}", groups)
            for number, (scorer, _) in enumerate(self.parts, 1)
        ]
        weights = [weight for _, weight in self.parts]

        def add() -> list[Row]:
            by_group = zip(*(part.rows for part in parts), strict=True)
            return [
                {
                    "id": group[0]["id"],
                    "scores": [
                        sum(w * value for w, value in zip(weights, values, strict=True))
                        for values in zip(*(row["scores"] for row in group), strict=True)
                    ],
                }
                for group in by_group
            ]

        inputs = {"parts": [part.digest for part in parts], "weights": weights}
        return run.table(f"{name}/sum", inputs, add)


KINDS: dict[str, type[Any]] = {
    kind.kind: kind for kind in (Function, Length, RewardModel, Ranker, Implicit, People)
}
"""Scorers by their name in a config."""


def make_scorer(given: Any) -> Scorer:
    """The scorer that a config or a caller names.

    Args:
        given: A :class:`Scorer`; a function, or ``"module:name"``; ``{"kind": ..., options}``; or a
            list of these, whose dicts may have a ``weight``, 1 without: their weighted sum.

    Raises:
        ValueError: the kind is unknown, an option is missing or unknown, or a weight no number.
        TypeError: ``given`` is nothing of the kind.
    """
    if isinstance(given, Scorer):
        return given
    if callable(given) or (isinstance(given, str) and ":" in given):
        return Function(given)
    if isinstance(given, (list, tuple)) and given:
        return Weighted([_part(one) for one in given])
    if not isinstance(given, Mapping):
        raise TypeError(
            f"scorer: expected a function, 'module:name', or kind and options, got {given!r}"
        )
    options = dict(given)
    kind = KINDS.get(str(options.pop("kind", None)))
    if kind is None:
        raise ValueError(f"scorer: kind must be one of {', '.join(KINDS)}, got {given!r}")
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"scorer {kind.kind!r} has no option {unknown[0]!r}; it has {known}")
    try:
        return kind(**options)  # type: ignore[no-any-return]
    except TypeError as error:
        raise ValueError(f"scorer {kind.kind!r}: {error}") from error


def _part(given: Any) -> tuple[Scorer, float]:
    """A part of a weighted sum, and its weight."""
    if not isinstance(given, Mapping):
        return make_scorer(given), 1.0
    options = dict(given)
    weight = options.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not isfinite(weight):
        raise ValueError(f"scorer: weight must be a finite number, got {weight!r} in {given!r}")
    return make_scorer(options), float(weight)


def _policy(given: Any) -> Policy:
    return given if isinstance(given, Policy) else policy_of(str(given))
