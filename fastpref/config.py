"""What configures a preference run: transformers' ``TrainingArguments`` and TRL's field names.

A field that is None leaves the choice to the loss or to the machine.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from transformers import TrainingArguments

from fastpref.keys import as_list, translate

_Config = TypeVar("_Config", bound=type)


def _option(default: Any, help: str, **metadata: Any) -> Any:
    metadata["help"] = help
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def config(cls: _Config) -> _Config:
    """The class as a dataclass whose constructor explains keys it does not know."""
    made: Any = dataclass(cls)
    build = made.__init__

    @functools.wraps(build)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **translate(kwargs, [f.name for f in fields(made) if f.init]))

    made.__init__ = init
    return made  # type: ignore[no-any-return]


def native_bf16() -> bool:
    """Whether the accelerator in use computes in bf16 itself; false on a CPU, where it is slow."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return hasattr(torch, "xpu") and torch.xpu.is_available()


_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_tokens_per_batch": 1,
    "pad_to_multiple_of": 1,
    "max_bad_rows": 0,
    "precompute_ref_batch_size": 1,
    "ref_model_sync_steps": 1,
}


_DIVERGENCES = {
    "reverse_kl": None,
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}
"""TRL's name of a divergence, and the losses' own."""


def _whole(value: int | str, name: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name}={value!r}: expected a whole number, or 'none'") from None


@config
class PreferenceConfig(TrainingArguments):  # type: ignore[misc]
    """Options of :class:`fastpref.PreferenceTrainer`: ``TrainingArguments``, TRL 1.16's, and ours.

    Losses: ``loss_type`` names one or several (``fastpref losses`` lists them), ``loss_weights``
    weighs them, ``loss_args`` sets their hyper-parameters, flat for one loss and ``{name: {...}}``
    for several. ``beta`` and the other shared hyper-parameters go to every loss that has them.

    Raises:
        ValueError: options contradict each other or are out of range.
        TypeError: there is no such option.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "loss_args",
    ]

    # TrainingArguments' own, with other defaults
    learning_rate: float = _option(1e-6, "Initial learning rate of AdamW.")
    logging_steps: float = _option(10, "Log every so many optimiser steps.")
    gradient_checkpointing: bool | None = _option(True, "Recompute activations in the backward.")
    bf16: bool | None = _option(
        None, "Mixed precision in bf16. None: where the device computes in bf16 itself."
    )
    logging_nan_inf_filter: bool = _option(
        False,
        "Hide non-finite losses from the log. Training stops at one, and hiding costs a sync.",
    )
    report_to: None | str | list[str] = _option(  # noqa: RUF036 - HfArgumentParser wants this order
        "none", "Where to report metrics."
    )

    # the model
    model_init_kwargs: dict[str, Any] | str | None = _option(
        None,
        "Keyword arguments for from_pretrained, where the model is given by name; its tokenizer "
        "takes the revision.",
    )
    trust_remote_code: bool = _option(False, "Run Python code that ships with a model.")
    router_aux_loss_coef: float | None = _option(
        None, "Weight of a mixture of experts' load-balancing loss. None: its config's; 0: none."
    )
    disable_dropout: bool = _option(True, "Turn dropout off in policy and reference.")
    activation_offloading: bool = _option(False, "Keep checkpointed activations in host memory.")

    # the data
    dataset_num_proc: int | None = _option(None, "Processes that tokenise.")
    max_length: int | None = _option(1024, "Longest prompt + response, in tokens. None: no limit.")
    max_prompt_length: int | None = _option(None, "Longest prompt, in tokens; its end is kept.")
    max_completion_length: int | None = _option(None, "Longest response; its start is kept.")
    truncation_mode: str = _option(
        "keep_start", "Side that is kept at max_length.", choices=["keep_start", "keep_end"]
    )
    max_bad_rows: int | None = _option(
        None, "Stop if more dataset rows than this cannot be trained on. None: any number."
    )
    assistant_only_loss: bool = _option(
        False, "Of responses of several turns, score what the assistant says alone."
    )
    padding_free: bool = _option(True, "Accepted for TRL's sake: rows are always packed.")
    pad_to_multiple_of: int | str | None = _option(
        "auto",
        "Pad rows to a multiple of this many tokens. 'auto': 128 for FlexAttention, else no.",
    )
    prefix_sharing: bool = _option(True, "Hold the prompt of a pair once, for both responses.")
    packing: bool = _option(
        True, "Lay several sequences in a row. Models that cannot are found by the self-check."
    )
    max_tokens_per_batch: int | None = _option(
        None, "Most tokens of a packed row; a longer pair has its own. None: what costs least."
    )

    train_sampling_strategy: str = _option(
        "random",
        "Order of the data: even_tokens makes steps and micro-batches of nearly the same number of "
        "tokens, group_by_length of examples of nearly the same length.",
        choices=["random", "sequential", "even_tokens", "group_by_length", "batch_rebalance"],
    )

    # the loss
    loss_type: str | list[str] = _option(["dpo"], "Loss, or losses to add up.")
    loss_weights: list[float] | None = _option(None, "Weight of each loss. None: 1 each.")
    loss_args: dict[str, Any] | str | None = _option(
        None, "Hyper-parameters of the loss; of several losses, a dict for each by name."
    )
    beta: float | None = _option(None, "Strength of the reference. None: the loss's own default.")
    label_smoothing: float | None = _option(
        None, "Probability that a preference is wrong (cDPO, robust, EXO). None: the loss's own."
    )
    f_divergence_type: str = _option(
        "reverse_kl",
        "Divergence from the reference.",
        choices=list(_DIVERGENCES),
    )
    f_alpha_divergence_coef: float = _option(0.5, "Alpha of alpha_divergence.")
    ld_alpha: float | None = _option(
        None, "Weight of the tokens beyond the shorter response's length (LD-DPO). None: 1."
    )
    use_weighting: bool = _option(False, "Weigh pairs by the policy's probability (WPO).")
    discopop_tau: float | None = _option(None, "Temperature of discopop. None: the loss's own.")
    desirable_weight: float | None = _option(None, "Weight of desirable responses. None: 1.")
    undesirable_weight: float | None = _option(None, "Weight of undesirable responses. None: 1.")
    nll_reduction: str | None = _option(
        None, "Mean of a likelihood term over 'example' or 'tokens'. None: the loss's own."
    )
    nll_scope: str | None = _option(
        None, "Tokens of a likelihood term: 'response' or 'all'. None: the loss's own."
    )

    # the reference
    reference_free: bool = _option(False, "Take the reference's log-probabilities as 0.")
    ref_models: list[str] | None = _option(
        None, "Several references by name or path, the base first (MRPO, multi-DPO)."
    )
    precompute_ref_log_probs: bool = _option(
        False, "Score the data with the reference once, before training, then free it."
    )
    ref_cache_dir: str = _option(
        "auto", "Where precomputed log-probs are kept. auto: $FASTPREF_CACHE/reference; none: not."
    )
    precompute_ref_batch_size: int | None = _option(
        None, "Pairs at a time while precomputing. None: the training batch size."
    )
    sync_ref_model: bool = _option(False, "Move the reference towards the policy while training.")
    ref_model_mixup_alpha: float = _option(0.6, "Share of the policy in each such move.")
    ref_model_sync_steps: int = _option(512, "Optimiser steps between such moves.")

    # the head and the checks
    backend: str = _option("auto", "Backend of the fused head: auto, cpp, triton, cuda, torch.")
    head_memory_budget: int | None = _option(None, "Bytes for tiles of logits. None: the op's own.")
    self_check: bool = _option(
        True, "Before training, compare the fused head and the reference with the model itself."
    )

    def __post_init__(self) -> None:
        """Resolve what depends on the machine and check what contradicts itself."""
        self.loss_type = as_list(self.loss_type)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and native_bf16()
        if getattr(self, "activation_checkpointing", True) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.pad_to_multiple_of in ("auto", "none", "None"):
            self.pad_to_multiple_of = None if self.pad_to_multiple_of == "auto" else 1
        elif self.pad_to_multiple_of is not None:
            self.pad_to_multiple_of = _whole(self.pad_to_multiple_of, "pad_to_multiple_of")
        super().__post_init__()
        if self.activation_offloading:
            if not self.gradient_checkpointing:
                raise ValueError("activation_offloading needs gradient_checkpointing=True")
            kwargs = dict(getattr(self, "gradient_checkpointing_kwargs", None) or {}, offload=True)
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs = kwargs
        if self.use_liger_kernel:
            # Liger's fused cross-entropy replaces the forward whose head this library takes over.
            without = {"fused_linear_cross_entropy": False}
            given = getattr(self, "liger_kernel_config", None) or {}
            self.liger_kernel_config = {**given, **without}
        self._check()

    def head_options(self) -> dict[str, Any]:
        """Keyword arguments of :func:`fastpref.policy.response_logps`."""
        return {"backend": self.backend, "memory_budget": self.head_memory_budget}

    def loss_options(self) -> dict[str, tuple[str, Any]]:
        """Options that are arguments of losses: their name there, and the value or None."""
        divergence = _DIVERGENCES[self.f_divergence_type]
        alpha = self.f_alpha_divergence_coef if divergence == "alpha" else None
        return {
            "label_smoothing": ("label_smoothing", self.label_smoothing),
            "f_divergence_type": ("f_divergence", divergence),
            "f_alpha_divergence_coef": ("f_alpha", alpha),
            "use_weighting": ("weighting", "wpo" if self.use_weighting else None),
            "discopop_tau": ("tau", self.discopop_tau),
            "desirable_weight": ("desirable_weight", self.desirable_weight),
            "undesirable_weight": ("undesirable_weight", self.undesirable_weight),
            "nll_reduction": ("nll_reduction", self.nll_reduction),
            "nll_scope": ("nll_scope", self.nll_scope),
        }

    def _check(self) -> None:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} numbers for {len(self.loss_type)} "
                f"losses {self.loss_type}; give one each"
            )
        for name in ("loss_args", "model_init_kwargs"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name}={value!r}: expected a JSON object in braces")
        for name, low in _LEAST.items():
            if (value := getattr(self, name)) is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if self.num_train_epochs < 0 and self.max_steps <= 0:
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs} and max_steps={self.max_steps} train "
                "nothing: make one of them positive"
            )
        for name in ("ld_alpha", "ref_model_mixup_alpha"):
            if (share := getattr(self, name)) is not None and not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        for name in ("truncation_mode", "f_divergence_type", "train_sampling_strategy"):
            words = PreferenceConfig.__dataclass_fields__[name].metadata["choices"]
            if (word := getattr(self, name)) not in words:
                raise ValueError(f"{name} must be {' or '.join(map(repr, words))}, got {word!r}")
        alpha = self.f_alpha_divergence_coef
        if (
            self.f_divergence_type != "alpha_divergence"
            and alpha != type(self).f_alpha_divergence_coef
        ):
            raise ValueError(
                f"f_alpha_divergence_coef={alpha} has no effect with "
                f"f_divergence_type={self.f_divergence_type!r}: set 'alpha_divergence', or drop it"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor smooths token labels and has no meaning here; for noisy "
                "preferences use label_smoothing"
            )
        if self.reference_free and (self.sync_ref_model or self.precompute_ref_log_probs):
            raise ValueError(
                "reference_free=True has no reference to precompute or to move: drop "
                "precompute_ref_log_probs and sync_ref_model"
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model moves the reference while training, precompute_ref_log_probs fixes "
                "its numbers before; choose one"
            )


@config
class DPOConfig(PreferenceConfig):
    """:class:`PreferenceConfig` with the defaults of TRL 1.16's ``DPOConfig``."""

    loss_type: str | list[str] = _option(["sigmoid"], "Loss, or losses to add up.")
    beta: float | None = _option(0.1, "Strength of the reference.")
    label_smoothing: float | None = _option(0.0, "Probability that a preference is wrong.")
    nll_reduction: str | None = _option("tokens", "Mean of a likelihood term.")
    discopop_tau: float | None = _option(0.05, "Temperature of discopop.")


@config
class KTOConfig(PreferenceConfig):
    """:class:`PreferenceConfig` with TRL 1.16's defaults for KTO, except that data is shuffled."""

    loss_type: str | list[str] = _option(["kto"], "kto, apo_zero_unpaired or bco.")
    beta: float | None = _option(0.1, "Strength of the reference.")
    desirable_weight: float | None = _option(1.0, "Weight of desirable responses.")
    undesirable_weight: float | None = _option(1.0, "Weight of undesirable responses.")


_CPO_LOSSES = {
    "sigmoid": "cpo",
    "cpo": "cpo",
    "simpo": "cpo_simpo",
    "alphapo": "alphapo",
    "hinge": "hinge",
    "ipo": "ipo",
}


@config
class CPOConfig(PreferenceConfig):
    """:class:`PreferenceConfig` with the options and defaults of TRL 1.16's ``CPOConfig``."""

    loss_type: str | list[str] = _option(
        ["sigmoid"], "sigmoid (CPO), simpo, alphapo, hinge or ipo."
    )
    beta: float | None = _option(0.1, "Scale of the log-probabilities.")
    label_smoothing: float | None = _option(0.0, "Probability that a preference is wrong.")
    nll_reduction: str | None = _option("tokens", "Mean of the likelihood term.")
    cpo_alpha: float = _option(1.0, "Weight of the likelihood term.")
    simpo_gamma: float = _option(0.5, "Target margin of simpo and alphapo.")
    alpha: float = _option(0.0, "Shape of AlphaPO's reward; 0: the mean log-probability.")

    def __post_init__(self) -> None:
        """Turn TRL's names of the losses into ours."""
        names = as_list(self.loss_type)
        if unknown := [name for name in names if name not in _CPO_LOSSES]:
            raise ValueError(
                f"loss_type={unknown[0]!r}: CPOConfig has {', '.join(_CPO_LOSSES)}; for other "
                "losses without a reference use PreferenceConfig"
            )
        if {"hinge", "ipo"}.intersection(names):
            # These two take no likelihood term themselves, and their reference is none.
            if len(names) > 1 or self.loss_weights is not None:
                raise ValueError(
                    f"CPOConfig's {names[0]} stands alone, its likelihood term weighed by "
                    "cpo_alpha; for other sums use PreferenceConfig with reference_free=True"
                )
            self.reference_free = True
            if self.cpo_alpha:
                names, self.loss_weights = [*names, "sft"], [1.0, self.cpo_alpha]
        names = [_CPO_LOSSES.get(name, name) for name in names]
        if self.alpha and names != ["alphapo"]:
            raise ValueError(
                f"alpha is the shape of AlphaPO's reward, and loss_type is {names}: set "
                "loss_type='alphapo', or alpha=0 (TRL shapes the sums of 'sigmoid', and keeps the "
                "likelihood term of both)"
            )
        self.loss_type = list(dict.fromkeys(names))
        super().__post_init__()

    def loss_options(self) -> dict[str, tuple[str, Any]]:
        """See :meth:`PreferenceConfig.loss_options`."""
        apart = {"hinge", "ipo"}.intersection(self.loss_type)
        return super().loss_options() | {
            "cpo_alpha": ("nll_weight", None if apart else self.cpo_alpha),
            "simpo_gamma": ("gamma", self.simpo_gamma),
            "alpha": ("alpha", self.alpha),
        }


@config
class ORPOConfig(PreferenceConfig):
    """:class:`PreferenceConfig` with the defaults of TRL 1.16's ``ORPOConfig``."""

    loss_type: str | list[str] = _option(["orpo"], "Loss.")
    beta: float | None = _option(0.1, "Weight of the odds ratio (lambda in the paper).")
    nll_reduction: str | None = _option("tokens", "Mean of the likelihood term.")
    nll_scope: str | None = _option("all", "Tokens of the likelihood term: prompt and response.")
