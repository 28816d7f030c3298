"""Models and tokenizers by name, as a trainer wants them: dtype, adapters, dropout."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpref.attention import attention_of, settle_attention
from fastpref.config import PreferenceConfig, native_bf16
from fastpref.heads import causal_lm, output_embedding
from fastpref.paths import located

logger = logging.getLogger("fastpref")


def options_for(model: Any, given: Any, kind: type[PreferenceConfig]) -> PreferenceConfig:
    """The options of a run: those given, or the defaults in a folder with the model's name.

    Raises:
        TypeError: What is given is no config of this package.
    """
    if given is None:
        return kind(output_dir=f"{Path(name_of(model)).name or 'model'}-preference")
    if not isinstance(given, PreferenceConfig):
        found = type(given)
        raise TypeError(
            f"args: expected a fastpref.{kind.__name__}, got a {found.__module__}."
            f"{found.__qualname__}. Write: from fastpref import {kind.__name__}"
        )
    return given


def name_of(model: Any) -> str:
    """The name or path that a model has, or was loaded by; empty if it was made otherwise."""
    if isinstance(model, str):
        return model
    return getattr(getattr(causal_lm(model), "config", None), "_name_or_path", "")


def _not_had(name: str, error: Exception) -> FileNotFoundError | None:
    """What to raise where a name is no folder and the hub did not answer, or has no such model."""
    from huggingface_hub.errors import (
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause = error.__cause__
    if isinstance(cause, RevisionNotFoundError):
        return FileNotFoundError(f"{name}: the hub has no such revision of it. Check 'revision'")
    if not isinstance(cause, (LocalEntryNotFoundError, RepositoryNotFoundError)):
        return None
    offline = isinstance(cause, LocalEntryNotFoundError)
    found = "the hub could not be reached" if offline else "the hub shows no model of this name"
    return FileNotFoundError(
        f"{name}: no such folder, and {found}. Check the spelling"
        f"{' and the network' if offline else ''}; give the path of a folder with a model that "
        "was downloaded; for a private or gated model, run `hf auth login` first"
    )


def _folder(name: str) -> str:
    """A model's folder on disk or its id on the hub; ``FileNotFoundError`` if it is neither."""
    path = located(name)
    described = ("config.json", "adapter_config.json")
    if Path(path).exists() and not any(Path(path, file).is_file() for file in described):
        raise FileNotFoundError(
            f"{name} is no model: expected a folder with {' or '.join(described)}, as "
            "save_pretrained writes it"
        )
    return path


def load_tokenizer(model: Any, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The tokenizer that is kept with a model.

    Args:
        model: A model, or its name or path.
        trust_remote_code: Run Python code that ships with it.
        **options: More arguments of ``from_pretrained``.

    Raises:
        ValueError: Where the model comes from is not known, or there is no tokenizer.
        FileNotFoundError: The model's path is not there, or the hub does not give it.
    """
    from transformers import AutoTokenizer

    name = name_of(model)
    if not name:
        raise ValueError(
            f"processing_class: this {type(causal_lm(model)).__name__} was not loaded by name, so "
            "its tokenizer is not known: pass processing_class=tokenizer"
        )
    path = _folder(name)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError) as error:
        if (missing := _not_had(name, error)) is not None:
            raise missing from error
        raise ValueError(
            f"processing_class: no tokenizer could be loaded from {name}: pass "
            f"processing_class=tokenizer, or save one there ({error})"
        ) from error


def load_config(name: str, args: Any, *, revision: str | None = None) -> Any:
    """A model's configuration, by the model's name or path or by that of its ``config.json``.

    Args:
        name: As for ``from_pretrained``.
        args: A :class:`fastpref.PreferenceConfig`.
        revision: On the hub.

    Raises:
        FileNotFoundError: The path is not there, or holds no model, or the hub does not give it.
        ValueError: The file is no configuration of a model.
    """
    from transformers import AutoConfig

    path = name if Path(name).is_file() else _folder(name)
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code, **options)
    except (OSError, ValueError) as error:
        if (missing := _not_had(name, error)) is not None:
            raise missing from error
        raise ValueError(f"{name}: no configuration of a model: {error}") from error


def load_model(name: str, args: Any, *, frozen: bool = False, **options: Any) -> Any:
    """A causal language model by name or path; safetensors and no remote code unless asked, with
    the attention that :func:`fastpref.attention.choose_attention` chooses unless one is asked for.

    Args:
        name: As for ``from_pretrained``.
        args: A :class:`fastpref.PreferenceConfig`; its ``model_init_kwargs`` go first.
        frozen: The weights will not train, so bf16 is enough where the device has it. Weights that
            train are fp32: at usual learning rates bf16 rounds their updates away.
        **options: More arguments of ``from_pretrained``.

    Raises:
        ValueError: ``quantization_config`` is given twice, there is no such dtype, or the weights
            are damaged, or pickled.
        FileNotFoundError: The path is not there, or holds no model, or the hub does not give it.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    given = dict(args.model_init_kwargs or {})
    if given.get("quantization_config") is not None and options.get("quantization_config"):
        raise ValueError(
            "quantization_config is given to the trainer and in model_init_kwargs; give it once"
        )
    dtype = torch.bfloat16 if frozen and native_bf16() else torch.float32
    dtype = given.get("dtype", options.get("dtype", dtype))
    if isinstance(dtype, str) and dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype={dtype!r}: expected float32, bfloat16, float16 or auto")
        dtype = getattr(torch, dtype)
    defaults = {"trust_remote_code": args.trust_remote_code, "use_safetensors": True}
    kwargs = {**defaults, **{k: v for k, v in options.items() if v is not None}, **given}
    path = _folder(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **{**kwargs, "dtype": dtype})
    except SafetensorError as error:
        raise ValueError(
            f"{name}: a file of weights is damaged, or was cut short ({error}): copy or download "
            "it again"
        ) from error
    except OSError as error:
        if (missing := _not_had(name, error)) is not None:
            raise missing from error
        if not any(Path(path).glob("pytorch_model*.bin")) or not kwargs["use_safetensors"]:
            raise
        raise ValueError(
            f"{name}: the weights are a pickle (pytorch_model.bin), which can run code when it is "
            "read. Save them as safetensors, or, if you trust them, set model_init_kwargs="
            "{'use_safetensors': False}"
        ) from error
    settle_attention(model, args, kwargs.get("attn_implementation"), args.device)
    return model


def prepare_policy(model: Any, args: Any, quantization_config: Any, peft_config: Any) -> Any:
    """The model to train: loaded if given by name, under its adapter if one is asked for.

    Args:
        model: A model, or a name or path.
        args: A :class:`fastpref.PreferenceConfig`.
        quantization_config: For a model given by name; or None.
        peft_config: Of a fresh adapter; or None.

    Raises:
        ValueError: nothing of the model trains, or it is loaded and to be quantised.
        TypeError: ``peft_config`` is no PEFT config, or the model has no output head.
    """
    if by_name := isinstance(model, str):
        frozen = peft_config is not None
        model = load_model(model, args, frozen=frozen, quantization_config=quantization_config)
    elif quantization_config is not None:
        raise ValueError(
            "quantization_config is for a model given by name; this one is loaded already"
        )
    elif args.model_init_kwargs:
        logger.warning("model_init_kwargs has no effect: the model is loaded already")
    output_embedding(model)
    if not by_name:
        settle_attention(model, args, attention_of(model), args.device)
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
    """Turn off dropout and compile the backbone, of policy or reference, as ``args`` ask; and keep
    four-bit weights as they are.

    The head stays as it is: what is hooked to it differs from call to call.
    """
    for module in model.modules() if args.disable_dropout else ():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "hidden_dropout", "attn_pdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    packs = "support_avx512bf16_for_cpu"
    for module in model.modules():
        # On a CPU bitsandbytes packs a weight anew at its first forward in eval mode, such as the
        # reference's, and no gradient passes what is packed.
        if hasattr(module, packs):
            setattr(module, packs, False)
    if args.torch_compile:
        backbone = causal_lm(model).base_model
        backbone.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def vocab_size(model: Any) -> int | None:
    """Number of tokens that a model has; None if its config does not say."""
    return getattr(causal_lm(model).config.get_text_config(), "vocab_size", None)


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
