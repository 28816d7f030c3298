"""`benchmarks/step.py` runs, with a model and pairs of one's own, and keeps rows it believes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("trl")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "step.py"


@pytest.fixture(scope="module")
def step() -> Any:
    spec = importlib.util.spec_from_file_location("step", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_whole_steps_beside_trl(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    make.model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = make.pairs(6)
    pairs.to_json(tmp_path / "pairs.jsonl")
    options = ["--pairs", "pairs.jsonl", "--model", "model", "--rounds", "2", "--batch", "2"]
    systems = ["--systems", "trl", "fastpref", "fastpref, cached reference"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options, *systems, "--commit", "abc", "--out", "rows.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {row["system"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["trl", "fastpref", "fastpref, cached reference"]
    trl, ours, cached = rows.values()
    assert max(row["loss_difference"] for row in rows.values()) < 1e-3
    # padding and the second copy of the prompt; then the reference's pass
    tokens = [row["backbone_tokens_per_step"] for row in (trl, ours, cached)]
    assert tokens[0] > tokens[1] > tokens[2]
    assert 2 * tokens[2] == pytest.approx(tokens[1], abs=1)
    assert trl["pairs_per_second_over_trl"] == 1.0
    # the head: of a padded row every token but the last; of a packed one its responses, which end
    # with a token more
    rows_of = [row["head_rows_per_step"] for row in (trl, ours, cached)]
    forwards, sequences = 2, 4
    assert rows_of[0] == tokens[0] - forwards * sequences
    timed = pairs.select(range(2, 6))
    responses = [len(text.split()) + 1 for key in ("chosen", "rejected") for text in timed[key]]
    assert rows_of[1] == forwards * sum(responses) / 2
    assert 2 * rows_of[2] == rows_of[1]
    # the pass over all pairs is told where there is one
    assert trl["reference_pass_seconds"] is ours["reference_pass_pairs"] is None
    assert cached["reference_pass_pairs"] == 6
    assert 0 < cached["reference_pass_seconds"] < cached["seconds_to_construct"]
    assert len(set(trl["losses"])) == 3  # steps were taken
    assert {row["commit"] for row in rows.values()} == {"abc"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--pairs", "pairs.jsonl"], "--pairs needs --model FOLDER"),
        (["--model", "some/folder"], "without --pairs, one of small-backbone, smollm2-135m"),
        (["--rounds", "1"], "--rounds must be at least 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    step: Any, given: list[str], message: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["step.py", *given])
    with pytest.raises(SystemExit):
        step.parse()
    assert message in capsys.readouterr().err


def test_the_random_models_have_the_shape_of_smollm2(step: Any) -> None:
    with torch.device("meta"):
        counted = {
            name: AutoModelForCausalLM.from_config(step.model_config(layers)).num_parameters()
            for name, layers in step.MODELS.items()
        }
    assert counted["smollm2-135m"] == 134_515_008  # as published
    # by hand: queries and outputs, keys and values, three of the MLP, two norms
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    assert counted["smollm2-135m"] - counted["small-backbone"] == 26 * layer


def test_a_loss_that_is_not_trls_has_no_row(step: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["step.py", "--rounds", "2", "--commit", "abc"])

    def measured(seconds: float, loss: float) -> dict[str, Any]:
        steps = [step.Step(seconds, 100, 40)] * 3
        spent = {"constructed": 1.0, "begun": 1.0, "passed": 0.0, "peak": 10}
        return {"steps": steps, "losses": [0.7, 0.6, loss], **spent}

    found = {
        "trl": measured(4.0, 0.5),
        "fastpref": measured(2.0, 0.5009),
        "fastpref, prefix_sharing=False": measured(1.0, 0.5011),
        "fastpref, cached reference": measured(1.0, float("nan")),
    }
    made = step.rows(step.parse(), found)
    assert [(row["system"], row["pairs_per_second_over_trl"]) for row in made] == [
        ("trl", 1.0),
        ("fastpref", 2.0),
    ]
    assert capsys.readouterr().out.count("no row for fastpref, ") == 2
