"""Packed rows through real (tiny, random) models equal one sequence at a time, gradients too."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from fastpref.data import Document, dense_mask, pack
from fastpref.policy import attention_mask, response_logps

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
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 5}
ARCHITECTURES = {
    "llama": {},
    "mistral": {"head_dim": 12, "sliding_window": 16},
    "qwen2": {},
    "qwen2.5": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},
    "gemma2": GEMMA,  # alternating full and sliding layers, and a soft cap that rules sdpa out
    "gemma3": {**GEMMA, "model_type": "gemma3_text", "sliding_window_pattern": 2},
    "phi3": {},
    "smollm": {
        "model_type": "llama",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "gpt2": {"n_positions": 64},
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


def make(name, attention=None):
    options = {"model_type": name, **SHAPE, **ARCHITECTURES[name]}
    config = transformers.AutoConfig.for_model(**options)
    torch.manual_seed(0)
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=torch.float32
        )
        for parameter in model.parameters():  # away from the tame initial scale
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval()


def alone(model, read):
    """``read(model, tokens)`` of each sequence by itself, causal by the model's own hand, at the
    positions that predict its response."""
    found = []
    for prompt, response in SEQUENCES:
        tokens = torch.tensor([[*prompt, *response]])
        found.append(read(model, tokens)[0, max(len(prompt) - 1, 0) : -1])
    return torch.cat(found)


def read_hidden(model, tokens):
    return model.base_model(tokens, use_cache=False).last_hidden_state


def read_logits(model, tokens):
    return model(tokens, use_cache=False).logits


def logps_alone(model):
    """Log-probabilities of the response tokens, one sequence at a time, from the model's logits."""
    targets = [token for prompt, response in SEQUENCES for token in response[not prompt :]]
    logps = alone(model, read_logits).log_softmax(-1)
    return logps.gather(-1, torch.tensor(targets)[:, None])[:, 0]


def packed_grid(model, rows):
    mask = attention_mask(model, vars(rows))
    return model.base_model(
        rows.input_ids, attention_mask=mask, position_ids=rows.position_ids, use_cache=False
    ).last_hidden_state


@pytest.fixture(scope="module")
def truth():
    """Log-probabilities and every gradient of a model, one sequence at a time."""

    @functools.cache
    def of(name, attention):
        model = make(name, attention)
        logps = logps_alone(model)
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        return logps.detach(), {name: p.grad for name, p in model.named_parameters()}

    return of


@pytest.mark.parametrize("row_tokens", [1, 40, 1000])
@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize(
    ("name", "attention"), [*((name, None) for name in ARCHITECTURES), ("llama", "eager")]
)
def test_equals_one_sequence_at_a_time(truth, name, attention, prefix_sharing, row_tokens):
    """In fp32, to 1e-5: log-probs in nats, gradients of the parameter's largest."""
    expected, gradients = truth(name, attention)
    model = make(name, attention)
    rows = pack(DOCUMENTS, row_tokens=row_tokens, prefix_sharing=prefix_sharing)
    found = response_logps(model, vars(rows)).logps
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    (found * torch.linspace(-1, 1, len(found))).sum().backward()
    for key, parameter in model.named_parameters():
        error = (parameter.grad - gradients[key]).abs().max()
        assert error <= 1e-5 * gradients[key].abs().max(), key


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
    assert (wrong - alone(model, read_hidden)).abs().max() > 1e-2
