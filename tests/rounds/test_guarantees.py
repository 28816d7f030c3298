"""What follows from the maths of the recipes' losses, and the page of what does not."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastpref import losses, rounds
from fastpref.losses import PairLogps
from fastpref.rounds.run import Run, policy_of
from fastpref.rounds.training import Loss, Training, train

ROOT = Path(__file__).parents[2]
get = losses.get


def random_pairs(size: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(size)
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    sums = {name: -8 * torch.rand(size, generator=g, dtype=dtype) - 0.1 for name in names}
    lengths = {
        f"{side}_lengths": torch.randint(1, 40, (size,), generator=g)
        for side in ("chosen", "rejected")
    }
    return {**sums, **lengths}


def test_lr_dpo_without_a_price_is_dpo_to_the_bit() -> None:
    fields = random_pairs(200)
    found = []
    for name, arguments in (("dpo", {}), ("lr_dpo", {"alpha": 0.0})):
        leaves = {s: fields[s].clone().requires_grad_() for s in ("chosen", "rejected")}
        loss = get(name)(PairLogps(**{**fields, **leaves}), beta=0.1, **arguments)
        found.append([loss, *torch.autograd.grad(loss.mean(), list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_round_of_ilr_dpo_without_a_price_is_dpo_to_the_bit(
    options: Callable[..., dict[str, Any]], make: Any, tmp_path: Path, policy: str
) -> None:
    """The same pairs trained with plain DPO end with the same weights."""
    given = options(
        dataset=make.prompts(12),
        scorer=make.reward,
        sampling={"n": 4, "max_new_tokens": 6},
        filter={"unfinished": True},
        rounds=1,
        held_out=0,
        alpha=0.0,
    )
    made = rounds.ILRDPO(**given).run()
    rows = (made.folder / "round-1" / "pairs" / "rows.jsonl").read_text().splitlines()
    pairs = [row for row in map(json.loads, rows) if not row.get("dropped")]
    start = policy_of(policy)
    plain = train(
        Run(tmp_path / "plain", tokenizer=make.tokenizer()),
        "round-1/train",
        pairs,
        start=start,
        reference=start,
        loss=Loss("dpo", 0.1),
        training=Training(given["training"]),
    )
    weights = [load_file(Path(p.path) / "model.safetensors") for p in (made.policy, plain)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_under_flipped_labels_cdpo_stops_where_dpo_goes_on() -> None:
    """Pairs seen once each way in every five: cDPO's margin ends at log((1 - eps) / eps)."""
    zero = torch.zeros(1, dtype=torch.float64)

    def margin(name: str, share: float, **arguments: float) -> float:
        h = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        for _ in range(400):  # downhill on a convex function of one number
            each = [
                get(name)(
                    PairLogps(chosen=a, rejected=b, ref_chosen=zero, ref_rejected=zero),
                    beta=1.0,
                    **arguments,
                )
                for a, b in ((h, zero), (zero, h))
            ]
            loss = ((1 - share) * each[0] + share * each[1]).sum()
            (slope,) = torch.autograd.grad(loss, h)
            h = (h - 2.0 * slope).detach().requires_grad_()
        return h.item()

    eps = 0.2
    assert margin("cdpo", 0.0, label_smoothing=eps) == pytest.approx(math.log((1 - eps) / eps))
    assert margin("dpo", 0.0) > 6
    # With the flips in the data, DPO of one pair settles there, and robust DPO does not stop.
    assert margin("dpo", eps) == pytest.approx(math.log((1 - eps) / eps))
    assert margin("robust", eps, label_smoothing=eps) > 6


@pytest.mark.parametrize("arguments", [{}, {"weights": "uniform", "adaptive_eps": False}])
@pytest.mark.parametrize("scale", [10.0, 1e4])
def test_a_foreign_reference_moves_mrpo_no_further_than_the_trust_region(
    arguments: dict[str, Any], scale: float
) -> None:
    fields = random_pairs(64, torch.float64)
    zero = torch.zeros(64, dtype=torch.float64)
    for side, sign in (("chosen", 1), ("rejected", -1)):
        base = fields[f"ref_{side}"]
        refs = {
            f"ref_{s}": torch.stack([base, scale * base, base / scale])
            if s == side
            else torch.stack([zero] * 3)
            for s in ("chosen", "rejected")
        }
        batch = PairLogps(chosen=zero, rejected=zero, **refs)
        # With all else 0 the logit is minus, or plus, the virtual reference of this side.
        virtual = sign * torch.expm1(get("mrpo")(batch, beta=1.0, **arguments)).log()
        assert ((virtual - base).abs() <= 0.1 * base.abs() + 1e-9).all(), side
    chosen = fields["chosen"].clone().requires_grad_()
    refs = {
        f"ref_{s}": torch.stack([fields[f"ref_{s}"], scale * fields[f"ref_{s}"]])
        for s in ("chosen", "rejected")
    }
    batch = PairLogps(chosen=chosen, rejected=fields["rejected"], **refs)
    loss = get("mrpo")(batch, **arguments)
    (slope,) = torch.autograd.grad(loss.sum(), chosen)
    assert loss.isfinite().all()
    assert (slope.abs() <= 0.1).all()


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of the benchmarks can be imported, and are forgotten again."""
    for folder in (ROOT / "benchmarks", ROOT / "benchmarks" / "recipes"):
        monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


@pytest.mark.usefixtures("benchmarks")
def test_the_pages_of_recipes_are_made_of_their_rows() -> None:
    import tables
    import toy

    rows = toy.read(toy.RESULTS)
    for name in toy.EXPERIMENTS:
        assert len({row["seed"] for row in rows if row["experiment"] == name}) >= 5, name
    pages = [(page, made) for page, made in tables.pages() if page.parent.name == "recipes"]
    assert [page.name for page, _ in pages] == ["experiments.md", "real-runs.md"]
    for page, made in pages:
        text = page.read_text()
        assert made(text) == text, "python benchmarks/tables.py"


@pytest.mark.usefixtures("benchmarks")
def test_the_toy_policy_samples_what_it_scores() -> None:
    """Greedy answers, made token by token, are the likeliest next tokens of a pass over all."""
    import world

    w = world.World(0)
    prompts = w.prompts(32)
    answers = world.sample(w.start, prompts, 1, w.draw, greedy=True)[:, 0]
    hidden, _ = w.start(torch.cat([prompts, answers.clamp(min=0)], 1)[:, :-1])
    likeliest = (hidden[:, world.PROMPT - 1 :] @ w.start.head.T + w.start.bias).argmax(-1)
    assert ((likeliest == answers) | (answers == world.PAD)).all()
    assert (world.lengths(answers) < world.LONGEST).any()
