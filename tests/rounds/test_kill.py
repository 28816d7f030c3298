"""kill -9 anywhere, the same command again: the same result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from fastpref.rounds.run import PROGRESS, read_jsonl

KILLS = {
    "sampling": 20,  # responses: in the third batch of eight
    "scoring": 20,
    "saving": 1,  # a policy is written, its stage not finished
    "step": 2,  # the forward pass of round 2's second step
    "renaming": 1,  # a stage is finished and not in its place
}
"""Where a run is killed, one after the other: when that is reached so many times."""

KILLED = f"""
import os, signal, sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, sys.argv[1])
import conftest as makers
from fastpref import PreferenceTrainer, checkpoint, rounds
from fastpref.rounds import sampling, training

folder, kill = Path(sys.argv[2]), sys.argv[3]
left = {KILLS}

def reached(where):
    left[where] -= 1
    if where == kill and left[where] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def before(where, function):
    def called(*arguments, **options):
        reached(where)
        return function(*arguments, **options)
    return called

def write_and_die(*arguments):
    write(*arguments)
    reached("saving")

def publish_or_die(staging, target):
    if target.name == "train":
        reached("renaming")
    publish(staging, target)

def reward(prompt, response):
    reached("scoring")
    return float(response.split().count("w3") - response.split().count("w4"))

write, publish = training._write_policy, checkpoint.publish
with (
    patch.object(sampling, "_response", before("sampling", sampling._response)),
    patch.object(PreferenceTrainer, "compute_loss", before("step", PreferenceTrainer.compute_loss)),
    patch.object(training, "_write_policy", write_and_die),
    patch.object(checkpoint, "publish", publish_or_die),
):
    rounds.ILRDPO(
        model=str(folder / "policy"), run_dir=str(folder / "run"), dataset=makers.make_prompts(16),
        scorer=rounds.Function(reward), sampling={{"n": 4, "max_new_tokens": 6}}, rounds=2,
        filter={{"unfinished": True}}, held_out=0, max_prompt_tokens=16, use_cpu=True,
        training={{"per_device_train_batch_size": 4, "max_steps": 3, "save_steps": 1,
                  "learning_rate": 1e-2, "gradient_checkpointing": False, "disable_tqdm": True,
                  "max_length": 64}},
    ).run()
"""


def test_a_run_killed_at_several_places_ends_with_the_same_weights(
    stopped_and_whole: Callable[..., list[Path]],
) -> None:
    def killed(folder: Path, kill: str) -> None:
        run = folder / "run"
        if kill == "sampling":
            part = read_jsonl(run / "round-1" / "samples.partial" / PROGRESS)
            assert len(part) == 4  # of 8 prompts, two batches
        if kill == "step":
            trainer = run / "round-2" / "train.partial" / "trainer"
            assert [path.name for path in trainer.glob("checkpoint-*")] == ["checkpoint-1"]

    ends = []
    for folder in stopped_and_whole(KILLED, list(KILLS), "never", killed):
        last = folder / "run" / "round-2"
        tables = [(last / n / "rows.jsonl").read_text() for n in ("samples", "scores", "pairs")]
        ends.append((load_file(last / "train" / "model" / "model.safetensors"), tables))
        assert not list((folder / "run").rglob("*.partial"))
    assert ends[0][1] == ends[1][1]
    assert all((ends[1][0][name] == value).all() for name, value in ends[0][0].items())
