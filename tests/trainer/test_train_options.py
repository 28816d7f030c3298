"""``fastpref train``: mixtures, rows set apart, and functions by name, by flags and from YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpref import PreferenceConfig, PreferenceTrainer, cli
from fastpref.options import parse
from fastpref.train import load_data


@pytest.fixture
def given(make: Any, tokenizer: Any, tmp_path: Path) -> dict[str, str]:
    """Paths of a model and two files of pairs."""
    make.model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    make.pairs(8, 0).to_json(tmp_path / "a.jsonl")
    make.pairs(12, 1).to_parquet(tmp_path / "b.parquet")
    return {name: str(tmp_path / name) for name in ("model", "a.jsonl", "b.parquet")}


def flags(given: dict[str, str], tmp_path: Path, *more: str) -> list[str]:
    quiet = ["--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no", "--logging_steps", "1"]
    return ["--model", given["model"], "--output_dir", str(tmp_path / "run"), *quiet, *more]


@pytest.mark.parametrize("how", ["flags", "yaml"])
def test_a_mixture_with_rows_set_apart(given: dict[str, str], tmp_path: Path, how: str) -> None:
    parts = [{"path": given["a.jsonl"], "fraction": 0.5}]
    parts += [{"path": given["b.parquet"], "fraction": 0.5}]
    options = {"datasets": parts, "test_split_size": 4, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"max_steps": 1}
    more = [f"--{k}={json.dumps(v) if k == 'datasets' else v}" for k, v in options.items()]
    if how == "yaml":
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
        more = ["--config", str(tmp_path / "run.yaml")]
    data, _, config = parse(flags(given, tmp_path, *more))
    train, test = load_data(data, config)
    rows = [row["prompt"] for part in (train, test) for row in part]
    expected = [json.loads(line)["prompt"] for line in Path(given["a.jsonl"]).open()]
    assert (len(train), len(test), len(set(rows))) == (12, 4, 16)
    assert set(expected) <= set(rows)
    assert cli.main(["train", *flags(given, tmp_path, *more)]) == 0
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert any("eval_rewards/margins" in log for log in logs)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    again = parse(["--config", str(tmp_path / "run" / "config.yaml")])[0]
    assert (saved["test_split_size"], again.datasets) == (4.0, data.datasets)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--datasets", "[]"], "expected a list of parts with a path each"),
        (["--datasets", '[{"path": "x"}]', "--dataset", "y"], "--dataset and --datasets are given"),
        (["--dataset", "{a}", "--test_split_size", "2"], "set eval_strategy too"),
        (["--datasets", '[{{"path": "{a}"}}]', "--eval_strategy", "epoch"], "by test_split_size"),
        ([], "--dataset is missing"),
        (["--dataset", "{a}", "--corrupt_context", "x.py:f"], "names no function"),
        (["--dataset", "{a}", "--corrupt_context", "math:sqrt"], "has no effect on dpo: drop it"),
    ],
)
def test_what_does_not_go_together(
    given: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    said: str,
) -> None:
    more = [word.format(a=given["a.jsonl"]) if "{a}" in word else word for word in more]
    assert cli.main(["train", *flags(given, tmp_path, *more)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("how", ["flags", "yaml"])
def test_a_corrupted_context_by_name(
    make: Any, tokenizer: Any, given: dict[str, str], tmp_path: Path, how: str
) -> None:
    (tmp_path / "contexts.py").write_text("def halved(ids):\n    return ids[: len(ids) // 2]\n")
    name = f"{tmp_path / 'contexts.py'}:halved"
    more = ["--dataset", given["a.jsonl"], "--max_steps", "2", "--loss", "mdpo"]
    more += ["--per_device_train_batch_size", "4", "--learning_rate", "1e-3"]
    if how == "yaml":
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"corrupt_context": name}))
        more += ["--config", str(tmp_path / "run.yaml")]
    else:
        more += ["--corrupt_context", name]
    assert cli.main(["train", *flags(given, tmp_path, *more)]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    trainer = PreferenceTrainer(
        make.model(),
        args=PreferenceConfig(
            output_dir=str(tmp_path / "other"),
            loss_type="mdpo",
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=make.pairs(8, 0),
        processing_class=tokenizer,
        corrupt_context=lambda ids: ids[: len(ids) // 2],
    )
    trainer.train()
    expected = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert [json.loads(line)["loss"] for line in lines[:2]] == pytest.approx(expected, abs=1e-6)
