"""The interface others build on: names, hyper-parameters and defaults, inputs; written out here by
hand, so that a change of one is seen."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest

from fastpref import losses
from fastpref.losses import GroupLogps, PairLogps, UnpairedLogps

NLL = {"nll_reduction": "example", "nll_scope": "response"}
CLIPPING = {
    "eps_max": 0.1,
    "adaptive_eps": True,
    "weights": "adaptive",
    "arwc_convention": "paper",
}
EMA = {"ema_mean": None, "ema_std": None}

# name: (inputs, hyper-parameters and their defaults, aliases)
PAIRS: dict[str, tuple[str, dict[str, Any], str]] = {
    "dpo": ("ref", {"beta": 0.1, "label_smoothing": 0.0}, "sigmoid spin"),
    "cdpo": ("ref", {"beta": 0.1, "label_smoothing": 0.2}, ""),
    "robust": ("ref", {"beta": 0.1, "label_smoothing": 0.1}, "robust_dpo"),
    "ipo": ("ref lengths", {"beta": 0.1, "average": True}, ""),
    "hinge": ("ref", {"beta": 0.1}, ""),
    "slic_hf": ("", {"margin": 1.0, "nll_weight": 0.1}, ""),
    "exo_pair": ("ref", {"beta": 0.1, "label_smoothing": 1e-3}, ""),
    "nca_pair": ("ref", {"beta": 0.1}, ""),
    "apo_zero": ("ref", {"beta": 0.1}, ""),
    "apo_down": ("ref", {"beta": 0.1}, ""),
    "bco_pair": ("ref", {"beta": 0.1, "delta": 0.0}, ""),
    "sppo_hard": ("ref", {"beta": 1e-3}, ""),
    "sppo": ("ref scores", {"beta": 1e-3}, "sppo_soft"),
    "aot": ("ref", {"beta": 0.1, "label_smoothing": 0.0}, "aot_paired"),
    "aot_unpaired": ("ref", {"beta": 0.1, "label_smoothing": 0.0}, ""),
    "discopop": ("ref", {"beta": 0.05, "tau": 0.05}, ""),
    "sigmoid_norm": ("ref lengths", {"beta": 0.1}, "dpo_norm"),
    "sft": ("lengths", NLL, ""),
    "lr_dpo": ("ref lengths", {"beta": 0.1, "alpha": 0.01}, "r_dpo"),
    "mrpo": ("refs", {"beta": 0.1, **CLIPPING, "combine": "harmonic"}, ""),
    "multi_dpo": ("refs", {"beta": 0.1, **CLIPPING}, ""),
    "mpo": (
        "ref lengths",
        {
            "beta": 0.1,
            "preference_weight": 0.8,
            "quality_weight": 0.2,
            "generation_weight": 1.0,
            "delta": 0.0,
            "nll_reduction": "tokens",
        },
        "",
    ),
    "minor_dpo": ("ref", {"beta": 0.1}, ""),
    "mdpo": ("ref corrupted", {"beta": 0.1, "anchor": 0.0}, ""),
    "selm": ("ref third", {"beta": 0.01, "alpha": 1e-3}, ""),
    "xpo": ("ref third", {"beta": 0.1, "alpha": 1e-5}, ""),
    "vpo": ("ref third", {"beta": 0.1, "alpha": 1e-3, "online": True}, ""),
    "hpo": (
        "ref aux",
        {
            "beta": 0.1,
            "gamma": 0.1,
            "beta_a": 0.5,
            "tau": 0.7,
            "aux_weights": None,
            "kl": None,
            "max_weight": 20.0,
        },
        "",
    ),
    "spo": ("ref prior", {"beta": 0.1, "current_coef": None}, ""),
    "modpo": ("ref margins", {"beta": 0.1, "hinge": False}, ""),
    "simpo": ("lengths", {"beta": 2.0, "gamma_beta_ratio": 0.5, "gamma": None}, ""),
    "cpo": ("lengths", {"beta": 0.1, "nll_weight": 1.0, **NLL}, ""),
    "cpo_simpo": ("lengths", {"beta": 2.0, "nll_weight": 0.1, "gamma_beta_ratio": 0.5, **NLL}, ""),
    "orpo": ("lengths", {"beta": 0.1, **NLL}, ""),
    "alphapo": ("lengths", {"beta": 2.5, "alpha": 0.25, "gamma": 0.1}, ""),
    "alpha_dpo": (
        "ref lengths",
        {"beta": 2.5, "gamma_beta_ratio": 0.5, "alpha": 0.1, **EMA},
        "",
    ),
    "dpop": ("ref", {"beta": 0.3, "penalty": 50.0}, ""),
    "ld_dpo": ("tokens ref_tokens", {"beta": 0.1, "alpha": 0.5, "on_reference": True}, ""),
    "sampo": ("tokens ref_tokens", {"beta": 0.1, "kept": None, "generator": None}, ""),
    "tdpo1": ("ref kl", {"beta": 0.1}, ""),
    "tdpo2": ("ref kl", {"beta": 0.1, "alpha": 0.5}, ""),
    "wpo": ("ref lengths log_sum_sq", {"beta": 0.1, "clamp": True}, ""),
    "beta_dpo": ("ref", {"beta": 0.1, "a": 0.6, "keep": 0.8, **EMA, "kept": None}, ""),
    "epsilon_dpo": ("ref perturbed", {"beta": 0.01, "epsilon": 0.01}, ""),
    "rpo": ("ref lengths", {"beta": 0.01, "nll_weight": 0.005}, "rpo_regularized"),
    "iterative_rpo": ("ref lengths", {"beta": 0.1, "nll_weight": 1.0, **NLL}, ""),
    "rpo_aware": ("ref scores", {"beta": 0.1, "eta": 1.0, "form": "bwd_kl"}, ""),
    "gpo": ("ref", {"beta": 0.1, "form": "logistic"}, ""),
    "cal_dpo": ("ref", {"beta": 0.1, "cal_coef": 0.5}, ""),
    "odpo": ("ref scores", {"beta": 0.1, "alpha": 1.0}, ""),
    "rebel": ("ref scores", {"eta": 1.0}, ""),
    "dpo_shift": ("ref", {"beta": 0.1, "shift": 0.75}, ""),
    "h_dpo": ("ref", {"beta": 0.1, "alpha": 0.9}, ""),
    "hypo": ("ref", {"beta": 0.1}, ""),
    "chi_po": ("ref", {"beta": 0.1, "clip": None}, ""),
    "spo_silu": ("ref", {"beta": 0.1}, ""),
    "c2_dpo": ("ref", {"beta": 0.1, "penalty": 2e-4}, ""),
    "focal_po": ("ref", {"beta": 0.1, "gamma": 0.05}, ""),
    "tpo": (
        "third lengths",
        {"beta": 0.01, "nll_weight": 1.0, "gamma": 0.5, "length_normalized": False, **NLL},
        "",
    ),
    "simper": ("lengths", {}, ""),
    "dr_dpo": ("ref", {"beta": 0.1, "beta_prime": 1.0}, ""),
    "nash_md": ("tokens ref_tokens scores", {"beta": 0.1, "mixture_coef": 0.5}, ""),
    "kto_pair": ("ref", {"beta": 0.1, "detach_kl": True}, ""),
}
UNPAIRED: dict[str, tuple[str, dict[str, Any], str]] = {
    "kto": (
        "ref mismatched",
        {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "kl": None},
        "",
    ),
    "apo_zero_unpaired": ("ref", {"beta": 0.1}, ""),
    "bco": ("ref", {"beta": 0.1, "delta": 0.0, "density_weights": None}, "bco_unpaired"),
    "dro_v": ("ref scores values", {"tau": 1.0}, ""),
}
GROUPS: dict[str, tuple[str, dict[str, Any], str]] = {
    "nca": ("ref scores", {"beta": 0.1, "alpha": 1.0}, ""),
    "info_nca": ("ref scores", {"beta": 0.1, "alpha": 1.0}, ""),
    "pl_dpo": ("ref scores", {"beta": 0.1}, ""),
    "lipo": ("ref scores", {"beta": 0.1}, ""),
    "rrhf": ("scores lengths", {"length_penalty": 1.0, "nll_weight": 1.0}, ""),
    "grpo_pair": ("ref scores lengths", {"std_eps": 1e-4, "sample_std": True}, ""),
}
KINDS = {"pair": PAIRS, "unpaired": UNPAIRED, "group": GROUPS}
COUPLED = {"aot", "aot_unpaired", "alpha_dpo", "beta_dpo", "dr_dpo", "kto_pair", "hpo", "kto"}
BY_RANK = {"aot", "aot_unpaired", "dr_dpo"}  # or a batch's share: no weight of one pair there
OF_LOG_RATIOS = {
    *("dpo", "cdpo", "robust", "hinge", "exo_pair", "discopop", "gpo", "spo_silu", "focal_po"),
    *("ipo", "sigmoid_norm"),
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, table in KINDS.items() for name in table]
)
def test_the_table(kind: str, name: str) -> None:
    inputs, defaults, aliases = KINDS[kind][name]
    entry = losses.get(name).entry
    assert (entry.name, entry.kind) == (name, kind)
    assert entry.needs == frozenset(inputs.split())
    assert {key: entry.defaults.get(key, "nothing") for key in defaults} == defaults
    assert set(aliases.split()) <= set(entry.aliases)
    assert all(losses.get(alias) is losses.get(name) for alias in entry.aliases)
    assert entry.coupled == (name in COUPLED)
    assert ("f_divergence" in entry.defaults) == (name in OF_LOG_RATIOS)
    weighted = kind == "pair" and name not in {*BY_RANK, "wpo"}
    assert ("weighting" in entry.defaults) == weighted
    assert entry.aligned == (name not in BY_RANK)


def test_none_is_missing() -> None:
    for kind, table in KINDS.items():
        assert set(table) <= set(losses.names(kind))
    assert {"fine_grained_rm", "token_ppo"} <= set(losses.names("token"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bco_pair", {"delta_mode": "zero", "momentum": 0.99}),
        ("mpo", {"delta_mode": "batch_means", "momentum": 0.99}),
        ("bco", {"delta_mode": "elements", "momentum": 0.99}),
        ("alpha_dpo", {"momentum": 0.9}),
        ("beta_dpo", {"momentum": 0.9}),
        ("epsilon_dpo", {"beta": 0.01, "epsilon": 0.01}),
    ],
)
def test_states(name: str, options: dict[str, Any]) -> None:
    state = losses.get(name).entry.state
    assert state is not None
    known = inspect.signature(state).parameters
    assert {key: known[key].default for key in options} == options


def test_fields() -> None:
    def names(batch: type) -> list[str]:
        return [field.name for field in fields(batch)]

    sides = ("chosen", "rejected")
    wanted = [*sides, *(f"ref_{side}" for side in sides), "third", "ref_third", "third_lengths"]
    for field in ("{}_lengths", "{}_tokens", "ref_{}_tokens", "{}_scores", "{}_margins"):
        wanted += [field.format(side) for side in sides]
    for field in ("prior_{}", "{}_log_sum_sq", "{}_kl", "{}_plus", "{}_minus", "{}_aux"):
        wanted += [field.format(side) for side in sides]
    wanted += ["corrupted", "ref_corrupted", "values", "weights"]
    assert set(wanted) | {"prompt", "prompt_lengths"} == set(names(PairLogps))
    assert names(UnpairedLogps) == [
        *("logps", "ref_logps", "labels", "lengths", "kl_logps", "ref_kl_logps", "scores"),
        *("values", "aux", "weights"),
    ]
    assert names(GroupLogps) == ["logps", "ref_logps", "lengths", "scores", "mask", "weights"]
