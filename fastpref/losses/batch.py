"""What a loss is given: log-probabilities of a batch of pairs, of labelled examples, or of groups.

The classes only hold tensors: building one checks nothing. Reading a field that is absent, through
a loss, raises an error that names the loss, the field and what provides it. ``B`` pairs, ``N``
examples, ``K`` references or responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

_ABSENT: Any = None
_Self = TypeVar("_Self", bound="_Batch")


@dataclass(frozen=True, eq=False)
class Packed:
    """Per-token numbers of several sequences end to end, without padding.

    Args:
        values: One number a token. Shape ``(n,)``, floating point.
        cu_seqlens: Sequence ``i`` holds tokens ``cu_seqlens[i]:cu_seqlens[i + 1]``. Shape ``(S +
            1,)``, int32.
    """

    values: Tensor
    cu_seqlens: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence. Shape ``(S,)``."""
        return self.cu_seqlens.diff()

    @property
    def segments(self) -> Tensor:
        """Sequence index of each token. Shape ``(n,)``, int64."""
        index = torch.arange(self.cu_seqlens.numel() - 1, device=self.values.device)
        return index.repeat_interleave(self.lengths, output_size=self.values.numel())

    @property
    def positions(self) -> Tensor:
        """Place of each token in its sequence, from 0. Shape ``(n,)``, int64."""
        return (
            torch.arange(self.values.numel(), device=self.values.device)
            - (self.cu_seqlens.long()[self.segments])
        )

    def sum(self, token_weights: Tensor | None = None) -> Tensor:
        """Sum of each sequence, tokens weighted; an empty sequence gives 0. Shape ``(S,)``."""
        values = self.values if token_weights is None else self.values * token_weights
        return torch.segment_reduce(
            values, "sum", lengths=self.lengths.long(), unsafe=True, initial=0.0
        )


class _Batch:
    """What the three batches share: mapping a function over the tensors they hold."""

    kind: ClassVar[str]
    primary: ClassVar[str]
    """The field that gives the batch its size."""
    fields: ClassVar[dict[str, tuple[str, ...]]]
    """The fields each `needs` word stands for, beside the policy's own."""

    def map(self: _Self, function: Callable[[Tensor], Tensor]) -> _Self:
        """A batch with ``function`` applied to every tensor (of `Packed`, to the values)."""

        def apply(value: Any) -> Any:
            if isinstance(value, Packed):
                return Packed(function(value.values), value.cu_seqlens)
            return None if value is None else function(value)

        return type(self)(**{name: apply(value) for name, value in vars(self).items()})

    def pick(self: _Self, names: Iterable[str]) -> _Self:
        """A batch with these fields only, detached: what a state reads, ready to be gathered."""
        return type(self)(**{name: getattr(self, name) for name in names}).map(Tensor.detach)

    @property
    def exponent_limit(self) -> float:
        """Largest exponent whose value and gradient survive in the dtype of the inputs."""
        values = getattr(self, self.primary)
        return 11.0 if values is not None and values.dtype == torch.float16 else 80.0


@dataclass(frozen=True, eq=False)
class PairLogps(_Batch):
    """``B`` preference pairs, as log-probabilities in nats; a field not needed stays ``None``.

    Shapes are ``(B,)`` where a field's line says nothing. fp32 or float64; less is raised to fp32.
    """

    kind: ClassVar[str] = "pair"
    primary: ClassVar[str] = "chosen"
    fields: ClassVar[dict[str, tuple[str, ...]]] = {
        "ref": ("ref_chosen", "ref_rejected"),
        "refs": ("ref_chosen", "ref_rejected"),
        "lengths": ("chosen_lengths", "rejected_lengths"),
        "tokens": ("chosen_tokens", "rejected_tokens"),
        "ref_tokens": ("ref_chosen_tokens", "ref_rejected_tokens"),
        "third": ("third", "ref_third", "third_lengths"),
        "corrupted": ("corrupted", "ref_corrupted"),
        "scores": ("chosen_scores", "rejected_scores"),
        "margins": ("chosen_margins", "rejected_margins"),
        "prior": ("prior_chosen", "prior_rejected"),
        "log_sum_sq": ("chosen_log_sum_sq", "rejected_log_sum_sq"),
        "kl": ("chosen_kl", "rejected_kl"),
        "perturbed": ("chosen_plus", "rejected_plus", "chosen_minus", "rejected_minus"),
        "aux": ("chosen_aux", "rejected_aux", "values"),
        "prompt": ("prompt", "prompt_lengths"),
    }

    chosen: Tensor = _ABSENT
    rejected: Tensor = _ABSENT
    """Sum over the response's tokens of ``log pi``."""
    ref_chosen: Tensor = _ABSENT
    ref_rejected: Tensor = _ABSENT
    """The same under the reference; ``(K, B)`` for K references, the base first."""
    chosen_lengths: Tensor = _ABSENT
    rejected_lengths: Tensor = _ABSENT
    """Response tokens that count."""
    chosen_tokens: Packed = _ABSENT
    rejected_tokens: Packed = _ABSENT
    ref_chosen_tokens: Packed = _ABSENT
    ref_rejected_tokens: Packed = _ABSENT
    """Per-token log-probabilities."""
    third: Tensor = _ABSENT
    ref_third: Tensor = _ABSENT
    third_lengths: Tensor = _ABSENT
    """Another response to the prompt: the sample of SELM, XPO and VPO, the gold answer of TPO."""
    corrupted: Tensor = _ABSENT
    ref_corrupted: Tensor = _ABSENT
    """The chosen text given the corrupted context (mDPO)."""
    chosen_scores: Tensor = _ABSENT
    rejected_scores: Tensor = _ABSENT
    """External rewards; win probabilities for SPPO and Nash-MD."""
    chosen_margins: Tensor = _ABSENT
    rejected_margins: Tensor = _ABSENT
    """``(M, B)`` frozen rewards of the other objectives (MODPO)."""
    prior_chosen: Tensor = _ABSENT
    prior_rejected: Tensor = _ABSENT
    """``(R, B)`` sums under the policies of earlier rounds, the reference last (SPO)."""
    chosen_log_sum_sq: Tensor = _ABSENT
    rejected_log_sum_sq: Tensor = _ABSENT
    """Mean over the tokens of ``log sum_v p_v**2`` (WPO)."""
    chosen_kl: Tensor = _ABSENT
    rejected_kl: Tensor = _ABSENT
    """Sum over the tokens of ``KL(ref || policy)``, with gradient (TDPO)."""
    chosen_plus: Tensor = _ABSENT
    rejected_plus: Tensor = _ABSENT
    chosen_minus: Tensor = _ABSENT
    rejected_minus: Tensor = _ABSENT
    """Sums under logits ``(1 +- eps) z -+ eps z_ref``, no gradient (epsilon-DPO)."""
    chosen_aux: Tensor = _ABSENT
    rejected_aux: Tensor = _ABSENT
    """``(A, B)`` auxiliary rewards (HPO)."""
    values: Tensor = _ABSENT
    """Value of the prompt (HPO)."""
    prompt: Tensor = _ABSENT
    prompt_lengths: Tensor = _ABSENT
    """Sum of ``log pi`` over the prompt's tokens, and their number: only for
    ``nll_scope="all"``."""
    weights: Tensor = _ABSENT
    """Weight of the pair, applied by the caller, outside the loss."""

    @property
    def logratios(self) -> tuple[Tensor, Tensor]:
        """``(chosen - ref_chosen, rejected - ref_rejected)``."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """``(chosen - ref_chosen) - (rejected - ref_rejected)``."""
        chosen, rejected = self.logratios
        return chosen - rejected

    def rewards(self, beta: float) -> tuple[Tensor, Tensor]:
        """Implicit rewards ``beta * logratios``, detached: what is logged."""
        chosen, rejected = self.logratios
        return beta * chosen.detach(), beta * rejected.detach()


@dataclass(frozen=True, eq=False)
class UnpairedLogps(_Batch):
    """``N`` responses with a thumb up or down; shapes ``(N,)`` if a field's line says nothing."""

    kind: ClassVar[str] = "unpaired"
    primary: ClassVar[str] = "logps"
    fields: ClassVar[dict[str, tuple[str, ...]]] = {
        "ref": ("ref_logps",),
        "lengths": ("lengths",),
        "mismatched": ("kl_logps", "ref_kl_logps"),
        "scores": ("scores",),
        "values": ("values",),
        "aux": ("aux", "values"),
    }

    logps: Tensor = _ABSENT
    ref_logps: Tensor = _ABSENT
    labels: Tensor = _ABSENT
    """bool: desirable."""
    lengths: Tensor = _ABSENT
    kl_logps: Tensor = _ABSENT
    ref_kl_logps: Tensor = _ABSENT
    """``(M,)`` sums of responses that belong to another prompt."""
    scores: Tensor = _ABSENT
    values: Tensor = _ABSENT
    """Value of the prompt, with gradient where it is trained."""
    aux: Tensor = _ABSENT
    """``(A, N)`` auxiliary rewards."""
    weights: Tensor = _ABSENT

    @property
    def logratios(self) -> Tensor:
        """``logps - ref_logps``."""
        return self.logps - self.ref_logps

    def rewards(self, beta: float) -> Tensor:
        """Implicit rewards ``beta * logratios``, detached."""
        return beta * self.logratios.detach()


@dataclass(frozen=True, eq=False)
class GroupLogps(_Batch):
    """``K`` responses to each of ``B`` prompts; shapes ``(B, K)``, of the weights ``(B,)``."""

    kind: ClassVar[str] = "group"
    primary: ClassVar[str] = "logps"
    fields: ClassVar[dict[str, tuple[str, ...]]] = {
        "ref": ("ref_logps",),
        "lengths": ("lengths",),
        "scores": ("scores",),
    }

    logps: Tensor = _ABSENT
    ref_logps: Tensor = _ABSENT
    lengths: Tensor = _ABSENT
    scores: Tensor = _ABSENT
    mask: Tensor = _ABSENT
    """bool: a real response; absent means all."""
    weights: Tensor = _ABSENT

    @property
    def valid(self) -> Tensor:
        """``mask``, or all true."""
        return torch.ones_like(self.logps, dtype=torch.bool) if self.mask is None else self.mask

    @property
    def logratios(self) -> Tensor:
        """``logps - ref_logps``."""
        return self.logps - self.ref_logps

    def rewards(self, beta: float) -> Tensor:
        """Implicit rewards ``beta * logratios``, detached."""
        return beta * self.logratios.detach()


Batch = PairLogps | UnpairedLogps | GroupLogps
BATCHES: dict[str, type[PairLogps] | type[UnpairedLogps] | type[GroupLogps]] = {
    "pair": PairLogps,
    "unpaired": UnpairedLogps,
    "group": GroupLogps,
}

SOURCES: dict[str, str] = {
    "policy": "the policy's forward pass over the dataset's responses",
    "ref": "a reference model (`ref_model`), or columns `ref_chosen_logps`, `ref_rejected_logps` "
    "(unpaired and groups `ref_logps`)",
    "refs": "several reference models (`ref_models=[...]`, the base first)",
    "lengths": "the number of response tokens, counted when the batch is built",
    "tokens": "the policy's log-probs kept per token",
    "ref_tokens": "the reference's log-probs kept per token",
    "third": "another response to each prompt: the column `third` (or `reference`); with a "
    "reference in columns `ref_third_logps` too",
    "corrupted": "the chosen response scored again in a corrupted context, which a function makes "
    "of the prompt's token ids (`corrupt_context`); with a reference in columns "
    "`ref_corrupted_logps` too",
    "scores": "the columns `chosen_score`, `rejected_score` (unpaired `score`, groups `scores`)",
    "margins": "the columns `chosen_margins`, `rejected_margins`: one number per other objective",
    "prior": "the columns `prior_chosen`, `prior_rejected`: sums under each earlier policy",
    "log_sum_sq": "the head's statistic log sum p^2, averaged over the response",
    "kl": "the full-vocabulary KL(reference || policy), summed over the response",
    "perturbed": "log-probs under logits (1 +- epsilon) z -+ epsilon z_ref",
    "aux": "the columns `chosen_aux`, `rejected_aux` (unpaired `aux`) and `values`",
    "mismatched": "each prompt scored with another prompt's response, of the micro-batch of all "
    "ranks (two examples or more)",
    "values": "the column `values`: the value of each prompt, or a value head's output",
    "prompt": 'the prompt\'s log-probs, kept when `nll_scope` is "all"',
    "labels": "the column `label` (true: desirable)",
}
"""What provides each `needs` word: dataset column, option, or extra forward pass."""

_OPTIONAL = {"mask", "weights"}
_OWN_SIZE = {"kl_logps", "ref_kl_logps"}


class View:
    """A batch as one loss sees it: raised to at least fp32, checked where it is read.

    Derived properties work as on the batch; ``overrides`` replaces fields by name.
    """

    def __init__(
        self, batch: Any, reader: str, needs: Iterable[str] = (), **overrides: Tensor
    ) -> None:
        """See ``batch`` as ``reader`` does, whose name and ``needs`` the errors carry."""
        self._batch, self._reader, self._overrides = batch, reader, overrides
        self._needs = frozenset(needs)
        first = getattr(batch, batch.primary)
        self._dtype = _at_least_fp32(torch.float32 if first is None else first.dtype)
        self.exponent_limit = batch.exponent_limit

    def __getattr__(self, name: str) -> Any:
        """A field, raised to fp32 and checked, or a derived property computed from such fields."""
        derived = getattr(type(self._batch), name, None)
        if isinstance(derived, property):
            assert derived.fget is not None
            return derived.fget(self)
        if callable(derived):
            return partial(derived, self)
        value = self._overrides.get(name, getattr(self._batch, name))
        if value is None and name not in _OPTIONAL:
            raise ValueError(self._absent(name))
        return self._raised(name, value)

    def _absent(self, name: str) -> str:
        words = [word for word, names in self._batch.fields.items() if name in names]
        words.sort(key=lambda word: word not in self._needs)
        word = words[0] if words else "labels" if name == "labels" else "policy"
        kind = type(self._batch).__name__
        return f"{self._reader} needs {kind}.{name}, which is None; it comes from {SOURCES[word]}"

    def _raised(self, name: str, value: Any) -> Any:
        if isinstance(value, Packed):
            self._check(name, (value.cu_seqlens.numel() - 1,))
            return Packed(value.values.to(_at_least_fp32(value.values.dtype)), value.cu_seqlens)
        if value is None:
            return None
        self._check(name, tuple(value.shape))
        if value.dtype == torch.bool:
            return value
        return value.to(torch.promote_types(value.dtype, self._dtype))

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        first = getattr(self._batch, self._batch.primary)
        if first is None or name in _OWN_SIZE or name == "weights":
            return
        wanted = tuple(first.shape)
        if shape[-len(wanted) :] != wanted:
            raise ValueError(
                f"{self._reader}: {name} has shape {shape}, but {self._batch.primary} has {wanted};"
                " both must describe the same examples"
            )
        reference = name in ("ref_chosen", "ref_rejected")
        if reference and len(shape) > len(wanted) and "refs" not in self._needs:
            raise ValueError(
                f"{self._reader} takes one reference, {name} has {shape[0]}; use mrpo or multi_dpo,"
                " or pass one row"
            )


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
