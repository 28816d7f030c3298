"""``fastpref score``: against plain transformers, resumed, and its file whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref import cli, scoring
from fastpref.demo import tiny_model, tiny_pairs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy and a reference, with one tokenizer."""
    made = []
    for name in ("policy", "reference"):
        path = tmp_path_factory.mktemp(name)
        torch.manual_seed(len(made))
        for part in tiny_model():
            if name == "policy" and hasattr(part, "lm_head"):
                with torch.no_grad():
                    for weight in part.parameters():
                        weight.add_(0.3 * torch.randn_like(weight) * weight.std())
            part.save_pretrained(path)
        made.append(path)
    return made[0], made[1]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs(10)))
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))


def flags(models: tuple[Path, Path], data: Path, output: Path, *more: str) -> list[str]:
    names = ["--model", str(models[0]), "--ref_model", str(models[1])]
    return ["score", *names, "--dataset", str(data), "--output", str(output), "--use_cpu", *more]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def plain(model: Path, prompt: Any, response: Any) -> list[float]:
    """Log-probability of each response token, from transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if isinstance(prompt, list):
        before = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(
            [*prompt, *response], tokenize=True, return_dict=False
        )
    else:
        before = tokenizer(prompt)["input_ids"]
        whole = tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]
    ids = torch.tensor([whole])
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    logps = model(ids).logits[0].log_softmax(-1)
    n = len(before)
    return logps[n - 1 : -1].gather(1, ids[0, n:, None])[:, 0].tolist()


def test_scores_and_rewards_are_those_of_transformers(models, pairs, tmp_path, capsys):
    output = tmp_path / "out" / "scores.jsonl"
    assert cli.main(flags(models, pairs, output, "--beta", "0.5", "--per_token")) == 0
    out = capsys.readouterr().out
    rows = lines(output)
    assert [row["example_id"] for row in rows] == list(range(10))
    right = 0
    for row, given in zip(rows, lines(pairs)):
        rewards = {}
        for side in ("chosen", "rejected"):
            own, ref = (plain(model, given["prompt"], given[side]) for model in models)
            assert row[f"{side}_token_logps"] == pytest.approx(own, abs=1e-5)
            assert row[f"ref_{side}_token_logps"] == pytest.approx(ref, abs=1e-5)
            assert row[f"{side}_logps"] == pytest.approx(sum(own), abs=1e-4)
            assert row[f"ref_{side}_logps"] == pytest.approx(sum(ref), abs=1e-4)
            assert row[f"{side}_tokens"] == len(own)
            rewards[side] = 0.5 * (sum(own) - sum(ref))
            assert row[f"{side}_rewards"] == pytest.approx(rewards[side], abs=1e-4)
        assert row["margins"] == pytest.approx(rewards["chosen"] - rewards["rejected"], abs=1e-4)
        right += row["margins"] > 0
    assert f"accuracy {right / 10:.3f}" in out
    assert max(abs(row["margins"]) for row in rows) > 0.1


def test_parquet_with_the_columns_of_the_data_trains(models, pairs, tmp_path):
    output = tmp_path / "scores.parquet"
    assert cli.main(flags(models, pairs, output, "--keep_columns", "--split", "train[:6]")) == 0
    rows = load_dataset("parquet", data_files=str(output), split="train", cache_dir=str(tmp_path))
    assert {"prompt", "chosen", "ref_chosen_logps", "ref_rejected_logps"} <= set(rows.column_names)
    assert len(rows) == 6
    from fastpref import PreferenceConfig, PreferenceTrainer
    from fastpref.reference_policy import Stored

    config = PreferenceConfig(output_dir=str(tmp_path / "run"), use_cpu=True, disable_tqdm=True)
    trainer = PreferenceTrainer(str(models[1]), args=config, eval_dataset=rows)
    assert isinstance(trainer.reference, Stored)
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_single_responses_and_no_reference(models, pairs, tmp_path, capsys):
    single = tmp_path / "single.jsonl"
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
        for i, row in enumerate(lines(pairs))
    ]
    single.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "scores.jsonl"
    argv = flags(models, single, output)
    del argv[3:5]
    assert cli.main(argv) == 0
    found = lines(output)
    assert set(found[0]) == {"example_id", "label", "logps", "tokens"}
    assert [row["label"] for row in found] == [row["label"] for row in rows]
    assert "logps:" in capsys.readouterr().out


def test_rows_that_cannot_be_scored_are_left_out_by_number(models, pairs, tmp_path, capsys):
    rows = lines(pairs)
    rows[3]["chosen"] = rows[3]["rejected"]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "scores.jsonl"
    assert cli.main(flags(models, pairs, output)) == 0
    assert [row["example_id"] for row in lines(output)] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert "chosen equals rejected" in capsys.readouterr().out


KILLED = """
import os, signal, sys
from fastpref import cli, reference_cache, scoring
real, calls = scoring._scores, []
def scores(*args):
    calls.append(1)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
scoring._scores = scores
put = reference_cache.ReferenceCache.put
def put_and_flush(self, *args):
    put(self, *args)
    self.flush()
reference_cache.ReferenceCache.put = put_and_flush
cli.main(sys.argv[1:])
"""


def test_a_killed_command_goes_on_where_it_was(models, pairs, tmp_path, monkeypatch, capsys):
    output = tmp_path / "scores.jsonl"
    argv = flags(models, pairs, output, "--batch_size", "2")
    command = [sys.executable, "-c", KILLED, *argv]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL  # after the policy's five forwards, and two more
    assert not output.exists()

    real, calls = scoring._scores, []
    monkeypatch.setattr(scoring, "_scores", lambda *args: calls.append(1) or real(*args))
    assert cli.main(argv) == 0
    assert len(calls) == 3
    first = lines(output)
    assert cli.main(argv) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*argv, "--ref_cache_dir", str(tmp_path / "other"), "--overwrite"]) == 0
    assert len(calls) == 13
    assert lines(output) == first
    assert {p.name for p in tmp_path.iterdir()} == {"cache", "other", "pairs.jsonl", output.name}


def test_a_reference_with_too_few_tokens_is_refused(models, pairs, tmp_path, capsys):
    small = AutoModelForCausalLM.from_pretrained(models[1])
    small.resize_token_embeddings(40)
    small.save_pretrained(tmp_path / "small")
    argv = flags(models, pairs, tmp_path / "scores.jsonl", "--ref_model", str(tmp_path / "small"))
    assert cli.main(argv) == 2
    assert "small knows 40 tokens, and" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--output", "scores.csv"], "expected a name in .jsonl or .parquet"),
        (["--dataset", "/no/such.jsonl"], "/no/such.jsonl"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--split", "test[5"], "test[5"),
    ],
)
def test_what_it_refuses(models, pairs, tmp_path, capsys, change, said):
    assert cli.main(flags(models, pairs, tmp_path / "scores.jsonl", *change)) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
