"""KTO, CPO, SimPO and ORPO: their losses equal plain PyTorch, KTO's also TRL."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

import fastpref
from fastpref import CPOConfig, CPOTrainer, KTOConfig, KTOTrainer, ORPOConfig, ORPOTrainer

Options = Callable[..., dict[str, Any]]


def unpaired(make: Any, count: int) -> Dataset:
    rows = make.pairs(count)
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "completion": row["rejected" if i % 3 == 1 else "chosen"],
                "label": i % 3 != 1,
            }
            for i, row in enumerate(rows)
        ]
    )


def token_logps(model: Any, tokenizer: Any, prompt: str, response: str) -> torch.Tensor:
    """Of all tokens but the first, and how many of them are the prompt's."""
    ids = tokenizer(prompt + response + tokenizer.eos_token)["input_ids"]
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def parts(model: Any, tokenizer: Any, rows: Dataset) -> list[dict[str, torch.Tensor]]:
    found = []
    for row in rows:
        size = len(tokenizer(row["prompt"])["input_ids"]) - 1
        sides = {
            s: token_logps(model, tokenizer, row["prompt"], row[s]) for s in ("chosen", "rejected")
        }
        found.append({s: x[size:] for s, x in sides.items()} | {"prompt": sides["chosen"][:size]})
    return found


def evaluate(trainer_class: Any, config: Any, make: Any, tokenizer: Any, rows: Dataset) -> Any:
    trainer = trainer_class(
        make.model(), args=config, eval_dataset=rows, processing_class=tokenizer
    )
    assert not trainer.reference.models  # none of these has a reference
    return trainer.evaluate()


def test_orpo(make: Any, tokenizer: Any, options: Options) -> None:
    rows = make.pairs(5)
    config = ORPOConfig(**options(per_device_eval_batch_size=2))
    found = evaluate(ORPOTrainer, config, make, tokenizer, rows)
    each = parts(make.model(), tokenizer, rows)
    nll = -torch.cat([torch.cat([p["prompt"], p["chosen"]]) for p in each]).mean()
    odds = [
        p["chosen"].mean()
        - p["rejected"].mean()
        - torch.log1p(-p["chosen"].mean().exp())
        + torch.log1p(-p["rejected"].mean().exp())
        for p in each
    ]
    expected = nll - 0.1 * F.logsigmoid(torch.stack(odds)).mean()
    assert found["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "simpo", "alphapo", "hinge", "ipo"])
def test_cpo(make: Any, tokenizer: Any, options: Options, loss: str) -> None:
    rows = make.pairs(5)
    alpha = {"alpha": 0.25} if loss == "alphapo" else {}
    config = CPOConfig(**options(loss_type=loss, beta=2.0, per_device_eval_batch_size=2, **alpha))
    found = evaluate(CPOTrainer, config, make, tokenizer, rows)
    each = parts(make.model(), tokenizer, rows)
    nll = -torch.cat([p["chosen"] for p in each]).mean()
    sums = torch.stack([p["chosen"].sum() - p["rejected"].sum() for p in each])
    if loss == "sigmoid":
        expected = -F.logsigmoid(2.0 * sums).mean() + nll
    elif loss == "hinge":
        expected = (1 - 2.0 * sums).relu().mean() + nll
    elif loss == "ipo":
        means = torch.stack([p["chosen"].mean() - p["rejected"].mean() for p in each])
        expected = (means - 0.25).square().mean() + nll
    else:

        def shaped(x: torch.Tensor) -> torch.Tensor:
            return x.mean() if loss == "simpo" else (1 - x.mean().exp() ** -0.25) / 0.25

        gaps = torch.stack([shaped(p["chosen"]) - shaped(p["rejected"]) for p in each])
        expected = -F.logsigmoid(2.0 * gaps - 0.5).mean() + (nll if loss == "simpo" else 0)
    assert found["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_orpo_trains_the_same_in_any_micro_batches(
    make: Any, tokenizer: Any, options: Options
) -> None:
    """Its likelihood term is a mean over the tokens, prompts' too, of the whole window."""
    runs = []
    for size, accumulation in ((4, 1), (1, 4)):
        config = ORPOConfig(
            **options(
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                train_sampling_strategy="sequential",
            )
        )
        trainer = ORPOTrainer(
            make.model().double(),
            args=config,
            train_dataset=make.pairs(8),
            processing_class=tokenizer,
        )
        trainer.train()
        runs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)
    assert runs[0][-1] < runs[0][0]


def test_kto_equals_trl(make: Any, tokenizer: Any, options: Options) -> None:
    trl = pytest.importorskip("trl")
    given = options(
        max_steps=4,
        train_sampling_strategy="sequential",
        bf16=False,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    logs = []
    for module in (trl, fastpref):
        trainer = module.KTOTrainer(
            make.model(),
            ref_model=make.model(1),
            args=module.KTOConfig(**given),
            train_dataset=unpaired(make, 16),
            processing_class=tokenizer,
        )
        trainer.train()
        logs.append([log for log in trainer.state.log_history if "loss" in log])
    theirs, ours = logs
    assert set(theirs[0]) <= set(ours[0])
    for a, b in zip(theirs, ours, strict=True):
        for key in set(a) - {"grad_norm", "num_tokens"}:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-3), key
    assert any(log["kl"] > 0 for log in ours)


def test_kto_unpairs_pairs_and_warns_of_a_batch_of_one(
    make: Any, tokenizer: Any, options: Options, caplog: pytest.LogCaptureFixture
) -> None:
    config = KTOConfig(**options(per_device_train_batch_size=1, max_steps=2))
    trainer = KTOTrainer(
        make.model(), args=config, train_dataset=make.pairs(3), processing_class=tokenizer
    )
    assert len(trainer.train_dataset) == 6
    assert "per_device_train_batch_size=1: kto takes its reference point from" in caplog.text
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.5)
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    caplog.clear()
    for config in (
        KTOConfig(**options(per_device_train_batch_size=2)),
        KTOConfig(**options(per_device_train_batch_size=1, loss_type="apo_zero_unpaired")),
    ):
        KTOTrainer(
            make.model(), args=config, train_dataset=make.pairs(3), processing_class=tokenizer
        )
    assert "per_device_train_batch_size" not in caplog.text


def test_trls_names_that_have_no_loss_here_are_refused(options: Options) -> None:
    with pytest.raises(ValueError, match="loss_type='kto_pair': CPOConfig has sigmoid"):
        CPOConfig(**options(loss_type="kto_pair"))
    for loss in ("hinge", "sigmoid", "simpo"):
        with pytest.raises(ValueError, match="set loss_type='alphapo', or alpha=0"):
            CPOConfig(**options(loss_type=loss, alpha=0.5))
    with pytest.raises(ValueError, match="ipo stands alone"):
        CPOConfig(**options(loss_type=["ipo", "simpo"]))


def test_unpaired_data_may_bring_the_references_sums(
    make: Any, tokenizer: Any, options: Options
) -> None:
    """A column ``ref_logps`` holds a sum for each row; it is not taken for per-token values."""
    pairs = make.pairs(8).remove_columns("rejected").rename_column("chosen", "completion")
    rows = pairs.add_column("label", [True, False] * 4).add_column("ref_logps", [-9.5] * 8)
    args = fastpref.KTOConfig(**options(loss_type="apo_zero_unpaired", max_steps=2, bf16=False))
    trainer = fastpref.KTOTrainer(
        make.model(), args=args, train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    first = trainer.state.log_history[0]
    scored = [first[f"logps/{side}"] for side in ("chosen", "rejected")]
    rewards = [first[f"rewards/{side}"] for side in ("chosen", "rejected")]
    for logp, reward in zip(scored, rewards, strict=True):
        assert reward == pytest.approx(0.1 * (logp + 9.5), rel=1e-4)


def test_ref_model_is_where_trl_scripts_look_for_it(
    make: Any, tokenizer: Any, options: Callable[..., dict[str, Any]]
) -> None:
    for given, expected in ((make.model(1), torch.nn.Module), (None, torch.nn.Module)):
        trainer = fastpref.DPOTrainer(
            make.model(),
            given,
            args=fastpref.DPOConfig(**options()),
            train_dataset=make.pairs(4),
            processing_class=tokenizer,
        )
        assert isinstance(trainer.ref_model, expected)
        assert given is None or trainer.ref_model is given
    trainer = fastpref.ORPOTrainer(
        make.model(),
        args=fastpref.ORPOConfig(**options()),
        train_dataset=make.pairs(4),
        processing_class=tokenizer,
    )
    assert trainer.ref_model is None
