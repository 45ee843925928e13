"""Work of some training steps only, for compiled graphs, which cannot branch on a draw.

Such work is an operator that is told by a tensor whether to run. A step that does not need it pays
for results full of ones, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmoe_route._arguments import autocast_dtype

_library = torch.library.Library("fastmoe_route", "FRAGMENT")

Work = Callable[..., list[Tensor]]


def rare(name: str, arguments: str, work: Work, blank: Work) -> Callable[..., list[Tensor]]:
    """Makes an operator of `work`, differentiable once; its backward pass does the work again.

    Args:
        name: of the operator.
        arguments: the schema of what `work` takes: first a tensor, then whatever it needs.
        work: a function without random numbers, whose results are fresh tensors.
        blank: makes, of the same arguments, tensors of ones with the shapes of those results.

    Returns:
        `call(runs, *arguments)`: the results of `work` where the boolean scalar `runs` is true,
        and ones elsewhere. The host reads `runs`: on a GPU it would wait for it there, and no CUDA
        graph can hold the call.
    """
    schema = f"Tensor runs, ScalarType? autocast, {arguments}) -> Tensor[]"
    _library.define(f"{name}({schema}")
    _library.define(f"{name}_backward(Tensor[] grads, int wanted, {schema}")
    operator = getattr(torch.ops.fastmoe_route, name)
    gradient = getattr(torch.ops.fastmoe_route, f"{name}_backward")

    def run(autocast: torch.dtype | None, given: Any) -> list[Tensor]:
        with torch.autocast(given[0].device.type, autocast, enabled=autocast is not None):
            return work(*given)

    def forward(runs: Tensor, autocast: torch.dtype | None, *given: Any) -> list[Tensor]:
        return run(autocast, given) if runs else blank(*given)

    def backward(
        grads: list[Tensor], wanted: int, runs: Tensor, autocast: torch.dtype | None, *given: Any
    ) -> list[Tensor]:
        places = _places(wanted)
        found = [torch.zeros_like(given[i]) for i in places]
        if runs:
            again = list(given)
            for i in places:
                again[i] = given[i].detach().requires_grad_()
            with torch.enable_grad():
                results = run(autocast, again)
                sources = [again[i] for i in places]
                by = torch.autograd.grad(results, sources, grads, materialize_grads=True)
            for gradient_of, value in zip(found, by, strict=True):
                gradient_of.copy_(value)
        return found

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*(v for v, known in zip(inputs, is_tensor, strict=True) if known))
        ctx.others = [None if known else v for v, known in zip(inputs, is_tensor, strict=True)]
        ctx.is_tensor = is_tensor

    def differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [
            next(tensors) if known else value
            for value, known in zip(ctx.others, ctx.is_tensor, strict=True)
        ]
        wanted = sum(1 << i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed)
        found = iter(gradient(grads, wanted, *inputs))
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)

    _library.impl(name, forward, "CompositeExplicitAutograd")
    _library.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    full_name = f"fastmoe_route::{name}"
    torch.library.register_fake(full_name, lambda runs, autocast, *given: blank(*given))
    torch.library.register_fake(
        f"{full_name}_backward",
        lambda grads, wanted, runs, autocast, *given: [
            torch.empty_like(given[i]) for i in _places(wanted)
        ],
    )
    torch.library.register_autograd(full_name, differentiate, setup_context=setup_context)

    def call(runs: Tensor, *given: Any) -> list[Tensor]:
        return operator(runs, autocast_dtype(given[0]), *given)  # type: ignore[no-any-return]

    return call


def _places(wanted: int) -> list[int]:
    return [i for i in range(wanted.bit_length()) if wanted >> i & 1]
