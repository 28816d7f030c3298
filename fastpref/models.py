"""Models by name, as a trainer wants them: dtype, adapters, dropout."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from fastpref.config import native_bf16
from fastpref.heads import causal_lm

logger = logging.getLogger("fastpref")


def load_model(name: str, args: Any, *, frozen: bool = False, **options: Any) -> Any:
    """A causal language model by name or path; safetensors and no remote code unless asked.

    Args:
        name: As for ``from_pretrained``.
        args: A :class:`fastpref.PreferenceConfig`; its ``model_init_kwargs`` go first.
        frozen: The weights will not train, so bf16 is enough where the device has it. Weights that
            train are fp32: at usual learning rates bf16 rounds their updates away.
        **options: More arguments of ``from_pretrained``.

    Raises:
        ValueError: ``quantization_config`` is given twice.
    """
    from transformers import AutoModelForCausalLM

    given = dict(args.model_init_kwargs or {})
    if given.get("quantization_config") is not None and options.get("quantization_config"):
        raise ValueError(
            "quantization_config is given to the trainer and in model_init_kwargs; give it once"
        )
    dtype = given.get("dtype", torch.bfloat16 if frozen and native_bf16() else torch.float32)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    defaults = {"trust_remote_code": args.trust_remote_code, "use_safetensors": True}
    kwargs = {**defaults, **{k: v for k, v in options.items() if v is not None}, **given}
    return AutoModelForCausalLM.from_pretrained(name, **{**kwargs, "dtype": dtype})


def prepare_policy(model: Any, args: Any, quantization_config: Any, peft_config: Any) -> Any:
    """The model to train: loaded if given by name, under its adapter if one is asked for.

    Args:
        model: A model, or a name or path.
        args: A :class:`fastpref.PreferenceConfig`.
        quantization_config: For a model given by name; or None.
        peft_config: Of a fresh adapter; or None.

    Raises:
        ValueError: nothing of the model trains, or it is loaded and to be quantised.
        TypeError: ``peft_config`` is no PEFT config.
    """
    if isinstance(model, str):
        frozen = peft_config is not None
        model = load_model(model, args, frozen=frozen, quantization_config=quantization_config)
    elif quantization_config is not None:
        raise ValueError(
            "quantization_config is for a model given by name; this one is loaded already"
        )
    elif args.model_init_kwargs:
        logger.warning("model_init_kwargs has no effect: the model is loaded already")
    if peft_config is not None:
        model = _with_adapter(model, peft_config)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "model: no parameter is trainable. Load the adapter with is_trainable=True, or give a "
            "peft_config"
        )
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if hasattr(model, "peft_config") and reentrant:
        model.enable_input_require_grads()  # else nothing before the adapters asks for a gradient
    return model


def _with_adapter(model: Any, peft_config: Any) -> Any:
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config: expected a peft.PeftConfig such as LoraConfig, got "
            f"{type(peft_config).__name__}"
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            "the model has an adapter already and peft_config asks for another: pass the model "
            "alone, or merge its adapter first with merge_and_unload()"
        )
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"peft_config: {type(peft_config).__name__} puts tokens before the prompt, which "
            "packed rows do not have; use LoRA"
        )
    return get_peft_model(model, peft_config)


def adjust(model: nn.Module, args: Any) -> None:
    """Turn off dropout and compile the backbone, of policy or reference, as ``args`` ask.

    The head stays as it is: what is hooked to it differs from call to call.
    """
    for module in model.modules() if args.disable_dropout else ():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "hidden_dropout", "attn_pdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if args.torch_compile:
        backbone = causal_lm(model).base_model
        backbone.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def balancing_weight(model: Any, given: float | None) -> float:
    """Weight of a mixture of experts' load-balancing loss: as given, else as its config says.

    Raises:
        ValueError: a weight is given and the model has no experts.
    """
    config = causal_lm(model).config.get_text_config()
    has_experts = hasattr(config, "output_router_logits")
    if given and not has_experts:
        raise ValueError(
            f"router_aux_loss_coef={given}: {type(causal_lm(model)).__name__} is no mixture of "
            "experts that returns its router's logits"
        )
    own = getattr(config, "router_aux_loss_coef", 0.0) if has_experts else 0.0
    return own if given is None else given
