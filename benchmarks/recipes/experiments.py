"""Experiments on one loss: what METHODS expects of it at toy scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import world
from claims import Numbers, average, exceeds, experiment, smallest_step
from world import Gold, Pairs, Policy, World, accuracy, frozen_sums, reference_cache, sample, tune

from fastpref.losses import PairLogps

BETAS = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@experiment(
    reward=("IPO-mean's best reward is above IPO-sum's", exceeds("ipo reward", "ipo_sum reward")),
    accuracy=(
        "IPO-mean's accuracy, mean over beta, is above IPO-sum's",
        exceeds("ipo accuracy", "ipo_sum accuracy"),
    ),
)
def sweep(seed: int) -> Numbers:
    """DPO, IPO (mean and sum) and paired KTO at ten betas, on one cache of the reference."""
    w = World(seed)
    train, test = w.pairs(512, w.gold), w.pairs(512, w.gold, noise=False)
    cache, test_cache = reference_cache(w.start, train), reference_cache(w.start, test)
    found: Numbers = {}
    grid: dict[str, tuple[str, dict[str, Any]]] = {
        "dpo": ("dpo", {}),
        "ipo": ("ipo", {}),
        "ipo_sum": ("ipo", {"average": False}),
        "kto_pair": ("kto_pair", {}),
    }
    for name, (loss, more) in grid.items():
        made = [tune(w.start, train, loss, cache=cache, steps=40, beta=b, **more) for b in BETAS]
        rewards = [w.reward(policy) for policy in made]
        found[f"{name} reward"] = max(rewards)
        found[f"{name} best beta"] = BETAS[rewards.index(max(rewards))]
        per_token = name == "ipo"  # its reward is a mean over tokens
        found[f"{name} accuracy"] = average(accuracy(p, test, test_cache, per_token) for p in made)
    return found


@experiment(
    cdpo=("cDPO's held-out accuracy is not below DPO's", exceeds("cdpo accuracy", "dpo accuracy")),
    robust=(
        "robust DPO's held-out accuracy is not below DPO's",
        exceeds("robust accuracy", "dpo accuracy"),
    ),
    bound=("cDPO's margins stay smaller than DPO's", exceeds("dpo margin", "cdpo margin")),
    optimum=(
        "cDPO's mean margin stays below log((1 - eps)/eps) = 1.386",
        lambda n: 1.3863 - n["cdpo margin"],
    ),
)
def noisy_labels(seed: int) -> Numbers:
    """DPO, cDPO and robust DPO, each told of the 20 % of labels that are flipped."""
    w = World(seed)
    clean, test = w.pairs(256, w.gold, noise=False), w.pairs(512, w.gold, noise=False)
    flip = (torch.rand(len(clean), generator=w.draw) < 0.2)[:, None]
    train = replace(
        clean,
        chosen=torch.where(flip, clean.rejected, clean.chosen),
        rejected=torch.where(flip, clean.chosen, clean.rejected),
    )
    cache, test_cache = reference_cache(w.start, train), reference_cache(w.start, test)
    found: Numbers = {}
    for name, more in {
        "dpo": {},
        "cdpo": {"label_smoothing": 0.2},
        "robust": {"label_smoothing": 0.2},
    }.items():
        policy = tune(w.start, train, name, cache=cache, steps=300, **more)
        margin = 0.1 * PairLogps(**frozen_sums(policy, train), **cache).margin
        found[f"{name} margin"] = margin.abs().mean().item()
        found[f"{name} accuracy"] = accuracy(policy, test, test_cache)
    return found


ALPHAS = (0.0, 0.05, 0.1, 0.2)


@experiment(
    total=("alpha 0.2 samples are shorter than alpha 0", exceeds("length, 0.0", "length, 0.2")),
    each=(
        "length falls with every step of alpha",
        smallest_step(*(f"length, {alpha}" for alpha in reversed(ALPHAS))),
    ),
)
def lr_dpo(seed: int) -> Numbers:
    """LR-DPO where the gold reward likes length, at four prices of a token."""
    w = World(seed)
    train = w.pairs(512, Gold(w.gold.weights, bonus=0.3))
    found: Numbers = {"length, start": w.length(w.start)}
    for alpha in ALPHAS:
        policy = tune(w.start, train, "lr_dpo", alpha=alpha)
        found[f"length, {alpha}"] = w.length(policy)
        found[f"reward, {alpha}"] = w.reward(policy)
    return found


@experiment(
    rises=("DPO alone raises the NLL of the chosen", exceeds("dpo nll", "start nll")),
    keeps=("MPO keeps it from rising", exceeds("start nll", "mpo nll")),
    delta=(
        "delta is the mean of the rewards it has seen, to 1e-6",
        lambda n: 1e-6 - abs(n["delta"] - n["mean reward"]),
    ),
)
def mpo(seed: int) -> Numbers:
    """DPO and MPO on the same pairs: what happens to the chosen responses."""
    w = World(seed)
    train = w.pairs(512, w.gold)
    log: list[dict[str, float]] = []
    mixed = tune(w.start, train, "mpo", log=log)
    return {
        "start nll": _nll(w.start, train),
        "dpo nll": _nll(tune(w.start, train, "dpo"), train),
        "mpo nll": _nll(mixed, train),
        "delta": log[-1]["delta"],
        "mean reward": average(row["reward"] for row in log),
    }


@experiment(
    falls=("MinorDPO lowers the rejected less than DPO", exceeds("minor_dpo", "dpo")),
)
def minor_dpo(seed: int) -> Numbers:
    """Ten times the learning rate: how far the rejected responses fall, nats."""
    w = World(seed)
    train = w.pairs(512, w.gold)
    before = frozen_sums(w.start, train)["rejected"].mean().item()
    found = {}
    for name in ("dpo", "minor_dpo"):
        policy = tune(w.start, train, name, rate=1e-2)
        found[name] = frozen_sums(policy, train)["rejected"].mean().item() - before
    return found


@experiment(
    seen=("mDPO: h2 is above 0 on more than 95 % of held-out pairs", lambda n: n["mdpo"] - 0.95),
    more=("that is more than under DPO", exceeds("mdpo", "dpo")),
)
def mdpo(seed: int) -> Numbers:
    """A fake image, the first token of the prompt, decides which letters are liked."""
    w = World(seed)
    tastes = 0.5 * torch.randn(4, world.LETTERS, generator=w.draw)

    def shown(n: int) -> Pairs:
        prompts = w.prompts(n)
        prompts[:, 0] %= 4  # an image; the other letters are noise in its place
        two = sample(w.start, prompts, 2, w.draw)
        values = torch.cat([tastes, torch.zeros(4, 1)], 1)[prompts[:, :1, None], two.clamp(min=0)]
        reward = (values * (two != world.PAD)).sum(-1)
        pairs = w.label(prompts, two, reward[:, 0] - reward[:, 1], noise=False)
        noise = torch.randint(4, world.LETTERS, (n, 1), generator=w.draw)
        return replace(pairs, corrupted=torch.cat([noise, prompts[:, 1:]], 1))

    train, test = shown(512), shown(512)
    cache = reference_cache(w.start, test)
    found = {}
    for name in ("dpo", "mdpo"):
        used = train if name == "mdpo" else replace(train, corrupted=None)
        policy = tune(w.start, used, name, steps=240)
        now = frozen_sums(policy, test)
        h2 = (now["chosen"] - now["corrupted"]) - (cache["ref_chosen"] - cache["ref_corrupted"])
        found[name] = (h2 > 0).double().mean().item()
    return found


@experiment(
    lower=("alpha above 0 lowers log pi(y_ref) more", exceeds("log pi, alpha 0", "log pi, alpha")),
    entropy=("and leaves more entropy", exceeds("entropy, alpha", "entropy, alpha 0")),
)
def selm(seed: int) -> Numbers:
    """The reference's greedy answers after equal steps with and without optimism (alpha = 0.05)."""
    w = World(seed)
    train = w.pairs(512, w.gold)
    greedy = sample(w.start, train.prompts, 1, w.draw, greedy=True)[:, 0]
    train = replace(train, third=greedy)
    found = {}
    for name, alpha in {"alpha 0": 0.0, "alpha": 0.05}.items():
        policy = tune(w.start, train, "selm", beta=0.1, alpha=alpha)
        found[f"log pi, {name}"] = frozen_sums(policy, train)["third"].mean().item()
        found[f"entropy, {name}"] = average(world.entropies(w, policy, w.prompts(64)))
        found[f"reward, {name}"] = w.reward(policy)
    return found


@experiment(
    rises=("gamma above 0 raises the auxiliary reward", exceeds("aux, 0.001", "aux, 0.0")),
    alike=(
        "held-out preference accuracy stays within 0.03",
        lambda n: 0.03 - abs(n["accuracy, 0.001"] - n["accuracy, 0.0"]),
    ),
)
def hpo(seed: int) -> Numbers:
    """An auxiliary reward that no preference tells of; its value is its mean."""
    w = World(seed)
    train, test = w.pairs(512, w.gold), w.pairs(512, w.gold, noise=False)
    aux = torch.stack([w.other(train.chosen), w.other(train.rejected)])
    aux = (aux - aux.mean()) / aux.std()
    fields = {"chosen_aux": aux[:1], "rejected_aux": aux[1:], "values": torch.zeros(len(train))}
    train, cache = replace(train, fields=fields), reference_cache(w.start, test)
    found = {"aux, start": w.reward(w.start, w.other)}
    for gamma in (0.0, 0.001):
        policy = tune(w.start, train, "hpo", gamma=gamma)
        found[f"aux, {gamma}"] = w.reward(policy, w.other)
        found[f"accuracy, {gamma}"] = accuracy(policy, test, cache)
    return found


def _nll(policy: Policy, pairs: Pairs) -> float:
    """Of a token of the chosen responses, nats."""
    total = frozen_sums(policy, pairs)["chosen"].sum()
    return -(total / world.lengths(pairs.chosen).sum()).item()
