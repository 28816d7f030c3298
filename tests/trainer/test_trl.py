"""A TRL script with its import changed: the same losses, and at least the same metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastpref

trl = pytest.importorskip("trl")

LOSSES = ["sigmoid", "ipo", ["sigmoid", "sft"], "exo_pair", "robust", "bco_pair", "sppo_hard"]
LOSSES += ["aot", "apo_zero", "discopop", "sigmoid_norm", "hinge", "nca_pair"]


def script(module: Any, make: Any, tokenizer: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The script; only ``module`` differs."""
    args = module.DPOConfig(**options)
    trainer = module.DPOTrainer(
        make.model(),
        ref_model=make.model(),
        args=args,
        train_dataset=make.pairs(20),
        eval_dataset=make.pairs(6, 1),
        processing_class=tokenizer,
    )
    trainer.train()
    return list(trainer.state.log_history)


@pytest.mark.parametrize("loss", LOSSES[:3], ids=str)
def test_five_steps_equal_trl(
    make: Any, tokenizer: Any, options: Callable[..., dict[str, Any]], loss: Any
) -> None:
    given = options(
        loss_type=loss,
        max_steps=5,
        bf16=False,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=5,
    )
    theirs = script(trl, make, tokenizer, given)
    ours = script(fastpref, make, tokenizer, given)
    for key in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected", "entropy"):
        expected = [log[key] for log in theirs if key in log]
        assert len(expected) == 5
        torch.testing.assert_close(
            [x[key] for x in ours if key in x], expected, rtol=2e-4, atol=2e-4
        )
    keys = [next(set(log) for log in logs if "loss" in log) for logs in (theirs, ours)]
    assert keys[0] <= keys[1]
    logs = [next(log for log in logs if "eval_loss" in log) for logs in (theirs, ours)]
    timed = {k for k in logs[0] if k.startswith("eval_runtime") or "per_second" in k}
    assert set(logs[0]) <= set(logs[1])
    for key in set(logs[0]) - timed - {"eval_num_tokens"}:
        assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-3, abs=1e-3), key


@pytest.mark.parametrize("loss", LOSSES[3:], ids=str)
def test_losses_equal_trl(
    make: Any, tokenizer: Any, options: Callable[..., dict[str, Any]], loss: str
) -> None:
    """Against a reference that differs from the policy."""
    given = options(loss_type=loss, bf16=False, label_smoothing=0.0)
    if loss in ("exo_pair", "robust"):
        given["label_smoothing"] = 0.05
    found = []
    for module in (trl, fastpref):
        trainer = module.DPOTrainer(
            make.model(),
            ref_model=make.model(1),
            args=module.DPOConfig(**given),
            train_dataset=make.pairs(4),
            eval_dataset=make.pairs(4),
            processing_class=tokenizer,
        )
        found.append(trainer.evaluate()["eval_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
