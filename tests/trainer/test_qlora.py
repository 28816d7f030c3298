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
from fastpref.options import parse
from fastpref.train import make_trainer

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


def test_by_flags_of_the_command(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The layers are of the kind that was asked for, and the adapter on them trains."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    make.model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    make.pairs(8).to_json(tmp_path / "pairs.jsonl")
    words = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "pairs.jsonl")]
    words += ["--use_peft", "--lora_r", "4", "--lora_dropout", "0", "--load_in_4bit"]
    words += ["--bnb_4bit_quant_type", "fp4", "--use_bnb_nested_quant", "--use_cpu", "true"]
    words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "3", "--logging_steps", "1"]
    words += ["--save_strategy", "no", "--learning_rate", "1e-2", "--disable_tqdm", "true"]
    trainer = make_trainer(*parse(words))
    layers = [m for m in trainer.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    assert {layer.weight.quant_type for layer in layers} == {"fp4"}
    assert all(layer.weight.quant_state.nested for layer in layers)
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
    trainer.train()
    losses = losses_of(trainer)
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    assert losses[-1] < losses[0] - 1e-3
