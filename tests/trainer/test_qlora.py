"""Adapters on four-bit weights: the losses of the same weights written out.

Runs where bitsandbytes is installed, on CPU too; it is no dependency.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastpref import PreferenceConfig, PreferenceTrainer

Options = Callable[..., dict[str, Any]]


def losses_of(trainer: Any) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("ahead", [False, True])
def test_as_the_same_weights_written_out(
    make: Any, tokenizer: Any, options: Options, tmp_path: Path, ahead: bool
) -> None:
    """Trained through, with the reference in between and a checkpoint saved, and resumed."""
    pytest.importorskip("bitsandbytes")
    make.model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    written_out = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=four_bits, dtype=torch.float32
    ).dequantize()
    runs = []
    for model, given in ((str(tmp_path / "model"), four_bits), (written_out, None)):
        args = PreferenceConfig(
            **options(
                output_dir=str(tmp_path / f"run {given is None}"),
                max_steps=4,
                learning_rate=1e-2,
                save_strategy="steps",
                save_steps=2,
                gradient_checkpointing=True,
                precompute_ref_log_probs=ahead,
                train_sampling_strategy="sequential",
            )
        )
        trainer = PreferenceTrainer(
            model,
            args=args,
            train_dataset=make.pairs(16),
            processing_class=tokenizer,
            quantization_config=given,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"]),
        )
        trainer.train()
        runs.append(losses_of(trainer))
        trainer.train(resume_from_checkpoint=str(tmp_path / f"run {given is None}/checkpoint-2"))
        assert losses_of(trainer)[2:] == runs[-1][2:]
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)
    assert runs[0][-1] != pytest.approx(runs[0][0], abs=1e-3)
