"""``fastpref doctor``, and that what the project says of itself in several places agrees."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from fastpref import backends, cli, doctor, registered

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project():
    """The table of that name in ``pyproject.toml``."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def read():
    return lambda *parts: ROOT.joinpath(*parts).read_text(encoding="utf-8")


def test_json_holds_what_the_text_says(capsys):
    assert cli.main(["doctor", "--json"]) in (0, 1)
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["backends"] == backends.status()
    chosen = {(row["device"], row["dtype"]): row["backend"] for row in report["auto"]}
    assert chosen["cpu", "float32"] == backends.explain("cpu", torch.float32)[0]
    text = doctor.render(report)
    for row in report["auto"]:
        assert re.search(rf"{row['device']} {row['dtype']} +{row['backend']} ", text)
    for name in report["backends"]:
        assert f"  {name} " in text


def test_a_missing_compiled_module_is_named_with_its_remedy(capsys, monkeypatch):
    monkeypatch.setattr(backends, "status", lambda: {"cpp": "no compiler here", "torch": "ok"})
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "no compiler here" in out
    missing = out.partition("missing, and the command that adds it")[2]
    assert backends.remedy("cpp") in missing


def test_missing_packages_are_named_with_the_extra(capsys, monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda p: "-" if p in ("peft", "rich") else real(p))
    assert cli.main(["doctor"]) == 1
    missing = capsys.readouterr().out.partition("missing, and the command that adds it")[2]
    assert re.search(r'peft, rich \(training\) +pip install "fastpref\[train\]"', missing)


def test_environment_variables_that_are_set_are_shown(capsys, monkeypatch):
    monkeypatch.setenv("FASTPREF_CACHE", "/some where")
    cli.main(["doctor"])
    assert re.search(r"FASTPREF_CACHE +/some where", capsys.readouterr().out)


@pytest.mark.parametrize("value", ["1", "0", "", "true"])
def test_debugging_means_the_same_everywhere(capsys, monkeypatch, value):
    monkeypatch.setenv("FASTPREF_DEBUG", value)
    try:
        cli.main(["losses", "no such loss"])
        tracebacks = False
    except ValueError:
        tracebacks = True
    assert tracebacks == registered._debug() == (value == "1")


def test_every_environment_variable_is_documented(read):
    sources = [
        ROOT / "setup.py",
        *(ROOT / "fastpref").rglob("*.py"),
        *(ROOT / "kernels").rglob("*.py"),
    ]
    reads = re.compile(r"""(?:environ(?:\.get)?|getenv)[(\[]\s*["'](FASTPREF_\w+)""")
    used = {name for path in sources for name in reads.findall(path.read_text(encoding="utf-8"))}
    assert used == set(doctor.ENVIRONMENT)
    listed = set(re.findall(r"^\| `(FASTPREF_\w+)` ", read("README.md"), re.MULTILINE))
    assert listed == set(doctor.ENVIRONMENT)


def test_hooks_use_the_versions_that_ci_uses(read):
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", read("constraints.txt"), re.MULTILINE))
    hooks = re.findall(r"\[([\w-]+)==(\S+)\]", read(".pre-commit-config.yaml"))
    assert {name for name, _ in hooks} >= {"ruff", "clang-format"}
    for name, version in hooks:
        assert pinned.get(name, version) == version, name


def test_the_version_is_the_same_everywhere(read):
    version = re.search(r'^version = "(.+)"', read("pyproject.toml"), re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in read("CITATION.cff")


def test_every_direct_dependency_is_pinned(read, project):
    pinned = set(re.findall(r"^([\w-]+)==", read("constraints.txt"), re.MULTILINE))
    extras = project["optional-dependencies"]
    lists = [project["dependencies"], *(extras[name] for name in ("train", "demo", "test", "dev"))]
    wanted = {Requirement(text).name.lower() for texts in lists for text in texts}
    assert wanted - {"fastpref"} <= pinned


def test_the_licence_is_the_same_everywhere(read, project):
    assert "Apache License\n" in read("LICENSE")[:200]
    assert project["license"] == "Apache-2.0"
    assert "\nlicense: Apache-2.0\n" in read("CITATION.cff")
