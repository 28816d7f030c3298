"""What a newcomer gets wrong in a script: each mistake is named, with what mends it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig

from fastpref import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    PreferenceConfig,
    PreferenceTrainer,
)
from fastpref.options import ModelArguments
from fastpref.reference_policy import AdapterOff, Frozen
from fastpref.train import lora

Options = Callable[..., dict[str, Any]]

IDS = {"prompt_ids": [1, 5, 6], "chosen_ids": [7, 8, 2], "rejected_ids": [9, 2]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("column", "ids", "wrong"),
    [
        ("prompt_ids", [1, 97], 97),
        ("chosen_ids", [7, 50_000, 2], 50_000),
        ("rejected_ids", [-1], -1),
    ],
)
def test_token_ids_outside_the_vocabulary(
    make: Any,
    tokenizer: Any,
    options: Options,
    column: str,
    ids: list[int],
    wrong: int,
    stream: bool,
) -> None:
    rows: Any = Dataset.from_list([IDS, {**IDS, column: ids}, IDS])
    rows = rows.to_iterable_dataset() if stream else rows
    message = rf"column '{column}', example 1: token id {wrong} is outside .* vocabulary of 97\. "
    with pytest.raises(ValueError, match=message):
        DPOTrainer(
            make.model(),
            args=DPOConfig(**options()),
            train_dataset=rows,
            processing_class=tokenizer,
        ).train()


def test_a_completion_outside_the_vocabulary(make: Any, tokenizer: Any, options: Options) -> None:
    row = {"prompt_ids": [1, 5], "completion_ids": [6, 200], "label": True}
    with pytest.raises(ValueError, match="'completion_ids', example 0: token id 200"):
        KTOTrainer(
            make.model(),
            args=KTOConfig(**options()),
            train_dataset=Dataset.from_list([row]),
            processing_class=tokenizer,
        )


def test_a_tokenizer_with_tokens_that_the_model_lacks(
    make: Any, tokenizer: Any, options: Options
) -> None:
    """The column has its own name, and the model that is resized trains."""
    small = make.model(vocab_size=50)
    arguments = {
        "args": DPOConfig(**options(max_steps=1)),
        "train_dataset": make.pairs(),
        "processing_class": tokenizer,
    }
    with pytest.raises(ValueError, match=r"column '(prompt|chosen|rejected)', .*vocabulary of 50"):
        DPOTrainer(small, **arguments)
    small.resize_token_embeddings(len(tokenizer))
    DPOTrainer(small, **arguments).train()


@pytest.mark.parametrize("as_reference", [False, True])
@pytest.mark.parametrize(
    "name", ["./nope", "/no/such/folder", "a folder/with spaces", "~/no-such-x"]
)
def test_a_model_path_that_is_not_there(
    make: Any, tokenizer: Any, options: Options, name: str, as_reference: bool
) -> None:
    model, reference = (make.model(), name) if as_reference else (name, None)
    with pytest.raises(FileNotFoundError, match=f"^{name}: no such file or directory"):
        DPOTrainer(
            model,
            reference,
            args=DPOConfig(**options()),
            train_dataset=make.pairs(),
            processing_class=tokenizer,
        )


def test_a_model_path_that_is_nearly_right(
    make: Any, tokenizer: Any, options: Options, tmp_path: Path
) -> None:
    make.model().save_pretrained(tmp_path / "my-model")
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*/my-model\?"):
        DPOTrainer(
            str(tmp_path / "my-modle"),
            args=DPOConfig(**options()),
            train_dataset=make.pairs(),
            processing_class=tokenizer,
        )


def test_a_model_without_a_known_tokenizer(make: Any, options: Options, tmp_path: Path) -> None:
    """Made in the script, or saved without its tokenizer."""
    arguments = {"args": DPOConfig(**options()), "train_dataset": make.pairs()}
    message = "LlamaForCausalLM was not loaded by name.* pass processing_class=tokenizer"
    with pytest.raises(ValueError, match=message):
        DPOTrainer(make.model(), **arguments)
    make.model().save_pretrained(tmp_path / "bare")
    message = "no tokenizer could be loaded from .*bare: pass processing_class=tokenizer"
    with pytest.raises(ValueError, match=message):
        DPOTrainer(str(tmp_path / "bare"), **arguments)


def test_the_config_of_another_library(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    for args, found in (
        (
            trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False),
            "trl.trainer.dpo_config.DPOConfig",
        ),
        (SimpleNamespace(beta=0.1), "types.SimpleNamespace"),
    ):
        message = f"expected a fastpref.DPOConfig, got a {found}. Write: from fastpref import DPO"
        with pytest.raises(TypeError, match=message):
            DPOTrainer(
                make.model(), args=args, train_dataset=make.pairs(), processing_class=tokenizer
            )


def test_a_module_that_is_no_language_model(make: Any, tokenizer: Any, options: Options) -> None:
    for args in (None, DPOConfig(**options())):
        with pytest.raises(TypeError, match="model: Linear has no output embedding"):
            DPOTrainer(
                torch.nn.Linear(2, 2),
                args=args,
                train_dataset=make.pairs(),
                processing_class=tokenizer,
            )


def test_all_splits_where_one_is_trained_on(make: Any, tokenizer: Any, options: Options) -> None:
    splits = DatasetDict(train=make.pairs(), test=make.pairs())
    arguments = {"args": DPOConfig(**options()), "processing_class": tokenizer}
    message = r"train_dataset: .* a DatasetDict with the splits 'train', 'test'\. .*\['train'\]"
    with pytest.raises(TypeError, match=message):
        DPOTrainer(make.model(), train_dataset=splits, **arguments)
    trainer = DPOTrainer(make.model(), train_dataset=make.pairs(), **arguments)
    with pytest.raises(TypeError, match="test_dataset: expected one dataset"):
        trainer.predict(splits)


SUMS = {"ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0}


@pytest.mark.parametrize(
    ("loss", "columns", "message"),
    [
        ("ld_dpo", SUMS, "ld_dpo needs ref_chosen_tokens.*hold a sum for each response alone"),
        ("selm", {**SUMS, "third": " w1 w2"}, "has no column 'ref_third_logps'"),
        ("tdpo1", SUMS, "set precompute_ref_log_probs=False, and drop ref_"),
    ],
)
def test_reference_columns_that_a_loss_cannot_do_with(
    make: Any,
    tokenizer: Any,
    options: Options,
    loss: str,
    columns: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceTrainer(
            make.model(),
            args=PreferenceConfig(**options(loss_type=loss)),
            train_dataset=make.pairs(12, **columns),
            processing_class=tokenizer,
        )


def test_weights_of_pairs_where_numbers_are_of_ranks(
    make: Any, tokenizer: Any, options: Options
) -> None:
    trainer = PreferenceTrainer(
        make.model(),
        args=PreferenceConfig(**options(loss_type="aot")),
        train_dataset=make.pairs(12, weight=1.0),
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match=r"aot: its numbers are of ranks.*'weight'.*drop it"):
        trainer.train()


def test_rewards_are_logged_with_the_beta_that_trains(
    make: Any, tokenizer: Any, options: Options
) -> None:
    logged = []
    for given in ({"beta": 0.5}, {"loss_args": {"beta": 0.5}}):
        trainer = DPOTrainer(
            make.model(),
            make.model(1),
            DPOConfig(**options(max_steps=1, **given)),
            train_dataset=make.pairs(),
            processing_class=tokenizer,
        )
        trainer.train()
        logged.append(trainer.state.log_history[0]["rewards/margins"])
    assert logged[0] == logged[1] != 0


def test_an_adapter_that_trains_weights_of_the_base_has_a_copy_as_reference(
    make: Any, tokenizer: Any, options: Options
) -> None:
    """Switching the adapter off would not bring these back."""

    def build(bias: str, **given: Any) -> Any:
        return DPOTrainer(
            make.model(attention_bias=True),
            args=DPOConfig(**options(**given)),
            train_dataset=make.pairs(),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], bias=bias),
        )

    assert isinstance(build("none").reference, AdapterOff)
    reference = build("all").reference
    assert isinstance(reference, Frozen)
    assert not any(p.requires_grad for p in reference.models[0].parameters())
    with pytest.raises(ValueError, match=r"sync_ref_model moves a full copy.*an adapter"):
        build("none", sync_ref_model=True)


def test_all_linear_layers_by_one_word() -> None:
    assert lora(
        ModelArguments(use_peft=True, lora_target_modules=["all-linear"])
    ).target_modules == ("all-linear")
    found = lora(ModelArguments(use_peft=True, lora_target_modules=["q_proj"])).target_modules
    assert found == {"q_proj"}


def test_the_alpha_of_another_divergence(options: Options) -> None:
    with pytest.raises(ValueError, match=r"f_alpha_divergence_coef=0\.3 has no effect"):
        DPOConfig(**options(f_alpha_divergence_coef=0.3)).loss_options()
    DPOConfig(**options(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3))
