"""The worked examples of pairs: values and gradients, in float64 and float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import losses
from fastpref.losses import PairLogps

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def tensor(values: object, dtype: torch.dtype, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


R = {"chosen_scores": [3.0, 2.0, 4.0, 1.5], "rejected_scores": [1.0, 2.5, 1.0, 1.0]}
MODPO = GOLDEN["modpo"]["params"]
MODPO3 = GOLDEN["modpo_three_objectives"]["inputs"]
P1 = GOLDEN["spo_round3"]["inputs"]
K2, K3 = GOLDEN["mrpo_k2"]["inputs"], GOLDEN["mrpo_k3"]["inputs"]
ROUND2 = {"prior_chosen": [P1["p0w"], P1["p1w"]], "prior_rejected": [P1["p0l"], P1["p1l"]]}
ROUND3 = {
    "prior_chosen": [P1["p0w"], P1["p1w"], P1["p2w"]],
    "prior_rejected": [P1["p0l"], P1["p1l"], P1["p2l"]],
}


def reference(inputs: dict, last: str) -> dict[str, object]:
    return {"ref_chosen": inputs[f"{last}w"], "ref_rejected": inputs[f"{last}l"]}


def several(inputs: dict) -> dict[str, object]:
    return {"ref_chosen": inputs["ref_w"], "ref_rejected": inputs["ref_l"]}


CASES = [
    ("dpo", "dpo", {}, {}),
    ("dpo", "sigmoid", {"beta": 0.1}, {}),
    ("dpo_beta_2", "dpo", {"beta": 2.0}, {}),
    ("spin", "spin", {"beta": 0.1}, {}),
    ("cdpo", "cdpo", {}, {}),
    ("cdpo", "dpo", {"label_smoothing": 0.2}, {}),
    ("robust_dpo", "robust", {}, {}),
    ("ipo_mean", "ipo", {}, {}),
    ("ipo_sum", "ipo", {"average": False}, {}),
    ("hinge", "hinge", {"beta": 0.9}, {}),
    ("slic_hf", "slic_hf", {}, {}),
    ("lr_dpo", "lr_dpo", {"alpha": 0.02}, {}),
    ("lr_dpo", "r_dpo", {"alpha": 0.02}, {}),
    ("mrpo_k2", "mrpo", {}, several(K2)),
    ("mrpo_k3", "mrpo", {}, several(K3)),
    (
        "mrpo_fixed_alpha_fixed_eps",
        "mrpo",
        {"weights": "uniform", "adaptive_eps": False},
        several(K2),
    ),
    (
        "mrpo_fixed_alpha_fixed_eps",
        "mrpo",
        {"weights": [0.5, 0.5], "adaptive_eps": False},
        several(K2),
    ),
    ("mrpo_k2_released_code", "mrpo", {"arwc_convention": "released_code"}, several(K2)),
    ("multi_dpo_k2", "multi_dpo", {}, several(K2)),
    ("mpo_delta0_grad", "mpo", {"nll_reduction": "example"}, {}),
    ("minor_dpo", "minor_dpo", {}, {}),
    ("mdpo", "mdpo", {}, {}),
    ("selm", "selm", {}, {}),
    ("xpo", "xpo", {}, {}),
    ("spo_round2", "spo", {"alpha": [0.5]}, {**ROUND2, **reference(P1, "p1")}),
    ("spo_round3", "spo", {"alpha": [0.5, 0.5]}, {**ROUND3, **reference(P1, "p2")}),
    (
        "spo_round2_two_coef",
        "spo",
        {"current_coef": 0.05, "prior_coefs": [0.1]},
        {**ROUND2, **reference(P1, "p1")},
    ),
    (
        "modpo",
        "modpo",
        {"w": [0.5, 0.5]},
        {
            "chosen_margins": [MODPO["margin_reward_chosen"]],
            "rejected_margins": [MODPO["margin_reward_rejected"]],
        },
    ),
    (
        "modpo_three_objectives",
        "modpo",
        {"w": [0.6, 0.3, 0.1]},
        {
            "chosen_margins": [MODPO3["m1"][0], MODPO3["m2"][0]],
            "rejected_margins": [MODPO3["m1"][1], MODPO3["m2"][1]],
        },
    ),
    ("exo_pair", "exo_pair", {}, {}),
    ("nca_pair", "nca_pair", {}, {}),
    ("sppo_hard", "sppo_hard", {}, {}),
    (
        "sppo_soft",
        "sppo",
        {},
        {"chosen_scores": [0.9, 0.7, 0.8, 0.6], "rejected_scores": [0.2, 0.3, 0.1, 0.45]},
    ),
    ("aot_paired", "aot", {}, {}),
    ("aot_paired_smoothed", "aot", {"label_smoothing": 0.1}, {}),
    ("aot_unpaired", "aot_unpaired", {}, {}),
    ("apo_zero", "apo_zero", {}, {}),
    ("apo_down", "apo_down", {}, {}),
    ("discopop", "discopop", {}, {}),
    ("simpo", "simpo", {}, {}),
    ("simpo", "simpo", {"gamma": 1.0}, {}),
    ("cpo", "cpo", {}, {}),
    ("orpo", "orpo", {}, {}),
    ("alphapo", "alphapo", {}, {}),
    ("dpo_norm", "dpo_norm", {}, {}),
    ("dpop", "dpop", {"beta": 0.1}, {}),
    ("rpo_regularized", "rpo", {}, {}),
    ("iterative_rpo", "iterative_rpo", {}, {}),
    ("rpo_aware_bwd_kl", "rpo_aware", {}, R),
    ("rpo_aware_fwd_kl", "rpo_aware", {"form": "fwd_kl"}, R),
    ("rpo_aware_sq", "rpo_aware", {"form": "sq"}, R),
    ("fdpo_reverse_kl", "dpo", {"f_divergence": "reverse_kl"}, {}),
    ("fdpo_forward_kl", "dpo", {"f_divergence": "forward_kl"}, {}),
    ("fdpo_js", "dpo", {"f_divergence": "js"}, {}),
    ("fdpo_alpha_0.5_trl", "dpo", {"f_divergence": "alpha", "f_alpha": 0.5}, {}),
    ("fdpo_alpha_0.5_paper", "dpo", {"f_divergence": "alpha", "f_alpha": 1 - 0.5}, {}),
    ("cal_dpo", "cal_dpo", {}, {}),
    (
        "odpo",
        "odpo",
        {},
        {"chosen_scores": [5.0, 4.0, 9.0, 3.0], "rejected_scores": [1.0, 3.5, 2.0, 2.0]},
    ),
    ("dpo_shift", "dpo_shift", {}, {}),
    ("tpo", "tpo", {"beta": 0.1}, {"third_lengths": [4.0, 5.0, 3.0, 4.0]}),
    ("hypo", "hypo", {}, {}),
    ("simper", "simper", {}, {}),
    ("rebel", "rebel", {}, R),
    ("chi_po", "chi_po", {}, {}),
    ("h_dpo", "h_dpo", {}, {}),
    ("spo_silu", "spo_silu", {}, {}),
    ("cpo_simpo", "cpo_simpo", {}, {}),
    ("c2_dpo", "c2_dpo", {}, {}),
]


@pytest.mark.parametrize(
    ("case", "name", "arguments", "fields"), CASES, ids=[f"{c}-{n}" for c, n, _, _ in CASES]
)
def test_pair_loss(
    case: str, name: str, arguments: dict, fields: dict, dtype: torch.dtype, pairs: Any, check: Any
) -> None:
    batch = pairs(GOLDEN[case]["inputs"], dtype, **fields)
    check(case, name, dtype, batch, **arguments)


def test_dpo_extreme(dtype: torch.dtype, close: Any, pairs: Any) -> None:
    batch = pairs({**GOLDEN["dpo_extreme"]["inputs"]}, dtype)
    batch = PairLogps(
        *(getattr(batch, f) for f in ("chosen", "rejected", "ref_chosen", "ref_rejected"))
    )
    close(losses.get("dpo")(batch), GOLDEN["dpo_extreme"]["outputs"]["losses"])


def test_lr_dpo_long(dtype: torch.dtype, close: Any) -> None:
    case = GOLDEN["lr_dpo_long"]
    chosen = tensor(case["inputs"]["delta"], dtype, True)
    zero = torch.zeros(3, dtype=dtype)
    batch = PairLogps(
        chosen=chosen,
        rejected=zero,
        ref_chosen=zero,
        ref_rejected=zero,
        chosen_lengths=torch.tensor(case["inputs"]["nw"]),
        rejected_lengths=torch.tensor(case["inputs"]["nl"]),
    )
    result = losses.get("lr_dpo")(batch)
    close(result, case["outputs"]["losses"])
    close(-torch.autograd.grad(result.sum(), chosen)[0], case["outputs"]["abs_coef"])


def test_sdpo_initial_loss(dtype: torch.dtype, close: Any, pairs: Any) -> None:
    inputs, outputs = (GOLDEN["sdpo_initial_loss"][key] for key in ("inputs", "outputs"))
    names = {"lw": inputs["lw_init"], "ll": inputs["ll_init"]}
    own = {"ref_chosen": inputs["lw_init"], "ref_rejected": inputs["ll_init"]}
    close(losses.get("dpo")(pairs(names, dtype, **own)), outputs["init_equals_ref"])
    other = {"ref_chosen": inputs["ref_step2_w"], "ref_rejected": inputs["ref_step2_l"]}
    close(losses.get("dpo")(pairs(names, dtype, **other)), outputs["init_S_ref_M1"])


def test_gpo(dtype: torch.dtype, close: Any, pairs: Any) -> None:
    case = GOLDEN["gpo"]
    for form, expected in case["outputs"].items():
        if form != "x":
            batch = pairs(case["inputs"], dtype)
            close(losses.get("gpo")(batch, beta=2.0, form=form), expected)


def test_vpo_is_dpo_plus_the_sample(dtype: torch.dtype, close: Any, pairs: Any) -> None:
    batch = pairs(GOLDEN["xpo"]["inputs"], dtype)
    expected = [0.632746102, 0.74049666, 0.661797113, 0.670747167]
    got = losses.get("vpo")(batch)
    assert (got.detach().double() - torch.tensor(expected)).abs().max() < 1e-6
    pessimistic = losses.get("vpo")(batch, online=False)
    close((got + pessimistic) / 2, GOLDEN["dpo"]["outputs"]["losses"])


OTHER_PARTS = {
    # not losses: data selection, model averaging, schedules, acquisition
    *("batch_B4", "logits_example", "kto_mismatch_indices", "best_worst_selection", "sdpo_gamma"),
    *("sdpo_easy_to_hard_order", "dice_alpha_search", "dice_replay_counts", "sapo_ema"),
    *("sapo_splice", "sapo_replay_probs", "active_pref", "morlhf_scalarisation", "tr_dpo_update"),
}


def test_every_case_of_a_loss_is_checked() -> None:
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_golden*.py"))
    missing = [case for case in GOLDEN if case not in OTHER_PARTS and f'"{case}"' not in source]
    assert not missing
