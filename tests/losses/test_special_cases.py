"""Which loss of pairs is a special case of which, and where its optimum lies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from fastpref import losses
from fastpref.losses import Packed, PairLogps, UnpairedLogps

SIZE = 6
get = losses.get
ZERO, ONES = torch.zeros(SIZE, dtype=torch.float64), torch.ones(SIZE, dtype=torch.float64)


def random_sums(g: torch.Generator, *shape: int) -> torch.Tensor:
    return -8 * torch.rand(*shape, generator=g, dtype=torch.float64) - 0.1


def change(batch: Any, **fields: Any) -> Any:
    return type(batch)(**{**vars(batch), **fields})


def same(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


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
def test_special_cases_of_dpo(
    name: str, arguments: dict, some: PairLogps, dpo: torch.Tensor
) -> None:
    same(get(name)(some, **arguments), dpo)


def test_lr_dpo_of_equal_lengths_is_dpo(some: PairLogps, dpo: torch.Tensor) -> None:
    equal = change(some, rejected_lengths=some.chosen_lengths)
    same(get("lr_dpo")(equal, alpha=0.7), dpo)


def several(k: int, base: PairLogps) -> PairLogps:
    g = torch.Generator().manual_seed(k)
    rows = {
        name: torch.cat([getattr(base, name)[None], random_sums(g, k - 1, SIZE)])
        for name in ("ref_chosen", "ref_rejected")
    }
    return change(base, **rows)


@pytest.mark.parametrize("name", ["mrpo", "multi_dpo"])
def test_many_references(name: str, some: PairLogps, dpo: torch.Tensor) -> None:
    equal = change(
        some, **{s: getattr(some, s).expand(3, SIZE) for s in ("ref_chosen", "ref_rejected")}
    )
    same(get(name)(equal), dpo)
    same(get(name)(several(3, some), eps_max=0.0), dpo)
    batch, order = several(4, some), torch.tensor([0, 3, 1, 2])
    rows = {s: getattr(batch, s)[order] for s in ("ref_chosen", "ref_rejected")}
    same(get(name)(change(batch, **rows)), get(name)(batch))


def virtual_reference(batch: PairLogps, combine: str) -> torch.Tensor:
    """log of the virtual reference of the chosen response: minus the logit, all else being 0."""
    rest = {"chosen": ZERO, "rejected": ZERO, "ref_rejected": torch.zeros_like(batch.ref_chosen)}
    arguments = {"beta": 1.0, "adaptive_eps": False, "weights": "uniform", "combine": combine}
    return torch.expm1(get("mrpo")(change(batch, **rest), **arguments)).log()


def test_virtual_reference_lies_in_the_trust_region(some: PairLogps) -> None:
    batch = several(3, some)
    base = some.ref_chosen
    foreign = torch.cat([base[None], base[None] * 10, base[None] * 0.01])
    batch = change(batch, ref_chosen=foreign)
    harmonic = virtual_reference(batch, "harmonic")
    geometric = virtual_reference(batch, "geometric")
    clipped = foreign.clamp(min=1.1 * base, max=0.9 * base)
    assert (clipped.min(0).values <= harmonic + 1e-9).all()
    assert (harmonic <= geometric + 1e-9).all()
    assert (geometric <= clipped.exp().mean(0).log() + 1e-9).all()
    assert ((harmonic - base).abs() <= 0.1 * base.abs() + 1e-9).all()


def test_reference_weights_when_none_separates(some: PairLogps) -> None:
    batch = change(several(2, some), ref_rejected=several(2, some).ref_chosen)
    uniform = get("mrpo")(batch, weights="uniform")
    same(get("mrpo")(batch), uniform)


def test_released_code_is_for_two_references(some: PairLogps) -> None:
    with pytest.raises(ValueError, match="defined for 2 references, got 3"):
        get("mrpo")(several(3, some), arwc_convention="released_code")
    with pytest.raises(ValueError, match="weights has 2 numbers for 3 references"):
        get("mrpo")(several(3, some), weights=[0.5, 0.5])


def test_modpo(some: PairLogps, dpo: torch.Tensor) -> None:
    zero = {"chosen_margins": ZERO[None], "rejected_margins": ZERO[None]}
    same(get("modpo")(change(some, **zero), w=[1.0, 0.0]), dpo)
    lengths = {
        "chosen_margins": -some.chosen_lengths[None].double(),
        "rejected_margins": -some.rejected_lengths[None].double(),
    }
    same(get("modpo")(change(some, **lengths), w=[1.0, 0.3]), get("lr_dpo")(some, alpha=0.3))
    equal = {"chosen_margins": ONES[None], "rejected_margins": ONES[None]}
    same(get("modpo")(change(some, **equal), w=[0.5, 0.5]), get("dpo")(some, beta=0.2))
    hinged = get("modpo")(change(some, **zero), w=[1.0, 0.0], hinge=True)
    same(hinged, get("hinge")(some))
    with pytest.raises(ValueError, match="2 weights for 1 rows"):
        get("modpo")(change(some, **equal), w=[0.4, 0.3, 0.3])
    with pytest.raises(ValueError, match=r"w\[0\] is 0.01"):
        get("modpo")(change(some, **equal), w=[0.01, 0.99])


def test_spo(some: PairLogps, dpo: torch.Tensor, random_pairs: Any) -> None:
    other = random_pairs(1)
    prior = {
        f"prior_{s}": torch.stack([getattr(other, s), getattr(some, f"ref_{s}")])
        for s in ("chosen", "rejected")
    }
    batch = change(some, **prior)
    same(get("spo")(batch, alpha=[0.0]), dpo)
    same(get("spo")(batch, alpha=0.4), get("spo")(batch, alpha=[0.4]))
    rewards = {
        f"{s}_margins": 0.1 * (prior[f"prior_{s}"][1] - prior[f"prior_{s}"][0])[None]
        for s in ("chosen", "rejected")
    }
    same(get("spo")(batch, alpha=[0.4]), get("modpo")(change(some, **rewards), w=[1.0, 0.4]))
    alone = {f"prior_{s}": getattr(some, f"ref_{s}")[None] for s in ("chosen", "rejected")}
    same(get("spo")(change(some, **alone)), dpo)
    still = {k: v[1:].expand(2, SIZE) for k, v in prior.items()}
    same(get("spo")(change(some, **still)), dpo)
    with pytest.raises(ValueError, match="alpha has 2 numbers for 1 earlier rounds"):
        get("spo")(batch, alpha=[0.1, 0.2])
    with pytest.raises(ValueError, match="prior_coefs belong to the two-coefficient form"):
        get("spo")(batch, prior_coefs=[0.1])


def test_hpo_without_auxiliary_term_is_kto(some: PairLogps) -> None:
    kl = 0.3
    labels = torch.tensor([True] * SIZE + [False] * SIZE)
    unpaired = UnpairedLogps(
        logps=torch.cat([some.chosen, some.rejected]),
        ref_logps=torch.cat([some.ref_chosen, some.ref_rejected]),
        labels=labels,
    )
    kto = get("kto")(unpaired, kl=kl)
    same(get("hpo")(some, gamma=0.0, kl=kl), (kto[:SIZE] + kto[SIZE:]) / 2)
    flat = change(some, chosen_aux=ONES[None], rejected_aux=ONES[None], values=ONES)
    bonus = get("hpo")(flat, gamma=0.1, kl=kl) - get("hpo")(flat, gamma=0.0, kl=kl)
    same(bonus, -0.1 * (some.chosen + some.rejected) / 2)
    same(losses.hpo_value_loss(ZERO, some.values, tau=0.5), some.values**2 / 2)


def test_mpo_parts(some: PairLogps) -> None:
    nothing = {"preference_weight": 0.0, "quality_weight": 0.0, "generation_weight": 0.0}
    same(get("mpo")(some, **{**nothing, "quality_weight": 1.0}), get("bco_pair")(some))
    sft = get("sft")(some, nll_reduction="tokens")
    same(get("mpo")(some, **{**nothing, "generation_weight": 1.0}), sft)


def test_one_sided_relatives_of_dpo(some: PairLogps) -> None:
    low = change(some, ref_rejected=some.rejected - 1, ref_chosen=some.ref_rejected - 5)
    same(get("minor_dpo")(low), get("dpo")(low))
    high = change(some, ref_rejected=some.rejected + 1)
    assert (get("minor_dpo")(high) > get("dpo")(high)).all()
    kind = change(some, ref_chosen=some.ref_rejected + 1)
    same(get("hypo")(kind), get("dpo")(kind))


def test_minor_dpo_has_no_gradient_at_the_kink() -> None:
    rejected = ZERO.clone().requires_grad_()
    batch = PairLogps(chosen=ONES, rejected=rejected, ref_chosen=ZERO, ref_rejected=ZERO)
    assert torch.autograd.grad(get("minor_dpo")(batch).sum(), rejected)[0].count_nonzero() == 0


def test_sampo_of_equal_lengths_is_dpo() -> None:
    g = torch.Generator().manual_seed(3)
    bounds = 4 * torch.arange(SIZE + 1, dtype=torch.int32)
    tokens = {
        f"{p}{s}_tokens": Packed(random_sums(g, 4 * SIZE), bounds)
        for p in ("", "ref_")
        for s in ("chosen", "rejected")
    }
    sums = {name.removesuffix("_tokens"): value.sum() for name, value in tokens.items()}
    batch = PairLogps(**tokens, **sums)
    same(get("sampo")(batch), get("dpo")(batch))
    same(get("sampo")(batch, expectation=True), get("dpo")(batch))


def test_ld_dpo_by_hand(some: PairLogps) -> None:
    """In float64 to its last digits, for an alpha that fp32 cannot hold."""
    alpha, margins = 0.3, []
    for i in range(SIZE):
        ratios = []
        for side in ("chosen", "rejected"):
            policy, ref = getattr(some, f"{side}_tokens"), getattr(some, f"ref_{side}_tokens")
            ratios.append((policy.values - ref.values)[slice(*policy.cu_seqlens[i : i + 2])])
        shared = min(map(len, ratios))
        chosen, rejected = (x[:shared].sum() + alpha * x[shared:].sum() for x in ratios)
        margins.append(chosen - rejected)
    same(get("ld_dpo")(some, alpha=alpha), -logsigmoid(0.1 * torch.stack(margins)), 1e-14)


def test_chi_po_far_below_the_reference_is_dpo(some: PairLogps) -> None:
    batch = change(some, chosen=some.ref_chosen - 60, rejected=some.ref_rejected - 55)
    same(get("chi_po")(batch), get("dpo")(batch))
    clipped = get("chi_po")(change(some, chosen=some.ref_chosen + 9), clip=2.0)
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


def test_robust_is_unbiased_over_flips(some: PairLogps, dpo: torch.Tensor) -> None:
    eps = 0.15
    flipped = change(
        some,
        chosen=some.rejected,
        rejected=some.chosen,
        ref_chosen=some.ref_rejected,
        ref_rejected=some.ref_chosen,
    )
    clean, wrong = (get("robust")(b, label_smoothing=eps) for b in (some, flipped))
    same((1 - eps) * clean + eps * wrong, dpo)


def test_gpo_forms(some: PairLogps) -> None:
    same(get("gpo")(some, form="hinge"), get("hinge")(some))
    squared = get("gpo")(some, form="squared", beta=0.4)
    same(squared, 0.4**2 * get("ipo")(some, beta=0.2, average=False))
    assert get("gpo")(change(some, chosen=some.chosen - 1e6), form="exponential").isfinite().all()
    far = change(some, chosen=some.chosen - 1e6)
    assert get("gpo")(far, form="exponential", clamp=False).isinf().all()


def test_simpo_relatives(some: PairLogps) -> None:
    simpo = get("simpo")(some, beta=2.5, gamma=0.1)
    same(get("alphapo")(some, alpha=0.0), simpo)
    same(get("alphapo")(some, alpha=1e-9), simpo, 1e-6)
    arguments = {"beta": 2.5, "gamma_beta_ratio": 0.3}
    simpo = get("simpo")(some, **arguments)
    same(get("alpha_dpo")(some, alpha=0.0, **arguments), simpo)
    same(get("cpo_simpo")(some, nll_weight=0.0, **arguments), simpo)
    same(get("cpo_simpo")(some, **arguments) - simpo, 0.1 * get("sft")(some))
    zero = {"ref_chosen": ZERO, "ref_rejected": ZERO}
    same(get("cpo")(some, nll_weight=0.0), get("dpo")(change(some, **zero)))
    normalised = {"length_normalized": True, "nll_weight": 0.0, "beta": 2.0, "gamma": 0.7}
    same(get("tpo")(some, **normalised), get("simpo")(some, beta=2.0, gamma=0.7))


def test_aot_of_one_pair_and_of_sorted_pairs_is_dpo(some: PairLogps, dpo: torch.Tensor) -> None:
    for i in range(SIZE):
        one = some.map(lambda x, i=i: x[..., i : i + 1] if x.shape[-1] == SIZE else x)
        for name in ("aot", "aot_unpaired"):
            same(get(name)(one), dpo[i : i + 1])
    grow = torch.arange(SIZE, dtype=torch.float64)
    ordered = PairLogps(chosen=grow, rejected=ZERO, ref_chosen=grow / 2 - 3, ref_rejected=ZERO)
    same(get("aot")(ordered), get("dpo")(ordered))


def test_reward_aware_limit_is_dpo(some: PairLogps, dpo: torch.Tensor) -> None:
    same(get("rpo_aware")(some, eta=1e3), dpo)
    target = change(some, chosen_scores=0.1 * some.margin, rejected_scores=ZERO)
    for form in ("bwd_kl", "fwd_kl", "sq"):
        same(get("rpo_aware")(target, form=form), ZERO)


def test_tdpo_without_kl_is_dpo_and_epsilon_without_drift_too(
    some: PairLogps, dpo: torch.Tensor
) -> None:
    for name in ("tdpo1", "tdpo2"):
        same(get(name)(change(some, chosen_kl=ZERO, rejected_kl=ZERO)), dpo)
    gap = {"chosen_plus": some.chosen, "rejected_plus": some.rejected}
    gap |= {"chosen_minus": some.chosen, "rejected_minus": some.rejected}
    same(get("epsilon_dpo")(change(some, **gap), beta=0.1), dpo)


def test_dr_dpo_of_great_trust_is_dpo(some: PairLogps, dpo: torch.Tensor) -> None:
    same(get("dr_dpo")(some, beta_prime=1e6).mean(), dpo.mean(), 1e-6)
