"""fastpref: preference optimisation of language models without storing ``[tokens, vocab]`` logits.

Importing this package loads neither torch, transformers nor triton and touches no GPU: each public
name is imported from its module on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "linear_cross_entropy": "ops",
    "linear_logprobs": "ops",
    "linear_token_kl": "token_kl",
    "preference_margins": "ops",
    "sequence_logprobs": "ops",
    "TokenStats": "reference",
    "integrations": "integrations",
    "losses": "losses",
    "rounds": "rounds",
    "PreferenceConfig": "config",
    "DPOConfig": "config",
    "KTOConfig": "config",
    "CPOConfig": "config",
    "ORPOConfig": "config",
    "PreferenceTrainer": "trainer",
    "DPOTrainer": "presets",
    "KTOTrainer": "presets",
    "CPOTrainer": "presets",
    "ORPOTrainer": "presets",
    "__version__": "_version",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """The public object ``name``, imported on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    try:
        module = importlib.import_module(f"{__name__}.{home}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith(__name__):
            raise
        remedy = "pip install 'fastpref[train]'"
        raise ImportError(f"fastpref.{name} needs {error.name}. Try: {remedy}") from error
    value = module if name == home else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *_HOME})
