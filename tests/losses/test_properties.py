"""What every registered loss must keep, whatever it is: the registry alone says how to call it.

A loss that is registered later is covered without a change here; what it may not keep (a shorter
finite range, coupling, randomness) it declares in its entry.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from fastpref import losses
from fastpref.losses import Loss, Packed
from fastpref.losses.batch import BATCHES
from fastpref.losses.core import registry

K, REFERENCES, ROUNDS, AUX = 4, 3, 3, 2
POLICY = {
    *("chosen", "rejected", "logps", "third", "corrupted", "values"),
    *("chosen_tokens", "rejected_tokens", "chosen_kl", "rejected_kl", "prompt"),
}
ROWS = {"margins": 1, "prior": ROUNDS, "aux": AUX}

CASES = [
    pytest.param(loss, variant, id=f"{name}-{'-'.join(map(str, variant.values())) or 'default'}")
    for name, loss in registry.items()
    if loss.entry.kind != "token"
    for variant in loss.entry.variants
]
every_loss = pytest.mark.parametrize(("loss", "variant"), CASES)


def shapes(loss: Loss, size: int, fields: str) -> tuple[int, ...]:
    if loss.entry.kind == "group":
        return (size, K)
    if "refs" in loss.entry.needs and fields in ("ref_chosen", "ref_rejected"):
        return (REFERENCES, size)
    rows = [rows for word, rows in ROWS.items() if word in fields]
    return (rows[0], size) if rows else (size,)


def field(loss: Loss, name: str, size: int, generator: torch.Generator) -> Any:
    """A plausible value of a field, in float64."""
    shape = shapes(loss, size, name)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    if name.endswith("lengths"):
        return (1 + 9 * uniform).long()
    if name == "labels":
        return uniform > 0.5
    if name.endswith("tokens"):
        lengths = (1 + 5 * uniform).long().tolist()
        values = torch.rand(sum(lengths), generator=generator, dtype=torch.float64)
        return Packed(-3 * values, packed_bounds(lengths))
    if name.endswith("_kl") or name in ("values", "weights"):
        return uniform
    if any(word in name for word in ("scores", "aux", "margins")):
        return 4 * uniform - 1 + 2 * name.startswith("chosen")
    return -0.5 - 6 * uniform


def make(loss: Loss, variant: Mapping[str, Any], size: int = 5, seed: int = 0) -> Any:
    """A batch that holds the policy and what the entry says the loss needs, and nothing else."""
    batch = BATCHES[loss.entry.kind]
    names = [batch.primary, *{"pair": ["rejected"], "unpaired": ["labels"]}.get(batch.kind, [])]
    for word in sorted(loss.entry.needs_for(variant)):
        names += [name for name in batch.fields[word] if name not in names]
    generator = torch.Generator().manual_seed(seed)
    fields = {name: field(loss, name, size, generator) for name in names}
    for side in ("chosen", "rejected"):  # the reference scores the same tokens, the sums are theirs
        if f"ref_{side}_tokens" in fields and f"{side}_tokens" in fields:
            policy = fields[f"{side}_tokens"]
            noise = torch.rand(policy.values.shape, generator=generator, dtype=torch.float64)
            fields[f"ref_{side}_tokens"] = Packed(policy.values + noise - 0.7, policy.cu_seqlens)
    return batch(**fields)


def replaced(batch: Any, **fields: Any) -> Any:
    return type(batch)(**{**vars(batch), **fields})


def leaves(batch: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The batch with fresh leaves in the places a gradient goes to, and those leaves."""
    found: dict[str, torch.Tensor] = {}
    fields = {}
    for name, value in vars(batch).items():
        if name in POLICY and value is not None:
            inner = value.values if isinstance(value, Packed) else value
            found[name] = inner.detach().clone().requires_grad_()
            packed = isinstance(value, Packed)
            fields[name] = Packed(found[name], value.cu_seqlens) if packed else found[name]
    return replaced(batch, **fields), found


def call(loss: Loss, batch: Any, variant: Mapping[str, Any], **more: Any) -> torch.Tensor:
    torch.manual_seed(0)  # of the losses that draw
    return loss(batch, **variant, **more)


def gradients(loss: Loss, batch: Any, variant: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    batch, found = leaves(batch)
    total = call(loss, batch, variant).sum()
    grads = torch.autograd.grad(total, list(found.values()), allow_unused=True)
    return {name: g for name, g in zip(found, grads, strict=True) if g is not None}


def select(batch: Any, index: torch.Tensor) -> Any:
    """The examples of ``index``, in that order."""

    def pick(value: Any) -> Any:
        if isinstance(value, Packed):
            bounds = value.cu_seqlens.tolist()
            parts = [value.values[bounds[i] : bounds[i + 1]] for i in index.tolist()]
            return Packed(torch.cat(parts), packed_bounds([len(part) for part in parts]))
        return value[index] if batch.kind == "group" else value[..., index]

    return replaced(batch, **{k: pick(v) for k, v in vars(batch).items() if v is not None})


def packed_bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@contextlib.contextmanager
def detached_values_fixed() -> Iterator[Callable[[], None]]:
    """Every ``detach()`` gives what it gave in the first run; the function yielded starts a run."""
    original, tape, place = torch.Tensor.detach, [], [0]

    def detach(x: torch.Tensor) -> torch.Tensor:
        if place[0] == len(tape):
            tape.append(original(x).clone())
        place[0] += 1
        return tape[place[0] - 1]

    torch.Tensor.detach = detach  # type: ignore[method-assign]
    try:
        yield lambda: place.__setitem__(0, 0)
    finally:
        torch.Tensor.detach = original  # type: ignore[method-assign]


def extreme(loss: Loss, variant: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Log-ratios of every sign as far as declared; responses of 1 and 4,096 tokens."""
    size = loss.entry.finite_range
    ends = [(0.0, -size), (-size, 0.0), (-300.0, -300.0)]  # under the policy, under the reference
    rows = list(itertools.product(ends, ends, (1, 4096), (1, 4096)))
    logps = torch.tensor([row[:2] for row in rows], dtype=dtype)  # (rows, side, model)
    lengths = torch.tensor([row[2:] for row in rows])
    batch = make(loss, variant, size=len(rows))

    def value(name: str, old: Any) -> Any:
        stem = name.removeprefix("ref_").removesuffix("_lengths").removesuffix("_tokens")
        side, model = int(stem in ("rejected", "corrupted")), int(name.startswith("ref_"))

        def pick(x: torch.Tensor) -> torch.Tensor:
            return x.repeat(1, K // 2) if batch.kind == "group" else x[:, side].expand(old.shape)

        if isinstance(old, Packed):
            each, count = logps[:, side, model] / lengths[:, side], lengths[:, side]
            return Packed(each.repeat_interleave(count), packed_bounds(count.tolist()))
        if name.endswith("lengths"):
            return pick(lengths)
        if stem in ("chosen", "rejected", "third", "corrupted", "logps"):
            return pick(logps[:, :, model])
        return old if old.dtype == torch.bool else old.to(dtype)

    return replaced(batch, **{k: value(k, v) for k, v in vars(batch).items() if v is not None})


def check_finite(loss: Loss, variant: Mapping[str, Any], dtype: torch.dtype) -> None:
    batch = extreme(loss, variant, dtype)
    assert call(loss, batch, variant).isfinite().all()
    for name, grad in gradients(loss, batch, variant).items():
        assert grad.isfinite().all(), f"gradient of {name}: {grad}"


def check_independent(loss: Loss, variant: Mapping[str, Any]) -> None:
    batch = make(loss, variant)
    window = {"tokens_per_pair": 4.0, "third_tokens_per_pair": 4.0}
    fixed = {key: value for key, value in window.items() if key in loss.entry.defaults}
    together = call(loss, batch, variant, **fixed)
    for i in range(len(together)):
        alone = call(loss, select(batch, torch.tensor([i])), variant, **fixed)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-12, atol=1e-12)


def shifted(batch: Any, shift: float) -> Any:
    """Every response made more likely by a constant of its own, by policy and reference alike."""

    def move(name: str, value: Any) -> Any:
        response = name.removeprefix("ref_").removeprefix("prior_")
        for suffix in ("_tokens", "_plus", "_minus"):
            response = response.removesuffix(suffix)
        if response not in ("chosen", "rejected", "logps"):
            return value
        size = shift if response == "chosen" else -2 * shift
        if isinstance(value, Packed):
            values = value.values.clone()
            values[value.cu_seqlens[:-1].long()] += size * torch.arange(len(value.cu_seqlens) - 1)
            return Packed(values, value.cu_seqlens)
        return value + size * torch.arange(value.shape[-1])

    return replaced(batch, **{k: move(k, v) for k, v in vars(batch).items() if v is not None})


def check_shift(loss: Loss, variant: Mapping[str, Any]) -> None:
    batch = make(loss, variant)
    before, after = (call(loss, b, variant) for b in (batch, shifted(batch, -1.7)))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def check_gradient(loss: Loss, variant: Mapping[str, Any], step: float = 1e-6) -> None:
    """Autograd equals central differences, detached values held where they were."""
    batch, found = leaves(make(loss, variant, size=3, seed=1))
    with detached_values_fixed() as restart:
        total = call(loss, batch, variant).sum()
        grads = torch.autograd.grad(total, list(found.values()), allow_unused=True)
        for leaf, grad in zip(found.values(), grads, strict=True):
            for i in range(leaf.numel()):
                values = []
                for sign in (1, -1):
                    with torch.no_grad():
                        leaf.view(-1)[i] += sign * step
                        restart()
                        values.append(call(loss, batch, variant).sum().item())
                        leaf.view(-1)[i] -= sign * step
                numeric = (values[0] - values[1]) / (2 * step)
                exact = 0.0 if grad is None else grad.view(-1)[i].item()
                assert abs(exact - numeric) <= 1e-6 * max(1.0, abs(exact), abs(values[0]) * 1e-3)


@every_loss
def test_finite_value_and_gradient(loss: Loss, variant: Mapping[str, Any]) -> None:
    check_finite(loss, variant, torch.float32)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_inputs_are_raised(
    loss: Loss, variant: Mapping[str, Any], dtype: torch.dtype
) -> None:
    check_finite(loss, variant, dtype)
    low = make(loss, variant).map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    result = call(loss, low, variant)
    assert result.dtype == torch.float32
    high = low.map(lambda x: x.float() if x.is_floating_point() else x)
    assert torch.equal(result, call(loss, high, variant))


@every_loss
def test_one_number_per_example_in_the_dtype_given(loss: Loss, variant: Mapping[str, Any]) -> None:
    for size in (1, 7):
        double = make(loss, variant, size)
        single = double.map(lambda x: x.float() if x.is_floating_point() else x)
        high, low = call(loss, double, variant), call(loss, single, variant)
        assert (high.dtype, low.dtype) == (torch.float64, torch.float32)
        assert high.shape == (size,)
        assert (high - low).abs().max() <= 1e-4 * (1 + high.abs().max())


@every_loss
def test_examples_are_independent_unless_coupled(loss: Loss, variant: Mapping[str, Any]) -> None:
    if not (loss.entry.coupled or loss.entry.stochastic):
        check_independent(loss, variant)
        if "weighting" in loss.entry.defaults:
            check_independent(loss, {**variant, "weighting": "wpo"})


@every_loss
def test_permutation(loss: Loss, variant: Mapping[str, Any]) -> None:
    batch, order = make(loss, variant), torch.tensor([3, 0, 4, 2, 1])
    plain, shuffled = call(loss, batch, variant), call(loss, select(batch, order), variant)
    if loss.entry.coupled:  # only the statistics are invariant
        plain, shuffled, order = plain.mean()[None], shuffled.mean()[None], torch.tensor([0])
    if not loss.entry.stochastic:
        torch.testing.assert_close(shuffled, plain[order], rtol=1e-12, atol=1e-12)


@every_loss
def test_shift_invariance_where_claimed(loss: Loss, variant: Mapping[str, Any]) -> None:
    if loss.entry.shift_invariant:
        check_shift(loss, variant)


NOT_SHIFT_INVARIANT = (
    *("hypo", "h_dpo", "aot", "mrpo", "multi_dpo", "alpha_dpo", "mpo", "rpo", "iterative_rpo"),
    *("simpo", "cpo", "orpo", "alphapo", "slic_hf", "simper", "tpo", "sft", "rrhf", "nash_md"),
)


@pytest.mark.parametrize("name", NOT_SHIFT_INVARIANT)
def test_absolute_likelihood_counts_where_nothing_is_claimed(name: str) -> None:
    with pytest.raises(AssertionError):
        check_shift(losses.get(name), {})


@every_loss
def test_gradient_is_the_finite_difference(loss: Loss, variant: Mapping[str, Any]) -> None:
    check_gradient(loss, variant)
    if "weighting" in loss.entry.defaults:
        check_gradient(loss, {**variant, "weighting": "wpo"})


@every_loss
def test_nothing_waits_for_the_device(loss: Loss, variant: Mapping[str, Any]) -> None:
    """Values cannot be read on the meta device: neither a loss nor its state asks for one."""

    def moved(value: Any) -> Any:
        if isinstance(value, Packed):
            return Packed(value.values.to("meta"), value.cu_seqlens.to("meta"))
        return None if value is None else value.to("meta")

    batch = make(loss, variant)
    batch = replaced(batch, **{name: moved(value) for name, value in vars(batch).items()})
    keywords = loss.entry.state().kwargs(batch) if loss.entry.state else {}
    for arguments in (variant, {**variant, **keywords}):
        assert call(loss, batch, arguments).device.type == "meta"


def complaint(loss: Loss, batch: Any, variant: Mapping[str, Any]) -> str:
    try:
        call(loss, batch, variant)
    except ValueError as error:
        return str(error)
    return ""


READ_ELSEWHERE = {"spo": {"ref"}}  # SPO reads the reference as the last of the priors
ON_BATCHES = [loss for loss in registry.values() if loss.entry.kind != "token"]


@pytest.mark.parametrize("loss", ON_BATCHES, ids=lambda loss: loss.entry.name)
def test_needs_are_what_is_read(loss: Loss) -> None:
    """Without the fields of a word the loss stops, and says what is missing and its source."""
    for word in loss.entry.needs - READ_ELSEWHERE.get(loss.entry.name, set()):
        fields = BATCHES[loss.entry.kind].fields[word]
        texts = [
            complaint(loss, replaced(make(loss, variant), **dict.fromkeys(fields)), variant)
            for variant in loss.entry.variants
        ]
        said = [text for text in texts if text.startswith(loss.entry.name)]
        assert said, f"{loss.entry.name} says it needs {word} but runs without"
        assert any(name in text for name in fields for text in said)
        assert any(losses.SOURCES[word] in text for text in said)


def values_in(valid: str) -> list[Any]:
    """Values at both ends of a parameter's range, or all of its words."""
    if "|" in valid:
        return [word.strip() for word in valid.split("|")]
    low, high = (max(-3.0, min(3.0, float(x))) for x in valid[1:-1].split(","))
    return [low + 0.01 * (valid[0] == "("), high - 0.01 * (valid[-1] == ")")]


@pytest.mark.parametrize("loss", ON_BATCHES, ids=lambda loss: loss.entry.name)
def test_every_allowed_hyper_parameter_works(loss: Loss) -> None:
    for name, parameter in loss.entry.parameters.items():
        for value in values_in(parameter.valid) if parameter.valid else ():
            loss.check({name: value})
            default = loss.entry.defaults[name]
            if isinstance(default, (float, str)) and name != "arwc_convention":  # K is 3 here
                result = call(loss, make(loss, {name: value}), {name: value})
                assert result.isfinite().all(), (name, value)


@pytest.fixture
def registered() -> Iterator[Callable[..., Callable[[Any], Loss]]]:
    """`losses.register`, undone at the end."""
    before = dict(registry)
    yield losses.register
    for name in set(registry) - set(before):
        del registry[name]


def test_a_new_loss_is_held_to_all_of_it(registered: Callable[..., Any]) -> None:
    @registered("overflows", needs={"ref"})
    def overflows(p: Any) -> torch.Tensor:
        return p.margin.exp()

    @registered("leaks", needs={"ref"}, shift_invariant=True)
    def leaks(p: Any) -> torch.Tensor:
        return p.margin - p.chosen.mean()

    @registered("wrong_gradient")
    def wrong_gradient(p: Any) -> torch.Tensor:
        return (p.chosen - p.rejected) ** 2 + (p.chosen.data**3)

    with pytest.raises(AssertionError):
        check_finite(losses.get("overflows"), {}, torch.float32)
    for check in (check_independent, check_shift):
        with pytest.raises(AssertionError):
            check(losses.get("leaks"), {})
    with pytest.raises(AssertionError):
        check_gradient(losses.get("wrong_gradient"), {})
