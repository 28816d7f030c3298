"""Log-probabilities from a model's own forward: equal to its own logits, one sequence at a time."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref import heads, policy
from fastpref.data import PreferenceCollator

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
GEMMA = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": 16},
    "phi": {},  # a head with a bias
    "phi3": {},
    "gemma2": GEMMA,  # eager attention, a soft cap, two kinds of layers
    "gemma3_text": {**GEMMA, "sliding_window_pattern": 2},
    "llama4_text": {"head_dim": 8, "attention_chunk_size": 16, "intermediate_size_mlp": 48},
    "granite": {"logits_scaling": 7.0},
    "cohere": {"logit_scale": 0.3},
    "gpt2": SMALL,
    "gptj": {**SMALL, "rotary_dim": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"alibi": False, "multi_query": True, "num_key_value_heads": 1},
}


def rows(seed: int = 0) -> list[dict[str, Any]]:
    """Rows longer than the windows above, one with a masked response."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(3, 97, (n,), generator=generator).tolist()

    sizes = [(7, 5, 9), (12, 6, 1), (20, 13, 14)]
    found = [
        dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(draw, s), strict=True))
        for s in sizes
    ]
    for row in found:
        row["chosen_mask"] = [1] * len(row["chosen_ids"])
        row["rejected_mask"] = [1] * len(row["rejected_ids"])
    found[2]["chosen_mask"][3:6] = [0, 0, 0]
    return found


def make_batch(examples: list[dict[str, Any]], **options: Any) -> dict[str, Tensor]:
    return PreferenceCollator(pad_token_id=0, **options)(examples)


def one_by_one(model: nn.Module, examples: list[dict[str, Any]]) -> Tensor:
    found = []
    for side in ("chosen", "rejected"):
        for e in examples:
            prompt, response = e["prompt_ids"], e[f"{side}_ids"]
            logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[
                0
            ]
            logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
            logps = logps.gather(-1, torch.tensor(response)[:, None])[:, 0]
            found.append(logps * torch.tensor(e[f"{side}_mask"]))
    return torch.cat(found)


def assert_equal_gradient(found: Tensor, expected: Tensor) -> None:
    """Norms and rotations of these models are fp32 inside, whatever the dtype of their weights."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-12


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        k: v
        for k, v in SIZES.items()
        if name not in ("gpt2", "gptj") or "size" not in k or k == "vocab_size"
    }
    config = AutoConfig.for_model(name, **{**sizes, **ARCHITECTURES[name]})
    implementation = "eager" if name in ("gemma2", "gptj") else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)  # logits far enough apart to tell scales and masks
    return model.double().eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_to_the_models_own_logits(name: str) -> None:
    model = make_model(name)
    # Eager attention takes its softmax in fp32 whatever the dtype.
    tolerance = 1e-6 if name in ("gemma2", "gptj") else 1e-10
    examples = rows()
    expected = one_by_one(model, examples)
    assert expected.std() > 0.05
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    (expected * weights).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    for sharing in (True, False):
        model.zero_grad()
        batch = make_batch(examples, prefix_sharing=sharing, row_tokens=70)
        found = policy.response_logps(model, batch, return_stats=True)
        torch.testing.assert_close(found.logps, expected, rtol=0, atol=tolerance)
        assert found.stats is not None
        (found.logps * weights).sum().backward()
        for n, p in model.named_parameters():
            if gradients[n] is not None:
                assert_equal_gradient(p.grad, gradients[n])


def lora(model: nn.Module, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "lm_head"], **options}
    adapted = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    return adapted.double()


@pytest.mark.parametrize("kind", ["head", "modules_to_save", "rslora"])
def test_an_adapted_head(kind: str) -> None:
    options: dict[str, Any] = {"use_rslora": kind == "rslora"}
    if kind == "modules_to_save":
        options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = lora(make_model("llama"), **options)
    if kind == "modules_to_save":
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.5)
    examples = rows()
    batch = make_batch(examples)
    expected = one_by_one(model, examples)
    expected.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in n for n in gradients)
    model.zero_grad()
    found = policy.response_logps(model, batch).logps
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    found.square().sum().backward()
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert_equal_gradient(p.grad, gradients[n])
    with model.disable_adapter(), torch.no_grad():
        off = policy.response_logps(model, batch).logps
        torch.testing.assert_close(off, one_by_one(model, examples), rtol=0, atol=1e-10)
    assert (off - found).abs().max() > 0.1
    base = make_model("llama")
    torch.testing.assert_close(off, one_by_one(base, examples).detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_adapted_tied_embeddings(targets: list[str]) -> None:
    """The table is one, its adapters are not: each changes the place that it is at."""
    model = lora(make_model("qwen2"), target_modules=["q_proj", *targets])
    base = model.get_base_model()
    embeddings = base.get_input_embeddings(), base.get_output_embeddings()
    tables = [getattr(layer, "base_layer", layer).weight for layer in embeddings]
    assert tables[0] is tables[1]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_embedding" in name:
                weight.normal_()
    examples = rows()
    expected = one_by_one(model, examples)
    expected.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    found = policy.response_logps(model, make_batch(examples)).logps
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    found.square().sum().backward()
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert_equal_gradient(p.grad, gradients[n])
    with model.disable_adapter(), torch.no_grad():
        off = policy.response_logps(model, make_batch(examples)).logps
    assert (off - found).abs().max() > 0.1


def test_heads_that_cannot_be_read_are_refused() -> None:
    batch = make_batch(rows())
    with pytest.raises(TypeError, match="DoRA"):
        policy.response_logps(lora(make_model("llama"), use_dora=True), batch)
    model = make_model("llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(97, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="quantised"):
        heads.read_head(model.lm_head, torch.zeros(1, 32))
    with pytest.raises(TypeError, match="LlamaModel has no output embedding"):
        policy.response_logps(model.model, batch)


class Wrapped(nn.Module):
    """A model whose logits are changed behind its head."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.inner, self.change = make_model("llama"), change
        self.config = self.inner.config
        self.dtype = torch.float64
        self.get_output_embeddings = self.inner.get_output_embeddings
        self.get_input_embeddings = self.inner.get_input_embeddings

    def forward(self, **kwargs: Any) -> Any:
        output = self.inner(**kwargs)
        output.logits = self.change(output.logits)
        return output


def test_what_follows_the_head_is_measured() -> None:
    examples = rows()
    for row in examples:
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            row[name] = [i % 90 for i in row[name]]
    batch = make_batch(examples)
    model = Wrapped(lambda z: 5 * torch.tanh(z[..., :90] * 0.7 / 5))
    found = heads.logit_transform(model)
    assert (found.scale, found.softcap, found.vocab_size) == (pytest.approx(0.7), 5.0, 90)
    expected = one_by_one(model, examples)
    torch.testing.assert_close(
        policy.response_logps(model, batch).logps, expected, rtol=0, atol=1e-6
    )
    for change in (lambda z: z.relu(), lambda z: z + 1, lambda z: z.flip(-1)):
        with pytest.raises(ValueError, match="neither a scale nor a soft cap"):
            heads.logit_transform(Wrapped(change))


def test_the_models_own_head_multiplies_nothing_and_hooks_go() -> None:
    model = make_model("llama")
    batch = make_batch(rows())
    heads.logit_transform(model)
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda m, i, o: sizes.append(i[0].shape[1]))
    policy.response_logps(model, batch)
    assert sizes == [0]
    handle.remove()
    with pytest.raises(IndexError):
        policy.response_logps(model, {**batch, "response_rows": batch["response_rows"] + 10_000})
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks
    assert model(input_ids=batch["input_ids"]).logits.shape[-2] == batch["input_ids"].shape[1]


def test_evaluating_restores_each_module() -> None:
    model = make_model("llama").train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    with heads.evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before


def test_bf16_sums_in_fp32() -> None:
    """Log-probs of a bf16 model are those of its hidden states in fp32: no rounding of logits."""
    model = make_model("llama").to(torch.bfloat16)
    batch = make_batch(rows())
    taken: list[Tensor] = []
    handle = model.model.register_forward_hook(lambda m, i, o: taken.append(o.last_hidden_state))
    found = policy.response_logps(model, batch).logps
    handle.remove()
    assert found.dtype == torch.float32
    hidden = taken[-1].flatten(0, 1)[batch["response_rows"]].double()
    logps = (hidden @ model.lm_head.weight.double().T).log_softmax(-1)
    targets = batch["response_targets"]
    expected = logps.gather(-1, targets.clamp(min=0)[:, None])[:, 0].where(targets >= 0, 0.0)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_experts_are_balanced_over_the_tokens_of_packed_rows() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", **SIZES, num_local_experts=4, head_dim=8)
    model = AutoModelForCausalLM.from_config(config).eval()
    examples = rows()
    batch = make_batch(examples, prefix_sharing=False, row_tokens=50)
    assert (batch["document_ids"] < 0).any()  # there are pads
    found = policy.response_logps(model, batch, balance_experts=True)
    torch.testing.assert_close(found.logps, one_by_one(model, examples), rtol=0, atol=1e-5)
    gates: list[Tensor] = []
    for side in ("chosen", "rejected"):
        for e in examples:
            ids = torch.tensor([[*e["prompt_ids"], *e[f"{side}_ids"]]])
            output = model(input_ids=ids, output_router_logits=True, use_cache=False)
            gates = [
                torch.cat([g, h]) if gates else h
                for g, h in zip(gates or output.router_logits, output.router_logits, strict=True)
            ]
    module = sys.modules[type(model).__module__]
    expected = module.load_balancing_loss_func(tuple(gates), 4, 2)
    assert found.aux_loss is not None
    torch.testing.assert_close(found.aux_loss, expected)
    found.aux_loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad is not None


def kl_by_hand(p: Tensor, r: Tensor, targets: Tensor) -> Tensor:
    p, r = p.log_softmax(-1), r.log_softmax(-1)
    return ((r.exp() * (r - p)).sum(-1)).where(targets >= 0, 0.0)


def test_contrast_with_the_reference() -> None:
    from fastpref.contrast import contrast

    model, other = make_model("phi"), make_model("phi")
    with torch.no_grad():
        other.lm_head.weight.mul_(0.9)
        other.lm_head.bias.normal_()
    batch = make_batch(rows())
    targets = batch["response_targets"]
    logits, ref_logits = (
        m(**policy.model_inputs(m, batch)).logits.flatten(0, 1)[batch["response_rows"]]
        for m in (model, other)
    )
    scored = policy.response_logps(other, batch, inspect=lambda head: head.detach())
    found = policy.response_logps(
        model,
        batch,
        inspect=lambda head: contrast(head, scored.extra, targets, {"kl", "perturbed"}, 0.05),
    ).extra
    expected = kl_by_hand(logits, ref_logits.detach(), targets)
    torch.testing.assert_close(found["kl"], expected, rtol=0, atol=1e-9)
    for sign, name in ((1, "plus"), (-1, "minus")):
        mixed = (1 + sign * 0.05) * logits - sign * 0.05 * ref_logits
        logp = mixed.log_softmax(-1).gather(-1, targets.clamp(min=0)[:, None])[:, 0]
        torch.testing.assert_close(found[name], logp.where(targets >= 0, 0.0), rtol=0, atol=1e-9)
        assert not found[name].requires_grad
    gradient = torch.autograd.grad(expected.sum(), model.lm_head.weight, retain_graph=True)[0]
    torch.testing.assert_close(
        torch.autograd.grad(found["kl"].sum(), model.lm_head.weight)[0], gradient
    )
