"""The worked examples of unpaired, stateful and coupled losses, and of every start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import losses
from fastpref.losses import PairLogps, UnpairedLogps

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def tensor(values: object, dtype: torch.dtype, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


def unrolled(inputs: dict, dtype: torch.dtype, **fields: object) -> UnpairedLogps:
    """Chosen as desirable, then rejected as undesirable examples."""
    numbers = {
        "logps": tensor(inputs["lw"] + inputs.get("ll", []), dtype, True),
        "ref_logps": tensor(inputs["rw"] + inputs.get("rl", []), dtype),
        "labels": torch.tensor([True] * len(inputs["lw"]) + [False] * len(inputs.get("ll", []))),
    }
    return UnpairedLogps(**numbers, **{k: tensor(v, dtype) for k, v in fields.items()})


@pytest.mark.parametrize("case", ["kto", "kto_weighted", "kto_kl_clamped"])
def test_kto(case: str, dtype: torch.dtype, close: Any) -> None:
    inputs, outputs = GOLDEN[case]["inputs"], GOLDEN[case]["outputs"]
    params = GOLDEN[case]["params"]
    fields = {"kl_logps": inputs["kl_policy"], "ref_kl_logps": inputs["kl_ref"]}
    batch = unrolled(inputs, dtype, **fields)
    for arguments in ({}, {"kl": outputs["z"]}, losses.combine("kto").states["kto"].kwargs(batch)):
        result = losses.get("kto")(batch, **params, **arguments)
        close(result, outputs["losses_desirable"] + outputs["losses_undesirable"])
        close(result.mean(), outputs["loss_mean_over_8"])
        grad = torch.autograd.grad(result.sum(), batch.logps)[0]
        close(grad, outputs["grad_lw"] + outputs["grad_ll"])


def test_kto_only_desirable(dtype: torch.dtype, close: Any) -> None:
    inputs, outputs = (GOLDEN["kto_only_desirable"][key] for key in ("inputs", "outputs"))
    result = losses.get("kto")(unrolled(inputs, dtype), kl=inputs["z"])
    close(result, outputs["losses"])
    close(result.mean(), outputs["loss_mean"])


@pytest.mark.parametrize("detach_kl", [True, False])
def test_kto_pair(detach_kl: bool, dtype: torch.dtype, close: Any, pairs: Any) -> None:
    outputs = GOLDEN["kto_pair"]["outputs"]
    batch = pairs(GOLDEN["kto_pair"]["inputs"], dtype)
    result = losses.get("kto_pair")(batch, detach_kl=detach_kl)
    both = torch.tensor([outputs["losses_chosen"], outputs["losses_rejected"]], dtype=torch.float64)
    close(result, both.mean(0).tolist())
    close(result.mean(), outputs["loss_mean_over_8"])
    wanted = outputs["grad_detached_kl" if detach_kl else "grad_attached_kl"]
    for key, field in (("lw", "chosen"), ("ll", "rejected")):
        grad = torch.autograd.grad(result.sum(), getattr(batch, field), retain_graph=True)[0]
        close(
            2 * grad, wanted[key]
        )  # the case adds up 2B terms, the loss averages the two of a pair


def test_bco_unpaired(dtype: torch.dtype, close: Any, pairs: Any) -> None:
    outputs = GOLDEN["bco_unpaired"]["outputs"]
    batch = unrolled(GOLDEN["bco_unpaired"]["inputs"], dtype)
    result = losses.get("bco")(batch, delta=0.03)
    close(result, outputs["losses_desirable"] + outputs["losses_undesirable"])
    grad = torch.autograd.grad(result.sum(), batch.logps)[0]
    close(grad, outputs["grad_lw"] + outputs["grad_ll"])
    paired = losses.get("bco_pair")(pairs(GOLDEN["bco_unpaired"]["inputs"], dtype), delta=0.03)
    close(paired, (result[:4] + result[4:]).tolist())


def test_dro_v(dtype: torch.dtype, close: Any) -> None:
    inputs, outputs = (GOLDEN["dro_v"][key] for key in ("inputs", "outputs"))
    batch = UnpairedLogps(
        logps=tensor(inputs["lw"], dtype, True),
        ref_logps=tensor(inputs["rw"], dtype),
        scores=tensor(GOLDEN["dro_v"]["params"]["reward"], dtype),
        values=tensor(inputs["v"], dtype, True),
    )
    result = losses.get("dro_v")(batch, tau=0.1)
    close(result, outputs["losses"])
    grads = torch.autograd.grad(result.sum(), [batch.logps, batch.values])
    close(grads[0], outputs["grad_lw"])
    close(grads[1], outputs["grad_v"])


@pytest.mark.parametrize("mode", ["batch_means", "elements", "ema"])
def test_mpo_steps(mode: str, dtype: torch.dtype, close: Any, pairs: Any) -> None:
    case = GOLDEN["mpo"]
    state = losses.get("mpo").entry.state(delta_mode=mode)
    key = {"batch_means": "delta", "elements": "delta_element_weighted"}.get(mode)
    for step in case["outputs"]["steps"]:
        rows = step["examples"]
        inputs = {k: [case["inputs"][k][i] for i in rows] for k in ("lw", "ll", "rw", "rl")}
        lengths = torch.tensor([case["inputs"]["nw"][i] for i in rows])
        batch = pairs(inputs, dtype)
        batch = PairLogps(**{**vars(batch), "chosen_lengths": lengths, "rejected_lengths": lengths})
        delta = state.kwargs(batch)["delta"]
        assert abs(delta - step[key or "delta_ema0.99_init_first"]) < 1e-7
        if mode == "batch_means":
            for reduction, expected in (("tokens", "token_mean"), ("example", "per_example")):
                result = losses.get("mpo")(batch, delta=delta, nll_reduction=reduction)
                close(result.mean(), step[f"total_{expected}_sft"])


def test_hpo(dtype: torch.dtype, close: Any, pairs: Any) -> None:
    case = GOLDEN["hpo"]
    aux = torch.tensor(case["inputs"]["aux_rewards"], dtype=dtype).T
    values = tensor(case["inputs"]["values"][:4], dtype, True)
    batch = PairLogps(
        **{
            **vars(pairs(case["inputs"], dtype)),
            "chosen_aux": aux[:, :4],
            "rejected_aux": aux[:, 4:],
            "values": values,
        }
    )
    outputs, kl = case["outputs"], case["params"]["z_kto"]
    result = losses.get("hpo")(batch, aux_weights=[0.95, 0.05], kl=kl)
    policy = torch.tensor(outputs["policy_losses"], dtype=torch.float64).view(2, 4)
    close(result, policy.mean(0).tolist())
    close(result.mean(), outputs["policy_loss_mean"])
    grads = torch.autograd.grad(result.sum(), [batch.chosen, batch.rejected, values])
    kto = losses.get("kto")(unrolled(case["inputs"], dtype), kl=kl)
    preference = GOLDEN["kto"]["outputs"]
    close(kto, outputs["pref_losses"])
    extra = outputs["extra_grad_logp"]
    close(2 * grads[0], [a + b for a, b in zip(preference["grad_lw"], extra[:4], strict=True)])
    close(2 * grads[1], [a + b for a, b in zip(preference["grad_ll"], extra[4:], strict=True)])
    value = torch.tensor(outputs["grad_V"], dtype=torch.float64).view(2, 4).sum(0)
    close(2 * grads[2], value.tolist())


def test_hpo_value_loss(dtype: torch.dtype, close: Any) -> None:
    outputs = GOLDEN["hpo"]["outputs"]
    values = tensor(GOLDEN["hpo"]["inputs"]["values"], dtype, True)
    result = losses.hpo_value_loss(values, tensor(outputs["R"], dtype), tau=0.7)
    close(result, outputs["value_losses"])
    close(result.mean(), outputs["value_loss_mean"])
    close(torch.autograd.grad(result.sum(), values)[0], outputs["grad_V"])


def test_dr_dpo(dtype: torch.dtype, close: Any, pairs: Any) -> None:
    outputs = GOLDEN["dr_dpo"]["outputs"]
    batch = pairs(GOLDEN["dr_dpo"]["inputs"], dtype)
    result = losses.get("dr_dpo")(batch)
    close(result.mean(), outputs["loss_scalar"])
    grad = torch.autograd.grad(result.mean(), batch.chosen)[0]
    weights = outputs["per_example_grad_weight (sums to 1)"]
    dpo = GOLDEN["dpo"]["outputs"]["grad_lw"]
    close(grad, [w * g for w, g in zip(weights, dpo, strict=True)])


def test_alpha_dpo(dtype: torch.dtype, pairs: Any, check: Any) -> None:
    case = GOLDEN["alpha_dpo"]
    batch = pairs(case["inputs"], dtype)
    state = losses.get("alpha_dpo").entry.state()
    state.load_state_dict({"mean": 0.05, "std": 0.2})
    keywords = state.kwargs(batch)
    assert state.state_dict()["mean"] == pytest.approx(case["outputs"]["ema_mean_after"], rel=1e-6)
    assert state.state_dict()["std"] == pytest.approx(case["outputs"]["ema_std_after"], rel=1e-6)
    check("alpha_dpo", "alpha_dpo", dtype, batch, gamma_beta_ratio=0.6, alpha=0.2, **keywords)


def test_beta_dpo(dtype: torch.dtype, close: Any, pairs: Any) -> None:
    case = GOLDEN["beta_dpo"]
    outputs, batch = case["outputs"], pairs(case["inputs"], dtype)
    state = losses.get("beta_dpo").entry.state()
    state.load_state_dict({"mean": 0.2, "std": 0.9})
    keywords = state.kwargs(batch)
    assert float(keywords["ema_mean"]) == pytest.approx(outputs["ema_mean_after"], rel=1e-6)
    assert float(keywords["ema_std"]) == pytest.approx(outputs["ema_std_after"], rel=1e-6)
    assert int((keywords["kept"] > 0).sum()) == outputs["n_keep"]
    kept = case["inputs"]["kept (given, normally drawn)"]
    mask = torch.zeros(4, dtype=torch.bool)
    mask[kept] = True
    for given in (kept, torch.tensor(kept), mask, mask.to(dtype) * 4 / 3):
        result = losses.get("beta_dpo")(batch, kept=given, ema_mean=outputs["ema_mean_after"])
        close(result.mean(), outputs["loss_mean_kept"])
        close(result[mask] * 3 / 4, [outputs["losses"][i] for i in kept])
    everyone = torch.full((4,), 1.0, dtype=dtype)
    level = sum(outputs["gap"][i] for i in kept) / 3
    fixed = {"kept": everyone, "kept_mean": level, "ema_mean": outputs["ema_mean_after"]}
    close(losses.get("beta_dpo")(batch, **fixed), outputs["losses"])


def test_beta_dpo_floor(dtype: torch.dtype, close: Any, pairs: Any) -> None:
    case = GOLDEN["beta_dpo_floor"]
    batch = pairs(GOLDEN["dpo"]["inputs"], dtype)
    floored = {"kept": [0, 1, 2, 3], "kept_mean": -3.0, "ema_mean": 0.0}
    low = losses.get("dpo")(batch, beta=case["outputs"]["beta_batch"])
    close(losses.get("beta_dpo")(batch, **floored), low.tolist())


def test_loss_at_initialisation(dtype: torch.dtype, close: Any) -> None:
    logps = tensor([-3.0, -4.5], dtype)
    both = {"chosen": logps, "rejected": logps, "ref_chosen": logps, "ref_rejected": logps}
    lengths = {"chosen_lengths": torch.tensor([2, 3]), "rejected_lengths": torch.tensor([4, 1])}
    more = {"corrupted": logps, "ref_corrupted": logps}
    more |= {"chosen_scores": logps.new_tensor([3, 5]), "rejected_scores": logps.new_tensor([1, 3])}
    batch = PairLogps(**both, **lengths, **more)
    calls = {
        "dpo": ("dpo", {}),
        "cdpo(eps=.2)": ("cdpo", {}),
        "robust(eps=.1)": ("robust", {}),
        "ipo(tau=.1)": ("ipo", {}),
        "hinge": ("hinge", {}),
        "minor_dpo": ("minor_dpo", {}),
        "mdpo": ("mdpo", {}),
        "apo_zero": ("apo_zero", {}),
        "nca_pair": ("nca_pair", {}),
        "exo_pair(eps=1e-3)": ("exo_pair", {}),
        "bco_pair(delta=0)": ("bco_pair", {}),
        "sppo_hard(beta=1e-3)": ("sppo_hard", {}),
        "discopop": ("discopop", {}),
        "apo_down": ("apo_down", {}),
        "cal_dpo(beta=.1,coef=.5)": ("cal_dpo", {}),
        "rebel(r gap 2)": ("rebel", {}),
        "spin": ("spin", {}),
        "kto": ("kto_pair", {}),
    }
    expected = GOLDEN["loss_at_initialisation"]["outputs"]
    assert set(calls) == set(expected)
    for key, (name, arguments) in calls.items():
        close(losses.get(name)(batch, **arguments), [expected[key]] * 2)
