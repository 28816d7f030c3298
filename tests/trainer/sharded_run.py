"""A run on one of two ranks under FSDP2, whose losses and gradient norms are reported by rank 0."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from fastpref import PreferenceConfig, PreferenceTrainer

spec = importlib.util.spec_from_file_location("makers", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
makers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(makers)

FSDP = {
    "version": 2,
    "reshard_after_forward": True,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "SHARDED_STATE_DICT",
}


def run(
    folder: Path, tied: bool = False, resume: bool = False, detour: bool = True
) -> list[list[float]]:
    """Loss and gradient norm of four steps of four pairs, saved after the second."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    options: dict[str, Any] = {"fsdp": True, "fsdp_config": FSDP} if ranks > 1 else {}
    config = PreferenceConfig(
        output_dir=str(folder),
        loss_type=["dpo", "sft"],
        max_steps=4,
        per_device_train_batch_size=4 // ranks,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=2,
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        ddp_backend="gloo" if ranks > 1 else None,
        **options,
    )
    if ranks > 1 and detour:
        # Accelerate shards on every device but a CPU; the code that does it runs on one all right.
        state = PartialState()
        state._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    trainer = PreferenceTrainer(
        makers.make_model(tie_word_embeddings=tied),
        makers.make_model(1, tie_word_embeddings=tied),
        args=config,
        train_dataset=makers.make_pairs(16),
        processing_class=makers.make_tokenizer(),
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    assert ranks == 1 or "FSDP" in type(trainer.model_wrapped).__name__
    return [[log["loss"], log["grad_norm"]] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    here = Path(sys.argv[1])
    found: dict[str, Any] = {}
    try:
        run(here / "refused", detour=False)
    except ValueError as error:
        found["refused"] = str(error)
    AcceleratorState._reset_state()
    for tied in (False, True):
        found[f"tied {tied}"] = run(here / str(tied), tied)
    found["resumed"] = run(here / "False", resume=True)
    if os.environ["RANK"] == "0":
        (here / "result.json").write_text(json.dumps(found))
    makers.leave()
