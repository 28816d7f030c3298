"""The model card that goes to the hub with a tuned model: its ``README.md``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from fastpref import losses
from fastpref.models import name_of
from fastpref.paths import hub_id
from fastpref.provenance import versions


def model_card(
    model: Any,
    args: Any,
    *,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """What a reader of the hub wants to know: base model, dataset, loss, options, versions.

    Args:
        model: That was trained.
        args: Its :class:`fastpref.PreferenceConfig`.
        model_name: Title; None: the name of the run's directory.
        dataset_name: What it was trained on; None: not said.
        tags: For the hub, beside those of the losses.

    Returns:
        Markdown under YAML, as the hub reads it. It tells no path on this machine.
    """
    base, dataset = hub_id(name_of(model)), hub_id(dataset_name)
    title = model_name or Path(args.output_dir).name
    adapter = hasattr(model, "peft_config")
    names = [losses.get(name).entry.name for name in args.loss_type]
    weights = args.loss_weights or [1.0] * len(names)
    data = ModelCardData(
        base_model=base,
        datasets=[dataset] if dataset else None,
        library_name="peft" if adapter else "transformers",
        model_name=title,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["fastpref", *names, *tags])),
    )
    made_by = versions("cpu", "transformers", "accelerate", "peft")
    rows = {
        "base model": base or "not from the hub",
        "what was trained": "a PEFT adapter" if adapter else "the model's weights",
        "dataset": dataset or (Path(dataset_name).name if dataset_name else "not named"),
        "loss": " + ".join(
            f"{weight:g} {name}" for weight, name in zip(weights, names, strict=True)
        ),
        "its arguments": json.dumps(args.loss_args or {}),
        "beta": "the loss's default" if args.beta is None else f"{args.beta:g}",
        "learning rate": f"{args.learning_rate:g}",
        "versions": ", ".join(f"{name} {number}" for name, number in made_by.items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    text = f"# {title}\n\nTuned on preferences with fastpref.\n\n| | |\n| --- | --- |\n{table}\n"
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))
