"""What a backend is: the signatures of its row kernels, and what they promise."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class RowKernels(Protocol):
    """What a backend supplies. Tensors are on one device; ``c`` is the compute dtype.

    ``c`` is fp32, or float64 for float64 inputs. ``targets`` are normalised: negative = ignored
    row, at least the vocabulary size = out of range. ``state (6, n)`` in ``c`` holds a row's
    running numbers over the tiles seen so far, with z the scaled and capped logits and y the
    target:

    ====  =====================================================  =======
    row   meaning                                                starts
    ====  =====================================================  =======
    0     M, maximum of z over v != y                            -inf
    1     R, sum over v != y of exp(z - M)                       0
    2     z_y                                                    NaN
    3     sum of z                                 (statistics)  0
    4     sum over v != y of exp(z - M) (z - M)    (statistics)  0
    5     sum over v != y of exp(z - M)^2          (statistics)  0
    ====  =====================================================  =======
    """

    def available(self) -> bool:
        """Whether the kernels can run here."""
        ...

    def why_unavailable(self) -> str:
        """What is missing; empty if nothing is."""
        ...

    def sweep_(
        self,
        tile: Tensor,
        out: Tensor | None,
        state: Tensor,
        offset: Tensor | None,
        acc: Tensor | None,
        targets: Tensor,
        bias: Tensor | None,
        start: int,
        scale: float,
        softcap: float,
        with_stats: bool,
    ) -> None:
        """Fold one tile of logits into ``state`` and turn it into the operand of the gradient
        products.

        Args:
            tile: ``hidden @ weight[start:start + w].T``. Shape ``(n, w)``, dtype ``c``. May be
                overwritten, unless ``out`` is None.
            out: None, or ``tile`` itself, or a tensor ``(n, w)`` of a lower dtype. Receives
                ``G = exp(z - M) * (1 - (z / softcap)^2)``, M after this tile; 0 in the target's
                column and in ignored rows. Without softcap the second factor is 1.
            state: ``(6, n)``; rows of ignored targets are left alone.
            offset: None, or ``(n,)``; receives M, under which the row of ``out`` was stored.
            acc: None, or ``(n, H)``; a row is multiplied by ``exp(M_before - M)`` where M grew.
            targets: ``(n,)`` int64.
            bias: None, or ``(w,)`` in ``c``.
            start: Vocabulary index of the tile's first column.
            scale: Multiplies ``tile + bias``.
            softcap: ``z = softcap * tanh(z / softcap)`` if positive; 0 for none.
            with_stats: Maintain rows 3 to 5 of ``state``.
        """
        ...

    def combine_(
        self,
        state: Tensor,
        targets: Tensor,
        vocab_size: int,
        softcap: float,
        scale: float,
        acc: Tensor | None,
        weight: Tensor,
        hidden_grad: Tensor | None,
        logp: Tensor,
        q: Tensor,
        coef: Tensor,
        stats: Tensor | None,
    ) -> None:
        """Finish the rows: log-probabilities, the two factors of the gradient, statistics,
        ``dlogp/dhidden``.

        With ``a = log R + M - z_y`` and ``d_y = 1 - (z_y / softcap)^2`` (1 without softcap): ``logp
        = -softplus(a)``, ``q = sigmoid(a) d_y``, ``coef = sigmoid(a) / R``. R = 0 gives 0, 0, 0; an
        ignored row too; a target out of range gives NaN.

        Args:
            state: ``(6, n)`` after the last tile.
            targets: ``(n,)`` int64.
            vocab_size: V.
            softcap: As in :meth:`sweep_`.
            scale: As in :meth:`sweep_`.
            acc: None, or ``(n, H)`` in ``c``: ``sum_v G_v W_v`` under the final M.
            weight: ``(V, H)``, any float dtype.
            hidden_grad: None, or ``(n, H)``: receives ``scale * (q * W[y] - coef * acc)``, 0 in
                ignored rows. May be ``acc`` itself.
            logp: ``(n,)`` in ``c``.
            q: ``(n,)`` in ``c``.
            coef: ``(n,)`` in ``c``.
            stats: None, or ``(5, n)`` in ``c``: entropy, lse, top1, logit_mean, log_sum_sq_probs.
        """
        ...

    def kl_tile_(
        self,
        tile: Tensor,
        ref_tile: Tensor,
        out: Tensor | None,
        state: Tensor,
        ref_state: Tensor,
        bias: Tensor | None,
        ref_bias: Tensor | None,
        scale: float,
        softcap: float,
        ref_scale: float,
        ref_softcap: float,
        kl: Tensor,
    ) -> None:
        """Add a tile's share of KL(reference || policy) to its rows, and form its gradient.

        With p and r the probabilities of policy and reference, ``exp(z - M) / R``: ``kl += sum_v
        r_v (log r_v - log p_v)``, where ``r_v = 0`` adds 0.

        Args:
            tile: Raw products of the policy. Shape ``(n, w)``, dtype ``c``. May be overwritten.
            ref_tile: Those of the reference, of the same columns.
            out: None, or ``tile`` itself, or a tensor ``(n, w)`` of a lower dtype. Receives
                ``S (p_v - r_v) (1 - (z_v / softcap)^2)`` with ``S = min(R, R_ref)``, so that no
                entry exceeds 1.
            state: ``(6, n)``: M and R over the whole vocabulary, no column left out.
            ref_state: The same of the reference.
            bias: None, or ``(w,)`` in ``c``.
            ref_bias: None, or ``(w,)`` in ``c``.
            scale: Multiplies ``tile + bias``.
            softcap: As in :meth:`sweep_`.
            ref_scale: Multiplies ``ref_tile + ref_bias``.
            ref_softcap: As in :meth:`sweep_`.
            kl: ``(n,)`` in ``c``.
        """
        ...

    def scale_rows_(self, out: Tensor, x: Tensor, factor: Tensor) -> None:
        """``out[i] = factor[i] * x[i]``; exactly 0 where the factor is 0, whatever ``x`` holds."""
        ...

    def add_target_rows_(
        self, out: Tensor, x: Tensor, targets: Tensor, factor: Tensor, start: int
    ) -> None:
        """``out[targets[i] - start] += factor[i] * x[i]`` for targets inside ``out (w, H)``;
        deterministic."""
        ...

    def segment_sum(self, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Sum of ``values (n,)`` over ``[cu_seqlens[i], cu_seqlens[i + 1])``, accumulated in
        float64."""
        ...

    def segment_sum_backward(self, grad: Tensor, cu_seqlens: Tensor, n: int) -> Tensor:
        """``grad (S,)`` repeated over its segment, ``(n,)``; 0 outside every segment."""
        ...

    def pair_margins(
        self, logps: Tensor, ref_logps: Tensor, cu_seqlens: Tensor, pairs: Tensor
    ) -> Tensor:
        """``(3, P)``: margin, chosen and rejected log-ratio of ``pairs (P, 2)`` of sequences."""
        ...

    def pair_margins_backward(
        self, grad: Tensor, cu_seqlens: Tensor, pairs: Tensor, n: int
    ) -> Tensor:
        """Gradient of :meth:`pair_margins` in ``logps``, ``(n,)``."""
        ...
