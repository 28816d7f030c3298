"""A small run for the tests that interrupt one: ``run`` in this process, or as a script,
``python killed_run.py DIR JSON``, in one of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastpref import PreferenceConfig, PreferenceTrainer

spec = importlib.util.spec_from_file_location("makers", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
makers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(makers)


class Interrupt(TrainerCallback):
    """Sends this process what Ctrl-C sends."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def run(
    folder: Path,
    *,
    interrupt_at: int = 0,
    kill_in_save: int = 0,
    resume: bool = False,
    **options: Any,
) -> None:
    """Train 8 steps, over the end of an epoch, with all that a resumed run could forget: dropout,
    accumulation, a loss with a memory, a reference that moves, logs and checkpoints out of step.

    Args:
        folder: Where to.
        interrupt_at: Send SIGINT to this process when this step ends.
        kill_in_save: Kill this process while the checkpoint of this step is being written.
        resume: Go on from the last checkpoint.
        **options: Of the config.
    """
    config = PreferenceConfig(
        **{
            "output_dir": str(folder),
            "max_steps": 8,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "save_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "loss_type": "bco_pair",
            "loss_args": {"delta_mode": "ema", "momentum": 0.5},
            "sync_ref_model": True,
            "ref_model_sync_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "disable_dropout": False,
            **options,
        }
    )
    trainer = PreferenceTrainer(
        makers.make_model(attention_dropout=0.1),
        args=config,
        train_dataset=makers.make_pairs(26),
        eval_dataset=makers.make_pairs(5, 1),
        processing_class=makers.make_tokenizer(),
        callbacks=[Interrupt(interrupt_at)],
    )
    save = trainer.save_model

    def save_and_die(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        if trainer.state.global_step == kill_in_save:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.save_model = save_and_die
    trainer.train(resume_from_checkpoint=resume)


if __name__ == "__main__":
    run(Path(sys.argv[1]), **json.loads(sys.argv[2]))
