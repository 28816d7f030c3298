"""Each kind of scorer against its model's own numbers, one response at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from fastpref import rounds
from fastpref.rounds.evaluation import Evaluator
from fastpref.rounds.reward_models import reward_ids
from fastpref.rounds.run import Run, given_rows, policy_of, read_jsonl
from fastpref.rounds.scorer import described
from fastpref.rounds.winrate import win_rate

TEXTS = [["w1 w2", "w3", "w1 w2", "w4 w5 w6 w7 w8"], ["w9 w3 w3", "w10"]]


def groups(tokenizer: Any) -> Any:
    return given_rows(
        [
            {
                "id": number,
                "prompt": prompt,
                "prompt_ids": tokenizer(prompt)["input_ids"],
                "responses": [
                    {"text": text, "ids": tokenizer(text)["input_ids"], "finished": True}
                    for text in own
                ],
            }
            for number, (prompt, own) in enumerate(zip(["w0 w1 ", "w2 "], TEXTS))
        ]
    )


@pytest.fixture
def run(tmp_path: Path, make: Any) -> Run:
    return Run(tmp_path / "run", tokenizer=make.tokenizer(), batch_size=4)


def save_classifier(folder: Path, make: Any, outputs: int = 1, head: float = 1.0) -> str:
    torch.manual_seed(3)
    config = LlamaConfig(
        **{**make.model().config.to_dict(), "num_labels": outputs, "id2label": None}
    )
    model = LlamaForSequenceClassification(config)
    model.score.weight.data *= head
    model.save_pretrained(folder)
    make.tokenizer().save_pretrained(folder)
    return str(folder)


def own_output(folder: str, tokenizer: Any, text: str) -> float:
    """The classifier's output for one text alone, in float64."""
    model = LlamaForSequenceClassification.from_pretrained(folder).double().eval()
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    return float(model(ids).logits.detach().double())


def test_a_reward_model_scores_as_its_own_output(run: Run, make: Any, tmp_path: Path) -> None:
    folder, tokenizer = save_classifier(tmp_path / "reward", make), make.tokenizer()
    scorer = rounds.make_scorer({"kind": "reward_model", "model": folder})
    found = scorer.score(run, "scores", groups(tokenizer))
    for row, prompt, own in zip(found, ["w0 w1 ", "w2 "], TEXTS):
        expected = [own_output(folder, tokenizer, prompt + text) for text in own]
        assert row["scores"] == pytest.approx(expected, abs=1e-5)
    assert len({value for row in found for value in row["scores"]}) == 5


def test_a_reward_model_reads_messages_by_its_chat_template(make: Any) -> None:
    tokenizer = make.tokenizer()
    said = [{"role": "user", "content": "w1"}]
    plain = tokenizer("w1 w2")["input_ids"]
    assert reward_ids(tokenizer, said, " w2") == plain
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m.content }} w3 {% endfor %}"
    rendered = tokenizer("w9 w1 w3 w9 w2 w3", add_special_tokens=False)["input_ids"]
    assert reward_ids(tokenizer, said, "w2") == rendered
    assert reward_ids(tokenizer, "w1 ", "w2") == plain


@pytest.mark.parametrize(
    ("given", "head", "message"),
    [
        ({}, float("nan"), "score nan to prompt .*load it in bf16 or fp32"),
        ({"max_length": 3}, 1.0, "have 7 tokens, the model reads 3: lower sampling.max_new_tokens"),
    ],
)
def test_a_reward_model_that_cannot_score_says_why(
    run: Run, make: Any, tmp_path: Path, given: dict[str, Any], head: float, message: str
) -> None:
    folder = save_classifier(tmp_path / "reward", make, head=head)
    scorer = rounds.RewardModel(folder, **given)
    with pytest.raises((ValueError, RuntimeError), match=message):
        scorer.score(run, "scores", groups(make.tokenizer()))


def test_a_model_of_two_outputs_is_no_reward_model(run: Run, make: Any, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "two", make, outputs=2)
    with pytest.raises(ValueError, match="has 2 outputs; a reward model has one"):
        rounds.RewardModel(folder).score(run, "scores", groups(make.tokenizer()))


def first_or_longer(prompt: str, first: str, second: str) -> float:
    """Likes the first place by 0.2, and a longer response."""
    return 0.6 + 0.3 * ((len(first) > len(second)) - (len(first) < len(second)))


def test_a_ranker_asks_in_both_orders_so_that_no_place_wins(run: Run, make: Any) -> None:
    scorer = rounds.make_scorer({"kind": "ranker", "function": first_or_longer})
    found = scorer.score(run, "scores", groups(make.tokenizer())).rows
    # Worked out: longer beats shorter with (0.9 + 1 - 0.3) / 2 = 0.8; equal texts are shown once.
    assert found[0]["scores"] == pytest.approx([0.5, 0.2, 0.5, 0.8])
    assert found[1]["scores"] == pytest.approx([0.8, 0.2])


def test_a_ranking_model_reads_both_responses(run: Run, make: Any, tmp_path: Path) -> None:
    folder, tokenizer = save_classifier(tmp_path / "ranker", make), make.tokenizer()
    template = "{prompt} w11 {first} w11 {second}"
    scorer = rounds.Ranker(model=folder, template=template)
    (_, row) = scorer.score(run, "scores", groups(tokenizer)).rows
    a, b = TEXTS[1]
    odds = [
        own_output(folder, tokenizer, template.format(prompt="w2 ", first=x, second=y))
        for x, y in ((a, b), (b, a))
    ]
    p, q = torch.tensor(odds).sigmoid().tolist()
    assert row["scores"] == pytest.approx([(p + 1 - q) / 2, (q + 1 - p) / 2], abs=1e-5)
    with pytest.raises(ValueError, match="a function or a model, and not both"):
        rounds.Ranker(function=first_or_longer, model=folder)


def test_the_implicit_reward_is_the_log_ratio_of_both_policies(
    run: Run, make: Any, policy: str, other_policy: str
) -> None:
    given = {"kind": "implicit", "policy": policy, "reference": other_policy, "beta": 0.3}
    asked = groups(make.tokenizer())
    found = rounds.make_scorer(given).score(run, "scores", asked)

    def log_likelihood(folder: str, prompt: list[int], response: list[int]) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
        logps = model(torch.tensor([prompt + response])).logits[0].detach().log_softmax(-1)
        return float(sum(logps[len(prompt) - 1 + i, t] for i, t in enumerate(response)))

    for row, scores in zip(asked, found):
        for response, score in zip(row["responses"], scores["scores"]):
            new, old = (
                log_likelihood(p, row["prompt_ids"], response["ids"])
                for p in (policy, other_policy)
            )
            assert score == pytest.approx(0.3 * (new - old), abs=1e-5)


class Count:
    """How often a response has one of these words; notes what it was asked."""

    def __init__(self, *words: str) -> None:
        self.words, self.asked = set(words), 0

    def __call__(self, prompt: str, response: str) -> float:
        self.asked += 1
        return self.times(prompt, response)

    def times(self, prompt: str, response: str) -> float:
        return float(sum(word in self.words for word in response.split()))


def count(prompt: str, response: str, word: str = "w3") -> float:
    return float(response.split().count(word))


def test_functions_that_differ_in_what_they_hold_are_told_apart() -> None:
    kinds = [
        *(Count("w3", word) for word in ("w1", "w2")),
        *(Count("w3", word).times for word in ("w1", "w2")),
        *(partial(count, word=word) for word in ("w1", "w2")),
        *(partial(Count(word), "w0") for word in ("w1", "w2")),
        count,
    ]
    found = [described(one)["source"] for one in kinds]
    assert len(set(found)) == len(found)
    assert described(Count("w1", "w3")) == described(kinds[0])
    assert described(partial(count, word="w2"))["source"] == found[5]
    first, second = Count("w1"), Count("w1")
    first.words, second.words = object(), object()  # type: ignore[assignment]
    assert described(first) == described(second)


def likes(word: str, seen: list[str]) -> Any:
    def liked(prompt: str, response: str) -> float:
        seen.append(response)
        return float(response.split().count(word))

    return liked


def test_functions_of_one_source_have_tables_of_their_own(run: Run, make: Any) -> None:
    asked, seen = groups(make.tokenizer()), list[str]()
    more, less = lambda p, r: len(r), lambda p, r: -len(r)
    kinds = [likes("w1", seen), likes("w3", seen), more, less]
    assert len({described(one)["source"] for one in kinds}) == 4
    assert described(likes("w1", ["other"])) == described(kinds[0])
    tables = [
        rounds.Function(one).score(run, f"scores-{i}", asked).rows for i, one in enumerate(kinds)
    ]
    expected = [[one("", r["text"]) for g in asked.rows for r in g["responses"]] for one in kinds]
    assert [[s for row in table for s in row["scores"]] for table in tables] == expected
    # what the digest does not see: a list
    held = [rounds.Function(likes("w1", seen)) for _ in range(2)]
    first, second = (one.score(run, f"held-{i}", asked) for i, one in enumerate(held))
    assert first is not second


def test_what_an_object_notes_while_it_scores_is_no_change(run: Run, make: Any) -> None:
    scorer = rounds.Function(Count("w3"))
    asked = groups(make.tokenizer())
    first = scorer.score(run, "scores", asked)
    assert scorer.function.asked == 5
    assert scorer.score(run, "scores", asked).digest == first.digest
    assert rounds.Function(Count("w3")).score(run, "scores", asked).digest == first.digest
    assert scorer.function.asked == 5


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_a_ranker_that_returns_no_probability_is_told(run: Run, make: Any, value: float) -> None:
    def odds(prompt: str, first: str, second: str) -> float:
        return value

    with pytest.raises(RuntimeError, match=f"odds gave {value} for 'w1 w2' against .*0 to 1"):
        rounds.Ranker(function=odds).score(run, "scores", groups(make.tokenizer()))


def test_a_sum_with_a_ranker_compares_held_out_answers_and_gives_single_ones_no_reward(
    run: Run, make: Any, policy: str, other_policy: str
) -> None:
    scorer = rounds.make_scorer(
        [{"kind": "ranker", "function": first_or_longer}, {"kind": "length", "per_unit": 0.0}]
    )
    asked = groups(make.tokenizer())
    start, after = policy_of(policy), policy_of(other_policy)
    evaluator = Evaluator(run, asked, start, 8, judge=scorer, resamples=20)
    found = evaluator.compare("round-1", start, after)
    assert "reward" not in found
    longer = [
        len(a["responses"][0]["text"]) - len(b["responses"][0]["text"])
        for a, b in zip(evaluator.answers(after), evaluator.answers(start))
    ]
    assert any(longer)
    wins = [0.5 + 0.5 * ((n > 0) - (n < 0)) for n in longer]
    assert found["win_rate"] == win_rate(wins, 20)


def test_a_judge_that_is_the_reward_scores_once(run: Run, make: Any, policy: str) -> None:
    asked, start = groups(make.tokenizer()), policy_of(policy)
    judge, reward = (rounds.Length(unit="characters") for _ in range(2))
    evaluator = Evaluator(run, asked, start, 8, judge=judge, reward=reward, resamples=20)
    evaluator.compare("round-1", start, start)
    assert {path.name for path in run.folder.glob("round-0/*")} == {"answers", "rewards"}
    again = Run(run.folder, tokenizer=run.tokenizer, batch_size=4, redo=True)
    other = Evaluator(again, asked, start, 8, judge=judge, reward=rounds.Length(), resamples=20)
    other.compare("round-1", start, start)
    assert (run.folder / "round-0" / "judged").exists()


def test_an_implicit_reward_of_a_policy_beside_itself_is_0_and_scored_once(
    run: Run, make: Any, policy: str
) -> None:
    found = rounds.Implicit(policy, policy).score(run, "scores", groups(make.tokenizer()))
    assert {value for row in found for value in row["scores"]} == {0.0}
    assert not (run.folder / "scores" / "reference").exists()


def test_a_weighted_sum_adds_up_and_other_weights_score_nothing_anew(run: Run, make: Any) -> None:
    calls: list[str] = []

    def count(prompt: str, response: str) -> float:
        calls.append(response)
        return float(response.count("w3"))

    def parts(weight: float) -> list[dict[str, Any]]:
        return [
            {"kind": "function", "function": count, "weight": weight},
            {"kind": "length", "unit": "characters", "per_unit": -1.0},
        ]

    asked = groups(make.tokenizer())
    found = rounds.make_scorer(parts(10.0)).score(run, "scores", asked)
    assert [row["scores"] for row in found] == [[-5, 8, -5, -14], [12, -3]]
    assert sorted(calls) == sorted({text for own in TEXTS for text in own})
    run.redo = True
    again = rounds.make_scorer(parts(1.0)).score(run, "scores", asked)
    assert [row["scores"] for row in again] == [[-5, -1, -5, -14], [-6, -3]]
    assert len(calls) == 5
    assert len(read_jsonl(run.folder / "scores" / "part-1" / "rows.jsonl")) == 2


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"kind": "judge"}, ValueError, "kind must be one of function, length, reward_model"),
        ({"kind": "length", "units": 1}, ValueError, "no option 'units'; it has"),
        ({"kind": "reward_model"}, ValueError, "missing 1 required .*'model'"),
        ("no_such_module:f", ValueError, "names no function .*write 'module:name'"),
        (3, TypeError, "expected a function, 'module:name', or kind and options, got 3"),
    ],
)
def test_a_scorer_that_is_none_is_told_in_words(
    run: Run, make: Any, given: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rounds.make_scorer(given).score(run, "scores", groups(make.tokenizer()))
