"""Reduced to a base case, a recipe is another: the same pairs end with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fastpref import rounds
from fastpref.rounds.examples import read_examples
from fastpref.rounds.pairs import pair_row
from fastpref.rounds.run import Policy, policy_of, read_jsonl

Options = Callable[..., dict[str, Any]]
SAMPLED = {"sampling": {"n": 4, "max_new_tokens": 6}, "filter": {"unfinished": True}, "held_out": 0}
STEPS = {
    "per_device_train_batch_size": 16,  # one batch of all pairs: their order does not matter
    "optim": "sgd",  # under Adam an entry whose gradient is rounding moves as far as any
    "learning_rate": 1.0,
}


def apart(one: Policy, other: Policy) -> float:
    """The largest difference of two policies' weights."""
    a, b = (load_file(Path(policy.path) / "model.safetensors") for policy in (one, other))
    return max(float((value - b[name]).abs().max()) for name, value in a.items())


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_jsonl(folder / name / "rows.jsonl")


def pairs(folder: Path) -> list[dict[str, Any]]:
    return [row for row in table(folder, "pairs") if not row.get("dropped")]


def offline(make: Any, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = read_examples(data, make.tokenizer(), ("chosen", "rejected"))
    return [pair_row(row, 0, 1) for row in found]


@pytest.fixture
def dpo(options: Options, make: Any, tmp_path: Path) -> Callable[..., Policy]:
    """Plain DPO of a policy on pairs, the policy its own reference."""

    def train(rows: list[dict[str, Any]], start: Policy, beta: float) -> Policy:
        folder = tmp_path / f"plain-{len(list(tmp_path.iterdir()))}"
        run = rounds.Run(folder, make.tokenizer())
        training = rounds.Training(options(training=STEPS)["training"])
        given: Any = {"start": start, "reference": start, "training": training}
        return rounds.train(run, "train", rows, loss=rounds.Loss("dpo", beta), **given)

    return train


def test_selm_without_alpha_is_iterative_dpo(
    options: Options, make: Any, dpo: Callable[..., Policy]
) -> None:
    def selm(alpha: float, number: int) -> Any:
        given = options(
            dataset=make.pairs(16),
            scorer=make.reward,
            sampling={"max_new_tokens": 6},
            filter={"unfinished": True},
            rounds=number,
            prompts_per_round=8,
            held_out=0,
            training=STEPS,
            alpha=alpha,
            beta=0.1,
        )
        return rounds.SELM(**{**given, "run_dir": f"{given['run_dir']}-{alpha}"}).run()

    made, start = selm(0.0, 2), policy_of(options()["model"])
    for number in (1, 2):
        plain = dpo(pairs(made.folder / f"round-{number}"), start, 0.1)
        start = made.policies[f"round-{number}"]
        assert apart(start, plain) < 1e-6
    explored = selm(1.0, 1)  # on the same pairs in its first round
    assert pairs(explored.folder / "round-1") == pairs(made.folder / "round-1")
    assert apart(explored.policies["round-1"], made.policies["round-1"]) > 1e-4


@pytest.mark.parametrize("gamma", [0, 1])
def test_dice_at_the_ends_of_gamma_is_dpo_on_one_kind_of_pairs(
    gamma: int, options: Options, make: Any, other_policy: str, dpo: Callable[..., Policy]
) -> None:
    data = make.pairs(12)
    given = options(
        dataset=data, initial_reference=other_policy, rounds=1, training=STEPS, **SAMPLED
    )
    given["filter"] = {"unfinished": True, "min_responses": 2}
    made = rounds.DICE(**given, gamma=gamma).run()
    generated = pairs(made.folder / "round-1")
    kinds = [generated, offline(make, data)]
    ends = [dpo(rows, policy_of(given["model"]), 0.1) for rows in kinds]
    assert made.reports[0]["trained_on"]["pairs"] == len(kinds[gamma])
    assert apart(made.policy, ends[gamma]) < 1e-6
    assert apart(made.policy, ends[1 - gamma]) > 1e-4


def test_dice_without_a_penalty_ranks_by_the_implicit_reward_whatever_beta(
    options: Options, make: Any, other_policy: str, tmp_path: Path
) -> None:
    found = []
    for beta in (0.1, 0.7):
        given = options(
            dataset=make.pairs(12),
            initial_reference=other_policy,
            rounds=1,
            penalty=0,
            beta=beta,
            **SAMPLED,
        )
        given["filter"] = {"unfinished": True, "min_responses": 2}
        given["run_dir"] = str(tmp_path / str(beta))
        found.append(rounds.DICE(**given).run().folder / "round-1")
    assert pairs(found[0]) == pairs(found[1])
    scores = {row["id"]: row["scores"] for row in table(found[0], "scores/difference")}
    for row in pairs(found[0]):
        own = scores[row["id"]]
        assert (row["chosen_score"], row["rejected_score"]) == (max(own), min(own))


def same(prompt: Any, response: str) -> float:
    return 3.0


def test_modpo_of_margins_that_say_nothing_is_dpo_with_beta_over_the_weight(
    options: Options, make: Any, dpo: Callable[..., Policy]
) -> None:
    data = make.pairs(12)
    given = options(dataset=data, held_out=0, training=STEPS, weights=[[0.5, 0.5]])
    made = rounds.MODPO(**given, margins={"same": same}).run()
    plain = dpo(offline(make, data), policy_of(given["model"]), 0.1 / 0.5)
    assert apart(made.policy, plain) < 1e-6
