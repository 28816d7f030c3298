"""Keys of a config: those that do not exist are an error that names the nearest one; those of older
TRL versions are understood, or refused by name."""

from __future__ import annotations

import difflib
import logging
from typing import Any

logger = logging.getLogger("fastpref")

IGNORED = {
    "padding_value": "rows are packed, so the pad token is never trained on",
    "pad_token": "rows are packed, so the pad token is never trained on",
    "label_pad_token_id": "masked tokens are always -100",
    "use_logits_to_keep": "prompt tokens never reach the head",
    "use_num_logits_to_keep": "prompt tokens never reach the head",
    "overwrite_output_dir": "checkpoints are written beside old ones",
    "base_model_attribute_name": "the head is found by get_output_embeddings()",
}
REFUSED = {
    "generate_during_eval": "use a callback that generates, such as trl.LogCompletionsCallback",
    "is_encoder_decoder": "encoder-decoder models are not supported",
    "model_adapter_name": "pass a PeftModel; the reference is its adapter as it was at the start",
    "ref_adapter_name": "pass a PeftModel; the reference is its adapter as it was at the start",
    "force_use_ref_model": "pass ref_model to the trainer; it is then used",
    "ref_model_init_kwargs": "load the reference yourself and pass it to the trainer as ref_model",
    "tools": "give the dataset a column 'tools'",
    "ignore_bias_buffers": "set ddp_broadcast_buffers to false",
    "accelerate_config": "start with `accelerate launch --config_file FILE -m fastpref train ...`",
    "env": "it belongs into the YAML file of --config, a mapping of variables to values",
    "cpo_alpha": "set nll_weight in loss_args; of the CPOTrainer's losses, sigmoid is cpo here and "
    "simpo is cpo_simpo",
    "simpo_gamma": "set gamma in loss_args; the CPOTrainer's simpo is cpo_simpo here",
    "alpha": "set it in loss_args",
    "tpo_alpha": "set nll_weight of the loss tpo in loss_args",
    "tpo_l_gamma": "set gamma and length_normalized of the loss tpo in loss_args",
}
RENAMED = {"torch_dtype": "dtype"}


def translate(given: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """``given`` with keys of older versions turned into today's.

    Args:
        given: Keyword arguments of a config.
        known: Names of its fields.

    Returns:
        Keyword arguments that are all in ``known``. What is always off here and is given as off is
        left out.

    Raises:
        ValueError: a key is refused (the message says what to do instead), or two contradict.
        TypeError: a key is unknown; the message names the nearest.
    """
    given = dict(given)
    for old, new in RENAMED.items():
        if old in given and given.setdefault(new, given[old]) != given.pop(old):
            raise ValueError(f"{old} and {new} are one option with two values: give {new} alone")
    for name in set(given) & set(IGNORED) - set(known):
        logger.info("%s is not needed and has no effect: %s", name, IGNORED[name])
        del given[name]
    if (alpha := given.pop("rpo_alpha", None)) is not None:
        names = as_list(given.get("loss_type", "dpo"))
        if given.get("loss_weights") is not None or len(names) > 1:
            raise ValueError(
                "rpo_alpha together with several losses: write the sum as "
                "loss_type=['sigmoid', 'sft'], loss_weights=[1.0, rpo_alpha]"
            )
        try:
            given["loss_weights"] = [1.0, float(str(alpha))]
        except ValueError:
            raise ValueError(f"rpo_alpha={alpha!r}: expected a number") from None
        given["loss_type"] = [*names, "sft"]
        if given.get("nll_reduction") is None:
            given["nll_reduction"] = "tokens"
    if (grouped := given.pop("group_by_length", False)) not in (True, False):
        raise ValueError(f"group_by_length={grouped!r}: expected true or false")
    if grouped:
        given["train_sampling_strategy"] = "group_by_length"
    for name in [name for name in given if name not in known]:
        if name not in REFUSED or not (given[name] is None or given[name] is False):
            raise _refusal(name, known)
        logger.info("%s is off, as it always is here", name)
        del given[name]
    return given


def _refusal(name: str, known: list[str]) -> Exception:
    """Why there is no such option, and what to write instead."""
    from accelerate.commands.launch import launch_command_parser

    if name in REFUSED:
        return ValueError(f"{name} is not an option: {REFUSED[name]}")
    if name in {action.dest for action in launch_command_parser()._actions}:
        return ValueError(
            f"{name} is an option of Accelerate's launcher: start with `accelerate launch --{name} "
            "... -m fastpref train ...`, or with a script in that place"
        )
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return TypeError(f"there is no option {name!r}.{hint}")


def as_list(value: str | list[str]) -> list[str]:
    """One name as a list of it; a list as a new one."""
    return [value] if isinstance(value, str) else list(value)
