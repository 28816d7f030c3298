"""The sweep: one reference pass, no cell run twice, and the numbers of plain PyTorch."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import fastpref
from fastpref import PreferenceConfig, PreferenceTrainer, sweep
from fastpref.demo import tiny_model, tiny_pairs
from fastpref.heads import causal_lm
from fastpref.loop import Loop
from fastpref.rounds.run import read_jsonl
from fastpref.sweep import Cell, Measure, Settings, cells_of
from fastpref.sweep_measure import ANSWERS, make_judge
from fastpref.sweep_report import report

ROOT = Path(__file__).parents[1]

SMALL = ["--tiny", "--cpu", "--steps", "2", "--held-out", "8", "--new-tokens", "5"]


def run(folder: Path, *argv: str) -> dict[str, Any]:
    """By name of the cell: its row."""
    given = [*SMALL, "--run-dir", str(folder / "run"), "--ref-cache-dir", str(folder / "ref")]
    assert sweep.main([*given, *argv]) == 0
    found = json.loads((folder / "run" / "results.json").read_text())
    assert found["command"].startswith("fastpref sweep --tiny")
    assert found["versions"]["torch"] == torch.__version__
    return {Cell(row["loss"], row["beta"]).name: row for row in found["cells"]}


def stamps(folder: Path, pattern: str) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.glob(pattern)}


def test_a_sweep_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path, "--losses", "dpo", "--betas", "0.1")
    assert list(first) == ["start", "dpo-0.1"]
    assert first["start"]["accuracy"]["mean"] == 0.5
    assert first["start"]["margin"] == {"mean": 0, "low": 0, "high": 0}
    assert first["start"]["kl"] == 0
    done, scored = (stamps(tmp_path, p) for p in ("run/*/result.json", "ref/*/*"))
    assert scored
    half_done = tmp_path / "run" / "ipo-0.5" / "metrics.jsonl"  # of a cell that was killed
    half_done.parent.mkdir()
    half_done.write_text('{"loss": 1, "st')
    found = run(tmp_path, "--losses", "sigmoid", "ipo", "sft", "--betas", "0.1", "0.5")
    names = ["dpo-0.1", "dpo-0.5", "ipo-0.1", "ipo-0.5", "sft"]
    assert list(found) == ["start", *names]
    assert found["dpo-0.1"] == first["dpo-0.1"]
    again = stamps(tmp_path, "run/*/result.json")
    assert {path: again[path] for path in done} == done
    assert stamps(tmp_path, "ref/*/*") == scored  # the reference scored nothing more
    unpaired = run(tmp_path, "--losses", "kto", "--betas", "0.1")
    assert all(row["accuracy"]["mean"] > 0.5 for name, row in unpaired.items() if name != "start")
    table = capsys.readouterr().out
    assert "| kto | 0.1 | 1.000" in table
    assert re.findall(r"\| (\w+) \| [\d.]+\* ", table) == ["dpo", "ipo"]  # the only with two betas
    picture = (tmp_path / "run" / "sweep.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    with pytest.raises(
        ValueError, match=r"holds a sweep with seed=0, this one has 3: choose another"
    ):
        run(tmp_path, "--losses", "dpo", "--seed", "3")


def test_a_killed_sweep_is_finished(tmp_path: Path) -> None:
    given = [*SMALL, "--run-dir", str(tmp_path / "run"), "--ref-cache-dir", str(tmp_path / "ref")]
    given += ["--losses", "dpo", "ipo", "--betas", "0.1", "0.2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastpref", "sweep", *given],
        env={**os.environ, "PYTHONPATH": str(Path(fastpref.__file__).parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while not (tmp_path / "run" / "dpo-0.1" / "result.json").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = stamps(tmp_path, "run/*/result.json")
    assert 2 <= len(done) < 5
    assert sweep.main(given) == 0
    again = stamps(tmp_path, "run/*/result.json")
    assert len(again) == 5
    assert {path: again[path] for path in done} == done


def test_ctrl_c_stops_a_cell_which_then_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--losses", "dpo", "--betas", "0.1", "--steps", "6"]
    whole = run(tmp_path / "whole", *given)
    note, noted = Loop.note, []

    def stop(loop: Any, *args: Any) -> None:
        noted.append(args)
        if len(noted) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        note(loop, *args)

    monkeypatch.setattr(Loop, "note", stop)
    with pytest.raises(KeyboardInterrupt, match="finished cells are kept: go on with --run-dir"):
        run(tmp_path / "stopped", *given)
    assert len(noted) == 3
    assert run(tmp_path / "stopped", *given) == whole
    assert len(noted) == 6
    assert not list((tmp_path / "stopped").rglob("checkpoint-*"))


def test_a_loss_that_diverges_is_a_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path, "--losses", "sft", "ipo", "--betas", "1e-30", "0.1")
    assert "not finite" in found["ipo-1e-30"]["error"]
    assert found["ipo-0.1"]["pairs"] == 8
    assert "| ipo | 1e-30 | diverged |" in capsys.readouterr().out


def test_numbers_are_those_of_plain_pytorch(tmp_path: Path) -> None:
    model, tokenizer = tiny_model()
    start, _ = tiny_model()
    rows = Dataset.from_list(tiny_pairs(5))
    args = PreferenceConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        precompute_ref_log_probs=True,
        ref_cache_dir="none",
        max_length=64,
    )
    trainer = PreferenceTrainer(start, args=args, eval_dataset=rows, processing_class=tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    limit = 12
    # An end that the model comes to in some answers: what it says fourth to the first prompt.
    prompt = torch.tensor([trainer.eval_dataset[0]["prompt_ids"]])
    answer = model.generate(input_ids=prompt, max_new_tokens=limit, do_sample=False, pad_token_id=1)
    model.generation_config.eos_token_id = [int(answer[0, prompt.shape[1] + 3])]
    settings = Settings(batch_size=2, new_tokens=limit)
    found = Measure(trainer, tokenizer, list(rows), settings)(model, tmp_path)

    margins, divergence, tokens, lengths = [], 0.0, 0, []
    ends = {tokenizer.eos_token_id, *model.generation_config.eos_token_id}
    for row in trainer.eval_dataset:
        ratios = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            span = slice(len(row["prompt_ids"]) - 1, -1)
            with torch.no_grad():
                ours, base = (
                    m(input_ids=ids).logits[0, span].log_softmax(-1) for m in (model, start)
                )
            targets = torch.tensor(row[f"{side}_ids"])[:, None]
            ratio = (ours - base).gather(-1, targets)[:, 0].double()
            divergence += float(ratio.square().sum()) / 2
            tokens += len(ratio)
            ratios.append(float(ratio.sum()))
        margins.append(ratios[0] - ratios[1])
        ids = list(row["prompt_ids"])
        size = len(ids)
        while len(ids) < size + limit and (len(ids) == size or ids[-1] not in ends):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        lengths.append(len(ids) - size)
    assert found["pairs"] == 5
    assert found["margin"]["mean"] == pytest.approx(sum(margins) / 5, rel=1e-4)
    assert found["accuracy"]["mean"] == sum(m > 0 for m in margins) / 5
    assert found["kl"] == pytest.approx(divergence / tokens, rel=1e-4)
    assert found["length"] == sum(lengths) / 5
    answers = read_jsonl(tmp_path / ANSWERS)
    assert [row["prompt"] for row in answers] == rows["prompt"]
    assert [len(row["responses"][0]["ids"]) for row in answers] == lengths
    assert found["ended"] > 0
    assert causal_lm(model).training  # as it was


JUDGES = """
def letters(prompt, answer):
    assert prompt[0]["role"] == "user"
    return sum(map(ord, answer))

def same(prompt, answer, other, weight=1.0):
    return weight * (sum(map(ord, answer)) > sum(map(ord, other)))

def first_place(prompt, answer, other):
    return 1.0

def nothing(prompt):
    return 0.0
"""


def test_a_judge_compares_the_answers_with_those_of_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "judges.py"
    file.write_text(JUDGES)
    given = ["--losses", "dpo", "sft", "--betas", "0.1", "--learning-rate", "0.03", "--steps", "5"]
    given += ["--answers", "6"]
    found = run(tmp_path, *given, "--judge", f"{file}:letters")
    names = ["start", "dpo-0.1", "sft"]
    texts = {
        name: [row["responses"][0]["text"] for row in read_jsonl(tmp_path / "run" / name / ANSWERS)]
        for name in names
    }
    assert texts["dpo-0.1"] != texts["start"]
    for name in names:
        gaps = [
            sum(map(ord, own)) - sum(map(ord, base))
            for own, base in zip(texts[name], texts["start"], strict=True)
        ]
        assert len(gaps) == found[name]["answers"] == 6
        expected = sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / 6
        assert found[name]["win_rate"]["mean"] == pytest.approx(expected)
    assert found["dpo-0.1"]["win_rate"]["mean"] != 0.5
    assert re.search(r"win rate \[95 %\].*by letters", capsys.readouterr().out, re.DOTALL)
    done = stamps(tmp_path, "run/*/result.json")
    pairwise = run(tmp_path, *given, "--judge", f"{file}:same")
    assert pairwise == found
    biased = run(tmp_path, *given, "--judge", f"{file}:first_place")
    assert {row["win_rate"]["mean"] for row in biased.values()} == {0.5}
    plain = run(tmp_path, *given)
    assert not any("win_rate" in row for row in plain.values())
    assert stamps(tmp_path, "run/*/result.json") == done  # no judge makes a cell train again
    assert make_judge("{kind: length, per_unit: -0.5}").per_unit == -0.5
    with pytest.raises(ValueError, match=r"nothing takes \(prompt\); a judge takes \(prompt, answ"):
        run(tmp_path, *given, "--judge", f"{file}:nothing")
    with pytest.raises(ValueError, match="names no function"):
        run(tmp_path, *given, "--judge", f"{file}:nobody")
    with pytest.raises(ValueError, match="--new-tokens and --answers must be at least 1"):
        run(tmp_path, *given, "--new-tokens", "0", "--judge", f"{file}:same")


def test_the_page_shows_the_study_that_was_made() -> None:
    row = json.loads((ROOT / "benchmarks" / "results" / "sweep.json").read_text())
    page = " ".join((ROOT / "docs" / "sweep.md").read_text().split())
    assert " ".join(report(row).split()) in page
    assert row["command"] in page


def test_cells() -> None:
    assert cells_of(["dpo", "sigmoid", "sft"], [0.1, 1.0]) == [
        Cell("dpo", 0.1),
        Cell("dpo", 1.0),
        Cell("sft", None),
    ]
    with pytest.raises(ValueError, match="did you mean 'ipo'"):
        cells_of(["ippo"], [0.1])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--losses", "tdpo1"], "tdpo1 needs chosen_kl.*The reference is not run with the policy"),
        (["--losses", "rebel"], "rebel needs chosen_scores.*no column 'chosen_score'"),
        (["--losses", "nca"], "nca takes groups of responses"),
        (["--losses", "dpo", "--betas", "-1"], r"beta must be in \(0, inf\)"),
        (["--held-out", "600"], "leave none to train on"),
        (
            ["--pairs", "singles.jsonl"],
            "needs pairs of prompt, chosen and rejected, got prompt, com",
        ),
    ],
)
def test_what_cannot_be_swept_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "a", "completion": "b", "label": True}]
    Path("singles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=words):
        run(tmp_path, *argv)
    assert not stamps(tmp_path, "run/*/result.json")


def test_a_file_of_pairs(tmp_path: Path) -> None:
    """Whole dialogues, their common beginning the prompt."""
    rows = [
        {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
        for row in tiny_pairs(24)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run(tmp_path, "--pairs", str(path), "--losses", "dpo", "--betas", "0.1")
    assert found["dpo-0.1"]["pairs"] == 8
