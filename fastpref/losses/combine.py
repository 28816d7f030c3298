"""Several losses as one weighted sum, with their states: what the trainer calls."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastpref.losses.core import Loss, check_arguments, get
from fastpref.losses.parameters import COMMON, nearest
from fastpref.losses.states import State


class _Term:
    """One loss of the sum: its weight, its fixed arguments, its state."""

    def __init__(self, name: str, weight: float, arguments: Mapping[str, Any]) -> None:
        """Look the loss up, check its arguments and start its state."""
        self.loss: Loss = get(name)
        self.weight = weight
        entry = self.loss.entry
        if entry.kind == "token":
            raise ValueError(f"{entry.name} has a signature of its own: call it directly")
        options = list(inspect.signature(entry.state).parameters) if entry.state else []
        check_arguments(
            entry.name, arguments, [*entry.defaults, *options], {**COMMON, **entry.parameters}
        )
        self.arguments = {key: v for key, v in arguments.items() if key in entry.defaults}
        known = {**entry.defaults, **arguments}
        self.options = {key: known[key] for key in options if key in known}
        self.state: State | None = entry.state(**self.options) if entry.state else None
        if self.state is not None:
            self.state.reader = entry.name

    def window(self, rates: Mapping[str, Any]) -> dict[str, Any]:
        """The token rates this loss takes, prompts counted where its likelihood has them."""
        known = self.loss.entry.defaults
        scope = self.arguments.get("nll_scope", known.get("nll_scope"))
        prompts = rates.get("prompt_tokens_per_pair", 0.0) if scope == "all" else 0.0
        return {key: rate + prompts for key, rate in rates.items() if key in known}

    def keywords(self, batch: Any, local: slice, update: bool) -> dict[str, Any]:
        """Keywords of the loss: fixed ones win, but for those that only start the state."""
        if self.state is None:
            return self.arguments
        moving = self.state.kwargs(batch, local, update)
        fixed = {
            key: v
            for key, v in self.arguments.items()
            if key not in moving or key not in self.options
        }
        return {**moving, **fixed}


class Combined:
    """``sum_i weight_i * loss_i(batch)``, callable on a batch; built by `combine`."""

    def __init__(self, terms: Sequence[_Term], beta: float | None = None) -> None:
        """Add ``terms``; the attributes are what they need together."""
        self._terms = list(terms)
        entries = [term.loss.entry for term in self._terms]
        self.names = [entry.name for entry in entries]
        self.weights = [term.weight for term in self._terms]
        self.kind = entries[0].kind
        """``"pair"``, ``"unpaired"`` or ``"group"``."""
        self.coupled = any(entry.coupled for entry in entries) or any(
            term.state is not None and term.state.moves for term in self._terms
        )
        """An example's loss depends on the others of its micro-batch, over all ranks: in itself, or
        through a state that follows them."""
        self.needs = frozenset(
            word for term in self._terms for word in term.loss.entry.needs_for(term.arguments)
        )
        """Union of the inputs the losses need."""
        self.states: dict[str, State] = {
            name: term.state
            for name, term in zip(self.names, self._terms, strict=True)
            if term.state is not None
        }
        betas = [
            term.arguments.get("beta", term.loss.entry.defaults["beta"])
            for term in self._terms
            if "beta" in term.loss.entry.defaults
        ]
        self.beta: float = betas[0] if betas else 1.0 if beta is None else beta
        """Scale of the rewards that are logged: the first beta of a loss, or else the one given."""
        self.aligned = all(entry.aligned for entry in entries)
        """Number i of the result is of example i."""
        self.mean_reward = entries[0].mean_reward
        """These rewards are means over tokens: the first loss ranks by such."""

    def state_batch(self, batch: Any) -> Any:
        """What the states read, detached: ``.map`` a gather over it, pass it as ``gathered``."""
        return batch.pick({field for state in self.states.values() for field in state.reads})

    def terms(
        self,
        batch: Any,
        *,
        gathered: Any = None,
        local: slice = slice(None),
        update: bool = True,
        **window: float | Tensor,
    ) -> dict[str, Tensor]:
        """Each loss by name, unweighted. Shapes ``(B,)``.

        Args:
            batch: What this rank holds.
            gathered: ``state_batch`` of all ranks; default: of this one.
            local: Where this rank's examples are in ``gathered``.
            update: Let the states learn; false for evaluation.
            window: Statistics of the global accumulation window (``tokens_per_pair``,
                ``third_tokens_per_pair``), handed to the losses that take them; those whose
                likelihood counts the prompt get them plus ``prompt_tokens_per_pair``.
        """
        if gathered is None and self.states:
            gathered = self.state_batch(batch)
        result = {}
        for name, term in zip(self.names, self._terms, strict=True):
            keywords = {**term.window(window), **term.keywords(gathered, local, update)}
            result[name] = term.loss(batch, **keywords)
        return result

    def __call__(self, batch: Any, **options: Any) -> Tensor:
        """The weighted sum; options as in `terms`. Shape ``(B,)``."""
        values = self.terms(batch, **options).values()
        total = [weight * value for weight, value in zip(self.weights, values, strict=True)]
        return sum(total[1:], total[0])

    def state_dict(self) -> dict[str, dict[str, float]]:
        """What to save, by name of the loss: plain numbers."""
        return {name: state.state_dict() for name, state in self.states.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: the states saved are not of these losses.
        """
        if set(state) != set(self.states):
            raise ValueError(
                f"saved states are of {sorted(state)}, the losses here keep {sorted(self.states)}"
            )
        for name, saved in state.items():
            self.states[name].load_state_dict(saved)


def combine(
    names: str | Sequence[str],
    weights: Sequence[float] | None = None,
    args: Mapping[str, Any] | None = None,
    beta: float | None = None,
) -> Combined:
    """One callable for a loss or a weighted list of losses.

    Equals ``lambda batch: sum(w * get(name)(batch, **args[name]) for w, name in zip(weights,
    names))``.

    Args:
        names: A name or alias, or a list of them.
        weights: One number per loss; default: all 1.
        args: Hyper-parameters: flat for one loss, ``{name: {...}}`` for several. Options of a
            loss's state (``delta_mode``, ``momentum``, ...) belong here too.
        beta: For every loss that has a beta and no own one in ``args``; ``None``: each loss's
            default.

    Raises:
        ValueError: unknown name, a name twice, weights that do not match, paired and unpaired
            losses together, or a value out of range.
        TypeError: unknown hyper-parameter.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError("loss_type is empty; name at least one loss")
    if len({get(name).entry.name for name in names}) < len(names):
        raise ValueError(f"a loss occurs twice in {names}; list each once and set its weight")
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(weights) != len(names):
        raise ValueError(f"{len(weights)} loss_weights for {len(names)} losses {names}")
    kinds = {name: get(name).entry.kind for name in names}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"losses of different kinds cannot be added: {kinds}")
    args = dict(args or {})
    nested = all(isinstance(value, Mapping) for value in args.values())
    if len(names) > 1 or (args and nested and set(args) <= set(names)):
        for key, value in args.items():
            if key not in names or not isinstance(value, Mapping):
                near = nearest(key, names)
                raise ValueError(
                    f"loss_args of several losses is {{name: {{...}}}}, got {key!r}{near}"
                )
    else:
        args = {names[0]: args}
    terms = []
    for name, weight in zip(names, weights, strict=True):
        own = dict(args.get(name, {}))
        if beta is not None and "beta" in get(name).entry.defaults:
            own.setdefault("beta", beta)
        terms.append(_Term(name, weight, own))
    return Combined(terms, beta)
