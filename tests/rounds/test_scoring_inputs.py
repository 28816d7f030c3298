"""What scorers are given to read, what they are asked twice, and what their stages depend on."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fastpref import rounds
from fastpref.rounds.evaluation import Evaluator
from fastpref.rounds.policies import log_likelihoods
from fastpref.rounds.run import Run, given_rows, policy_of, read_jsonl

ASKED = [{"role": "user", "content": "w1"}]
ANSWERS = ["w2 w3", "w4 w5 w6", "w7"]


@pytest.fixture
def run(tmp_path: Path, make: Any) -> Run:
    return Run(tmp_path / "run", tokenizer=make.tokenizer(), batch_size=4)


def chat_groups(answers: list[str]) -> Any:
    responses = [{"text": text, "ids": [6], "finished": True} for text in answers]
    return given_rows([{"id": 0, "prompt": ASKED, "prompt_ids": [5], "responses": responses}])


def save_reward(folder: Path, tokenizer: Any, pad: int | None) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=pad,
        num_labels=1,
        initializer_range=0.5,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def own_scores(folder: str, answers: list[str]) -> list[float]:
    """The model's own outputs, one dialogue at a time, tokenised by its template."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for answer in answers:
        ids = tokenizer.apply_chat_template(
            [*ASKED, {"role": "assistant", "content": answer}],
            tokenize=True,
            return_dict=False,
            return_tensors="pt",
        )
        found.append(float(model(ids).logits.detach()))
    return found


def test_a_template_that_writes_the_first_token_gets_it_once(
    run: Run, make: Any, tmp_path: Path
) -> None:
    tokenizer = make.tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.chat_template = "{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}"
    assert tokenizer("w1")["input_ids"][0] == 1
    folder = save_reward(tmp_path / "reward", tokenizer, pad=0)
    (row,) = rounds.RewardModel(folder).score(run, "scores", chat_groups(ANSWERS)).rows
    assert row["scores"] == pytest.approx(own_scores(folder, ANSWERS), abs=1e-5)


@pytest.mark.parametrize("pad", [None, 2, -1])
def test_a_text_that_ends_in_the_end_token_is_read_to_its_end(
    run: Run, make: Any, tmp_path: Path, pad: int | None
) -> None:
    """A model without padding, with the end of text for it, and with an id that is none."""
    tokenizer = make.tokenizer()
    tokenizer.pad_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}{{ eos_token }}"
    folder = save_reward(tmp_path / "reward", tokenizer, pad)
    (row,) = rounds.RewardModel(folder).score(run, "scores", chat_groups(ANSWERS)).rows
    assert row["scores"] == pytest.approx(own_scores(folder, ANSWERS), abs=1e-5)


class Asked:
    """Counts what it is asked, and likes w3."""

    def __init__(self) -> None:
        self.times: Counter[tuple[str, str]] = Counter()

    def __call__(self, prompt: Any, response: str) -> float:
        self.times[str(prompt), response] += 1
        return float(response.count("w3"))


def groups(tokenizer: Any, *texts: str) -> Any:
    return given_rows(
        [
            {
                "id": number,
                "prompt": prompt,
                "prompt_ids": tokenizer(prompt)["input_ids"],
                "responses": [
                    {"text": text, "ids": tokenizer(text)["input_ids"], "finished": True}
                    for text in texts
                ],
            }
            for number, prompt in enumerate(["w0 w1", "w2"])
        ]
    )


def test_a_judge_that_is_a_part_of_the_reward_scores_answers_once(
    run: Run, make: Any, policy: str, other_policy: str
) -> None:
    judge = rounds.Function(Asked())
    reward = rounds.make_scorer([judge, {"kind": "length", "weight": 0.1}])
    start, after = policy_of(policy), policy_of(other_policy)
    asked = groups(run.tokenizer, "w4")
    evaluator = Evaluator(run, asked, start, 8, judge=judge, reward=reward, resamples=20)
    evaluator.compare("round-1", start, after)
    assert max(judge.function.times.values()) == 1
    again = Run(run.folder, tokenizer=run.tokenizer, batch_size=4)
    Evaluator(again, asked, start, 8, judge=judge, reward=reward, resamples=20).compare(
        "round-1", start, after
    )
    assert max(judge.function.times.values()) == 1


def test_a_judge_that_is_an_objective_scores_answers_once(options: Any, make: Any) -> None:
    times: Counter[tuple[str, str]] = Counter()

    def talk(prompt: str, response: str) -> float:
        times[prompt, response] += 1
        return float(len(response))

    found = rounds.MODPO(
        **options(
            dataset=make.pairs(12),
            margins={"talk": talk, "again": talk},
            judge=talk,
            weights=[[0.5, 0.3, 0.2]],
            training={"max_steps": 1},
        )
    ).run()
    answers = [
        (row["prompt"], row["responses"][0]["text"])
        for policy in ("round-0", "w-0.5-0.3-0.2")
        for row in read_jsonl(found.folder / policy / "answers" / "rows.jsonl")
    ]
    assert len(answers) == 8
    for key in answers:
        assert times[key] <= answers.count(key)
    (start, trained) = found.reports
    assert start["objectives"]["talk"] == start["objectives"]["again"]
    assert trained["objectives"]["talk"] == trained["objectives"]["again"]


def test_equal_responses_are_scored_once_by_what_a_scorer_reads(
    run: Run, policy: str, other_policy: str
) -> None:
    responses = [
        {"text": text, "ids": ids, "finished": True}
        for text, ids in [("ab", [5, 6, 7]), ("ab", [8]), ("c", [5, 6, 7]), ("ab", [8])]
    ]
    asked = given_rows([{"id": 0, "prompt": "p", "prompt_ids": [4], "responses": responses}])
    lengths = rounds.Length(per_unit=1.0).score(run, "tokens", asked).rows
    assert lengths == [{"id": 0, "scores": [3.0, 1.0, 3.0, 1.0]}]
    characters = rounds.Length(unit="characters", per_unit=1.0).score(run, "characters", asked)
    assert characters.rows == [{"id": 0, "scores": [2.0, 2.0, 1.0, 2.0]}]
    scorer = rounds.Implicit(policy, other_policy)
    (implicit,) = scorer.score(run, "implicit", asked).rows
    (scored,) = read_jsonl(run.folder / "implicit" / "policy" / "rows.jsonl")
    assert len(scored["logps"]) == 2
    sums = [
        log_likelihoods(run, f"all/{number}", policy_of(folder), asked).rows[0]["logps"]
        for number, folder in enumerate((policy, other_policy))
    ]
    expected = [new - old for new, old in zip(*sums, strict=True)]
    assert implicit["scores"] == pytest.approx(expected, abs=1e-5)


def test_a_list_of_scorers_may_hold_scorers(run: Run) -> None:
    scorer = rounds.make_scorer(
        [rounds.Length(unit="characters"), Asked(), [{"kind": "length", "weight": 2}]]
    )
    (row, _) = scorer.score(run, "scores", groups(run.tokenizer, "w3", "w4 w3 w3")).rows
    assert row["scores"] == [-2 + 1 - 2, -8 + 2 - 6]
    for weight in (float("nan"), "2", True):
        with pytest.raises(ValueError, match=f"weight must be a finite number, got {weight!r}"):
            rounds.make_scorer([{"kind": "length", "weight": weight}])


@pytest.mark.parametrize("kind", ["reward", "ranker"])
def test_another_dtype_of_a_scoring_model_is_a_change(
    run: Run, make: Any, tmp_path: Path, kind: str
) -> None:
    folder = save_reward(tmp_path / "reward", make.tokenizer(), pad=0)
    scorer = rounds.RewardModel(folder) if kind == "reward" else rounds.Ranker(model=folder)
    asked = groups(run.tokenizer, "w3", "w4 w5")
    first = scorer.score(run, "scores", asked).rows
    other = Run(run.folder, tokenizer=run.tokenizer, batch_size=4, dtype=torch.bfloat16)
    with pytest.raises(rounds.ChangedError, match=r"dtype: .*float32.* -> .*bfloat16"):
        scorer.score(other, "scores", asked)
    rounds.Function(make.reward).score(run, "plain", asked)
    rounds.Function(make.reward).score(other, "plain", asked)  # no model, no dtype
    other.redo = True
    assert scorer.score(other, "scores", asked).rows != first


def test_another_dtype_of_held_out_answers_is_a_change(options: Any, make: Any) -> None:
    given = options(dataset=make.pairs(10), margins={"length": {"kind": "length"}}, weights=[0.5])
    rounds.MODPO(**given).run()
    with pytest.raises(rounds.ChangedError, match="bfloat16"):
        rounds.MODPO(**given, dtype="bfloat16").run()


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.model", "vocab.txt"])
def test_every_file_of_a_tokenizer_is_a_part_of_what_a_model_is(
    policy: str, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(policy, folder)
    before = policy_of(str(folder)).digest
    (folder / name).write_text("one")
    first = policy_of(str(folder)).digest
    (folder / name).write_text("two")
    assert len({before, first, policy_of(str(folder)).digest}) == 3


def test_a_model_is_read_once_for_its_digest(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(policy, folder)
    read: list[str] = []
    opened = Path.open

    def noted(self: Path, *args: Any, **kwargs: Any) -> Any:
        read.append(self.name)
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", noted)
    assert policy_of(str(folder)) == policy_of(str(folder))
    assert read.count("model.safetensors") == 1
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "changed": 1}))
    assert policy_of(str(folder)) != policy_of(policy)


def other_vocabulary(folder: Path, policy: str) -> str:
    """A copy of a policy whose words have other ids."""
    shutil.copytree(policy, folder)
    words = [f"w{i}" for i in reversed(range(12))]
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return str(folder)


def test_a_policy_of_another_vocabulary_scores_nothing(
    run: Run, options: Any, make: Any, policy: str, other_policy: str, tmp_path: Path
) -> None:
    other = other_vocabulary(tmp_path / "other", other_policy)
    asked = groups(run.tokenizer, "w3", "w4 w5")
    for pair in ((policy, other), (other, policy)):
        with pytest.raises(ValueError, match="other has another vocabulary than the run's model"):
            rounds.Implicit(*pair).score(run, "scores", asked)
    with pytest.raises(ValueError, match="Give a model with the tokenizer of the run's"):
        rounds.DICE(
            **options(
                dataset=make.pairs(8),
                initial_reference=other,
                sampling={"n": 4, "max_new_tokens": 6},
            )
        ).run()
    assert not (Path(options()["run_dir"]) / "round-1").exists()
    (Path(other) / "tokenizer.json").unlink()
    (Path(other) / "tokenizer_config.json").unlink()
    assert rounds.Implicit(policy, other).score(run, "scores", asked).rows
