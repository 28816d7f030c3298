"""The command line: what it prints, what it refuses and how, without training."""

from __future__ import annotations

import builtins
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastpref import cli, losses
from fastpref.plots import draw_curves, read_metrics, series

ROOT = Path(__file__).parents[1]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def shell(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
        check=False,
    )


def test_help_names_every_command_and_imports_no_package():
    done = shell(
        "import sys; from fastpref.cli import main; status = main(['--help'])\n"
        "assert not {'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules), sys.modules\n"
        "raise SystemExit(status)"
    )
    assert done.returncode == 0, done.stderr
    for command in cli.COMMANDS:
        assert f"  {command} " in done.stdout


def test_no_arguments_is_help(capsys):
    assert run(capsys) == run(capsys, "--help")


def test_version(capsys):
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert run(capsys, "--version")[:2] == (0, f"fastpref {version[1]}\n")


def test_an_unknown_command_names_the_nearest(capsys):
    status, out, err = run(capsys, "trian")
    assert (status, out) == (2, "")
    assert "'trian'" in err
    assert "'train'" in err


def test_losses_lists_the_registry(capsys):
    status, out, _ = run(capsys, "losses")
    assert status == 0
    for name in losses.names():
        assert f"| [{name}](#{name}) |" in out


def test_losses_describes_one_by_its_alias(capsys):
    status, out, _ = run(capsys, "losses", "sigmoid")
    assert status == 0
    page = out.strip()
    assert page.startswith("### dpo\n")
    assert page in (ROOT / "docs" / "losses.md").read_text()
    assert losses.get("dpo").entry.formula in out
    assert "label_smoothing" in out


def test_an_error_is_one_line_unless_asked(capsys, monkeypatch):
    monkeypatch.delenv("FASTPREF_DEBUG", raising=False)
    status, out, err = run(capsys, "losses", "sigmod")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("fastpref losses: error: ")
    assert "sigmoid" in err
    with pytest.raises(ValueError, match="sigmod"):
        cli.main(["losses", "sigmod", "--traceback"])
    monkeypatch.setenv("FASTPREF_DEBUG", "1")
    with pytest.raises(ValueError, match="sigmod"):
        cli.main(["losses", "sigmod"])


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyError("x"), 2, "KeyError: 'x' (--traceback shows where)"),
        (RuntimeError("no compiler"), 2, "error: no compiler"),
        (ModuleNotFoundError("", name="peft.tuners"), 2, 'pip install "fastpref[train]"'),
        (ModuleNotFoundError("", name="gguf"), 2, 'pip install "fastpref[demo]"'),
        (ModuleNotFoundError("No module named 'x'", name="x"), 2, "No module named 'x'"),
    ],
)
def test_what_a_command_raises_becomes_words_and_a_status(
    capsys, monkeypatch, raised, status, said
):
    def fail(argv):
        raise raised

    monkeypatch.delenv("FASTPREF_DEBUG", raising=False)
    monkeypatch.setattr("fastpref.catalogue.main", fail)
    found, _, err = run(capsys, "losses")
    assert found == status
    assert said in err
    assert "Traceback" not in err


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"set -o pipefail; {shlex.quote(sys.executable)} -m fastpref losses | head -1",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout.startswith("### Pairs")
    assert done.stderr == ""


def test_train_without_its_packages_says_what_to_install(capsys, monkeypatch):
    real = builtins.__import__

    def without_transformers(name, *args, **kwargs):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "fastpref.train", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_transformers)
    status, _, err = run(capsys, "train", "--model", "m", "--dataset", "d")
    assert status == 2
    assert 'transformers is not installed; this adds it: pip install "fastpref[train]"' in err


MINIMAL = ("--model", "m", "--dataset", "d.jsonl", "--use_cpu")


def parse(*argv: str):
    from fastpref.options import parse

    return parse(argv)


def test_train_flags_have_trl_names_and_short_ones():
    data, model, config = parse(
        *MINIMAL, "--loss", "ipo", "--beta=0.2", "--use_peft", "--lora_r", "4", "--lora-alpha", "8"
    )
    assert (data.dataset_name, model.model_name_or_path) == ("d.jsonl", "m")
    assert (config.loss_type, config.beta) == (["ipo"], 0.2)
    assert (model.use_peft, model.lora_r, model.lora_alpha) == (True, 4, 8)
    long = parse("--model_name_or_path=m", "--dataset_name=d.jsonl", "--use_cpu", "--loss_type=ipo")
    assert (long[0], long[2].loss_type) == (data, ["ipo"])


def test_flags_win_over_the_config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndataset: d\nuse_cpu: true\nlearning_rate: 5e-7\nbeta: 0.3\nloss: [ipo, sft]\n"
    )
    _, _, config = parse("--config", str(path), "--beta", "0.5")
    assert config.learning_rate == 5e-7  # YAML reads 5e-7 as text
    assert (config.beta, config.loss_type) == (0.5, ["ipo", "sft"])


def test_a_resolved_config_gives_the_same_run_again(tmp_path):
    from fastpref.recorder import resolved

    options = parse(
        *MINIMAL,
        "--loss",
        "dpo",
        "sft",
        "--loss_weights",
        "1",
        "0.5",
        "--output_dir",
        str(tmp_path),
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(resolved(*options)))
    again = parse("--config", str(path))
    assert resolved(*again) == resolved(*options)
    assert again[2].loss_weights == [1.0, 0.5]


def test_a_resolved_config_holds_no_secret(tmp_path):
    from fastpref.recorder import resolved

    options = parse(*MINIMAL, "--hub_token", "secret", "--hub_model_id", "me/mine")
    assert options[2].hub_token == "secret"
    found = resolved(*options)
    assert found["hub_model_id"] == "me/mine"
    assert "hub_token" not in found
    assert "secret" not in repr(found)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((*MINIMAL, "--betta", "1"), r"'betta'.*'beta'"),
        ((*MINIMAL, "--learning-rte=1"), r"'learning_rte'.*'learning_rate'"),
        ((*MINIMAL, "--beta", "much"), r"--beta.*'much'"),
        ((*MINIMAL, "--truncation_mode", "middle"), r"truncation.mode.*'middle'"),
        ((*MINIMAL, "true", "stray"), "'stray'"),
        (("--dataset", "d", "--use_cpu"), "--model is missing"),
        (("--model", "m", "--use_cpu"), "--dataset is missing"),
        ((*MINIMAL, "--loss", "dpo", "--loss_weights", "1", "2"), "loss_weights has 2 numbers"),
    ],
)
def test_train_refuses_what_it_cannot_do(capsys, argv, said):
    status, _, err = run(capsys, "train", *argv)
    assert status == 2
    assert re.search(said, err), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: m\nbetta: 1\n", r"'betta'.*'beta'"),
        ("model: [\n", "is not YAML"),
        ("- model\n", "expected lines of the form"),
        ("model: m\ndataset: d\nbeta: much\n", "--beta.*'much'"),
    ],
)
def test_train_refuses_a_bad_config_file(capsys, tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    status, _, err = run(capsys, "train", "--config", str(path))
    assert status == 2
    assert re.search(said, err), err


def test_a_config_file_that_is_not_there_is_named(capsys):
    status, _, err = run(capsys, "train", "--config", "/no/such.yaml")
    assert status == 2
    assert "/no/such.yaml" in err


ROWS = [{"step": s, "loss": 0.7 - 0.01 * s, "rewards/margins": 0.1 * s} for s in range(1, 6)]


def test_curves_are_drawn_from_what_was_logged(tmp_path):
    path = tmp_path / "curves.png"
    assert draw_curves([*ROWS, {"step": 5, "train_runtime": 3.0}], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_no_known_key_draws_nothing(tmp_path):
    assert not draw_curves([{"step": 1, "else": 2.0}, {"epoch": 1.0}], tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []


def test_metrics_survive_a_cut_line_and_a_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    again = {"step": 3, "loss": 9.0}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, again]) + '{"step": 6, "lo')
    rows = read_metrics(path)
    assert rows == [*ROWS, again]
    steps, values = series(rows, "loss")
    assert steps == [1, 2, 3, 4, 5]
    assert values[2] == 9.0
