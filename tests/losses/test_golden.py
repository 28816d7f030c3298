"""Every worked example of a loss, values and gradients, in float64 and float32.

``golden.json`` holds numbers worked out in float64 from the papers' formulas, independently of this
code. A gradient is that of the sum over examples, with detached statistics held fixed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastpref import losses
from fastpref.losses import GroupLogps, Packed, PairLogps, UnpairedLogps

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
B4 = GOLDEN["batch_B4"]["outputs"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LEAVES = {"lw": "chosen", "ll": "rejected", "lg": "third", "lwc": "corrupted"}
FROZEN = {"rw": "ref_chosen", "rl": "ref_rejected", "rg": "ref_third", "rwc": "ref_corrupted"}


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def close(got: torch.Tensor, expected: object, size: float = 0.0) -> None:
    """Error at most the dtype's tolerance, relative to the largest number expected or ``size``."""
    expected = torch.tensor(expected, dtype=torch.float64)
    assert got.shape == expected.shape
    limit = TOLERANCE[got.dtype] * max(expected.abs().max().item(), size, 1e-30)
    error = (got.detach().double() - expected).abs().max().item()
    assert error <= limit, (
        f"error {error:.3g} above {limit:.3g}: {got.tolist()} {expected.tolist()}"
    )


def tensor(values: object, dtype: torch.dtype, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


def pairs(inputs: dict, dtype: torch.dtype, **fields: object) -> PairLogps:
    """The pairs of a case; lengths are those of the canonical batch."""
    numbers = {LEAVES[key]: tensor(inputs[key], dtype, True) for key in LEAVES if key in inputs}
    numbers |= {FROZEN[key]: tensor(inputs[key], dtype) for key in FROZEN if key in inputs}
    numbers |= {
        "chosen_lengths": torch.tensor(B4["nw"]),
        "rejected_lengths": torch.tensor(B4["nl"]),
    }
    numbers |= {key: tensor(value, dtype) for key, value in fields.items()}
    return PairLogps(**numbers)


def check(case: str, name: str, dtype: torch.dtype, batch: PairLogps, **arguments: object) -> None:
    """Losses, mean and every gradient of a case."""
    outputs = GOLDEN[case]["outputs"]
    result = losses.get(name)(batch, **arguments)
    assert result.dtype == dtype
    close(result, outputs["losses"])
    close(result.mean(), outputs["loss_mean"])
    grads = {key: outputs[f"grad_{key}"] for key in LEAVES if f"grad_{key}" in outputs}
    size = max((abs(x) for row in grads.values() for x in row), default=0.0)
    for key, field in LEAVES.items():
        if key in grads:
            grad = torch.autograd.grad(result.sum(), getattr(batch, field), retain_graph=True)[0]
            close(grad, grads[key], size=size)


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
def test_pair_loss(case: str, name: str, arguments: dict, fields: dict, dtype: torch.dtype) -> None:
    batch = pairs(GOLDEN[case]["inputs"], dtype, **fields)
    check(case, name, dtype, batch, **arguments)


def test_dpo_extreme(dtype: torch.dtype) -> None:
    batch = pairs({**GOLDEN["dpo_extreme"]["inputs"]}, dtype)
    batch = PairLogps(
        *(getattr(batch, f) for f in ("chosen", "rejected", "ref_chosen", "ref_rejected"))
    )
    close(losses.get("dpo")(batch), GOLDEN["dpo_extreme"]["outputs"]["losses"])


def test_lr_dpo_long(dtype: torch.dtype) -> None:
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


def test_sdpo_initial_loss(dtype: torch.dtype) -> None:
    inputs, outputs = (GOLDEN["sdpo_initial_loss"][key] for key in ("inputs", "outputs"))
    names = {"lw": inputs["lw_init"], "ll": inputs["ll_init"]}
    own = {"ref_chosen": inputs["lw_init"], "ref_rejected": inputs["ll_init"]}
    close(losses.get("dpo")(pairs(names, dtype, **own)), outputs["init_equals_ref"])
    other = {"ref_chosen": inputs["ref_step2_w"], "ref_rejected": inputs["ref_step2_l"]}
    close(losses.get("dpo")(pairs(names, dtype, **other)), outputs["init_S_ref_M1"])


def test_gpo(dtype: torch.dtype) -> None:
    case = GOLDEN["gpo"]
    for form, expected in case["outputs"].items():
        if form != "x":
            batch = pairs(case["inputs"], dtype)
            close(losses.get("gpo")(batch, beta=2.0, form=form), expected)


def test_vpo_is_dpo_plus_the_sample(dtype: torch.dtype) -> None:
    batch = pairs(GOLDEN["xpo"]["inputs"], dtype)
    expected = [0.632746102, 0.74049666, 0.661797113, 0.670747167]
    got = losses.get("vpo")(batch)
    assert (got.detach().double() - torch.tensor(expected)).abs().max() < 1e-6
    pessimistic = losses.get("vpo")(batch, online=False)
    close((got + pessimistic) / 2, GOLDEN["dpo"]["outputs"]["losses"])


def unrolled(inputs: dict, dtype: torch.dtype, **fields: object) -> UnpairedLogps:
    """Chosen as desirable, then rejected as undesirable examples."""
    numbers = {
        "logps": tensor(inputs["lw"] + inputs.get("ll", []), dtype, True),
        "ref_logps": tensor(inputs["rw"] + inputs.get("rl", []), dtype),
        "labels": torch.tensor([True] * len(inputs["lw"]) + [False] * len(inputs.get("ll", []))),
    }
    return UnpairedLogps(**numbers, **{k: tensor(v, dtype) for k, v in fields.items()})


@pytest.mark.parametrize("case", ["kto", "kto_weighted", "kto_kl_clamped"])
def test_kto(case: str, dtype: torch.dtype) -> None:
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


def test_kto_only_desirable(dtype: torch.dtype) -> None:
    inputs, outputs = (GOLDEN["kto_only_desirable"][key] for key in ("inputs", "outputs"))
    result = losses.get("kto")(unrolled(inputs, dtype), kl=inputs["z"])
    close(result, outputs["losses"])
    close(result.mean(), outputs["loss_mean"])


@pytest.mark.parametrize("detach_kl", [True, False])
def test_kto_pair(detach_kl: bool, dtype: torch.dtype) -> None:
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


def test_bco_unpaired(dtype: torch.dtype) -> None:
    outputs = GOLDEN["bco_unpaired"]["outputs"]
    batch = unrolled(GOLDEN["bco_unpaired"]["inputs"], dtype)
    result = losses.get("bco")(batch, delta=0.03)
    close(result, outputs["losses_desirable"] + outputs["losses_undesirable"])
    grad = torch.autograd.grad(result.sum(), batch.logps)[0]
    close(grad, outputs["grad_lw"] + outputs["grad_ll"])
    paired = losses.get("bco_pair")(pairs(GOLDEN["bco_unpaired"]["inputs"], dtype), delta=0.03)
    close(paired, (result[:4] + result[4:]).tolist())


def test_dro_v(dtype: torch.dtype) -> None:
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
def test_mpo_steps(mode: str, dtype: torch.dtype) -> None:
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


def test_hpo(dtype: torch.dtype) -> None:
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


def test_hpo_value_loss(dtype: torch.dtype) -> None:
    outputs = GOLDEN["hpo"]["outputs"]
    values = tensor(GOLDEN["hpo"]["inputs"]["values"], dtype, True)
    result = losses.hpo_value_loss(values, tensor(outputs["R"], dtype), tau=0.7)
    close(result, outputs["value_losses"])
    close(result.mean(), outputs["value_loss_mean"])
    close(torch.autograd.grad(result.sum(), values)[0], outputs["grad_V"])


def test_dr_dpo(dtype: torch.dtype) -> None:
    outputs = GOLDEN["dr_dpo"]["outputs"]
    batch = pairs(GOLDEN["dr_dpo"]["inputs"], dtype)
    result = losses.get("dr_dpo")(batch)
    close(result.mean(), outputs["loss_scalar"])
    grad = torch.autograd.grad(result.mean(), batch.chosen)[0]
    weights = outputs["per_example_grad_weight (sums to 1)"]
    dpo = GOLDEN["dpo"]["outputs"]["grad_lw"]
    close(grad, [w * g for w, g in zip(weights, dpo, strict=True)])


def test_alpha_dpo(dtype: torch.dtype) -> None:
    case = GOLDEN["alpha_dpo"]
    batch = pairs(case["inputs"], dtype)
    state = losses.get("alpha_dpo").entry.state()
    state.load_state_dict({"mean": 0.05, "std": 0.2})
    keywords = state.kwargs(batch)
    assert state.state_dict()["mean"] == pytest.approx(case["outputs"]["ema_mean_after"], rel=1e-6)
    assert state.state_dict()["std"] == pytest.approx(case["outputs"]["ema_std_after"], rel=1e-6)
    check("alpha_dpo", "alpha_dpo", dtype, batch, gamma_beta_ratio=0.6, alpha=0.2, **keywords)


def test_beta_dpo(dtype: torch.dtype) -> None:
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


def test_beta_dpo_floor(dtype: torch.dtype) -> None:
    case = GOLDEN["beta_dpo_floor"]
    batch = pairs(GOLDEN["dpo"]["inputs"], dtype)
    floored = {"kept": [0, 1, 2, 3], "kept_mean": -3.0, "ema_mean": 0.0}
    low = losses.get("dpo")(batch, beta=case["outputs"]["beta_batch"])
    close(losses.get("beta_dpo")(batch, **floored), low.tolist())


def packed(tokens: list[list[float]], dtype: torch.dtype, grad: bool = False) -> Packed:
    lengths = torch.tensor([0] + [len(row) for row in tokens])
    values = tensor([x for row in tokens for x in row], dtype, grad)
    return Packed(values, lengths.cumsum(0).to(torch.int32))


def b4_tokens(dtype: torch.dtype) -> PairLogps:
    tokens = GOLDEN["batch_B4"]["inputs"]["tokens"]
    return PairLogps(
        chosen_tokens=packed(tokens["chosen_policy"], dtype, True),
        rejected_tokens=packed(tokens["rejected_policy"], dtype, True),
        ref_chosen_tokens=packed(tokens["chosen_ref"], dtype),
        ref_rejected_tokens=packed(tokens["rejected_ref"], dtype),
    )


def test_packed_sums_are_those_of_the_batch(dtype: torch.dtype) -> None:
    batch = b4_tokens(dtype)
    close(batch.chosen_tokens.sum(), B4["lw"])
    close(batch.ref_rejected_tokens.sum(), B4["rl"])


def test_ld_dpo(dtype: torch.dtype) -> None:
    outputs = GOLDEN["ld_dpo"]["outputs"]
    result = losses.get("ld_dpo")(b4_tokens(dtype))
    close(result, outputs["losses"])
    sums = {key: torch.tensor(value) for key, value in outputs["weighted_logps"].items()}
    full = torch.tensor(B4["rw"]) - torch.tensor(B4["rl"])
    logit = 0.1 * (sums["chosen_policy"] - sums["rejected_policy"] - full)
    on_policy = losses.get("ld_dpo")(b4_tokens(dtype), on_reference=False)
    assert (on_policy.detach() + torch.nn.functional.logsigmoid(logit)).abs().max() < 1e-6


def test_sampo(dtype: torch.dtype) -> None:
    case = GOLDEN["sampo"]
    kept = case["inputs"]["kept_indices"]
    for given in (kept, (kept["chosen"], kept["rejected"])):
        close(losses.get("sampo")(b4_tokens(dtype), kept=given), case["outputs"]["losses"])
    surrogate = losses.get("sampo")(b4_tokens(dtype), expectation=True)
    close(surrogate, case["outputs"]["losses_expectation_variant"])


def logits_example(dtype: torch.dtype) -> tuple[dict, dict]:
    example = GOLDEN["logits_example"]["inputs"]
    logits = {key: tensor(value, dtype) for key, value in example["logits"].items()}
    return logits, {key: torch.tensor(value) for key, value in example["labels"].items()}


def chosen_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def example_pairs(labels: dict, dtype: torch.dtype, **fields: torch.Tensor) -> PairLogps:
    logits, _ = logits_example(dtype)
    sums = {
        name: chosen_logps(logits[f"{side}_{model}"], labels[side]).sum()[None]
        for name, side, model in (
            ("chosen", "chosen", "policy"),
            ("rejected", "rejected", "policy"),
            ("ref_chosen", "chosen", "ref"),
            ("ref_rejected", "rejected", "ref"),
        )
    }
    lengths = {f"{side}_lengths": torch.tensor([len(labels[side])]) for side in labels}
    return PairLogps(**sums, **lengths, **fields)


def test_tdpo(dtype: torch.dtype) -> None:
    logits, labels = logits_example(dtype)
    outputs = GOLDEN["tdpo"]["outputs"]
    kl = {}
    for side in ("chosen", "rejected"):
        ref, policy = (logits[f"{side}_{model}"].log_softmax(-1) for model in ("ref", "policy"))
        kl[f"{side}_kl"] = (ref.exp() * (ref - policy)).sum()[None].requires_grad_()
    batch = example_pairs(labels, dtype, **kl)
    close(losses.get("tdpo1")(batch), [outputs["tdpo1_loss"]])
    result = losses.get("tdpo2")(batch)
    close(result, [outputs["tdpo2_loss"]])
    grads = torch.autograd.grad(result.sum(), list(kl.values()), allow_unused=True)
    assert grads[0] is None, "TDPO2 holds the chosen KL fixed"
    assert grads[1].item() > 0


@pytest.mark.parametrize("case", ["wpo", "wpo_below_one"])
def test_wpo(case: str, dtype: torch.dtype) -> None:
    logits, labels = logits_example(dtype)
    if case == "wpo_below_one":
        given = GOLDEN[case]["inputs"]["labels"]
        labels = {key: torch.tensor(value) for key, value in given.items()}
    statistics = {
        f"{side}_log_sum_sq": (2 * logits[f"{side}_policy"].log_softmax(-1))
        .logsumexp(-1)
        .mean()[None]
        for side in ("chosen", "rejected")
    }
    batch = example_pairs(labels, dtype, **statistics)
    outputs = GOLDEN[case]["outputs"]
    close(losses.get("wpo")(batch), [outputs["wpo_loss"]])
    close(losses.get("dpo")(batch, weighting="wpo"), [outputs["wpo_loss"]])
    if "wpo_loss_unclamped" in outputs:
        unclamped = losses.get("wpo")(batch, clamp=False)
        close(unclamped, [outputs["wpo_loss_unclamped"]])


def test_epsilon_dpo(dtype: torch.dtype) -> None:
    logits, labels = logits_example(dtype)
    outputs = GOLDEN["epsilon_dpo"]["outputs"]
    perturbed = {}
    for side in ("chosen", "rejected"):
        policy, ref = logits[f"{side}_policy"], logits[f"{side}_ref"]
        for name, eps in (("plus", 0.01), ("minus", -0.01)):
            mixed = (1 + eps) * policy - eps * ref
            perturbed[f"{side}_{name}"] = chosen_logps(mixed, labels[side]).sum()[None]
    batch = example_pairs(labels, dtype, **perturbed)
    close(losses.get("epsilon_dpo")(batch), [outputs["loss"]])
    state = losses.get("epsilon_dpo").entry.state()
    assert float(state.kwargs(batch)["beta"]) == 0.01
    assert float(state.kwargs(batch)["beta"]) == pytest.approx(outputs["next_beta_single_example"])


def test_nash_md(dtype: torch.dtype) -> None:
    logits, labels = logits_example(dtype)
    case = GOLDEN["nash_md"]
    mixture = losses.nash_md_mixture(logits["chosen_policy"], logits["chosen_ref"], 0.5)
    close(mixture, case["outputs"]["mixture_logprobs"])
    policy = chosen_logps(logits["chosen_policy"], labels["chosen"]).requires_grad_()
    bounds = torch.tensor([0, 2], dtype=torch.int32)
    batch = PairLogps(
        chosen_tokens=Packed(policy, bounds),
        ref_chosen_tokens=Packed(chosen_logps(logits["chosen_ref"], labels["chosen"]), bounds),
        chosen_scores=tensor([0.8], dtype),
    )
    result = losses.get("nash_md")(batch, beta=0.1, mixture_coef=0.5)
    close(result, [case["outputs"]["loss"]])
    grad = torch.autograd.grad(result.sum(), policy)[0]
    close(grad, case["outputs"]["grad_token_logp"])


def groups(rewards: list[float], scores: list[float], dtype: torch.dtype) -> GroupLogps:
    return GroupLogps(
        logps=tensor([rewards], dtype, True),
        ref_logps=torch.zeros(1, len(rewards), dtype=dtype),
        scores=tensor([scores], dtype),
    )


def test_nca_and_info_nca(dtype: torch.dtype) -> None:
    inputs, outputs = (GOLDEN["nca_infonca_k4"][key] for key in ("inputs", "outputs"))
    batch = groups(inputs["implicit_rewards"][0], inputs["scores"][0], dtype)
    close(losses.get("nca")(batch, beta=1.0), [outputs["nca"]])
    close(losses.get("info_nca")(batch, beta=1.0), [outputs["infonca"]])


def test_listwise(dtype: torch.dtype) -> None:
    inputs, outputs = (GOLDEN["listwise"][key] for key in ("inputs", "outputs"))
    batch = groups(inputs["implicit_rewards_best_to_worst"], inputs["psi"], dtype)
    close(losses.get("pl_dpo")(batch, beta=1.0), [outputs["plackett_luce_loss"]])
    close(losses.get("lipo")(batch, beta=1.0), [outputs["lipo_lambda_loss"]])


def test_rrhf(dtype: torch.dtype) -> None:
    inputs, outputs = (GOLDEN["rrhf"][key] for key in ("inputs", "outputs"))
    batch = GroupLogps(
        logps=tensor([inputs["seq_logps"]], dtype),
        lengths=torch.tensor([inputs["lengths"]]),
        scores=tensor([inputs["rewards"]], dtype),
    )
    close(losses.get("rrhf")(batch), [outputs["total_with_token_mean_sft"]])
    close(losses.get("rrhf")(batch, nll_weight=0.0), [outputs["rank_loss"]])


def test_group_advantages(dtype: torch.dtype) -> None:
    outputs = GOLDEN["grpo_group2"]["outputs"]
    rewards = tensor(GOLDEN["grpo_group2"]["inputs"]["rewards"], dtype)

    def advantages(scores: torch.Tensor, std_eps: float, sample_std: bool) -> torch.Tensor:
        return losses.group_advantages(scores, std_eps=std_eps, sample_std=sample_std)

    close(advantages(rewards, 0.0, False), outputs["adv_pop_std_eps0"])
    close(advantages(rewards, 1e-2, False), outputs["adv_halos_pop_std_eps1e-2"])
    close(advantages(rewards, 1e-4, True), outputs["adv_sample_std_eps1e-4"])
    close(advantages(torch.ones(2, dtype=dtype), 0.0, True), outputs["adv_equal_rewards"])


def test_grpo_pair_kl(dtype: torch.dtype) -> None:
    batch = GroupLogps(
        logps=tensor([[0.2, 0.2]], dtype),
        ref_logps=tensor([[0.0, 0.0]], dtype),
        lengths=torch.tensor([[1, 1]]),
        scores=tensor([[1.0, 1.0]], dtype),
    )
    expected = GOLDEN["grpo_group2"]["outputs"]["k3_kl_for_logp_minus_ref_0.2"]
    close(losses.get("grpo_pair")(batch, beta=1.0), [expected])


def test_sppo_win_probabilities(dtype: torch.dtype) -> None:
    outputs = GOLDEN["sppo_win_probabilities"]["outputs"]
    scores = tensor(GOLDEN["sppo_win_probabilities"]["inputs"]["scores"], dtype)
    p = losses.sppo_win_probabilities(scores)
    close(p, outputs["p"])
    assert (int(p.argmax()), int(p.argmin())) == (outputs["chosen"], outputs["rejected"])


def test_fine_grained_rm(dtype: torch.dtype) -> None:
    inputs, outputs = (GOLDEN["fine_rm"][key] for key in ("inputs", "outputs"))
    added, removed = losses.token_diff(inputs["rejected_tokens"], inputs["edited_tokens"])
    assert (added, removed) == (outputs["added_idx"], outputs["removed_idx"])
    edited = packed([inputs["r_edited"]], dtype, True)
    rejected = packed([inputs["r_rejected"]], dtype, True)
    masks = [torch.zeros(len(x.values), dtype=torch.bool) for x in (edited, rejected)]
    masks[0][added], masks[1][removed] = True, True
    result = losses.get("fine_grained_rm")(edited, rejected, *masks)
    close(result, [outputs["loss"]])
    grads = torch.autograd.grad(result.sum(), [edited.values, rejected.values])
    close(grads[0][added], [outputs["grad_r_added"]] * 2)
    close(grads[1][removed], [outputs["grad_r_removed"]])
    assert grads[0].count_nonzero() == 2


def test_token_ppo(dtype: torch.dtype) -> None:
    inputs, outputs = (GOLDEN["fine_ppo"][key] for key in ("inputs", "outputs"))
    names = ("logp_new", "logp_old", "logp_ref", "token_reward", "values")
    new, old, ref, rewards, values = (tensor(inputs[name], dtype) for name in names)
    advantages, returns = losses.token_advantages(old, ref, rewards, values)
    close(advantages, outputs["advantages"])
    close(returns, outputs["returns"])
    new.requires_grad_()
    result = losses.get("token_ppo")(new, old, ref, rewards, values)
    close(result, outputs["loss_token_mean"])
    grad = torch.autograd.grad(4 * result, new)[0]
    close(grad, outputs["grad_logp_new (of the sum)"])


def test_loss_at_initialisation(dtype: torch.dtype) -> None:
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


OTHER_PARTS = {
    # not losses: data selection, model averaging, schedules, acquisition
    *("batch_B4", "logits_example", "kto_mismatch_indices", "best_worst_selection", "sdpo_gamma"),
    *("sdpo_easy_to_hard_order", "dice_alpha_search", "dice_replay_counts", "sapo_ema"),
    *("sapo_splice", "sapo_replay_probs", "active_pref", "morlhf_scalarisation", "tr_dpo_update"),
}


def test_every_case_of_a_loss_is_checked() -> None:
    source = Path(__file__).read_text()
    missing = [case for case in GOLDEN if case not in OTHER_PARTS and f'"{case}"' not in source]
    assert not missing
