"""``fastpref train``: tune a model on preferences; options are flags, or keys of a YAML file."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from accelerate import PartialState
from transformers import HfArgumentParser

from fastpref.cli import command
from fastpref.config import PreferenceConfig
from fastpref.keys import translate
from fastpref.named import find
from fastpref.recorder import claim, draw_run, record, resolved

ALIASES = {
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "loss": "loss_type",
    "streaming": "dataset_streaming",
}

logger = logging.getLogger("fastpref")

USAGE = "fastpref train --model MODEL --dataset DATA [--loss dpo] [--config run.yaml] [options]"


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


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
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full beside the adapter."}
    )


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
    flags = [_full(argument) for argument in argv]
    parser = _Parser(usage, own)
    parser.set_defaults(**defaults)
    known = [action.dest for action in parser._actions]
    path = _value_of("--config", flags)
    if path is not None:
        given = _read_yaml(Path(path))
        given = {ALIASES.get(name, name): value for name, value in given.items()}
        parser.set_defaults(**translate(given, known))
    *found, rest = parser.parse_args_into_dataclasses(
        flags, return_remaining_strings=True, look_for_args_file=False
    )
    for argument in rest:
        translate({argument.lstrip("-").partition("=")[0]: None}, known)
        raise TypeError(f"{argument!r} belongs to no option")
    data, model, config, more = found
    return data, model, config, more


def _full(argument: str) -> str:
    """``--model=x`` as ``--model_name_or_path=x``; other arguments as they are."""
    flag, equals, value = argument.partition("=")
    name = ALIASES.get(flag[2:]) if flag.startswith("--") else None
    return f"--{name}{equals}{value}" if name else argument


def _value_of(flag: str, argv: Sequence[str]) -> str | None:
    for index, argument in enumerate(argv):
        if argument == flag:
            return argv[index + 1] if index + 1 < len(argv) else None
        if argument.startswith(flag + "="):
            return argument.partition("=")[2]
    return None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected lines of the form 'name: value'")
    return given


def main(argv: Sequence[str]) -> int:
    """Trains; 0."""
    data, model, config = parse(argv)
    run(data, model, config)
    # Threads of a group that is still there may abort a process that ends.
    PartialState().destroy_process_group()
    return 0


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
            draw_run(output)
        except OSError as error:  # must not take the place of what ended the run
            logger.warning("curves.png was not drawn: %s", error)
    trainer.save_model()
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
        modules_to_save=model.lora_modules_to_save,
    )
