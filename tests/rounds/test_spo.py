"""SPO: its margins against plain float64, its reductions, and what it does with its input."""

from __future__ import annotations

import itertools
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastpref import rounds
from fastpref.rounds import training
from fastpref.rounds.examples import read_examples
from fastpref.rounds.pairs import pair_row
from fastpref.rounds.recipes.spo import hold_out
from fastpref.rounds.run import INPUTS, Policy, given_rows, read_jsonl

NAMES = ("kind", "short", "brief")
TRAINING = {
    "per_device_train_batch_size": 12,  # one batch of all pairs: their order does not matter
    "max_steps": 2,
    "optim": "sgd",  # under Adam an entry whose gradient is rounding moves as far as any
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "max_length": 64,
}
ALPHA = {"kind": 0.5, "short": 0.2}
Start = Callable[..., Any]


@pytest.fixture(scope="module")
def start(policy: str, make: Any) -> Start:
    """A recipe over two dimensions, or those given."""

    def build(folder: Path, names: tuple[str, ...] = NAMES[:2], **given: Any) -> Any:
        plain = {
            "model": policy,
            "run_dir": str(folder),
            "dataset": {name: make.pairs(12, seed=NAMES.index(name)) for name in names},
            "alpha": ALPHA,
            "held_out": 0,
            "resamples": 20,
            "use_cpu": True,
            "training": TRAINING,
        }
        return rounds.SPO(**{**plain, **given})

    return build


@pytest.fixture(scope="module")
def kept(make: Any) -> dict[str, Any]:
    """Held-out pairs by dimension."""
    return {name: make.pairs(5, seed=20 + NAMES.index(name)) for name in NAMES}


@pytest.fixture(scope="module")
def whole(start: Start, kept: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three rounds."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return start(folder, NAMES, eval_dataset=kept).run()


@pytest.fixture
def begun(whole: Any, tmp_path: Path) -> Path:
    """A run directory with the first round of ``whole``, for runs that differ from the second."""
    shutil.copytree(whole.folder / "round-1" / "train", tmp_path / "run" / "round-1" / "train")
    return tmp_path / "run"


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return load_file(Path(policy.path) / "model.safetensors")


def apart(one: Policy, other: Policy) -> float:
    """The largest difference of two policies' weights."""
    own = weights(other)
    return max(float((value - own[name]).abs().max()) for name, value in weights(one).items())


def pairs(make: Any, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = read_examples(data, make.tokenizer(), ("chosen", "rejected"))
    return [pair_row(row, 0, 1) for row in found]


@torch.no_grad()
def margins(policy: str, rows: list[dict[str, Any]]) -> torch.Tensor:
    """``log pi(chosen) - log pi(rejected)`` by the model's own logits in float64."""
    model = AutoModelForCausalLM.from_pretrained(policy).double().eval()

    def logp(prompt: list[int], answer: list[int]) -> torch.Tensor:
        logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        return logps[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).sum()

    return torch.stack(
        [
            logp(r["prompt_ids"], r["chosen_ids"]) - logp(r["prompt_ids"], r["rejected_ids"])
            for r in rows
        ]
    )


def first_loss(policy: Policy) -> float:
    """The logged loss of the first step, where the policy is its own reference."""
    logged = read_jsonl(Path(policy.path).parent / "trainer" / "metrics.jsonl")
    assert logged[0]["rewards/margins"] == pytest.approx(0, abs=2e-6)
    return float(logged[0]["loss"])


def steps(policy: str, made: Any, make: Any, number: int) -> list[torch.Tensor]:
    """What each round before ``number`` added to the margins of its pairs, nats."""
    paths = [policy, *(made.policies[f"round-{k}"].path for k in range(1, number))]
    rows = pairs(make, make.pairs(12, seed=number - 1))
    own = [margins(path, rows) for path in paths]
    return [after - before for before, after in itertools.pairwise(own)]


def loss_at(learned: torch.Tensor) -> float:
    """The loss where the policy is the reference, and earlier rounds learned this margin."""
    found = float(-torch.nn.functional.logsigmoid(-learned).mean())
    assert abs(found - math.log(2)) > 1e-3
    return found


def test_a_round_begins_at_what_the_earlier_ones_learned(
    whole: Any, policy: str, make: Any
) -> None:
    assert first_loss(whole.policies["round-1"]) == pytest.approx(math.log(2), abs=1e-6)
    (kind,) = steps(policy, whole, make, 2)
    found = first_loss(whole.policies["round-2"])
    assert found == pytest.approx(loss_at(0.5 * 0.1 * kind), abs=2e-6)
    kind, short = steps(policy, whole, make, 3)
    learned = 0.5 * 0.1 * kind + 0.2 * (0.1 * short - 0.5 * 0.1 * kind)
    found = first_loss(whole.policies["round-3"])
    assert found == pytest.approx(loss_at(learned), abs=2e-6)


def test_the_two_coefficient_form_begins_with_dpo(
    start: Start, begun: Path, whole: Any, policy: str, make: Any
) -> None:
    made = start(begun, current_coef=0.05, prior_coef={"kind": 0.3}).run()
    assert made.policies["round-1"].digest == whole.policies["round-1"].digest
    (kind,) = steps(policy, made, make, 2)
    found = first_loss(made.policies["round-2"])
    assert found == pytest.approx(loss_at(0.3 * kind), abs=2e-6)


def test_without_alpha_a_round_is_dpo_against_the_last_rounds_policy(
    start: Start, begun: Path, whole: Any, make: Any, tmp_path: Path
) -> None:
    made = start(begun, alpha=0).run()
    first = made.policies["round-1"]
    plain = rounds.train(
        rounds.Run(folder=tmp_path / "plain", tokenizer=make.tokenizer()),
        "round-2/train",
        pairs(make, make.pairs(12, seed=1)),
        start=first,
        reference=first,
        loss=rounds.Loss("dpo", 0.1),
        training=rounds.Training(TRAINING),
    )
    assert apart(made.policy, plain) < 1e-6
    assert apart(made.policy, first) > 1e-2
    assert apart(made.policy, whole.policies["round-2"]) > 1e-4


def test_the_second_round_is_modpo_with_the_firsts_implicit_reward(
    whole: Any, policy: str, make: Any, tmp_path: Path
) -> None:
    first = whole.policies["round-1"]
    reward = {"kind": "implicit", "policy": first.path, "reference": policy, "beta": 0.1}
    own = rounds.MODPO(
        model=first.path,
        run_dir=str(tmp_path / "modpo"),
        dataset=make.pairs(12, seed=1),
        margins={"kind": reward},
        weights=[[1, 0.5]],
        held_out=0,
        use_cpu=True,
        training=TRAINING,
    ).run()
    assert apart(own.policy, whole.policies["round-2"]) < 1e-6


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob(INPUTS)}


def test_a_stopped_run_goes_on_and_a_changed_alpha_keeps_the_first_round(
    start: Start, begun: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = training._write_policy

    def stop(*arguments: Any) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_write_policy", stop)
        with pytest.raises(KeyboardInterrupt):
            start(begun).run()
    before = {k: v for k, v in stamps(begun).items() if ".partial" not in k}
    assert any("round-2/sums/round-1" in path for path in before)
    made = start(begun).run()
    after = stamps(begun)
    assert before.items() <= after.items()
    assert apart(made.policy, whole.policies["round-2"]) == 0
    assert start(begun).run().policy == made.policy
    with pytest.raises(rounds.ChangedError, match=r"round-2/train (?s:.)*alpha.*0.5.*0.1"):
        start(begun, alpha=0.1).run()
    assert stamps(begun) == after


def test_each_round_reports_every_dimension_on_pairs_kept_out(
    whole: Any, kept: Any, policy: str, make: Any
) -> None:
    assert [report["training"]["dimension"] for report in whole.reports] == list(NAMES)
    assert all({"kl", "tokens"} <= set(report["held_out"]) for report in whole.reports)
    for report, made in zip(whole.reports, whole.policies.values()):
        for name, data in kept.items():
            rows = pairs(make, data)
            own = margins(made.path, rows) - margins(policy, rows)
            shown = report["training"]
            assert shown[f"accuracy, {name}"][0] == float((own > 0).double().mean())
            reward = float(0.1 * own.mean())
            assert shown[f"reward margin, {name}"][0] == pytest.approx(reward, abs=2e-6)
    assert (whole.folder / "round-3" / "report" / "report.png").stat().st_size > 1000
    config = yaml.safe_load((whole.folder / "config.yaml").read_text())
    assert list(config["dataset"]) == list(NAMES)  # the order of the rounds is kept


def test_a_column_says_the_dimension_and_an_option_the_order(
    start: Start, begun: Path, whole: Any, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The first round is the one of ``whole``; a pair that training would cut is left out."""
    long = {**make.pairs(1)[0], "chosen": " w1" * 70}
    column = [
        {**row, "about": name}
        for name, data in (("short", make.pairs(12, seed=1)), ("kind", [*make.pairs(12), long]))
        for row in data
    ]
    given = {"dimension_column": "about", "dimensions": ["kind", "short"]}
    with caplog.at_level(logging.WARNING, "fastpref"):
        made = start(begun, dataset=column, **given).run()
    assert "1 pairs are longer than training reads" in caplog.text
    assert made.policy.digest == whole.policies["round-2"].digest
    cut = {**TRAINING, "max_length": 4}
    with pytest.raises(ValueError, match=r"all 12 pairs are longer .* raise training.max_length"):
        start(begun, training=cut).run()


def test_a_held_out_prompt_is_out_of_all_dimensions() -> None:
    def rows(*prompts: int) -> Any:
        return given_rows([{"prompt": p, "side": side} for p in prompts for side in "ab"])

    given = {"x": rows(*range(10)), "y": rows(*range(5, 17))}
    left, out = hold_out(given, 3, seed=0)
    kept = {row["prompt"] for part in out.values() for row in part}
    for name, part in given.items():
        assert len({row["prompt"] for row in out[name]}) >= 3
        assert not kept & {row["prompt"] for row in left[name]}
        assert sorted(map(repr, (*left[name], *out[name]))) == sorted(map(repr, part))
    with pytest.raises(ValueError, match=r"held_out=6 leaves \d of 10 different prompts of 'x'"):
        hold_out(given, 6, seed=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dimensions": ["kind", "brief"]}, "'kind', 'short', the rounds .*: 'brief' is in one"),
        ({"dimensions": ["kind"]}, "'short' is in one of them only"),
        ({"eval_dataset": {"kind": [{"prompt": "w1"}]}}, "eval_dataset has .*'short' is in one"),
        ({"alpha": {"kind": 0.5, "kindd": 0.1}}, "expected a number for 'kind', .*'kindd': 0.1"),
        (
            {"alpha": {"short": 0.5}},
            "alpha by dimension: expected a number for 'kind', whose rounds are not the last",
        ),
        (
            {"dataset": [{"prompt": "w1", "chosen": "w2"}]},
            "row 0 .* no 'dimension': give a mapping",
        ),
        ({"held_out": 7}, "held_out=7 leaves 5 of 12 different prompts of 'kind'"),
        ({"alpha": -0.1}, "alpha must be finite and at least 0, got -0.1"),
        ({"alpha": float("nan")}, "alpha must be finite and at least 0, got nan"),
        ({"current_coef": 0.05}, "give both, or neither"),
        (
            {"current_coef": 0.0, "prior_coef": 0.1},
            "current_coef must be finite and above 0, got 0.0",
        ),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(
    start: Start, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start(tmp_path / "run", **given).run()
    assert not list((tmp_path / "run").glob("round-*"))


def test_an_alpha_that_is_no_number_is_told(start: Start, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="alpha: expected a number, or one by dimension"):
        start(tmp_path, alpha="much")
