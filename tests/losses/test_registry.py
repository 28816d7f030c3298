"""The registry: names, errors that help, a loss of one's own, the documentation."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastpref import losses
from fastpref.losses import PairLogps, UnpairedLogps
from fastpref.losses.core import _aliases, registry
from fastpref.losses.docs import document, main, page

ROOT = Path(__file__).parents[2]
TRL = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    *("kto", "apo_zero_unpaired"),
)
X = torch.tensor([-2.0, -3.0])
PAIRS = PairLogps(chosen=X, rejected=X - 1, ref_chosen=X, ref_rejected=X)


@pytest.mark.parametrize("name", TRL)
def test_names_of_trl(name: str) -> None:
    assert losses.get(name).entry.kind in ("pair", "unpaired")


def test_aliases_lead_to_the_same_loss() -> None:
    for alias, name in _aliases.items():
        assert losses.get(alias) is losses.get(name)
        assert alias in losses.get(name).entry.aliases
        assert alias not in registry


def test_names_by_kind_and_low_confidence_last() -> None:
    everything = losses.names()
    assert len(everything) == len(set(everything)) == len(registry)
    by_kind = [losses.names(kind) for kind in ("pair", "unpaired", "group", "token")]
    assert all(by_kind)
    assert set(everything) == {name for names in by_kind for name in names}
    low = [losses.get(name).entry.confidence == "L" for name in everything]
    assert low == sorted(low)
    assert {"focal_po", "c2_dpo", "hpo", "spo", "fine_grained_rm"} == {
        name for name, is_low in zip(everything, low, strict=True) if is_low
    }


def test_every_entry_is_complete() -> None:
    for loss in registry.values():
        entry = loss.entry
        assert entry.paper, entry.name
        assert entry.formula, entry.name
        assert entry.when, entry.name
        assert entry.summary, entry.name
        assert entry.confidence in "HML"
        assert "\n- Found in: " in page(entry.name)
        assert "\n- Choose it when: " in page(entry.name)
        assert entry.kind == "token" or set(entry.defaults) <= set(entry.parameters), entry.name
        assert loss.__doc__ is not None
        assert entry.summary in loss.__doc__
        assert entry.name in repr(loss)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        *(("sigmiod", "sigmoid"), ("dpoo", "dpo"), ("ktoo", "kto"), ("IPO", "ipo")),
        *(("ipo_sum", "ipo"), ("mrpo_k2", "mrpo"), ("rpo_aware_bwd_kl", "rpo_aware")),
    ],
)
def test_unknown_loss(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"no loss is called '{name}'; did you mean '{nearest}'"):
        losses.get(name)


def test_unknown_hyper_parameter() -> None:
    with pytest.raises(TypeError, match=r"dpo has no hyper-parameter 'bta'; did you mean 'beta'\?"):
        losses.get("dpo")(PAIRS, bta=0.1)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("robust", {"label_smoothing": 0.5}, ValueError, r"robust: label_smoothing .*\[0, 0.5\)"),
        ("exo_pair", {"label_smoothing": 0.0}, ValueError, r"exo_pair: label_smoothing .*\(0, 0.5"),
        ("dpo", {"beta": 0}, ValueError, r"dpo: beta must be in \(0, inf\), got 0"),
        ("dpo", {"beta": float("nan")}, ValueError, "got nan"),
        ("dpo", {"beta": "1e-3"}, TypeError, "must be a number .* got '1e-3'"),
        ("dpo", {"beta": True}, TypeError, "got True"),
        ("dpo", {"f_divergence": "jsd"}, ValueError, "did you mean 'js'"),
        ("dpo", {"weighting": "wop"}, ValueError, "did you mean 'wpo'"),
        ("gpo", {"form": "expnential"}, ValueError, "did you mean 'exponential'"),
        ("gpo", {"form": 3}, TypeError, "must be one of"),
    ],
)
def test_values_out_of_range(
    name: str, arguments: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        losses.get(name)(PAIRS, **arguments)


@pytest.mark.parametrize("loss", registry.values(), ids=registry)
def test_nothing_outside_a_range_is_accepted(loss: losses.Loss) -> None:
    for name, parameter in loss.entry.parameters.items():
        if "|" in parameter.valid:
            outside = ["no such word"]
        elif parameter.valid:
            low, high = (float(x) for x in parameter.valid[1:-1].split(","))
            outside = [float("nan"), low - 0.1, high + 0.1, float("inf")]
            outside += [low] * (parameter.valid[0] == "(") + [high] * (parameter.valid[-1] == ")")
        else:
            continue
        for value in outside:
            with pytest.raises(ValueError, match=name):
                loss.check({name: value})


def test_a_number_of_the_batch_is_not_checked() -> None:
    assert losses.get("dpo")(PAIRS, beta=torch.tensor([0.1, 0.2])).shape == (2,)


def test_missing_field_names_loss_field_and_source() -> None:
    with pytest.raises(
        ValueError, match=r"lr_dpo needs PairLogps\.chosen_lengths.*response tokens"
    ):
        losses.get("lr_dpo")(PAIRS)
    with pytest.raises(ValueError, match=r"dpo needs PairLogps\.ref_chosen.*`ref_model`.*column"):
        losses.get("dpo")(PairLogps(chosen=X, rejected=X))
    with pytest.raises(ValueError, match=r"kto needs UnpairedLogps\.kl_logps"):
        losses.get("kto")(UnpairedLogps(logps=X, ref_logps=X, labels=X > 0))


def test_shapes_that_disagree() -> None:
    with pytest.raises(ValueError, match=r"rejected has shape \(1,\), but chosen has \(2,\)"):
        losses.get("hinge")(PairLogps(chosen=X, rejected=X[:1], ref_chosen=X, ref_rejected=X))


def test_several_references_where_one_is_meant() -> None:
    batch = PairLogps(chosen=X, rejected=X, ref_chosen=X.expand(3, 2), ref_rejected=X)
    with pytest.raises(ValueError, match="dpo takes one reference, ref_chosen has 3; use mrpo"):
        losses.get("dpo")(batch)


def test_wrong_kind_of_batch() -> None:
    with pytest.raises(TypeError, match="kto takes UnpairedLogps, got PairLogps"):
        losses.get("kto")(PAIRS)


def test_batches_are_built_unchecked_and_frozen() -> None:
    empty = PairLogps()
    assert empty.chosen is None
    with pytest.raises(AttributeError):
        empty.chosen = X


def test_derived_properties() -> None:
    chosen, rejected = PAIRS.logratios
    assert torch.equal(chosen - rejected, PAIRS.margin)
    assert torch.equal(PAIRS.margin, torch.ones(2))
    rewards = PairLogps(**{**vars(PAIRS), "chosen": X.clone().requires_grad_()}).rewards(0.5)
    assert not rewards[0].requires_grad
    assert torch.equal(rewards[1], torch.full((2,), -0.5))


@pytest.fixture
def fresh() -> Iterator[None]:
    before, aliases = dict(registry), dict(_aliases)
    yield
    for mapping, old in ((registry, before), (_aliases, aliases)):
        mapping.clear()
        mapping.update(old)


@pytest.mark.usefixtures("fresh")
class TestOneOfYourOwn:
    def test_three_lines(self) -> None:
        @losses.register("mine", needs={"ref"})
        def mine(pairs, *, beta=0.1):
            return -torch.nn.functional.logsigmoid(beta * pairs.margin)

        assert torch.equal(mine(PAIRS, beta=0.3), losses.get("dpo")(PAIRS, beta=0.3))
        assert losses.get("mine").entry.needs == {"ref"}
        assert "mine" in losses.names("pair")
        assert losses.combine(["mine", "dpo"], beta=0.3)(PAIRS).shape == (2,)
        assert "mine" in document()

    def test_again_replaces_it_but_never_one_of_the_library(self) -> None:
        for value in (1.0, 2.0):
            losses.register("mine")(lambda pairs, value=value: pairs.chosen * value)
        assert torch.equal(losses.get("mine")(PAIRS), 2 * X)
        for taken in ("dpo", "sigmoid"):
            with pytest.raises(ValueError, match="already"):
                losses.register(taken)
            with pytest.raises(ValueError, match="already"):
                losses.register("other", aliases=(taken,))

    def test_unknown_needs_and_kind(self) -> None:
        with pytest.raises(ValueError, match=r"unknown word 'refs_'; did you mean 'refs'\?"):
            losses.register("mine", needs={"refs_"})
        with pytest.raises(ValueError, match="kind='pairs' is unknown; did you mean 'pair'"):
            losses.register("mine", kind="pairs")


def test_needs_grow_with_arguments() -> None:
    entry = losses.get("cpo").entry
    assert entry.needs_for({}) == {"lengths"}
    assert entry.needs_for({"nll_scope": "all"}) == {"lengths", "prompt"}
    assert losses.get("hinge").entry.needs_for({"weighting": "wpo"}) == {
        "ref",
        "lengths",
        "log_sum_sq",
    }


def test_only_torch_and_the_standard_library_are_imported() -> None:
    for path in (ROOT / "fastpref" / "losses").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            for module in modules:
                top = module.split(".")[0]
                own = module == "fastpref.losses" or module.startswith("fastpref.losses.")
                assert own or top == "torch" or top in sys.stdlib_module_names, (path.name, module)


def test_documentation_is_current() -> None:
    written = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    assert written == document(), "run: python -m fastpref.losses --write docs/losses.md"


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main([])
    table = capsys.readouterr().out
    assert all(f"[{name}](#{name})" in table for name in registry)
    main(["r_dpo"])
    page = capsys.readouterr().out
    assert page.startswith("### lr_dpo")
    assert "2406.11817" in page
    main(["--write", str(tmp_path / "losses.md")])
    assert (tmp_path / "losses.md").read_text(encoding="utf-8") == document()
    with pytest.raises(SystemExit):
        main(["simpoo"])
    assert "did you mean 'simpo'" in capsys.readouterr().err
