"""Policies as models that sample and score: loaded, not trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastpref.data.masks import dense_mask
from fastpref.data.packing import Document, pack
from fastpref.ops import segment_sum
from fastpref.policy import response_logps
from fastpref.ref_tokenizers import kept_with, same_ids
from fastpref.rounds.run import Policy, Row, Rows, Run, by_length


def load_policy(run: Run, policy: Policy) -> Any:
    """A policy's model for inference: on the run's device, in its dtype, in eval mode."""
    from transformers import AutoModelForCausalLM

    options = {"use_safetensors": True, "dtype": run.dtype, **run.model_options}
    model = AutoModelForCausalLM.from_pretrained(policy.path, **options)
    return model.to(run.device).eval().requires_grad_(False)


def check_ids(run: Run, policy: Policy) -> None:
    """Raise ``ValueError`` if a policy's own tokenizer gives other token ids than the run's."""
    own = None
    if run.tokenizer is not None:
        own = kept_with(policy.path, run.model_options.get("trust_remote_code", False))
    if own is not None and not same_ids(run.tokenizer, own):
        raise ValueError(
            f"{policy.path} has another vocabulary than the run's model: to it the same token ids "
            "are another text, and its likelihood of them means nothing. Give a model with the "
            "tokenizer of the run's"
        )


def generation_config(policy: Policy) -> Any:
    """The generation config that a policy's model has once it is loaded, without loading it."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(policy.path)
    except OSError:  # there is no such file
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(policy.path))


@torch.no_grad()
def response_sums(
    model: Any, groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]
) -> list[list[float]]:
    """Sum of the log-probabilities of each response's tokens, by the fused head: no logits.

    Equals ``model(prompt + response).logits.log_softmax(-1)`` gathered and summed over the
    response, a prompt computed once for all its responses.

    Args:
        model: A causal language model in eval mode.
        groups: Prompts with responses, as token ids.

    Returns:
        Nats, fp32 sums, by group and response; 0 for an empty response.
    """
    documents = [Document(list(prompt), [list(r) for r in answers]) for prompt, answers in groups]
    packed = pack(documents)
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in vars(packed).items()}
    batch["attention_mask"] = dense_mask(packed.document_ids, packed.branch_ids).to(device)
    sums = segment_sum(response_logps(model, batch).logps, batch["cu_seqlens"]).tolist()
    most = max(len(document.responses) for document in documents)
    order = [(d, k) for k in range(most) for d in range(len(groups)) if k < len(groups[d][1])]
    found = dict(zip(order, sums, strict=True))
    return [[found[d, k] for k in range(len(answers))] for d, (_, answers) in enumerate(groups)]


def log_likelihoods(run: Run, name: str, policy: Policy, groups: Rows) -> Rows:
    """Log-probability of every response of ``groups`` under a policy, as a stage.

    Args:
        run: The run.
        name: Of the stage.
        policy: Scores.
        groups: Rows with ``prompt_ids`` and ``responses`` with ``ids``.

    Returns:
        A row ``{"id", "logps": [nats, summed over the response]}`` for each group.
    """
    rows = groups.rows
    most = max((len(row["responses"]) for row in rows), default=1)
    lengths = [
        len(row["prompt_ids"]) + sum(len(r["ids"]) for r in row["responses"]) for row in rows
    ]
    batches = by_length(lengths, max(run.batch_size // max(most, 1), 1))

    def open() -> Any:
        model = load_policy(run, policy)

        def work(number: int, indices: Sequence[int]) -> list[Row]:
            chunk = [rows[i] for i in indices]
            filled = [row for row in chunk if row["responses"]]
            pairs = [(row["prompt_ids"], [r["ids"] for r in row["responses"]]) for row in filled]
            sums = iter(response_sums(model, pairs) if pairs else [])
            logps = [next(sums) if row["responses"] else [] for row in chunk]
            return [{"id": row["id"], "logps": own} for row, own in zip(chunk, logps, strict=True)]

        return work

    inputs = {
        "policy": policy.digest,
        "responses": groups.digest,
        "batch_size": run.batch_size,
        "dtype": str(run.dtype),
        **({"model_options": run.model_options} if run.model_options else {}),
    }
    return run.batches(name, inputs, batches, open, "log-likelihoods")


def log_ratio_margins(new: Rows, old: Rows) -> list[float]:
    """How much more one policy than another prefers the chosen response of each pair.

    Args:
        new: Of :func:`log_likelihoods`, on pairs whose chosen response is the first.
        old: The same pairs under another policy.

    Returns:
        ``(log pi - log pi_old)(chosen) - (log pi - log pi_old)(rejected)``, nats.
    """
    return [
        (a["logps"][0] - b["logps"][0]) - (a["logps"][1] - b["logps"][1])
        for a, b in zip(new, old, strict=True)
    ]
