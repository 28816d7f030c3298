"""The registry: what is known of each loss, and the call that checks, casts and runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastpref.losses.batch import BATCHES, View
from fastpref.losses.maths import divergence_score, wpo_weight
from fastpref.losses.parameters import COMMON, Parameter, nearest
from fastpref.losses.states import State

KINDS = ("pair", "unpaired", "group", "token")
NEEDS = frozenset(word for batch in BATCHES.values() for word in batch.fields)


@dataclass(frozen=True)
class Entry:
    """Everything the trainer, the documentation and the property tests want to know of a loss."""

    name: str
    aliases: tuple[str, ...]
    kind: str
    """``"pair"``, ``"unpaired"``, ``"group"``; ``"token"`` has a signature of its own."""
    needs: frozenset[str]
    """Words for the inputs beside the policy's sums; ``PairLogps.fields`` says which fields."""
    coupled: bool
    """One example's loss depends on the others of its batch."""
    state: type[State] | None
    """Computes, over all ranks, the keywords that depend on history or on the whole batch."""
    paper: str
    equation: str
    confidence: str
    """H: checked against official code or paper. M: one secondary source. L: not verified."""
    formula: str
    """The loss of one pair, in terms of the batch's fields."""
    summary: str
    when: str
    """When to choose it."""
    found_in: str
    """Systems that have it."""
    defaults: Mapping[str, Any]
    """Keyword arguments and their defaults."""
    parameters: Mapping[str, Parameter]
    finite_range: float
    """Log-ratios up to this size give a finite value and gradient."""
    stochastic: bool
    """Draws random numbers: the order of the examples matters."""
    shift_invariant: bool
    """Only log-ratios matter: a response's sums may shift together, policy and reference."""
    aligned: bool = True
    """Number i is of example i; else it is of a rank, or a share of the whole batch's loss, and
    ``weighting`` is not taken."""
    mean_reward: bool = False
    """The reward by which it ranks responses is a mean over their tokens, not a sum."""
    variants: tuple[Mapping[str, Any], ...] = field(default=({},))
    """Keyword arguments under which the property tests also run it."""

    def needs_for(self, arguments: Mapping[str, Any]) -> frozenset[str]:
        """The inputs needed under these arguments."""
        extra: set[str] = set()
        if arguments.get("weighting") == "wpo":
            extra |= {"lengths", "log_sum_sq"}
        if arguments.get("nll_scope") == "all":
            extra.add("prompt")
        return self.needs | extra


class Loss:
    """A registered loss: ``loss(batch, **hyper_parameters) -> (B,)``, no reduction inside."""

    def __init__(self, entry: Entry, function: Callable[..., Tensor]) -> None:
        """Give ``function`` its entry, and a docstring written from it."""
        self.entry = entry
        self.function = function
        self.__name__ = entry.name
        self.__module__ = function.__module__
        self.__doc__ = _docstring(entry)

    def __repr__(self) -> str:
        """Name and defaults."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.entry.defaults.items())
        return f"<{self.entry.kind} loss {self.entry.name}({arguments})>"

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise ``TypeError`` for an unknown argument, ``ValueError`` for a value out of range."""
        check_arguments(self.entry.name, arguments, self.entry.defaults, self.entry.parameters)

    def __call__(self, batch: Any, *args: Any, **arguments: Any) -> Tensor:
        """Loss of each example of ``batch``, in fp32 or better.

        Raises:
            TypeError: an unknown argument, one of the wrong type, or the wrong kind of batch.
            ValueError: an argument out of range, or a field the loss needs and ``batch`` lacks.
        """
        entry = self.entry
        self.check(arguments)
        if entry.kind == "token":
            return self.function(batch, *args, **arguments)
        if not isinstance(batch, BATCHES[entry.kind]):
            wanted = BATCHES[entry.kind].__name__
            raise TypeError(f"{entry.name} takes {wanted}, got {type(batch).__name__}")
        divergence = arguments.pop("f_divergence", "reverse_kl")
        alpha = arguments.pop("f_alpha", 0.5)
        weighting = arguments.pop("weighting", "none")
        view: Any = View(batch, entry.name, entry.needs)
        seen = view
        if divergence != "reverse_kl":
            seen = _under_divergence(batch, view, entry.name, divergence, alpha)
        losses = self.function(seen, *args, **arguments)
        return losses * wpo_weight(view) if weighting == "wpo" else losses


def _under_divergence(batch: Any, view: Any, name: str, divergence: str, alpha: float) -> View:
    """The batch with the f-divergence's score in the place of each log-ratio."""
    chosen, rejected = (
        divergence_score(ratio, divergence, alpha, view.exponent_limit) for ratio in view.logratios
    )
    return View(
        batch,
        name,
        chosen=chosen,
        rejected=rejected,
        ref_chosen=torch.zeros_like(chosen),
        ref_rejected=torch.zeros_like(rejected),
    )


def check_arguments(
    loss: str,
    arguments: Mapping[str, Any],
    known: Iterable[str],
    parameters: Mapping[str, Parameter],
) -> None:
    """Raise ``TypeError`` for a name not among ``known``, and check the values of the others."""
    known = list(known)
    for name, value in arguments.items():
        if name not in known:
            raise TypeError(f"{loss} has no hyper-parameter {name!r}{nearest(name, known)}")
        if name in parameters:
            parameters[name].check(loss, name, value)


registry: dict[str, Loss] = {}
"""Every registered loss by its name; aliases are not listed."""
_aliases: dict[str, str] = {}


def register(
    name: str,
    *,
    needs: Iterable[str] = (),
    kind: str = "pair",
    aliases: Iterable[str] = (),
    coupled: bool = False,
    state: type[State] | None = None,
    paper: str = "",
    equation: str = "",
    confidence: str = "",
    formula: str = "",
    when: str = "",
    found_in: str = "",
    parameters: Mapping[str, Parameter] | None = None,
    finite_range: float = 1e4,
    stochastic: bool = False,
    shift_invariant: bool = False,
    f_divergence: bool = False,
    aligned: bool = True,
    mean_reward: bool = False,
    variants: Iterable[Mapping[str, Any]] = (),
) -> Callable[[Callable[..., Tensor]], Loss]:
    """A decorator that gives a function ``(batch, *, ...) -> (B,)`` a name and a place in the
    registry.

    Equals ``registry[name] = Loss(Entry(...), function)``. Three lines make a loss of your own::

        @losses.register("mine", needs={"ref"})
        def mine(pairs, *, beta=0.1):
            return -F.logsigmoid(beta * pairs.margin)

    Args:
        name: Name for ``get``, ``loss_type`` and the command line. A name of the library's own
            cannot be taken.
        needs: Inputs beside the policy's sums: `ref`, `refs`, `lengths`, `tokens`, ...
            (``PairLogps.fields``).
        kind: ``"pair"``, ``"unpaired"`` or ``"group"``.
        aliases: Other names.
        coupled: One example's loss depends on the others of its batch.
        state: Class whose ``kwargs(batch)`` gives the keywords that depend on history or the whole
            batch.
        paper: Authors, year, arXiv number. ``equation``: its number there.
        equation: See ``paper``.
        confidence: ``"H"``, ``"M"`` or ``"L"``.
        formula: The loss of one example.
        when: When to choose it. ``found_in``: systems that have it.
        found_in: See ``when``.
        parameters: Meaning and range of hyper-parameters that ``parameters.COMMON`` does not know.
        finite_range: Log-ratios up to this size give finite values and gradients.
        stochastic: It draws random numbers.
        shift_invariant: Only log-ratios matter; the property tests hold the loss to it.
        f_divergence: Accept ``f_divergence=`` and ``f_alpha=``: the loss sees the policy through
            log-ratios alone.
        aligned: Number i of the result is of example i; false: pairs cannot be weighed by
            ``weighting``.
        mean_reward: The reward by which it ranks responses is a mean over their tokens.
        variants: Further keyword arguments under which the property tests run it.

    Raises:
        ValueError: the name is taken, or ``kind`` or a word of ``needs`` is unknown.
    """
    needs, aliases = frozenset(needs), tuple(aliases)
    if kind not in KINDS:
        raise ValueError(f"{name}: kind={kind!r} is unknown{nearest(kind, KINDS)}")
    for word in needs - NEEDS:
        raise ValueError(f"{name}: needs has unknown word {word!r}{nearest(word, sorted(NEEDS))}")
    for taken in {name, *aliases} & _library_names:
        raise ValueError(f"{name}: the library has a loss {taken!r} already; choose another name")

    def add(function: Callable[..., Tensor]) -> Loss:
        signature = inspect.signature(function)
        defaults = {
            key: parameter.default
            for key, parameter in signature.parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        if f_divergence:
            defaults |= {"f_divergence": "reverse_kl", "f_alpha": 0.5}
        if kind == "pair" and aligned and "log_sum_sq" not in needs:
            defaults |= {"weighting": "none"}
        known = {**COMMON, **(parameters or {})}
        entry = Entry(
            name=name,
            aliases=aliases,
            kind=kind,
            needs=needs,
            coupled=coupled,
            state=state,
            paper=paper,
            equation=equation,
            confidence=confidence,
            formula=formula,
            summary=(inspect.getdoc(function) or "").strip(),
            when=when,
            found_in=found_in,
            defaults=defaults,
            parameters={key: known[key] for key in defaults if key in known},
            finite_range=finite_range,
            stochastic=stochastic,
            shift_invariant=shift_invariant,
            aligned=aligned,
            mean_reward=mean_reward,
            variants=({}, *variants),
        )
        registry[name] = Loss(entry, function)
        _aliases.update(dict.fromkeys(aliases, name))
        return registry[name]

    return add


_library_names: set[str] = set()


def seal() -> None:
    """Reserve the names registered so far: a user's loss never replaces one of them."""
    _library_names.update(registry, _aliases)


def names(kind: str | None = None) -> list[str]:
    """Names of the registered losses, of one kind if given; those of low confidence last."""
    entries = [loss.entry for loss in registry.values() if kind in (None, loss.entry.kind)]
    return [entry.name for entry in sorted(entries, key=lambda entry: entry.confidence == "L")]


def get(name: str) -> Loss:
    """The loss of that name or alias.

    Raises:
        ValueError: no such loss; the message names the nearest.
    """
    name = _aliases.get(name, name)
    if name not in registry:
        raise ValueError(f"no loss is called {name!r}{nearest(name, [*registry, *_aliases])}")
    return registry[name]


def _docstring(entry: Entry) -> str:
    """A Google docstring, written from the entry."""
    lines = [entry.summary, ""]
    lines += [f"Equals ``{entry.formula}``.", ""] if entry.formula else []
    lines += ["Args:", f"    batch: {describe_inputs(entry)}."]
    for name, value in entry.defaults.items():
        parameter = entry.parameters.get(name, Parameter("see the source"))
        valid = f" In {parameter.valid}." if parameter.valid else ""
        lines.append(f"    {name}: {parameter.meaning}.{valid} Default {value!r}.")
    lines += ["", f"Source: {entry.paper} {entry.equation}".rstrip()] if entry.paper else []
    return "\n".join(lines)


def describe_inputs(entry: Entry) -> str:
    """The batch a loss takes and the words of its ``needs``, for people."""
    if entry.kind == "token":
        return "see the signature"
    needs = f" with {', '.join(sorted(entry.needs))}" if entry.needs else ""
    return BATCHES[entry.kind].__name__ + needs
