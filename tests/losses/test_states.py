"""States and sums of losses: ranks add up to one process, a resumed run to an unbroken one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fastpref import losses
from fastpref.losses import Packed, PairLogps, UnpairedLogps
from fastpref.losses.core import registry

SIZE = 12


def random_pairs(seed: int, size: int = SIZE) -> PairLogps:
    g = torch.Generator().manual_seed(seed)

    def sums(scale: float = 6.0, rows: tuple[int, ...] = ()) -> torch.Tensor:
        return -scale * torch.rand(*rows, size, generator=g, dtype=torch.float64) - 0.5

    base = {name: sums() for name in ("chosen", "rejected")}
    base |= {name: sums(9.0) for name in ("ref_chosen", "ref_rejected")}  # mean log-ratios above 0
    lengths = {
        f"{s}_lengths": torch.randint(1, 9, (size,), generator=g) for s in ("chosen", "rejected")
    }
    perturbed = {
        f"{s}_{sign}": base[s] + 0.02 * sums()
        for s in ("chosen", "rejected")
        for sign in ("plus", "minus")
    }
    aux = {f"{s}_aux": sums(1.0, (2,)) for s in ("chosen", "rejected")}
    return PairLogps(**base, **lengths, **perturbed, **aux, values=sums(1.0))


def random_unpaired(seed: int, size: int = SIZE) -> UnpairedLogps:
    pairs = random_pairs(seed, size)
    return UnpairedLogps(
        logps=pairs.chosen,
        ref_logps=pairs.ref_chosen,
        labels=pairs.chosen > pairs.rejected,
        kl_logps=pairs.rejected + 1.0,
        ref_kl_logps=pairs.ref_rejected,
    )


def random_batch(kind: str, seed: int, size: int = SIZE) -> Any:
    return random_pairs(seed, size) if kind == "pair" else random_unpaired(seed, size)


def rows(batch: Any, part: slice) -> Any:
    return batch.map(lambda x: x[..., part])


STATEFUL = [loss for loss in registry.values() if loss.entry.state is not None]
every_state = pytest.mark.parametrize("loss", STATEFUL, ids=lambda loss: loss.entry.name)


def test_every_coupled_loss_has_a_state() -> None:
    assert {loss.entry.name for loss in registry.values() if loss.entry.coupled} <= {
        loss.entry.name for loss in STATEFUL
    }


@every_state
@pytest.mark.parametrize("side", [0, 1])
def test_ranks_add_up(loss: losses.Loss, side: int) -> None:
    """Three ranks with the gathered batch: the values and gradients of one process."""
    name, kind = loss.entry.name, loss.entry.kind
    options = {"delta_mode": "batch_means"} if "delta" in loss.entry.defaults else {}
    options |= {"nll_reduction": "example"} if "nll_reduction" in loss.entry.defaults else {}
    batch = random_batch(kind, 0)
    leaf = ("chosen", "rejected")[side] if kind == "pair" else "logps"

    def with_leaf() -> tuple[Any, torch.Tensor]:
        x = getattr(batch, leaf).clone().requires_grad_()
        return type(batch)(**{**vars(batch), leaf: x}), x

    whole, x = with_leaf()
    alone = loss.entry.coupled and not loss.entry.stochastic
    total = (loss if alone else losses.combine(name, args=options))(whole).sum()
    expected = torch.autograd.grad(total, x)[0]
    parts, grads = [], torch.zeros_like(expected)
    for part in (slice(0, 5), slice(5, 8), slice(8, SIZE)):
        rank = losses.combine(name, args=options)
        mine, x = with_leaf()
        share = rank(rows(mine, part), gathered=rank.state_batch(mine), local=part).sum()
        parts.append(share)
        grads += torch.autograd.grad(share, x)[0]
    torch.testing.assert_close(sum(parts), total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-12)


@every_state
def test_resumed_run_equals_unbroken(loss: losses.Loss) -> None:
    name, kind = loss.entry.name, loss.entry.kind
    for mode in ("batch_means", "elements", "ema") if "delta" in loss.entry.defaults else ("",):
        options = {"delta_mode": mode} if mode else {}
        batches = [random_batch(kind, seed) for seed in range(4)]
        unbroken = losses.combine(name, args=options)
        expected = [unbroken(batch) for batch in batches]
        first = losses.combine(name, args=options)
        for batch in batches[:2]:
            first(batch)
        saved = json.loads(json.dumps(first.state_dict()))
        second = losses.combine(name, args=options)
        second.load_state_dict(saved)
        for batch, wanted in zip(batches[2:], expected[2:], strict=True):
            assert torch.equal(second(batch), wanted)


@every_state
def test_evaluation_leaves_the_state_alone(loss: losses.Loss) -> None:
    combined = losses.combine(loss.entry.name)
    combined(random_batch(loss.entry.kind, 0))
    before = combined.state_dict()
    once = combined(random_batch(loss.entry.kind, 1), update=False)
    assert combined.state_dict() == before
    assert torch.equal(once, combined(random_batch(loss.entry.kind, 1), update=False))


@every_state
def test_state_reads_what_it_says(loss: losses.Loss) -> None:
    state = loss.entry.state()
    batch = random_batch(loss.entry.kind, 0)
    state.kwargs(batch.pick(state.reads))
    assert set(state.state_dict()) <= set(state.keeps)
    assert not any(getattr(batch.pick(state.reads), name).requires_grad for name in state.reads)


@every_state
def test_state_rejects_what_it_does_not_keep(loss: losses.Loss) -> None:
    with pytest.raises(ValueError, match="keeps no 'alpha'"):
        loss.entry.state().load_state_dict({"alpha": 1.0})


def test_first_batch_seeds_the_average_or_zero_does() -> None:
    batch = random_pairs(0)
    gap = batch.margin
    seeded = losses.get("beta_dpo").entry.state().kwargs(batch)
    assert float(seeded["ema_mean"]) == pytest.approx(float(gap.mean()))
    assert float(seeded["ema_std"]) == pytest.approx(float(gap.std()))
    from_zero = losses.get("beta_dpo").entry.state(seed_first=False).kwargs(batch)
    assert float(from_zero["ema_std"]) == pytest.approx(0.1 * float(gap.std()))


@pytest.mark.parametrize("mode", ["batch_means", "elements", "ema", "zero"])
def test_delta_over_batches_of_different_size(mode: str) -> None:
    batches = [random_pairs(seed, size) for seed, size in ((0, 2), (1, 9), (2, 4))]
    rewards = [0.3 * torch.cat(batch.logratios) for batch in batches]
    means = [float(r.mean()) for r in rewards]
    expected = {
        "batch_means": sum(means) / 3,
        "elements": float(torch.cat(rewards).mean()),
        "ema": 0.9 * (0.9 * means[0] + 0.1 * means[1]) + 0.1 * means[2],
        "zero": 0.0,
    }
    state = losses.get("bco_pair").entry.state(beta=0.3, delta_mode=mode, momentum=0.9)
    delta = [state.kwargs(batch)["delta"] for batch in batches][-1]
    assert float(delta) == pytest.approx(expected[mode], rel=1e-12)


def test_no_variation_yet_is_no_z_score() -> None:
    """One pair a batch has no standard deviation; the second must not be divided by 0."""
    for name in ("alpha_dpo", "beta_dpo"):
        combined = losses.combine(name)
        for seed in range(3):
            result = combined(random_pairs(seed, size=1))
            assert result.abs().max() < 20


def test_beta_dpo_draws_alike_on_every_rank_and_anew_each_step() -> None:
    states = [losses.get("beta_dpo").entry.state(seed=5) for _ in range(2)]
    draws = [[state.kwargs(random_pairs(0))["kept"] for _ in range(5)] for state in states]
    for one, other in zip(*draws, strict=True):
        assert torch.equal(one, other)
        assert int((one > 0).sum()) == int(0.8 * SIZE)
        assert one.mean().item() == pytest.approx(1.0)
    assert not all(torch.equal(draws[0][0], draw) for draw in draws[0][1:])


def test_beta_dpo_keeps_likely_gaps() -> None:
    """Draws without replacement follow the Gaussian weights: the first of two kept, exactly."""
    size, gaps = 3, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    zero = torch.zeros(size, dtype=torch.float64)
    batch = PairLogps(chosen=gaps, rejected=zero, ref_chosen=zero, ref_rejected=zero)
    counts = torch.zeros(size)
    generator = torch.Generator().manual_seed(0)
    runs = 4000
    for _ in range(runs):
        result = losses.get("beta_dpo")(
            batch, keep=0.34, ema_mean=0.0, ema_std=1.0, generator=generator
        )
        counts += (result > 0).float()
    weights = torch.exp(-0.5 * gaps**2)
    assert ((counts / runs).double() - weights / weights.sum()).abs().max() < 0.03


def test_sampo_draws_uniformly_without_replacement() -> None:
    """Of a response of 4 tokens against one of 2, every pair of tokens is drawn equally often."""
    powers = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    short = Packed(torch.zeros(2, dtype=torch.float64), torch.tensor([0, 2], dtype=torch.int32))
    batch = PairLogps(
        chosen_tokens=Packed(-powers, bounds),
        ref_chosen_tokens=Packed(0 * powers, bounds),
        rejected_tokens=short,
        ref_rejected_tokens=short,
    )
    generator = torch.Generator().manual_seed(0)
    seen: dict[float, int] = {}
    runs = 1200
    for _ in range(runs):
        loss = losses.get("sampo")(batch, beta=1.0, generator=generator).item()
        seen[round(loss)] = seen.get(round(loss), 0) + 1
    assert sorted(seen) == [11, 101, 110, 1001, 1010, 1100]
    assert all(abs(count - runs / 6) < 60 for count in seen.values())


def test_epsilon_dpo_beta_follows_the_steps() -> None:
    batch = random_pairs(1)
    state = losses.get("epsilon_dpo").entry.state(beta=0.5, epsilon=0.1)
    now, plus, minus = (
        getattr(batch, f"chosen{s}") - getattr(batch, f"rejected{s}")
        for s in ("", "_plus", "_minus")
    )
    up, down = (plus > now) & (now > minus), (minus > now) & (now > plus)
    step = (up.double() - down.double()).mean()
    assert state.kwargs(batch) == {"beta": 0.5}
    assert float(state.kwargs(batch)["beta"]) == pytest.approx(float(0.5 / (1 + 0.1 * step)))


class TestCombine:
    def test_one_loss_is_that_loss(self) -> None:
        batch = random_pairs(0)
        for args in ({"beta": 0.3}, {"dpo": {"beta": 0.3}}):
            combined = losses.combine("dpo", args=args)
            assert torch.equal(combined(batch), losses.get("dpo")(batch, beta=0.3))
        assert combined.names == ["dpo"]
        assert combined.beta == 0.3

    def test_weighted_sum_and_union(self) -> None:
        batch = random_pairs(0)
        combined = losses.combine(
            ["sigmoid", "bco_pair", "sft"],
            [0.8, 0.2, 1.0],
            {"bco_pair": {"delta_mode": "elements"}},
            beta=0.2,
        )
        delta = 0.2 * torch.cat(batch.logratios).mean()
        expected = 0.8 * losses.get("dpo")(batch, beta=0.2)
        expected = expected + 0.2 * losses.get("bco_pair")(batch, beta=0.2, delta=delta)
        expected = expected + losses.get("sft")(batch)
        torch.testing.assert_close(combined(batch), expected, rtol=1e-12, atol=1e-12)
        assert combined.needs == {"ref", "lengths"}
        assert combined.kind == "pair"
        assert combined.coupled
        assert not losses.combine(["sigmoid", "bco_pair", "sft"]).coupled
        assert losses.combine("mpo").coupled
        assert list(combined.states) == ["bco_pair"]
        assert list(combined.terms(batch)) == ["dpo", "bco_pair", "sft"]
        assert combined.beta == 0.2

    def test_needs_of_the_arguments(self) -> None:
        combined = losses.combine("hinge", args={"weighting": "wpo"})
        assert combined.needs == {"ref", "lengths", "log_sum_sq"}

    def test_window_statistics_reach_the_losses_that_take_them(self) -> None:
        batch = random_pairs(0)
        combined = losses.combine(["dpo", "sft"], args={"sft": {"nll_reduction": "tokens"}})
        terms = combined.terms(batch, tokens_per_pair=4.0)
        torch.testing.assert_close(terms["sft"], -batch.chosen / 4.0)

    def test_prompts_count_in_the_window_of_the_losses_that_want_them(self) -> None:
        batch = random_pairs(0)
        ones = torch.ones(SIZE, dtype=torch.float64)
        batch = PairLogps(**{**vars(batch), "prompt": -5 * ones, "prompt_lengths": 3 * ones})
        tokens = {"nll_reduction": "tokens"}
        args = {"sft": tokens, "cpo": {**tokens, "nll_scope": "all"}}
        both = losses.combine(["sft", "cpo"], args=args)
        terms = both.terms(batch, tokens_per_pair=4.0, prompt_tokens_per_pair=3.0)
        torch.testing.assert_close(terms["sft"], -batch.chosen / 4.0)
        likelihood = terms["cpo"] - losses.get("cpo")(batch, nll_weight=0.0)
        torch.testing.assert_close(likelihood, (5 - batch.chosen) / 7.0)

    def test_a_fixed_statistic_wins_over_the_state(self) -> None:
        batch = random_pairs(0)
        fixed = losses.combine("bco_pair", args={"delta": 0.4})
        assert torch.equal(fixed(batch), losses.get("bco_pair")(batch, delta=0.4))
        drifting = losses.combine("epsilon_dpo", args={"beta": 0.5})
        first, second = drifting(batch), drifting(batch)
        assert torch.equal(first, losses.get("epsilon_dpo")(batch, beta=0.5))
        assert not torch.equal(first, second)

    @pytest.mark.parametrize(
        ("names", "options", "error", "message"),
        [
            (["dpo", "kto"], {}, ValueError, "different kinds"),
            (["dpo", "sigmoid"], {}, ValueError, "twice"),
            (["dpo", "sft"], {"weights": [1.0]}, ValueError, "1 loss_weights for 2 losses"),
            (["dpo", "sft"], {"args": {"beta": 0.1}}, ValueError, "got 'beta'"),
            (["dpo", "sft"], {"args": {"stf": {}}}, ValueError, "did you mean 'sft'"),
            (["dpo"], {"args": {"momentun": 0.9}}, TypeError, "no hyper-parameter 'momentun'"),
            (["bco_pair"], {"args": {"delta_mod": "ema"}}, TypeError, "did you mean 'delta_mode'"),
            (["bco_pair"], {"args": {"delta_mode": "emma"}}, ValueError, "did you mean 'ema'"),
            (["dpo"], {"beta": -0.1}, ValueError, "beta must be in"),
            ([], {}, ValueError, "empty"),
            (["token_ppo"], {}, ValueError, "signature of its own"),
        ],
    )
    def test_mistakes(
        self, names: list[str], options: dict, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            losses.combine(names, **options)

    def test_states_of_other_losses_are_refused(self) -> None:
        saved = losses.combine("bco_pair").state_dict()
        with pytest.raises(ValueError, match=r"saved states are of \['bco_pair'\]"):
            losses.combine("dpo").load_state_dict(saved)
