"""Registration of Python functions as torch ops.

Not ``torch.library.custom_op``: its first call imports ``torch._dynamo``, which takes over a second
and, where a process group exists by then, keeps the group alive past ``destroy_process_group``, so
that its threads race the interpreter's end and may abort the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def op(name: str) -> Callable[[F], Callable[..., Any]]:
    """Decorator: the function becomes the op ``fastpref::name`` of every device, called alike.

    The function is annotated so that a schema can be inferred, changes no argument, and returns
    tensors that share no memory with one.
    """

    def register(function: F) -> Callable[..., Any]:
        qualified = f"fastpref::{name}"
        torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(qualified, "default", function)
        registered: Callable[..., Any] = getattr(torch.ops.fastpref, name).default
        return registered

    return register


def fake(registered: Any) -> Callable[[F], F]:
    """Decorator: the function gives the shapes and dtypes of what ``registered`` returns."""

    def register(function: F) -> F:
        torch.library.register_fake(registered.name(), function)
        return function

    return register


def differentiable(
    registered: Any, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Give ``registered`` a gradient, as ``torch.library.register_autograd`` does."""
    torch.library.register_autograd(registered.name(), backward, setup_context=setup_context)
