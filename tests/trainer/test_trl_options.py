"""Every option that TRL 1.16's commands and configs know is taken here, or refused by its name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import fields
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from fastpref import PreferenceConfig, PreferenceTrainer, cli
from fastpref.data.mixture import Part
from fastpref.keys import IGNORED, REFUSED
from fastpref.options import ModelArguments, parse
from fastpref.train import lora, quantization

Options = Callable[..., dict[str, Any]]

CONFIGS = {
    "trl": ["DPOConfig", "KTOConfig", "ModelConfig", "ScriptArguments", "DatasetMixtureConfig"],
    "trl.experimental.cpo": ["CPOConfig"],
    "trl.experimental.orpo": ["ORPOConfig"],
    "trl.experimental.tpo": ["TPOConfig"],
}
# What TRL's commands read besides: the YAML's own key, and those that go to the launcher.
BESIDE = ["env", "accelerate_config", "num_processes", "num_machines", "main_process_port"]
MEANT = {"torch_dtype": "float32", "rpo_alpha": 0.5, "group_by_length": True}
OLDER = [*MEANT, *IGNORED, *REFUSED]


@pytest.fixture(autouse=True)
def trl(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    return pytest.importorskip("trl")


def taken(tmp_path: Path, how: str, *words: str, **values: Any) -> Any:
    """What the command makes of options, given as flags or in a YAML file."""
    given = ["--model", "m", "--dataset", "d", "--use_cpu", "true", "--output_dir", "o", *words]
    if how == "yaml":
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
        return parse([*given, "--config", str(tmp_path / "run.yaml")])
    return parse([*given, *(f"--{name}={value}" for name, value in values.items())])


def options_of_trl() -> dict[str, Any]:
    """Names and defaults."""
    found: dict[str, Any] = dict.fromkeys(BESIDE, "x")
    for module, names in CONFIGS.items():
        for name in names:
            kind = getattr(import_module(module), name)
            trains = issubclass(kind, TrainingArguments)
            made = kind("o", use_cpu=True, bf16=False) if trains else kind()
            found |= {f.name: getattr(made, f.name) for f in fields(kind) if f.init}
    return found


@pytest.mark.parametrize("how", ["flags", "yaml"])
def test_every_option_is_taken_or_refused_by_name(tmp_path: Path, how: str) -> None:
    """A new one of TRL's fails here: it would be "there is no option", with a guess."""
    parser_knows = {f.name for kind in parse_kinds() for f in fields(kind)} | {"streaming"}
    for name in {*options_of_trl(), *OLDER} - parser_knows:
        if name in {*IGNORED, *MEANT}:
            taken(tmp_path, how, **{name: MEANT.get(name, True)})
        else:
            with pytest.raises(ValueError, match=rf"\b{name}\b"):
                taken(tmp_path, how, **{name: "x"})
    with pytest.raises(TypeError, match=r"there is no option 'betta'. Did you mean 'beta'"):
        taken(tmp_path, how, betta=1)


def parse_kinds() -> tuple[Any, ...]:
    from fastpref.options import ScriptArguments

    return ScriptArguments, ModelArguments, PreferenceConfig


def test_a_file_of_all_of_trls_defaults_is_a_run(tmp_path: Path) -> None:
    """What can stand in YAML of them; the losses of the other trainers have other names."""
    plain = (bool, int, float, str, type(None))
    losses = {"cpo_alpha", "simpo_gamma", "alpha", "tpo_alpha", "tpo_l_gamma", "loss_type"}
    given = {
        name: value.value if isinstance(value, Enum) else value
        for name, value in options_of_trl().items()
        if isinstance(value, plain) and name not in {*losses, *BESIDE, "dataset_name"}
    }
    _, model, config = taken(tmp_path, "yaml", **given)
    assert len(given) > 150
    for name in ("lora_r", "dtype", "learning_rate", "max_length", "ref_model_sync_steps"):
        holder = model if hasattr(model, name) else config
        assert getattr(holder, name) == given[name]


def test_parts_of_a_mixture_are_trls() -> None:
    theirs = {f.name for f in fields(import_module("trl.scripts.utils").DatasetConfig)}
    assert theirs <= {f.name for f in fields(Part)}


@pytest.mark.parametrize("how", ["flags", "yaml"])
def test_older_names_mean_the_same_everywhere(tmp_path: Path, how: str) -> None:
    given = {"rpo_alpha": 0.5, "group_by_length": True, "use_logits_to_keep": True, "loss": "ipo"}
    _, model, config = taken(tmp_path, how, torch_dtype="bfloat16", **given)
    python = PreferenceConfig(
        "o", use_cpu=True, rpo_alpha=0.5, group_by_length=True, loss_type="ipo"
    )
    for name in ("loss_type", "loss_weights", "nll_reduction", "train_sampling_strategy"):
        assert getattr(config, name) == getattr(python, name)
    assert (config.loss_type, config.loss_weights) == (["ipo", "sft"], [1.0, 0.5])
    assert model.dtype == "bfloat16"


def test_older_names_as_flags_in_every_form(tmp_path: Path) -> None:
    def config(*words: str) -> Any:
        return taken(tmp_path, "flags", *words)[2]

    assert config("--rpo_alpha", "1e-1", "--beta", "0.3").loss_weights == [1.0, 0.1]
    assert config("--rpo-alpha=0.25").loss_weights == [1.0, 0.25]
    assert config("--group_by_length").train_sampling_strategy == "group_by_length"
    assert config("--group_by_length", "false").train_sampling_strategy == "random"
    assert config("--label_pad_token_id", "-100", "--padding_value").loss_type == ["dpo"]
    # a flag beside a file: the file's loss, the flag's weight
    (tmp_path / "run.yaml").write_text("loss_type: hinge\nloss_weights: null\n")
    both = config("--config", str(tmp_path / "run.yaml"), "--rpo_alpha", "2")
    assert (both.loss_type, both.loss_weights) == (["hinge", "sft"], [1.0, 2.0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rpo_alpha", "much"], "rpo_alpha='much': expected a number"),
        (["--rpo_alpha"], "rpo_alpha=True"),
        (["--rpo_alpha", "1", "2"], r"rpo_alpha=\['1', '2'\]: expected a number"),
        (["--rpo_alpha", "1", "--loss", "dpo", "sft"], "rpo_alpha together with several losses"),
        (["--torch_dtype", "float16", "--dtype", "bfloat16"], "are one option with two values"),
        (["--group_by_length", "maybe"], "group_by_length='maybe': expected true or false"),
        (["--tools", "[x"], "tools is not an option: give the dataset a column"),
        (["--env", "A=1"], r"env is not an option: .* YAML file of --config"),
        (["--num_processes", "2"], "start with `accelerate launch --num_processes ..."),
        (["--accelerate_config", "fsdp2"], "start with `accelerate launch --config_file"),
        (["--cpo_alpha", "0"], r"cpo_alpha is not an option: set nll_weight in loss_args"),
        (["--load_in_4bit"], "load_in_4bit=True needs use_peft"),
        (["--lora_r", "4"], "lora_r=4 needs use_peft: set that too, or drop it"),
        (["--use_peft", "--use_bnb_nested_quant"], "use_bnb_nested_quant=True needs load_in_4bit"),
        (["--use_peft", "--load_in_4bit", "--load_in_8bit"], "are both set: drop one"),
    ],
)
def test_what_is_wrong_with_an_option(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        taken(tmp_path, "flags", *words)


def test_choices_hold_in_yaml_too(tmp_path: Path) -> None:
    for name in ("bnb_4bit_quant_type", "lora_task_type"):
        with pytest.raises(ValueError, match=f"{name}='x': expected "):
            taken(tmp_path, "yaml", use_peft=True, load_in_4bit=True, **{name: "x"})


def test_what_is_off_here_may_be_given_as_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    off = {"generate_during_eval": False, "is_encoder_decoder": None, "ignore_bias_buffers": False}
    with caplog.at_level(logging.INFO, "fastpref"):
        taken(tmp_path, "yaml", **off)
        PreferenceConfig("o", use_cpu=True, **off)
    assert caplog.text.count("ignore_bias_buffers is off, as it always is here") == 2
    with pytest.raises(ValueError, match="set ddp_broadcast_buffers to false"):
        taken(tmp_path, "flags", "--ignore_bias_buffers")


def test_the_environment_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TRL sets it: over what is set; not written into the run's own file."""
    monkeypatch.setenv("FASTPREF_TEST_ONE", "before")
    monkeypatch.setenv("FASTPREF_TEST_TWO", "before")
    taken(tmp_path, "yaml", env={"FASTPREF_TEST_ONE": 1, "FASTPREF_TEST_TWO": "two words"})
    assert (os.environ["FASTPREF_TEST_ONE"], os.environ["FASTPREF_TEST_TWO"]) == ("1", "two words")
    with pytest.raises(ValueError, match="expected a mapping of variables to values"):
        taken(tmp_path, "yaml", env="A=1")


ADAPTERS: list[dict[str, Any]] = [
    {},
    {"use_peft": True},
    {"use_peft": True, "lora_r": 4, "lora_alpha": 9, "lora_dropout": 0.0, "use_rslora": True},
    {"use_peft": True, "use_dora": True, "lora_target_modules": ["q_proj", "v_proj"]},
    {"use_peft": True, "lora_target_parameters": ["a.b"], "lora_modules_to_save": ["lm_head"]},
]
BITS: list[dict[str, Any]] = [
    {},
    {"load_in_8bit": True, "use_peft": True},
    {"load_in_4bit": True, "use_peft": True, "dtype": "bfloat16", "bnb_4bit_quant_type": "fp4"},
    {
        "load_in_4bit": True,
        "use_peft": True,
        "dtype": "float32",
        "use_bnb_nested_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
    },
]


@pytest.mark.parametrize("given", ADAPTERS)
def test_the_adapter_is_trls(trl: Any, tmp_path: Path, given: dict[str, Any]) -> None:
    theirs = trl.get_peft_config(trl.ModelConfig(**given))
    _, model, _ = taken(tmp_path, "yaml", **given)
    ours = lora(model)
    assert (ours and ours.to_dict()) == (theirs and theirs.to_dict())


@pytest.mark.parametrize("given", BITS)
def test_the_quantisation_is_trls(trl: Any, tmp_path: Path, given: dict[str, Any]) -> None:
    theirs = trl.get_quantization_config(trl.ModelConfig(**given))
    _, model, _ = taken(tmp_path, "yaml", **given)
    ours = quantization(model)
    assert (ours and ours.to_dict()) == (theirs and theirs.to_dict())


def test_four_bits_compute_in_what_the_machine_does(tmp_path: Path) -> None:
    import torch

    from fastpref.config import native_bf16

    words = ["--use_peft", "--load_in_4bit"]
    expected = torch.bfloat16 if native_bf16() else torch.float32
    for more in ([], ["--dtype", "auto"]):
        _, model, _ = taken(tmp_path, "flags", *words, *more)
        assert quantization(model).bnb_4bit_compute_dtype == expected


def test_adapters_of_every_kind_train(make: Any, tokenizer: Any, options: Options) -> None:
    """From the model without them, which is the reference: the first loss is log 2."""
    kinds: list[dict[str, Any]] = [
        {"use_dora": True, "use_rslora": True, "lora_target_modules": ["q_proj"]},
        {"lora_target_modules": ["v_proj"], "lora_target_parameters": ["q_proj.weight"]},
    ]
    for kind in kinds:
        model = ModelArguments(use_peft=True, lora_r=4, lora_dropout=0.0, **kind)
        trainer = PreferenceTrainer(
            make.model(),
            args=PreferenceConfig(**options()),
            train_dataset=make.pairs(8),
            processing_class=tokenizer,
            peft_config=lora(model),
        )
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
        assert losses[-1] < losses[0] - 1e-4


def test_the_weights_of_kto_by_flags(make: Any, tmp_path: Path, tokenizer: Any) -> None:
    """As ``KTOConfig`` has them; a loss without them refuses them."""
    from fastpref.objective import make_losses

    words = ["--loss", "kto", "--desirable_weight", "1.5"]
    config = taken(tmp_path, "flags", *words)[2]
    assert dict(make_losses(config)._terms[0].arguments)["desirable_weight"] == 1.5
    assert "undesirable_weight" not in dict(make_losses(config)._terms[0].arguments)
    config = taken(tmp_path, "flags", "--loss", "ipo", "--desirable_weight", "1.5")[2]
    with pytest.raises(ValueError, match=r"desirable_weight=1.5 has no effect on ipo"):
        make_losses(config)


def test_quantised_weights_are_not_planned(
    make: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make.model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["plan", "--model", str(tmp_path / "model"), "--memory", "1GiB", "--device", "cpu"]
    words += ["--prompt_tokens", "8", "--response_tokens", "8", "--use_peft", "--load_in_4bit"]
    assert cli.main(words) == 2
    assert "what quantised weights take cannot be planned" in capsys.readouterr().err
