"""Config, objective and metrics, each alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import DPOConfig, DPOTrainer, PreferenceConfig
from fastpref.batches import TrainerCollator, likelihood_rates
from fastpref.data import PreferenceCollator
from fastpref.metrics import Meter, MetricsFile, peak_memory
from fastpref.objective import check_needs, ld_weights, make_examples, make_losses
from fastpref.policy import ResponseLogps
from fastpref.reference import TokenStats

Options = Callable[..., dict[str, Any]]


# Config


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (
            {"learning_rat": 1.0},
            TypeError,
            "no option 'learning_rat'. Did you mean 'learning_rate'",
        ),
        ({"generate_during_eval": True}, ValueError, "use a callback that generates"),
        ({"force_use_ref_model": True}, ValueError, "pass ref_model to the trainer"),
        ({"loss_weights": [1.0, 2.0]}, ValueError, "2 numbers for 1 losses"),
        ({"ld_alpha": 1.5}, ValueError, r"ld_alpha must be in \[0, 1\], got 1.5"),
        ({"truncation_mode": "middle"}, ValueError, "'keep_start' or 'keep_end', got 'middle'"),
        ({"label_smoothing_factor": 0.1}, ValueError, "use label_smoothing"),
        (
            {"reference_free": True, "sync_ref_model": True},
            ValueError,
            "no reference to precompute",
        ),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, ValueError, "choose one"),
        ({"rpo_alpha": 1.0, "loss_weights": [1.0]}, ValueError, "rpo_alpha together with several"),
        ({"activation_offloading": True}, ValueError, "needs gradient_checkpointing=True"),
        ({"ref_model_sync_steps": 0}, ValueError, "ref_model_sync_steps must be at least 1, got 0"),
        ({"ref_model_mixup_alpha": 2}, ValueError, r"mixup_alpha must be in \[0, 1\], got 2"),
        ({"per_device_train_batch_size": 0}, ValueError, "train_batch_size must be at least 1"),
        ({"per_device_eval_batch_size": 0}, ValueError, "eval_batch_size must be at least 1"),
        ({"precompute_ref_batch_size": 0}, ValueError, "ref_batch_size must be at least 1, got 0"),
        ({"pad_to_multiple_of": "x"}, ValueError, "pad_to_multiple_of='x': expected a whole num"),
    ],
)
def test_config_errors(options: Options, given: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        DPOConfig(**options(**given))


def test_config_defaults_and_older_names(options: Options) -> None:
    trl = pytest.importorskip("trl")
    theirs = trl.DPOConfig("x", bf16=False)
    ours = DPOConfig("x", padding_value=0, use_logits_to_keep=True, max_prompt_length=64)
    same = "beta learning_rate logging_steps gradient_checkpointing max_length loss_type seed"
    same += " label_smoothing truncation_mode disable_dropout precompute_ref_log_probs optim"
    same += " sync_ref_model ref_model_mixup_alpha ref_model_sync_steps trust_remote_code"
    same += " f_divergence_type f_alpha_divergence_coef use_weighting per_device_train_batch_size"
    for name in same.split():
        assert getattr(ours, name) == getattr(theirs, name), name
    assert not ours.bf16  # no accelerator here computes in it
    assert ours.max_prompt_length == 64
    fields = {f for f in vars(theirs) if not f.startswith("_")}
    unknown = {f for f in fields if not hasattr(ours, f)}
    assert unknown <= {"pad_token"}
    assert DPOConfig(**options(group_by_length=True)).train_sampling_strategy == "group_by_length"
    assert DPOConfig(**options(gradient_checkpointing=True)).activation_checkpointing
    liger = DPOConfig(**options(use_liger_kernel=True)).liger_kernel_config
    assert liger == {"fused_linear_cross_entropy": False}
    rpo = PreferenceConfig(**options(rpo_alpha=0.2))
    assert (rpo.loss_type, rpo.loss_weights) == (["dpo", "sft"], [1.0, 0.2])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"loss_type": "dpoo"}, "did you mean 'dpo'"),
        ({"loss_type": ["dpo", "kto"]}, "different kinds"),
        ({"loss_type": ["dpo", "nca"]}, "different kinds"),
        (
            {"loss_type": "hinge", "label_smoothing": 0.1},
            "label_smoothing=0.1 has no effect on hinge",
        ),
        ({"discopop_tau": 0.1}, "discopop_tau=0.1 has no effect on dpo"),
        (
            {"loss_type": "sppo_hard", "use_weighting": True, "f_divergence_type": "js_div"},
            "js_div",
        ),
    ],
)
def test_losses_that_cannot_be_made(options: Options, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_losses(PreferenceConfig(**options(**given)))


def test_options_reach_the_losses(options: Options) -> None:
    config = PreferenceConfig(
        **options(
            loss_type=["robust", "sft"],
            label_smoothing=0.2,
            beta=0.3,
            loss_args={"sft": {"nll_reduction": "example"}},
            nll_reduction="tokens",
        )
    )
    first, second = make_losses(config)._terms
    assert first.arguments == {"label_smoothing": 0.2, "beta": 0.3}
    assert second.arguments == {"nll_reduction": "example"}
    config = PreferenceConfig(**options(loss_type="ipo", f_divergence_type="alpha_divergence"))
    assert make_losses(config)._terms[0].arguments == {"f_divergence": "alpha", "f_alpha": 0.5}


# Objective


@pytest.mark.parametrize(
    ("loss", "columns", "references", "words"),
    [
        ("rebel", set(), 1, "rebel needs chosen_scores, .* no column 'chosen_score'"),
        ("dpo", set(), 0, "dpo needs ref_chosen, ref_rejected: .* The run has none"),
        ("mrpo", set(), 1, "mrpo needs .*several reference models"),
        ("mdpo", set(), 1, "mdpo needs corrupted, .*corrupt_context"),
        ("nca", set(), 1, "nca needs scores: .*groups `scores`.* no column 'scores'"),
        ("tpo", set(), 0, "tpo needs third, .* no column 'third_ids'"),
    ],
)
def test_needs_that_are_not_met(
    options: Options, loss: str, columns: set[str], references: int, words: str
) -> None:
    combined = make_losses(PreferenceConfig(**options(loss_type=loss)))
    with pytest.raises(ValueError, match=words):
        check_needs(combined, columns, references)


def make_batch(prompts: bool = False, sharing: bool = True, **columns: list[Any]) -> dict[str, Any]:
    draw = random.Random(0)
    rows = []
    for i, (p, c, r) in enumerate([(3, 4, 2), (5, 1, 6), (2, 3, 3)]):
        sizes = {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r, "third_ids": i + 1}
        row = {k: [draw.randrange(3, 90) for _ in range(n)] for k, n in sizes.items()}
        rows.append(row | {k: v[i] for k, v in columns.items()})
    return TrainerCollator(
        PreferenceCollator(pad_token_id=0, prefix_sharing=sharing), "pair", prompts
    )(rows)


def forward(batch: dict[str, Any]) -> ResponseLogps:
    n = len(batch["response_targets"])
    torch.manual_seed(0)
    logps = -torch.rand(n)
    return ResponseLogps(logps, TokenStats(*(torch.rand(n) for _ in range(5))))


def test_tokens_beyond_the_shorter_response_weigh_less() -> None:
    batch = make_batch()
    expected = []
    spans = batch["lengths"].tolist()
    for i, n in enumerate(spans[:6]):
        shared = min(n, spans[i + 3 if i < 3 else i - 3])
        expected += [1.0] * shared + [0.25] * (n - shared)
    expected += [1.0] * sum(spans[6:])
    assert ld_weights(batch, 0.25).tolist() == expected


@pytest.mark.parametrize("sharing", [True, False])
def test_examples_hold_what_the_losses_need(options: Options, sharing: bool) -> None:
    columns = {
        "chosen_score": [1.0, 2.0, 3.0],
        "rejected_score": [0.5, 1.5, 2.5],
        "prior_chosen": [[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]],
        "prior_rejected": [[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]],
        "weight": [1.0, 0.5, 2.0],
    }
    batch = make_batch(prompts=True, sharing=sharing, **columns)
    names = ["rebel", "spo", "ld_dpo", "wpo", "selm", "sft"]
    config = PreferenceConfig(**options(loss_type=names, nll_scope="all"))
    policy = forward(batch)
    references = torch.stack([policy.logps - 0.5, policy.logps - 1.0])
    found: Any = make_examples(make_losses(config), batch, policy, references)
    bounds = batch["cu_seqlens"].tolist()
    sums = torch.stack([policy.logps[a:b].sum() for a, b in pairwise(bounds)])
    torch.testing.assert_close(found.chosen, sums[:3])
    torch.testing.assert_close(found.rejected, sums[3:6])
    torch.testing.assert_close(found.third, sums[6:9])
    torch.testing.assert_close(found.prompt, sums[9:])
    assert found.prompt_lengths.tolist() == [2, 4, 1]
    assert found.chosen_lengths.tolist() == [4, 1, 3]
    torch.testing.assert_close(found.ref_rejected[1], sums[3:6] - torch.tensor([2.0, 6.0, 3.0]))
    torch.testing.assert_close(found.rejected_tokens.values, policy.logps[8:19])
    assert found.rejected_tokens.cu_seqlens.tolist() == [0, 2, 8, 11]
    assert found.chosen_scores.tolist() == [1.0, 2.0, 3.0]
    assert found.prior_chosen.tolist() == [[-1.0, -3.0, -5.0], [-2.0, -4.0, -6.0]]
    assert found.weights.tolist() == [1.0, 0.5, 2.0]
    assert policy.stats is not None
    mean = policy.stats.log_sum_sq_probs[:4].mean()
    torch.testing.assert_close(found.chosen_log_sum_sq[0], mean)
    # Prompt tokens are scored where they are predicted.
    rows, targets = batch["response_rows"][bounds[9] :], batch["response_targets"][bounds[9] :]
    tokens = batch["input_ids"].flatten()
    assert torch.equal(tokens[rows + 1], targets)


def test_likelihood_rates_count_masks(make: Any) -> None:
    from datasets import Dataset

    rows = {"prompt_ids": [[1, 2], [1]], "chosen_ids": [[1, 2, 3], [4]], "rejected_ids": [[1], [2]]}
    data = Dataset.from_dict(rows)
    assert likelihood_rates(data, "pair", False) == {"tokens_per_pair": 2.0}
    assert likelihood_rates(data, "pair", True) == {
        "tokens_per_pair": 2.0,
        "prompt_tokens_per_pair": 0.5,
    }
    masked = data.add_column("chosen_mask", [[0, 1, 1], [1]])
    assert likelihood_rates(masked, "pair", False) == {"tokens_per_pair": 1.5}
    assert likelihood_rates(data.to_iterable_dataset(), "pair", False) == {}


# Metrics


def test_meter_is_the_mean_over_all() -> None:
    meter, everything = Meter(), []
    for size in (3, 1, 5):
        x, n = torch.randn(size), torch.rand(size)
        everything.append((x, n))
        meter.add({"mean": (x, torch.ones(size)), "share": (x, n)}, tokens=10 * size)
    saved = json.loads(json.dumps(meter.state_dict()))
    x, n = (torch.cat(part) for part in zip(*everything, strict=True))
    for each in (meter, Meter()):
        if each is not meter:
            each.load_state_dict(saved, torch.device("cpu"))
        found = each.read(lambda t: 2 * t)  # two ranks that saw the same
        assert found["mean"] == pytest.approx(x.double().mean().item())
        assert found["share"] == pytest.approx((x.double().sum() / n.double().sum()).item())
        assert found["num_tokens"] == 180
        assert found["time/tokens_per_second"] > 0
        assert each.read() == {}


def test_peak_memory_where_there_is_no_resource_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    cpu = torch.device("cpu")
    usual = peak_memory(cpu)
    monkeypatch.setattr("fastpref.metrics._resident_peak", lambda: 0)
    assert 0.9 * usual < peak_memory(cpu)  # may begin with the parent's
    monkeypatch.setitem(sys.modules, "resource", None)
    assert 0.1 * usual < peak_memory(cpu) <= 1.1 * usual


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells them apart")
def test_peak_memory_is_not_that_of_the_parent() -> None:
    child = "import torch, fastpref.metrics as m; print(m.peak_memory(torch.device('cpu')))"
    parent = f"""
import subprocess, sys
len(b"x" * (1 << 30))
subprocess.run([sys.executable, "-c", {child!r}], check=True)
"""
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 1 << 26 < int(done.stdout) < 0.9 * (1 << 30)


def test_meter_leaves_repeated_examples_out() -> None:
    meter = Meter()
    x = torch.tensor([1.0, float("nan"), 3.0])
    counts = torch.tensor([True, False, True])
    meter.add({"mean": (x, torch.ones(3))}, counts=counts)
    assert meter.read(rates=False) == {"mean": 2.0, "num_tokens": 0.0}


def test_reading_the_meter_costs_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter()
    reads: list[str] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "item", lambda self: reads.append("item"))
    monkeypatch.setattr(Tensor, "tolist", lambda self: (reads.append("tolist"), tolist(self))[1])
    for _ in range(5):
        meter.add({"a": (torch.ones(2), torch.ones(2)), "b": (torch.ones(2), torch.ones(2))})
    assert reads == []
    meter.read()
    assert reads == ["tolist"]


def test_metrics_file(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.begin(0)
    for step in (1, 2, 3):
        file.append({"loss": step, "step": step})
    file.append({"train_runtime": 1.0, "step": 3})
    with file.path.open("a") as raw:
        raw.write('{"loss": 4, "st')
    file.begin(2)
    file.append({"loss": 30, "step": 3})
    found = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [(r["loss"], r["step"]) for r in found] == [(1, 1), (2, 2), (30, 3)]
    file.begin(0)
    assert not file.path.exists()
    assert len((tmp_path / "metrics.1.jsonl").read_text().splitlines()) == 3


def test_a_forward_patched_on_the_instance_is_explained(
    make: Any, tokenizer: Any, options: Callable[..., dict[str, Any]]
) -> None:
    """A copy of such a model runs the original, so the reference would be the policy."""
    model = make.model()
    model.forward = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)
    with pytest.raises(ValueError, match="patched on the instance"):
        DPOTrainer(
            model,
            args=DPOConfig(**options(max_steps=1)),
            train_dataset=make.pairs(4),
            processing_class=tokenizer,
        ).train()


def test_one_sided_reference_column_is_refused(
    make: Any, tokenizer: Any, options: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match="'ref_chosen_logps' alone"):
        DPOTrainer(
            make.model(),
            args=DPOConfig(**options(max_steps=1)),
            train_dataset=make.pairs(4, ref_chosen_logps=-3.0),
            processing_class=tokenizer,
        )
