"""What a run that stopped leaves to go on from: after Ctrl-C, after a kill at any point of a save,
with broken weights, on machines with a disk each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from fastpref import DPOConfig, DPOTrainer, checkpoint

Run = Callable[..., None]


@pytest.fixture(scope="module")
def run(make: Any) -> Run:
    found: Run = make.script("killed_run").run
    return found


def losses(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def test_ctrl_c_keeps_what_it_saved_beside_the_best(run: Run, tmp_path: Path) -> None:
    """transformers would delete all but the best checkpoint, and load it."""
    options: dict[str, Any] = {
        "save_steps": 4,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "save_only_model": True,
    }
    with pytest.raises(KeyboardInterrupt, match="after step 6 and saved"):
        run(tmp_path, interrupt_at=5, **options)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    assert checkpoint.last_complete(tmp_path).name == "checkpoint-6"
    # the best, whose optimiser was not asked for, is no place to go on from
    with pytest.raises(ValueError, match=r"checkpoint-4 holds the model alone \(save_only_model"):
        checkpoint.check_state(tmp_path / "checkpoint-4")
    run(tmp_path, resume=True, **options)
    assert sorted(losses(tmp_path)) == [2, 4, 6, 8]


def test_an_order_by_length_is_found_again_in_a_later_epoch(run: Run, tmp_path: Path) -> None:
    """An epoch has seven steps; the run stops in the second."""
    options: dict[str, Any] = {
        "max_steps": 12,
        "logging_steps": 1,
        "save_steps": 100,
        "eval_strategy": "no",
        "train_sampling_strategy": "group_by_length",
    }
    run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt, match="after step 10 and saved"):
        run(tmp_path / "stopped", interrupt_at=9, **options)
    run(tmp_path / "stopped", resume=True, **options)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def sealed(folder: Path, step: int = 1, text: str = "new") -> Path:
    """A checkpoint written to its end."""
    folder.mkdir(parents=True)
    (folder / "weights").write_text(text)
    checkpoint.seal(folder, {"run": "r", "step": step, "losses": {}})
    return folder


def test_a_kill_between_the_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``publish`` moves the old one aside, then the new one into its place."""
    old, staging = sealed(tmp_path / "checkpoint-1", text="old"), tmp_path / checkpoint.STAGING
    made = sealed(staging / "checkpoint-1")

    class Killed(BaseException):
        pass

    replace, renames = Path.replace, []

    def rename(self: Path, target: Path) -> Path:
        if renames:
            raise Killed
        renames.append(self.name)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", rename)
        with pytest.raises(Killed):
            checkpoint.publish(made, old)
    assert not old.exists()
    assert checkpoint.last_complete(tmp_path) == old
    assert (old / "weights").read_text() == "new"
    # what was not sealed, or is there already, stays where it is
    torn = sealed(staging / "checkpoint-2")
    (torn / "weights").write_text("n")
    sealed(staging / "checkpoint-1", text="later")
    assert checkpoint.last_complete(tmp_path) == old
    assert (old / "weights").read_text() == "new"
    assert torn.exists()


def test_each_machine_has_a_whole_checkpoint_on_its_disk(tmp_path: Path) -> None:
    """``writes`` is of the first machine, ``cleans`` of the first rank of each."""
    found = []
    for machine, writes in (("first", True), ("second", False)):
        root = tmp_path / machine
        with checkpoint.staged(
            root,
            "checkpoint-3",
            {"run": "r", "step": 3},
            writes=writes,
            cleans=True,
            barrier=lambda: None,
        ) as folder:
            (folder / f"fastpref_rank{machine}.json").write_text("{}")
        found.append(checkpoint.last_complete(root))
    assert [p.name for p in found] == ["checkpoint-3"] * 2
    assert [checkpoint.fault(p) for p in found] == [None, None]


class Breaks(TrainerCallback):
    """Breaks a weight after a step, as an optimiser may with a gradient that is finite."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                model.model.norm.weight[0] = float("nan")


@pytest.mark.parametrize("step", [3, 4])
def test_broken_weights_do_not_take_the_place_of_whole_ones(
    make: Any, tokenizer: Any, options: Callable[..., dict[str, Any]], tmp_path: Path, step: int
) -> None:
    """Broken where a checkpoint is due, or a step before, which the next loss tells."""
    args = DPOConfig(
        **options(max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1)
    )
    trainer = DPOTrainer(
        make.model(),
        args=args,
        train_dataset=make.pairs(24),
        processing_class=tokenizer,
        callbacks=[Breaks(step)],
    )
    said = {3: "weights are not finite either", 4: "weights after step 4 are not finite.*are kept"}
    with pytest.raises(FloatingPointError, match=said[step]):
        trainer.train()
    run_dir = tmp_path / "run"
    assert [p.name for p in run_dir.glob("checkpoint-*")] == ["checkpoint-2"]
    assert checkpoint.fault(run_dir / "checkpoint-2") is None
    assert not (run_dir / checkpoint.STAGING).exists()


def test_a_checkpoint_without_its_optimiser_is_refused(
    make: Any, tokenizer: Any, options: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    args = DPOConfig(
        **options(max_steps=2, save_strategy="steps", save_steps=1, save_only_model=True)
    )
    given: dict[str, Any] = {"train_dataset": make.pairs(8), "processing_class": tokenizer}
    trainer = DPOTrainer(make.model(), args=args, **given)
    trainer.train()
    saved = tmp_path / "run" / "checkpoint-1"
    for how in (True, str(saved)):
        with pytest.raises(ValueError, match=r"holds the model alone .*random numbers would start"):
            DPOTrainer(make.model(), args=args, **given).train(resume_from_checkpoint=how)
    (saved / "trainer_state.json").unlink()
    (saved / checkpoint.MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"has no trainer_state\.json.*save_on_each_node=True"):
        DPOTrainer(make.model(), args=args, **given).train(resume_from_checkpoint=str(saved))


def test_a_saved_model_is_never_there_in_part(
    make: Any,
    tokenizer: Any,
    options: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk that is full while the weights are written leaves the model that was there before."""
    trainer = DPOTrainer(
        make.model(),
        args=DPOConfig(**options()),
        train_dataset=make.pairs(4),
        processing_class=tokenizer,
    )
    run_dir = tmp_path / "run"
    trainer.save_model()
    names = {p.name for p in run_dir.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert checkpoint.STAGING not in names
    before = (run_dir / "model.safetensors").read_bytes()

    def full(self: Any, folder: str, **kwargs: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "model.safetensors").write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.model), "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            trainer.save_model()
    assert (run_dir / "model.safetensors").read_bytes() == before
    with torch.no_grad():
        trainer.model.model.norm.weight.add_(1)
    trainer.save_model()
    assert (run_dir / "model.safetensors").read_bytes() != before
    assert {p.name for p in run_dir.iterdir()} == names


def test_a_saved_model_replaces_weights_of_other_names(tmp_path: Path) -> None:
    """A model in one file would be loaded in the place of the shards saved beside it."""
    made, folder = tmp_path / ".saving" / "model", tmp_path
    made.mkdir(parents=True)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in (*shards, "model.safetensors.index.json", "config.json"):
        (made / name).write_text("new")
    for name in ("model.safetensors", shards[0], "notes.txt", "reference.safetensors"):
        (folder / name).write_text("old")
    checkpoint.merge(made, folder)
    left = {path.name: path.read_text() for path in folder.iterdir()}
    assert left.pop("notes.txt") == left.pop("reference.safetensors") == "old"
    assert left == dict.fromkeys([*shards, "model.safetensors.index.json", "config.json"], "new")
