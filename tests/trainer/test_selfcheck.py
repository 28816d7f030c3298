"""Before training, is the model what the fused head takes it for? While training, is the loss a
number?"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpref import DPOConfig, DPOTrainer

Options = Callable[..., dict[str, Any]]


def without_mask(forward: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def losses_of(trainer: Any) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_a_hidden_logit_scale_is_found_before_training(
    make: Any, tokenizer: Any, options: Options
) -> None:
    class Loud(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 1.3 * super().forward(x)

    model = make.model()
    loud = Loud(32, model.config.vocab_size, bias=False)
    loud.weight = model.lm_head.weight
    model.lm_head = loud
    args = DPOConfig(**options())
    trainer = DPOTrainer(model, args=args, train_dataset=make.pairs(), processing_class=tokenizer)
    with pytest.raises(
        RuntimeError, match=r"self-check: the fused head .* -\d+\.\d+ from the model"
    ) as e:
        trainer.train()
    assert "custom head" in str(e.value)
    args = DPOConfig(**options(self_check=False, max_steps=1))
    DPOTrainer(model, args=args, train_dataset=make.pairs(), processing_class=tokenizer).train()


def test_a_reference_that_is_not_the_start_is_found(
    make: Any, tokenizer: Any, options: Options
) -> None:
    args = DPOConfig(**options())
    trainer = DPOTrainer(
        make.model(), args=args, train_dataset=make.pairs(), processing_class=tokenizer
    )
    with torch.no_grad():
        trainer.reference.models[0].lm_head.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="the reference is meant to be the policy as it starts"):
        trainer.train()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    make: Any, tokenizer: Any, options: Options, value: float
) -> None:
    model = make.model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, :2] = value
        model.model.norm.weight[5] = value
    args = DPOConfig(**options())
    trainer = DPOTrainer(model, args=args, train_dataset=make.pairs(), processing_class=tokenizer)
    with pytest.raises(FloatingPointError) as raised:
        trainer.train()
    said = str(raised.value)
    assert "the weights of LlamaForCausalLM are not finite before training" in said
    assert "model.layers.0.mlp.up_proj.weight (2 of 1536), model.norm.weight (1 of 32);" in said
    assert "log-probability nan" in said
    assert "custom head" not in said


def test_finite_weights_that_overflow_are_told_apart(
    make: Any, tokenizer: Any, options: Options
) -> None:
    model = make.model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    args = DPOConfig(**options())
    trainer = DPOTrainer(model, args=args, train_dataset=make.pairs(), processing_class=tokenizer)
    message = "all weights of LlamaForCausalLM are finite, but in torch.float32 its log-prob"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()


def test_a_reference_that_is_not_finite_is_named(
    make: Any, tokenizer: Any, options: Options
) -> None:
    """Not the data, nor a step that was never taken."""
    broken = make.model(1)
    with torch.no_grad():
        broken.model.norm.weight[5] = float("nan")
    trainer = DPOTrainer(
        make.model(),
        broken,
        DPOConfig(**options()),
        train_dataset=make.pairs(),
        processing_class=tokenizer,
    )
    with pytest.raises(FloatingPointError, match="the reference gives log-probabilities that are"):
        trainer.train()


def test_a_model_that_follows_no_mask_gets_a_row_for_each_sequence(
    make: Any, tokenizer: Any, options: Options, caplog: pytest.LogCaptureFixture
) -> None:
    """As state-space models do; the numbers are those of the same model that follows masks."""
    runs = []
    for deaf in (False, True):
        model = make.model()
        if deaf:
            forward = model.model.forward
            model.model.forward = partial(without_mask, forward)
        args = DPOConfig(**options(loss_type=["sigmoid", "orpo"], nll_scope="all"))
        trainer = DPOTrainer(
            model, make.model(1), args, train_dataset=make.pairs(), processing_class=tokenizer
        )
        trainer.train()
        assert trainer.data_collator.packed == (not deaf)
        runs.append(losses_of(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)
    assert "other numbers to packed rows than to one sequence at a time" in caplog.text
    args = DPOConfig(**options(packing=False, max_steps=1))
    trainer = DPOTrainer(
        make.model(), args=args, train_dataset=make.pairs(), processing_class=tokenizer
    )
    assert next(iter(trainer.get_train_dataloader()))["attention_mask"].dim() == 2


def test_windows_by_the_place_in_the_row_are_told_by_their_name(
    make: Any, tokenizer: Any, options: Options, caplog: pytest.LogCaptureFixture
) -> None:
    """GPT-Neo's are longer than the rows of the check, which would pass."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=97,
        hidden_size=32,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=4,
        window_size=64,
        max_position_embeddings=128,
    )
    model, args = GPTNeoForCausalLM(config), DPOConfig(**options(max_steps=1))
    trainer = DPOTrainer(model, args=args, train_dataset=make.pairs(), processing_class=tokenizer)
    trainer.train()
    assert not trainer.data_collator.packed
    assert "windows that cannot follow packed rows" in caplog.text


def test_a_gradient_that_is_not_finite_stops_the_run(
    make: Any, tokenizer: Any, options: Options, tmp_path: Path
) -> None:
    """The loss is finite, so that nothing but the gradient's norm tells."""
    from safetensors.torch import load_file

    model, calls = make.model(), []

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return grad * torch.inf if len(calls) == 2 else grad

    model.model.norm.weight.register_hook(spoil)
    args = DPOConfig(**options(output_dir=str(tmp_path / "run"), save_steps=1, save_total_limit=1))
    trainer = DPOTrainer(model, args=args, train_dataset=make.pairs(), processing_class=tokenizer)
    with pytest.raises(FloatingPointError, match=r"the gradient of step 2 is not finite; .*rank 0"):
        trainer.train()
    saved = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    assert all(w.isfinite().all() for w in saved.values())
    # weights that are broken already are not put in the place of the last good ones
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(torch.nan)
    trainer.state.global_step = 5
    with pytest.raises(FloatingPointError, match="not finite either, and are not saved"):
        trainer.loop._refuse(5)
    assert not (tmp_path / "run" / "checkpoint-5").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    make: Any, tokenizer: Any, options: Options, tmp_path: Path
) -> None:
    """Row 6 has a weight that overflows. What step 1 left is saved, without a trace of step 2: with
    the row repaired the run goes on as if it had always been so."""
    from safetensors.torch import load_file

    def trainer_on(weight: float, folder: str) -> Any:
        weights = [1.0] * 6 + [weight] + [1.0] * 5
        args = DPOConfig(
            **options(
                output_dir=str(tmp_path / folder),
                train_sampling_strategy="sequential",
                loss_type="bco_pair",
                loss_args={"delta_mode": "ema"},
                loss_weights=[1e3],
                logging_steps=3,
            )
        )
        rows = make.pairs(12).add_column("weight", weights)
        return DPOTrainer(make.model(), args=args, train_dataset=rows, processing_class=tokenizer)

    with pytest.raises(FloatingPointError, match=r"step 2 is not finite; rank 0: examples \[6\]"):
        trainer_on(3e38, "broken").train()
    saved = tmp_path / "broken" / "checkpoint-1"
    assert all(w.isfinite().all() for w in load_file(saved / "model.safetensors").values())
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == 1
    with pytest.raises(FloatingPointError, match="step 2 is not finite"):
        trainer_on(3e38, "broken").train(resume_from_checkpoint=True)
    repaired, fine = trainer_on(1.0, "broken"), trainer_on(1.0, "fine")
    repaired.train(resume_from_checkpoint=True)
    fine.train()
    assert losses_of(repaired) == losses_of(fine)
    logs = [t.state.log_history[-2]["rewards/margins"] for t in (repaired, fine)]
    assert logs[0] == logs[1]
