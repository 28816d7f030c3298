"""Responses sampled from a policy: several a prompt, batched by length, seeded by batch.

A prompt goes through the model once, however many responses it gets, wherever the model's cache can
be repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastpref.rounds.examples import cut_at_end, ends
from fastpref.rounds.options import check_types
from fastpref.rounds.policies import generation_config, load_policy
from fastpref.rounds.run import Policy, Row, Rows, Run, by_length, seed_of

logger = logging.getLogger("fastpref")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        n: Responses to each prompt.
        temperature: Of the distribution; 0 takes the most likely token each time (then ``n`` is 1).
        top_p: Share of probability that is drawn from.
        top_k: Number of tokens that are drawn from; 0: all.
        max_new_tokens: Longest response. One that gets there counts as unfinished.
        backend: ``"transformers"`` or ``"vllm"`` (imported only when chosen).

    Raises:
        ValueError: a value is out of range.
        TypeError: a value has the wrong type.
    """

    n: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    backend: str = "transformers"

    def __post_init__(self) -> None:
        """See the class."""
        check_types(self, "sampling.")
        rules = {
            "n": (self.n >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "backend": (self.backend in BACKENDS, f"one of {', '.join(BACKENDS)}"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ValueError(f"sampling.{name} must be {expected}, got {getattr(self, name)!r}")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"sampling.temperature=0 gives the same response every time, so n={self.n} makes "
                "no sense: set n=1, or a temperature"
            )


Generate = Callable[[Sequence[Sequence[int]], int], list[list[list[int]]]]
"""Prompts as token ids and a seed in; for each prompt, the new token ids of ``n`` responses."""


def sample(run: Run, name: str, policy: Policy, prompts: Rows, sampling: Sampling) -> Rows:
    """Responses of a policy to prompts, as a stage.

    What is drawn depends on the policy, the prompts, ``sampling``, the run's seed and batch size
    and the stage's name, and on nothing else: a killed run goes on with the same numbers.

    Args:
        run: The run.
        name: Of the stage.
        policy: Answers.
        prompts: Rows with ``id``, ``prompt`` and ``prompt_ids``.
        sampling: How.

    Returns:
        Rows ``{"id", "prompt", "prompt_ids", "responses": [{"text", "ids", "finished"}, ...]}``;
        ``finished`` is false where ``max_new_tokens`` was reached.

    Raises:
        ImportError: the backend is not installed.
    """
    rows = prompts.rows
    batches = by_length(
        [len(row["prompt_ids"]) for row in rows], max(run.batch_size // sampling.n, 1)
    )

    def open() -> Any:
        generate, stops = BACKENDS[sampling.backend](run, policy, sampling)

        def work(number: int, indices: Sequence[int]) -> list[Row]:
            ids = [rows[i]["prompt_ids"] for i in indices]
            answers = generate(ids, seed_of(run.seed, name, number))
            return [
                {
                    "id": rows[i]["id"],
                    "prompt": rows[i]["prompt"],
                    "prompt_ids": rows[i]["prompt_ids"],
                    "responses": [_response(run.tokenizer, new, stops) for new in own],
                }
                for i, own in zip(indices, answers, strict=True)
            ]

        return work

    inputs = {
        "policy": policy.digest,
        "prompts": prompts.digest,
        "seed": run.seed,
        "batch_size": run.batch_size,
        "dtype": str(run.dtype),
        **({"model_options": run.model_options} if run.model_options else {}),
        **{f"sampling.{key}": value for key, value in asdict(sampling).items()},
    }
    found = run.batches(name, inputs, batches, open, "sampling")
    unfinished = sum(not r["finished"] for row in found for r in row["responses"])
    total = sum(len(row["responses"]) for row in found)
    if unfinished * 2 > total:
        logger.warning(
            "%s: %d of %d responses reached max_new_tokens=%d and are unfinished; raise it unless "
            "that is meant",
            name,
            unfinished,
            total,
            sampling.max_new_tokens,
        )
    return found


def _response(tokenizer: Any, new: Sequence[int], stops: Sequence[int]) -> Row:
    ids, finished = cut_at_end(new, stops)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return {"text": text, "ids": ids, "finished": finished}


def transformers_generate(
    model: Any, tokenizer: Any, sampling: Sampling, stops: Sequence[int]
) -> Generate:
    """``model.generate`` on prompts padded at their start, with these options and no others.

    Args:
        model: A causal language model.
        tokenizer: Gives the pad token.
        sampling: How to draw.
        stops: Ids of the tokens that end a response.
    """
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    pad = (stops[0] if stops else 0) if pad is None else pad
    drawn: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        drawn |= {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        **drawn,
    )
    # generate() fills what a config leaves open from the model's own, which may hold penalties.
    model.generation_config = config
    device = next(model.parameters()).device

    @torch.no_grad()
    def generate(prompts: Sequence[Sequence[int]], seed: int) -> list[list[list[int]]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts]).to(device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).to(device)
        read = _read_once(model, ids, mask, pad, sampling.n)
        torch.manual_seed(seed)
        made = model.generate(
            input_ids=ids.repeat_interleave(sampling.n, 0),
            attention_mask=mask.repeat_interleave(sampling.n, 0),
            generation_config=config,
            **({} if read is None else {"past_key_values": read}),
        )
        new = made[:, width:].tolist()
        return [new[i : i + sampling.n] for i in range(0, len(new), sampling.n)]

    return generate


def _read_once(model: Any, ids: Tensor, mask: Tensor, pad: int, copies: int) -> Any:
    """A cache of all but the prompts' last token, ``copies`` times each, from one pass over them.

    None where that saves nothing, or the cache cannot be repeated (linear attention, say).
    """
    from transformers import DynamicCache, GenerationConfig

    if copies == 1 or ids.shape[1] == 1:
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
        return None
    # A prompt of one token has only padding here, which is masked when the cache is used.
    seen = mask[:, :-1]
    seen = seen.where(seen.any(1, keepdim=True), 1)
    # generate() knows each model's positions under padding; the token it draws is not in the cache.
    model.generate(
        input_ids=ids[:, :-1],
        attention_mask=seen,
        past_key_values=cache,
        generation_config=GenerationConfig(max_new_tokens=1, pad_token_id=pad),
    )
    if cache.get_seq_length() != ids.shape[1] - 1:  # the model keeps a cache of its own kind
        return None
    cache.batch_repeat_interleave(copies)
    return cache


def _transformers(run: Run, policy: Policy, sampling: Sampling) -> tuple[Generate, list[int]]:
    model = load_policy(run, policy)
    stops = ends(run.tokenizer, model.generation_config)
    return transformers_generate(model, run.tokenizer, sampling, stops), stops


def _vllm(run: Run, policy: Policy, sampling: Sampling) -> tuple[Generate, list[int]]:
    """vLLM's engine. Not exercised by the project's tests, which run where vLLM does not."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ImportError(
            "sampling.backend='vllm' needs vLLM: pip install vllm, or leave the backend out to "
            "sample with transformers"
        ) from error
    stops = ends(run.tokenizer, generation_config(policy))
    engine = LLM(model=policy.path, dtype=str(run.dtype).removeprefix("torch."), seed=run.seed)

    def generate(prompts: Sequence[Sequence[int]], seed: int) -> list[list[list[int]]]:
        params = SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=stops,
            seed=seed,
        )
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        made = engine.generate(asked, params, use_tqdm=False)
        return [[list(answer.token_ids) for answer in one.outputs] for one in made]

    return generate, stops


BACKENDS: dict[str, Callable[[Run, Policy, Sampling], tuple[Generate, list[int]]]] = {
    "transformers": _transformers,
    "vllm": _vllm,
}
"""Samplers by name: each loads a policy and returns what draws from it, and the end tokens."""
