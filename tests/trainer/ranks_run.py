"""A small run that reports its losses: alone, or as one of two ranks (by torchrun's variables)."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from fastpref import PreferenceConfig, PreferenceTrainer

spec = importlib.util.spec_from_file_location("makers", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
makers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(makers)


def run(folder: Path) -> dict[str, Any]:
    """Four pairs a step whatever the number of ranks, five to evaluate; a coupled loss, one with a
    memory, a likelihood by token, and a reference that scores the data beforehand."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    config = PreferenceConfig(
        output_dir=str(folder),
        loss_type=["aot", "bco_pair", "sft"],
        loss_args={"bco_pair": {"delta_mode": "ema", "momentum": 0.5}},
        nll_reduction="tokens",
        precompute_ref_log_probs=True,
        max_steps=4,
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=2,
        learning_rate=1e-3,
        logging_steps=2,
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        train_sampling_strategy="sequential",
        use_cpu=True,
        disable_tqdm=True,
        ddp_backend="gloo" if ranks > 1 else None,
    )
    trainer = PreferenceTrainer(
        makers.make_model().double(),
        makers.make_model(1).double(),
        args=config,
        train_dataset=makers.make_pairs(8),
        eval_dataset=makers.make_pairs(5, 1),
        processing_class=makers.make_tokenizer(),
    )
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return {
        "weights": [weights.sum().item(), weights.norm().item()],
        "logs": trainer.state.log_history,
        "files": sorted(p.name for p in folder.glob("checkpoint-4/fastpref*")),
    }


if __name__ == "__main__":
    result = run(Path(sys.argv[1]))
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[1], "result.json").write_text(json.dumps(result))
