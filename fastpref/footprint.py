"""The memory of a training step, counted tensor by tensor: the model's own code runs on fake
tensors, which have shapes and no numbers.

So what activations take is no formula for each kind of layer: whatever the forward saves, a
checkpointed layer computes again, or the backward needs for a moment is there, and with it every
architecture, adapter, dtype and optimiser. Nothing is loaded and nothing is computed.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpref import registered
from fastpref.data.masks import dense_mask
from fastpref.heads import assume_no_transform
from fastpref.heap import Malloc
from fastpref.linear import Saved
from fastpref.policy import response_logps
from fastpref.reference_policy import Reference

ACTIVATIONS, GRADIENTS, HEAD = "activations", "gradients", "head"
MASK, OPTIMISER, HOLES = "attention mask", "optimiser", "malloc's holes"

_aten = torch.ops.aten
_FORWARD, _BACKWARD = registered.linear_logprobs, registered.linear_logprobs_backward
# The outputs that a CPU keeps for reuse once they are made (fastpref/scratch.py): kept E, behind
# log-probs and statistics, and the gradient of the head's weight.
_LENT = {(_FORWARD, 2 + Saved._fields.index("kept")), (_BACKWARD, 1)}


class Layout(NamedTuple):
    """The shape of a micro-batch."""

    rows: int
    tokens: int
    """Of a row, padding included."""
    responses: int
    """Response tokens that are scored."""

    @property
    def mask_shape(self) -> tuple[int, int, int, int]:
        """Of the attention mask."""
        return (self.rows, 1, self.tokens, self.tokens)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors hold together; what they share counts once."""
    return sum({_key(x): x.untyped_storage().nbytes() for x in tensors}.values())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; tied ones count once."""
    return storage_bytes([*model.parameters(), *model.buffers()])


@contextmanager
def faked(*models: nn.Module) -> Iterator[None]:
    """Turn models on the meta device into ones of fake tensors on a CPU, and enter their mode.

    On the meta device the model's code would not run as it does: attention takes another path, and
    autocast none.
    """
    # allow_non_fake_inputs: what model code makes of Python numbers is no fake tensor.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        modules = [module for model in models for module in model.modules()]
        held = [own for module in modules for own in (module._parameters, module._buffers)]
        fakes: dict[int, Any] = {}
        for x in (x for own in held for x in own.values() if x is not None):
            fake = FakeTensor(mode, x.detach(), torch.device("cpu"))
            is_weight = isinstance(x, nn.Parameter)
            fakes.setdefault(id(x), nn.Parameter(fake, x.requires_grad) if is_weight else fake)
        for own in held:
            own.update({k: fakes[id(x)] for k, x in own.items() if x is not None})
        yield


def _key(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


@dataclass(eq=False)
class _Block:
    """Memory that is there for a while."""

    part: str
    size: int
    """Bytes."""
    lent: bool
    """It comes from what :mod:`fastpref.scratch` keeps on a CPU."""
    address: int | None = None
    holders: int = 0
    """Storages in it: more than one where a sum took the place of its operand."""


class _Event(NamedTuple):
    """Memory appears or goes."""

    block: _Block
    size: int
    """Bytes; negative when it goes."""
    held: int
    """What malloc holds then, bytes; 0 if it is not asked."""


def _peak(events: Iterable[_Event]) -> Counter[str]:
    """Bytes by part when blocks take most; what malloc holds at its own most beyond that, its
    holes, is one."""
    live, most, held, found = Counter[str](), -1, 0, Counter[str]()
    for event in events:
        live[event.block.part] += event.size
        held = max(held, event.held)
        if (now := live.total()) > most:
            most, found = now, live.copy()
    found[HOLES] = max(held - most, 0)
    return found


def _one(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes when the memory of each tensor appears and when it goes.

    Args:
        known: Tensors that are there before, and do not count.
        mask_shape: What a mask is told by.
        mask_part: What a mask belongs to; "": to nothing that is counted.
        malloc: Blocks come from it, but for those of :mod:`fastpref.scratch`. None: from an
            allocator that gives every block to whoever asks next.
    """

    def __init__(
        self,
        known: Iterable[Tensor],
        mask_shape: tuple[int, ...],
        mask_part: str,
        malloc: Malloc | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mask_shape, self.mask_part = mask_shape, mask_part
        self.part = ACTIVATIONS
        """What a tensor belongs to unless it is known better."""
        self.in_backward = False
        self.events: list[_Event] = []
        self._malloc = malloc
        self._holds: dict[int, _Block | None] = dict.fromkeys(map(_key, known))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _aten._local_scalar_dense.default:
            # Nothing has a value. 1 is harmless where one is read: all of a mask is true, an
            # optimiser counts its first step.
            return _one(args[0].dtype)
        out = func(*args, **(kwargs or {}))
        # Gradients that meet are added in place by the engine, but for those of fake tensors.
        meets = func is _aten.add.Tensor and self.in_backward and not torch.is_grad_enabled()
        for index, x in enumerate(tree_leaves(out)):
            if not isinstance(x, Tensor) or _key(x) in self._holds:
                continue
            block = self._holds.get(_key(args[0])) if meets else None
            if block is None:
                size = x.untyped_storage().nbytes()
                lent = self._malloc is not None and (func, index) in _LENT
                block = _Block(self._part_of(func, index, x), size, lent)
                self._appear(block)
            self._hold(x, block)
        return out

    def _part_of(self, func: Any, index: int, x: Tensor) -> str:
        if (func is _BACKWARD and index) or func is _aten.embedding_dense_backward.default:
            return GRADIENTS
        if func in (_FORWARD, _BACKWARD):
            return HEAD
        return self.mask_part if tuple(x.shape) == self.mask_shape else self.part

    def _hold(self, x: Tensor, block: _Block) -> None:
        key = _key(x)
        self._holds[key] = block
        block.holders += 1

        def release() -> None:
            del self._holds[key]
            block.holders -= 1
            if not block.holders:
                self._go(block)

        weakref.finalize(x.untyped_storage(), release).atexit = False

    def assign(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Say what tensors that are there now belong to."""
        for x in tensors:
            block = self._holds.get(_key(x))
            if block is not None:
                block.part = part

    def _appear(self, block: _Block) -> None:
        held = 0
        if self._malloc and block.size and block.part and not block.lent:
            block.address = self._malloc.allocate(block.size)
            held = self._malloc.held
        self.events.append(_Event(block, block.size, held))

    def _go(self, block: _Block) -> None:
        if self._malloc and block.address is not None:
            self._malloc.free(block.address)
        self.events.append(_Event(block, -block.size, 0))

    def peak(self) -> Counter[str]:
        """Bytes by part at the moment when they are most.

        The slabs of :mod:`fastpref.scratch`, those for E and those for gradients, keep what they
        have had, so that each counts at its own most.
        """
        pools: dict[str, list[_Event]] = {}
        for event in self.events:
            if event.block.part:
                pool = event.block.part if event.block.lent else ""
                pools.setdefault(pool, []).append(event)
        found = Counter[str]()
        for events in pools.values():
            found += _peak(events)
        return found


def count_step(
    model: nn.Module,
    layout: Layout,
    *,
    head_options: dict[str, Any],
    precision: torch.dtype | None,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    micro_batches: int,
    on_cpu: bool,
    reference: Reference | None = None,
    dense: bool = True,
) -> Counter[str]:
    """Bytes by part when an optimiser step holds most, the weights aside.

    Args:
        model: Of fake tensors, as it is trained: adapters, checkpointing, which weights train. Call
            this under the model's ``FakeTensorMode``.
        layout: Of a micro-batch.
        head_options: ``backend`` and ``memory_budget`` of the head.
        precision: Of autocast; None: without.
        make_optimizer: For the weights that train.
        micro_batches: Of a step. They are read together, and one of the next step ahead.
        on_cpu: Memory comes from malloc, else from a caching allocator.
        reference: Scores each micro-batch first, its models of fake tensors too.
        dense: The attention mask is a tensor.

    Returns:
        ``gradients``, ``optimiser``, ``activations``, ``attention mask``, ``head``, and on a CPU
        ``malloc's holes``. The scratch of a call of the head, which is no tensor of the step, is
        not in it.
    """
    rows, tokens, responses = layout
    ids = torch.zeros((rows, tokens), dtype=torch.int64)
    targets = torch.zeros(responses, dtype=torch.int64)
    batch: dict[str, Any] = {"input_ids": ids, "position_ids": ids}
    batch |= {"response_rows": targets, "response_targets": targets}
    models = (model, *(reference.models if reference else ()))
    for each in models:
        assume_no_transform(each)
    known = [ids, targets, *(x for m in models for x in (*m.parameters(), *m.buffers()))]
    weights = [p for p in model.parameters() if p.requires_grad]

    def make_mask() -> Tensor:
        # A collator makes it, on a CPU.
        return dense_mask(ids, ids) if on_cpu else torch.ones(layout.mask_shape, dtype=torch.bool)

    model.train()
    optimizer: torch.optim.Optimizer | None = None
    malloc = Malloc() if on_cpu and sys.platform == "linux" else None
    ledger = _Ledger(known, layout.mask_shape, MASK if dense else "", malloc)
    with ledger:
        ahead = make_mask()
        for _ in range(2):  # the second step finds the optimiser's state, and a heap with holes
            ledger.part = ACTIVATIONS
            masks = [ahead, *(make_mask() for _ in range(micro_batches))]
            ahead = masks.pop()
            # A third micro-batch finds what the second does.
            for mask in masks[:2]:
                batch["attention_mask"] = mask
                with torch.autocast("cpu", precision) if precision else nullcontext():
                    scored = reference.score(model, batch) if reference else None
                    found = response_logps(model, batch, return_stats=True, **head_options)
                loss = found.logps.sum()
                del scored, found
                ledger.in_backward = True
                loss.backward()  # type: ignore[no-untyped-call]
                ledger.in_backward = False
                del loss
            ledger.assign(GRADIENTS, [p.grad for p in weights if p.grad is not None])
            ledger.part = OPTIMISER
            optimizer = optimizer or make_optimizer(model)
            optimizer.step()
            for weight in weights:
                weight.grad = None
            del mask, masks, batch["attention_mask"]
        return ledger.peak()
