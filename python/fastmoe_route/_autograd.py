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
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import unwrap_if_dead
from torch.compiler import is_compiling

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
    one_input: bool = False,
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
        one_input: only the first argument has a gradient, which saves 0.5 us a call.

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
        if _are_functorch_transforms_active():
            rule, got = "be taken by torch.autograd", "a transform of torch.func"
            fail(NotImplementedError, name, "derivatives", rule, got)
        return record(*_unwrapped(args))

    # mypy: torch.library is untyped there.
    _library.impl(name, autograd, "Autograd")
    return _unless_traced(record, operator, one_input)


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
        bare: of the operator, which need not give all outputs of the differentiable one. Only its
            first argument has a gradient.
        backward, setup_context, num_differentiable: as in `register_autograd`.
        traced: the same by the differentiable operator, for calls that are traced.
    """
    operator = _operator(bare)
    run = direct(operator)
    record = _recorder(name, operator, run, backward, setup_context, num_differentiable, True)
    return _unless_traced(record, traced, one_input=True)


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
    backward = _differentiated_once(name, gradient) if once else gradient

    def forward(ctx: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        output = run(*args)
        setup_context(ctx, args + defaults[len(args) :], output)
        return output

    if num_differentiable is None:
        return _apply_of(name, forward, backward)

    # The list of constants comes last: ctx.needs_input_grad counts from the operator's first.
    def forward_beside(ctx: Any, *args: Any) -> Any:
        output = forward(ctx, *args[:-1])
        args[-1].extend(output[num_differentiable:])
        return output[:num_differentiable]

    def backward_beside(ctx: Any, *grads: Tensor | None) -> Any:
        return *backward(ctx, *grads), None

    apply = _apply_of(name, forward_beside, backward_beside)

    def record(*args: Any) -> Any:
        constants: list[Tensor] = []
        return *apply(*args, constants), *constants

    return record


def _apply_of(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """`apply` of an autograd function, for where no transform of torch.func is active."""
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"{name}_autograd", (torch.autograd.Function,), methods)
    # What the engine calls of the node. torch's own finds out in every call that it is `backward`,
    # which takes 1 us of 33.
    if hasattr(function, "_backward_cls"):
        function._backward_cls.apply = backward
    # Without Function.apply, which unwraps arguments and then calls this: 2 us less.
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def _unless_traced(
    record: Callable[..., Any], traced: Callable[..., Any], one_input: bool
) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if is_compiling() or _are_functorch_transforms_active():
            return traced(*args)
        return record(*_unwrapped(args))

    def call_of_one(x: Tensor, *others: Any) -> Any:
        if is_compiling() or _are_functorch_transforms_active():
            return traced(x, *others)
        return record(unwrap_if_dead(x), *others)

    return call_of_one if one_input else call


def _unwrapped(args: tuple[Any, ...]) -> list[Any]:
    """Arguments without the wrappers that a transform of torch.func left behind when it ended.

    Operators see through those, but autograd needs what is in them to find whom to hand a gradient.
    """
    return [unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args]


def _differentiated_once(name: str, gradient: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass `gradient`, whose results raise an error when differentiated again."""

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return gradient(ctx, *grads)
        kept = _Kept(ctx)  # create_graph=True
        with torch.no_grad():
            gradients = gradient(kept, *grads)
        return guarded(name, gradients, (*kept.saved_tensors, *grads))

    return backward


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
