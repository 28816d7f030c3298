"""A small run of two rounds, for the test that kills one: ``python killed_run.py DIR KILL``.

KILL is where this process kills itself, the way kill -9 does: ``scoring`` (in the middle of a
table), ``saving`` (a policy is written, its stage not finished), ``renaming`` (a stage is finished
and not in its place), or ``never``.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Any

from fastpref import checkpoint, rounds
from fastpref.rounds import training

spec = importlib.util.spec_from_file_location("makers", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
makers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(makers)

KILL = sys.argv[2]
calls = 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def reward(prompt: Any, response: str) -> float:
    global calls
    calls += 1
    if KILL == "scoring" and calls == 20:
        die()
    return float(response.split().count("w3") - response.split().count("w4"))


write, publish = training._write_policy, checkpoint.publish


def write_and_die(*arguments: Any) -> None:
    write(*arguments)
    if KILL == "saving":
        die()


def publish_or_die(folder: Path, target: Path) -> None:
    if KILL == "renaming" and target.name == "train":
        die()
    publish(folder, target)


training._write_policy = write_and_die
checkpoint.publish = publish_or_die

folder = Path(sys.argv[1])
rounds.ILRDPO(
    model=str(folder.parent / "policy"),
    run_dir=str(folder),
    dataset=makers.make_prompts(16),
    scorer=rounds.Function(reward),
    sampling={"n": 4, "max_new_tokens": 6},
    filter={"unfinished": True},
    rounds=2,
    held_out=0,
    max_prompt_tokens=16,
    use_cpu=True,
    training={
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_length": 64,
    },
).run()
