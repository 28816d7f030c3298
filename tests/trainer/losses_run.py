"""Short runs with losses that look beyond one example: alone, or as one of two ranks."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset

from fastpref import PreferenceConfig, PreferenceTrainer, losses

spec = importlib.util.spec_from_file_location("makers", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
makers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(makers)

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))
TRAINED: dict[str, dict[str, Any]] = {
    "kto": {},
    "bco": {},
    "mpo": {},
    "beta_dpo": {},
    "alpha_dpo": {},
    "aot": {},
    "epsilon_dpo": {},
    "dr_dpo": {},
    "dpo": {"per_device_train_batch_size": 2 // RANKS, "gradient_accumulation_steps": 2},
    "orpo": {"nll_reduction": "tokens", "nll_scope": "all"},
}
SPLIT = {"dpo": {}, "ld_dpo": {}, "tpo": {"nll_reduction": "tokens"}, "sigmoid_norm": {}}
PARTS = {1: [[[0, 1, 2, 3, 4]]], 2: [[[3, 0], [4]], [[1, 2]]]}
"""Examples of each micro-batch of each rank: other sizes, another order."""


def rows_of(kind: str) -> Dataset:
    rows = makers.make_pairs(12, third=" w1 w2 w3")
    if kind == "pair":
        return rows
    names = ["rejected" if i % 3 == 1 else "chosen" for i in range(len(rows))]
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row, name in zip(rows, names, strict=True)
        ]
    )


def trainer_of(name: str, folder: Path, **given: Any) -> PreferenceTrainer:
    args = PreferenceConfig(
        **{
            "output_dir": str(folder / name),
            "loss_type": name,
            "max_steps": 3,
            "per_device_train_batch_size": 4 // RANKS,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "train_sampling_strategy": "sequential",
            "self_check": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "ddp_backend": "gloo" if RANKS > 1 else None,
            **given,
        }
    )
    return PreferenceTrainer(
        makers.make_model().double(),
        makers.make_model(1).double(),
        args=args,
        train_dataset=rows_of(losses.get(name).entry.kind),
        processing_class=makers.make_tokenizer(),
    )


def trained(name: str, folder: Path) -> dict[str, Any]:
    """Weights, losses and the loss's memory after three steps."""
    trainer = trainer_of(name, folder, **TRAINED[name])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "weights": makers.sketch(list(trainer.model.parameters())),
        "logs": [[log[key] for key in ("loss", "rewards/margins")] for log in logs],
        "memory": trainer.combined.state_dict(),
    }


def split(name: str, folder: Path) -> list[float]:
    """The gradient of one window, summed over micro-batches and ranks of any size."""
    trainer = trainer_of(name, folder, **SPLIT[name])
    rows = list(trainer.train_dataset)
    batches = [
        trainer._prepare_inputs(trainer.data_collator([rows[i] for i in part]))
        for part in PARTS[RANKS][RANK]
    ]
    window = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    for batch in batches:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=window).backward()
    gradients = [p.grad for p in trainer.model.parameters()]
    for gradient in gradients if RANKS > 1 else ():
        dist.all_reduce(gradient)
        gradient /= RANKS  # as DDP does
    return makers.sketch(gradients)


def run(folder: Path) -> dict[str, Any]:
    found = {
        "trained": {name: trained(name, folder) for name in TRAINED},
        "split": {name: split(name, folder) for name in SPLIT},
    }
    gc.collect()
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1])
    result = run(target)
    if RANK == 0:
        (target / "result.json").write_text(json.dumps(result))
    makers.leave()
