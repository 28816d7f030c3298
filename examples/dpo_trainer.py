"""DPO of a transformers model with the trainer: TRL's ``DPOTrainer`` script, its import changed.

    python examples/dpo_trainer.py

Model, tokenizer and pairs are made up here, so that it runs anywhere in seconds. For a real run
give names instead: ``DPOTrainer("path/or/name", ...)`` and any preference dataset.
"""

from __future__ import annotations

import tempfile

from datasets import Dataset

from fastpref import DPOConfig, DPOTrainer
from fastpref.demo import tiny_model, tiny_pairs


def main() -> None:
    """Train for a few steps and print loss and reward margin."""
    model, tokenizer = tiny_model()
    with tempfile.TemporaryDirectory() as directory:
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=directory,
                max_steps=10,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                logging_steps=1,
                gradient_checkpointing=False,
                save_strategy="no",
            ),
            train_dataset=Dataset.from_list(tiny_pairs(40)),
            processing_class=tokenizer,
        )
        trainer.train()
    for row in trainer.state.log_history:
        if "rewards/margins" in row:
            print(
                f"step {row['step']:2d}  loss {row['loss']:.4f}  "
                f"margin {row['rewards/margins']:.4f}"
            )


if __name__ == "__main__":
    main()
