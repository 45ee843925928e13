"""Rows of tensors between ranks: uneven all-to-all with autograd, in two halves.

`start` sends and returns at once, `wait` hands out what arrived, and whatever is computed between
the two overlaps with the network. The backward pass has the same shape: the backward of `wait`
starts the exchange of gradients in the other direction, that of `start` waits for it, and autograd
runs between the two the backward of what was computed between the two.

Every exchange has a name. If a rank dies or does not arrive within the timeout of the process
group, the others get an `ExchangeError` with that name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

# This module of torch takes whatever the default group is when it is imported as default argument
# of its functions, and holds it for good. Compilers and optimisers import it on their first call,
# after which `destroy_process_group` ends no thread of Gloo: one that lets go of a tensor while
# Python shuts down aborts the process. Imported before there is a group, it holds none.
if dist.is_available() and not dist.is_initialized():
    import_module("torch.distributed.nn.functional")


class ExchangeError(RuntimeError):
    """An exchange between ranks did not finish; the message names it."""


@contextmanager
def named(name: str, group: Any) -> Iterator[None]:
    """Turns a failure of the process group into an `ExchangeError` that names the exchange."""
    try:
        with record_function(f"fastmoe_route::{name}"):
            yield
    except RuntimeError as error:
        if isinstance(error, ExchangeError):
            raise
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        raise ExchangeError(
            f"ExpertParallel: exchange '{name}' failed on rank {rank} of {size}: a rank died, or "
            f"did not arrive within the timeout of the process group. The backend says: {error}"
        ) from error


@dataclass
class Exchange:
    """One exchange of rows: how many go to and come from each rank, and what is under way.

    Attributes:
        name: what is exchanged, for errors and profiles.
        group: the process group.
        send: rows to each rank, in rank order.
        receive: rows from each rank.
    """

    name: str
    group: Any
    send: list[int]
    receive: list[int]
    _pending: list[Any] = field(default_factory=list)
    _pending_grads: list[Any] = field(default_factory=list)
    _needs_grad: tuple[bool, ...] = ()
    _grads: list[Tensor] = field(default_factory=list)

    def start(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Sends the rows of tensors `[sum(send), ...]`; the results are not filled yet.

        Returns:
            `[sum(receive), ...]` for each, to be passed to `wait` and to nothing else.
        """
        found: tuple[Tensor, ...] = _Start.apply(self, *tensors)
        return found

    def wait(self, *received: Tensor) -> tuple[Tensor, ...]:
        """The rows that `start` has received, in rank order. Differentiable."""
        found: tuple[Tensor, ...] = _Wait.apply(self, *received)
        return found

    def _launch(self, tensors: tuple[Tensor, ...], back: bool) -> list[Tensor]:
        """Starts one all-to-all per tensor, in the forward or backward direction."""
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        pending = self._pending_grads if back else self._pending
        results = []
        with named(self._name(back), self.group):
            for tensor in tensors:
                tensor = tensor.contiguous()
                result = tensor.new_empty((sum(receive), *tensor.shape[1:]))
                work = dist.all_to_all_single(
                    result, tensor, receive, send, group=self.group, async_op=True
                )
                pending.append((work, tensor))  # the sent tensor lives until the work is done
                results.append(result)
        return results

    def _finish(self, back: bool) -> None:
        pending = self._pending_grads if back else self._pending
        with named(self._name(back), self.group):
            for work, _ in pending:
                work.wait()
        pending.clear()

    def _name(self, back: bool) -> str:
        return f"gradients of {self.name}" if back else self.name


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *tensors: Tensor) -> Any:
        ctx.exchange = exchange
        exchange._needs_grad = ctx.needs_input_grad[1:]
        results = exchange._launch(tensors, back=False)
        ctx.mark_non_differentiable(*(t for t in results if not t.is_floating_point()))
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> Any:
        exchange = ctx.exchange
        exchange._finish(back=True)
        grads = iter(exchange._grads)
        return (None, *(next(grads) if need else None for need in exchange._needs_grad))


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *received: Tensor) -> Any:
        ctx.exchange = exchange
        exchange._finish(back=False)
        results = tuple(t.view_as(t) for t in received)
        ctx.mark_non_differentiable(*(t for t in results if not t.is_floating_point()))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # What arrives has other shapes than what was received, so it goes to the backward of
        # `start` by the exchange; what is returned here only keeps the two in order.
        exchange = ctx.exchange
        sent = [g for g, need in zip(grads, exchange._needs_grad, strict=True) if need]
        exchange._grads = exchange._launch(tuple(sent), back=True)
        needed = ctx.needs_input_grad[1:]
        return (None, *(g if need else None for g, need in zip(grads, needed, strict=True)))


def exchange_counts(
    name: str, group: Any, send: Tensor, notes: Sequence[int], *others: Tensor
) -> tuple[list[int], list[int], list[list[int]], list[int]]:
    """Tells every rank how many rows it will get; the only point where the host waits.

    Args:
        name: what is counted, for errors and profiles.
        group: the process group.
        send: int `[W]`, rows to each rank.
        notes: further numbers of this rank for every other, as many on each rank.
        others: integer scalars that are to be read in the same moment.

    Returns:
        Rows to each rank, rows from each rank, every note by rank, and the other numbers.
    """
    send = send.to(torch.int64)
    size = send.shape[0]
    sent = torch.cat([send.view(-1, 1), send.new_tensor([list(notes)]).expand(size, -1)], dim=1)
    received = torch.empty_like(sent)
    with named(name, group):
        dist.all_to_all_single(received, sent, group=group)
        parts = (send, received.t().flatten(), *(o.view(1) for o in others))
        numbers: list[int] = torch.cat(parts).tolist()
    rows = [numbers[start : start + size] for start in range(0, size * (2 + len(notes)), size)]
    return rows[0], rows[1], rows[2:], numbers[size * (2 + len(notes)) :]
