"""Which references read the policy's token ids, and which the text by a tokenizer of their own."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from fastpref.models import load_tokenizer

logger = logging.getLogger("fastpref")

NEED_IDS = frozenset({"ref_tokens", "kl", "perturbed", "mismatched", "corrupted"})
"""Needs of losses that only a reference with the policy's token ids can meet."""


def tokenizers_of(given: Sequence[Any], own: Any, tokenizer: Any, args: Any) -> list[Any]:
    """For each reference its tokenizer, or None where that gives the policy's token ids.

    Args:
        given: Models, names or paths.
        own: Their tokenizers: a list, or the only one; None: those kept with the models that are
            given by name.
        tokenizer: Of the policy.
        args: A :class:`fastpref.PreferenceConfig`.

    Raises:
        ValueError: There are not as many tokenizers as references.
    """
    listed = list(own) if isinstance(own, (list, tuple)) else [own] * len(given)
    if len(listed) != len(given):
        raise ValueError(
            f"ref_processing_class has {len(listed)} tokenizers for {len(given)} references: give "
            "one each, None where it is the policy's"
        )
    remote = args.trust_remote_code
    found = [kept_with(m, remote) if t is None else t for m, t in zip(given, listed, strict=True)]
    found = [getattr(one, "tokenizer", one) for one in found]
    return [None if one is None or same_ids(tokenizer, one) else one for one in found]


def kept_with(model: Any, trust_remote_code: bool = False) -> Any:
    """The tokenizer kept with a model that is given by name; None if there is none."""
    if not isinstance(model, str):
        return None
    try:
        return load_tokenizer(model, trust_remote_code=trust_remote_code)
    except ValueError:
        logger.warning("%s has no tokenizer: it is taken to read the policy's token ids", model)
        return None


def same_ids(tokenizer: Any, other: Any) -> bool:
    """Whether ``other`` has every token of ``tokenizer`` under the same id; padding aside."""
    known = other.get_vocab()
    vocabulary = tokenizer.get_vocab().items()
    return all(known.get(word) == i for word, i in vocabulary if word != tokenizer.pad_token)


def check_texts_do(needs: Collection[str], kind: str, args: Any) -> None:
    """Raise ``ValueError`` if sums over texts do not do for these losses and options."""
    asking = ", ".join(args.loss_type)
    if kind == "group" or NEED_IDS.intersection(needs) or args.ld_alpha is not None:
        asking = asking if args.ld_alpha is None else "ld_alpha"
        raise ValueError(
            f"{asking} needs the reference to score the policy's token ids, and a reference here "
            "has another tokenizer: choose one with the policy's tokenizer"
        )
    if args.sync_ref_model:
        raise ValueError(
            "sync_ref_model moves the reference towards the policy, and the reference has another "
            "tokenizer: set sync_ref_model=False"
        )
