"""Iterative recipes: sample, score, build pairs, train, and again with the policy that it made.

Each recipe is a dataclass of options with ``run()``; every stage of a run is kept in its directory,
so the same run goes on where it stopped. The primitives they are made of are here too, for recipes
of one's own.
"""

from __future__ import annotations

import importlib
from typing import Any

RECIPES = {
    "sdpo": ("SDPO", "the preference data in stages; each stage's reference is the one before"),
    "ilr_dpo": ("ILRDPO", "sample, reward, best and worst, DPO with a price on length; again"),
    "dice": ("DICE", "the policy ranks its own samples by its implicit reward"),
    "selm": ("SELM", "DPO on updated pairs that explores away from the reference's answers"),
    "active": ("Active", "the policy chooses which of its pairs an oracle or people label"),
    "spo": ("SPO", "a preference dimension each round; earlier rounds' rewards as margins"),
    "modpo": ("MODPO", "a sweep over weights of several objectives, and their front"),
    "sapo": ("SAPO", "self-play: an average of the policy rewrites a segment of each response"),
    "dropout_ntp": ("DropoutNTP", "rejected: the chosen response, finished without the context"),
}
"""Recipes by their name on the command line: the class, and what it does."""

_HOME = {
    **{name: f"recipes.{recipe}" for recipe, (name, _) in RECIPES.items()},
    "ChangedError": "run",
    "Policy": "run",
    "Rows": "run",
    "Run": "run",
    "Outcome": "recipe",
    "Recipe": "recipe",
    "OnPolicy": "recipe",
    "People": "people",
    "Sampled": "recipe",
    "Sampling": "sampling",
    "sample": "sampling",
    "Filter": "pairs",
    "build_pairs": "pairs",
    "filter_samples": "pairs",
    "length_debias": "pairs",
    "entropy": "acquire",
    "keep": "acquire",
    "uncertainty": "acquire",
    "ReplayBuffer": "replay",
    "replay_counts": "replay",
    "replay_mix": "replay",
    "Scorer": "scorer",
    "Function": "scorers",
    "Implicit": "scorers",
    "LabelsWanted": "people",
    "Length": "scorers",
    "Ranker": "reward_models",
    "RewardModel": "reward_models",
    "Weighted": "scorers",
    "make_scorer": "scorers",
    "log_likelihoods": "policies",
    "response_sums": "policies",
    "Loss": "training",
    "Training": "training",
    "train": "training",
    "SelfPlay": "self_play",
    "SelfPlayTrainer": "self_play",
    "choose_segment": "segments",
    "ema_update": "segments",
    "splice": "segments",
    "length_controlled_win_rate": "winrate",
    "win_rate": "winrate",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """The public object ``name``, imported on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *_HOME})
