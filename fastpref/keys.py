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
}


def translate(given: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """``given`` with keys of older versions turned into today's.

    Args:
        given: Keyword arguments of a config.
        known: Names of its fields.

    Returns:
        Keyword arguments that are all in ``known``.

    Raises:
        ValueError: a key is refused (the message says what to do instead), or two contradict.
        TypeError: a key is unknown; the message names the nearest.
    """
    given = dict(given)
    for name in set(given) & set(IGNORED) - set(known):
        logger.info("%s is not needed and has no effect: %s", name, IGNORED[name])
        del given[name]
    if (alpha := given.pop("rpo_alpha", None)) is not None:
        if "loss_weights" in given or len(as_list(given.get("loss_type", "dpo"))) > 1:
            raise ValueError(
                "rpo_alpha together with several losses: write the sum as "
                "loss_type=['sigmoid', 'sft'], loss_weights=[1.0, rpo_alpha]"
            )
        given["loss_type"] = [*as_list(given.get("loss_type", "dpo")), "sft"]
        given["loss_weights"] = [1.0, alpha]
        given.setdefault("nll_reduction", "tokens")
    if given.pop("group_by_length", False):
        given["train_sampling_strategy"] = "group_by_length"
    for name in given:
        if name in known:
            continue
        if name in REFUSED:
            raise ValueError(f"{name} is not an option: {REFUSED[name]}")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"there is no option {name!r}.{hint}")
    return given


def as_list(value: str | list[str]) -> list[str]:
    """One name as a list of it; a list as a new one."""
    return [value] if isinstance(value, str) else list(value)
