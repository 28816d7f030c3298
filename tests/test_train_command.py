"""``fastpref train`` and ``fastpref demo`` from end to end, on a tiny random model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from fastpref import bench, cli
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
        (["--model", "nosuch/model"], "nosuch/model: no such folder, and the hub could not be rea"),
        (["--loss", "dpoo"], "dpo"),
        (["--dataset_train_split", "train["], "train"),
    ],
)
def test_mistakes_are_named(model, pairs, tmp_path, capsys, monkeypatch, more, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(flags(model, pairs, tmp_path / "run", *more)) == 2
    err = capsys.readouterr().err
    last = err[err.index("fastpref train: error:") :]
    assert said in last
    assert "Traceback" not in err


def spoil(model: Path, folder: Path, how: str) -> Path:
    """A copy of the model with something wrong."""
    copy = Path(shutil.copytree(model, folder / how))
    weights = copy / "model.safetensors"
    if how == "cut short":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "pickled":
        weights.rename(copy / "pytorch_model.bin")
    elif how == "no model":
        (copy / "config.json").unlink()
    elif how == "no tokenizer":
        for path in copy.glob("tokenizer*"):
            path.unlink()
    return copy


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut short", r"/cut short: a file of weights is damaged, or was cut short .*download"),
        ("pickled", r"/pickled: the weights are a pickle .*'use_safetensors': False"),
        ("no model", r"/no model is no model: expected a folder with config\.json"),
        ("no tokenizer", r"no tokenizer could be loaded from .*/no tokenizer"),
    ],
)
def test_a_spoilt_model_is_named(model, pairs, tmp_path, capsys, how, said):
    assert cli.main(flags(spoil(model, tmp_path, how), pairs, tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert re.search(f"fastpref train: error: .*{said}", err), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--dtype", "float99"], "dtype='float99': expected float32, bfloat16"),
        (["--loss_args", "tau=1"], "loss_args='tau=1': expected a JSON object in braces"),
        (["--num_train_epochs", "-1", "--max_steps", "-1"], "train nothing: make one of them"),
        (["--output_dir", "{file}"], "nothing can be written to the run's directory '{file}'"),
        (["--output_dir", "{file}/run"], "written to the run's directory '{file}/run': Not a dir"),
        (["--backend", "cuda"], "backend='cuda' is not available"),
        (["--gradient_accumulation_steps", "0"], "accumulation_steps must be at least 1, got 0"),
        (["--max_tokens_per_batch", "0"], "max_tokens_per_batch must be at least 1, got 0"),
        (["--per_device_train_batch_size", "0"], "train_batch_size must be at least 1, got 0"),
        (["--pad_to_multiple_of", "x"], "pad_to_multiple_of='x': expected a whole number"),
        (["--max_bad_rows", "-1"], "max_bad_rows must be at least 0, got -1"),
        (["--dataset_config", "main"], "{file} is on disk and has no configurations"),
    ],
)
def test_wrong_options_are_named(model, pairs, tmp_path, capsys, more, said):
    file = str(pairs)
    more = [argument.format(file=file) for argument in more]
    assert cli.main(flags(model, pairs, tmp_path / "run", *more)) == 2
    err = capsys.readouterr().err
    assert f"{said.format(file=file)}" in err[err.index("fastpref train: error:") :]
    assert "Traceback" not in err


def test_evaluating_on_the_training_rows_is_said(model, pairs, tmp_path, caplog):
    evaluate = ["--eval_strategy", "steps", "--eval_steps", "4", "--max_steps", "1"]
    for split, said in ((["--dataset_test_split", "train[:4]"], False), ([], True)):
        assert cli.main(flags(model, pairs, tmp_path / "run", *evaluate, *split)) == 0
        assert ("a single file is every split" in caplog.text) == said


def test_labelled_responses_ask_for_a_loss_of_their_own(model, tmp_path, capsys):
    rows = tmp_path / "labelled.jsonl"
    rows.write_text(json.dumps({"prompt": "p", "completion": "c", "label": True}))
    assert cli.main(flags(model, rows, tmp_path / "run")) == 2
    assert "choose a loss for those, such as kto" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
def test_a_disk_that_fills_up_leaves_what_was_saved(model, pairs, tmp_path, capsys):
    """A limit on the size of a file stands in for it: the weights fit, the optimiser does not."""
    import resource

    output = tmp_path / "run"
    assert cli.main(flags(model, pairs, output, "--save_steps", "2", "--max_steps", "2")) == 0
    before = (output / "checkpoint-2" / "optimizer.pt").read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))
    try:
        more = ["--save_steps", "2", "--resume_from_checkpoint", "true"]
        assert cli.main(flags(model, pairs, output, *more)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "error: checkpoint-4 could not be saved in" in capsys.readouterr().err
    assert (output / "checkpoint-2" / "optimizer.pt").read_bytes() == before
    assert cli.main(flags(model, pairs, output, "--resume_from_checkpoint", "true")) == 0
    assert len(losses_of(output)) == 4


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
    assert summary["pairs"] == {"train": 20, "held_out": 40}
    assert "trained on 20 others" in out
    after = summary["after"]["rewards/margins"]
    assert f"{after['mean']:.3f}  [{after['low']:.3f}, {after['high']:.3f}]" in out
    assert after["low"] > 0  # the made-up preference is easy
    assert summary["after"]["rewards/accuracies"]["mean"] > 0.9
    assert summary["loss"]["first"] == pytest.approx(0.693147, abs=1e-6)
    assert f"ran on          {summary['device']}, backend {summary['backend']}" in out
    assert summary["command"] == f"fastpref demo --tiny --steps 5 --cpu --run-dir '{run}'"
    assert {"device", "measured", "versions", "commit", "command"} <= set(bench.FIELDS)
    assert {"device", "measured", "versions", "commit", "command"} <= set(summary)
    assert summary["versions"]["torch"] == torch.__version__
    assert "fastpref train --model" in out
    assert {"curves.png", "metrics.jsonl", "config.yaml"} <= {path.name for path in run.iterdir()}


def test_demo_options_are_checked(capsys):
    assert cli.main(["demo", "--tiny", "--steps", "0"]) == 2
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
