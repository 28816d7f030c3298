"""``fastpref train`` and ``fastpref demo`` from end to end, on a tiny random model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fastpref import cli
from fastpref.demo import tiny_model, tiny_pairs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model and its tokenizer."""
    path = tmp_path_factory.mktemp("a model")
    for part in tiny_model():
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of preference pairs."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs(24)))
    return path


def flags(model: Path, pairs: Path, output: Path, *more: str) -> list[str]:
    return [
        *("train", "--model", str(model), "--dataset", str(pairs), "--output_dir", str(output)),
        *("--max_steps", "4", "--logging_steps", "1", "--per_device_train_batch_size", "4"),
        *("--learning_rate", "1e-3", "--use_cpu", "true", "--gradient_checkpointing", "false"),
        *("--disable_tqdm", "true", "--dataloader_pin_memory", "false", *more),
    ]


def losses_of(output: Path) -> list[float]:
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_leaves_model_metrics_config_and_curves(model, pairs, tmp_path, capsys):
    output = tmp_path / "run"
    assert cli.main(flags(model, pairs, output, "--loss", "dpo", "--beta", "0.5")) == 0
    capsys.readouterr()
    names = {path.name for path in output.iterdir()}
    assert {"model.safetensors", "metrics.jsonl", "config.yaml", "curves.png"} <= names
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["model_name_or_path"] == str(model)
    assert (config["beta"], config["max_steps"]) == (0.5, 4)
    found = losses_of(output)
    assert len(found) == 4
    assert found[0] == pytest.approx(0.693147, abs=1e-6)
    assert found[-1] < found[0]

    again = tmp_path / "again"
    assert (
        cli.main(["train", "--config", str(output / "config.yaml"), "--output_dir", str(again)])
        == 0
    )
    assert losses_of(again) == found


def test_lora_and_evaluation_by_flags(model, pairs, tmp_path, capsys):
    output = tmp_path / "run"
    more = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]
    more += ["--eval_strategy", "steps", "--eval_steps", "4", "--dataset_test_split", "train[:8]"]
    assert cli.main(flags(model, pairs, output, *more, "--loss", "simpo")) == 0
    capsys.readouterr()
    adapter = json.loads((output / "adapter_config.json").read_text())
    assert (adapter["r"], sorted(adapter["target_modules"])) == (4, ["q_proj", "v_proj"])
    assert '"eval_rewards/margins"' in (output / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--dataset", "nowhere/pairs.jsonl"], "nowhere/pairs.jsonl"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--loss", "dpoo"], "dpo"),
        (["--dataset_train_split", "train["], "train"),
    ],
)
def test_mistakes_are_named(model, pairs, tmp_path, capsys, more, said):
    assert cli.main(flags(model, pairs, tmp_path / "run", *more)) == 2
    err = capsys.readouterr().err
    last = err[err.index("fastpref train: error:") :]
    assert said in last
    assert "Traceback" not in err


def test_an_interrupted_run_says_how_it_goes_on_and_does(model, pairs, tmp_path):
    output = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "fastpref",
        *flags(model, pairs, output, "--max_steps", "4000"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    deadline = time.monotonic() + 90
    metrics = output / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    step = int(re.search(r"stopped after step (\d+) and saved", err)[1])
    assert (output / f"checkpoint-{step}" / "model.safetensors").exists()
    assert (output / "curves.png").exists()
    resume = re.search(
        r"^  .*fastpref (train --config (\S+) --resume_from_checkpoint true)$", err, re.M
    )
    assert cli.main([*resume[1].split(), "--max_steps", str(step + 2)]) == 0
    rows = list(map(json.loads, metrics.read_text().splitlines()))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, step + 3))


def test_the_demo_runs_offline_and_reports_both_rows(tmp_path, capsys):
    run = tmp_path / "a run"
    assert cli.main(["demo", "--tiny", "--steps", "5", "--cpu", "--run-dir", str(run)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^before +0\.500  \[0\.500, 0\.500\] +0\.000  \[0\.000, 0\.000\]", out, re.M)
    summary = json.loads((run / "summary.json").read_text())
    after = summary["after"]["rewards/margins"]
    assert f"{after['mean']:.3f}  [{after['low']:.3f}, {after['high']:.3f}]" in out
    assert after["low"] > 0  # the made-up preference is easy
    assert summary["after"]["rewards/accuracies"]["mean"] > 0.9
    assert summary["loss"]["first"] == pytest.approx(0.693147, abs=1e-6)
    assert f"backend {summary['backend']}" in out
    assert "fastpref train --model" in out
    assert {"curves.png", "metrics.jsonl", "config.yaml"} <= {path.name for path in run.iterdir()}


def test_demo_options_are_checked(capsys):
    assert cli.main(["demo", "--tiny", "--steps", "0"]) == 2
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
