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
from fastpref.data import PreferenceCollator
from fastpref.policy import response_logps

spec = importlib.util.spec_from_file_location("makers", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
makers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(makers)


def trained(config: PreferenceConfig, **given: Any) -> PreferenceTrainer:
    """A trainer in float64 that has trained on eight pairs."""
    trainer = PreferenceTrainer(
        makers.make_model().double(),
        makers.make_model(1).double(),
        args=config,
        train_dataset=makers.make_pairs(8),
        processing_class=makers.make_tokenizer(),
        **given,
    )
    trainer.train()
    return trainer


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
    trainer = trained(config, eval_dataset=makers.make_pairs(5, 1))
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return {
        "weights": [weights.sum().item(), weights.norm().item()],
        "logs": trainer.state.log_history,
        "files": sorted(p.name for p in folder.glob("checkpoint-4/fastpref*")),
    }


def updates(folder: Path) -> dict[str, list[float]]:
    """What one step of plain gradient descent on eight pairs changes, however they are divided into
    pairs a micro-batch and micro-batches a rank, and laid out."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    found = {}
    for size, windows in ((2, 2),) if ranks > 1 else ((8, 1), (4, 2)):
        for layout in ({}, {"prefix_sharing": False}, {"packing": False}):
            config = PreferenceConfig(
                output_dir=str(folder / "updates"),
                beta=0.5,
                max_steps=1,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=windows,
                # Adam and clipping would hide a wrong scale.
                optim="sgd",
                max_grad_norm=0.0,
                learning_rate=1.0,
                lr_scheduler_type="constant",
                save_strategy="no",
                self_check=False,
                use_cpu=True,
                disable_tqdm=True,
                ddp_backend="gloo" if ranks > 1 else None,
                **layout,
            )
            trainer = trained(config)
            before = makers.make_model().double().parameters()
            changes = [p - q for p, q in zip(trainer.model.parameters(), before, strict=True)]
            found[f"{ranks} x {windows} x {size} {layout}"] = makers.sketch(changes)
    return found


def sharded() -> list[float]:
    """Largest errors of log-probabilities and gradients of a model under FSDP2, whose head is
    gathered for its own forward and freed after it."""
    from torch.distributed.fsdp import fully_shard

    errors = []
    for tied in (False, True):
        model, whole = (makers.make_model(tie_word_embeddings=tied) for _ in range(2))
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model, reshard_after_forward=True)
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [{n: [3 + 20 * i + r, 7, 9] for i, n in enumerate(names)} for r in range(2)]
        batches = [PreferenceCollator(pad_token_id=0)([row]) for row in rows]
        expected = [response_logps(whole, batch).logps for batch in batches]
        (sum(logps.square().sum() for logps in expected) / 2).backward()
        rank = int(os.environ["RANK"])
        logps = response_logps(model, batches[rank]).logps
        logps.square().sum().backward()
        errors.append((logps - expected[rank]).abs().max().item())
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            errors.append((ours.grad.full_tensor() - theirs.grad).abs().max().item())
    return errors


if __name__ == "__main__":
    result = run(Path(sys.argv[1]))
    result["updates"] = updates(Path(sys.argv[1]))
    result["sharded"] = sharded()
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[1], "result.json").write_text(json.dumps(result))
    makers.leave()
