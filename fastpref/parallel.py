"""A head sharded over the vocabulary: rank r of a process group holds the r-th slice of the weight.

The tiles of a slice are swept as usual. Then one packed all-reduce makes the rows' running numbers
global, and one more sums ``dlogp/dhidden``; the gradient of the slice stays where it is.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor


class Shard(NamedTuple):
    """This rank's slice of the vocabulary."""

    group: dist.ProcessGroup
    start: int
    """Global index of the slice's first row."""
    size: int
    """Rows of the slice."""
    vocab_size: int
    """Rows of all slices."""

    @classmethod
    def of(cls, group_name: str, weight: Tensor) -> Shard | None:
        """The shard that ``weight`` is, or None where the weight is whole (no group name).

        Sizes may differ between ranks; they are exchanged here, which reads them on the host.
        """
        if not group_name:
            return None
        # The name is what crosses a registered op, as in torch's functional collectives.
        group = c10d._resolve_process_group(cast(Any, group_name))  # type: ignore[attr-defined]
        size = torch.tensor([weight.shape[0]], device=weight.device)
        sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, size, group=group)
        rows = [int(s) for s in torch.cat(sizes).tolist()]
        rank = dist.get_rank(group)
        return cls(group, sum(rows[:rank]), rows[rank], sum(rows))

    def localise(self, targets: Tensor) -> Tensor:
        """Normalised targets in this slice's indices; another rank's becomes ``size``."""
        local = targets - self.start
        owned = (local >= 0) & (local < self.size)
        return torch.where(targets < 0, targets, torch.where(owned, local, self.size))

    def merge_(self, state: Tensor, acc: Tensor | None, targets: Tensor) -> None:
        """Make the rows' ``state`` global, and bring ``acc`` under the global maximum.

        Args:
            state: ``(6, n)`` of :class:`fastpref.backends.RowKernels` over this slice.
            acc: None, or ``(n, H)``.
            targets: ``(n,)`` normalised, global.
        """
        elsewhere = (targets >= 0) & (targets < self.vocab_size)
        elsewhere &= self.localise(targets) == self.size
        # The owner's logit survives a maximum, NaN included; a target nobody owns stays NaN.
        state[2].masked_fill_(elsewhere, -math.inf)
        # A slot a rank, the others' zero: their sum is everybody's numbers, which no sum of numbers
        # relative to different maxima would be.
        rank = dist.get_rank(self.group)
        every = state.new_zeros((dist.get_world_size(self.group), *state.shape))
        every[rank] = state
        dist.all_reduce(every, group=self.group)
        maximum, total, z_target, z_sum, gap, square = every.unbind(1)
        top = maximum.amax(0)
        base = torch.where(top == -math.inf, 0.0, top)
        shrink = torch.exp(maximum - base)
        moved = torch.where(shrink == 0.0, 0.0, (maximum - base) * total)
        if acc is not None:
            acc.mul_(shrink[rank][:, None])
        state[0] = top
        state[1] = (shrink * total).sum(0)
        state[2] = z_target.amax(0)
        state[3] = z_sum.sum(0)
        state[4] = torch.where(shrink == 0.0, 0.0, shrink * (gap + moved)).sum(0)
        state[5] = (shrink.square() * square).sum(0)

    def hidden_grad_(
        self,
        out: Tensor,
        acc: Tensor,
        weight: Tensor,
        targets: Tensor,
        q: Tensor,
        coef: Tensor,
        scale: float,
    ) -> None:
        """``out = scale * (q * W[y] - coef * sum_v G_v W_v)``, summed over the slices.

        Args:
            out: ``(n, H)``, any float dtype.
            acc: ``(n, H)`` of this slice, under the global maximum.
            weight: ``(size, H)``.
            targets: ``(n,)`` as :meth:`localise` gives them.
            q: ``(n,)``.
            coef: ``(n,)``.
            scale: Multiplies the logits.
        """
        owned = (targets >= 0) & (targets < self.size)
        rows = weight[targets.clamp(0, self.size - 1)].to(acc.dtype)
        unit = torch.where(owned, q, 0.0)[:, None] * rows - coef[:, None] * acc
        unit = unit.mul_(scale).masked_fill_((targets < 0)[:, None], 0.0)
        dist.all_reduce(unit, group=self.group)
        out.copy_(unit)
