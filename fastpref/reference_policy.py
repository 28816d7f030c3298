"""The policy that does not train: adapters switched off, a frozen copy, several, stored, or none.

Every kind answers one question: the log-probability of each response token of a batch.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from fastpref.heads import Head, causal_lm, evaluating
from fastpref.models import load_model
from fastpref.objective import FROM_REFERENCE
from fastpref.policy import Batch, ResponseLogps, response_logps
from fastpref.ref_columns import stand_in
from fastpref.ref_tokenizers import check_texts_do, tokenizers_of
from fastpref.reference_cache import identity
from fastpref.zero import divided, frozen_engine

logger = logging.getLogger("fastpref")

Inspect = Callable[[Head], Any]

ADAPTER = "ref"
"""Name of the frozen copy of a PEFT model's adapter."""


class Reference:
    """Base of the references; itself the one that a reference-free loss has: none at all."""

    is_start = False
    """It is the policy as it was when the run began: before the first step every margin is 0."""
    count = 0
    """Number of references."""
    models: Sequence[nn.Module] = ()
    """Models of its own."""
    live = False
    """It is a model that runs, not numbers."""
    reads_texts = False
    """A model of it has a tokenizer of its own, so that it scores texts, before training."""

    def __init__(self, **options: Any) -> None:
        """See the class."""
        self.options = options

    def score(
        self, policy: nn.Module, batch: Batch, inspect: Inspect | None = None
    ) -> ResponseLogps | None:
        """Log-probability of each response token; ``(n,)``, several references ``(K, n)``.

        Args:
            policy: The model that trains, as wrapped for training.
            batch: On the policy's device.
            inspect: As in :func:`fastpref.policy.response_logps`; of several, the first's.

        Returns:
            fp32, no gradient; None where the batch holds no more than sums, or nothing.
        """
        return None

    def place(self, accelerator: Any) -> None:
        """Move its models to their device, sharded where the policy will be."""

    def identities(self, policy: nn.Module, precision: str) -> list[dict[str, Any]]:
        """What decides the numbers of each reference: :func:`fastpref.reference_cache.identity`.

        Args:
            policy: The model that trains, before it has.
            precision: Of autocast.
        """
        return []

    @torch.no_grad()
    def _score(self, model: nn.Module, batch: Batch, inspect: Inspect | None) -> ResponseLogps:
        with evaluating(model):
            return response_logps(model, batch, inspect=inspect, **self.options)


class Zero(Reference):
    """A reference that finds every response equally likely: log-probability 0."""

    count = 1

    def score(
        self, policy: nn.Module, batch: Batch, inspect: Inspect | None = None
    ) -> ResponseLogps:
        """Zeros."""
        return ResponseLogps(torch.zeros_like(batch["response_targets"], dtype=torch.float32))


class Stored(Reference):
    """Numbers that come with the data: per token where they were computed here, else sums.

    Args:
        count: Number of references in them.
    """

    def __init__(self, count: int = 1) -> None:
        """See the class."""
        super().__init__()
        self.count = count

    def score(
        self, policy: nn.Module, batch: Batch, inspect: Inspect | None = None
    ) -> ResponseLogps | None:
        """The batch's ``ref_token_logps``, if it has them."""
        return ResponseLogps(batch["ref_token_logps"]) if "ref_token_logps" in batch else None


class Start(Reference):
    """The policy itself, to score the data with before it trains; no copy is needed for that.

    Args:
        **options: ``backend`` and ``memory_budget`` of the head.
    """

    is_start = True
    count = 1
    live = True

    def score(
        self, policy: nn.Module, batch: Batch, inspect: Inspect | None = None
    ) -> ResponseLogps:
        """One forward of the policy."""
        return self._score(policy, batch, inspect)

    def identities(self, policy: nn.Module, precision: str) -> list[dict[str, Any]]:
        """See :meth:`Reference.identities`."""
        return [identity(policy, precision)]


class AdapterOff(Reference):
    """The policy's own weights under its adapters, or under its adapters as they were at the start.

    Args:
        adapter: Name of the adapter to use instead; None switches all off.
        **options: ``backend`` and ``memory_budget`` of the head.
    """

    is_start = True
    count = 1
    live = True

    def __init__(self, adapter: str | None = None, **options: Any) -> None:
        """See the class."""
        super().__init__(**options)
        self.adapter = adapter

    def score(
        self, policy: nn.Module, batch: Batch, inspect: Inspect | None = None
    ) -> ResponseLogps:
        """One forward of the policy with the adapters switched."""
        with _adapters(peft_model(policy), self.adapter):
            return self._score(policy, batch, inspect)

    def identities(self, policy: nn.Module, precision: str) -> list[dict[str, Any]]:
        """See :meth:`Reference.identities`."""
        model = peft_model(policy)
        assert model is not None
        return [identity(model, precision, () if self.adapter is None else (self.adapter,))]


class Frozen(Reference):
    """Models of their own, which never train.

    Args:
        models: One, or several with the base first.
        is_start: The only one is a copy of the policy.
        tokenizers: One for each, None for those that read the policy's token ids; empty: all do.
        **options: ``backend`` and ``memory_budget`` of the head.
    """

    live = True

    def __init__(
        self,
        models: Sequence[nn.Module],
        *,
        is_start: bool = False,
        tokenizers: Sequence[Any] = (),
        **options: Any,
    ) -> None:
        """See the class."""
        super().__init__(**options)
        self.models = [model.requires_grad_(False).eval() for model in models]
        self.is_start, self.count = is_start, len(models)
        self.tokenizers = list(tokenizers) or [None] * len(models)
        self.reads_texts = any(tokenizer is not None for tokenizer in self.tokenizers)

    def each(self) -> list[Frozen]:
        """Each of its models as a reference by itself."""
        return [Frozen([model], **self.options) for model in self.models]

    def score(
        self, policy: nn.Module, batch: Batch, inspect: Inspect | None = None
    ) -> ResponseLogps:
        """A forward of each."""
        first, *others = [self._score(model, batch, inspect) for model in self.models]
        logps = [first.logps, *(other.logps for other in others)]
        return first._replace(logps=torch.stack(logps)) if others else first

    def place(self, accelerator: Any) -> None:
        """See :meth:`Reference.place`."""
        plugin = accelerator.state.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            self.models = [frozen_engine(m, plugin.deepspeed_config) for m in self.models]
        elif accelerator.is_fsdp2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            self.models = [fsdp2_prepare_model(accelerator, model) for model in self.models]
        else:
            prepare = accelerator.prepare_model
            self.models = [prepare(model, evaluation_mode=True) for model in self.models]

    def identities(self, policy: nn.Module, precision: str) -> list[dict[str, Any]]:
        """See :meth:`Reference.identities`."""
        return [identity(model, precision) for model in self.models]


def frozen_copy(model: nn.Module, **options: Any) -> Frozen:
    """A deep copy of the model as it is now: never a reload by name, which may be another model."""
    return Frozen([copy.deepcopy(model)], is_start=True, **options)


def peft_model(model: nn.Module) -> nn.Module | None:
    """The PEFT model inside its wrappers, or None."""
    while not hasattr(model, "get_base_model"):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    return model


@contextmanager
def _adapters(model: Any, adapter: str | None) -> Iterator[None]:
    if adapter is None:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapter
    model.set_adapter(adapter)
    try:
        yield
    finally:
        model.set_adapter(active)


def keep_start_adapter(model: Any) -> str:
    """Copy the active adapter of a PEFT model into a frozen one, and return that one's name."""
    active = model.active_adapter
    model.add_adapter(ADAPTER, model.peft_config[active])
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parts = name.split(".")
            if active in parts:
                twin = ".".join(ADAPTER if part == active else part for part in parts)
                weights[twin].copy_(weight)
    model.set_adapter(active)
    return ADAPTER


def base_trains(model: Any) -> bool:
    """Whether weights train that switching the adapters off does not bring back."""
    own = (getattr(model.base_model, "prefix", "lora_"), "modules_to_save", "trainable_tokens")
    return any(
        p.requires_grad and not any(o in n for o in own) for n, p in model.named_parameters()
    )


def choose_reference(
    model: Any,
    given: Any,
    args: Any,
    combined: Any,
    columns: Collection[str],
    fresh: bool,
    tokenizer: Any = None,
    own_tokenizers: Any = None,
    stored: int = 1,
) -> Reference:
    """The reference that a trainer's arguments and data ask for.

    Args:
        model: The policy.
        given: ``ref_model``: a model, a name, a list of them, or None.
        args: A :class:`fastpref.PreferenceConfig`.
        combined: The losses.
        columns: Of the dataset as given.
        fresh: The policy's adapter was added just now, so switching it off gives the start.
        tokenizer: Of the policy; None: every reference is taken to have the same.
        own_tokenizers: ``ref_processing_class``: of ``given``, as :func:`tokenizers_of` takes them.
        stored: Number of references whose log-probabilities the dataset's columns hold.

    Raises:
        ValueError: The reference is the policy itself, cannot move as ``sync_ref_model`` asks, or
            has another tokenizer where the loss needs the policy's token ids.
    """
    given = args.ref_models if given is None else given
    if args.reference_free and given is None:
        return Zero()
    if not combined.needs & FROM_REFERENCE:
        if given is not None:
            logger.warning(
                "%s needs no reference: ref_model is not used", ", ".join(combined.names)
            )
        return Reference()
    options = args.head_options()
    adapter_off = hasattr(model, "peft_config") and not base_trains(model)
    if given is not None:
        listed = list(given) if isinstance(given, (list, tuple)) else [given]
        tokenizers = (
            [] if tokenizer is None else tokenizers_of(listed, own_tokenizers, tokenizer, args)
        )
        if any(one is not None for one in tokenizers):
            check_texts_do(combined.needs, combined.kind, args)
        models = [
            load_model(m, args, dtype=causal_lm(model).dtype) if isinstance(m, str) else m
            for m in listed
        ]
        if any(m is model for m in models):
            raise ValueError(
                "ref_model is the model itself and would train with it; leave ref_model out to use "
                "a copy of the model as it is now"
            )
        reference: Reference = Frozen(models, tokenizers=tokenizers, **options)
    elif stand_in(columns, combined.kind):
        logger.info("the reference's log-probs come from the dataset's columns")
        reference = Stored(stored)
    elif divided(model) and (args.precompute_ref_log_probs or not adapter_off):
        raise ValueError(
            "DeepSpeed ZeRO-3 has divided the model as it was loaded, so that the reference can be "
            "no copy of it, and it cannot score the data before training: pass ref_model by name, "
            "or train an adapter without precompute_ref_log_probs"
        )
    elif adapter_off:
        reference = AdapterOff(None if fresh else keep_start_adapter(model), **options)
    elif args.precompute_ref_log_probs:
        reference = Start(**options)
    else:
        reference = frozen_copy(model, **options)
    if args.sync_ref_model and hasattr(model, "peft_config"):
        raise ValueError(
            "sync_ref_model moves a full copy of the policy, and this one trains an adapter: leave "
            "it out"
        )
    if args.sync_ref_model and len(reference.models) != 1:
        raise ValueError(
            "sync_ref_model moves one reference model of its own, and this run has none "
            "(stored log-probs) or several: pass one ref_model, or set sync_ref_model=False"
        )
    if args.sync_ref_model and is_deepspeed_zero3_enabled():
        raise ValueError("sync_ref_model cannot move weights that DeepSpeed ZeRO-3 has divided")
    if args.ld_alpha is not None and type(reference) is Stored:
        raise ValueError(
            "ld_alpha weighs the reference's tokens, and the dataset's ref_*_logps columns hold "
            "sums: remove those columns"
        )
    return reference
