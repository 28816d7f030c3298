"""What must hold between losses: which is a special case of which, signs, limits, known traps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from fastpref import losses
from fastpref.losses import GroupLogps, Packed, PairLogps, UnpairedLogps

SIZE = 6
get = losses.get


def random_sums(g: torch.Generator, *shape: int) -> torch.Tensor:
    return -8 * torch.rand(*shape, generator=g, dtype=torch.float64) - 0.1


def random_packed(g: torch.Generator, lengths: torch.Tensor) -> Packed:
    bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
    return Packed(random_sums(g, int(lengths.sum())), bounds)


def random_pairs(seed: int = 0, **fields: Any) -> PairLogps:
    g = torch.Generator().manual_seed(seed)
    lengths = {
        f"{s}_lengths": torch.randint(1, 9, (SIZE,), generator=g) for s in ("chosen", "rejected")
    }
    numbers: dict[str, Any] = {
        name: random_sums(g, SIZE)
        for name in ("chosen", "rejected", "ref_chosen", "ref_rejected", "third", "ref_third")
    }
    for side in ("chosen", "rejected"):
        numbers[f"{side}_tokens"] = random_packed(g, lengths[f"{side}_lengths"])
        reference = random_packed(g, lengths[f"{side}_lengths"])
        numbers[f"ref_{side}_tokens"] = reference
        numbers[f"{side}"] = numbers[f"{side}_tokens"].sum()
        numbers[f"ref_{side}"] = reference.sum()
        numbers[f"{side}_scores"] = random_sums(g, SIZE) + (20 if side == "chosen" else 0)
        numbers[f"{side}_aux"] = random_sums(g, 2, SIZE)
    return PairLogps(
        **{
            **numbers,
            **lengths,
            "values": random_sums(g, SIZE),
            "third_lengths": torch.full((SIZE,), 3),
            **fields,
        }
    )


def change(batch: Any, **fields: Any) -> Any:
    return type(batch)(**{**vars(batch), **fields})


def same(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


PAIRS = random_pairs()
ZERO, ONES = torch.zeros(SIZE, dtype=torch.float64), torch.ones(SIZE, dtype=torch.float64)
DPO = get("dpo")(PAIRS)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cdpo", {"label_smoothing": 0.0}),
        ("robust", {"label_smoothing": 0.0}),
        ("lr_dpo", {"alpha": 0.0}),
        ("selm", {"alpha": 0.0, "beta": 0.1}),
        ("xpo", {"alpha": 0.0}),
        ("vpo", {"alpha": 0.0}),
        ("mpo", {"quality_weight": 0.0, "generation_weight": 0.0, "preference_weight": 1.0}),
        ("dpop", {"penalty": 0.0, "beta": 0.1}),
        ("dpo_shift", {"shift": 1.0}),
        ("h_dpo", {"alpha": 1.0}),
        ("focal_po", {"gamma": 0.0}),
        ("c2_dpo", {"penalty": 0.0}),
        ("rpo", {"nll_weight": 0.0, "beta": 0.1}),
        ("iterative_rpo", {"nll_weight": 0.0}),
        ("odpo", {"alpha": 0.0}),
        ("ld_dpo", {"alpha": 1.0}),
        ("gpo", {"form": "logistic"}),
        ("dpo", {"f_divergence": "alpha", "f_alpha": 1.0}),
        ("beta_dpo", {"a": 0.0, "keep": 1.0}),
        ("mrpo", {}),
        ("multi_dpo", {}),
    ],
)
def test_special_cases_of_dpo(name: str, arguments: dict) -> None:
    same(get(name)(PAIRS, **arguments), DPO)


def test_lr_dpo_of_equal_lengths_is_dpo() -> None:
    equal = change(PAIRS, rejected_lengths=PAIRS.chosen_lengths)
    same(get("lr_dpo")(equal, alpha=0.7), DPO)


def several(k: int, base: PairLogps = PAIRS) -> PairLogps:
    g = torch.Generator().manual_seed(k)
    rows = {
        name: torch.cat([getattr(base, name)[None], random_sums(g, k - 1, SIZE)])
        for name in ("ref_chosen", "ref_rejected")
    }
    return change(base, **rows)


@pytest.mark.parametrize("name", ["mrpo", "multi_dpo"])
def test_many_references(name: str) -> None:
    equal = change(
        PAIRS, **{s: getattr(PAIRS, s).expand(3, SIZE) for s in ("ref_chosen", "ref_rejected")}
    )
    same(get(name)(equal), DPO)
    same(get(name)(several(3), eps_max=0.0), DPO)
    batch, order = several(4), torch.tensor([0, 3, 1, 2])
    rows = {s: getattr(batch, s)[order] for s in ("ref_chosen", "ref_rejected")}
    same(get(name)(change(batch, **rows)), get(name)(batch))


def virtual_reference(batch: PairLogps, combine: str) -> torch.Tensor:
    """log of the virtual reference of the chosen response: minus the logit, all else being 0."""
    rest = {"chosen": ZERO, "rejected": ZERO, "ref_rejected": torch.zeros_like(batch.ref_chosen)}
    arguments = {"beta": 1.0, "adaptive_eps": False, "weights": "uniform", "combine": combine}
    return torch.expm1(get("mrpo")(change(batch, **rest), **arguments)).log()


def test_virtual_reference_lies_in_the_trust_region() -> None:
    batch = several(3)
    base = PAIRS.ref_chosen
    foreign = torch.cat([base[None], base[None] * 10, base[None] * 0.01])
    batch = change(batch, ref_chosen=foreign)
    harmonic = virtual_reference(batch, "harmonic")
    geometric = virtual_reference(batch, "geometric")
    clipped = foreign.clamp(min=1.1 * base, max=0.9 * base)
    assert (clipped.min(0).values <= harmonic + 1e-9).all()
    assert (harmonic <= geometric + 1e-9).all()
    assert (geometric <= clipped.exp().mean(0).log() + 1e-9).all()
    assert ((harmonic - base).abs() <= 0.1 * base.abs() + 1e-9).all()


def test_reference_weights_when_none_separates() -> None:
    batch = change(several(2), ref_rejected=several(2).ref_chosen)
    uniform = get("mrpo")(batch, weights="uniform")
    same(get("mrpo")(batch), uniform)


def test_released_code_is_for_two_references() -> None:
    with pytest.raises(ValueError, match="defined for 2 references, got 3"):
        get("mrpo")(several(3), arwc_convention="released_code")
    with pytest.raises(ValueError, match="weights has 2 numbers for 3 references"):
        get("mrpo")(several(3), weights=[0.5, 0.5])


def test_modpo() -> None:
    zero = {"chosen_margins": ZERO[None], "rejected_margins": ZERO[None]}
    same(get("modpo")(change(PAIRS, **zero), w=[1.0, 0.0]), DPO)
    lengths = {
        "chosen_margins": -PAIRS.chosen_lengths[None].double(),
        "rejected_margins": -PAIRS.rejected_lengths[None].double(),
    }
    same(get("modpo")(change(PAIRS, **lengths), w=[1.0, 0.3]), get("lr_dpo")(PAIRS, alpha=0.3))
    equal = {"chosen_margins": ONES[None], "rejected_margins": ONES[None]}
    same(get("modpo")(change(PAIRS, **equal), w=[0.5, 0.5]), get("dpo")(PAIRS, beta=0.2))
    hinged = get("modpo")(change(PAIRS, **zero), w=[1.0, 0.0], hinge=True)
    same(hinged, get("hinge")(PAIRS))
    with pytest.raises(ValueError, match="2 weights for 1 rows"):
        get("modpo")(change(PAIRS, **equal), w=[0.4, 0.3, 0.3])
    with pytest.raises(ValueError, match=r"w\[0\] is 0.01"):
        get("modpo")(change(PAIRS, **equal), w=[0.01, 0.99])


def test_spo() -> None:
    other = random_pairs(1)
    prior = {
        f"prior_{s}": torch.stack([getattr(other, s), getattr(PAIRS, f"ref_{s}")])
        for s in ("chosen", "rejected")
    }
    batch = change(PAIRS, **prior)
    same(get("spo")(batch, alpha=[0.0]), DPO)
    same(get("spo")(batch, alpha=0.4), get("spo")(batch, alpha=[0.4]))
    rewards = {
        f"{s}_margins": 0.1 * (prior[f"prior_{s}"][1] - prior[f"prior_{s}"][0])[None]
        for s in ("chosen", "rejected")
    }
    same(get("spo")(batch, alpha=[0.4]), get("modpo")(change(PAIRS, **rewards), w=[1.0, 0.4]))
    alone = {f"prior_{s}": getattr(PAIRS, f"ref_{s}")[None] for s in ("chosen", "rejected")}
    same(get("spo")(change(PAIRS, **alone)), DPO)
    still = {k: v[1:].expand(2, SIZE) for k, v in prior.items()}
    same(get("spo")(change(PAIRS, **still)), DPO)
    with pytest.raises(ValueError, match="alpha has 2 numbers for 1 earlier rounds"):
        get("spo")(batch, alpha=[0.1, 0.2])


def test_hpo_without_auxiliary_term_is_kto() -> None:
    kl = 0.3
    labels = torch.tensor([True] * SIZE + [False] * SIZE)
    unpaired = UnpairedLogps(
        logps=torch.cat([PAIRS.chosen, PAIRS.rejected]),
        ref_logps=torch.cat([PAIRS.ref_chosen, PAIRS.ref_rejected]),
        labels=labels,
    )
    kto = get("kto")(unpaired, kl=kl)
    same(get("hpo")(PAIRS, gamma=0.0, kl=kl), (kto[:SIZE] + kto[SIZE:]) / 2)
    flat = change(PAIRS, chosen_aux=ONES[None], rejected_aux=ONES[None], values=ONES)
    bonus = get("hpo")(flat, gamma=0.1, kl=kl) - get("hpo")(flat, gamma=0.0, kl=kl)
    same(bonus, -0.1 * (PAIRS.chosen + PAIRS.rejected) / 2)
    same(losses.hpo_value_loss(ZERO, PAIRS.values, tau=0.5), PAIRS.values**2 / 2)


def test_mpo_parts() -> None:
    nothing = {"preference_weight": 0.0, "quality_weight": 0.0, "generation_weight": 0.0}
    same(get("mpo")(PAIRS, **{**nothing, "quality_weight": 1.0}), get("bco_pair")(PAIRS))
    sft = get("sft")(PAIRS, nll_reduction="tokens")
    same(get("mpo")(PAIRS, **{**nothing, "generation_weight": 1.0}), sft)


def test_one_sided_relatives_of_dpo() -> None:
    low = change(PAIRS, ref_rejected=PAIRS.rejected - 1, ref_chosen=PAIRS.ref_rejected - 5)
    same(get("minor_dpo")(low), get("dpo")(low))
    high = change(PAIRS, ref_rejected=PAIRS.rejected + 1)
    assert (get("minor_dpo")(high) > get("dpo")(high)).all()
    kind = change(PAIRS, ref_chosen=PAIRS.ref_rejected + 1)
    same(get("hypo")(kind), get("dpo")(kind))


def test_minor_dpo_has_no_gradient_at_the_kink() -> None:
    rejected = ZERO.clone().requires_grad_()
    batch = PairLogps(chosen=ONES, rejected=rejected, ref_chosen=ZERO, ref_rejected=ZERO)
    assert torch.autograd.grad(get("minor_dpo")(batch).sum(), rejected)[0].count_nonzero() == 0


def test_sampo_of_equal_lengths_is_dpo() -> None:
    g = torch.Generator().manual_seed(3)
    tokens = {
        f"{p}{s}_tokens": random_packed(g, torch.full((SIZE,), 4))
        for p in ("", "ref_")
        for s in ("chosen", "rejected")
    }
    sums = {name.removesuffix("_tokens"): value.sum() for name, value in tokens.items()}
    batch = PairLogps(**tokens, **sums)
    same(get("sampo")(batch), get("dpo")(batch))
    same(get("sampo")(batch, expectation=True), get("dpo")(batch))


def test_chi_po_far_below_the_reference_is_dpo() -> None:
    batch = change(PAIRS, chosen=PAIRS.ref_chosen - 60, rejected=PAIRS.ref_rejected - 55)
    same(get("chi_po")(batch), get("dpo")(batch))
    clipped = get("chi_po")(change(PAIRS, chosen=PAIRS.ref_chosen + 9), clip=2.0)
    assert (clipped >= -logsigmoid(torch.tensor(2.0)) - 1e-7).all()


def test_optimum_of_exo_and_cdpo() -> None:
    for name, eps in (("exo_pair", 1e-3), ("cdpo", 0.2)):
        h = torch.tensor([math.log((1 - eps) / eps)], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        batch = PairLogps(chosen=h, rejected=zero, ref_chosen=zero, ref_rejected=zero)
        loss = get(name)(batch, beta=1.0, label_smoothing=eps)
        assert torch.autograd.grad(loss.sum(), h)[0].abs().item() < 1e-12
        if name == "exo_pair":
            assert abs(loss.item()) < 1e-12


def test_robust_is_unbiased_over_flips() -> None:
    eps = 0.15
    flipped = change(
        PAIRS,
        chosen=PAIRS.rejected,
        rejected=PAIRS.chosen,
        ref_chosen=PAIRS.ref_rejected,
        ref_rejected=PAIRS.ref_chosen,
    )
    clean, wrong = (get("robust")(b, label_smoothing=eps) for b in (PAIRS, flipped))
    same((1 - eps) * clean + eps * wrong, DPO)


def test_gpo_forms() -> None:
    same(get("gpo")(PAIRS, form="hinge"), get("hinge")(PAIRS))
    squared = get("gpo")(PAIRS, form="squared", beta=0.4)
    same(squared, 0.4**2 * get("ipo")(PAIRS, beta=0.2, average=False))
    assert get("gpo")(change(PAIRS, chosen=PAIRS.chosen - 1e6), form="exponential").isfinite().all()
    far = change(PAIRS, chosen=PAIRS.chosen - 1e6)
    assert get("gpo")(far, form="exponential", clamp=False).isinf().all()


def test_simpo_relatives() -> None:
    simpo = get("simpo")(PAIRS, beta=2.5, gamma=0.1)
    same(get("alphapo")(PAIRS, alpha=0.0), simpo)
    same(get("alphapo")(PAIRS, alpha=1e-9), simpo, 1e-6)
    arguments = {"beta": 2.5, "gamma_beta_ratio": 0.3}
    simpo = get("simpo")(PAIRS, **arguments)
    same(get("alpha_dpo")(PAIRS, alpha=0.0, **arguments), simpo)
    same(get("cpo_simpo")(PAIRS, nll_weight=0.0, **arguments), simpo)
    same(get("cpo_simpo")(PAIRS, **arguments) - simpo, 0.1 * get("sft")(PAIRS))
    zero = {"ref_chosen": ZERO, "ref_rejected": ZERO}
    same(get("cpo")(PAIRS, nll_weight=0.0), get("dpo")(change(PAIRS, **zero)))
    normalised = {"length_normalized": True, "nll_weight": 0.0, "beta": 2.0, "gamma": 0.7}
    same(get("tpo")(PAIRS, **normalised), get("simpo")(PAIRS, beta=2.0, gamma=0.7))


def test_aot_of_one_pair_and_of_sorted_pairs_is_dpo() -> None:
    for i in range(SIZE):
        one = PAIRS.map(lambda x, i=i: x[..., i : i + 1] if x.shape[-1] == SIZE else x)
        for name in ("aot", "aot_unpaired"):
            same(get(name)(one), DPO[i : i + 1])
    grow = torch.arange(SIZE, dtype=torch.float64)
    ordered = PairLogps(chosen=grow, rejected=ZERO, ref_chosen=grow / 2 - 3, ref_rejected=ZERO)
    same(get("aot")(ordered), get("dpo")(ordered))


def test_reward_aware_limit_is_dpo() -> None:
    same(get("rpo_aware")(PAIRS, eta=1e3), DPO)
    target = change(PAIRS, chosen_scores=0.1 * PAIRS.margin, rejected_scores=ZERO)
    for form in ("bwd_kl", "fwd_kl", "sq"):
        same(get("rpo_aware")(target, form=form), ZERO)


def test_tdpo_without_kl_is_dpo_and_epsilon_without_drift_too() -> None:
    for name in ("tdpo1", "tdpo2"):
        same(get(name)(change(PAIRS, chosen_kl=ZERO, rejected_kl=ZERO)), DPO)
    gap = {"chosen_plus": PAIRS.chosen, "rejected_plus": PAIRS.rejected}
    gap |= {"chosen_minus": PAIRS.chosen, "rejected_minus": PAIRS.rejected}
    same(get("epsilon_dpo")(change(PAIRS, **gap), beta=0.1), DPO)


def test_dr_dpo_of_great_trust_is_dpo() -> None:
    same(get("dr_dpo")(PAIRS, beta_prime=1e6).mean(), DPO.mean(), 1e-6)


def group_of(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return torch.stack([chosen, rejected], -1)


GROUPS = GroupLogps(
    logps=group_of(PAIRS.chosen, PAIRS.rejected),
    ref_logps=group_of(PAIRS.ref_chosen, PAIRS.ref_rejected),
    lengths=group_of(PAIRS.chosen_lengths, PAIRS.rejected_lengths),
    scores=group_of(ONES, ZERO),
)


def test_groups_of_two() -> None:
    same(get("pl_dpo")(GROUPS), DPO)
    swapped = GROUPS.map(lambda x: x.flip(-1))
    same(get("pl_dpo")(swapped), DPO)
    same(get("info_nca")(GROUPS, alpha=1e-3), DPO)
    same(get("nca")(GROUPS, alpha=1e-3), get("nca_pair")(PAIRS))


@pytest.mark.parametrize("name", ["nca", "info_nca", "pl_dpo", "lipo", "rrhf", "grpo_pair"])
def test_masked_responses_count_for_nothing(name: str) -> None:
    g = torch.Generator().manual_seed(9)
    padding = {
        field: random_sums(g, SIZE, 2).abs() * 9 for field in ("logps", "ref_logps", "scores")
    }
    padding["lengths"] = torch.full((SIZE, 2), 3)
    mask = torch.tensor([True, True, False, False]).expand(SIZE, 4)
    padded = {f: torch.cat([getattr(GROUPS, f), padding[f]], -1) for f in padding}
    batch = GroupLogps(**padded, mask=mask)
    batch.logps.requires_grad_()
    loss = get(name)(batch)
    grad = torch.autograd.grad(loss.sum(), batch.logps)[0]
    same(loss.detach(), get(name)(GROUPS))
    assert grad[:, 2:].count_nonzero() == 0
    assert grad.isfinite().all()


def test_grpo_pair_on_policy_gradient() -> None:
    logps = GROUPS.logps.clone().requires_grad_()
    batch = change(GROUPS, logps=logps, ref_logps=GROUPS.logps)
    loss = get("grpo_pair")(batch, std_eps=0.0, sample_std=False)
    grad = torch.autograd.grad(loss.sum(), logps)[0]
    advantage = torch.tensor([1.0, -1.0], dtype=torch.float64)
    same(grad, -advantage / GROUPS.lengths / 2)


def test_kto_reference_point_and_weights() -> None:
    labels = torch.tensor([True, False] * 3)
    batch = UnpairedLogps(logps=PAIRS.chosen, ref_logps=PAIRS.ref_chosen, labels=labels)
    same(get("kto")(batch, kl=0.0), get("apo_zero_unpaired")(batch))
    plain = get("kto")(batch, kl=0.2)
    assert ((plain > 0) & (plain < 1)).all()
    weighted = get("kto")(batch, kl=0.2, desirable_weight=3.0, undesirable_weight=0.5)
    same(weighted, plain * torch.where(labels, 3.0, 0.5).double())
    pair = get("apo_zero")(PAIRS)
    sides = [
        get("apo_zero_unpaired")(
            UnpairedLogps(
                logps=getattr(PAIRS, s),
                ref_logps=getattr(PAIRS, f"ref_{s}"),
                labels=labels == labels if good else labels != labels,
            )
        )
        for s, good in (("chosen", True), ("rejected", False))
    ]
    same(sides[0] + sides[1], pair)


def test_bco_density_weights_touch_undesirable_examples_only() -> None:
    labels = torch.tensor([True, False] * 3)
    batch = UnpairedLogps(logps=PAIRS.chosen, ref_logps=PAIRS.ref_chosen, labels=labels)
    ratio = torch.tensor([9.0, 0.1, 9.0, 2.0, 9.0, 50.0], dtype=torch.float64)
    weighted = get("bco")(batch, density_weights=ratio) / get("bco")(batch)
    same(weighted, torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0, 10.0], dtype=torch.float64))


def test_token_level() -> None:
    assert losses.token_diff("abc", "abc") == ([], [])
    assert losses.token_diff("abc", "xyz") == ([0, 1, 2], [0, 1, 2])
    assert losses.token_diff("", "ab") == ([0, 1], [])
    added, removed = losses.token_diff("kitten", "sitting")
    assert (len(added), len(removed)) == (3, 2)
    g = torch.Generator().manual_seed(0)
    logps, reward, values = (random_sums(g, 3, 5) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    loss = get("token_ppo")(logps, logps, logps, reward, values, mask=mask)
    advantages, returns = losses.token_advantages(logps, logps, reward, values, mask=mask)
    same(loss, -(advantages * mask).sum(-1) / mask.sum(-1))
    alone = losses.token_advantages(logps[0, :3], logps[0, :3], reward[0, :3], values[0, :3])
    same(advantages[0, :3], alone[0])
    assert advantages[0, 3:].count_nonzero() == 0
    same(losses.token_value_loss(values, returns), (values - returns) ** 2 / 2)


def test_fine_grained_rm_of_whole_responses_is_bradley_terry() -> None:
    edited, rejected = PAIRS.chosen_tokens, PAIRS.rejected_tokens
    everything = [torch.ones_like(x.values, dtype=torch.bool) for x in (edited, rejected)]
    loss = get("fine_grained_rm")(edited, rejected, *everything)
    same(loss, -logsigmoid(edited.sum() - rejected.sum()))
    nothing = [torch.zeros_like(mask) for mask in everything]
    same(get("fine_grained_rm")(edited, rejected, *nothing), ZERO)


SIGNS_MAY_TURN = {
    # past a target, or by design
    *("ipo", "sppo_hard", "sppo", "cal_dpo", "rpo_aware", "rebel", "apo_down", "exo_pair", "cdpo"),
    *("nca_pair", "discopop", "spo_silu", "gpo", "c2_dpo", "hpo", "modpo", "spo", "nash_md"),
}


@pytest.mark.parametrize(
    "name", [x for x in losses.names("pair") if x not in SIGNS_MAY_TURN and x != "epsilon_dpo"]
)
def test_chosen_is_raised_and_rejected_lowered(name: str) -> None:
    for seed in range(5):
        batch = random_pairs(
            seed,
            chosen_kl=ZERO,
            rejected_kl=ZERO,
            corrupted=ZERO,
            ref_corrupted=ZERO,
            chosen_log_sum_sq=-ONES,
            rejected_log_sum_sq=-ONES,
            third_lengths=ONES,
        )
        leaves = {s: getattr(batch, s).clone().requires_grad_() for s in ("chosen", "rejected")}
        tokens = {
            f"{s}_tokens": Packed(
                getattr(batch, f"{s}_tokens").values.clone().requires_grad_(),
                getattr(batch, f"{s}_tokens").cu_seqlens,
            )
            for s in ("chosen", "rejected")
        }
        loss = get(name)(change(batch, **leaves, **tokens)).sum()
        for side, sign in (("chosen", 1), ("rejected", -1)):
            inputs = [leaves[side], tokens[f"{side}_tokens"].values]
            grads = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
            for grad in grads:
                assert grad is None or (sign * grad <= 1e-12).all(), (name, side)


class TestTraps:
    """Defects found in other libraries."""

    def test_hinge_and_sft_under_weighting(self) -> None:
        batch = change(
            PAIRS,
            chosen=PAIRS.chosen.clone().requires_grad_(),
            chosen_log_sum_sq=-ONES,
            rejected_log_sum_sq=-ONES,
        )
        weighting = {"weighting": "wpo"}
        args = {"hinge": weighting, "sft": {**weighting, "nll_reduction": "tokens"}}
        loss = losses.combine(["hinge", "sft"], args=args)(batch)
        assert torch.autograd.grad(loss.sum(), batch.chosen)[0].isfinite().all()

    def test_wpo_weight_is_at_most_one(self) -> None:
        certain = change(
            PAIRS,
            chosen=-0.01 * ONES,
            rejected=-0.01 * ONES,
            chosen_log_sum_sq=-2 * ONES,
            rejected_log_sum_sq=-ONES,
        )
        same(get("wpo")(certain), get("dpo")(certain))
        assert (get("wpo")(certain, clamp=False) > get("dpo")(certain)).all()

    def test_wpo_weights_come_from_the_policy_under_any_divergence(self) -> None:
        batch = change(PAIRS, chosen_log_sum_sq=-ONES, rejected_log_sum_sq=-ONES)
        ratio = get("dpo")(batch, f_divergence="js", weighting="wpo") / get("dpo")(
            batch, f_divergence="js"
        )
        same(ratio, get("dpo")(batch, weighting="wpo") / DPO)

    def test_discopop_far_in_the_negative(self) -> None:
        x = torch.tensor([-1e4, -2e3, -100.0], requires_grad=True)
        zero = torch.zeros(3)
        batch = PairLogps(chosen=x, rejected=zero, ref_chosen=zero, ref_rejected=zero)
        loss = get("discopop")(batch)
        torch.testing.assert_close(loss, -0.05 * x, rtol=1e-3, atol=0.1)
        assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()

    def test_forward_kl_far_in_the_negative(self) -> None:
        batch = change(PAIRS, chosen=PAIRS.chosen - 1e4).map(lambda x: x.float())
        batch = change(batch, rejected=batch.rejected.requires_grad_())
        loss = get("dpo")(batch, f_divergence="forward_kl")
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), batch.rejected)[0].isfinite().all()

    def test_label_smoothing_is_never_ignored(self) -> None:
        assert not torch.equal(get("sigmoid")(PAIRS, label_smoothing=0.3), DPO)
        for name in ("ipo", "hinge", "sppo_hard"):
            with pytest.raises(TypeError, match="label_smoothing"):
                get(name)(PAIRS, label_smoothing=0.3)

    def test_token_mean_does_not_depend_on_micro_batches(self) -> None:
        window = {
            "nll_reduction": "tokens",
            "tokens_per_pair": PAIRS.chosen_lengths.double().mean(),
        }
        whole = get("sft")(PAIRS, nll_reduction="tokens")
        parts = [
            get("sft")(
                PairLogps(chosen=PAIRS.chosen[i], chosen_lengths=PAIRS.chosen_lengths[i]), **window
            )
            for i in (slice(0, 1), slice(1, SIZE))
        ]
        same(torch.cat(parts), whole)
        same(whole.mean(), -PAIRS.chosen.sum() / PAIRS.chosen_lengths.sum())

    def test_prompt_counts_only_when_asked(self) -> None:
        batch = change(PAIRS, prompt=-3 * ONES, prompt_lengths=2 * ONES)
        expected = (3 - PAIRS.chosen) / (2 + PAIRS.chosen_lengths)
        same(get("sft")(batch, nll_scope="all"), expected)
        same(get("orpo")(batch, nll_scope="all") - get("orpo")(batch), expected - get("sft")(batch))

    def test_alphapo_of_an_unlikely_response(self) -> None:
        for alpha in (0.25, 2.0, -2.0):
            x = torch.tensor([-2000.0, -1e4], requires_grad=True)
            lengths = torch.ones(2, dtype=torch.long)
            batch = PairLogps(
                chosen=x, rejected=x / 2, chosen_lengths=lengths, rejected_lengths=lengths
            )
            loss = get("alphapo")(batch, alpha=alpha)
            assert loss.isfinite().all()
            assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()

    @pytest.mark.parametrize(
        "name",
        [
            "simpo",
            "cpo",
            "orpo",
            "alphapo",
            "simper",
            "sft",
            "ipo",
            "sigmoid_norm",
            "alpha_dpo",
            "mpo",
            "lr_dpo",
        ],
    )
    def test_empty_response(self, name: str) -> None:
        chosen = ZERO.clone().requires_grad_()
        lengths = torch.zeros(SIZE, dtype=torch.long)
        batch = change(
            PAIRS, chosen=chosen, ref_chosen=ZERO, chosen_lengths=lengths, rejected_lengths=lengths
        )
        loss = get(name)(batch)
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), chosen)[0].isfinite().all()

    def test_empty_response_among_tokens(self) -> None:
        bounds = torch.tensor([0, 0, 2], dtype=torch.int32)
        empty = Packed(torch.tensor([-1.0, -2.0], requires_grad=True), bounds)
        batch = PairLogps(
            chosen_tokens=empty,
            rejected_tokens=empty,
            ref_chosen_tokens=empty,
            ref_rejected_tokens=empty,
        )
        assert empty.sum().tolist() == [0.0, -3.0]
        for name, arguments in (("ld_dpo", {}), ("sampo", {}), ("sampo", {"expectation": True})):
            loss = get(name)(batch, **arguments)
            assert (
                torch.autograd.grad(loss.sum(), empty.values, retain_graph=True)[0].isfinite().all()
            )

    def test_orpo_of_a_certain_response(self) -> None:
        for value in (0.0, -1e-12, -1e-6, -0.5, -0.7, -50.0, -1e4):
            x = torch.full((2,), value, requires_grad=True)
            one = torch.ones(2, dtype=torch.long)
            batch = PairLogps(chosen=x, rejected=x - 1, chosen_lengths=one, rejected_lengths=one)
            loss = get("orpo")(batch)
            assert loss.isfinite().all()
            assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()

    def test_ipo_when_policy_equals_reference(self) -> None:
        equal = change(PAIRS, ref_chosen=PAIRS.chosen, ref_rejected=PAIRS.rejected)
        same(get("ipo")(equal), 25 * ONES)

    def test_losses_do_not_change_their_inputs(self) -> None:
        before = {k: v.clone() for k, v in vars(PAIRS).items() if isinstance(v, torch.Tensor)}
        for name in ("dpo", "hinge", "orpo", "aot", "kto_pair", "mpo", "dr_dpo"):
            get(name)(PAIRS)
        assert all(torch.equal(v, getattr(PAIRS, k)) for k, v in before.items())
