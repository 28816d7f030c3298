"""``fastpref rounds RECIPE --config x.yaml``: a recipe with the options of a YAML file."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fastpref import rounds
from fastpref.rounds import RECIPES
from fastpref.rounds.people import LabelsWanted


def main(argv: Sequence[str]) -> int:
    """Runs a recipe, or lists them; 0, or 1 if the run waits for people's labels."""
    parser = argparse.ArgumentParser(
        prog="fastpref rounds",
        usage="fastpref rounds RECIPE --config run.yaml [--run-dir DIR] [--redo] [--cpu]",
        description="Run an iterative recipe; the same command again goes on where it stopped.",
        epilog=overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="one of those below")
    parser.add_argument("--config", type=Path, help="YAML file with the recipe's options")
    parser.add_argument("--run-dir", help="where results go; wins over the file's run_dir")
    parser.add_argument(
        "--redo", action="store_true", help="make anew what was made with other options"
    )
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    given = parser.parse_args(argv)
    if given.recipe is None:
        print(overview())
        return 0
    recipe = recipe_class(given.recipe)
    if given.config is None:
        raise ValueError(f"--config is missing: the options of {given.recipe}, as YAML")
    options = read_config(given.config)
    named = options.pop("recipe", None)
    if named not in (None, given.recipe, recipe.__name__):
        raise ValueError(f"{given.config} is for the recipe {named!r}, not {given.recipe!r}")
    options |= {"run_dir": given.run_dir} if given.run_dir else {}
    options |= {"redo": True} if given.redo else {}
    options |= {"use_cpu": True} if given.cpu else {}
    made = recipe.from_options(options)
    try:
        print(made.closing(made.run()))
    except LabelsWanted as waiting:
        print(waiting)
        return 1
    return 0


def overview() -> str:
    """The recipes, a line each."""
    width = max(map(len, RECIPES))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in RECIPES.items()]
    return "\n".join(["recipes:", *lines])


def recipe_class(name: str) -> Any:
    """The recipe of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(RECIPES)}"
        raise ValueError(f"no recipe {name!r}; {hint}")
    return getattr(rounds, RECIPES[name][0])


class _Loader(yaml.SafeLoader):
    """YAML in which ``1e-6`` is a number, as it is in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not YAML, or not lines of ``name: value``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config: there is no file {path}")
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected lines of the form 'name: value'")
    return given
