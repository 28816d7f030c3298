"""sDPO: the preference data in stages; each stage's reference is the model of the stage before.

Kim et al. 2024, arXiv:2403.19270.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastpref.rounds.examples import by_name, load_dataset, one_each, read_examples
from fastpref.rounds.policies import log_likelihoods
from fastpref.rounds.recipe import Recipe
from fastpref.rounds.run import Policy, Row, Rows, Run, given_rows
from fastpref.rounds.training import Loss, first_loss, train

Chunk = tuple[str, Rows]
STORED = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(kw_only=True)
class SDPO(Recipe):
    """Stepwise DPO. One stage is DPO.

    Attributes:
        dataset: Pairs. By source: a mapping of names to datasets, in the order of the stages, or a
            dataset with the column ``source_column``.
        stages: ``"source"``: a stage for each source, in the order given; ``"easy_to_hard"``: by
            the start model's reward accuracy on each, highest first; ``"fractions"``: one dataset,
            shuffled and cut by ``fractions``.
        fractions: Shares of the data, in the order of the stages; they sum to 1.
        source_column: Where a row says its source.
        loss: Of :mod:`fastpref.losses`.
        probe: Number of held-out pairs that gamma_ref is measured on, and whose prompts are
            answered; gamma_ref is of pairs trained on where none are held out, and the report says
            so.
    """

    stages: str = "source"
    fractions: Sequence[float] = (0.5, 0.5)
    source_column: str = "source"
    loss: str = "dpo"
    probe: int = 64

    def __post_init__(self) -> None:
        """See :class:`Recipe`."""
        super().__post_init__()
        if self.stages not in ("source", "easy_to_hard", "fractions"):
            raise ValueError(
                f"stages must be 'source', 'easy_to_hard' or 'fractions', got {self.stages!r}"
            )
        if self.stages == "fractions" and (
            min(self.fractions, default=0) <= 0 or abs(sum(self.fractions) - 1) > 1e-6
        ):
            raise ValueError(f"fractions must be above 0 and sum to 1, got {self.fractions}")
        if self.stages == "fractions" and isinstance(self.dataset, Mapping):
            raise ValueError(
                "stages='fractions' cuts one dataset, and dataset is a mapping: give one, or say "
                "stages='source' for a stage of each"
            )
        if self.probe < 1:
            raise ValueError(f"probe must be at least 1, got {self.probe}")
        self._loss = Loss(self.loss, self.beta)

    def play(self, run: Run, start: Policy) -> Policy:
        """See :meth:`Recipe.play`."""
        chunks, held_out = self._chunks(run, start)
        probed = held_out or [row for _, own in chunks for row in own]
        probe = read_examples(probed[: self.probe], run.tokenizer, ("chosen", "rejected"))
        evaluator = self.evaluator(run, start, one_each(probe) if held_out else None)
        policy = start
        for number, (source, rows) in enumerate(chunks, 1):
            name = f"round-{number}"
            gamma = gammas(run, f"{name}/gamma", policy, probe)
            new = train(
                run,
                f"{name}/train",
                rows.rows,
                start=policy,
                reference=policy,
                loss=self._loss,
                training=self._training,
            )
            shown: Row = {
                "source": source,
                "pairs": len(rows),
                "gamma_ref": sum(gamma) / len(gamma),
                "accuracy of the reference": accuracy(gamma),
            }
            if not held_out:
                shown["gamma_ref is of"] = "training pairs"
            begun = first_loss(new)
            if begun is not None:
                shown["first loss"] = begun
            self.report(run, number, evaluator, policy, new, data=rows, training=shown)
            policy = self.made_policy(name, new)
        return policy

    def _chunks(self, run: Run, start: Policy) -> tuple[list[Chunk], list[Row]]:
        """The stages' rows, and rows held out."""
        chunks = self._sources(run)
        held_out: list[Row] = []
        if self.eval_dataset is not None:
            held_out = self._short(run, list(load_dataset(self.eval_dataset))).rows
        elif self.held_out:
            chunks, held_out = hold_out(chunks, self.held_out, self.seed)
        if self.stages == "easy_to_hard":
            chunks = self._by_accuracy(run, start, chunks)
        return chunks, held_out

    def _sources(self, run: Run) -> list[Chunk]:
        if self.stages == "fractions":
            parts = cut(list(load_dataset(self.dataset)), self.fractions, self.seed)
            named = [(str(number), rows) for number, rows in enumerate(parts, 1)]
        else:
            named = list(by_name(self.dataset, self.source_column).items())
        return [(name, self._short(run, rows)) for name, rows in named]

    def _short(self, run: Run, rows: Sequence[Row]) -> Rows:
        """The rows whose prompts are not too long, without what is stored of a reference.

        A stage's reference is the model before it; numbers stored with the data are another's.
        """
        found = read_examples(rows, run.tokenizer, max_prompt_tokens=self.max_prompt_tokens)
        kept = [{k: v for k, v in own["row"].items() if k not in STORED} for own in found]
        return given_rows(kept, found.left_out)

    def _by_accuracy(self, run: Run, start: Policy, chunks: list[Chunk]) -> list[Chunk]:
        found = []
        for number, (_, rows) in enumerate(chunks, 1):
            examples = read_examples(rows.rows, run.tokenizer, ("chosen", "rejected"))
            found.append(accuracy(gammas(run, f"accuracy/source-{number}", start, examples)))
        return [chunks[i] for i in easy_to_hard(found)]


def gammas(run: Run, name: str, policy: Policy, pairs: Rows) -> list[float]:
    """``log pi(chosen) - log pi(rejected)`` of pairs under a policy, nats, as a stage."""
    scored = log_likelihoods(run, name, policy, pairs)
    return [row["logps"][0] - row["logps"][1] for row in scored]


def accuracy(gamma: Sequence[float]) -> float:
    """Share of pairs whose chosen response is the more likely one."""
    return sum(value > 0 for value in gamma) / len(gamma)


def easy_to_hard(accuracies: Sequence[float]) -> list[int]:
    """Numbers of sources by falling accuracy; ties as they come."""
    return sorted(range(len(accuracies)), key=lambda i: -accuracies[i])


def cut(rows: Sequence[Row], fractions: Sequence[float], seed: int) -> list[list[Row]]:
    """The rows, shuffled, in parts of these shares; every row once.

    Raises:
        ValueError: a part would be empty.
    """
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    bounds = [0]
    for k in range(len(fractions)):
        bounds.append(round(len(shuffled) * sum(fractions[: k + 1])))
    parts = [shuffled[bounds[k] : bounds[k + 1]] for k in range(len(fractions))]
    if not all(parts):
        raise ValueError(
            f"{len(shuffled)} rows cannot be cut by {tuple(fractions)}: a stage is empty"
        )
    return parts


def hold_out(chunks: Sequence[Chunk], count: int, seed: int) -> tuple[list[Chunk], list[Row]]:
    """The stages without the prompts of ``count`` rows drawn from all of them, and those rows.

    Raises:
        ValueError: a stage would be left empty.
    """
    rows = [row for _, own in chunks for row in own]
    held_out = random.Random(seed).sample(rows, min(count, len(rows)))
    prompts = {repr(row["prompt"]) for row in held_out}
    left = [
        (name, given_rows([r for r in own if repr(r["prompt"]) not in prompts], own.left_out))
        for name, own in chunks
    ]
    if not all(len(own) for _, own in left):
        raise ValueError(f"held_out={count} leaves a stage without pairs: lower it")
    return left, held_out
