"""The sampler draws what ``generate`` draws, and reads each prompt once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)

from fastpref.rounds.run import Run, given_rows, policy_of
from fastpref.rounds.sampling import Sampling, sample, transformers_generate

PROMPTS = [[4, 5, 6, 7, 8], [9], [10, 11, 12]]
SHAPE = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
ATTENTION = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "full attention": LlamaConfig(**SHAPE, **ATTENTION),
    "sliding window": MistralConfig(**SHAPE, **ATTENTION, sliding_window=3),
    "no attention": MambaConfig(**{**SHAPE, "initializer_range": 0.02}, state_size=4),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_responses_are_those_of_prompts_repeated_before_the_model(kind: str, make: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    read: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, given, out: read.append(given[0].numel())
    )
    drawn = transformers_generate(model, make.tokenizer(), Sampling(n=3, max_new_tokens=7), [2])
    found = drawn(PROMPTS, 11)
    # 3 prompts padded to 5 tokens; then a token a step for each of the 9 responses.
    expected = 9 * 5 if kind == "no attention" else 3 * 4 + 9 * 1
    assert sum(read) <= expected + 9 * 6

    ids = torch.tensor([[0] * (5 - len(p)) + p for p in PROMPTS])
    torch.manual_seed(11)
    plain = model.generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        generation_config=GenerationConfig(
            do_sample=True,
            top_k=0,
            num_return_sequences=3,
            max_new_tokens=7,
            eos_token_id=[2],
            pad_token_id=0,
        ),
    )
    assert [own for group in found for own in group] == plain[:, 5:].tolist()
    assert len({tuple(own) for own in found[0]}) > 1


def test_samples_that_reach_the_limit_are_marked_and_told(
    make: Any, policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, tokenizer=make.tokenizer())
    prompts = given_rows([{"id": i, "prompt": "", "prompt_ids": p} for i, p in enumerate(PROMPTS)])
    with caplog.at_level(logging.WARNING, logger="fastpref"):
        found = sample(run, "samples", policy_of(policy), prompts, Sampling(n=4, max_new_tokens=2))
    responses = [r for row in found for r in row["responses"]]
    assert {r["finished"] for r in responses} == {2 in r["ids"] for r in responses}
    unfinished = sum(not r["finished"] for r in responses)
    assert f"{unfinished} of 12 responses reached max_new_tokens=2" in caplog.text
