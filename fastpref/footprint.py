"""The memory of a training step, counted tensor by tensor: the model's own code runs on fake
tensors, which have shapes and no numbers.

So what activations take is no formula for each kind of layer: whatever the forward saves, a
checkpointed layer computes again, or the backward needs for a moment is there, and with it every
architecture, adapter, dtype and optimiser. Nothing is loaded and nothing is computed.
"""

from __future__ import annotations

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
from fastpref.data.masks import to_attention_mask
from fastpref.heads import causal_lm, output_embedding, read_head
from fastpref.linear import Saved
from fastpref.ops import linear_logprobs

MAPPED = 32 << 20
"""Bytes from which on glibc's malloc gives freed blocks back to the system, once it has run for a
while; smaller ones stay in its heap."""
ACTIVATIONS, GRADIENTS, HEAD = "activations", "gradients", "head"
MASK, OPTIMISER = "attention mask", "optimiser"

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
def faked(model: nn.Module) -> Iterator[None]:
    """Turn a model on the meta device into one of fake tensors on a CPU, and enter their mode.

    On the meta device the model's code would not run as it does: attention takes another path, and
    autocast none.
    """
    # allow_non_fake_inputs: what model code makes of Python numbers is no fake tensor.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}
        fakes: dict[int, Any] = {}
        for key, x in tensors.items():
            fake = FakeTensor(mode, x.detach(), torch.device("cpu"))
            is_weight = isinstance(x, nn.Parameter)
            fakes[key] = nn.Parameter(fake, x.requires_grad) if is_weight else fake
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                held.update({k: fakes[id(x)] for k, x in held.items() if x is not None})
        yield


def _key(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


@dataclass
class _Block:
    """Memory that is there for a while."""

    part: str
    size: int
    """Bytes."""
    lent: bool
    """It comes from what :mod:`fastpref.scratch` keeps on a CPU."""
    holders: int = 0
    """Storages in it: more than one where a sum took the place of its operand."""


def _most(events: list[tuple[_Block, int]]) -> Counter[str]:
    """Bytes by part when there are most of them."""
    live, most, found = Counter[str](), -1, Counter[str]()
    for block, size in events:
        live[block.part] += size
        if live.total() > most:
            most, found = live.total(), live.copy()
    return found


def _one(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes when the memory of each tensor appears and when it goes.

    Args:
        known: Tensors that are there before, and do not count.
        mask_shape: What a mask is told by.
    """

    def __init__(self, known: Iterable[Tensor], mask_shape: tuple[int, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mask_shape = mask_shape
        self.part = ACTIVATIONS
        """What a tensor belongs to unless it is known better."""
        self.in_backward = False
        self.events: list[tuple[_Block, int]] = []
        """A block, and its bytes: negative when it goes. In order."""
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
                block = _Block(self._part_of(func, index, x), size, (func, index) in _LENT)
                self.events.append((block, size))
            self._hold(x, block)
        return out

    def _part_of(self, func: Any, index: int, x: Tensor) -> str:
        if (func is _BACKWARD and index) or func is _aten.embedding_dense_backward.default:
            return GRADIENTS
        if func in (_FORWARD, _BACKWARD):
            return HEAD
        return MASK if tuple(x.shape) == self.mask_shape else self.part

    def _hold(self, x: Tensor, block: _Block) -> None:
        key = _key(x)
        self._holds[key] = block
        block.holders += 1

        def release() -> None:
            del self._holds[key]
            block.holders -= 1
            if not block.holders:
                self.events.append((block, -block.size))

        weakref.finalize(x.untyped_storage(), release).atexit = False

    def assign(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Say what tensors that are there now belong to; "": to nothing that is counted."""
        for x in tensors:
            block = self._holds.get(_key(x))
            if block is not None:
                block.part = part

    def peak(self, on_cpu: bool) -> Counter[str]:
        """Bytes by part at the moment when they are most.

        A GPU's allocator gives every block to whoever asks next. On a CPU there are pools that
        keep what they have had: the slabs of :mod:`fastpref.scratch`, those for E and those for
        gradients, and malloc's heap, which holds the blocks below :data:`MAPPED`; its holes are not
        counted.
        """
        pools: dict[str, list[tuple[_Block, int]]] = {}
        for block, size in self.events:
            if block.part:
                pools.setdefault(self._pool(block) if on_cpu else "", []).append((block, size))
        found = Counter[str]()
        for events in pools.values():
            found += _most(events)
        return found

    @staticmethod
    def _pool(block: _Block) -> str:
        if block.lent:
            return f"slab of {block.part}"
        return "heap" if block.size < MAPPED else "mapped"


def count_step(
    model: nn.Module,
    layout: Layout,
    *,
    head_options: dict[str, Any],
    precision: torch.dtype | None,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    accumulates: bool,
    on_cpu: bool,
) -> Counter[str]:
    """Bytes by part when an optimiser step holds most, the weights aside.

    Args:
        model: Of fake tensors, as it is trained: adapters, checkpointing, which weights train. Call
            this under the model's ``FakeTensorMode``.
        layout: Of a micro-batch.
        head_options: ``backend`` and ``memory_budget`` of the head.
        precision: Of autocast; None: without.
        make_optimizer: For the weights that train.
        accumulates: Several micro-batches make a step: gradients are there in the next forward.
        on_cpu: Memory comes from pools that keep what they have had.

    Returns:
        ``gradients``, ``optimiser``, ``activations``, ``attention mask``, ``head``. The scratch of
        a call of the head, which is no tensor of the step, is not in it.
    """
    inner: Any = causal_lm(model)
    rows, tokens, responses = layout
    ids = torch.zeros((rows, tokens), dtype=torch.int64)
    mask = torch.ones(layout.mask_shape, dtype=torch.bool)
    targets = torch.zeros(responses, dtype=torch.int64)
    known = [*model.parameters(), *model.buffers(), ids, mask, targets]
    implementation = inner.config.get_text_config()._attn_implementation
    weights = [p for p in model.parameters() if p.requires_grad]
    model.train()
    ledger = _Ledger(known, layout.mask_shape)
    with ledger:
        for _ in range(2 if accumulates else 1):
            with torch.autocast("cpu", precision) if precision else nullcontext():
                seen = to_attention_mask(mask, implementation, inner.dtype)
                hidden = inner.base_model(
                    input_ids=ids, position_ids=ids, attention_mask=seen, use_cache=False
                ).last_hidden_state
                hidden = hidden.flatten(0, 1).index_select(0, targets)
                head = read_head(output_embedding(model), hidden)
                logps = linear_logprobs(
                    head.hidden, head.weight, targets, bias=head.bias, **head_options
                )
            assert isinstance(logps, Tensor)
            loss = logps.sum()
            del hidden, head, logps, seen
            ledger.in_backward = True
            loss.backward()  # type: ignore[no-untyped-call]
            ledger.in_backward = False
            del loss
        ledger.assign(GRADIENTS, [p.grad for p in weights if p.grad is not None])
        ledger.part = OPTIMISER
        optimizer = make_optimizer(model)
        optimizer.step()
        state = [x for x in tree_leaves(list(optimizer.state.values())) if isinstance(x, Tensor)]
        ledger.assign("", state)
        found = ledger.peak(on_cpu)
    # From the second step on the optimiser's state is there all the time.
    found[OPTIMISER] += storage_bytes(state)
    for weight in weights:
        weight.grad = None
    return found
