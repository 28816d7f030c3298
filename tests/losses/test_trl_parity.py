"""The same numbers as TRL 1.16, from TRL's own code.

TRL computes a loss inside its trainer. The method is called on a stand-in trainer whose model
returns given per-token log-probabilities, so that value and gradient can be compared.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fastpref import losses
from fastpref.losses import PairLogps, UnpairedLogps

pytest.importorskip("trl")
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

PAIRS, WIDTH = 5, 9


class Accelerator:
    """One process: gathering is the identity."""

    device = torch.device("cpu")

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    gather_for_metrics = gather


def batch_of(rows: int) -> dict[str, torch.Tensor]:
    """Random numbers of ``rows`` sequences: a prompt of 2, then 1 to 6 response tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, WIDTH - 2, (rows,), generator=generator)
    position = torch.arange(WIDTH)
    mask = (position >= 2) & (position < 2 + lengths[:, None])
    shifted = mask[:, 1:]
    logps = -torch.rand(rows, WIDTH - 1, generator=generator) * 3
    sums = -torch.rand(2, rows, generator=generator) * 8
    return {
        "lengths": lengths,
        "completion_mask": mask.long(),
        "log_probs": (logps * shifted).requires_grad_(),
        "log_sum_sq": -torch.rand(rows, WIDTH - 1, generator=generator) * shifted,
        "ref": sums[0],
        "kl_ref": sums[1],
        "mask": shifted,
    }


def outputs_of(batch: dict[str, torch.Tensor]) -> SimpleNamespace:
    zeros = torch.zeros_like(batch["log_probs"])
    return SimpleNamespace(
        log_probs=batch["log_probs"],
        log_sum_sq_probs=batch["log_sum_sq"],
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )


def trl_dpo(
    batch: dict[str, torch.Tensor], loss_type: list[str], **options: object
) -> torch.Tensor:
    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        ld_alpha=None,
        beta=0.1,
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        use_weighting=False,
        loss_types=loss_type,
        loss_weights=[1.0] * len(loss_type),
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    vars(trainer).update(options)
    inputs = {
        "input_ids": torch.zeros(2 * PAIRS, WIDTH, dtype=torch.long),
        "attention_mask": torch.ones(2 * PAIRS, WIDTH, dtype=torch.long),
        "completion_mask": batch["completion_mask"],
        "ref_chosen_logps": batch["ref"][:PAIRS],
        "ref_rejected_logps": batch["ref"][PAIRS:],
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs_of(batch), inputs, False)


def our_pairs(batch: dict[str, torch.Tensor]) -> PairLogps:
    sums, lengths = batch["log_probs"].sum(1), batch["lengths"]
    log_sum_sq = batch["log_sum_sq"].sum(1) / lengths
    halves = {
        "": sums,
        "_lengths": lengths,
        "_log_sum_sq": log_sum_sq,
    }
    fields = {}
    for suffix, values in halves.items():
        fields[f"chosen{suffix}"], fields[f"rejected{suffix}"] = values.chunk(2)
    fields["ref_chosen"], fields["ref_rejected"] = batch["ref"].chunk(2)
    return PairLogps(**fields)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, batch: dict) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    leaf, mask = batch["log_probs"], batch["mask"]
    grads = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(grads[0][mask], grads[1][mask], rtol=1e-4, atol=1e-7)


DPO_TYPES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {"nll_reduction": "tokens"},
    "sigmoid_norm": {},
}


@pytest.mark.parametrize("loss_type", DPO_TYPES)
def test_dpo_loss_types(loss_type: str) -> None:
    batch = batch_of(2 * PAIRS)
    arguments = dict(DPO_TYPES[loss_type])
    options = {k: v for k, v in arguments.items() if k == "label_smoothing"}
    if "beta" in losses.get(loss_type).entry.defaults:
        arguments["beta"] = 0.1
    ours = losses.get(loss_type)(our_pairs(batch), **arguments).mean()
    assert_same(ours, trl_dpo(batch, [loss_type], **options), batch)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize(
    "loss_type", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
)
def test_f_divergences(loss_type: str, divergence: str) -> None:
    batch = batch_of(2 * PAIRS)
    arguments = {**DPO_TYPES[loss_type], "beta": 0.1}
    theirs = trl_dpo(
        batch,
        [loss_type],
        f_divergence_type=divergence,
        label_smoothing=arguments.get("label_smoothing", 0.0),
    )
    ours = losses.get(loss_type)(our_pairs(batch), f_divergence=divergence, **arguments).mean()
    assert_same(ours, theirs, batch)


def test_weighted_list_with_weighting() -> None:
    batch = batch_of(2 * PAIRS)
    batch["log_sum_sq"] = torch.zeros_like(
        batch["log_sum_sq"]
    )  # weights below 1: TRL's lack the cap
    pairs = our_pairs(batch)
    theirs = trl_dpo(batch, ["apo_zero", "nca_pair"], use_weighting=True, loss_weights=[0.3, 2.0])
    ours = losses.combine(
        ["apo_zero", "nca_pair"],
        [0.3, 2.0],
        {"apo_zero": {"weighting": "wpo"}, "nca_pair": {"weighting": "wpo"}},
        beta=0.1,
    )
    assert_same(ours(pairs).mean(), theirs, batch)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_loss_types(loss_type: str) -> None:
    batch = batch_of(PAIRS)
    kl_logps = batch["kl_ref"] + torch.linspace(-0.2, 0.8, PAIRS)
    labels = torch.tensor([True, False, False, True, False])
    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        beta=0.1,
        desirable_weight=1.3,
        undesirable_weight=0.7,
        loss_type=loss_type,
        _compute_kl_logps=lambda *_: kl_logps,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(PAIRS, WIDTH, dtype=torch.long),
        "attention_mask": torch.ones(PAIRS, WIDTH, dtype=torch.long),
        "completion_mask": batch["completion_mask"],
        "label": labels,
        "ref_logps": batch["ref"],
        "ref_KL_logps": batch["kl_ref"],
    }
    theirs = KTOTrainer._compute_loss(trainer, lambda **_: outputs_of(batch), inputs, False)
    ours = losses.get(loss_type)(
        UnpairedLogps(
            logps=batch["log_probs"].sum(1),
            ref_logps=batch["ref"],
            labels=labels,
            kl_logps=kl_logps,
            ref_kl_logps=batch["kl_ref"],
        ),
        beta=0.1,
        desirable_weight=1.3,
        undesirable_weight=0.7,
    )
    assert_same(ours.mean(), theirs, batch)
