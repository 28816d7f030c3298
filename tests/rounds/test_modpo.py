"""MODPO: its reductions, margins that are scored once, the front, and bad input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastpref import rounds
from fastpref.rounds.examples import read_examples, split_prompts
from fastpref.rounds.front import optimal, write_front
from fastpref.rounds.pairs import pair_row
from fastpref.rounds.recipes import modpo as recipe
from fastpref.rounds.run import Policy, policy_of, read_jsonl

Options = Callable[..., dict[str, Any]]


def modpo(options: Options, make: Any, **given: Any) -> Any:
    plain = {"dataset": make.pairs(12), "held_out": 0, "margins": {"length": {"kind": "length"}}}
    return rounds.MODPO(**options(**{**plain, **given}))


def examples(make: Any) -> Any:
    return read_examples(make.pairs(12), make.tokenizer(), ("chosen", "rejected"))


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return load_file(Path(policy.path) / "model.safetensors")


@pytest.mark.parametrize(
    ("w", "loss"),
    [([1, 0], rounds.Loss("dpo", 0.1)), ([1, 0.05], rounds.Loss("lr_dpo", 0.1, {"alpha": 0.05}))],
)
def test_with_these_weights_it_is_another_loss(
    options: Options, make: Any, tmp_path: Path, w: list[float], loss: Any
) -> None:
    """The margin -tokens weighs nothing, or is LR-DPO's price on length: the same weights."""
    made = modpo(options, make, weights=[w]).run()
    start = policy_of(options()["model"])
    plain = rounds.train(
        rounds.Run(folder=tmp_path / "plain", tokenizer=make.tokenizer()),
        "train",
        [pair_row(row, 0, 1) for row in examples(make)],
        start=start,
        reference=start,
        loss=loss,
        training=rounds.Training(options()["training"]),
    )
    own = weights(plain)
    assert all(torch.equal(value, own[name]) for name, value in weights(made.policy).items())


def test_three_objectives_make_a_front(options: Options, make: Any) -> None:
    """Each policy begins at its weighted margin; the front holds what the answers are worth."""
    made = modpo(
        options,
        make,
        margins={"length": {"kind": "length"}, "gold": make.reward},
        reward=lambda prompt, response: float(len(response)),
        objective="talk",
        weights=[[0.6, 0.3, 0.1], [1, 0, 0]],
        held_out=4,
        training={"per_device_train_batch_size": 12, "max_steps": 1},
    ).run()
    trained = split_prompts(examples(make), 4, 0)[0]
    gaps = torch.tensor(
        [
            0.3 * (len(b["ids"]) - len(a["ids"]))
            + 0.1 * (make.reward(None, a["text"]) - make.reward(None, b["text"]))
            for a, b in (row["responses"] for row in trained)
        ],
        dtype=torch.float64,
    )
    expected = float(-torch.nn.functional.logsigmoid(-gaps / 0.6).mean())
    folder = Path(made.policies["w-0.6-0.3-0.1"].path).parent
    logged = read_jsonl(folder / "trainer" / "metrics.jsonl")
    assert logged[0]["loss"] == pytest.approx(expected, abs=2e-6)

    rows = read_jsonl(made.folder / "front.jsonl")
    assert [row["policy"] for row in rows] == ["start", "w-0.6-0.3-0.1", "w-1-0-0"]
    for row, name in zip(rows, ("round-0", "w-0.6-0.3-0.1", "w-1-0-0")):
        answers = read_jsonl(made.folder / name / "answers" / "rows.jsonl")
        texts = [one["responses"][0] for one in answers]
        worth = {
            "talk": [len(one["text"]) for one in texts],
            "length": [-len(one["ids"]) for one in texts],
            "gold": [make.reward(None, one["text"]) for one in texts],
        }
        for objective, values in worth.items():
            assert row["objectives"][objective][0] == pytest.approx(sum(values) / 4)
    assert rows[0]["kl"] == [0, 0, 0]
    text = (made.folder / "front.md").read_text()
    heads = text.splitlines()[0].split(" | ")
    assert heads[:4] == ["| policy", "talk [95 %]", "length [95 %]", "gold [95 %]"]
    assert heads[4].startswith("win rate (")
    assert heads[5:] == ["length-controlled", "KL, nats", "tokens", "front |"]
    tokens = [[len(r["ids"]) for r in row["responses"]] for row in trained]
    gap = sum(a - b for a, b in tokens) / len(tokens)
    assert all(row["trained_on"]["gap_tokens"][0] == pytest.approx(gap) for row in rows[1:])
    assert f"trained on: {len(tokens)} pairs\nchosen - rejected, tokens: {gap:+.1f} [" in text
    assert (made.folder / "front.png").stat().st_size > 1000
    assert not list(made.folder.glob("*.tmp"))


def test_a_sweep_scores_once_and_goes_on(
    options: Options, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[Any] = Counter()

    def gold(prompt: Any, response: str) -> float:
        calls[prompt, response] += 1
        return float(response.split().count("w3"))

    def sweep(weights: list[Any], **given: Any) -> Any:
        margin = {"gold": rounds.Function(gold)}
        return modpo(options, make, margins=margin, weights=weights, held_out=4, **given)

    trained: list[str] = []
    train = recipe.train

    def stop(run: Any, name: str, *arguments: Any, **given: Any) -> Any:
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(name)
        return train(run, name, *arguments, **given)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            sweep([0.5, 0.9]).run()
    on_pairs = {(r["prompt"], r[side]) for r in make.pairs(12) for side in ("chosen", "rejected")}
    assert sum(pair in calls for pair in on_pairs) == 16  # of the 8 pairs that are trained on
    before = Counter(calls)
    made = sweep([0.5, 0.9]).run()
    assert all(calls[pair] == before[pair] for pair in on_pairs)
    first, last, _ = made.reports  # without a reward, the held-out pairs measure the objective
    assert first["objectives"]["preference"] == [0.5, 0.5, 0.5]
    new, old = (
        read_jsonl(made.folder / name / "held-out" / "rows.jsonl")
        for name in ("w-0.5-0.5", "round-0")
    )
    gaps = [a["logps"][0] - a["logps"][1] - b["logps"][0] + b["logps"][1] for a, b in zip(new, old)]
    assert last["objectives"]["preference"][0] == sum(gap > 0 for gap in gaps) / 4
    total = calls.total()
    assert sweep([0.5, 0.9]).run().reports == made.reports
    assert calls.total() == total
    more = sweep([0.5, [0.7, 0.3], 0.9]).run()
    assert list(more.policies) == ["w-0.5-0.5", "w-0.7-0.3", "w-0.9-0.1"]
    assert more.policies["w-0.9-0.1"] == made.policies["w-0.9-0.1"]
    assert all(calls[pair] == before[pair] for pair in on_pairs)
    with pytest.raises(rounds.ChangedError, match=r"w-0.5-0.5/train (?s:.)*beta: 0.1 -> 0.2"):
        sweep([0.5], beta=0.2).run()


def test_a_point_is_on_the_front_unless_another_is_nowhere_worse() -> None:
    points = [(0, 3), (1, 2), (1, 1), (2, 0), (1, 2), (0, 0)]
    assert optimal(points) == [True, True, False, True, True, False]
    assert optimal([(1.0,), (2.0,)]) == [False, True]


def test_a_front_is_drawn_of_one_row(tmp_path: Path) -> None:
    row = {
        "policy": "start",
        "objectives": {"a": [1.0, 0.5, 1.5], "b": [0.0, 0.0, 0.0]},
        "kl": [0.0, 0.0, 0.0],
        "tokens": [7.5, 7.0, 8.0],
    }
    text = write_front(tmp_path, [row], ["a note"])
    cells = "1.000 [0.500, 1.500] | 0.000 [0.000, 0.000] | 0.000 [0.000, 0.000] | 7.5 | * |"
    assert f"| start | {cells}" in text.splitlines()
    assert text.splitlines()[-1] == "a note"


def nan(prompt: Any, response: str) -> float:
    return float("nan")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": [0.01]}, "weights: the trained objective's is 0.01 in 0.01; below 0.05"),
        ({"weights": [[0, 1]]}, r"is 0 in \[0, 1\]; .*train on their pairs"),
        ({"weights": [1.5]}, r"expected \[trained objective, length\], or a number up to 1, got"),
        ({"weights": [[0.5, 0.3, 0.2]]}, r"expected \[trained objective, length\]"),
        ({"weights": [0.5, [0.5, 0.5]]}, "one or more, none twice"),
        ({"weights": []}, "one or more, none twice"),
        ({"weights": [[0.5, float("nan")]]}, "finite numbers of at least 0"),
        ({"weights": ["half"]}, "numbers of at least 0, got 'half'"),
        ({"objective": "length"}, "the trained objective's own name"),
        ({"margins": {"polite": {"kind": "ranker", "function": nan}}}, "polite: a ranker compares"),
        ({"margins": {"polite": nan}}, "score nan to prompt .*must be a finite number"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(
    options: Options, make: Any, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        modpo(options, make, **given).run()
    assert not list((tmp_path / "run").glob("w-*"))


def test_a_scorer_in_the_place_of_named_ones_is_told(options: Options, make: Any) -> None:
    with pytest.raises(TypeError, match=r"by its name, such as {length: {kind: length}}, got"):
        modpo(options, make, margins={"kind": "length"})
