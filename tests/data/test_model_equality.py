"""Packed rows through real (tiny, random) models equal one sequence at a time, gradients too."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from fastpref.data import Document, dense_mask, pack, to_attention_mask

transformers = pytest.importorskip("transformers")
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GENERATOR = torch.Generator().manual_seed(0)


def ids(length):
    return torch.randint(1, 97, (length,), generator=GENERATOR).tolist()


DOCUMENTS = [
    Document(ids(prompt), [ids(n) for n in responses])
    for prompt, responses in [(9, (7, 4)), (1, (5, 6)), (23, (1, 2)), (4, (11, 3, 8)), (0, (6, 5))]
]
SEQUENCES = [
    (document.prompt, document.responses[k])
    for k in range(3)
    for document in DOCUMENTS
    if k < len(document.responses)
]


def make(name, attention):
    config, options = {
        "llama": (transformers.LlamaConfig, {}),
        "qwen2": (transformers.Qwen2Config, {}),
        "gpt2": (transformers.GPT2Config, {"n_positions": 64}),
        # alternating full and sliding layers, and a softcap that rules sdpa out
        "gemma2": (transformers.Gemma2Config, {"sliding_window": 5, "head_dim": 12}),
    }[name]
    torch.manual_seed(0)
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(
            config(**SHAPE, **options), attn_implementation=attention, dtype=torch.float32
        )
        for parameter in model.parameters():  # away from the tame initial scale
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval()


def alone(model):
    """Hidden states at response rows, one sequence at a time, causal by the model's own hand."""
    states = []
    for prompt, response in SEQUENCES:
        tokens = torch.tensor([[*prompt, *response]])
        hidden = model.base_model(tokens, use_cache=False).last_hidden_state[0]
        states.append(hidden[max(len(prompt) - 1, 0) : len(tokens[0]) - 1])
    return torch.cat(states)


def packed_grid(model, rows):
    allowed, at = dense_mask(rows.document_ids, rows.branch_ids), rows.position_ids
    near = (at[:, :, None] - at[:, None, :])[:, None] < 5
    masks = {
        kind: to_attention_mask(bools, model.config._attn_implementation, model.dtype)
        for kind, bools in (("full_attention", allowed), ("sliding_attention", allowed & near))
    }
    mask = masks if model.config.model_type == "gemma2" else masks["full_attention"]
    return model.base_model(
        rows.input_ids, attention_mask=mask, position_ids=rows.position_ids, use_cache=False
    ).last_hidden_state


def packed(model, rows):
    return packed_grid(model, rows).flatten(0, 1)[rows.response_rows]


MODELS = [
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("qwen2", "sdpa"),
    ("qwen2", "eager"),
    ("gpt2", "sdpa"),
    ("gemma2", "eager"),
]


@pytest.mark.parametrize("row_tokens", [1, 40, 1000])
@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize(("name", "attention"), MODELS)
def test_equals_one_sequence_at_a_time(name, attention, prefix_sharing, row_tokens):
    model = make(name, attention)
    twin = copy.deepcopy(model)
    rows = pack(DOCUMENTS, row_tokens=row_tokens, prefix_sharing=prefix_sharing)
    expected, actual = alone(twin), packed(model, rows)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)

    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    for (key, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        if b.grad is not None:  # the head is not run
            scale = max(1.0, float(b.grad.abs().max()))
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5 * scale, rtol=1e-5, msg=key)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_poison(attention):
    """Other tokens in one document change no hidden state of another, to the last bit."""
    model = make("llama", attention)
    rows = pack(DOCUMENTS, row_tokens=1000)
    poisoned = rows.input_ids.clone()
    victim = rows.document_ids == 3
    poisoned[victim] = (poisoned[victim] + 31) % 97
    other = dataclasses.replace(rows, input_ids=poisoned)
    with torch.no_grad():
        before, after = packed_grid(model, rows), packed_grid(model, other)
    assert torch.equal(before[~victim], after[~victim])
    assert not torch.isclose(before[victim], after[victim]).all(-1).any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_poisoned_chosen_leaves_rejected_alone(attention):
    model = make("qwen2", attention)
    rows = pack(DOCUMENTS, row_tokens=1000)
    chosen = rows.branch_ids == 1
    poisoned = torch.where(chosen, (rows.input_ids + 31) % 97, rows.input_ids)
    other = dataclasses.replace(rows, input_ids=poisoned)
    with torch.no_grad():
        before, after = packed_grid(model, rows), packed_grid(model, other)
    assert torch.equal(before[~chosen], after[~chosen])


def test_bool_mask_is_not_what_eager_reads():
    """Why ``to_attention_mask`` exists: eager adds the mask, so bool hides nothing."""
    model = make("llama", "eager")
    rows = pack(DOCUMENTS)
    mask = dense_mask(rows.document_ids, rows.branch_ids)
    wrong = model.base_model(
        rows.input_ids, attention_mask=mask, position_ids=rows.position_ids
    ).last_hidden_state.flatten(0, 1)[rows.response_rows]
    assert (wrong - alone(model)).abs().max() > 1e-2
