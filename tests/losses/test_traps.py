"""Defects found in other libraries, and inputs at the edge."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpref import losses
from fastpref.losses import Packed, PairLogps

SIZE = 6
get = losses.get
ZERO, ONES = torch.zeros(SIZE, dtype=torch.float64), torch.ones(SIZE, dtype=torch.float64)


def change(batch: Any, **fields: Any) -> Any:
    return type(batch)(**{**vars(batch), **fields})


def same(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


"""Defects found in other libraries."""


def test_hinge_and_sft_under_weighting(some: PairLogps) -> None:
    batch = change(
        some,
        chosen=some.chosen.clone().requires_grad_(),
        chosen_log_sum_sq=-ONES,
        rejected_log_sum_sq=-ONES,
    )
    weighting = {"weighting": "wpo"}
    args = {"hinge": weighting, "sft": {**weighting, "nll_reduction": "tokens"}}
    loss = losses.combine(["hinge", "sft"], args=args)(batch)
    assert torch.autograd.grad(loss.sum(), batch.chosen)[0].isfinite().all()


def test_wpo_weight_is_at_most_one(some: PairLogps) -> None:
    certain = change(
        some,
        chosen=-0.01 * ONES,
        rejected=-0.01 * ONES,
        chosen_log_sum_sq=-2 * ONES,
        rejected_log_sum_sq=-ONES,
    )
    same(get("wpo")(certain), get("dpo")(certain))
    assert (get("wpo")(certain, clamp=False) > get("dpo")(certain)).all()


def test_wpo_weights_come_from_the_policy_under_any_divergence(
    some: PairLogps, dpo: torch.Tensor
) -> None:
    batch = change(some, chosen_log_sum_sq=-ONES, rejected_log_sum_sq=-ONES)
    ratio = get("dpo")(batch, f_divergence="js", weighting="wpo") / get("dpo")(
        batch, f_divergence="js"
    )
    same(ratio, get("dpo")(batch, weighting="wpo") / dpo)


@pytest.mark.parametrize("name", ["alpha_dpo", "beta_dpo", "kto_pair", "hpo", "simpo", "mdpo"])
def test_any_loss_of_single_pairs_is_weighted(name: str, some: PairLogps) -> None:
    far = {"corrupted": -3 * ONES, "ref_corrupted": -2 * ONES}
    batch = change(some, chosen_log_sum_sq=-ONES, rejected_log_sum_sq=-2 * ONES, **far)
    batch = change(batch, chosen_lengths=some.chosen_lengths * 3)
    kept = {"kept": [0, 2, 3]} if name == "beta_dpo" else {}
    likely = batch.chosen / batch.chosen_lengths + batch.rejected / batch.rejected_lengths + 3
    weight = likely.clamp(max=0).exp()
    assert 0 < (weight < 1).sum()
    same(get(name)(batch, weighting="wpo", **kept), weight * get(name)(batch, **kept))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "dr_dpo"])
def test_a_loss_of_the_whole_batch_is_not(name: str, some: PairLogps) -> None:
    with pytest.raises(TypeError, match=f"{name} has no hyper-parameter 'weighting'"):
        get(name)(some, weighting="wpo")


def test_robust_goes_below_zero_and_stays_finite() -> None:
    x = torch.tensor([1e4, 50.0, -1e4], requires_grad=True)
    zero = torch.zeros(3)
    batch = PairLogps(chosen=x, rejected=zero, ref_chosen=zero, ref_rejected=zero)
    loss = get("robust")(batch, label_smoothing=0.4)
    assert (loss[:2] < 0).all()
    assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


def test_discopop_far_in_the_negative() -> None:
    x = torch.tensor([-1e4, -2e3, -100.0], requires_grad=True)
    zero = torch.zeros(3)
    batch = PairLogps(chosen=x, rejected=zero, ref_chosen=zero, ref_rejected=zero)
    loss = get("discopop")(batch)
    torch.testing.assert_close(loss, -0.05 * x, rtol=1e-3, atol=0.1)
    assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


def test_forward_kl_far_in_the_negative(some: PairLogps) -> None:
    batch = change(some, chosen=some.chosen - 1e4).map(lambda x: x.float())
    batch = change(batch, rejected=batch.rejected.requires_grad_())
    loss = get("dpo")(batch, f_divergence="forward_kl")
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), batch.rejected)[0].isfinite().all()


def test_label_smoothing_is_never_ignored(some: PairLogps, dpo: torch.Tensor) -> None:
    assert not torch.equal(get("sigmoid")(some, label_smoothing=0.3), dpo)
    for name in ("ipo", "hinge", "sppo_hard"):
        with pytest.raises(TypeError, match="label_smoothing"):
            get(name)(some, label_smoothing=0.3)


def test_token_mean_does_not_depend_on_micro_batches(some: PairLogps) -> None:
    window = {
        "nll_reduction": "tokens",
        "tokens_per_pair": some.chosen_lengths.double().mean(),
    }
    whole = get("sft")(some, nll_reduction="tokens")
    parts = [
        get("sft")(
            PairLogps(chosen=some.chosen[i], chosen_lengths=some.chosen_lengths[i]), **window
        )
        for i in (slice(0, 1), slice(1, SIZE))
    ]
    same(torch.cat(parts), whole)
    same(whole.mean(), -some.chosen.sum() / some.chosen_lengths.sum())


def test_prompt_counts_only_when_asked(some: PairLogps) -> None:
    batch = change(some, prompt=-3 * ONES, prompt_lengths=2 * ONES)
    expected = (3 - some.chosen) / (2 + some.chosen_lengths)
    same(get("sft")(batch, nll_scope="all"), expected)
    same(get("orpo")(batch, nll_scope="all") - get("orpo")(batch), expected - get("sft")(batch))
    gold = (3 - some.third) / (2 + some.third_lengths)
    same(get("tpo")(batch, nll_scope="all") - get("tpo")(batch, nll_weight=0.0), gold)


def test_alphapo_of_an_unlikely_response() -> None:
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
def test_empty_response(name: str, some: PairLogps) -> None:
    chosen = ZERO.clone().requires_grad_()
    lengths = torch.zeros(SIZE, dtype=torch.long)
    batch = change(
        some, chosen=chosen, ref_chosen=ZERO, chosen_lengths=lengths, rejected_lengths=lengths
    )
    loss = get(name)(batch)
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), chosen)[0].isfinite().all()


def test_empty_response_among_tokens() -> None:
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
        assert torch.autograd.grad(loss.sum(), empty.values, retain_graph=True)[0].isfinite().all()


def test_kto_without_mismatched_responses(some: PairLogps) -> None:
    """A batch of one prompt has none: the reference point is 0, not the mean of nothing."""
    none = torch.zeros(0, dtype=torch.float64)
    batch = losses.UnpairedLogps(
        logps=some.chosen,
        ref_logps=some.ref_chosen,
        labels=torch.arange(SIZE) % 2 == 0,
        kl_logps=none,
        ref_kl_logps=none,
    )
    same(get("kto")(batch), get("kto")(batch, kl=0.0))


def test_orpo_of_a_certain_response() -> None:
    for value in (0.0, -1e-12, -1e-6, -0.5, -0.7, -50.0, -1e4):
        x = torch.full((2,), value, requires_grad=True)
        one = torch.ones(2, dtype=torch.long)
        batch = PairLogps(chosen=x, rejected=x - 1, chosen_lengths=one, rejected_lengths=one)
        loss = get("orpo")(batch)
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


def test_ipo_when_policy_equals_reference(some: PairLogps) -> None:
    equal = change(some, ref_chosen=some.chosen, ref_rejected=some.rejected)
    same(get("ipo")(equal), 25 * ONES)


def test_losses_do_not_change_their_inputs(some: PairLogps) -> None:
    before = {k: v.clone() for k, v in vars(some).items() if isinstance(v, torch.Tensor)}
    for name in ("dpo", "hinge", "orpo", "aot", "kto_pair", "mpo", "dr_dpo"):
        get(name)(some)
    assert all(torch.equal(v, getattr(some, k)) for k, v in before.items())
