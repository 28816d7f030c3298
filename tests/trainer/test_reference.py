"""Which policy the reference is, and that it stays what it was."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from fastpref import DPOConfig, DPOTrainer, PreferenceConfig, PreferenceTrainer
from fastpref.objective import make_examples, weigh
from fastpref.policy import ResponseLogps
from fastpref.reference_policy import AdapterOff, Frozen, Reference, Stored, Zero

Options = Callable[..., dict[str, Any]]
GOLDEN = json.loads((Path(__file__).parents[1] / "losses" / "golden.json").read_text())


def losses_of(trainer: Any) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def trained(make: Any, tokenizer: Any, config: Any, rows: Any = None, **given: Any) -> Any:
    model = given.pop("model", None) or make.model()
    trainer = PreferenceTrainer(
        model, args=config, train_dataset=rows or make.pairs(8), processing_class=tokenizer, **given
    )
    trainer.train()
    return trainer


def reference_logps(trainer: Any) -> torch.Tensor:
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    scored = trainer.reference.score(trainer.model, batch)
    assert scored is not None
    return scored.logps


def test_a_copy_of_the_object_not_a_reload_by_name(
    make: Any, tokenizer: Any, options: Options, tmp_path: Path
) -> None:
    make.model().save_pretrained(tmp_path / "saved")
    model = type(make.model()).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    trainer = trained(make, tokenizer, PreferenceConfig(**options()), model=model)
    assert losses_of(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert not any(p.requires_grad for p in trainer.reference.models[0].parameters())


@pytest.mark.parametrize("kind", ["lora", "head in lora", "head in modules_to_save"])
def test_adapters_off_is_the_model_without_them(
    make: Any, tokenizer: Any, options: Options, kind: str
) -> None:
    peft = LoraConfig(
        r=4,
        target_modules=["q_proj", *(["lm_head"] if kind == "head in lora" else [])],
        modules_to_save=["lm_head"] if "save" in kind else None,
    )
    config = PreferenceConfig(**options(max_steps=4, gradient_checkpointing=True))
    trainer = trained(make, tokenizer, config, peft_config=peft)
    assert isinstance(trainer.reference, AdapterOff)
    assert losses_of(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    base = PreferenceTrainer(
        make.model(), args=config, train_dataset=make.pairs(8), processing_class=tokenizer
    )
    torch.testing.assert_close(reference_logps(trainer), reference_logps(base), rtol=0, atol=1e-6)
    moved = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert all(p.requires_grad and p.abs().max() > 0 for p in moved)


def test_a_trained_adapter_is_its_own_reference(
    make: Any, tokenizer: Any, options: Options, tmp_path: Path
) -> None:
    """As in TRL: a PEFT model that comes with an adapter starts from it, and is held to it."""
    torch.manual_seed(0)
    adapted = get_peft_model(make.model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    adapted.save_pretrained(tmp_path / "adapter")

    def load() -> Any:
        return PeftModel.from_pretrained(make.model(), tmp_path / "adapter", is_trainable=True)

    config = PreferenceConfig(**options(max_steps=4, save_strategy="steps", save_steps=2))
    fresh = PreferenceTrainer(
        load(), args=config, train_dataset=make.pairs(8), processing_class=tokenizer
    )
    before = reference_logps(fresh)
    trainer = trained(make, tokenizer, config, model=load())
    assert losses_of(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    torch.testing.assert_close(reference_logps(trainer), before, rtol=0, atol=0)
    assert {n.split(".")[-2] for n, p in trainer.model.named_parameters() if p.requires_grad} == {
        "default"
    }
    resumed = PreferenceTrainer(
        load(), args=config, train_dataset=make.pairs(8), processing_class=tokenizer
    )
    resumed.train(resume_from_checkpoint=str(Path(config.output_dir) / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(trainer)


def test_a_name_a_model_and_several(
    make: Any, tokenizer: Any, options: Options, tmp_path: Path
) -> None:
    make.model(1).save_pretrained(tmp_path / "one")
    tokenizer.save_pretrained(tmp_path / "one")
    config = PreferenceConfig(**options())
    by_name = trained(make, tokenizer, config, ref_model=str(tmp_path / "one"))
    by_model = trained(make, tokenizer, config, ref_model=make.model(1))
    assert losses_of(by_name) == losses_of(by_model)
    assert abs(losses_of(by_model)[0] - math.log(2)) > 1e-3
    names = [str(tmp_path / "one"), str(tmp_path / "one")]
    config = PreferenceConfig(**options(loss_type="multi_dpo", ref_models=names))
    several = trained(make, None, config, model=str(tmp_path / "one"))
    assert isinstance(several.reference, Frozen)
    assert several.reference.count == 2
    assert losses_of(several)[0] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(ValueError, match=r"mrpo needs .*several reference models"):
        trained(make, tokenizer, PreferenceConfig(**options(loss_type="mrpo")))


@pytest.mark.parametrize("case", ["frozen", "lora", "tokens"])
def test_scoring_the_data_beforehand_changes_nothing(
    make: Any, tokenizer: Any, options: Options, case: str
) -> None:
    given: dict[str, Any] = {} if case == "lora" else {"ref_model": make.model(1)}
    if case == "lora":
        given["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"])
    loss = {"loss_type": "sampo"} if case == "tokens" else {"ld_alpha": 0.5}
    runs = []
    for precompute in (False, True):
        config = PreferenceConfig(
            **options(
                **loss, precompute_ref_log_probs=precompute, precompute_ref_batch_size=3, seed=1
            )
        )
        torch.manual_seed(0)
        trainer = trained(make, tokenizer, config, **given)
        assert isinstance(trainer.reference, Stored) == precompute
        runs.append(losses_of(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-6)
    late = make.pairs(3, 5)
    if case != "lora":
        with pytest.raises(ValueError, match="the reference was freed after it had scored"):
            trainer.evaluate(late)
        return
    live = PreferenceTrainer(
        trainer.model, args=PreferenceConfig(**options(**loss)), train_dataset=late,
        processing_class=tokenizer,
    )  # fmt: skip
    live.reference = AdapterOff()
    expected = live.evaluate(late)["eval_loss"]
    assert trainer.evaluate(late)["eval_loss"] == pytest.approx(expected, abs=1e-6)
    predicted = trainer.predict(late)
    assert predicted.predictions.shape == (3, 4)
    assert predicted.metrics["test_loss"] == pytest.approx(expected, abs=1e-6)


def test_columns_of_sums(make: Any, tokenizer: Any, options: Options) -> None:
    rows = make.pairs(4)
    config = DPOConfig(**options(per_device_eval_batch_size=3))
    live = DPOTrainer(
        make.model(), make.model(1), config, eval_dataset=rows, processing_class=tokenizer
    )
    live.train_dataset = live.eval_dataset
    batch = live.data_collator(list(live.eval_dataset))
    logps, bounds = reference_logps(live), batch["cu_seqlens"].tolist()
    sums = [float(logps[a:b].sum()) for a, b in pairwise(bounds)]
    stored = rows.add_column("ref_chosen_logps", sums[:4]).add_column(
        "ref_rejected_logps", sums[4:]
    )
    trainer = DPOTrainer(make.model(), args=config, eval_dataset=stored, processing_class=tokenizer)
    assert isinstance(trainer.reference, Stored)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(live.evaluate()["eval_loss"], abs=1e-6)
    config = DPOConfig(**options(ld_alpha=0.5))
    with pytest.raises(ValueError, match="ld_alpha weighs the reference's tokens"):
        DPOTrainer(make.model(), args=config, eval_dataset=stored, processing_class=tokenizer)


@pytest.mark.parametrize("name", ["mrpo_k2", "mrpo_k3", "multi_dpo_k2"])
def test_columns_of_several_references_give_the_golden_losses(
    make: Any, tokenizer: Any, options: Options, name: str
) -> None:
    """Through dataset, trainer and collator; responses of one token, whose log-probability is that
    of the golden case."""
    case = GOLDEN[name]
    count = len(case["inputs"]["ref_w"])
    rows = {
        "prompt_ids": [[1, 5 + i] for i in range(4)],
        "chosen_ids": [[7]] * 4,
        "rejected_ids": [[8]] * 4,
        "ref_chosen_logps": [list(sums) for sums in zip(*case["inputs"]["ref_w"], strict=True)],
        "ref_rejected_logps": [list(sums) for sums in zip(*case["inputs"]["ref_l"], strict=True)],
    }
    config = PreferenceConfig(**options(loss_type=name.rpartition("_")[0], beta=0.1))
    trainer = PreferenceTrainer(
        make.model(),
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    assert isinstance(trainer.reference, Stored)
    assert trainer.reference.count == count
    batch = trainer.data_collator(list(trainer.train_dataset))
    logps = torch.tensor([*case["inputs"]["lw"], *case["inputs"]["ll"]], dtype=torch.float64)
    examples = make_examples(trainer.combined, batch, ResponseLogps(logps), None)
    losses, _ = weigh(trainer.combined, examples, trainer.ranks, {}, update=False)
    assert losses.tolist() == pytest.approx(case["outputs"]["losses"], abs=1e-6)
    trainer.train()
    assert math.isfinite(losses_of(trainer)[0])


def test_columns_of_several_references_stand_in_for_the_models(
    make: Any, tokenizer: Any, options: Options
) -> None:
    """In training and evaluation, from a stream too; and of labelled responses."""
    rows, models = make.pairs(4), [make.model(1), make.model(2)]
    config = PreferenceConfig(**options(loss_type="mrpo", max_steps=2))
    live = PreferenceTrainer(
        make.model(),
        models,
        config,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    batch = live.data_collator(list(live.train_dataset))
    logps, bounds = reference_logps(live), batch["cu_seqlens"].tolist()
    sums = [logps[:, a:b].sum(1).tolist() for a, b in pairwise(bounds)]
    stored = rows.add_column("ref_chosen_logps", sums[:4]).add_column(
        "ref_rejected_logps", sums[4:]
    )
    live.train()
    for data in (stored, stored.to_iterable_dataset()):
        given = trained(make, tokenizer, config, data, eval_dataset={"held": data})
        assert given.reference.count == 2
        assert losses_of(given) == pytest.approx(losses_of(live), abs=1e-5)
        found = given.evaluate()["eval_held_loss"]
        assert found == pytest.approx(live.evaluate()["eval_loss"], abs=1e-5)


def test_columns_of_references_that_do_not_go_together(
    make: Any, tokenizer: Any, options: Options
) -> None:
    rows = make.pairs(4)

    def build(chosen: Any, rejected: Any, **given: Any) -> None:
        data = rows.add_column("ref_chosen_logps", [chosen] * 4)
        data = data.add_column("ref_rejected_logps", [rejected] * 4)
        args = PreferenceConfig(**options(loss_type="mrpo"))
        given = {key: data if value is None else value for key, value in given.items()}
        PreferenceTrainer(
            make.model(), args=args, train_dataset=data, processing_class=tokenizer, **given
        )

    with pytest.raises(ValueError, match=r"different numbers of references: [^.]*2 in ref_chosen"):
        build([-1.0, -2.0], [-1.0, -2.0, -3.0])
    held = rows.add_column("ref_chosen_logps", [-1.0] * 4)
    held = held.add_column("ref_rejected_logps", [-1.0] * 4)
    with pytest.raises(ValueError, match=r"1 in ref_\w+_logps held"):
        build([-1.0, -2.0], [-1.0, -2.0], eval_dataset={"held": held})
    with pytest.raises(ValueError, match=r"mrpo needs .*several reference models.* The run has 1"):
        build([-1.0], [-1.0])


def test_none_and_zero(make: Any, tokenizer: Any, options: Options) -> None:
    config = PreferenceConfig(**options(loss_type="simpo"))
    trainer = trained(make, tokenizer, config, ref_model=make.model(1))
    assert type(trainer.reference) is Reference
    config = PreferenceConfig(**options(reference_free=True, max_steps=1))
    trainer = trained(make, tokenizer, config)
    assert isinstance(trainer.reference, Zero)
    log = trainer.state.log_history[0]
    assert log["rewards/chosen"] == pytest.approx(0.1 * log["logps/chosen"], abs=1e-6)


def test_a_reference_that_follows(make: Any, tokenizer: Any, options: Options) -> None:
    """After step 2 and again after step 4: 0.6 of the policy, 0.4 of itself."""
    weights: list[torch.Tensor] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kw: Any) -> None:
            weights.append(copy.deepcopy(model.lm_head.weight.detach()))

    config = PreferenceConfig(**options(max_steps=5, sync_ref_model=True, ref_model_sync_steps=2))
    trainer = trained(make, tokenizer, config, callbacks=[Watch()])
    start = make.model().lm_head.weight
    expected = 0.6 * weights[1] + 0.4 * start
    expected = 0.6 * weights[3] + 0.4 * expected
    torch.testing.assert_close(trainer.reference.models[0].lm_head.weight, expected)


def test_what_cannot_be_a_reference(make: Any, tokenizer: Any, options: Options) -> None:
    model = make.model()
    given = {"train_dataset": make.pairs(4), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="ref_model is the model itself"):
        DPOTrainer(model, model, DPOConfig(**options()), **given)
    config = DPOConfig(**options(sync_ref_model=True))
    peft = LoraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="sync_ref_model moves a full copy of the policy"):
        DPOTrainer(model, args=config, peft_config=peft, **given)
    with pytest.raises(ValueError, match="no parameter is trainable"):
        DPOTrainer(make.model().requires_grad_(False), args=DPOConfig(**options()), **given)
    with pytest.raises(TypeError, match=r"expected a peft\.PeftConfig"):
        DPOTrainer(make.model(), args=DPOConfig(**options()), peft_config={"r": 4}, **given)
