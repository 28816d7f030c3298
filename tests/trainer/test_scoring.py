"""Scoring a dataset before training: where the model lies, how many lookups, what is said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastpref import DPOConfig, DPOTrainer
from fastpref.reference_cache import ReferenceCache, Shard
from fastpref.reference_policy import AdapterOff, Frozen, Start
from fastpref.scoring import on_device

Options = Callable[..., dict[str, Any]]


class Travels(nn.Linear):
    """A layer that says where it is sent."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.went: list[str] = []

    def to(self, device: Any) -> Travels:  # type: ignore[override]
        self.went.append(torch.device(device).type)
        return self


def test_a_policy_that_is_its_reference_is_on_the_device_while_it_scores() -> None:
    """It is on the CPU until FSDP or ZeRO takes it."""
    cuda = torch.device("cuda")
    for reference in (Start(), AdapterOff()):
        policy = Travels()
        with on_device(reference, policy, cuda):
            assert policy.went == ["cuda"]
        assert policy.went == ["cuda", "cpu"]
        with pytest.raises(OSError, match="full"), on_device(reference, policy, cuda):
            raise OSError("full")
        assert policy.went == ["cuda", "cpu"] * 2
        with on_device(reference, policy, torch.device("cpu")):
            assert len(policy.went) == 4
    policy = Travels()
    with on_device(Frozen([nn.Linear(2, 2)]), policy, cuda):
        assert policy.went == []


def test_sequences_of_one_prompt_are_not_all_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their first token: 60 responses to one prompt cost 60 looks, not 1,830."""
    rows = [[first, second] for first in range(20) for second in (5, 6, 7)]
    cache = ReferenceCache(tmp_path, {"weights": "w"})
    for row in rows:
        cache.put([], [1, *row], None, np.asarray(row, np.float32))
    cache.flush()
    looks: list[int] = []
    sequence = Shard.sequence
    monkeypatch.setattr(Shard, "sequence", lambda self, i: (looks.append(i), sequence(self, i))[1])
    again = ReferenceCache(tmp_path, {"weights": "w"})
    for row in rows:
        found = again.get([], [1, *row])
        assert found is not None
        assert found.tolist() == row
    assert len(looks) == 20 * (1 + 2 + 3)
    cut = again.get([], [1, 19])
    assert cut is not None
    assert cut.tolist() == [19]
    assert again.get([], [1, 20]) is None
    empty = again.get([], [1])
    assert empty is not None
    assert len(empty) == 0


def test_one_pair_at_a_time_is_told_of_losses_that_compare_pairs(
    make: Any, tokenizer: Any, options: Options, caplog: pytest.LogCaptureFixture
) -> None:
    for size, said in ((1, True), (2, False)):
        caplog.clear()
        args = DPOConfig(**options(loss_type=["aot", "sft"], per_device_train_batch_size=size))
        with caplog.at_level(logging.INFO, "fastpref"):
            DPOTrainer(
                make.model(), args=args, train_dataset=make.pairs(4), processing_class=tokenizer
            )
        assert ("=1: aot compares the examples of a batch with each" in caplog.text) is said
        assert ("the loss couples the examples" in caplog.text) is not said


def test_offloading_on_a_cpu_is_refused(options: Options) -> None:
    args = DPOConfig(**options(gradient_checkpointing=True, activation_offloading=True))
    with pytest.raises(ValueError, match=r"on a CPU they are in its memory; drop it"):
        DPOTrainer("anything", args=args, train_dataset=[])
