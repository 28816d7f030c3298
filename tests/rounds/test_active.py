"""Active learning asks about the right pairs, waits for people, and trains from the start."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fastpref import rounds
from fastpref.rounds.acquire import keep, uncertainty
from fastpref.rounds.command import main
from fastpref.rounds.run import Run, given_rows, policy_of, read_jsonl

GOLDEN = json.loads((Path(__file__).parents[1] / "losses" / "golden.json").read_text())
Options = Callable[..., dict[str, Any]]


def letters(prompt: Any, response: str) -> float:
    """A reward that hardly ever ties."""
    return float(sum(map(ord, response)))


def active(options: Options, make: Any, **given: Any) -> Any:
    plain = {
        "dataset": make.prompts(48),
        "oracle": letters,
        "targets": [6, 12],
        "pair_factor": 3,
        "prompt_factor": 2,
        "entropy_samples": 4,
        "sampling": {"n": 2, "max_new_tokens": 6},
        "filter": {"unfinished": True},
        "held_out": 0,
    }
    return rounds.Active(**options(**{**plain, **given}))


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_jsonl(folder / name / "rows.jsonl")


# Which pairs


def test_kept_prompts_and_pairs_of_the_worked_example() -> None:
    case = GOLDEN["active_pref"]
    values = case["outputs"]["entropy"]
    kept = keep(list(values.values()), case["params"]["keep_prompts"], "largest", seed=0)
    assert [list(values)[i] for i in kept] == case["outputs"]["kept_prompts_entropy"]
    gaps = [-gap for gap in case["outputs"]["certainty_gap"]]
    assert keep(gaps, 2, "smallest", seed=0) == case["outputs"]["kept_pairs_certainty"]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_certainty_ranks_by_the_gap_and_sees_no_order(seed: int) -> None:
    draw = random.Random(seed)
    pairs = [(draw.gauss(0, 2), draw.gauss(0, 2)) for _ in range(9)]
    undecided = [uncertainty(a, b) for a, b in pairs]
    assert undecided == [uncertainty(b, a) for a, b in pairs]
    assert all(0 < u <= 1 for u in undecided)
    by_gap = keep([-abs(a - b) for a, b in pairs], 4, "smallest", seed)
    assert keep(undecided, 4, "smallest", seed) == by_gap


def test_ties_fall_at_random_and_the_same_way_for_a_seed() -> None:
    counts = [0] * 6
    for seed in range(600):
        kept = keep([1.0] * 6, 2, "smallest", seed)
        assert kept == keep([1.0] * 6, 2, "smallest", seed)
        for i in kept:
            counts[i] += 1
    assert all(abs(count - 200) < 60 for count in counts)  # 5 standard deviations


# A whole run


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory, make: Any) -> Any:
    """Two rounds with entropy and certainty."""
    folder = tmp_path_factory.mktemp("hybrid")
    given = {
        "model": make.policy(folder / "policy"),
        "run_dir": str(folder / "run"),
        "use_cpu": True,
        "resamples": 20,
        "max_prompt_tokens": 16,
        "training": {
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "max_length": 64,
        },
    }
    made = active(lambda **more: {**given, **more}, make, acquisition="hybrid", held_out=4).run()
    return made, given["model"]


def test_the_first_round_is_undecided_and_the_second_takes_the_most_certain(hybrid: Any) -> None:
    made, _ = hybrid
    first, second = (made.folder / f"round-{k}" for k in (1, 2))
    assert {row["undecided"] for row in table(first, "acquired")} == {1.0}
    kept = [row for row in table(second, "kept") if not row["dropped"]]
    rewards = {row["id"]: row["scores"] for row in table(second, "implicit/difference")}
    gaps = {row["id"]: abs(rewards[row["id"]][0] - rewards[row["id"]][1]) for row in kept}
    taken = {row["id"] for row in table(second, "acquired")}
    assert len(taken) == 6
    assert min(gaps[i] for i in taken) >= max(gaps[i] for i in gaps if i not in taken)


def test_prompts_are_those_of_the_largest_entropy(hybrid: Any) -> None:
    folder = hybrid[0].folder / "round-1"
    logps = {row["id"]: row["logps"] for row in table(folder, "entropy/logps")}
    values = {i: -sum(own) / len(own) for i, own in logps.items()}
    kept = {row["id"]: row["entropy"] for row in table(folder, "entropy/prompts")}
    assert (len(values), len(kept)) == (6 * 3 * 2, 6 * 3)
    assert kept == pytest.approx({i: values[i] for i in kept})
    assert min(kept.values()) >= max(v for i, v in values.items() if i not in kept)


def test_each_round_trains_from_the_start_on_all_labels(hybrid: Any) -> None:
    made, start = hybrid
    pairs: list[dict[str, Any]] = []
    for number, report in enumerate(made.reports, 1):
        folder = made.folder / f"round-{number}"
        inputs = json.loads((folder / "train" / "inputs.json").read_text())
        assert inputs["start"] == inputs["reference"] == policy_of(start).digest
        pairs += [row for row in table(folder, "pairs") if not row.get("dropped")]
        assert report["trained_on"]["pairs"] == len(pairs)
        assert report["training"]["labels"] == 6 * number
    asked = [row["id"] for k in (1, 2) for row in table(made.folder / f"round-{k}", "pairs")]
    assert len(set(asked)) == len(asked) == 12
    assert {"win_rate", "kl"} <= set(made.reports[1]["held_out"])


@pytest.mark.parametrize("acquisition", ["certainty", "hybrid"])
def test_with_factors_of_one_every_acquisition_is_random(
    options: Options, make: Any, acquisition: str
) -> None:
    ones = {"pair_factor": 1, "prompt_factor": 1, "entropy_samples": 1, "targets": [5]}
    asked = []
    for name in (acquisition, "random"):
        run_dir = options()["run_dir"] + name
        made = active(options, make, acquisition=name, run_dir=run_dir, **ones).run()
        rows = table(made.folder / "round-1", "acquired")
        asked.append([(r["id"], r["responses"]) for r in rows])
    assert asked[0] == asked[1]


def test_a_later_round_of_ties_trains_on_the_labels_before(
    options: Options, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    def tires(prompt: Any, response: str) -> float:
        asked.append(response)
        return letters(prompt, response) if len(asked) <= 12 else 0.0

    made = active(options, make, oracle=tires, acquisition="random").run()
    assert [r["pairs"]["made"] for r in made.reports] == [6, 0]
    assert [r["trained_on"]["pairs"] for r in made.reports] == [6, 6]
    assert made.reports[1]["training"]["labels"] == 12
    assert "round-2: all 6 labels are ties" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"acquisition": "entropic"}, "acquisition must be one of random, entropy"),
        ({"keep_pairs": "most"}, "keep_pairs must be one of smallest"),
        ({"targets": [4, 4]}, r"each above the one before, got \[4, 4\]"),
        ({"targets": []}, "targets are numbers of labels"),
        ({"pair_factor": 0}, "pair_factor must be at least 1"),
        ({"sampling": {"n": 3, "max_new_tokens": 6}}, "sampling.n must be 2"),
        ({"targets": [60]}, "ask for 60 labels, one for each prompt, and there are 48 prompts"),
    ],
)
def test_bad_options_are_told_in_words(
    options: Options, make: Any, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        active(options, make, **given).run()


# Labels of people


GROUPS = [
    {
        "id": i,
        "prompt": f"p{i}",
        "responses": [{"text": text} for text in texts],
    }
    for i, texts in enumerate((["x", "y"], ["same", "same"], ["u\u2028v", "w"], []))
]


def people(tmp_path: Path) -> Any:
    return lambda: rounds.People().score(Run(tmp_path), "round-1/labels", given_rows(GROUPS))


def written(tmp_path: Path, score: Any) -> tuple[Path, list[dict[str, Any]]]:
    with pytest.raises(rounds.LabelsWanted, match=r'2 of 2 pairs wait.*Set "label"'):
        score()
    (path,) = (tmp_path / "labels").iterdir()
    return path, read_jsonl(path)


def fill(path: Path, rows: list[Any], newline: str = "\n") -> None:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text(newline.join(lines), encoding="utf-8")  # no newline at the end


def test_labels_are_read_back_as_preferences(tmp_path: Path) -> None:
    score = people(tmp_path)
    path, rows = written(tmp_path, score)
    assert [set(row) for row in rows] == [{"id", "prompt", "a", "b", "label"}] * 2
    rows[0]["label"] = "a"
    fill(path, rows)
    before = path.read_bytes()
    with pytest.raises(rounds.LabelsWanted, match=r"1 of 2 pairs wait for a label .*next: id 2"):
        score()
    assert path.read_bytes() == before
    rows[1]["label"] = " Tie"
    fill(path, [*rows, ""])
    found = [row["scores"] for row in score()]
    better = GROUPS[0]["responses"].index({"text": rows[0]["a"]})
    assert found[0] == [1.0 - better, 0.0 + better]
    assert found[1:] == [[0.5, 0.5], [0.5, 0.5], []]
    rows[1]["label"] = "a"
    fill(path, rows)
    with pytest.raises(rounds.ChangedError, match="labels: "):
        score()


def test_places_are_drawn_and_the_labels_turned_back(tmp_path: Path) -> None:
    many = [{"id": i, "prompt": "", "responses": [{"text": "1"}, {"text": "2"}]} for i in range(60)]
    score = lambda: rounds.People().score(Run(tmp_path), "x", given_rows(many))  # noqa: E731
    with pytest.raises(rounds.LabelsWanted):
        score()
    (path,) = (tmp_path / "labels").iterdir()
    rows = read_jsonl(path)
    assert 15 < sum(row["a"] == "1" for row in rows) < 45
    fill(path, [{**row, "label": "a" if row["a"] == "1" else "b"} for row in rows])
    assert [row["scores"] for row in score()] == [[1.0, 0.0]] * 60


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: [r[0]], "pair 2 is missing"),
        (lambda r: [r[0], r[0], r[1]], "line 2: id 0 for the second time"),
        (lambda r: [*r, {**r[0], "id": 9}], "line 3: id 9 is none of the pairs"),
        (lambda r: [r[0], {**r[1], "label": "c"}], "line 2: label 'c'; expected 'a', 'b', 'tie'"),
        (lambda r: [r[0], {**r[1], "label": 1}], "line 2: label 1; expected"),
        (lambda r: [{**r[0], "a": "z"}, r[1]], "line 1: 'a' is not what was written"),
        (lambda r: ["{'id': 0}", r[1]], "line 1: not JSON"),
        (lambda r: ["3", r[1]], 'line 1: expected {"id"'),
        (lambda r: [{**r[0], "id": []}, r[1]], r"line 1: id \[\] is none"),
    ],
)
def test_a_spoiled_file_is_told_by_line_and_kept(tmp_path: Path, spoil: Any, message: str) -> None:
    score = people(tmp_path)
    path, rows = written(tmp_path, score)
    fill(path, spoil([{**row, "label": "a"} for row in rows]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        score()
    assert path.read_bytes() == before


def test_a_file_in_another_encoding_and_three_responses(tmp_path: Path) -> None:
    score = people(tmp_path)
    path, rows = written(tmp_path, score)
    path.write_bytes(json.dumps(rows[0]).encode("utf-16"))
    with pytest.raises(ValueError, match="save it as UTF-8"):
        score()
    three = given_rows([{"id": 5, "prompt": "", "responses": [{"text": t} for t in "abc"]}])
    with pytest.raises(ValueError, match=r"prompt 5 has 3: set sampling\.n to 2"):
        rounds.People().score(Run(tmp_path), "x", three)


def test_the_command_waits_for_labels_and_goes_on(
    options: Options, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "prompts.jsonl"
    Dataset.from_list(make.prompts(24)).to_json(data)
    config = options(
        dataset=str(data),
        oracle={"kind": "people"},
        targets=[4, 6],
        pair_factor=2,
        sampling={"n": 2, "max_new_tokens": 6},
        filter={"unfinished": True},
        held_out=2,
    )
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    command = ["active", "--config", str(tmp_path / "x.yaml")]
    labels = tmp_path / "run" / "labels"
    for number in (1, 2):
        assert main(command) == 1
        assert "pairs wait for a label in" in capsys.readouterr().out
        (path,) = labels.glob(f"round-{number}-*.jsonl")
        fill(path, [{**row, "label": "ab"[row["id"] % 2]} for row in read_jsonl(path)])
    assert main(command) == 0
    shown = [table(tmp_path / "run" / f"round-{k}", "pairs") for k in (1, 2)]
    lines = [line for path in labels.iterdir() for line in path.read_text().splitlines()]
    answers = {row["id"]: row for row in map(json.loads, lines)}
    for row in (row for rows in shown for row in rows):
        assert row["chosen"] == answers[row["id"]][answers[row["id"]]["label"]]


# Stopped half-way

KILLED = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("makers", sys.argv[1] + "/conftest.py")
makers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(makers)
from fastpref import rounds
calls = 0
def reward(prompt, response):
    global calls
    calls += 1
    if sys.argv[3] == "kill" and calls == 18:  # in the second round
        os.kill(os.getpid(), signal.SIGKILL)
    return float(response.split().count("w3")) - len(response) / 100
rounds.Active(
    model=sys.argv[2] + "/policy", run_dir=sys.argv[2] + "/run", dataset=makers.make_prompts(40),
    oracle=reward, targets=[6, 12], pair_factor=3, sampling={"n": 2, "max_new_tokens": 6},
    filter={"unfinished": True}, held_out=0, max_prompt_tokens=16, use_cpu=True, batch_size=4,
    training={"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2,
              "gradient_checkpointing": False, "disable_tqdm": True, "max_length": 64},
).run()
"""


def test_a_killed_run_ends_with_the_same_labels_and_weights(
    stopped_and_whole: Callable[..., list[Path]],
) -> None:
    found = []
    for folder in stopped_and_whole(KILLED, ["kill"], "live"):
        last = folder / "run" / "round-2"
        weights = load_file(last / "train" / "model" / "model.safetensors")
        found.append((table(last, "pairs"), table(last, "labels"), weights))
    assert found[0][:2] == found[1][:2]
    assert all((found[1][2][name] == value).all() for name, value in found[0][2].items())
