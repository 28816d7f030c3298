"""``fastpref train``: tune a model on preferences; its options are those of ``options``."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig

from fastpref.cli import command
from fastpref.config import PreferenceConfig, native_bf16
from fastpref.named import find
from fastpref.options import ModelArguments, ScriptArguments, parse
from fastpref.recorder import claim, draw_run, record, resolved

logger = logging.getLogger("fastpref")


def main(argv: Sequence[str]) -> int:
    """Trains; 0."""
    _speak()
    data, model, config = parse(argv)
    run(data, model, config)
    # Threads of a group that is still there may abort a process that ends.
    PartialState().destroy_process_group()
    return 0


def _speak() -> None:
    """Show what this package logs, on one rank, unless somebody has set logging up."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if first and not logger.hasHandlers() and logger.level == logging.NOTSET:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)


def make_trainer(data: ScriptArguments, model: ModelArguments, config: PreferenceConfig) -> Any:
    """The trainer that the options describe, ready to train.

    Raises:
        FileNotFoundError: model or dataset is a path that is not there.
        ValueError: the data cannot be trained on.
    """
    from fastpref.trainer import PreferenceTrainer

    assert model.model_name_or_path is not None
    train, test = load_data(data, config)
    given: Any = config.model_init_kwargs or {}
    config.model_init_kwargs = _model_init_kwargs(model) | given
    return PreferenceTrainer(
        model.model_name_or_path,
        ref_model=model.ref_model_name_or_path,
        args=config,
        train_dataset=train,
        eval_dataset=test,
        quantization_config=quantization(model),
        peft_config=lora(model),
        corrupt_context=find(data.corrupt_context) if data.corrupt_context else None,
    )


def load_data(data: ScriptArguments, config: PreferenceConfig) -> tuple[Any, Any]:
    """What to train on, and what to evaluate on, or None.

    Raises:
        FileNotFoundError: the data is a path that is not there.
        ValueError: it cannot be read, or there is nothing to evaluate on.
    """
    from fastpref.data import load_mixture, load_preference_dataset, parts_of

    evaluates, streaming = config.eval_strategy != "no", data.dataset_streaming
    if data.dataset_name and data.datasets:
        raise ValueError("--dataset and --datasets are given: give one of them")

    def load(split: str) -> Any:
        if data.datasets:
            return load_mixture(parts_of(data.datasets), streaming=streaming, seed=config.seed)
        options: Any = {"name": data.dataset_config, "streaming": streaming}
        return load_preference_dataset(data.dataset_name or "", split, **options)

    train = load(data.dataset_train_split)
    if (size := data.test_split_size) is not None:
        if streaming or not evaluates:
            raise ValueError(
                "test_split_size sets rows apart to evaluate on: set eval_strategy too, and read "
                "the data without streaming"
            )
        parts = train.train_test_split(int(size) if size >= 1 else size, seed=config.seed)
        return parts["train"], parts["test"]
    if evaluates and data.datasets:
        raise ValueError("eval_strategy is set: say by test_split_size what to evaluate on")
    file = Path(data.dataset_name or "").is_file()
    if evaluates and file and "[" not in data.dataset_test_split:
        logger.warning(
            "a single file is every split: the rows that are trained on are evaluated on too. Set "
            "some apart by --test_split_size 0.1"
        )
    return train, load(data.dataset_test_split) if evaluates else None


def run(data: ScriptArguments, model: ModelArguments, config: PreferenceConfig) -> None:
    """Train as the options say; model, checkpoints, metrics and curves go to ``output_dir``.

    Raises:
        FileNotFoundError: model or dataset is a path that is not there.
        OSError: ``output_dir`` cannot be written to.
        ValueError: the data cannot be trained on.
    """
    claim(config.output_dir or "")
    options = resolved(data, model, config)
    options.pop("resume_from_checkpoint", None)
    trainer = make_trainer(data, model, config)
    record(trainer, options)
    try:
        trainer.train(resume_from_checkpoint=_resume(config.resume_from_checkpoint))
    except KeyboardInterrupt as stop:
        if not str(stop):  # interrupted twice: nothing was saved
            raise
        saved = shlex.quote(str(Path(config.output_dir or "", "config.yaml")))
        raise KeyboardInterrupt(
            f"stopped after step {trainer.state.global_step} and saved; this goes on:\n"
            f"  {command()} train --config {saved} --resume_from_checkpoint true"
        ) from None
    finally:
        output = Path(config.output_dir or "")
        try:
            if trainer.is_world_process_zero():
                draw_run(output)
        except OSError as error:  # must not take the place of what ended the run
            logger.warning("curves.png was not drawn: %s", error)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    made = [p for p in ("metrics.jsonl", "config.yaml", "curves.png") if Path(output, p).exists()]
    print(f"the model and {', '.join(made)} are in {config.output_dir}")


def _model_init_kwargs(model: ModelArguments) -> dict[str, Any]:
    given = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
    }
    return {name: value for name, value in given.items() if value is not None}


def _resume(value: str | None) -> str | bool | None:
    """``--resume_from_checkpoint true`` means the last one of the run directory."""
    return {"true": True, "false": None}.get((value or "").lower(), value)


def lora(model: ModelArguments) -> Any:
    """The adapter that the options ask for, a ``peft.LoraConfig``; None if they ask for none."""
    if not model.use_peft:
        return None
    from peft import LoraConfig

    modules = model.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        # peft reads this word as a string alone
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        target_parameters=model.lora_target_parameters,
        modules_to_save=model.lora_modules_to_save,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
    )


def quantization(model: ModelArguments) -> Any:
    """How the options quantise the model, a ``BitsAndBytesConfig``; None if they do not."""
    if model.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not model.load_in_4bit:
        return None
    native = torch.bfloat16 if native_bf16() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=getattr(torch, model.dtype or "", native),
        bnb_4bit_quant_type=model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model.bnb_4bit_quant_storage,
    )
