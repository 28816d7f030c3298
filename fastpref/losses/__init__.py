"""Every loss of the family as a pure function of per-sequence numbers, in one registry.

``get(name)(batch, **hyper_parameters)`` gives one number per example, without reduction;
``combine`` adds several; ``register`` gives a name to one of your own.
``python -m fastpref.losses`` prints them all.
"""
# ruff: noqa: I001 (the families register their losses in the order they are documented in)

from __future__ import annotations

from fastpref.losses import paired, asymmetric, length_aware, regularised, reference_free
from fastpref.losses import multi_reference, multi_objective, scored, online, token_statistics
from fastpref.losses import adaptive, coupled, unpaired, group, token_level
from fastpref.losses.batch import SOURCES, GroupLogps, Packed, PairLogps, UnpairedLogps
from fastpref.losses.combine import Combined, combine
from fastpref.losses.core import Entry, Loss, get, names, register, registry, seal
from fastpref.losses.group import group_advantages
from fastpref.losses.multi_objective import hpo_value_loss
from fastpref.losses.parameters import Parameter
from fastpref.losses.scored import nash_md_mixture, sppo_win_probabilities
from fastpref.losses.states import State
from fastpref.losses.token_level import (
    fine_grained_rm,
    token_advantages,
    token_diff,
    token_ppo,
    token_value_loss,
)

seal()

__all__ = [
    "SOURCES",
    "Combined",
    "Entry",
    "GroupLogps",
    "Loss",
    "Packed",
    "PairLogps",
    "Parameter",
    "State",
    "UnpairedLogps",
    "adaptive",
    "asymmetric",
    "combine",
    "coupled",
    "fine_grained_rm",
    "get",
    "group",
    "group_advantages",
    "hpo_value_loss",
    "length_aware",
    "multi_objective",
    "multi_reference",
    "names",
    "nash_md_mixture",
    "online",
    "paired",
    "reference_free",
    "register",
    "registry",
    "regularised",
    "scored",
    "sppo_win_probabilities",
    "token_advantages",
    "token_diff",
    "token_level",
    "token_ppo",
    "token_statistics",
    "token_value_loss",
    "unpaired",
]
