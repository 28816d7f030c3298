"""What the tests share: random pairs, and the comparison with the worked examples.

``golden.json`` holds numbers worked out in float64 from the papers' formulas, independently of this
code. A gradient is that of the sum over examples, with detached statistics held fixed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import losses
from fastpref.losses import Packed, PairLogps

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LEAVES = {"lw": "chosen", "ll": "rejected", "lg": "third", "lwc": "corrupted"}
FROZEN = {"rw": "ref_chosen", "rl": "ref_rejected", "rg": "ref_third", "rwc": "ref_corrupted"}


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def assert_close(got: torch.Tensor, expected: object, size: float = 0.0) -> None:
    """Error at most the dtype's tolerance, relative to the largest number expected or ``size``."""
    expected = torch.tensor(expected, dtype=torch.float64)
    assert got.shape == expected.shape
    limit = TOLERANCE[got.dtype] * max(expected.abs().max().item(), size, 1e-30)
    error = (got.detach().double() - expected).abs().max().item()
    assert error <= limit, f"{error:.3g} above {limit:.3g}: {got.tolist()} {expected.tolist()}"


def pairs_of(inputs: dict, dtype: torch.dtype, **fields: object) -> PairLogps:
    """The pairs of a case; lengths are those of the canonical batch."""
    canonical = GOLDEN["batch_B4"]["outputs"]
    numbers = {
        LEAVES[key]: torch.tensor(inputs[key], dtype=dtype, requires_grad=True)
        for key in LEAVES
        if key in inputs
    }
    numbers |= {FROZEN[k]: torch.tensor(inputs[k], dtype=dtype) for k in FROZEN if k in inputs}
    numbers |= {"chosen_lengths": torch.tensor(canonical["nw"])}
    numbers |= {"rejected_lengths": torch.tensor(canonical["nl"])}
    numbers |= {key: torch.tensor(value, dtype=dtype) for key, value in fields.items()}
    return PairLogps(**numbers)


def check_case(
    case: str, name: str, dtype: torch.dtype, batch: PairLogps, **arguments: object
) -> None:
    """Losses, mean and every gradient of a case."""
    outputs = GOLDEN[case]["outputs"]
    result = losses.get(name)(batch, **arguments)
    assert result.dtype == dtype
    assert_close(result, outputs["losses"])
    assert_close(result.mean(), outputs["loss_mean"])
    grads = {key: outputs[f"grad_{key}"] for key in LEAVES if f"grad_{key}" in outputs}
    size = max((abs(x) for row in grads.values() for x in row), default=0.0)
    for key, expected in grads.items():
        leaf = getattr(batch, LEAVES[key])
        grad = torch.autograd.grad(result.sum(), leaf, retain_graph=True)[0]
        assert_close(grad, expected, size=size)


@pytest.fixture
def close() -> Callable[..., None]:
    return assert_close


@pytest.fixture
def pairs() -> Callable[..., PairLogps]:
    return pairs_of


@pytest.fixture
def check() -> Callable[..., None]:
    return check_case


SIZE = 6


def random_sums(g: torch.Generator, *shape: int) -> torch.Tensor:
    return -8 * torch.rand(*shape, generator=g, dtype=torch.float64) - 0.1


def random_packed(g: torch.Generator, lengths: torch.Tensor) -> Packed:
    bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
    return Packed(random_sums(g, int(lengths.sum())), bounds)


def random_pairs_of(seed: int = 0, **fields: Any) -> PairLogps:
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


@pytest.fixture
def random_pairs() -> Callable[..., PairLogps]:
    return random_pairs_of


@pytest.fixture
def some() -> PairLogps:
    return random_pairs_of()


@pytest.fixture
def dpo(some: PairLogps) -> torch.Tensor:
    return losses.get("dpo")(some)
