"""Every default of the presets is that of the TRL release they say they follow."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import fastpref
from fastpref.keys import IGNORED, REFUSED
from fastpref.objective import make_losses

MODULES = {
    "DPOConfig": "trl",
    "KTOConfig": "trl",
    "CPOConfig": "trl.experimental.cpo",
    "ORPOConfig": "trl.experimental.orpo",
}
ABSENT = object()

# What differs, and why.
EVERYWHERE = {
    "logging_nan_inf_filter": "training stops at a loss that is not finite, so none is hidden",
}
OTHERS: dict[str, dict[str, str]] = {
    "DPOConfig": {"padding_free": "rows are always packed"},
    "KTOConfig": {
        "train_sampling_strategy": "mismatched pairs are made batch by batch, so data is shuffled",
        "loss_type": "the same name in a list: losses add up",
    },
    "CPOConfig": {"loss_type": "the same loss by its name here"},
    "ORPOConfig": {},
}


@pytest.mark.parametrize("name", MODULES)
def test_defaults_are_trls(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl")
    kind: Any = getattr(import_module(MODULES[name]), name)
    # On CPU neither computes in bf16, whatever the machine that runs the tests has.
    given = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    theirs, ours = kind(**given), getattr(fastpref, name)(**given)
    different = {
        field.name
        for field in fields(kind)
        if field.init
        and field.name not in {*IGNORED, *REFUSED}
        and getattr(ours, field.name, ABSENT) != getattr(theirs, field.name)
    }
    assert different == {*EVERYWHERE, *OTHERS[name]}
    named = getattr(fastpref, name)(**given, loss_type=getattr(theirs, "loss_type", "orpo"))
    assert named.loss_type == ours.loss_type  # where it is written otherwise, it is the same loss


def test_discopop_gets_trls_temperature_and_no_other_loss_does(tmp_path: Path) -> None:
    def arguments(loss: str) -> dict[str, Any]:
        config = fastpref.DPOConfig(str(tmp_path), loss_type=loss, use_cpu=True)
        return dict(make_losses(config)._terms[0].arguments)

    assert arguments("discopop") == {"beta": 0.1, "tau": 0.05}
    assert "tau" in fastpref.losses.get("hpo").entry.defaults
    assert "tau" not in arguments("hpo")
