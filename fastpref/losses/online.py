"""Pairs with a third response, sampled from an earlier policy: SELM, XPO and VPO explore with
it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.batch import PairLogps
from fastpref.losses.core import register
from fastpref.losses.parameters import Parameter

_ALPHA = Parameter("weight of the exploration term; 0 is DPO", "(-inf, inf)")


@register(
    "selm",
    needs={"ref", "third"},
    paper="Zhang et al. 2024, arXiv:2405.19332",
    equation="Eq. 4.2",
    confidence="H",
    formula="-logsigmoid(beta * margin) + alpha * beta * (third - ref_third)",
    when=(
        "iterative DPO that should explore: the current reference's own answers are made less "
        "likely"
    ),
    parameters={"alpha": _ALPHA},
    shift_invariant=True,
)
def selm(p: PairLogps, *, beta: float = 0.01, alpha: float = 1e-3) -> Tensor:
    """DPO with an optimistic term on the log-ratio of the reference's sample."""
    return -F.logsigmoid(beta * p.margin) + alpha * beta * (p.third - p.ref_third)


@register(
    "xpo",
    needs={"ref", "third"},
    paper="Xie et al. 2024, arXiv:2405.21046",
    confidence="H",
    formula="-logsigmoid(beta * margin) + alpha * third",
    when="online DPO with provable exploration; the third response is a sample of the reference",
    found_in="TRL up to 1.13",
    parameters={"alpha": _ALPHA},
    shift_invariant=True,
)
def xpo(p: PairLogps, *, beta: float = 0.1, alpha: float = 1e-5) -> Tensor:
    """DPO that lowers the likelihood of the reference's sample."""
    return -F.logsigmoid(beta * p.margin) + alpha * p.third


@register(
    "vpo",
    needs={"ref", "third"},
    paper="Cen et al. 2024, arXiv:2405.19320",
    confidence="M",
    formula="-logsigmoid(beta * margin) + alpha * third online, - alpha * third offline",
    when="one term for both: optimism where data is collected, pessimism where it is fixed",
    parameters={
        "alpha": _ALPHA,
        "online": Parameter("optimism (lower the sample's likelihood); false: pessimism"),
    },
    shift_invariant=True,
    variants=({"online": False},),
)
def vpo(p: PairLogps, *, beta: float = 0.1, alpha: float = 1e-3, online: bool = True) -> Tensor:
    """DPO regularised by the value of the reference's sample."""
    return -F.logsigmoid(beta * p.margin) + (alpha if online else -alpha) * p.third
