"""The ``fastpref`` command: finds the subcommand, and words errors for people.

A command is a module with ``main(argv)``, imported only when it is called for, so that
``fastpref --help`` is immediate and works with nothing but the standard library installed.
"""

from __future__ import annotations

import difflib
import importlib
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "demo": ("fastpref.demo", "preference-tune a small real model on this machine, from nothing"),
    "train": ("fastpref.train", "preference-tune your model on your data"),
    "sweep": ("fastpref.sweep", "compare losses and betas from one cached reference pass"),
    "rounds": ("fastpref.rounds.command", "iterative recipes: sample, score, pair, train, again"),
    "score": ("fastpref.score", "log-probs and implicit rewards of a dataset's responses"),
    "plan": ("fastpref.plan", "predict a run's peak memory: what fits, and what to change"),
    "inspect": ("fastpref.inspect", "what tokenisation and truncation do to a dataset"),
    "cache": ("fastpref.cache", "build, list, verify or clear the cached reference log-probs"),
    "losses": ("fastpref.catalogue", "list the losses, or describe one"),
    "bench": ("fastpref.bench", "time the op and its peers, with a correctness gate"),
    "doctor": ("fastpref.doctor", "what is installed, which kernels run, and what is missing"),
}

EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "gguf": "demo",
    "matplotlib": "train",
    "peft": "train",
    "rich": "train",
    "scipy": "rounds",
    "sklearn": "rounds",
    "transformers": "train",
    "yaml": "train",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of ``fastpref ARGV``: 0, 1 (a check failed), 2 (an error), 130 (interrupted).

    Args:
        argv: Arguments; the process's own without it. ``--traceback`` anywhere, or
            ``FASTPREF_DEBUG=1``, lets an error through with where it happened.

    Returns:
        The exit status.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--traceback" in given or os.environ.get("FASTPREF_DEBUG") == "1"
    given = [argument for argument in given if argument != "--traceback"]
    name = given[0] if given else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        import fastpref

        print(f"fastpref {fastpref.__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(COMMANDS)}"
        print(f"fastpref: no command {name!r}; {hint}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[name][0]).main(given[1:]) or 0
    except KeyboardInterrupt as stop:
        print(f"fastpref {name}: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fastpref losses | head`: the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        print(f"fastpref {name}: error: {_words(error)}", file=sys.stderr)
        return 2


def command() -> str:
    """What to type for ``fastpref``: its name if the shell finds it, else through this Python."""
    if shutil.which("fastpref"):
        return "fastpref"
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return f"{shlex.quote(str(python))} -m fastpref"


def _help() -> str:
    lines = [f"  {name:<8} {help}" for name, (_, help) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastpref COMMAND [options]     (fastpref COMMAND --help lists its options)",
            "",
            *lines,
            "",
            "  --version      print the version",
            "  --traceback    with any command: show where an error happened",
        ]
    )


def _words(error: Exception) -> str:
    """An error as a person should read it."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            extra = EXTRAS[package]
            return f'{package} is not installed; this adds it: pip install "fastpref[{extra}]"'
    if isinstance(
        error, (ValueError, TypeError, RuntimeError, ArithmeticError, OSError, ImportError)
    ):
        return str(error)
    return f"{type(error).__name__}: {error} (--traceback shows where)"
