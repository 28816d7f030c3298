"""The order in which a trainer reads its data: even steps, resumed, on several ranks, streams."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler

from fastpref import DPOConfig, DPOTrainer
from fastpref.data.sampling import EvenTokens
from fastpref.loop import Loop

Options = Callable[..., dict[str, Any]]


class Seen:
    """A collator that remembers which examples each micro-batch held."""

    def __init__(self, collator: Any, kept: list[list[int]]) -> None:
        self.collator, self.kept = collator, kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)

    def __call__(self, rows: list[Any]) -> Any:
        self.kept.append([row["example_ids"] for row in rows])
        return self.collator(rows)


def even(
    make: Any, tokenizer: Any, options: Options, resume: str | None = None, **more: Any
) -> Any:
    """A trained trainer, and the examples of its micro-batches."""
    args = DPOConfig(
        **options(
            **{
                "train_sampling_strategy": "even_tokens",
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "max_steps": 8,
                "self_check": False,
                **more,
            }
        )
    )
    trainer = DPOTrainer(
        make.model(), args=args, train_dataset=make.pairs(22), processing_class=tokenizer
    )
    kept: list[list[int]] = []
    trainer.data_collator = Seen(trainer.data_collator, kept)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, kept


def losses_of(trainer: Any) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_even_steps_resumed_in_a_later_epoch(
    make: Any, tokenizer: Any, options: Options, tmp_path: Path
) -> None:
    """Of 22 pairs, 5 steps of 4 and one of 2; then the second epoch, resumed in its middle."""
    trainer, kept = even(make, tokenizer, options, save_strategy="steps", save_steps=1)
    assert sorted(chain.from_iterable(kept[:11])) == list(range(22))
    assert sorted(map(len, kept[:11])) == [2] * 11
    tokens = np.array(trainer.train_dataset["length"])
    sums = [tokens[kept[i] + kept[i + 1]].sum() for i in range(0, 10, 2)]
    assert max(sums) - min(sums) <= tokens.max() - tokens.min()
    assert kept[11:] != kept[: len(kept) - 11]
    resumed, again = even(
        make, tokenizer, options, resume=str(tmp_path / "run" / "checkpoint-7"), save_steps=99
    )
    assert again[: len(kept) - 13] == kept[13:]
    assert losses_of(resumed) == losses_of(trainer)


@pytest.mark.parametrize("kind", ["even_tokens", "random"])
def test_a_rank_that_resumes_in_a_later_epoch_reads_on(kind: str) -> None:
    """Two ranks' loaders, as Accelerate prepares them, made in this process."""
    rows = list(range(24))

    def loader(rank: int) -> Any:
        even = EvenTokens([7 * i % 11 + 1 for i in rows], 2, 4, seed=0)
        sampler: Any = RandomSampler(rows) if kind == "random" else even
        return prepare_data_loader(
            DataLoader(rows, batch_size=2, sampler=sampler),
            device=torch.device("cpu"),
            num_processes=2,
            process_index=rank,
            put_on_device=False,
            use_seedable_sampler=True,
            data_seed=42,
        )  # fmt: skip

    def read(loader: Any, epoch: float, skipped: int = 0) -> list[list[int]]:
        """As transformers does, whose state says which epoch it is, and the trainer's own loop."""
        state = SimpleNamespace(epoch=epoch)
        Loop(None).on_epoch_begin(None, state, None, train_dataloader=loader)
        loader = skip_first_batches(loader, skipped) if skipped else loader
        loader.set_epoch(int(epoch))
        return [batch.tolist() for batch in loader]

    whole = [loader(rank) for rank in range(2)]
    epochs = [[read(one, epoch) for one in whole] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    for first, second in epochs:
        assert sorted(chain.from_iterable(first + second)) == rows
    for rank in range(2):
        assert read(loader(rank), 1 + 2 / 6, skipped=2) == epochs[1][rank][2:]


def test_an_order_by_length_needs_more_than_a_stream(
    make: Any, tokenizer: Any, options: Options
) -> None:
    stream = make.pairs(8).to_iterable_dataset()
    given: dict[str, Any] = {"processing_class": tokenizer}
    for more in ({"group_by_length": True}, {"train_sampling_strategy": "even_tokens"}):
        args = DPOConfig(**options(**more))
        with pytest.raises(ValueError, match="needs the length of every row before training"):
            DPOTrainer(make.model(), args=args, train_dataset=stream, **given)
    DPOTrainer(make.model(), args=args, train_dataset=make.pairs(8), eval_dataset=stream, **given)
    with pytest.raises(ValueError, match=r"train_sampling_strategy must be 'random' or .*'even'"):
        DPOConfig(**options(train_sampling_strategy="even"))


@pytest.mark.parametrize("check", [True, False])
def test_a_stream_without_a_row_to_train_on_says_why(
    make: Any, tokenizer: Any, options: Options, check: bool
) -> None:
    rows = [{"prompt": "w1 w2", "chosen": " w3", "rejected": " w3"}] * 3
    rows += [{"prompt": "w1", "chosen": None, "rejected": " w3"}]
    with pytest.raises(ValueError, match=r"none of the 4 rows can be trained on: 1 .*, 3 ") as said:
        DPOTrainer(
            make.model(),
            args=DPOConfig(**options(self_check=check)),
            train_dataset=Dataset.from_list(rows).to_iterable_dataset(),
            processing_class=tokenizer,
        )
    assert "3 chosen equals rejected (first: [0, 1, 2])" in str(said.value)
