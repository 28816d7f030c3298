"""What is logged beside TRL's keys: times, tokens of a step, accuracy by length, KL."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM

from fastpref import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, stopwatch
from fastpref.metrics import Meter, accuracy_by_length
from fastpref.stopwatch import Stopwatch

Options = Callable[..., dict[str, Any]]


@pytest.fixture
def evaluated(make: Any, tokenizer: Any, options: Options) -> tuple[Any, dict[str, float]]:
    """A trainer whose policy is not its reference, and its evaluation of 30 pairs."""
    rows = make.pairs(30)
    args = DPOConfig(**options(per_device_eval_batch_size=8))
    trainer = DPOTrainer(
        make.model(), make.model(1), args, eval_dataset=rows, processing_class=tokenizer
    )
    return trainer, trainer.evaluate()


@torch.no_grad()
def test_accuracy_by_length_and_kl(make: Any, evaluated: tuple[Any, dict[str, float]]) -> None:
    trainer, found = evaluated
    policy, base = make.model(), make.model(1)
    wins: dict[str, list[float]] = {}
    gaps = []
    for row in trainer.eval_dataset:
        ratios = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            own, ref = (
                model(input_ids=ids)
                .logits[0, :-1]
                .log_softmax(-1)
                .gather(-1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :, 0]
                for model in (policy, base)
            )
            ratios.append(float((own - ref).sum()))
            gaps += [(ref - own).square() / 2]
        longer = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        wins.setdefault("1-32" if longer <= 32 else "33-64", []).append(ratios[0] > ratios[1])
    assert found["eval_kl"] == pytest.approx(float(torch.cat(gaps).mean()), rel=1e-4)
    for name, values in wins.items():
        key = f"eval_rewards/accuracies/len_{name}"
        assert found[key] == pytest.approx(sum(values) / len(values))
    assert sum("accuracies/len_" in key for key in found) == len(wins)


def test_pairs_fall_into_buckets_by_their_longer_response() -> None:
    wins = torch.tensor([1.0, 0, 1, 1, 0, 1])
    chosen = torch.tensor([1.0, 32, 33, 5, 40000, 65])
    rejected = torch.tensor([2.0, 7, 1, 64, 3, 65])
    one = torch.ones(6)
    rows = {
        "rewards/accuracies": (wins, one),
        "len/chosen": (chosen, one),
        "len/rejected": (rejected, one),
    }
    meter = Meter()
    meter.add(accuracy_by_length(rows))
    found = {k: v for k, v in meter.read(rates=False).items() if k != "num_tokens"}
    name = "rewards/accuracies/len_"
    assert found == {
        f"{name}1-32": 0.5,
        f"{name}33-64": 1.0,
        f"{name}65-128": 1.0,
        f"{name}16385-": 0.0,
    }
    assert accuracy_by_length({"logps/chosen": (wins, one)}) == {}


def test_tokens_of_a_step_and_their_spread() -> None:
    meter, rows = Meter(), {"x": (torch.ones(1), torch.ones(1))}
    for laid_out, ends in ((100, False), (50, True), (250, True), (70, False)):
        meter.add(rows, laid_out=laid_out)
        if ends:
            meter.end_step()
    resumed = Meter()
    resumed.load_state_dict(meter.state_dict(), torch.device("cpu"))
    for each in (meter, resumed):
        found = each.read(lambda t: 2 * t)  # two ranks that saw the same
        assert (found["len/tokens_per_step"], found["len/tokens_per_step_std"]) == (200, 50)
    meter.add(rows)
    assert "len/tokens_per_step" not in meter.read()


def test_the_head_is_timed_forward_and_backward(
    make: Any, tokenizer: Any, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that ticks each time it is read: twice in a forward, twice in a backward."""
    ticks = itertools.count()
    monkeypatch.setattr(stopwatch, "_now", lambda x: float(next(ticks)))
    watch = Stopwatch()
    hidden = torch.ones(3, requires_grad=True)
    watch.start(hidden)
    result = hidden * 2
    watch.stop(hidden)
    watch.around_backward(hidden, result)
    assert watch.take() == 1
    (result * 3).sum().backward()
    assert watch.take() == 1
    assert watch.take() == 0
    watch.stop(hidden)
    assert watch.take() == 0
    args = DPOConfig(
        **options(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    )
    trainer = DPOTrainer(
        make.model(), args=args, train_dataset=make.pairs(8), processing_class=tokenizer
    )
    trainer.train()
    for log in trainer.state.log_history[:2]:
        assert log["time/head_seconds"] == 4  # two micro-batches, one tick each way
        assert log["time/seconds"] > 0
        assert log["mem/peak_bytes"] > 0


def test_tokens_are_counted_before_the_first_log(
    make: Any, tokenizer: Any, options: Options
) -> None:
    args = DPOConfig(
        **options(
            max_steps=4,
            logging_steps=3,
            eval_strategy="steps",
            eval_steps=2,
            train_sampling_strategy="sequential",
        )
    )
    trainer = DPOTrainer(
        make.model(),
        args=args,
        train_dataset=make.pairs(16),
        eval_dataset=make.pairs(3, 1),
        processing_class=tokenizer,
    )
    trainer.train()
    rows = list(trainer.train_dataset)
    batches = [trainer.data_collator(rows[i : i + 4]) for i in range(0, 16, 4)]
    tokens = [batch["num_tokens"] for batch in batches]
    logs = trainer.state.log_history
    seen = [log["eval_num_tokens"] for log in logs if "eval_num_tokens" in log]
    assert seen == [sum(tokens[:2]), sum(tokens)]
    (log,) = [log for log in logs if "len/tokens_per_step" in log]
    laid_out = torch.tensor([float(b["input_ids"].numel()) for b in batches[:3]])
    assert log["len/tokens_per_step"] == pytest.approx(float(laid_out.mean()))
    assert log["len/tokens_per_step_std"] == pytest.approx(float(laid_out.std(correction=0)))


def test_the_balancing_loss_of_experts_is_added_and_logged(
    make: Any, tokenizer: Any, options: Options
) -> None:
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        router_aux_loss_coef=0.5,
    )
    torch.manual_seed(0)
    model, logs = MixtralForCausalLM(config), []
    for given in (None, 0.0, 2.0):
        args = DPOConfig(**options(router_aux_loss_coef=given))
        trainer = DPOTrainer(
            model, args=args, train_dataset=make.pairs(4), processing_class=tokenizer
        )
        logs.append(trainer.evaluate(make.pairs(4)))
    own, none, more = logs
    assert "eval_aux_loss" not in none
    aux = own["eval_aux_loss"]
    assert aux == pytest.approx(more["eval_aux_loss"])
    assert aux > 0.5
    for log, weight in ((own, 0.5), (more, 2.0)):
        assert log["eval_loss"] == pytest.approx(none["eval_loss"] + weight * aux, abs=1e-5)


def test_a_log_without_a_kind_of_response_has_no_number_for_it(
    make: Any, tokenizer: Any, options: Options, tmp_path: Path
) -> None:
    """KTO's rejected responses, of a step that has none: NaN, and null in ``metrics.jsonl``."""
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i < 4 or i % 2 == 0}
        for i, row in enumerate(make.pairs(8))
    ]
    args = KTOConfig(**options(max_steps=2, train_sampling_strategy="sequential"))
    trainer = KTOTrainer(
        make.model(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    first, second = (line for line in lines if "loss" in line)
    none = {f"{name}/rejected" for name in ("rewards", "logps", "logits", "len")}
    assert {key for key, value in first.items() if value is None} == none | {"rewards/margins"}
    assert set(first) == set(second)
    assert None not in second.values()
    assert math.isnan(trainer.state.log_history[0]["rewards/margins"])
