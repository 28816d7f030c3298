"""Runs on one of two ranks under DeepSpeed ZeRO, whose losses are reported by rank 0."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from peft import LoraConfig

from fastpref import PreferenceConfig, PreferenceTrainer

spec = importlib.util.spec_from_file_location("makers", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
makers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(makers)

os.environ.setdefault("DS_ACCELERATOR", "cpu")
CASES: dict[str, dict[str, Any]] = {
    "2": {"stage": 2},
    "3": {"stage": 3},
    "3 tied": {"stage": 3, "tied": True},
    "3 scored ahead": {"stage": 3, "ahead": True},
    "3 by name, scored ahead": {"stage": 3, "ahead": True, "by_name": True},
    "3 adapter": {"stage": 3, "adapter": ["q_proj"]},
}


def save(folder: Path) -> None:
    """The models that are given by name."""
    for seed in range(2):
        makers.make_model(seed).save_pretrained(folder / f"model {seed}")
        makers.make_tokenizer().save_pretrained(folder / f"model {seed}")


def run(
    folder: Path,
    saved: Path,
    *,
    stage: int = 0,
    tied: bool = False,
    ahead: bool = False,
    by_name: bool = False,
    adapter: list[str] | None = None,
) -> dict[str, Any]:
    """Loss and gradient norm of four steps of four pairs, and the names of the caches."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    deepspeed = {
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        **dict.fromkeys(
            ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
            "auto",
        ),
    }
    config = PreferenceConfig(
        output_dir=str(folder),
        loss_type=["dpo", "sft"],
        max_steps=4,
        per_device_train_batch_size=4 // ranks,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=ahead,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **({"deepspeed": deepspeed} if ranks > 1 else {}),
    )
    models: list[Any] = [
        str(saved / f"model {seed}")
        if by_name
        else makers.make_model(seed, tie_word_embeddings=tied)
        for seed in range(2)
    ]
    trainer = PreferenceTrainer(
        models[0],
        None if adapter else models[1],
        args=config,
        train_dataset=makers.make_pairs(16),
        processing_class=makers.make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=adapter) if adapter else None,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "losses": [[log["loss"], float(log["grad_norm"])] for log in logs],
        "caches": [cache.folder.name for cache in trainer.caches],
    }


if __name__ == "__main__":
    here = Path(sys.argv[1])
    os.environ["FASTPREF_CACHE"] = str(here / "cache")
    found: dict[str, Any] = {
        name: run(here / name, here.parent, **case) for name, case in CASES.items()
    }
    try:
        run(here / "head", here.parent, stage=3, adapter=["lm_head"])
    except TypeError as error:
        found["head"] = str(error)
    if os.environ["RANK"] == "0":
        (here / "result.json").write_text(json.dumps(found))
    makers.leave()
