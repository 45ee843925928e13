"""The expert parallelism of transformers on this package's exchange: a token once to each rank."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastmoe_route.distributed.sharding import Shards, Volume, run_sharded


@functools.cache
def implementation() -> type:
    """The class for `EPImplementationInterface`; needs transformers.

    Beside transformers' own all-to-all, which sends one row per (token, expert) pair, a token goes
    once to each rank that holds any of its experts, and comes back as one weighted sum.
    """
    from transformers.distributed.expert_parallel import EPImplementation

    class FastMoeRouteEP(EPImplementation):  # type: ignore[misc]
        """Tokens to the ranks of their experts by `fastmoe_route.distributed.run_sharded`."""

        volume: Volume | None = None

        def __call__(
            self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
        ) -> Tensor:
            num_tokens = hidden_states.shape[0]
            inputs: tuple[Tensor, ...] = (hidden_states, top_k_index, top_k_weights)
            if self.tp_mesh.size() > 1:
                inputs = _slice(inputs, self.tp_mesh)
            hidden_states, top_k_index, top_k_weights = inputs
            num_local, size = self.num_local_experts, self.ep_mesh.size()
            ids = torch.arange(num_local * size, dtype=torch.int32, device=hidden_states.device)

            def compute(rows: Tensor, local: Tensor, weights: Tensor) -> Tensor:
                return _run(self.experts_forward, num_local, rows, local, weights)

            result = run_sharded(
                hidden_states,
                top_k_index,
                top_k_weights,
                Shards(ids // num_local, ids % num_local),
                self.ep_mesh.get_group(),
                compute,
            )
            self.volume = result.volume
            y = result.y
            return y if self.tp_mesh.size() == 1 else _gather(y, num_tokens, self.tp_mesh)

    return FastMoeRouteEP


def _run(forward: Any, num_local: int, rows: Tensor, local: Tensor, weights: Tensor) -> Tensor:
    """A module's experts on received rows; ids of other ranks become transformers' sentinel."""
    is_here = local >= 0
    index = torch.where(is_here, local, num_local).long()
    weights = weights.masked_fill(~is_here, 0.0)
    if rows.shape[0]:
        y: Tensor = forward(rows, index, weights)
        return y
    # One row of zeros keeps the experts in the graph, so that sharded gradients are reduced on
    # every rank.
    blank = index.new_full((1, local.shape[1]), num_local)
    blank[:, 0] = 0
    y = forward(rows.sum(0, keepdim=True), blank, weights.new_ones(blank.shape))
    return y[:0]


def _slice(tensors: tuple[Tensor, ...], mesh: Any) -> tuple[Tensor, ...]:
    """This rank's rows of tensors that every rank of `mesh` holds; gradients are gathered."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    return tuple(
        DTensor.from_local(t, mesh, [Replicate()], run_check=False)
        .redistribute(mesh, [Shard(0)])
        .to_local()
        for t in tensors
    )


def _gather(y: Tensor, num_tokens: int, mesh: Any) -> Tensor:
    """All rows from the ranks of `mesh`, uneven or empty slices too."""
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((num_tokens, y.shape[1]))
    sliced = DTensor.from_local(
        y.contiguous(), mesh, [Shard(0)], shape=shape, stride=(y.shape[1], 1)
    )
    whole: Tensor = sliced.full_tensor()
    return whole
