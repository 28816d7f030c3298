"""Experiments on recipes of several steps: what METHODS expects of them at toy scale."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from claims import Numbers, average, exceeds, experiment, smallest_step
from torch import Tensor
from world import (
    END,
    PAD,
    Gold,
    Pairs,
    Policy,
    World,
    accuracy,
    entropies,
    frozen_sums,
    likelihoods,
    reference_cache,
    sample,
    tune,
)

from fastpref.losses import PairLogps
from fastpref.rounds.acquire import keep, uncertainty
from fastpref.rounds.pairs import best_worst, length_debias
from fastpref.rounds.replay import replay_mix


@experiment(
    grows=("alpha 0: responses grow", exceeds("length 3, alpha 0.0", "length 0")),
    stays=("alpha 0.5: responses do not grow", exceeds("length 0", "length 3, alpha 0.5")),
    plain=("alpha 0: the reward without length rises", exceeds("reward 3, alpha 0.0", "reward 0")),
    priced=("alpha 0.5: it rises, too", exceeds("reward 3, alpha 0.5", "reward 0")),
)
def ilr_dpo(seed: int) -> Numbers:
    """Three rounds with a reward model that likes length: 8 samples, best and worst, train."""
    found: Numbers = {}
    for alpha in (0.0, 0.5):
        w = World(seed)
        biased = Gold(w.gold.weights, bonus=0.3)
        policy = w.start
        found |= {"length 0": w.length(policy), "reward 0": w.reward(policy)}
        for number in (1, 2, 3):
            prompts = w.prompts(192)
            samples = sample(policy, prompts, 8, w.draw)
            pairs = _best_worst(prompts, samples, biased(samples))
            policy = tune(policy, pairs, "lr_dpo", steps=60, alpha=alpha)
            found[f"length {number}, alpha {alpha}"] = w.length(policy)
            found[f"reward {number}, alpha {alpha}"] = w.reward(policy)
    return found


@experiment(
    gamma=("gamma_ref rises from step 1 to step 2", exceeds("gamma step 2", "gamma step 1")),
    accuracy=("sDPO's held-out accuracy is not below DPO's", exceeds("sdpo", "dpo")),
)
def sdpo(seed: int) -> Numbers:
    """Two steps of half of the data each, against DPO on all of it."""
    w = World(seed)
    first, second, probe = (w.pairs(384, w.gold, noise) for noise in (True, True, False))
    middle = tune(w.start, first, "dpo")
    last = tune(middle, second, "dpo")
    plain = tune(w.start, first.and_also(second), "dpo", steps=240)
    cache = reference_cache(w.start, probe)
    return {
        "gamma step 1": _gamma(w.start, probe),
        "gamma step 2": _gamma(middle, probe),
        "sdpo": accuracy(last, probe, cache),
        "dpo": accuracy(plain, probe, cache),
    }


@experiment(
    gap=("the penalty closes the gap", lambda n: abs(n["gap, 0"]) - abs(n["gap, best"])),
    zero=("to less than a tenth of a letter", lambda n: 0.1 - abs(n["gap, best"])),
    reward=("round 1's gold reward is above base DPO's", exceeds("reward 1", "reward base")),
)
def dice(seed: int) -> Numbers:
    """DPO, then a round of DICE: 16 samples, implicit reward, length penalty, replay."""
    w = World(seed)
    offline = w.pairs(256, w.gold)
    base = tune(w.start, offline, "dpo")
    prompts = w.prompts(256)
    samples = sample(base, prompts, 16, w.draw)
    rewards = likelihoods(base, prompts, samples) - likelihoods(w.start, prompts, samples)
    letters = ((samples != PAD) & (samples != END)).sum(-1)
    found = length_debias(rewards.tolist(), letters.tolist())
    pairs = _best_worst(prompts, samples, rewards - found.alpha * letters)
    mixed = replay_mix(_rows(offline), _rows(pairs), 0.5, seed)
    policy = tune(base, _pairs(mixed), "dpo")
    return {
        "penalty": found.alpha,
        "gap, 0": found.gap_at_zero,
        "gap, best": found.gap,
        "reward start": w.reward(w.start),
        "reward base": w.reward(base),
        "reward 1": w.reward(policy),
        "length base": w.length(base),
        "length 1": w.length(policy),
    }


@experiment(
    keeps=("alpha above 0 keeps more of reward 1", exceeds("reward 1, 0.5", "reward 1, 0.0")),
    more=("alpha 1 keeps more than alpha 0.5", exceeds("reward 1, 1.0", "reward 1, 0.5")),
)
def spo(seed: int) -> Numbers:
    """Two preference dimensions that disagree, one after the other."""
    w = World(seed)
    first = tune(w.start, w.pairs(512, w.gold), "dpo")
    train = w.pairs(512, w.other, source=first)
    caches = [reference_cache(policy, train) for policy in (w.start, first)]
    fields = {
        f"prior_{side}": torch.stack([cache[f"ref_{side}"] for cache in caches])
        for side in ("chosen", "rejected")
    }
    train = replace(train, fields=fields)
    found = {"reward 1, after round 1": w.reward(first)}
    for alpha in (0.0, 0.5, 1.0):
        policy = tune(first, train, "spo", alpha=alpha)
        found |= w.rewards(policy, str(alpha))
    return found


BUDGETS = (32, 64)
RULES = ("random", "entropy", "certainty", "hybrid")


def _above_random(what: str, rule: str) -> Callable[[Numbers], float]:
    return lambda n: average(
        n[f"{what} {rule} {size}"] - n[f"{what} random {size}"] for size in BUDGETS
    )


@experiment(
    **{
        f"{what} {rule}": (
            f"{rule}: {what} above random's, mean over {', '.join(map(str, BUDGETS))} labels",
            _above_random(what, rule),
        )
        for what in ("reward", "accuracy")
        for rule in RULES[1:]
    }
)
def active(seed: int) -> Numbers:
    """Labels up to each budget by each rule, four candidates for each label; train from scratch."""
    found: Numbers = {}
    for rule in RULES:
        w = World(seed)
        test = w.pairs(512, w.gold, noise=False)
        cache = reference_cache(w.start, test)
        policy, known = w.start, None
        for size in BUDGETS:
            new = _acquire(w, policy, rule, size - (0 if known is None else len(known)), seed)
            known = new if known is None else known.and_also(new)
            policy = tune(w.start, known, "dpo", steps=60, beta=0.2)
            found[f"accuracy {rule} {size}"] = accuracy(policy, test, cache)
            found[f"reward {rule} {size}"] = w.reward(policy)
    return found


WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)


@experiment(
    one=("reward 1 is higher at w = 0.9 than at 0.1", exceeds("reward 1, 0.9", "reward 1, 0.1")),
    two=("reward 2 is lower", exceeds("reward 2, 0.1", "reward 2, 0.9")),
    front=(
        "reward 1 rises with every step of w",
        smallest_step(*(f"reward 1, {weight}" for weight in WEIGHTS)),
    ),
)
def modpo(seed: int) -> Numbers:
    """A sweep over weights of two objectives; the margin is the implicit reward of a DPO policy."""
    w = World(seed)
    margin = tune(w.start, w.pairs(512, w.other), "dpo")
    train = w.pairs(512, w.gold)
    cache = reference_cache(w.start, train)
    now = frozen_sums(margin, train)
    fields = {
        f"{side}_margins": 0.1 * (now[side] - cache[f"ref_{side}"])[None]
        for side in ("chosen", "rejected")
    }
    train = replace(train, fields=fields)
    found: Numbers = {}
    for weight in WEIGHTS:
        policy = tune(w.start, train, "modpo", cache=cache, w=[weight, 1 - weight])
        found |= w.rewards(policy, str(weight))
    return found


def _rows(pairs: Pairs) -> list[dict[str, Any]]:
    names = ("prompt", "chosen", "rejected")
    columns = (column.tolist() for column in pairs.columns())
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _pairs(rows: list[dict[str, Any]]) -> Pairs:
    return Pairs(
        *(torch.tensor([r[name] for r in rows]) for name in ("prompt", "chosen", "rejected"))
    )


def _best_worst(prompts: Tensor, samples: Tensor, scores: Tensor) -> Pairs:
    """The best and the worst sample of each prompt; prompts without are left out."""
    chosen = [best_worst(own, random.Random(0)) for own in scores.tolist()]
    kept = torch.tensor([i for i, pair in enumerate(chosen) if pair is not None])
    best, worst = torch.tensor([pair for pair in chosen if pair is not None]).T
    return Pairs(prompts[kept], samples[kept, best], samples[kept, worst])


def _gamma(policy: Policy, pairs: Pairs) -> float:
    found = frozen_sums(policy, pairs)
    return (found["chosen"] - found["rejected"]).mean().item()


def _acquire(w: World, policy: Policy, rule: str, count: int, seed: int) -> Pairs:
    """``count`` labelled pairs, chosen by a rule of :mod:`fastpref.rounds.acquire`."""
    wanted = count * (4 if rule in ("certainty", "hybrid") else 1)
    prompts = w.prompts(wanted * (4 if rule in ("entropy", "hybrid") else 1))
    if rule in ("entropy", "hybrid"):
        prompts = prompts[keep(entropies(w, policy, prompts), wanted, "largest", seed)]
    two = sample(policy, prompts, 2, w.draw)
    undecided = [1.0] * len(two)
    if rule in ("certainty", "hybrid"):
        pairs = Pairs(prompts, two[:, 0], two[:, 1])
        batch = PairLogps(**frozen_sums(policy, pairs), **reference_cache(w.start, pairs))
        rewards = torch.stack(batch.rewards(0.2), 1).tolist()
        undecided = [uncertainty(a, b) for a, b in rewards]
    kept = keep(undecided, count, "smallest", seed)
    prompts, two = prompts[kept], two[kept]
    return w.label(prompts, two, w.gold(two[:, 0]) - w.gold(two[:, 1]), noise=True)
