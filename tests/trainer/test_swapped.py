"""Chosen and rejected exchanged give the same numbers, exchanged: neither side sees the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from fastpref import DPOConfig, DPOTrainer
from fastpref.data import PreferenceCollator
from fastpref.policy import response_logps

SIDES = ("chosen", "rejected")
ROWS = [
    {"prompt_ids": [1, 5, 6, 9], "chosen_ids": [5, 6, 7, 2], "rejected_ids": [6, 30, 5]},
    {"prompt_ids": [1, 40], "chosen_ids": [8], "rejected_ids": [9, 9, 11, 12, 13, 2]},
    {"prompt_ids": [1, 7, 7, 7, 3], "chosen_ids": [21, 22, 2], "rejected_ids": [21, 22, 23, 2]},
]
LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "apart": {"prefix_sharing": False},
    "rows": {"prefix_sharing": False, "row_tokens": 12},
}


def exchanged(row: dict[str, Any]) -> dict[str, Any]:
    ends = {name: name.replace("chosen", "@").replace("rejected", "chosen") for name in row}
    return {ends[name].replace("@", "rejected"): value for name, value in row.items()}


def sides(model: Any, rows: list[dict[str, Any]], layout: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the chosen tokens, and of the rejected ones, row after row."""
    logps = response_logps(model, PreferenceCollator(pad_token_id=0, **layout)(rows)).logps
    first, second = logps.split([sum(len(row[f"{side}_ids"]) for row in rows) for side in SIDES])
    return first, second


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_log_probabilities_and_gradients(make: Any, layout: str, seed: int) -> None:
    model = make.model(seed)
    chosen, rejected = sides(model, ROWS, LAYOUTS[layout])
    other = sides(model, [exchanged(row) for row in ROWS], LAYOUTS[layout])
    torch.testing.assert_close(other, (rejected, chosen), rtol=0, atol=1e-5)
    weights = [torch.rand(len(x)) for x in (chosen, rejected)]
    found = []
    for first, second in ((chosen, rejected), (other[1], other[0])):
        loss = (first * weights[0]).sum() - (second * weights[1]).sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, two in zip(*found, strict=True):
        assert (one - two).abs().max() <= 1e-5 * one.abs().max()


@pytest.mark.parametrize("sharing", [True, False])
def test_a_trainers_numbers(
    make: Any, tokenizer: Any, options: Callable[..., dict[str, Any]], sharing: bool
) -> None:
    rows, found = make.pairs(12), []
    for data in (rows, Dataset.from_list([exchanged(row) for row in rows])):
        args = DPOConfig(**options(prefix_sharing=sharing, per_device_eval_batch_size=5))
        trainer = DPOTrainer(
            make.model(), make.model(1), args, eval_dataset=data, processing_class=tokenizer
        )
        found.append(trainer.evaluate())
    one, two = found
    for name in ("rewards", "logps", "logits", "len"):
        for side, other in (SIDES, SIDES[::-1]):
            expected = one[f"eval_{name}/{side}"]
            assert two[f"eval_{name}/{other}"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert two["eval_rewards/margins"] == pytest.approx(-one["eval_rewards/margins"], rel=1e-5)
    assert two["eval_rewards/accuracies"] == pytest.approx(1 - one["eval_rewards/accuracies"])
    assert abs(one["eval_rewards/margins"]) > 0.01
