"""The update: equal to plain PyTorch with materialised logits, whatever the micro-batching."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from fastpref import DPOConfig, DPOTrainer, PreferenceConfig, PreferenceTrainer

Options = Callable[..., dict[str, Any]]


def token_ids(tokenizer: Any, row: dict[str, str], side: str) -> tuple[list[int], list[int]]:
    prompt = tokenizer(row["prompt"])["input_ids"]
    whole = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"]
    return prompt, whole[len(prompt) :]


def sequence_logp(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """Sum of log-probabilities of one response, from the model's own logits."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(-1, torch.tensor(response)[:, None]).sum()


Gradients = dict[str, Tensor]


def gradients(model: nn.Module) -> Gradients:
    """A copy of what each trained parameter's gradient holds."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Keeps the gradients of each step, as the optimiser takes them: clipped."""

    def __init__(self) -> None:
        self.steps: list[Gradients] = []

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.steps.append(gradients(model))


def plain_dpo(
    model: nn.Module,
    reference: Callable[..., Tensor],
    tokenizer: Any,
    rows: list[dict[str, str]],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    beta: float,
) -> tuple[list[float], list[Gradients]]:
    """DPO in the plainest PyTorch: one sequence at a time, AdamW as transformers sets it up.

    Returns the loss and the clipped gradients of each step.
    """
    decayed = [p for n, p in model.named_parameters() if p.requires_grad and "norm" not in n]
    others = [p for n, p in model.named_parameters() if p.requires_grad and "norm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others}], lr=learning_rate, weight_decay=0.0
    )
    losses, taken = [], []
    for step in range(steps):
        batch = rows[step * batch_size : (step + 1) * batch_size]
        optimizer.zero_grad()
        total = 0.0
        for row in batch:
            margin = torch.zeros(())
            for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
                ids = token_ids(tokenizer, row, side)
                margin = margin + sign * (sequence_logp(model, *ids) - reference(*ids))
            loss = -F.logsigmoid(beta * margin) / len(batch)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        taken.append(gradients(model))
        optimizer.step()
        losses.append(total)
    return losses, taken


def losses_of(trainer: Any) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("adapter", [None, "lora", "lora with head"])
def test_ten_steps_equal_plain_pytorch(
    make: Any, tokenizer: Any, options: Options, adapter: str | None
) -> None:
    from peft import LoraConfig, get_peft_model

    pairs = make.pairs(20)
    config = None
    if adapter:
        targets = ["q_proj", "v_proj", "down_proj"] + (["lm_head"] if "head" in adapter else [])
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    args = DPOConfig(**options(max_steps=10, beta=0.3, train_sampling_strategy="sequential"))
    recorder = Recorder()
    trainer = DPOTrainer(
        make.model(),
        args=args,
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[recorder],
    )
    model = make.model()
    base = copy.deepcopy(model).eval()
    if config is not None:
        torch.manual_seed(0)
        model = get_peft_model(model, config)
        model.load_state_dict(trainer.model.state_dict())

    def reference(prompt: list[int], response: list[int]) -> Tensor:
        with torch.no_grad():
            return sequence_logp(base, prompt, response)

    trainer.train()
    expected, wanted = plain_dpo(
        model,
        reference,
        tokenizer,
        list(pairs) * 2,
        steps=10,
        batch_size=4,
        learning_rate=1e-3,
        beta=0.3,
    )
    torch.testing.assert_close(losses_of(trainer), expected, rtol=0, atol=1e-5)
    assert sum(expected[5:]) < sum(expected[:5]) - 0.1  # the second epoch knows the pairs
    assert len(recorder.steps) == len(wanted) == 10
    for ours, theirs in zip(recorder.steps, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert max(grad.abs().max() for grad in theirs.values()) > 1e-2
    weights = dict(trainer.model.named_parameters())
    for name, weight in model.named_parameters():
        # Adam divides by the gradient's size, which magnifies rounding where that is tiny.
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-5)


def test_gradients_equal_plain_pytorch(make: Any, tokenizer: Any, options: Options) -> None:
    pairs = make.pairs(6)
    args = DPOConfig(**options(per_device_train_batch_size=6, train_sampling_strategy="sequential"))
    trainer = DPOTrainer(make.model(), args=args, train_dataset=pairs, processing_class=tokenizer)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=None).backward()
    model = make.model()
    base = copy.deepcopy(model)
    for row in pairs:
        margin = torch.zeros(())
        for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
            ids = token_ids(tokenizer, row, side)
            margin = margin + sign * (
                sequence_logp(model, *ids) - sequence_logp(base, *ids).detach()
            )
        (-F.logsigmoid(0.1 * margin) / len(pairs)).backward()
    ours = dict(trainer.model.named_parameters())
    for name, weight in model.named_parameters():
        assert ours[name].grad is not None
        torch.testing.assert_close(ours[name].grad, weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [["sigmoid"], ["sigmoid", "sft"], ["ipo"]])
def test_accumulation_does_not_change_the_update(
    make: Any, tokenizer: Any, options: Options, loss: list[str]
) -> None:
    """Ten steps over 10 pairs, 4 a step: the last window of an epoch has 2. In float64, for
    exactness."""
    runs = []
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        args = DPOConfig(
            **options(
                loss_type=loss,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                max_steps=10,
                train_sampling_strategy="sequential",
            )
        )
        model = make.model().double()
        trainer = DPOTrainer(
            model, args=args, train_dataset=make.pairs(10), processing_class=tokenizer
        )
        trainer.train()
        runs.append((losses_of(trainer), [p.detach() for p in trainer.model.parameters()]))
    for losses, weights in runs[1:]:
        torch.testing.assert_close(losses, runs[0][0], rtol=1e-6, atol=0)  # logged in fp32
        for ours, first in zip(weights, runs[0][1], strict=True):
            torch.testing.assert_close(ours, first, rtol=0, atol=1e-10)


def test_first_loss_is_ln_2(make: Any, tokenizer: Any, options: Options) -> None:
    args = PreferenceConfig(**options(max_steps=1))
    trainer = PreferenceTrainer(
        make.model(), args=args, train_dataset=make.pairs(), processing_class=tokenizer
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log["rewards/margins"] == 0.0  # same op, same weights: exactly
    assert log["rewards/accuracies"] == 0.0  # a tie is not a win


def test_weights_weigh_pairs_and_not_their_number(
    make: Any, tokenizer: Any, options: Options
) -> None:
    """A pair of weight 0 gives nothing, and still counts as a pair."""
    rows = make.pairs(4)
    weighted = rows.add_column("weight", [2.0, 0.0, 1.0, 0.5])
    args = DPOConfig(**options(max_steps=1, train_sampling_strategy="sequential", beta=0.5))
    trainer = DPOTrainer(
        make.model(), make.model(1), args, train_dataset=weighted, processing_class=tokenizer
    )
    losses = []
    for i in range(4):
        one = DPOTrainer(
            make.model(),
            make.model(1),
            args,
            train_dataset=rows.select([i]),
            processing_class=tokenizer,
        )
        losses.append(one.evaluate(rows.select([i]))["eval_loss"])
    assert max(losses) - min(losses) > 0.1
    trainer.train()
    expected = (2 * losses[0] + losses[2] + 0.5 * losses[3]) / 4
    assert losses_of(trainer)[0] == pytest.approx(expected, abs=1e-5)


def test_no_logits_in_training_and_evaluation(make: Any, tokenizer: Any, options: Options) -> None:
    args = DPOConfig(**options(max_steps=2, eval_strategy="steps", eval_steps=1, self_check=False))
    trainer = DPOTrainer(
        make.model(),
        args=args,
        train_dataset=make.pairs(8),
        eval_dataset=make.pairs(4, 1),
        processing_class=tokenizer,
        compute_metrics=lambda p: {"pairs": len(p.predictions), "columns": p.predictions.shape[1]},
    )
    sizes = []
    for model in (trainer.model, *trainer.reference.models):
        # The scale of the logits is measured with a few numbers, once.
        model.get_output_embeddings().register_forward_hook(
            lambda m, i, o: sizes.append(o.shape[1])
        )
    trainer.train()
    assert sizes.count(0) == len(sizes) - 2
    assert max(sizes) == 1
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert logs[0]["eval_pairs"] == 4
    assert logs[0]["eval_columns"] == 4


def test_evaluation_is_the_mean_over_pairs_and_tokens(
    make: Any, tokenizer: Any, options: Options
) -> None:
    """Batches of 4 and 3: means over pairs, not over batches."""
    rows = make.pairs(7)
    args = DPOConfig(**options(per_device_eval_batch_size=4))
    trainer = DPOTrainer(
        make.model(), make.model(1), args, eval_dataset=rows, processing_class=tokenizer
    )
    found = trainer.evaluate()
    policy, base = make.model(), make.model(1)
    losses, wins, chosen_logps, entropy, tokens, top1, logits, chosen_tokens = (
        [] for _ in range(8)
    )
    with torch.no_grad():
        for row in rows:
            ratios = []
            for side in ("chosen", "rejected"):
                prompt, response = token_ids(tokenizer, row, side)
                z = policy(input_ids=torch.tensor([[*prompt, *response]])).logits[
                    0, len(prompt) - 1 : -1
                ]
                logp = sequence_logp(policy, prompt, response)
                ratios.append(float(logp - sequence_logp(base, prompt, response)))
                p = z.softmax(-1)
                entropy.append(float(-(p * p.log()).sum()))
                tokens.append(len(response))
                if side == "chosen":
                    chosen_logps.append(float(logp))
                    top1.append(float((z.argmax(-1) == torch.tensor(response)).sum()))
                    logits.append(float(z.mean(-1).sum()))
                    chosen_tokens.append(len(response))
            losses.append(float(-F.logsigmoid(torch.tensor(0.1 * (ratios[0] - ratios[1])))))
            wins.append(float(ratios[0] > ratios[1]))
    expected = {
        "eval_loss": sum(losses) / 7,
        "eval_rewards/accuracies": sum(wins) / 7,
        "eval_logps/chosen": sum(chosen_logps) / 7,
        "eval_entropy": sum(entropy) / sum(tokens),
        "eval_mean_token_accuracy": sum(top1) / sum(chosen_tokens),
        "eval_logits/chosen": sum(logits) / sum(chosen_tokens),
        "eval_len/chosen": sum(chosen_tokens) / 7,
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-5), key
    assert 0 < expected["eval_rewards/accuracies"] < 1


def test_several_losses_add_up(make: Any, tokenizer: Any, options: Options) -> None:
    rows = make.pairs(5)

    def loss(**kwargs: Any) -> dict[str, float]:
        args = DPOConfig(**options(**kwargs))
        return DPOTrainer(
            make.model(), make.model(1), args, eval_dataset=rows, processing_class=tokenizer
        ).evaluate()

    both = loss(loss_type=["sigmoid", "sft"], loss_weights=[0.7, 0.2])
    one, other = loss(), loss(loss_type="sft")
    expected = 0.7 * one["eval_loss"] + 0.2 * other["eval_loss"]
    assert both["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert both["eval_loss/dpo"] == pytest.approx(one["eval_loss"], abs=1e-6)
    assert loss(rpo_alpha=0.5)["eval_loss"] == pytest.approx(
        one["eval_loss"] + 0.5 * other["eval_loss"], abs=1e-6
    )


def test_group_by_length_puts_like_with_like(make: Any, tokenizer: Any, options: Options) -> None:
    args = DPOConfig(**options(group_by_length=True, per_device_train_batch_size=2))
    trainer = DPOTrainer(
        make.model(), args=args, train_dataset=make.pairs(30), processing_class=tokenizer
    )
    lengths = trainer.train_dataset["length"]
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(30))
    gaps = [abs(lengths[a] - lengths[b]) for a, b in zip(order[::2], order[1::2], strict=True)]
    mixed = [abs(a - b) for a in lengths for b in lengths]
    assert sum(gaps) / len(gaps) < 0.6 * sum(mixed) / len(mixed)


def test_a_stream_trains(make: Any, tokenizer: Any, options: Options) -> None:
    args = DPOConfig(**options(max_steps=2))
    rows: Dataset = make.pairs(12)
    trainer = DPOTrainer(
        make.model(),
        args=args,
        train_dataset=rows.to_iterable_dataset(),
        processing_class=tokenizer,
    )
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_compiled_backbone_gives_the_same_losses(
    make: Any, tokenizer: Any, options: Options
) -> None:
    runs = []
    for backend in (None, "eager"):
        args = DPOConfig(**options(torch_compile_backend=backend))
        trainer = DPOTrainer(
            make.model(), args=args, train_dataset=make.pairs(), processing_class=tokenizer
        )
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-6)


def test_dropout_is_off_unless_asked_for(make: Any, tokenizer: Any, options: Options) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    models = [lambda: make.model(attention_dropout=0.5), lambda: GPT2LMHeadModel(config)]
    for build in models:
        for disable in (True, False):
            args = DPOConfig(**options(max_steps=1, disable_dropout=disable))
            trainer = DPOTrainer(
                build(), args=args, train_dataset=make.pairs(), processing_class=tokenizer
            )
            trainer.train()
            assert (trainer.state.log_history[0]["rewards/margins"] == 0.0) == disable
