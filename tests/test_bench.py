"""The bench: its gate, its arithmetic, its rows, and the files that are made from them."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import bench, costs, measure, peers, reference
from fastpref.case import OPS, PREFERENCE, Case, Passes, System
from fastpref.costs import HEADS, MACHINES, SCHEDULES, UNITS, Head
from fastpref.measure import Problem

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
TINY = Head(24, 211)


def problem(schedule: str = "trainable", rows: int = 48, **options: Any) -> Problem:
    return Problem(rows, options.pop("head", TINY), torch.float32, "cpu", schedule, **options)


def own(case: Case) -> Passes:
    known = {(s.name, s.op): s for s in peers.systems()}
    system = known["fastpref[torch]", "logprobs"]
    return system.start(case)


def spoiled(by: float, what: str) -> System:
    """This package's op with an error planted in its output or in its gradient."""

    def start(case: Case) -> Passes:
        passes = own(case)

        def forward() -> Any:
            output = passes.forward()
            return output + by if what == "output" else output

        def backward(output: Any) -> tuple[Tensor, ...]:
            first, *rest = passes.backward(output)
            return (first * (1 + by) if what == "gradient" else first, *rest)

        return Passes(forward, backward)

    return System("spoiled", "logprobs", start)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("op", OPS)
def test_truth_is_autograd_in_float64(op: str, softcap: float | None, schedule: str) -> None:
    case = problem(schedule, head=Head(24, 211, softcap)).case()
    right = measure.truth(case, op)
    inputs = [
        x.detach().double().requires_grad_(x.requires_grad) for x in (case.hidden, case.weight)
    ]
    logps, _ = reference.linear_logprobs(*inputs, case.targets, softcap=softcap)
    output = OPS[op](logps)
    torch.testing.assert_close(right.output, output.detach(), rtol=1e-11, atol=1e-11)
    wanted = [x for x in inputs if x.requires_grad]
    assert len(right.gradients) == len(wanted)
    if wanted:
        upstream = case.upstream.double() if output.dim() else torch.ones_like(output)
        for got, want in zip(
            right.gradients, torch.autograd.grad(output, wanted, upstream), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_no_speed_for_a_wrong_result(what: str) -> None:
    right, wrong = bench.run(problem(), [spoiled(0.0, what), spoiled(0.01, what)], 2, "wall")
    assert right.times
    assert not right.note
    assert not wrong.times
    assert wrong.note.startswith("wrong")
    good, bad = bench.rows(problem(), [right, wrong], "wall", "c", "x")
    assert good["ms_total"] > 0
    assert bad["ms_total"] is bad["ms_forward"] is bad["floor_ratio"] is None
    assert bad["error_nats_per_1024"] > (5 if what == "output" else -1)
    text = bench.render(problem(), [right, wrong], "wall")
    assert wrong.note in text


@pytest.mark.parametrize("schedule", ["none", "trainable"])
def test_rows_in_another_order_are_wrong(schedule: str) -> None:
    """Errors that cancel in the sum."""

    def start(case: Case) -> Passes:
        passes = own(case)
        return Passes(lambda: passes.forward().flip(0), passes.backward)

    (entry,) = bench.run(problem(schedule), [System("permuted", "logprobs", start)], 2, "wall")
    assert entry.note.startswith("wrong")


def test_a_result_that_is_not_a_number_is_wrong() -> None:
    (entry,) = bench.run(problem("frozen"), [spoiled(float("nan"), "output")], 1, "wall")
    assert entry.note.startswith("wrong")


def test_one_system_that_fails_does_not_stop_the_others() -> None:
    def start(case: Case) -> Passes:
        raise MemoryError("too large")

    broken = System("broken", "logprobs", start)
    entries = bench.run(problem(), [broken, spoiled(0.0, "output")], 1, "wall")
    assert entries[0].note == "failed: MemoryError: too large"
    assert entries[1].times


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows(schedule: str, tmp_path: Path) -> None:
    out = tmp_path / "rows" / "rows.json"
    command = ["--shape", "40x24x211", "--schedule", schedule, "--rounds", "3", "--device", "cpu"]
    command += ["--peers", "torch", "--no-memory", "--clock", "cpu", "--out", str(out)]
    assert bench.main(command) == 0
    assert bench.main([*command, "--backend", "torch", "--commit", "abc"]) == 0
    assert [p.name for p in out.parent.iterdir()] == ["rows.json"]
    rows = json.loads(out.read_text())
    assert len(out.read_text().splitlines()) == len(rows) + 2
    assert rows[-1]["commit"] == "abc" != rows[0]["commit"]  # appended, not replaced
    assert "--shape 40x24x211" in rows[-1]["command"]
    systems = {(row["system"], row["op"]) for row in rows}
    assert {("gemms", "gemms"), ("fastpref[torch]", "logprobs"), ("torch", "logprobs")} <= systems
    assert (("torch", "dpo") in systems) == (schedule != "recompute")
    for row in rows:
        assert tuple(row) == bench.FIELDS
        assert row["measured"] is True
        assert row["device"].endswith("CPU time")
        assert (row["N"], row["H"], row["V"], row["dtype"]) == (40, 24, 211, "fp32")
        assert row["ms_total"] > 0
        assert row["versions"]["torch"] == torch.__version__
        if row["op"] == "gemms":
            assert row["floor_ratio"] == 1.0
            assert row["deterministic"] is None
            continue
        assert row["deterministic"] is True
        assert (row["relative_gradient_error"] is None) == (schedule == "none")
        assert (row["error_nats_per_1024"] is None) == (row["op"] in PREFERENCE)


def test_what_cannot_run_is_listed() -> None:
    chosen = [s for s in peers.systems() if s.name in ("quack", "fastpref[cuda]")]
    entries = bench.run(problem("none"), chosen, 1, "wall")
    assert all(entry.note and not entry.times for entry in entries)
    text = bench.render(problem("none"), entries, "wall")
    assert "quack (cross_entropy): " in text
    assert "fastpref[cuda] (logprobs): " in text
    assert bench.rows(problem("none"), entries, "wall", "c", "x") == []


PEERS = {
    ("trl", "logprobs"): "trl",
    ("liger", "logprobs"): "liger-kernel",
    **{("liger", op): "liger-kernel" for op in PREFERENCE},
    ("cut-cross-entropy", "logprobs"): "cut-cross-entropy",
    ("quack", "cross_entropy"): "quack-kernels",
}


def test_the_list_says_what_is_missing_and_what_adds_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert bench.main(["--list"]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    said = {(name, op): rest for name, op, rest in lines}
    for peer in PEERS:
        assert said[peer].endswith("is not installed: pip install 'fastpref[bench]'"), peer
    assert said["gemms", "gemms"].endswith(" ok")
    assert said["fastpref[torch]", "logprobs"].endswith(" ok")


def test_the_extra_brings_every_peer() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    brought = {re.split(r"[>=;\[ ]", requirement)[0] for requirement in extras["bench"]}
    known = {(s.name, s.op): s.package for s in peers.systems() if s.package}
    assert known == PEERS
    assert set(known.values()) <= brought


def test_systems_take_turns() -> None:
    order: list[str] = []

    def passes(name: str) -> Passes:
        return Passes(lambda: order.append(name), lambda _: ())

    times = measure.race([passes(name) for name in "abc"], 3, "wall", lambda: None)
    assert "".join(order) == "abcbcacab"
    assert [len(t) for t in times] == [3, 3, 3]


def test_rates_count_what_the_answer_needs() -> None:
    """At 10 x 20 x 30: 12,000 flops a product; 10 rows and 30 of weight are 3,200 bytes."""
    products = {"none": 1, "frozen": 2, "trainable": 3, "recompute": 3}
    written = {"none": 0, "frozen": 10, "trainable": 40, "recompute": 40}
    for schedule in SCHEDULES:
        small = problem(schedule, rows=10, head=Head(20, 30))
        flops, moved = bench.needed(small, "logprobs")
        assert flops == 12_000 * products[schedule]
        assert moved == 3_200 + 80 * written[schedule] + 120
    assert bench.needed(problem("recompute", rows=10, head=Head(20, 30)), "gemms")[0] == 48_000


def test_plugins(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = types.ModuleType("someones_systems")
    mine = replace(spoiled(0.0, "output"), name="mine")
    monkeypatch.setattr(module, "more", lambda: [mine], raising=False)
    monkeypatch.setitem(sys.modules, "someones_systems", module)
    assert bench.main(["--list", "--plugin", "someones_systems:more"]) == 0
    assert "mine " in capsys.readouterr().out
    with pytest.raises(ValueError, match="module:function"):
        peers.systems(["someones_systems"])
    with pytest.raises(ValueError, match=r"no system magic; there are .*quack"):
        bench.main(["--shape", "8x8x8", "--peers", "magic"])


def test_rounds_are_checked() -> None:
    with pytest.raises(ValueError, match="--rounds: expected at least 1, got 0"):
        bench.main(["--shape", "8x8x8", "--rounds", "0"])


def test_shapes() -> None:
    assert bench.parse_shape("12x34x56", 7) == (12, Head(34, 56))
    assert bench.parse_shape("gemma-2-2b", 7) == (7, HEADS["gemma-2-2b"])
    assert bench.parse_shape("gemma-2-2b@9", 7)[0] == 9
    for bad in ("12x34", "gpt-9", "gemma-2-2b@many"):
        with pytest.raises(ValueError, match=r"expected NxHxV, or NAME\[@N\] with one of smollm2"):
            bench.parse_shape(bad, 7)


def test_peak_memory_counts_logits() -> None:
    """A materialising system holds at least its logits, this package a fraction of them."""
    large = problem("frozen", rows=512, head=Head(16, 16384))
    logits = 512 * 16384 * 4
    known = {(s.name, s.op): s for s in peers.systems()}
    plain = measure.peak_extra_bytes(large, known["torch", "logprobs"], [])
    lean = measure.peak_extra_bytes(large, known["fastpref[torch]", "logprobs"], [])
    if plain is None or lean is None:
        pytest.skip("this platform does not tell a process's peak memory")
    assert plain > logits
    assert lean < logits / 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_model_counts_the_products_of_a_schedule(schedule: str, device: str) -> None:
    n, head = 3000, HEADS["qwen2.5-0.5b"]
    budget = 1 << 50  # holds all of E
    work = list(costs.kernels(schedule, n, head, 2, device, budget))
    flops = sum(k.flops for k in work)
    assert flops == UNITS[schedule] * n * head.hidden_size * head.vocab_size
    written = sum(k.bytes for k in work if k.name == "sweep" and not k.backward)
    assert written == n * head.vocab_size * (4 if schedule == "none" else 6)


def test_predictions_are_consistent() -> None:
    head = HEADS["llama-3-8b"]
    for machine in MACHINES.values():
        total = {s: costs.predict(machine, s, 8192, head, 2).total for s in SCHEDULES}
        assert total["none"] < total["frozen"] < total["trainable"] < total["recompute"]
        for schedule in SCHEDULES:
            t = costs.predict(machine, schedule, 8192, head, 2)
            flops = sum(k.flops for k in costs.kernels(schedule, 8192, head, 2, "cuda"))
            assert 1.0 < t.floor_ratio < 1.3
            assert t.gemms * machine.matmul[2] * 1e-3 > flops  # no product beats the stated peak


def test_explain_runs_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "run", None)
    command = ["--explain", "llama-3-8b@8192", "--dtype", "bf16", "--schedule", "recompute"]
    assert bench.main([*command, "--device", "cuda"]) == 0
    text = capsys.readouterr().out
    for part in ("chunks of", "tiles of", "8.00 N*H*V", "recomputed", "H100", "x its GEMMs"):
        assert part in text


def script(name: str) -> types.ModuleType:
    """A file of ``benchmarks/``, imported."""
    if not (BENCHMARKS / f"{name}.py").exists():
        pytest.skip("benchmarks/ is not part of this installation")
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_tables_are_current() -> None:
    tables = script("tables")
    text = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""
    if "<!-- bench:" not in text:
        pytest.skip("README.md has no bench tables")
    assert tables.rewritten(text) == text, "run: python benchmarks/tables.py"


def test_tables_are_made_from_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = script("tables")
    entries = bench.run(problem(), [s for s in peers.systems() if s.name == "gemms"], 3, "wall")
    (old,) = bench.rows(problem(), entries, "wall", "c", "x")
    new = old | {"ms_total": 1234.5}
    (tmp_path / "some.json").write_text(json.dumps([old, new, new | {"schedule": "none"}]))
    monkeypatch.setattr(tables, "HERE", tmp_path)
    text = "before\n<!-- bench:some schedule=trainable -->\nstale\n<!-- /bench -->\nafter\n"
    made = tables.rewritten(text)
    assert made.startswith("before\n<!-- bench:some schedule=trainable -->\n")
    assert made.endswith("<!-- /bench -->\nafter\n")
    assert "stale" not in made
    assert made.count("| gemms |") == made.count("1,234.5") == 1  # the newest, of that schedule
    assert tables.rewritten(made) == made
    with pytest.raises(ValueError, match="no rows for"):
        tables.rewritten(text.replace("trainable", "frozen"))
    with pytest.raises(ValueError, match="no field shape"):
        tables.rewritten(text.replace("schedule=", "shape="))


def test_the_table_of_auto_is_current() -> None:
    auto = script("auto")
    results = BENCHMARKS / "results" / "gpu.json"
    rows = json.loads(results.read_text()) if results.exists() else []
    assert json.loads(auto.TABLE.read_text()) == auto.choices(rows)


def test_auto_is_read_off_the_rows() -> None:
    """Of a GPU and dtype: the cases that all have, the newest row of each, no wrong backend."""
    auto = script("auto")

    def row(name: str, n: int, ms: float | None, **other: Any) -> dict[str, Any]:
        base = {"system": name, "op": "logprobs", "schedule": "none", "N": n, "H": 8, "V": 9}
        base |= {"dtype": "bf16", "device": "A", "measured": True, "ms_total": ms, "commit": "c"}
        return base | {"versions": {"cuda": "13"}} | other

    rows = [
        row("fastpref[triton]", 1, 99.0),
        *(row("fastpref[triton]", n, ms) for n, ms in ((1, 1.0), (2, 4.0), (3, 1000.0))),
        *(row("fastpref[cuda]", n, ms) for n, ms in ((1, 4.0), (2, 9.0))),
        *(row("fastpref[torch]", n, ms) for n, ms in ((1, 0.1), (2, None))),
        row("trl", 1, 0.1),
        row("fastpref[cuda]", 1, 0.1, op="dpo"),
        row("fastpref[cuda]", 1, 0.1, versions={}),
        row("fastpref[cuda]", 1, 0.1, measured=False, device="prediction"),
        row("fastpref[cuda]", 1, 2.0, dtype="fp32", commit="d"),
    ]
    common = {"device": "A", "cases": 2, "commits": ["c"]}
    assert auto.choices(rows) == [
        common | {"dtype": "bf16", "order": ["triton", "cuda"], "ms": {"triton": 2.0, "cuda": 6.0}},
        {**common, "dtype": "fp32", "order": ["cuda"], "ms": {"cuda": 2.0}}
        | {"cases": 1, "commits": ["d"]},
    ]


def test_a_table_of_steps_says_what_a_row_holds() -> None:
    """The reference's pass and the head's rows where they were counted; TRL where it ran."""
    tables = script("tables")
    row = {
        **{"system": "ours, cached", "mix": "short", "model": "m", "pairs_per_step": 2},
        **{"device": "d", "measured": True, "versions": {}, "seconds_per_step": 1.25},
        **{"seconds_spread": 0.5, "pairs_per_second": 1.6, "backbone_tokens_per_step": 1234},
        **{"head_rows_per_step": 987, "peak_rss_bytes": 3_000_000_000},
        **{"reference_pass_seconds": 4.26, "reference_pass_pairs": 6},
        **{"pairs_per_second_over_trl": 3.0, "peak_rss_over_trl": 0.4, "loss_difference": 2e-6},
        "command": "python benchmarks/step.py --mix short --out x.json --commit abc --batch 2",
    }
    text = tables.table([row])
    assert "    python benchmarks/step.py --mix short --batch 2\n" in text
    heading, _, shown = text.splitlines()[-3:]
    named = dict(zip(heading.split(" | "), shown.split(" | "), strict=True))
    assert named["reference, once"] == "4.3 s, 6 pairs"
    assert named["through the head"] == "987"
    assert named["over TRL"] == "3.00x"
    assert named["slowest - fastest"] == "0.50"
    less = {"reference_pass_seconds": None, "reference_pass_pairs": None}
    without = ("head_rows_per_step", "pairs_per_second_over_trl", "peak_rss_over_trl")
    bare = {k: v for k, v in (row | less).items() if k not in (*without, "loss_difference")}
    shown = tables.table([bare]).splitlines()[-1]
    assert shown == "| `ours, cached` | 1.25 | 0.50 | 1.60 | – | – | 3.00 | – | 1,234 | – | – |"


def test_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Two points of each curve, one system too large for the memory that is allowed."""
    curves = script("curves")
    monkeypatch.setitem(HEADS, "smollm2-135m", TINY)
    monkeypatch.setitem(curves.ROWS, "cpu", 40)
    monkeypatch.setattr(curves.bench, "weigh", lambda problem, entries, plugins: entries)
    out = tmp_path / "rows.json"
    for along, sizes, gigabytes in (("N", "48", 1e-4), ("N", "64", 1e-4), ("V", "300 9000", 4e-3)):
        command = f"curves --along {along} --sizes {sizes} --memory {gigabytes} --rounds 1"
        command += f" --device cpu --systems gemms fastpref[cpp] torch --out {out} --commit abc"
        monkeypatch.setattr(sys, "argv", command.split())
        curves.main()
    rows = json.loads(out.read_text())
    points = {(row["system"], row["N"], row["V"]) for row in rows}
    ours = {(48, 211), (64, 211), (40, 300), (40, 9000)}
    assert {(n, v) for system, n, v in points if system == "gemms"} == ours
    assert {(n, v) for system, n, v in points if system == "torch"} == {(40, 300)}
    assert "torch (logprobs): needs up to 0.000122 GB for logits" in capsys.readouterr().out
    assert {row["commit"] for row in rows} == {"abc"}
    assert (tmp_path / "rows.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("folder", ["results", "predictions"])
def test_committed_rows(folder: str) -> None:
    """A prediction never stands among the measurements, nor the other way round."""
    found = 0
    for path in (BENCHMARKS / folder).glob("*.json"):
        rows = json.loads(path.read_text())
        if not isinstance(rows, list) or "ms_total" not in rows[0]:
            continue  # not a file of rows
        for row in rows:
            assert tuple(row) == bench.FIELDS, path.name
            assert row["measured"] is (folder == "results"), path.name
            found += 1
    if not found:
        pytest.skip(f"no rows in benchmarks/{folder}")


def test_predictions_are_current() -> None:
    model = script("model")
    for key, machine in MACHINES.items():
        path = BENCHMARKS / "predictions" / f"{key}.json"
        assert json.loads(path.read_text()) == list(model.predicted(machine)), (
            "run: python benchmarks/model.py"
        )


@pytest.mark.parametrize("name", ["gpu.sh", "cpu.sh"])
def test_scripts_are_sound(name: str) -> None:
    path = BENCHMARKS / name
    if not path.exists() or shutil.which("bash") is None:
        pytest.skip("no script, or no bash")
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(path)], check=True)


def test_gpu_script_knows_its_stages() -> None:
    path = BENCHMARKS / "gpu.sh"
    if not path.exists() or shutil.which("bash") is None:
        pytest.skip("no script, or no bash")
    listed = subprocess.run(["bash", path, "--list"], capture_output=True, text=True, check=True)
    assert {"build", "memcheck", "racecheck", "initcheck"} <= set(listed.stdout.split())
    unknown = subprocess.run(["bash", path, "polish"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2
    assert "no stage 'polish'" in unknown.stderr
