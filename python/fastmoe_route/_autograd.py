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
from torch._C._functorch import unwrap_if_dead

from fastmoe_route._arguments import fail

_library = torch.library.Library("fastmoe_route", "IMPL")


def direct(operator: Any) -> Callable[..., Any]:
    """The operator without the Python frame that torch puts around it: 0.3 us less a call.

    TorchDynamo cannot trace it: where `is_dynamo_compiling()`, call the operator itself.
    """
    return operator._op  # type: ignore[no-any-return]


def register_autograd(
    name: str,
    backward: Callable[..., tuple[Tensor | None, ...]],
    *,
    setup_context: Callable[..., None],
    num_differentiable: int | None = None,
    once: bool = True,
    bare: str | None = None,
) -> Callable[..., Any]:
    """Makes the operator `name` differentiable.

    Args:
        name: of an operator in `torch.ops.fastmoe_route`, without overloads.
        backward: `backward(ctx, *grads)` returns a gradient, or None, for every argument; it gets
            None for an output that nothing asks the gradient of.
        setup_context: `setup_context(ctx, inputs, output)` keeps what `backward` needs; `inputs`
            are all arguments, defaults included, `output` all outputs.
        num_differentiable: the outputs from this one on are constants: they travel beside the
            graph, and `backward` gets no gradients for them. None if there are none.
        once: the gradients have no gradient of their own: whoever asks for one gets an error, not
            an answer without this operator's part. False where `backward` itself is differentiable.
        bare: an operator with the arguments and results of `name` that has no autograd: a forward
            pass by it saves a microsecond of guards.

    Returns:
        The operator for callers that know that a gradient is needed: the same graph, without the
        dispatcher's way back to Python, which took 13 of the 25 us of `gate` for one token.
    """
    operator = _operator(name)

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    run = below_autograd if bare is None else direct(_operator(bare))
    record = _recorder(name, operator, run, backward, setup_context, num_differentiable, once)

    def autograd(*args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            rule, got = "be taken by torch.autograd", "a transform of torch.func"
            fail(NotImplementedError, name, "derivatives", rule, got)
        return record(*args)

    # mypy: torch.library is untyped there.
    _library.impl(name, autograd, "Autograd")
    return _unless_traced(record, operator)


def differentiable(
    name: str,
    bare: str,
    backward: Callable[..., tuple[Tensor | None, ...]],
    *,
    setup_context: Callable[..., None],
    num_differentiable: int,
    traced: Callable[..., Any],
) -> Callable[..., Any]:
    """What `register_autograd` returns, by an operator that has no autograd: 3 of 50 us quicker.

    Args:
        name: what messages call it.
        bare: of the operator, which need not give all outputs of the differentiable one.
        backward, setup_context, num_differentiable: as in `register_autograd`.
        traced: the same by the differentiable operator, for calls that are traced.
    """
    operator = _operator(bare)
    run = direct(operator)
    record = _recorder(name, operator, run, backward, setup_context, num_differentiable, True)
    return _unless_traced(record, traced)


def _operator(name: str) -> Any:
    return getattr(torch.ops.fastmoe_route, name).default


def _recorder(
    name: str,
    operator: Any,
    run: Callable[..., Any],
    gradient: Callable[..., tuple[Tensor | None, ...]],
    setup_context: Callable[..., None],
    num_differentiable: int | None,
    once: bool,
) -> Callable[..., Any]:
    """Calls the operator by `run` and records `gradient` in the graph of autograd."""
    # The dispatcher leaves out trailing arguments that equal their defaults.
    defaults = tuple(argument.default_value for argument in operator._schema.arguments)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            given, constants = args[:-1], args[-1]
            ctx.set_materialize_grads(False)
            output = run(*given)
            setup_context(ctx, given + defaults[len(given) :], output)
            if num_differentiable is None:
                return output
            constants += output[num_differentiable:]
            return output[:num_differentiable]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if once and torch.is_grad_enabled():  # create_graph=True
                kept = _Kept(ctx)
                with torch.no_grad():
                    gradients = gradient(kept, *grads)
                gradients = guarded(name, gradients, (*kept.saved_tensors, *grads))
            else:
                gradients = gradient(ctx, *grads)
            return *gradients, None  # of forward's list of constants

    Function.__name__ = Function.__qualname__ = f"{name}_autograd"
    # What the engine calls of the node. torch's own finds out in every call that it is `backward`,
    # which takes 1 us of 33.
    if hasattr(Function, "_backward_cls"):
        Function._backward_cls.apply = Function.backward  # type: ignore[attr-defined]
    apply = super(torch.autograd.Function, Function).apply  # type: ignore[misc]

    def record(*args: Any) -> Any:
        constants: list[Tensor] = []
        # What Function.apply does where no transform of torch.func is active, in 2 us less.
        output = apply(
            *[unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args], constants
        )
        return output if num_differentiable is None else (*output, *constants)

    return record


def _unless_traced(record: Callable[..., Any], traced: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return traced(*args)
        return record(*args)

    return call


class _Kept:
    """A context whose saved tensors may be read twice, which checkpointing does not allow."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def guarded(
    name: str, gradients: tuple[Tensor | None, ...], sources: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients that raise an error when they are differentiated again.

    The error stands in the graph between them and their `sources`: a derivative by anything that
    the sources come from meets it, even where the graph reaches that on another way as well.
    """
    rule = "be differentiated once, got a request for a second derivative"
    message = f"{name}: gradients must {rule}".encode()
    constants = [
        gradient.detach().requires_grad_() for gradient in gradients if gradient is not None
    ]
    behind = [source for source in sources if source is not None and source.requires_grad]
    guard = torch._C._functions.DelayedError(message, len(constants) + len(behind))
    found = guard(*constants, *behind)
    each = iter((found,) if isinstance(found, Tensor) else found)  # one comes without a tuple
    return tuple(None if gradient is None else next(each) for gradient in gradients)
