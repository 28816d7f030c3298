"""What can be wrong with the arguments of the ops, said so that a person can mend it.

Nothing here reads device memory: values are checked on CPU, where it costs no sync. A compiled
graph checks them as it runs, and says what is wrong without the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Names(NamedTuple):
    """What the caller calls the arguments of a projection."""

    hidden: str = "hidden"
    weight: str = "weight"
    targets: str = "targets"
    bias: str = "bias"


NAMES = Names()


def projection(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    names: Names = NAMES,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias, checked and in autocast's dtype.

    Args:
        hidden: Shape ``(..., H)``.
        weight: Shape ``(V, H)``.
        targets: Shape ``(...)``, int64.
        bias: Shape ``(V,)``.
        rows: Shape ``(n,)``, int64, in the range of the flattened leading dimensions.
        names: For the messages.

    Raises:
        ValueError: Shapes or devices disagree, or ``rows`` are out of range or not unique.
        TypeError: Wrong or mixed dtypes.
    """
    given = {names.hidden: hidden, names.weight: weight, names.targets: targets}
    optional = {names.bias: bias, "rows": rows}
    tensors(**given, **{name: x for name, x in optional.items() if x is not None})
    hidden, weight = autocast(hidden), autocast(weight)
    bias = None if bias is None else autocast(bias)
    _dtypes(hidden, weight, targets, bias, rows, names)
    _shapes(hidden, weight, targets, bias, names)
    if rows is not None:
        check_rows(rows, targets.numel())
    return hidden, weight, bias


def tensors(**given: Any) -> None:
    """Tensors, all on the device of the first, outside ``torch.func``.

    Raises:
        TypeError: One is no tensor.
        ValueError: Devices differ.
        RuntimeError: Within a transform of ``torch.func``.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "fastpref ops do not run under torch.func transforms (grad, vmap, jvp, ...): call "
            "backward() or torch.autograd.grad instead"
        )
    first, like = next(iter(given.items()))
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.device != like.device:
            raise ValueError(
                f"{name} is on {x.device}, {first} is on {like.device}: move both to one device"
            )


def no_tangents(*given: Tensor | None) -> None:
    """Refuse forward-mode differentiation, whose tangents a registered op would drop.

    Raises:
        RuntimeError: A tensor carries a tangent.
    """
    if torch.compiler.is_compiling():
        return
    dual: Any = fwAD.unpack_dual
    if any(x is not None and dual(x).tangent is not None for x in given):
        raise RuntimeError(
            "fastpref ops have no forward-mode derivative: use backward(), or backend='reference'"
        )


def autocast(x: Tensor) -> Tensor:
    """The tensor in autocast's dtype where autocast is on, else as it is."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() else x


def _dtypes(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    names: Names,
) -> None:
    if hidden.dtype not in FLOATS:
        raise TypeError(f"{names.hidden}: expected fp32, bf16, fp16 or float64, got {hidden.dtype}")
    for name, x in ((names.weight, weight), (names.bias, bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{name} is {x.dtype}, {names.hidden} is {hidden.dtype}: convert one of them, or "
                "run under torch.autocast"
            )
    for name, x in ((names.targets, targets), ("rows", rows)):
        if x is not None and x.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64, got {x.dtype}")


def _shapes(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, names: Names
) -> None:
    size = tuple(weight.shape)
    if weight.dim() != 2:
        raise ValueError(f"{names.weight}: expected shape (V, H), got {size}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{names.hidden}: expected shape (..., {weight.shape[1]}) to match {names.weight} "
            f"{size}, got {tuple(hidden.shape)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"{names.weight}: expected at least one row and column, got {size}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{names.targets}: expected shape {tuple(hidden.shape[:-1])} to match {names.hidden} "
            f"{tuple(hidden.shape)}, got {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{names.bias}: expected shape ({size[0]},), got {tuple(bias.shape)}")


def check_options(
    softcap: float | None,
    memory_budget: int | None,
    process_group: Any = None,
    backend: str = "auto",
    scale: float | Tensor = 1.0,
    ignore_index: Any = -100,
) -> None:
    """Options that are not tensors."""
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise TypeError("scale: it gets no gradient; multiply hidden (and bias) by it instead")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a positive, finite number or None, got {softcap}")
    if memory_budget is not None and not isinstance(memory_budget, (int, torch.SymInt)):
        raise TypeError(f"memory_budget: expected bytes as an int, got {memory_budget!r}")
    if memory_budget is not None and not 0 <= memory_budget < 2**63:
        raise ValueError(f"memory_budget: expected bytes >= 0 or None, got {memory_budget}")
    if process_group is not None and not hasattr(process_group, "group_name"):
        raise TypeError(f"process_group: expected a torch.distributed group, got {process_group!r}")
    if process_group is not None and backend == "reference":
        raise ValueError("process_group: backend='reference' needs the whole weight")


def _require(
    like: Tensor, condition: Callable[[], Tensor], wrong: str, details: Callable[[], str]
) -> None:
    """Raise unless all of ``condition`` holds; only where ``like`` is on a CPU, as looking costs no
    sync there.

    A graph that is being compiled is made to look as it runs, and then to say ``wrong`` alone: the
    numbers in ``details`` would tie it to one size.
    """
    if like.device.type != "cpu":
        return
    good = condition()
    if torch.compiler.is_compiling():
        torch._assert_async(good.all(), wrong)
    elif not good.all():
        raise ValueError(f"{wrong}: {details()}")


def check_rows(rows: Tensor, num_rows: int) -> None:
    """Shape, range and uniqueness of ``rows``."""
    if rows.dim() != 1:
        raise ValueError(f"rows: expected a 1-D index, got shape {tuple(rows.shape)}")
    _require(
        rows,
        lambda: (rows >= 0) & (rows < num_rows),
        "rows: an index is out of range",
        lambda: f"expected [0, {num_rows}), got [{int(rows.min())}, {int(rows.max())}]",
    )
    _require(
        rows,
        lambda: rows.sort().values.diff() > 0,
        "rows: an index occurs twice",
        lambda: "gather hidden and targets yourself instead",
    )


def check_cu_seqlens(cu_seqlens: Tensor, n: int) -> None:
    """Boundaries of packed sequences that cover ``n`` tokens."""
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected an int32 tensor, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            f"cu_seqlens: expected shape (num_sequences + 1,), got {tuple(cu_seqlens.shape)}"
        )
    _require(
        cu_seqlens,
        lambda: torch.cat([cu_seqlens[:1] == 0, cu_seqlens.diff() >= 0, cu_seqlens[-1:] == n]),
        "cu_seqlens: these are no boundaries of sequences that cover the tokens",
        lambda: (
            f"expected to start at 0, never fall, and end at the number of tokens {n}; got "
            f"{cu_seqlens.tolist()[:8]}..., ending at {int(cu_seqlens[-1])}"
        ),
    )


def check_token_weights(token_weights: Tensor, targets: Tensor) -> None:
    """One weight for each target."""
    tensors(targets=targets, token_weights=token_weights)
    if token_weights.shape != targets.shape:
        raise ValueError(
            f"token_weights: expected shape {tuple(targets.shape)}, got "
            f"{tuple(token_weights.shape)}"
        )


def check_margins(logps: Tensor, ref_logps: Tensor, cu_seqlens: Tensor, pairs: Tensor) -> None:
    """The arguments of ``preference_margins``."""
    tensors(logps=logps, ref_logps=ref_logps, cu_seqlens=cu_seqlens, pairs=pairs)
    for name, x in (("logps", logps), ("ref_logps", ref_logps)):
        if x.dtype not in (torch.float32, torch.float64) or x.dim() != 1:
            raise TypeError(
                f"{name}: expected a 1-D fp32 or float64 tensor, got {x.dtype} of shape "
                f"{tuple(x.shape)}"
            )
    if ref_logps.shape != logps.shape or ref_logps.dtype != logps.dtype:
        raise ValueError(
            f"ref_logps: expected {tuple(logps.shape)} {logps.dtype} as logps, "
            f"got {tuple(ref_logps.shape)} {ref_logps.dtype}"
        )
    if pairs.dtype != torch.int64:
        raise TypeError(f"pairs: expected int64, got {pairs.dtype}")
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs: expected shape (P, 2), got {tuple(pairs.shape)}")
    check_cu_seqlens(cu_seqlens, logps.shape[0])
    num_sequences = cu_seqlens.numel() - 1
    _require(
        pairs,
        lambda: (pairs >= 0) & (pairs < num_sequences),
        "pairs: a sequence index is out of range",
        lambda: (
            f"expected sequence indices in [0, {num_sequences}), got [{int(pairs.min())}, "
            f"{int(pairs.max())}]"
        ),
    )
