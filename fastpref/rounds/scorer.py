"""What a response is worth: the base of all scorers.

Every scorer scores groups, a prompt with its responses, as a stage of a run. Equal responses to one
prompt are scored once, and so are the same groups that are asked about under several names; a stage
is never made twice, and a batch whose scorer fails costs only itself: the scores before it are
kept, and the next start goes on from there.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import re
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastpref.named import find
from fastpref.rounds.run import Row, Rows, Run, by_length, digest

Score = Callable[[Sequence[Row]], list[list[float]]]
"""Groups in; a number for each response out."""


class Scorer:
    """Base of the scorers: a number for each response of each group, as a stage.

    A subclass says what it is (``describe``) and loads what it needs (``open``), or has another
    way to its tables (``make``).
    """

    kind = ""
    """Name in a config."""
    probability = False
    """Of two responses, the first's score is the probability that it is the better one."""

    @property
    def comparative(self) -> bool:
        """Whether a score depends on the responses beside it: a single one says nothing."""
        return self.probability

    @property
    def reads(self) -> str:
        """What of a response it scores, ``"text"`` or ``"ids"``: equal ones are scored once."""
        return "text"

    @property
    def loads(self) -> bool:
        """Whether a model scores, in the run's dtype."""
        return False

    def describe(self) -> dict[str, Any]:
        """What the scores depend on beside the responses, as JSON can hold it."""
        raise NotImplementedError

    def own(self) -> Any:
        """What tells it, within this process, from others that are described alike."""
        return None

    def open(self, run: Run) -> Score:
        """Load what is needed, and return the function that scores."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """For tables and messages."""
        return self.kind

    def score(self, run: Run, name: str, groups: Rows) -> Rows:
        """Scores of the responses of ``groups``, as a stage.

        Args:
            run: The run.
            name: Of the stage.
            groups: Rows with ``id``, ``prompt``, ``prompt_ids`` and ``responses``.

        Returns:
            A row ``{"id", "scores": [...]}`` for each group.

        Raises:
            ValueError: a score is not a finite number.
            RuntimeError: the scorer failed; what it had scored is kept.
        """
        asked = digest([self.describe(), self.own(), groups.rows])
        if asked not in run.scored:  # with the scorer, so that no other object gets its address
            run.scored[asked] = (self, self.make(run, name, groups))
        return run.scored[asked][1]

    def make(self, run: Run, name: str, groups: Rows) -> Rows:
        """The table of :meth:`score`, made or found on disk."""
        rows = groups.rows
        sizes = [sum(len(r["text"]) for r in row["responses"]) for row in rows]
        most = max((len(row["responses"]) for row in rows), default=1)
        batches = by_length(sizes, max(run.batch_size // max(most, 1), 1))

        def open() -> Any:
            score = self.open(run)

            def work(number: int, indices: Sequence[int]) -> list[Row]:
                chunk = [rows[i] for i in indices]
                done = sum(map(len, batches[:number]))
                try:
                    found = _once(score, chunk, self.reads)
                except Exception as error:
                    raise RuntimeError(
                        f"{self.name} failed in {name}, after {done} of {len(rows)} prompts: "
                        f"{type(error).__name__}: {error}. The scores before are kept: the same "
                        "command goes on from there once the cause is mended"
                    ) from error
                return [self._checked(row, own) for row, own in zip(chunk, found, strict=True)]

            return work

        inputs = {"scorer": self.describe(), "responses": groups.digest}
        inputs |= {"dtype": str(run.dtype)} if self.loads else {}
        return run.batches(name, inputs, batches, open, f"scoring with {self.name}")

    def _checked(self, row: Row, scores: Sequence[float]) -> Row:
        for response, score in zip(row["responses"], scores, strict=True):
            if not math.isfinite(score):
                raise ValueError(
                    f"{self.name} gave the score {score} to prompt {row['id']} with the response "
                    f"{response['text'][:80]!r}. A score must be a finite number: mend the scorer "
                    "(a reward model that returns NaN is often fp16 out of its range: load it in "
                    "bf16 or fp32). The scores before are kept"
                )
        return {"id": row["id"], "scores": [float(score) for score in scores]}


class ByFunction(Scorer):
    """Base of the scorers that may ask a function, named or given."""

    function: Any

    @functools.cached_property
    def _described(self) -> dict[str, str]:
        return described(self.function)  # once: what an object notes while it scores is no change

    def own(self) -> Any:
        """The function: one with other values in it is described alike."""
        return self.function if isinstance(self.function, str) else id(self.function)


def _once(score: Score, groups: Sequence[Row], reads: str) -> list[list[float]]:
    """The scores of groups whose equal responses are shown once."""
    shown, places = distinct(groups, reads)
    filled = [group for group in shown if group["responses"]]
    found = score(filled) if filled else []
    if [len(own) for own in found] != [len(group["responses"]) for group in filled]:
        raise ValueError("the scorer did not return one number for each response")
    own = iter(found)
    scores = [next(own) if group["responses"] else [] for group in shown]
    return spread(scores, places)


def distinct(groups: Sequence[Row], reads: str) -> tuple[list[Row], list[list[int]]]:
    """Groups with the first of their equal responses alone.

    Args:
        groups: Rows with ``responses``.
        reads: What is compared, ``"text"`` or ``"ids"``.

    Returns:
        The groups, and for each response of each group the number of its equal there.
    """
    shown, places = [], []
    for group in groups:
        numbers: dict[tuple[Any, ...], int] = {}
        place = [numbers.setdefault(tuple(r[reads]), len(numbers)) for r in group["responses"]]
        first = [place.index(number) for number in range(len(numbers))]
        shown.append({**group, "responses": [group["responses"][i] for i in first]})
        places.append(place)
    return shown, places


def spread(values: Iterable[Sequence[float]], places: Sequence[Sequence[int]]) -> list[list[float]]:
    """A number for each response from those of :func:`distinct` ones."""
    return [[own[i] for i in place] for own, place in zip(values, places, strict=True)]


def described(function: Any) -> dict[str, str]:
    """Name of a function and digest of its source, for a stage's inputs.

    A partial's arguments count too, the attributes of an object that is called, or whose method is,
    as they are printed, without addresses, and plain defaults and enclosed values: numbers, texts,
    tuples.
    """
    found = find(function)
    if isinstance(found, functools.partial):
        inner = described(found.func)
        where = inner["function"]
        source = f"{inner['source']} {_printed(found.args)} {_printed(found.keywords)}"
    else:
        where = getattr(found, "__qualname__", type(found).__qualname__)
        source = _source(found if hasattr(found, "__qualname__") else type(found))
        source += _enclosed(found)
        owner = getattr(found, "__self__", None if hasattr(found, "__qualname__") else found)
        if not (owner is None or inspect.ismodule(owner)):
            source += _printed(dict(getattr(owner, "__dict__", {})))
    return {"function": where, "source": hashlib.sha256(source.encode()).hexdigest()[:16]}


def _printed(value: Any) -> str:
    """A value's ``repr``, the same in every process."""
    if isinstance(value, dict):
        return str(sorted(f"{_printed(key)}: {_printed(own)}" for key, own in value.items()))
    if isinstance(value, (set, frozenset)):
        return str(sorted(map(_printed, value)))
    if type(value) in (list, tuple):
        return str(list(map(_printed, value)))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _enclosed(function: Any) -> str:
    """Module, defaults and enclosed values of a function; of a lambda its code too, since several
    may stand in one line."""
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return ""
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    held = {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}
    held |= dict(enumerate(function.__defaults__ or ())) | (function.__kwdefaults__ or {})
    plain = {k: v for k, v in held.items() if isinstance(v, (str, int, float, tuple, type(None)))}
    own = code.co_code.hex() if function.__name__ == "<lambda>" else ""
    return f" {function.__module__} {_printed(plain)} {own}"


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
