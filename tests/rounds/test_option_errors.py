"""Options that cannot be meant are told before anything is done; a run's config is the run."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tqdm.auto import tqdm

from fastpref import rounds
from fastpref.rounds.command import main, read_config
from fastpref.rounds.examples import read_examples
from fastpref.rounds.replay import replay_mix
from fastpref.rounds.run import Run, given_rows, policy_of
from fastpref.rounds.sampling import Sampling, sample

Options = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"n": "4"}, TypeError, r"sampling.n: expected int, got '4' \(str\)"),
        ({"n": 2.5}, TypeError, r"sampling.n: expected int, got 2.5 \(float\)"),
        ({"n": True}, TypeError, "sampling.n: expected int, got True"),
        ({"max_new_tokens": 64.5}, TypeError, "sampling.max_new_tokens: expected int, got 64.5"),
        ({"temperature": "1"}, TypeError, "sampling.temperature: expected float, got '1'"),
        ({"n": 0}, ValueError, "sampling.n must be at least 1, got 0"),
    ],
)
def test_sampling_of_the_wrong_type_is_told(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rounds.Sampling(**given)
    assert rounds.Sampling(temperature=1).temperature == 1


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"unfinished": "false"}, TypeError, r"filter.unfinished: expected bool, got 'false'"),
        ({"min_characters": "4"}, TypeError, "filter.min_characters: expected int, got '4'"),
        ({"max_characters": 9.5}, TypeError, r"filter.max_characters: expected int \| None, got"),
        ({"min_responses": 0}, ValueError, "filter.min_responses must be at least 1, got 0"),
        ({"min_characters": -1}, ValueError, "filter.min_characters must be at least 0, got -1"),
        (
            {"min_characters": 5, "max_characters": 4},
            ValueError,
            "filter.max_characters must be at least 5, got 4",
        ),
    ],
)
def test_a_filter_of_the_wrong_type_is_told(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rounds.Filter(**given)


def length(prompt: str, response: str) -> float:
    return float(len(response))


@pytest.mark.parametrize(
    ("recipe", "given", "error", "message"),
    [
        ("ILRDPO", {"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ("ILRDPO", {"max_prompt_tokens": 0}, ValueError, "max_prompt_tokens must be at least 1"),
        ("ILRDPO", {"sampling": {"n": "4"}}, TypeError, "sampling.n: expected int, got '4'"),
        ("ILRDPO", {"filter": {"unfinished": "no"}}, TypeError, "filter.unfinished: expected bool"),
        ("ILRDPO", {"rule": "bestworst"}, ValueError, "rule must be one of best_worst, best_rando"),
        ("ILRDPO", {"beta": "0.1"}, TypeError, r"beta: expected float, got '0.1' \(str\)"),
        ("ILRDPO", {"training": [1]}, TypeError, r"training: expected dict\[str, Any\], got \[1\]"),
        ("SDPO", {"fractions": 0.5}, TypeError, r"fractions: expected Sequence\[float\], got 0.5"),
        ("SDPO", {"fractions": ["0.5"]}, TypeError, r"fractions: expected Sequence\[float\], got"),
        ("SDPO", {"stages": "fractions", "fractions": []}, ValueError, "fractions must be above 0"),
        ("SDPO", {"loss": "dpoo"}, ValueError, "no loss is called 'dpoo'; did you mean 'dpo'"),
        ("DICE", {"loss": "dpoo"}, ValueError, "no loss is called 'dpoo'; did you mean 'dpo'"),
        ("DICE", {"convention": "rnd"}, ValueError, "convention must be 'round' or 'truncate'"),
        ("DICE", {"gamma": 1.5}, ValueError, "gamma is a share: expected 0 to 1, got 1.5"),
        ("Active", {"loss": "dpoo"}, ValueError, "no loss is called 'dpoo'"),
        ("Active", {"targets": 64}, TypeError, r"targets: expected Sequence\[int\], got 64"),
        ("Active", {"targets": [8, 16.5]}, TypeError, r"targets: expected Sequence\[int\], got"),
        ("DropoutNTP", {"loss": "mpoo"}, ValueError, "no loss is called 'mpoo'"),
        ("DropoutNTP", {"loss_args": {"wq": 1.0}}, TypeError, "'wq'"),
        ("SPO", {"dimensions": "safe"}, TypeError, r"dimensions: expected list\[str\] \| None"),
    ],
)
def test_an_option_that_cannot_be_meant_is_told_at_once(
    options: Options, recipe: str, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    needed = {
        "ILRDPO": {"scorer": length},
        "DICE": {"initial_reference": "base"},
        "Active": {"oracle": length},
        "DropoutNTP": {"context": ["<d>", "</d>"]},
    }
    own = {"dataset": [{"prompt": "w1"}], "training": {"max_length": 512}}
    with pytest.raises(error, match=message):
        getattr(rounds, recipe)(**{**options(**own), **needed.get(recipe, {}), **given})


@pytest.mark.parametrize("package", ["scipy", "sklearn"])
def test_a_missing_package_is_told_before_a_round(
    options: Options, make: Any, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    modules = {"scipy": "scipy.stats", "sklearn": "sklearn.linear_model"}
    monkeypatch.setitem(sys.modules, modules[package], None)
    recipe = rounds.SDPO(**options(dataset=make.pairs(8), stages="fractions"))
    with pytest.raises(ModuleNotFoundError, match=r'pip install "fastpref\[rounds\]"') as raised:
        recipe.run()
    assert str(raised.value.name).startswith(package)
    assert not Path(options()["run_dir"]).exists()


def test_a_mix_of_no_pairs_says_what_to_do() -> None:
    pairs = [{"prompt": number} for number in range(4)]
    with pytest.raises(ValueError, match=r"gamma=0.9 of 4 offline and 4 generated pairs leaves no"):
        replay_mix(pairs, pairs, 0.9, seed=0)
    assert len(replay_mix(pairs, pairs, 1.0, seed=0)) == 4


class AtOnce(tqdm):  # type: ignore[misc]
    """A bar that does not wait for the work to take long."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **{**given, "delay": 0})


def test_reading_a_dataset_shows_a_bar(
    make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_examples(make.pairs(5), make.tokenizer(), ("chosen",))
    assert "reading" not in capsys.readouterr().err  # quick work needs no bar
    monkeypatch.setattr("tqdm.auto.tqdm", AtOnce)
    read_examples(make.pairs(5), make.tokenizer(), ("chosen",))
    assert "reading the dataset: 100%" in capsys.readouterr().err


def test_a_dataset_without_rows_is_not_one_of_long_prompts(make: Any) -> None:
    from datasets import Dataset

    none = Dataset.from_dict({"prompt": []})
    with pytest.raises(ValueError, match=r"^the dataset has no rows$"):
        read_examples(none, make.tokenizer(), max_prompt_tokens=4)
    with pytest.raises(ValueError, match="no prompt of at most 1 tokens: raise max_prompt_tokens"):
        read_examples(make.prompts(3), make.tokenizer(), max_prompt_tokens=1)


def test_a_prompt_of_one_token_among_others_is_no_padding(
    make: Any,
    policy: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    run = Run(tmp_path, tokenizer=make.tokenizer(), batch_size=6)
    prompts = given_rows(
        [
            {"id": number, "prompt": prompt, "prompt_ids": run.tokenizer(prompt)["input_ids"]}
            for number, prompt in enumerate(["w1 w2 w3 w4", "w5"])
        ]
    )
    sample(run, "samples", policy_of(policy), prompts, Sampling(n=3, max_new_tokens=4))
    assert "right-padding" not in caplog.text


def test_the_config_of_a_run_is_the_run(options: Options, make: Any, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make.pairs(12)))
    (tmp_path / "reward.py").write_text("def w3(prompt, response): return float(len(response))\n")
    given = options(
        dataset=str(data),
        scorer=f"{tmp_path / 'reward.py'}:w3",
        sampling=rounds.Sampling(n=3, max_new_tokens=6),
        filter=rounds.Filter(unfinished=True),
        rounds=1,
        training={"max_steps": 1},
    )
    rounds.ILRDPO(**given).run()
    folder = Path(given["run_dir"])
    files = {path: path.stat().st_mtime_ns for path in folder.glob("round-*/**/*.*")}
    assert main(["ilr_dpo", "--config", str(folder / "config.yaml")]) == 0
    assert files == {path: path.stat().st_mtime_ns for path in folder.glob("round-*/**/*.*")}
    assert not list(folder.glob("replaced"))


def test_a_config_names_what_yaml_cannot_hold(options: Options, make: Any, tmp_path: Path) -> None:
    given = options(
        dataset=make.pairs(12), stages="fractions", fractions=(0.5, 0.5), judge=rounds.Length()
    )
    recipe = rounds.SDPO(**given)
    recipe._write_config(tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith("# given in Python, and nothing that YAML can hold: judge\n")
    assert read_config(tmp_path / "config.yaml")["fractions"] == [0.5, 0.5]
    assert "redo" not in yaml.safe_load(text)


def test_the_command_names_the_front_of_a_sweep(
    options: Options, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make.pairs(12)))
    given = options(
        dataset=str(data),
        margins={"short": {"kind": "length"}},
        weights=[0.5],
        training={"max_steps": 1},
    )
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(given))
    assert main(["modpo", "--config", str(tmp_path / "x.yaml")]) == 0
    folder = Path(given["run_dir"])
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert last == (
        f"the policies are in {folder}/w-*, one for each weighting; their front is in "
        f"{folder}/front.md"
    )
    assert (folder / "front.md").exists()
