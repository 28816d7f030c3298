"""What configures a preference run: transformers' ``TrainingArguments`` and TRL's field names.

A field that is None leaves the choice to the loss or to the machine. A key that does not exist is
an error that names the nearest one; keys of older TRL versions are understood, or refused by name.
"""

from __future__ import annotations

import difflib
import functools
import logging
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from transformers import TrainingArguments

logger = logging.getLogger("fastpref")

_Config = TypeVar("_Config", bound=type)

IGNORED = {
    "padding_value": "rows are packed, so the pad token is never trained on",
    "pad_token": "rows are packed, so the pad token is never trained on",
    "label_pad_token_id": "masked tokens are always -100",
    "use_logits_to_keep": "prompt tokens never reach the head",
    "use_num_logits_to_keep": "prompt tokens never reach the head",
    "overwrite_output_dir": "checkpoints are written beside old ones",
    "base_model_attribute_name": "the head is found by get_output_embeddings()",
}
REFUSED = {
    "generate_during_eval": "use a callback that generates, such as trl.LogCompletionsCallback",
    "is_encoder_decoder": "encoder-decoder models are not supported",
    "model_adapter_name": "pass a PeftModel; the reference is its adapter as it was at the start",
    "ref_adapter_name": "pass a PeftModel; the reference is its adapter as it was at the start",
    "force_use_ref_model": "pass ref_model to the trainer; it is then used",
    "ref_model_init_kwargs": "load the reference yourself and pass it to the trainer as ref_model",
    "tools": "give the dataset a column 'tools'",
}


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


def translate(given: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """``given`` with keys of older versions turned into today's.

    Args:
        given: Keyword arguments of a config.
        known: Names of its fields.

    Returns:
        Keyword arguments that are all in ``known``.

    Raises:
        ValueError: a key is refused (the message says what to do instead), or two contradict.
        TypeError: a key is unknown; the message names the nearest.
    """
    given = dict(given)
    for name in set(given) & set(IGNORED) - set(known):
        logger.info("%s is not needed and has no effect: %s", name, IGNORED[name])
        del given[name]
    if (alpha := given.pop("rpo_alpha", None)) is not None:
        if "loss_weights" in given or len(_as_list(given.get("loss_type", "dpo"))) > 1:
            raise ValueError(
                "rpo_alpha together with several losses: write the sum as "
                "loss_type=['sigmoid', 'sft'], loss_weights=[1.0, rpo_alpha]"
            )
        given["loss_type"] = [*_as_list(given.get("loss_type", "dpo")), "sft"]
        given["loss_weights"] = [1.0, alpha]
        given.setdefault("nll_reduction", "tokens")
    if given.pop("group_by_length", False):
        given["train_sampling_strategy"] = "group_by_length"
    for name in given:
        if name in known:
            continue
        if name in REFUSED:
            raise ValueError(f"{name} is not an option: {REFUSED[name]}")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"there is no option {name!r}.{hint}")
    return given


def native_bf16() -> bool:
    """Whether the accelerator in use computes in bf16 itself; false on a CPU, where it is slow."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return hasattr(torch, "xpu") and torch.xpu.is_available()


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


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
        None, "Keyword arguments for from_pretrained, where the model is given by name."
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
    padding_free: bool = _option(True, "Accepted for TRL's sake: rows are always packed.")
    pad_to_multiple_of: int | str | None = _option(
        "auto", "Pad rows to a multiple of this many tokens. 'auto': no."
    )
    prefix_sharing: bool = _option(True, "Hold the prompt of a pair once, for both responses.")
    packing: bool = _option(
        True, "Lay several sequences in a row. Models that cannot are found by the self-check."
    )
    max_tokens_per_batch: int | None = _option(
        None, "Longest packed row, in tokens. None: max_length."
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
        choices=["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
    )
    f_alpha_divergence_coef: float = _option(0.5, "Alpha of alpha_divergence.")
    ld_alpha: float | None = _option(
        None, "Weight of the tokens beyond the shorter response's length (LD-DPO). None: 1."
    )
    use_weighting: bool = _option(False, "Weigh pairs by the policy's probability (WPO).")
    discopop_tau: float | None = _option(None, "Temperature of discopop. None: the loss's own.")
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
        self.loss_type = _as_list(self.loss_type)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and native_bf16()
        if getattr(self, "activation_checkpointing", True) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.pad_to_multiple_of in ("auto", "none", "None"):
            self.pad_to_multiple_of = None
        elif self.pad_to_multiple_of is not None:
            self.pad_to_multiple_of = int(self.pad_to_multiple_of)
        super().__post_init__()
        if self.activation_offloading:
            if not self.gradient_checkpointing:
                raise ValueError("activation_offloading needs gradient_checkpointing=True")
            kwargs = {
                **(getattr(self, "gradient_checkpointing_kwargs", None) or {}),
                "offload": True,
            }
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs = kwargs
        if self.use_liger_kernel:
            # Liger's fused cross-entropy replaces the forward whose head this library takes over.
            without = {"fused_linear_cross_entropy": False}
            given = getattr(self, "liger_kernel_config", None) or {}
            self.liger_kernel_config = {**given, **without}
        self._check()

    def loss_options(self) -> dict[str, tuple[str, Any]]:
        """Options that are arguments of losses: their name there, and the value or None."""
        names = {
            "reverse_kl": None,
            "forward_kl": "forward_kl",
            "js_divergence": "js",
            "alpha_divergence": "alpha",
        }
        if self.f_divergence_type not in names:
            raise ValueError(
                f"f_divergence_type={self.f_divergence_type!r}: expected one of {list(names)}"
            )
        divergence = names[self.f_divergence_type]
        alpha = self.f_alpha_divergence_coef if divergence == "alpha" else None
        return {
            "label_smoothing": ("label_smoothing", self.label_smoothing),
            "f_divergence_type": ("f_divergence", divergence),
            "f_alpha_divergence_coef": ("f_alpha", alpha),
            "use_weighting": ("weighting", "wpo" if self.use_weighting else None),
            "discopop_tau": ("tau", self.discopop_tau),
            "nll_reduction": ("nll_reduction", self.nll_reduction),
            "nll_scope": ("nll_scope", self.nll_scope),
        }

    def _check(self) -> None:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} numbers for {len(self.loss_type)} "
                f"losses {self.loss_type}; give one each"
            )
        if self.ld_alpha is not None and not 0.0 <= self.ld_alpha <= 1.0:
            raise ValueError(f"ld_alpha must be in [0, 1], got {self.ld_alpha}")
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(
                f"truncation_mode must be 'keep_start' or 'keep_end', got {self.truncation_mode!r}"
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


@config
class KTOConfig(PreferenceConfig):
    """:class:`PreferenceConfig` with TRL 1.16's defaults for KTO, except that data is shuffled."""

    loss_type: str | list[str] = _option(["kto"], "kto, apo_zero_unpaired or bco.")
    beta: float | None = _option(0.1, "Strength of the reference.")
    desirable_weight: float = _option(1.0, "Weight of desirable responses.")
    undesirable_weight: float = _option(1.0, "Weight of undesirable responses.")

    def loss_options(self) -> dict[str, tuple[str, Any]]:
        """See :meth:`PreferenceConfig.loss_options`."""
        own = ("desirable_weight", "undesirable_weight")
        return super().loss_options() | {name: (name, getattr(self, name)) for name in own}


_CPO_LOSSES = {"sigmoid": "cpo", "cpo": "cpo", "simpo": "cpo_simpo", "alphapo": "alphapo"}


@config
class CPOConfig(PreferenceConfig):
    """:class:`PreferenceConfig` with the options and defaults of TRL 1.16's ``CPOConfig``."""

    loss_type: str | list[str] = _option(["sigmoid"], "sigmoid (CPO), simpo or alphapo.")
    beta: float | None = _option(0.1, "Scale of the log-probabilities.")
    label_smoothing: float | None = _option(0.0, "Probability that a preference is wrong.")
    nll_reduction: str | None = _option("tokens", "Mean of the likelihood term.")
    cpo_alpha: float = _option(1.0, "Weight of the likelihood term.")
    simpo_gamma: float = _option(0.5, "Target margin of simpo and alphapo.")
    alpha: float = _option(0.0, "Shape of AlphaPO's reward; 0: the mean log-probability.")

    def __post_init__(self) -> None:
        """Turn TRL's names of the losses into ours."""
        names = _as_list(self.loss_type)
        if unknown := [name for name in names if name not in _CPO_LOSSES]:
            raise ValueError(
                f"loss_type={unknown[0]!r}: CPOConfig has {', '.join(_CPO_LOSSES)}; for other "
                "losses without a reference use PreferenceConfig"
            )
        names = ["alphapo" if self.alpha else _CPO_LOSSES[name] for name in names]
        if self.alpha and self.cpo_alpha not in (0.0, 1.0):
            raise ValueError("alpha (AlphaPO) has no likelihood term: set cpo_alpha=0")
        self.loss_type = list(dict.fromkeys(names))
        super().__post_init__()

    def loss_options(self) -> dict[str, tuple[str, Any]]:
        """See :meth:`PreferenceConfig.loss_options`."""
        return super().loss_options() | {
            "cpo_alpha": ("nll_weight", self.cpo_alpha),
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
