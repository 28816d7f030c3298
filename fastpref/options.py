"""The options of a run on the command line: flags, or keys of a YAML file, under TRL's names."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from fastpref.config import PreferenceConfig
from fastpref.keys import translate

ALIASES = {
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "loss": "loss_type",
    "streaming": "dataset_streaming",
}

USAGE = "fastpref train --model MODEL --dataset DATA [--loss dpo] [--config run.yaml] [options]"


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ScriptArguments:
    """What to train on."""

    dataset_name: str | None = _option(
        None, "(--dataset) Hub id, or a file or directory: json, jsonl, parquet, csv."
    )
    dataset_config: str | None = _option(None, "Configuration of a hub dataset.")
    datasets: str | None = _option(
        None,
        "Instead of --dataset: a mixture, a list of parts with path, name, data_dir, data_files, "
        "split, columns, fraction; in YAML, or as JSON.",
    )
    dataset_train_split: str = _option("train", "Split to train on.")
    dataset_test_split: str = _option("test", "Split to evaluate on, with --eval_strategy.")
    test_split_size: float | None = _option(
        None, "Rows of the training data to set apart and evaluate on: a share, or a number."
    )
    dataset_streaming: bool = _option(False, "Read the dataset while training.")
    corrupt_context: str | None = _option(
        None,
        "For mdpo: 'module:function' or 'file.py:function', which gives for a prompt's token ids "
        "those of a corrupted context.",
    )


@dataclass
class ModelArguments:
    """What to train, and how it is adapted."""

    model_name_or_path: str | None = _option(None, "(--model) Hub id or directory.")
    ref_model_name_or_path: str | None = _option(
        None, "Reference. None: the model as it is at the start."
    )
    model_revision: str = _option("main", "Branch, tag or commit on the hub.")
    dtype: str | None = _option(
        None, "Of the weights: float32, bfloat16, auto. None: float32, or bfloat16 if frozen."
    )
    attn_implementation: str | None = _option(None, "sdpa, eager, flex_attention, ...")
    use_peft: bool = _option(False, "Train a LoRA adapter; the reference is the model without it.")
    lora_r: int = _option(16, "Rank.")
    lora_alpha: int = _option(32, "Scale: the update is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = _option(0.05, "Dropout before the adapter.")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt. None: peft's choice for the model."}
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters to adapt that are no module's weight."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full beside the adapter."}
    )
    lora_task_type: str = _option("CAUSAL_LM", "As in TRL.", choices=["CAUSAL_LM"])
    use_rslora: bool = _option(False, "Scale by lora_alpha / sqrt(lora_r) instead.")
    use_dora: bool = _option(False, "Adapt direction and magnitude apart (DoRA).")
    load_in_4bit: bool = _option(False, "Hold the frozen weights in four bits, by bitsandbytes.")
    load_in_8bit: bool = _option(False, "Hold the frozen weights in eight bits, by bitsandbytes.")
    bnb_4bit_quant_type: str = _option("nf4", "Kind of the four bits.", choices=["nf4", "fp4"])
    bnb_4bit_quant_storage: str | None = _option(None, "Type that holds the four bits.")
    use_bnb_nested_quant: bool = _option(False, "Quantise the scales of the four bits too.")

    def __post_init__(self) -> None:
        """Refuse what contradicts itself or means nothing."""
        for option in fields(self):
            name, value, needed = option.name, getattr(self, option.name), _needed(option.name)
            if value not in option.metadata.get("choices", [value]):
                words = " or ".join(option.metadata["choices"])
                raise ValueError(f"{name}={value!r}: expected {words}")
            if needed and value != option.default and not getattr(self, needed):
                raise ValueError(f"{name}={value!r} needs {needed}: set that too, or drop it")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both set: drop one")


def _needed(name: str) -> str | None:
    """The option of a :class:`ModelArguments` without which another one means nothing."""
    if name.startswith(("lora_", "use_rslora", "use_dora", "load_in_")):
        return "use_peft"
    return "load_in_4bit" if "bnb_" in name else None


Options = tuple[ScriptArguments, ModelArguments, PreferenceConfig]


class _Parser(HfArgumentParser):  # type: ignore[misc]
    """The flags of the three dataclasses; a wrong value raises instead of printing 150 flags."""

    def __init__(self, usage: str, own: Sequence[argparse.ArgumentParser]) -> None:
        kinds: Any = (ScriptArguments, ModelArguments, PreferenceConfig)
        super().__init__(
            kinds,
            prog=usage.partition(" --")[0],
            usage=usage,
            parents=own,
            allow_abbrev=False,
            description="Flags win over --config, a YAML file of the same names.",
        )
        self.add_argument("--config", help="YAML file of options")

    def error(self, message: str) -> NoReturn:
        """Raise ``ValueError``."""
        raise ValueError(message)

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """The flags that are there, by name; values of those of no option as YAML reads them."""
        unset = object()
        start = argparse.Namespace(**{action.dest: unset for action in self._actions})
        found, rest = self.parse_known_args(argv, start)
        return _loose(rest) | {k: value for k, value in vars(found).items() if value is not unset}


def parse(argv: Sequence[str]) -> Options:
    """The options of a run, from flags and the YAML file that ``--config`` names.

    Args:
        argv: Flags.

    Returns:
        What to train on, what to train, and how.

    Raises:
        ValueError: a value is missing, out of range, or contradicts another.
        TypeError: an option does not exist; the message names the nearest.
    """
    data, model, config, _ = parse_options(argv)
    for option, value in {
        "model": model.model_name_or_path,
        "dataset": data.dataset_name or data.datasets,
    }.items():
        if value is None:
            raise ValueError(f"--{option} is missing. Usage: {USAGE}")
    return data, model, config


def parse_options(
    argv: Sequence[str],
    usage: str = USAGE,
    own: Sequence[argparse.ArgumentParser] = (),
    **defaults: Any,
) -> tuple[ScriptArguments, ModelArguments, PreferenceConfig, argparse.Namespace]:
    """:func:`parse` for a command with flags of its own, and without asking for model and data.

    Args:
        argv: Flags.
        usage: How the command is called.
        own: Parsers of its own flags, without ``--help``; YAML may set these too.
        **defaults: Of options that neither a flag nor the YAML file sets.

    Returns:
        The options, and the values of the command's own flags.
    """
    parser = _Parser(usage, own)
    parser.set_defaults(**defaults)
    flags = parser.given([_full(argument) for argument in argv])
    given = {}
    if (path := flags.pop("config", None)) is not None:
        given = _read_yaml(Path(path))
        _set_environment(given.pop("env", None), path)
        given = {ALIASES.get(name, name): value for name, value in given.items()}
    known = [action.dest for action in parser._actions]
    parser.set_defaults(**translate(given | flags, known))
    data, model, config, more = parser.parse_args_into_dataclasses([], look_for_args_file=False)
    return data, model, config, more


def _full(argument: str) -> str:
    """``--model=x`` as ``--model_name_or_path=x``; other arguments as they are."""
    flag, equals, value = argument.partition("=")
    name = ALIASES.get(flag[2:]) if flag.startswith("--") else None
    return f"--{name}{equals}{value}" if name else argument


def _loose(words: Sequence[str]) -> dict[str, Any]:
    """``--name``, ``--name=value``, ``--name value ...`` by name."""
    found: dict[str, list[str]] = {}
    for word in words:
        if re.match("-+[a-zA-Z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            values = found.setdefault(name.replace("-", "_"), [])
            values += [value] if equals else []
        elif not found:
            raise TypeError(f"{word!r} belongs to no option")
        else:
            values.append(word)
    return {name: _value(values) for name, values in found.items()}


def _value(words: list[str]) -> Any:
    if len(words) != 1:
        return words or True
    try:
        return yaml.safe_load(words[0])
    except yaml.YAMLError:
        return words[0]


def _set_environment(variables: Any, path: str) -> None:
    """Set variables as TRL does: over those that are set."""
    if not isinstance(variables, (dict, type(None))):
        raise ValueError(f"{path}: env={variables!r}, expected a mapping of variables to values")
    os.environ.update({name: str(value) for name, value in (variables or {}).items()})


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected lines of the form 'name: value'")
    return given
