"""`fastpref.integrations.trl.patch`: TRL's own trainers with the fused op log what they did."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from fastpref.integrations import trl as integration

trl = pytest.importorskip("trl")


def losses(make: Any, tokenizer: Any, options: Any, kind: str, patched: bool, peft: bool) -> Any:
    config, trainer = {
        "dpo": (trl.DPOConfig, trl.DPOTrainer),
        "kto": (trl.KTOConfig, trl.KTOTrainer),
    }[kind]
    model = make.model()
    more: dict[str, Any] = {"ref_model": copy.deepcopy(model)}
    if peft:
        from peft import LoraConfig

        more = {"peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])}
    args = config(**options(max_steps=4, bf16=False, train_sampling_strategy="sequential"))
    built = trainer(
        model, args=args, train_dataset=make.pairs(16), processing_class=tokenizer, **more
    )
    if patched:
        assert integration.patch(integration.patch(built)) is built
    built.train()
    keys = ("loss", "rewards/margins", "logps/chosen", "entropy", "logits/chosen", "grad_norm")
    return [[log[key] for key in keys if key in log] for log in built.state.log_history[:-1]]


@pytest.mark.parametrize(("kind", "peft"), [("dpo", False), ("dpo", True), ("kto", False)])
def test_patched_trainer_logs_the_same(
    make: Any, tokenizer: Any, options: Any, kind: str, peft: bool, monkeypatch: Any
) -> None:
    calls = []
    real = integration.linear_logprobs

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].shape[0])
        return real(*args, **kwargs)

    plain = losses(make, tokenizer, options, kind, False, peft)
    monkeypatch.setattr(integration, "linear_logprobs", counted)
    assert losses(make, tokenizer, options, kind, False, peft) == plain
    assert not calls  # a trainer that was not patched keeps TRL's own function
    ours = losses(make, tokenizer, options, kind, True, peft)
    assert calls
    assert len(plain) == 4
    for a, b in zip(ours, plain, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


def test_what_is_no_trl_trainer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a trl\.DPOTrainer"):
        integration.patch(object())
