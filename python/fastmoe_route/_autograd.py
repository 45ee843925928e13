"""Autograd of the operators, at the cost of a plain `torch.autograd.Function`.

`torch.library.register_autograd` gives the same behaviour, but before every call it completes the
arguments in a time that grows with the square of their number: 117 of the 142 us that `gate`, with
22 arguments, took for one token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmoe_route._arguments import fail

_library = torch.library.Library("fastmoe_route", "IMPL")


def register_autograd(
    name: str,
    backward: Callable[..., Any],
    *,
    setup_context: Callable[..., None],
    once: bool = True,
) -> Callable[..., Any]:
    """Makes the operator `name` differentiable.

    Args:
        name: of an operator in `torch.ops.fastmoe_route`, without overloads.
        backward: `backward(ctx, *grads)` returns a gradient, or None, for every argument.
        setup_context: `setup_context(ctx, inputs, output)` keeps what `backward` needs; `inputs`
            are all arguments, defaults included.
        once: the gradients have no gradient of their own: whoever asks for one gets an error, not
            an answer without this operator's part. False where `backward` itself is differentiable.

    Returns:
        The operator for callers that know that a gradient is needed: the same graph, without the
        dispatcher's way back to Python, which took 13 of the 25 us of `gate` for one token.
    """
    operator = getattr(torch.ops.fastmoe_route, name).default
    function = _function(name, operator, backward, setup_context, once)

    def autograd(*args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            rule, got = "be taken by torch.autograd", "a transform of torch.func"
            fail(NotImplementedError, name, "derivatives", rule, got)
        return function.apply(*args)

    # mypy: torch.library is untyped there.
    _library.impl(name, autograd, "Autograd")
    return _call(function, operator)


def differentiable(
    name: str, bare: str, backward: Callable[..., Any], *, setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """The differentiable operator `name` for callers who want only what the operator `bare` gives.

    Args:
        name: of an operator that `register_autograd` made differentiable.
        bare: of one with the same first arguments and fewer outputs; calls that are traced give the
            outputs of `name`.
        backward: as in `register_autograd`; so is `setup_context`, which gets what `bare` takes and
            gives.
    """
    operator = getattr(torch.ops.fastmoe_route, bare).default
    function = _function(name, operator, backward, setup_context, True)
    return _call(function, getattr(torch.ops.fastmoe_route, name).default)


def _function(
    name: str,
    operator: Any,
    gradient: Callable[..., Any],
    setup_context: Callable[..., None],
    once: bool,
) -> Any:
    # The dispatcher leaves out trailing arguments that equal their defaults.
    defaults = tuple(argument.default_value for argument in operator._schema.arguments)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*args)
            setup_context(ctx, args + defaults[len(args) :], output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if once and torch.is_grad_enabled():  # create_graph=True
                kept = _Kept(ctx)
                with torch.no_grad():
                    gradients = gradient(kept, *grads)
                return _constants(name, gradients, (*kept.saved_tensors, *grads))
            return gradient(ctx, *grads)

    Function.__name__ = Function.__qualname__ = f"{name}_autograd"
    return Function


def _call(function: Any, traced: Any) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return traced(*args)
        return function.apply(*args)

    return call


class _Kept:
    """A context whose saved tensors may be read twice, which checkpointing does not allow."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _constants(
    name: str, gradients: Any, sources: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients that raise an error when they are differentiated again.

    The error stands in the graph between them and their `sources`: a derivative by anything that
    the sources come from meets it, even where the graph reaches that on another way as well.
    """
    if isinstance(gradients, Tensor):
        gradients = (gradients,)
    rule = "be differentiated once, got a request for a second derivative"
    message = f"{name}: gradients must {rule}".encode()
    constants = [
        gradient.detach().requires_grad_() for gradient in gradients if gradient is not None
    ]
    behind = [source for source in sources if source is not None and source.requires_grad]
    guard = torch._C._functions.DelayedError(message, len(constants) + len(behind))
    guarded = iter(guard(*constants, *behind))
    return tuple(None if gradient is None else next(guarded) for gradient in gradients)
