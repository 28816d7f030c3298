"""What a step and a log cost two ranks, what they do where only one finds a checkpoint, what the
command prints, and a reference that moves under FSDP2: reported by rank 0, run by torchrun."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from transformers import TrainerCallback

from fastpref import PreferenceConfig, PreferenceTrainer

spec = importlib.util.spec_from_file_location("makers", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
makers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(makers)

READS = ("item", "tolist", "__float__", "__int__")
JOINS = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast")
FSDP = {
    "version": 2,
    "reshard_after_forward": True,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "SHARDED_STATE_DICT",
}


def trainer_of(folder: Path, *references: Any, tied: bool = False, **options: Any) -> Any:
    """A trainer of four pairs a step, whatever the number of ranks."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    config = PreferenceConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4 // ranks,
        learning_rate=1e-3,
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        ddp_backend="gloo" if ranks > 1 else None,
        **options,
    )
    if "fsdp" in options:
        # Accelerate shards on every device but a CPU; the code that does it runs on one all right.
        PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    return PreferenceTrainer(
        makers.make_model(tie_word_embeddings=tied),
        *references,
        args=config,
        train_dataset=makers.make_pairs(32),
        processing_class=makers.make_tokenizer(),
    )


class Counted(TrainerCallback):
    """Counts reads of tensors by the host, and collectives, of each step."""

    def __init__(self) -> None:
        self.steps: dict[int, Counter[str]] = {}
        self.now: Counter[str] = Counter()
        for owner, names in ((torch.Tensor, READS), (dist, JOINS)):
            for name in names:
                setattr(owner, name, self.counting(name, getattr(owner, name)))

    def counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.now[name] += 1
            return function(*args, **kwargs)

        return counted

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now = self.steps.setdefault(state.global_step + 1, Counter())


def costs(folder: Path) -> dict[int, dict[str, int]]:
    """Reads and collectives of the steps 2 to 6, of which the third and the sixth are logged."""
    trainer = trainer_of(folder, max_steps=7, logging_steps=3, save_steps=7, self_check=False)
    counted = Counted()
    trainer.add_callback(counted)
    trainer.train()
    counted.now = Counter()
    trainer._save_checkpoint(trainer.model_wrapped, trial=None)  # saved already: no rank waits
    assert not set(JOINS) & set(counted.now)
    return {step: dict(counted.steps[step]) for step in range(2, 7)}


def command(folder: Path) -> list[str]:
    """What ``fastpref train`` prints on each rank, and that it draws there."""
    from fastpref import train
    from fastpref.options import parse

    if os.environ["RANK"] == "0":
        for saved in (makers.make_model(), makers.make_tokenizer()):
            saved.save_pretrained(folder / "model")
        makers.make_pairs(8).to_json(folder / "pairs.jsonl")
    dist.barrier()
    given = {"model": folder / "model", "dataset": folder / "pairs.jsonl"}
    given |= {"output_dir": folder / "run", "max_steps": 1, "use_cpu": "true", "bf16": "false"}
    said, draw = io.StringIO(), train.draw_run

    def drawn(output: Path) -> None:
        print("drawn")
        draw(output)

    train.draw_run = drawn
    with contextlib.redirect_stdout(said):
        train.run(*parse([part for k, v in given.items() for part in (f"--{k}", str(v))]))
    return list(gather_object([said.getvalue()]))


def moved(folder: Path, tied: bool, resume: bool = False) -> list[list[float]]:
    """Loss and gradient norm of four steps under FSDP2, saved after the second, of a reference that
    moves in each."""
    fsdp: dict[str, Any] = {"fsdp": True, "fsdp_config": FSDP} if "WORLD_SIZE" in os.environ else {}
    trainer = trainer_of(
        folder,
        makers.make_model(1, tie_word_embeddings=tied),
        tied=tied,
        max_steps=4,
        logging_steps=1,
        save_steps=2,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        **fsdp,
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return [[log["loss"], log["grad_norm"]] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    here, rank = Path(sys.argv[1]), os.environ["RANK"]
    found: dict[str, Any] = {"costs": costs(here / "rank 0")}
    try:  # each on a disk of its own
        trainer_of(here / f"rank {rank}").train(resume_from_checkpoint=True)
    except ValueError as error:
        found["refused"] = str(error)
    found["said"] = command(here)
    AcceleratorState._reset_state()
    for tied in (False, True):
        found[f"moved {tied}"] = moved(here / str(tied), tied)
        found[f"resumed {tied}"] = moved(here / str(tied), tied, resume=True)
    if rank == "0":
        (here / "result.json").write_text(json.dumps(found))
    makers.leave()
