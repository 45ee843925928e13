"""`ExpertParallel`: an MoE layer whose experts are spread over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmoe_route._arguments import (
    check_factor,
    check_int,
    check_shape,
    check_tensor,
    describe,
    fail,
)
from fastmoe_route.distributed.exchange import named
from fastmoe_route.distributed.placement import Placement, neighbours
from fastmoe_route.distributed.sharding import Shards, Volume, run_sharded
from fastmoe_route.nn import Experts, MoE
from fastmoe_route.results import DispatchPlan, Routing


class ExpertParallel(nn.Module):
    """Spreads the experts of a layer over ranks; router and shared experts stay on every rank.

    Each rank brings its own tokens, as many as it likes and possibly none. Tokens travel once to
    each rank that holds any of their experts, are summed up there, and one row comes back
    (`run_sharded`). Shared experts are computed while tokens are on their way. The result is that
    of the layer on one machine up to the rounding of one partial sum per rank, and has the same
    bits on every run.

    Forward and backward are collective: every rank calls both, in the same order.

    Args:
        layer: an `fr.nn.MoE` with all experts, the same on every rank (seed it, or load it). Its
            router and shared experts are used as they are; its experts are cut down, in place, to
            copies of this rank's share.
        process_group: None for the default group. NCCL and Gloo work.
        placement: the rank of each expert, `[E]`, the same number on each rank; from
            `plan_placement`, or any sequence. None gives each rank a run of neighbours.
        rank_capacity_factor: a rank sends at most its even share of rows times this to each rank,
            lower tokens first; None drops nothing.

    Attributes:
        experts: the `Experts` of this rank.
        expert_ids: the global ids of its experts, in order.
        volume: the `Volume` of the last forward call, or None.

    Raises:
        RuntimeError: there is no process group.
        ValueError: experts that do not divide among the ranks, a placement that does not fit, ranks
            that differ in sizes, dtypes, activation, router or placement, or a group without this
            process.

    Run under `torchrun`:

        from fastmoe_route.distributed import ExpertParallel  # before there is a process group

        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        layer = ExpertParallel(fr.nn.MoE(512, 1024, num_experts=64, top_k=8))
        loss = criterion(layer(x), target) + fr.nn.aux_loss(layer)
        loss.backward()
        layer.reduce_gradients()
    """

    volume: Volume | None
    rank_of_expert: Tensor
    local_id: Tensor
    layer: MoE

    def __init__(
        self,
        layer: MoE,
        process_group: Any = None,
        *,
        placement: Placement | Sequence[int] | Tensor | None = None,
        rank_capacity_factor: float | None = None,
    ) -> None:
        super().__init__()
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "ExpertParallel: a process group must be there; call "
                "torch.distributed.init_process_group first, or run under torchrun"
            )
        if not isinstance(layer, MoE):
            fail(TypeError, "ExpertParallel", "layer", "be a fastmoe_route.nn.MoE", type(layer))
        if "experts" in layer.router.method.needs:
            rule = "have a router that needs no experts, which are on other ranks"
            fail(ValueError, "ExpertParallel", "layer", rule, layer.router.name)
        check_factor("ExpertParallel", "rank_capacity_factor", rank_capacity_factor)
        self.group = process_group
        self.rank_capacity_factor = rank_capacity_factor
        self.rank, self.num_ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
        if self.rank < 0:
            rule, got = "have this process as a member", f"rank {dist.get_rank()} outside of it"
            fail(ValueError, "ExpertParallel", "process_group", rule, got)
        self.num_experts = layer.experts.num_experts
        ranks = _check_placement(placement, self.num_experts, self.num_ranks)
        self._check_alike(layer, ranks)
        self.expert_ids = [e for e, rank in enumerate(ranks) if rank == self.rank]
        self._ranks, device = ranks, layer.experts.w_up.device
        for name in ("rank_of_expert", "local_id"):
            table = torch.empty(self.num_experts, dtype=torch.int32, device=device)
            self.register_buffer(name, table, persistent=False)
        self.reset_parameters()
        self.layer = layer
        layer.experts = _share(layer.experts, self.expert_ids)
        self.volume = None

    def reset_parameters(self) -> None:
        """Sets the tables of the placement; nothing is drawn."""
        local_id = [self._ranks[:e].count(rank) for e, rank in enumerate(self._ranks)]
        self.rank_of_expert.copy_(torch.tensor(self._ranks))
        self.local_id.copy_(torch.tensor(local_id))

    @property
    def experts(self) -> Experts:
        """The experts of this rank."""
        return self.layer.experts

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Routes this rank's tokens through the experts of all ranks.

        Args:
            x: float `[..., H]`, this rank's tokens.
            context: what the router's `forward` takes beside `x`, for this rank's tokens.

        Returns:
            `[..., H]`, differentiable in `x` and all parameters; the gradient of an expert holds
            what all ranks sent it.

        Raises:
            ExchangeError: a rank died or did not arrive within the timeout of the group.
            ValueError: tokens whose dtypes differ between ranks; on each of them.
        """
        layer = self.layer
        check_tensor("ExpertParallel", "x", x)
        hidden = layer.experts.w_down.shape[1]
        if x.dim() == 0 or x.shape[-1] != hidden:
            check_shape("ExpertParallel", "x", x, (-1,) * max(x.dim() - 1, 0) + (hidden,))
        flat = x.reshape(-1, hidden)
        routed = layer.router(flat, **layer.flat_context(x, context))
        remote = _Remote(self)
        y = layer.router.mix(flat, routed, remote)  # type: ignore[arg-type]
        if layer.shared is not None:
            y = y + (layer.apply_shared(flat) if remote.shared is None else remote.shared)
        if self.training:
            layer.record(routed)
        return y.view(*x.shape[:-1], hidden)

    def reduce_gradients(self) -> None:
        """Makes gradients those of the mean loss over ranks; call it between backward and step.

        Gradients of the router and of shared experts, of which every rank has a copy, are averaged;
        those of experts, which already hold every rank's part, are divided by the number of ranks.
        What FSDP shards it has averaged itself; tell it to leave out the experts, by
        `ignored_params`.
        """
        found = (p.grad for p in self.replicated_parameters())
        copies = [g for g in found if g is not None and not hasattr(g, "placements")]
        if copies:
            flat = torch.cat([grad.flatten().float() for grad in copies])
            with named("gradients of replicated parameters", self.group):
                dist.all_reduce(flat, group=self.group)
            flat /= self.num_ranks
            for grad, part in zip(copies, flat.split([g.numel() for g in copies]), strict=True):
                grad.copy_(part.view_as(grad))
        for p in self.experts.parameters():
            if p.grad is not None:
                p.grad /= self.num_ranks

    def replicated_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of which every rank has a copy: all but the experts'."""
        own = {id(p) for p in self.experts.parameters()}
        return (p for p in self.parameters() if id(p) not in own)

    def gather_experts(self) -> dict[str, Tensor]:
        """All experts' weights in global order, named as in `Experts`; every rank calls it."""
        found = {}
        for name, value in self.experts.state_dict().items():
            shares = [torch.empty_like(value) for _ in range(self.num_ranks)]
            with named(f"gathering {name}", self.group):
                dist.all_gather(shares, value.contiguous(), group=self.group)
            stacked = torch.stack(shares)
            found[name] = stacked[self.rank_of_expert.long(), self.local_id.long()]
        return found

    def extra_repr(self) -> str:
        """This rank's part, for `print`."""
        return f"rank={self.rank}, num_ranks={self.num_ranks}, expert_ids={self.expert_ids}"

    def _check_alike(self, layer: MoE, ranks: list[int]) -> None:
        own = {
            **{name: describe(value) for name, value in _tensors(layer)},
            "activation": layer.experts.activation,
            "router": layer.router.name,
            "top_k": layer.router.top_k,
            "placement": ranks,
            "rank_capacity_factor": self.rank_capacity_factor,
        }
        everyone: list[Any] = [None] * self.num_ranks
        with named("comparing layers", self.group):
            dist.all_gather_object(everyone, own, group=self.group)
        for rank, other in enumerate(everyone):
            for key in {**own, **other}:
                value, got = own.get(key), other.get(key)
                if got != value:
                    rule = f"be the same on every rank; {key} is {value} on rank {self.rank}"
                    fail(ValueError, "ExpertParallel", "layer", rule, f"{got} on rank {rank}")


def _tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from layer.named_parameters()
    yield from layer.named_buffers()


class _Remote:
    """Stands for `routers.Experts` where the experts are on other ranks."""

    def __init__(self, parallel: ExpertParallel) -> None:
        self._parallel = parallel
        self.shared: Tensor | None = None

    def __call__(
        self,
        x: Tensor,
        routing: Routing | tuple[Tensor, Tensor],
        plan: DispatchPlan | None = None,
    ) -> Tensor:
        parallel, experts = self._parallel, routing[0]
        layer = parallel.layer
        if plan is not None:
            experts = torch.where(plan.slot_to_row >= 0, experts, -1)
        overlap = None
        if layer.shared is not None and self.shared is None:
            overlap = lambda: layer.apply_shared(x)  # noqa: E731
        result = run_sharded(
            x,
            experts,
            routing[1],
            Shards(parallel.rank_of_expert, parallel.local_id),
            parallel.group,
            lambda rows, ids, weights: layer.experts(rows, (ids, weights)),
            meanwhile=overlap,
            capacity_factor=parallel.rank_capacity_factor,
        )
        if result.meanwhile is not None:
            self.shared = result.meanwhile
        parallel.volume = result.volume
        return result.y

    def __getattr__(self, name: str) -> Any:
        method = self._parallel.layer.router.name
        raise ValueError(
            f"ExpertParallel: router must not look into the experts, which are on other ranks; "
            f"{method} reads experts.{name}: choose another method, or run it without "
            "ExpertParallel"
        )


def _check_placement(
    placement: Placement | Sequence[int] | Tensor | None, num_experts: int, num_ranks: int
) -> list[int]:
    if num_experts % num_ranks != 0:
        rule = f"have a number of experts that {num_ranks} ranks divide; change num_experts, or run"
        got = f"{num_experts} experts"
        near = max(d for d in range(1, num_ranks + 1) if num_experts % d == 0)
        fail(ValueError, "ExpertParallel", "layer", f"{rule} {near} ranks", got)
    share = num_experts // num_ranks
    if placement is None:
        return [*neighbours(num_experts, num_ranks)]
    if isinstance(placement, Placement):
        placement = placement.rank_of_expert
    if isinstance(placement, Tensor):
        placement = placement.tolist()
    if not isinstance(placement, Sequence) or isinstance(placement, str):
        rule = "be a Placement or a sequence of ranks"
        fail(TypeError, "ExpertParallel", "placement", rule, repr(placement))
    ranks = [check_int("ExpertParallel", "placement", rank, -(2**63)) for rank in placement]
    if len(ranks) != num_experts:
        rule = f"name a rank for each of {num_experts} experts"
        fail(ValueError, "ExpertParallel", "placement", rule, f"{len(ranks)} ranks")
    counts = [ranks.count(rank) for rank in range(num_ranks)]
    if counts != [share] * num_ranks:
        rule = f"put {share} experts on each of {num_ranks} ranks"
        fail(
            ValueError,
            "ExpertParallel",
            "placement",
            rule,
            f"{counts} and ids {sorted(set(ranks))}",
        )
    return ranks


def _share(experts: Experts, ids: list[int]) -> Experts:
    """The experts `ids` alone, as copies that do not hold on to the others."""
    width = experts.w_down.shape[2]
    share = Experts(
        experts.w_down.shape[1],
        width,
        len(ids),
        activation=experts.activation,
        bias=experts.bias_up is not None,
        init_std=experts.init_std,
        device="meta",
        dtype=experts.w_up.dtype,
    )
    for name, value in experts.named_parameters():
        own = value.detach()[ids].clone()
        setattr(share, name, nn.Parameter(own, requires_grad=value.requires_grad))
    return share.train(experts.training)
