"""What groups, single responses and tokens must keep, and the signs of the gradients of pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from fastpref import losses
from fastpref.losses import GroupLogps, Packed, PairLogps, UnpairedLogps

SIZE = 6
get = losses.get
ZERO, ONES = torch.zeros(SIZE, dtype=torch.float64), torch.ones(SIZE, dtype=torch.float64)


def random_sums(g: torch.Generator, *shape: int) -> torch.Tensor:
    return -8 * torch.rand(*shape, generator=g, dtype=torch.float64) - 0.1


def change(batch: Any, **fields: Any) -> Any:
    return type(batch)(**{**vars(batch), **fields})


def same(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.fixture
def groups(some: PairLogps) -> GroupLogps:
    """The pairs as groups of two, the first response the better one."""
    return GroupLogps(
        logps=group_of(some.chosen, some.rejected),
        ref_logps=group_of(some.ref_chosen, some.ref_rejected),
        lengths=group_of(some.chosen_lengths, some.rejected_lengths),
        scores=group_of(ONES, ZERO),
    )


def group_of(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return torch.stack([chosen, rejected], -1)


def test_groups_of_two(some: PairLogps, dpo: torch.Tensor, groups: GroupLogps) -> None:
    same(get("pl_dpo")(groups), dpo)
    swapped = groups.map(lambda x: x.flip(-1))
    same(get("pl_dpo")(swapped), dpo)
    same(get("info_nca")(groups, alpha=1e-3), dpo)
    same(get("nca")(groups, alpha=1e-3), get("nca_pair")(some))


@pytest.mark.parametrize("name", ["nca", "info_nca", "pl_dpo", "lipo", "rrhf", "grpo_pair"])
def test_masked_responses_count_for_nothing(name: str, groups: GroupLogps) -> None:
    g = torch.Generator().manual_seed(9)
    padding = {
        field: random_sums(g, SIZE, 2).abs() * 9 for field in ("logps", "ref_logps", "scores")
    }
    padding["lengths"] = torch.full((SIZE, 2), 3)
    mask = torch.tensor([True, True, False, False]).expand(SIZE, 4)
    padded = {f: torch.cat([getattr(groups, f), padding[f]], -1) for f in padding}
    batch = GroupLogps(**padded, mask=mask)
    batch.logps.requires_grad_()
    loss = get(name)(batch)
    grad = torch.autograd.grad(loss.sum(), batch.logps)[0]
    same(loss.detach(), get(name)(groups))
    assert grad[:, 2:].count_nonzero() == 0
    assert grad.isfinite().all()
    nothing = change(batch, mask=torch.zeros_like(mask))
    assert get(name)(nothing).count_nonzero() == 0


def test_grpo_pair_on_policy_gradient(groups: GroupLogps) -> None:
    logps = groups.logps.clone().requires_grad_()
    batch = change(groups, logps=logps, ref_logps=groups.logps)
    loss = get("grpo_pair")(batch, std_eps=0.0, sample_std=False)
    grad = torch.autograd.grad(loss.sum(), logps)[0]
    advantage = torch.tensor([1.0, -1.0], dtype=torch.float64)
    same(grad, -advantage / groups.lengths / 2)


def test_grpo_pair_stops_at_the_clip(groups: GroupLogps) -> None:
    """Ratios beyond 1 +- clip in the direction the advantage pulls have no gradient."""
    for sign in (1, -1):
        for better in (True, False):
            scores = group_of(ONES * better, ONES * (not better))
            logps = (groups.ref_logps + sign * 0.5 * groups.lengths).requires_grad_()
            batch = change(groups, scores=scores, logps=logps)
            grad = torch.autograd.grad(get("grpo_pair")(batch).sum(), logps)[0]
            advantage = 1 if better else -1
            stopped, moving = (0, 1) if advantage == sign else (1, 0)
            assert grad[:, stopped].count_nonzero() == 0
            assert grad[:, moving].count_nonzero() == SIZE


def test_kto_reference_point_and_weights(some: PairLogps) -> None:
    labels = torch.tensor([True, False] * 3)
    batch = UnpairedLogps(logps=some.chosen, ref_logps=some.ref_chosen, labels=labels)
    same(get("kto")(batch, kl=0.0), get("apo_zero_unpaired")(batch))
    mismatched = some.rejected.clone().requires_grad_()
    batch = change(batch, kl_logps=mismatched, ref_kl_logps=some.ref_rejected - 9)
    assert not get("kto")(batch).requires_grad, "the reference point is a constant"
    plain = get("kto")(batch, kl=0.2)
    assert ((plain > 0) & (plain < 1)).all()
    weighted = get("kto")(batch, kl=0.2, desirable_weight=3.0, undesirable_weight=0.5)
    same(weighted, plain * torch.where(labels, 3.0, 0.5).double())
    pair = get("apo_zero")(some)
    sides = [
        get("apo_zero_unpaired")(
            UnpairedLogps(
                logps=getattr(some, s),
                ref_logps=getattr(some, f"ref_{s}"),
                labels=torch.full((SIZE,), good),
            )
        )
        for s, good in (("chosen", True), ("rejected", False))
    ]
    same(sides[0] + sides[1], pair)


def test_bco_density_weights_touch_undesirable_examples_only(some: PairLogps) -> None:
    labels = torch.tensor([True, False] * 3)
    batch = UnpairedLogps(logps=some.chosen, ref_logps=some.ref_chosen, labels=labels)
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


def test_fine_grained_rm_of_whole_responses_is_bradley_terry(some: PairLogps) -> None:
    edited, rejected = some.chosen_tokens, some.rejected_tokens
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
def test_chosen_is_raised_and_rejected_lowered(name: str, random_pairs: Any) -> None:
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
