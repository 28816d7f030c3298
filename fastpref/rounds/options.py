"""Dataclasses of options: made from mappings, and checked before anything is done with them."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar

Options = TypeVar("Options")


def check_types(options: Any, prefix: str = "") -> None:
    """Raise unless the options of a dataclass are what its annotations say.

    A whole number is a float too, a truth value is no number, and a string is no sequence.

    Args:
        options: An instance.
        prefix: Put before an option's name in the message.

    Raises:
        TypeError: an option is something else; the message says what was expected, and got.
    """
    annotated = typing.get_type_hints(type(options))
    for option in fields(options):
        value = getattr(options, option.name)
        if not _fits(value, annotated[option.name]):
            raise TypeError(
                f"{prefix}{option.name}: expected {option.type}, got {value!r} "
                f"({type(value).__name__})"
            )


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if origin in (list, Sequence):
        listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        return listed and all(_fits(item, inner[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    return isinstance(value, origin or kind)


def build(cls: type[Options], options: Mapping[str, Any], name: str) -> Options:
    """A dataclass from a mapping.

    Raises:
        TypeError: an option is missing or does not exist; the message names the nearest.
    """
    known = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(str(option), known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else f" It has {', '.join(known)}."
            raise TypeError(f"{name} has no option {option!r}.{hint}")
    for option, f in known.items():
        optional = f.default is not MISSING or f.default_factory is not MISSING
        if not optional and option not in options:
            raise TypeError(f"{name}: option {option!r} is missing")
    return cls(**options)


def as_options(cls: type[Options], given: Any, name: str, default: Options) -> Options:
    """``given`` as it is; or a mapping, in the place of some of the ``default``'s options."""
    if isinstance(given, cls):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: expected {cls.__name__} or its options, got {given!r}")
    return build(cls, {**vars(default), **given}, name)
