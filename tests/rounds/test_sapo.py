"""SAPO: its primitives against worked numbers, its steps against plain PyTorch, a killed run."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from fastpref import PreferenceConfig, PreferenceTrainer, rounds
from fastpref.rounds import Sampling, SelfPlay, SelfPlayTrainer, choose_segment, ema_update, splice
from fastpref.rounds.replay import ReplayBuffer
from fastpref.rounds.run import read_jsonl

GOLDEN = json.loads((Path(__file__).parents[1] / "losses" / "golden.json").read_text())
END = 2
LONGEST = 4

Weights = dict[str, torch.Tensor]


def test_the_average_of_the_worked_example() -> None:
    case = GOLDEN["sapo_ema"]
    average, decay = torch.tensor([case["params"]["ema_init"]]), case["params"]["beta_ema"]
    found = []
    for theta in case["inputs"]["theta_per_step"]:
        ema_update([average], [torch.tensor([theta])], decay)
        found.append(float(average))
    assert found == case["outputs"]["ema_per_step"]


def test_an_average_copies_bit_by_bit_or_stays() -> None:
    average, weight = torch.randn(50), torch.randn(50) * 1e4
    before = average.clone()
    ema_update([average], [weight], 1.0)
    assert torch.equal(average, before)
    ema_update([average], [weight], 0.0)
    assert torch.equal(average, weight)
    with pytest.raises(ValueError, match="shorter"):
        ema_update([average], [], 0.5)


def test_splices_of_the_worked_example() -> None:
    case = GOLDEN["sapo_splice"]
    response, start = case["inputs"]["response"], case["inputs"]["start"]
    for name in ("case1", "case2"):
        new, length = case["inputs"][f"{name}_new"], case["inputs"]["segment_len"]
        found = splice(response, new, start, length, [case["params"]["eos"]])
        assert found == case["outputs"][name]


def test_a_segment_of_the_whole_is_a_full_regeneration() -> None:
    assert splice([5, 6, 7], [8, 9, 10, 11], 0, 3, [END]) == [8, 9, 10]
    assert splice([5, 6, 7], [8, END], 0, 3, [END]) == [8, END]
    with pytest.raises(ValueError, match="2 tokens at 2 is not within a response of 3"):
        splice([5, 6, 7], [8, 9], 2, 2, [END])
    with pytest.raises(ValueError, match="1 new tokens without an end token for a segment of 2"):
        splice([5, 6, 7], [8], 0, 2, [END])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.integers(1, 20), st.integers(0, 99))
def test_a_segment_lies_within_and_leaves_the_end_alone(
    length: int, longest: int, seed: int
) -> None:
    start, size = choose_segment(length, longest, random.Random(seed))
    assert size == min(longest, length)
    assert 0 <= start <= max(length - 3 - size, 0)
    assert start + size <= length


def test_every_start_is_drawn_as_often() -> None:
    draw = random.Random(0)
    starts = [choose_segment(10, 4, draw)[0] for _ in range(4000)]
    assert {s: pytest.approx(1000, abs=110) for s in range(4)} == {
        s: starts.count(s) for s in set(starts)
    }


def test_the_buffer_of_the_worked_example_prefers_what_was_drawn_least() -> None:
    case = GOLDEN["sapo_replay_probs"]
    counts = case["inputs"]["sample_counts"]
    buffer: ReplayBuffer[int] = ReplayBuffer(len(counts))
    buffer.load_state_dict({"items": list(range(len(counts))), "counts": counts})
    found = buffer.probabilities()
    assert found == pytest.approx(case["outputs"]["probabilities"])
    fresh = found[counts.index(0)]
    assert [fresh / p for p in found] == pytest.approx([1 + count for count in counts])


# Steps of the trainer


class Steps(TrainerCallback):  # type: ignore[misc]
    """Keeps what there is after each step: weights, buffer; and what the step trained on."""

    def __init__(self, trainer: SelfPlayTrainer) -> None:
        self.trainer = trainer
        self.policies = [weights(trainer.model)]
        self.averages = [weights(trainer.opponent.average)]
        self.references: list[Weights] = []
        self.buffers: list[dict[str, Any]] = []
        self.drawn: list[dict[str, Any]] = []
        play = trainer.opponent.play

        def recorded(rows: Any, step: int) -> Any:
            found = play(rows, step)
            self.drawn += copy.deepcopy(found)
            return found

        trainer.opponent.play = recorded  # type: ignore[method-assign]
        trainer.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        self.policies.append(weights(trainer.model))
        self.averages.append(weights(trainer.opponent.average))
        if trainer.reference.models:
            self.references.append(weights(trainer.reference.models[0]))
        self.buffers.append(copy.deepcopy(trainer.opponent.buffer.state_dict()))


def weights(model: torch.nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def rows(make: Any, count: int = 16) -> list[dict[str, Any]]:
    tokenizer, draw = make.tokenizer(), random.Random(5)
    found = []
    for row in make.prompts(count):
        words = [draw.randint(4, 15) for _ in range(draw.randint(1, 11))]
        found.append(
            {"prompt_ids": tokenizer(row["prompt"])["input_ids"], "chosen_ids": [*words, END]}
        )
    return found


def config(folder: Path, **given: Any) -> PreferenceConfig:
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_length": 64,
        "logging_steps": 1,
        "use_cpu": True,
        "save_strategy": "no",
        "loss_type": "dpo",
        "beta": 0.1,
    }
    return PreferenceConfig(output_dir=str(folder), **{**options, **given})


def start(make: Any, folder: Path, policy: str, options: dict[str, Any], **given: Any) -> Steps:
    plain = {"sampling": sampling(), "buffer_capacity": 10, "ref_update_every": 2}
    trainer = SelfPlayTrainer(
        policy,
        self_play=SelfPlay(**{**plain, **options}),
        args=config(folder, **given),
        train_dataset=Dataset.from_list(rows(make)),
        processing_class=make.tokenizer(),
    )
    return Steps(trainer)


def sampling(**given: Any) -> Sampling:
    plain = {"n": 1, "temperature": 0.7, "top_k": 50, "top_p": 0.95, "max_new_tokens": LONGEST}
    return Sampling(**{**plain, **given})


@pytest.fixture(scope="module")
def run(make: Any, policy: str, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Five steps of four rows, ten places in the buffer, the reference moved at 2 and 4."""
    steps = start(make, tmp_path_factory.mktemp("steps"), policy, {})
    steps.trainer.train()
    return steps


def test_the_average_follows_every_step_and_the_reference_every_other(run: Steps) -> None:
    for name, first in run.policies[0].items():
        mean = first.double()
        for policy, average in zip(run.policies[1:], run.averages[1:]):
            mean = 0.5 * mean + 0.5 * policy[name].double()
            torch.testing.assert_close(average[name].double(), mean, rtol=1e-6, atol=1e-7)
        expected = [run.policies[0], *(run.averages[k] for k in (2, 2, 4, 4))]
        for reference, own in zip(run.references, expected):
            assert torch.equal(reference[name], own[name])
    assert not all(torch.equal(a, b) for a, b in zip(*(x.values() for x in run.policies[:2])))


def test_all_negatives_differ_from_the_chosen_one_by_one_segment(run: Steps, make: Any) -> None:
    chosen = [row["chosen_ids"] for row in rows(make)]
    ended = 0
    for item in [item for buffer in run.buffers for item in buffer["items"]]:
        own, new = chosen[item["example_ids"]], item["rejected_ids"]
        first, last = item["start"], item["start"] + item["length"]
        assert item["length"] == min(LONGEST, len(own))
        assert new[:first] == own[:first]
        if len(new) == len(own):
            assert new[last:] == own[last:]
        else:
            assert first < len(new) <= last
            assert new[-1] == END
            ended += 1
    assert ended


def test_the_buffer_holds_the_last_and_counts_what_was_drawn(run: Steps) -> None:
    pushed: list[Any] = []
    for step, buffer in enumerate(run.buffers):
        items, counts = buffer["items"], buffer["counts"]
        pushed += items[-4:]
        assert len(pushed) == 4 * (step + 1)
        assert items == pushed[-10:]
        if len(pushed) <= 10:
            assert sum(counts) == 4 * (step + 1)
    assert len(items) == 10
    drawn = [sum(item == other for other in run.drawn) for item in items]
    assert counts == drawn


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_its_steps_are_those_of_the_loss_on_what_it_drew(
    loss: str, make: Any, policy: str, tmp_path: Path
) -> None:
    steps = start(make, tmp_path / "a", policy, {"ref_update_every": None}, loss_type=loss)
    steps.trainer.train()
    given = rows(make)
    pairs = [
        {**given[item["example_ids"]], "rejected_ids": item["rejected_ids"]} for item in steps.drawn
    ]
    plain = PreferenceTrainer(
        policy,
        args=config(tmp_path / "b", loss_type=loss, train_sampling_strategy="sequential"),
        train_dataset=Dataset.from_list(pairs),
        processing_class=make.tokenizer(),
    )
    plain.train()
    own = weights(plain.model)
    assert all(torch.equal(own[name], value) for name, value in steps.policies[-1].items())


@pytest.mark.parametrize("longest", [3, 32])
def test_without_memory_the_policy_itself_writes(
    longest: int, make: Any, policy: str, tmp_path: Path
) -> None:
    """Decay 0: greedy ends of the policy before each step; of whole responses, whole answers."""
    greedy = sampling(temperature=0.0, max_new_tokens=longest)
    steps = start(make, tmp_path, policy, {"ema_decay": 0.0, "sampling": greedy}, max_steps=3)
    steps.trainer.train()
    model, given = AutoModelForCausalLM.from_pretrained(policy), rows(make)
    begun = set()
    for before, average, buffer in zip(steps.policies, steps.averages, steps.buffers):
        assert all(torch.equal(average[name], value) for name, value in before.items())
        model.load_state_dict(before, strict=False)
        for item in buffer["items"][-4:]:
            row, first = given[item["example_ids"]], item["start"]
            ids = [*row["prompt_ids"], *row["chosen_ids"][:first]]
            written: list[int] = []
            while len(written) < item["length"] and END not in written:
                logits = model(torch.tensor([ids + written])).logits[0, -1]
                written.append(int(logits.argmax()))
            tail = [] if END in written else row["chosen_ids"][first + item["length"] :]
            assert item["rejected_ids"] == [*row["chosen_ids"][:first], *written, *tail]
            begun.add(first)
    assert (begun == {0}) == (longest == 32)


def test_an_adapter_goes_on_from_a_checkpoint_with_its_average(
    make: Any, policy: str, tmp_path: Path
) -> None:
    """Dropout is on: writing segments leaves the random state of training alone."""

    def trainer() -> SelfPlayTrainer:
        return SelfPlayTrainer(
            policy,
            self_play=SelfPlay(sampling=sampling(), ref_update_every=2, ref_update_mode="policy"),
            args=config(
                tmp_path, max_steps=4, save_steps=3, save_strategy="steps", disable_dropout=False
            ),
            train_dataset=Dataset.from_list(rows(make)),
            processing_class=make.tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.2),
        )

    whole = trainer()
    base = next(p for n, p in whole.model.named_parameters() if "base_layer" in n)
    assert any(base is p for p in whole.opponent.average.parameters())
    whole.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for own, other in (
        (whole.model, again.model),
        (whole.opponent.average, again.opponent.average),
        (whole.reference.models[0], again.reference.models[0]),
    ):
        found = weights(other)
        assert all(torch.equal(found[name], value) for name, value in weights(own).items())
    assert whole.opponent.state_dict() == again.opponent.state_dict()


def test_a_step_that_is_refused_leaves_the_buffer_as_it_was(
    make: Any, policy: str, tmp_path: Path
) -> None:
    class Break(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    kwargs["model"].lm_head.weight.fill_(3e38)  # finite, its logits are not

    steps = start(make, tmp_path, policy, {})
    steps.trainer.add_callback(Break())
    with pytest.raises(FloatingPointError, match="loss of step 3 is not finite"):
        steps.trainer.train()
    saved = json.loads((tmp_path / "checkpoint-2" / "self_play.json").read_text())
    assert saved["buffer"] == steps.buffers[1]
    assert saved["tally"]["made"] == 8


# The recipe


def sapo(options: Callable[..., dict[str, Any]], make: Any, **given: Any) -> rounds.SAPO:
    data = [{k: row[k] for k in ("prompt", "chosen")} for row in make.pairs(16)]
    plain = {"dataset": data, "sampling": {"n": 1, "max_new_tokens": LONGEST}, "held_out": 0}
    return rounds.SAPO(**options(**{**plain, **given}))


def test_the_recipe_counts_what_it_drops_and_shows_its_negatives(
    options: Callable[..., dict[str, Any]], make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data = [{k: row[k] for k in ("prompt", "chosen")} for row in make.pairs(14)]
    data += [{"prompt": "w1 w2 w3", "chosen": ""}, {"prompt": "w4", "chosen": " w5" * 70}]
    held_out = make.pairs(4, seed=9)
    with caplog.at_level("WARNING", "fastpref"):
        made = sapo(options, make, dataset=data, judge=make.reward, eval_dataset=held_out).run()
    assert "1 pairs are longer than training reads" in caplog.text
    (report,) = made.reports
    shown = report["training"]
    assert shown["examples"] == 14
    assert report["left_out"] == {
        "longer than training reads": 1,
        "the chosen response is empty": 1,
    }
    assert shown["first loss"] == pytest.approx(0.693147, abs=1e-6)
    assert (shown["negatives/made"], shown["buffer/size"], shown["buffer/draws"]) == (8, 8, 1.0)
    negatives = read_jsonl(made.folder / "round-1" / "train" / "trainer" / "negatives.jsonl")
    assert len(negatives) == 8
    assert sum(row["drawn"] for row in negatives) == 8
    drawn = [row for row in negatives if row["drawn"]]
    assert report["trained_on"]["pairs"] == len(drawn)
    gaps = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in drawn]
    assert report["trained_on"]["gap_tokens"][0] == pytest.approx(sum(gaps) / len(gaps))
    assert {"prompt", "chosen", "rejected", "start", "length"} <= set(negatives[0])
    assert {"win_rate", "kl"} <= set(report["held_out"])


KILLED = """
import os, random, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import conftest as makers
from fastpref import rounds
from fastpref.rounds import self_play

folder, last = Path(sys.argv[2]), int(sys.argv[3])
play = self_play.Opponent.play

def play_or_die(self, rows, step):
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return play(self, rows, step)

self_play.Opponent.play = play_or_die
draw = random.Random(3)
data = [{**row, "chosen": " " + makers.words(draw, 3, 12)} for row in makers.make_prompts(16)]
rounds.SAPO(
    model=str(folder / "policy"), run_dir=str(folder / "run"), dataset=data, use_cpu=True,
    sampling={"n": 1, "temperature": 0.7, "max_new_tokens": 4}, buffer_capacity=10,
    ref_update_every=2, held_out=0, max_prompt_tokens=16,
    training={"per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 1, "max_length": 64,
              "learning_rate": 1e-2, "gradient_checkpointing": False, "disable_tqdm": True},
).run()
self_play.Opponent.play = play
"""


def test_a_killed_run_ends_with_the_same_weights_and_buffer(
    stopped_and_whole: Callable[..., list[Path]],
) -> None:
    def killed(folder: Path, kill: str) -> None:
        stage = folder / "run" / "round-1" / "train.partial"
        assert (stage / "trainer" / "checkpoint-3").is_dir()

    found = []
    for whole in stopped_and_whole(KILLED, ["3"], "-1", killed):
        folder = whole / "run" / "round-1" / "train"
        losses = [row.get("loss") for row in read_jsonl(folder / "trainer" / "metrics.jsonl")]
        tables = [read_jsonl(folder / "trainer" / "negatives.jsonl"), losses]
        found.append((tables, load_file(folder / "model" / "model.safetensors")))
        assert not list(folder.rglob("checkpoint-*"))
    assert found[0][0] == found[1][0]
    assert all((found[1][1][name] == value).all() for name, value in found[0][1].items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampling": {"n": 2}}, r"written once.*expected n=1.*got 2"),
        ({"sampling": {"n": 1, "backend": "vllm"}}, "got 1 and 'vllm'"),
        ({"ema_decay": 1.2}, r"ema_decay is a share: expected 0 to 1, got 1.2"),
        ({"buffer_capacity": 0}, "buffer_capacity must be at least 1, got 0"),
        ({"ref_update_every": 0}, "ref_update_every must be at least 1, got 0"),
        ({"ref_update_mode": "average"}, "must be 'ema' or 'policy', got 'average'"),
        ({"loss": "kto"}, "'kto' is of kind 'unpaired', and self-play makes pairs"),
        ({"loss": "orpoo"}, "no loss is called 'orpoo'"),
        ({"training": {"sync_ref_model": True}}, "sync_ref_model cannot be set: set ref_update"),
        ({"training": {"precompute_ref_log_probs": True}}, "made while training"),
    ],
)
def test_options_out_of_range_are_told_in_words(
    options: Callable[..., dict[str, Any]], make: Any, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sapo(options, make, **given)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"prompt": "w1", "rejected": "w2"}], "row 0 of the dataset has no 'chosen'"),
        ([{"prompt": "w1", "chosen": ""}] * 3, "no chosen response to rewrite: 3 prompts"),
        ([{"prompt": "w1", "chosen": "w2 " * 99}], "raise training.max_length"),
    ],
)
def test_data_without_responses_is_told_in_words(
    options: Callable[..., dict[str, Any]], make: Any, data: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sapo(options, make, dataset=data).run()
