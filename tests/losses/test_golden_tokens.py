"""The worked examples of tokens, logits and groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import losses
from fastpref.losses import GroupLogps, Packed, PairLogps

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
B4 = GOLDEN["batch_B4"]["outputs"]


def tensor(values: object, dtype: torch.dtype, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


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


def test_packed_sums_are_those_of_the_batch(dtype: torch.dtype, close: Any) -> None:
    batch = b4_tokens(dtype)
    close(batch.chosen_tokens.sum(), B4["lw"])
    close(batch.ref_rejected_tokens.sum(), B4["rl"])


def test_ld_dpo(dtype: torch.dtype, close: Any) -> None:
    outputs = GOLDEN["ld_dpo"]["outputs"]
    result = losses.get("ld_dpo")(b4_tokens(dtype))
    close(result, outputs["losses"])
    sums = {key: torch.tensor(value) for key, value in outputs["weighted_logps"].items()}
    full = torch.tensor(B4["rw"]) - torch.tensor(B4["rl"])
    logit = 0.1 * (sums["chosen_policy"] - sums["rejected_policy"] - full)
    on_policy = losses.get("ld_dpo")(b4_tokens(dtype), on_reference=False)
    assert (on_policy.detach() + torch.nn.functional.logsigmoid(logit)).abs().max() < 1e-6


def test_sampo(dtype: torch.dtype, close: Any) -> None:
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


def test_tdpo(dtype: torch.dtype, close: Any) -> None:
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
def test_wpo(case: str, dtype: torch.dtype, close: Any) -> None:
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


def test_epsilon_dpo(dtype: torch.dtype, close: Any) -> None:
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


def test_nash_md(dtype: torch.dtype, close: Any) -> None:
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


def test_nca_and_info_nca(dtype: torch.dtype, close: Any) -> None:
    inputs, outputs = (GOLDEN["nca_infonca_k4"][key] for key in ("inputs", "outputs"))
    batch = groups(inputs["implicit_rewards"][0], inputs["scores"][0], dtype)
    close(losses.get("nca")(batch, beta=1.0), [outputs["nca"]])
    close(losses.get("info_nca")(batch, beta=1.0), [outputs["infonca"]])


def test_listwise(dtype: torch.dtype, close: Any) -> None:
    inputs, outputs = (GOLDEN["listwise"][key] for key in ("inputs", "outputs"))
    batch = groups(inputs["implicit_rewards_best_to_worst"], inputs["psi"], dtype)
    close(losses.get("pl_dpo")(batch, beta=1.0), [outputs["plackett_luce_loss"]])
    close(losses.get("lipo")(batch, beta=1.0), [outputs["lipo_lambda_loss"]])


def test_rrhf(dtype: torch.dtype, close: Any) -> None:
    inputs, outputs = (GOLDEN["rrhf"][key] for key in ("inputs", "outputs"))
    batch = GroupLogps(
        logps=tensor([inputs["seq_logps"]], dtype),
        lengths=torch.tensor([inputs["lengths"]]),
        scores=tensor([inputs["rewards"]], dtype),
    )
    close(losses.get("rrhf")(batch), [outputs["total_with_token_mean_sft"]])
    close(losses.get("rrhf")(batch, nll_weight=0.0), [outputs["rank_loss"]])


def test_group_advantages(dtype: torch.dtype, close: Any) -> None:
    outputs = GOLDEN["grpo_group2"]["outputs"]
    rewards = tensor(GOLDEN["grpo_group2"]["inputs"]["rewards"], dtype)

    def advantages(scores: torch.Tensor, std_eps: float, sample_std: bool) -> torch.Tensor:
        return losses.group_advantages(scores, std_eps=std_eps, sample_std=sample_std)

    close(advantages(rewards, 0.0, False), outputs["adv_pop_std_eps0"])
    close(advantages(rewards, 1e-2, False), outputs["adv_halos_pop_std_eps1e-2"])
    close(advantages(rewards, 1e-4, True), outputs["adv_sample_std_eps1e-4"])
    close(advantages(torch.ones(2, dtype=dtype), 0.0, True), outputs["adv_equal_rewards"])


def test_grpo_pair_kl(dtype: torch.dtype, close: Any) -> None:
    batch = GroupLogps(
        logps=tensor([[0.2, 0.2]], dtype),
        ref_logps=tensor([[0.0, 0.0]], dtype),
        lengths=torch.tensor([[1, 1]]),
        scores=tensor([[1.0, 1.0]], dtype),
    )
    expected = GOLDEN["grpo_group2"]["outputs"]["k3_kl_for_logp_minus_ref_0.2"]
    close(losses.get("grpo_pair")(batch, beta=1.0), [expected])


def test_sppo_win_probabilities(dtype: torch.dtype, close: Any) -> None:
    outputs = GOLDEN["sppo_win_probabilities"]["outputs"]
    scores = tensor(GOLDEN["sppo_win_probabilities"]["inputs"]["scores"], dtype)
    p = losses.sppo_win_probabilities(scores)
    close(p, outputs["p"])
    assert (int(p.argmax()), int(p.argmin())) == (outputs["chosen"], outputs["rejected"])


def test_fine_grained_rm(dtype: torch.dtype, close: Any) -> None:
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


def test_token_ppo(dtype: torch.dtype, close: Any) -> None:
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
