"""Five full-batch steps through TRL's trainers and through the presets of the same name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from datasets import Dataset

import fastpref

pytest.importorskip("trl")

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dpo": ("trl", "DPO", {}),
    "ipo": ("trl", "DPO", {"loss_type": "ipo"}),
    "kto": ("trl", "KTO", {"desirable_weight": 1.5}),
    "cpo": ("trl.experimental.cpo", "CPO", {}),
    "simpo": ("trl.experimental.cpo", "CPO", {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0}),
    "cpo_simpo": ("trl.experimental.cpo", "CPO", {"loss_type": "simpo", "simpo_gamma": 0.3}),
    "cpo_hinge": ("trl.experimental.cpo", "CPO", {"loss_type": "hinge", "cpo_alpha": 0.5}),
    "bare_hinge": ("trl.experimental.cpo", "CPO", {"loss_type": "hinge", "cpo_alpha": 0.0}),
    "cpo_ipo": ("trl.experimental.cpo", "CPO", {"loss_type": "ipo"}),
    "orpo": ("trl.experimental.orpo", "ORPO", {}),
}
SIZE = 8


def rows_of(make: Any, kind: str) -> Dataset:
    """Prompts begin with the token that TRL's CPO and ORPO put before them, others do not."""
    rows = [{**row, "prompt": "<s> " + row["prompt"]} for row in make.pairs(SIZE)]
    if kind == "KTO":
        rows = [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 != 1}
            for i, row in enumerate(rows)
        ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("name", CASES)
def test_five_steps_log_the_same_losses(
    make: Any,
    tokenizer: Any,
    options: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    place, kind, given = CASES[name]
    given = options(
        **given,
        per_device_train_batch_size=SIZE,
        max_steps=5,
        bf16=False,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    reference = {"ref_model": make.model(1)} if place == "trl" else {}
    logs = []
    for module in (import_module(place), fastpref):
        trainer = getattr(module, f"{kind}Trainer")(
            make.model(),
            args=getattr(module, f"{kind}Config")(**given),
            train_dataset=rows_of(make, kind),
            processing_class=tokenizer,
            **reference,
        )
        trainer.train()
        logs.append([log for log in trainer.state.log_history if "loss" in log])
    # The rewards that TRL logs for cpo's ipo are means; here ipo's are the sums that it has in dpo.
    rewards = [] if name == "cpo_ipo" else ["rewards/chosen", "rewards/margins"]
    rewards += ["rewards/accuracies"] if rewards and kind != "KTO" else []
    # TRL leaves the likelihood uncounted where its weight is 0.
    rewards += ["nll_loss"] if kind == "ORPO" or given.get("cpo_alpha", kind == "CPO") else []
    rewards += ["log_odds_ratio", "log_odds_chosen"] if kind == "ORPO" else []
    assert {key for log in logs[0] for key in log} <= set.intersection(*map(set, logs[1]))
    for key in ["loss", *rewards]:
        theirs, ours = ([log[key] for log in log_history] for log_history in logs)
        assert len(theirs) == 5
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    assert len({round(log["loss"], 4) for log in logs[0]}) == 5
