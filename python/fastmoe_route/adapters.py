"""LoRA experts, and published adapters around the product of low-rank pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastmoe_route._arguments import (
    check_dtype,
    check_int,
    check_number,
    check_shape,
    check_tensor,
    describe,
    fail,
)
from fastmoe_route._initial import draw_normal
from fastmoe_route.grouped_mm import one_product
from fastmoe_route.lora_grouped_mm import lora_grouped_mm
from fastmoe_route.methods import register
from fastmoe_route.results import DispatchPlan, Routing


class LoraExperts(NamedTuple):
    """`E` low-rank experts, called like `routers.Experts`: what a router of LoRA modules mixes.

    Attributes:
        lora_a: `[E, H, r]`.
        lora_b: `[E, r, D]`.
        scaling: factor on every output.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float = 1.0

    def __call__(
        self,
        x: Tensor,
        routing: Routing | tuple[Tensor, Tensor],
        plan: DispatchPlan | None = None,
    ) -> Tensor:
        """The weighted sum of every token's experts, `[T, H] -> [T, D]`."""
        return lora_grouped_mm(
            x, self.lora_a, self.lora_b, routing, scaling=self.scaling, plan=plan
        )

    def each(self, x: Tensor) -> Tensor:
        """What every expert makes of every token, `[T, H] -> [T, E, D]`."""
        inner = torch.einsum("th,ehr->ter", x, self.lora_a)
        return torch.einsum("ter,erd->ted", inner, self.lora_b) * self.scaling

    def merged(self, weights: Tensor) -> LoraExperts:
        """`S` experts that are exact weighted sums, `weights [S, E]`, of rank `E r`.

        The factors are concatenated, so that the merged expert is the sum of the weighted experts
        and not the product of averaged factors.
        """
        check_shape("LoraExperts.merged", "weights", weights, (-1, self.lora_a.shape[0]))
        num, hidden, width = weights.shape[0], self.lora_a.shape[1], self.lora_b.shape[2]
        scaled = self.lora_a * weights.to(self.lora_a.dtype)[:, :, None, None]
        a = scaled.permute(0, 2, 1, 3).reshape(num, hidden, -1)
        b = self.lora_b.reshape(1, -1, width).expand(num, -1, -1)
        return LoraExperts(a, b, self.scaling)

    def merged_blockwise(self, weights: Tensor) -> LoraExperts:
        """`S` experts of rank `r` whose factors are averaged in blocks, `weights [S, heads, E]`.

        Head `h` mixes the `h`-th block of the input features of `A` and of the output features of
        `B` (MHR, arXiv:2211.03831).
        """
        experts, _, rank = self.lora_a.shape
        check_shape("LoraExperts.merged_blockwise", "weights", weights, (-1, -1, experts))
        num, heads, _ = weights.shape
        for name, size in (("H", self.lora_a.shape[1]), ("D", self.lora_b.shape[2])):
            if size % heads:
                rule = f"be a multiple of {heads} heads"
                fail(ValueError, "LoraExperts.merged_blockwise", name, rule, size)
        w = weights.to(self.lora_a.dtype)
        a = self.lora_a.view(experts, heads, -1, rank)
        b = self.lora_b.view(experts, rank, heads, -1)
        return LoraExperts(
            torch.einsum("she,ehir->shir", w, a).reshape(num, -1, rank),
            torch.einsum("she,erho->srho", w, b).reshape(num, rank, -1),
            self.scaling,
        )


@register("mixture_of_shards", row="R68", source="arXiv:2410.00938", verified="mem")
class MixtureOfShards(nn.Module):
    """MoS: the low-rank pairs of many modules, glued from shards of two common pools.

    Every row of `A` (and of `B`) of every module is the concatenation of `num_shards` shards, named
    by a fixed random index; the last `num_private` rows of every module use shards that nobody else
    does. Gradients add up in the pools.

    Args:
        hidden_size: `H` of all modules, a multiple of `num_shards`.
        out_size: `D` of all modules, likewise.
        num_modules: modules (layers, or experts) that share the pools.
        rank: rows per module.
        num_shards: shards per row.
        pool_size: public shards in each pool.
        num_private: private rows per module.
        generator: draws the indices.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """

    index_a: Tensor
    index_b: Tensor

    def __init__(
        self,
        hidden_size: int,
        out_size: int,
        num_modules: int,
        rank: int = 8,
        *,
        num_shards: int = 4,
        pool_size: int = 64,
        num_private: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        num_modules = check_int("mixture_of_shards", "num_modules", num_modules, 1)
        rank = check_int("mixture_of_shards", "rank", rank, 1)
        num_shards = check_int("mixture_of_shards", "num_shards", num_shards, 1)
        pool_size = check_int("mixture_of_shards", "pool_size", pool_size, 1)
        num_private = check_int("mixture_of_shards", "num_private", num_private, 0, rank)
        for name, size in (("hidden_size", hidden_size), ("out_size", out_size)):
            if check_int("mixture_of_shards", name, size, 1) % num_shards:
                rule = f"be a multiple of num_shards {num_shards}"
                fail(ValueError, "mixture_of_shards", name, rule, size)
        self.rank, self.num_shards = rank, num_shards
        self.pool_size, self.num_private = pool_size, num_private
        num_rows = pool_size + num_modules * num_private * num_shards
        self.pool_a = nn.Parameter(torch.empty(num_rows, hidden_size // num_shards))
        self.pool_b = nn.Parameter(torch.empty(num_rows, out_size // num_shards))
        for name in ("index_a", "index_b"):
            index = torch.empty(num_modules, rank, num_shards, dtype=torch.int64)
            self.register_buffer(name, index)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws new indices and a new pool of `A`, and sets that of `B` to 0."""
        deviation = (self.pool_a.shape[1] * self.num_shards) ** -0.5
        for pool, index, std in (
            (self.pool_a, self.index_a, deviation),
            (self.pool_b, self.index_b, 0.0),
        ):
            draw_normal(pool, std, generator)
            public, own = index.split([self.rank - self.num_private, self.num_private], 1)
            public.random_(self.pool_size, generator=generator)
            own.copy_(torch.arange(self.pool_size, pool.shape[0]).view(own.shape))

    def experts(self, scaling: float = 1.0) -> LoraExperts:
        """The modules as they are now, differentiable in the pools."""
        a, b = self.pool_a[self.index_a].flatten(2), self.pool_b[self.index_b].flatten(2)
        return LoraExperts(a.transpose(1, 2), b, scaling)


@register("queryable_lora", row="R69", source="arXiv:2605.08423", verified="mem")
class QueryableLora(nn.Module):
    """Queryable LoRA: an operator inside the bottleneck, looked up by attention.

    With `u = x A` `[T, r]` and a running summary `m` of the blocks before, the query
    `q = W [u, m]` attends over shared atoms: `alpha = softmax(q K^T / sqrt(r) + prior)`, and
    `y = s * (sum over j of alpha_j u M_j) B`. One atom, the identity, and no prior is plain LoRA.

    Args:
        hidden_size: `H`.
        out_size: `D`.
        rank: `r`.
        num_atoms: shared `r x r` operators.
        scaling: `s`.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """

    def __init__(
        self,
        hidden_size: int,
        out_size: int,
        rank: int = 8,
        *,
        num_atoms: int = 4,
        scaling: float = 1.0,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "out_size": out_size}
        for name, size in {**sizes, "rank": rank, "num_atoms": num_atoms}.items():
            check_int("queryable_lora", name, size, 1)
        self.rank = rank
        self.scaling = check_number("queryable_lora", "scaling", scaling)
        self.lora_a = nn.Parameter(torch.empty(hidden_size, rank))
        self.lora_b = nn.Parameter(torch.empty(rank, out_size))
        self.query = nn.Parameter(torch.empty(2 * rank, rank))
        self.keys = nn.Parameter(torch.empty(num_atoms, rank))
        self.atoms = nn.Parameter(torch.empty(num_atoms, rank, rank))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws a new `A`, query and keys, and sets `B` to 0 and the atoms to the identity."""
        draw_normal(self.lora_a, self.lora_a.shape[0] ** -0.5)
        self.lora_b.zero_()
        draw_normal(self.query, self.rank**-0.5)
        draw_normal(self.keys)
        self.atoms.zero_().diagonal(dim1=1, dim2=2).fill_(1)

    def forward(
        self, x: Tensor, summary: Tensor | None = None, prior: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The low-rank output and the next block's summary.

        Args:
            x: `[T, H]`.
            summary: `[T, r]` of the block before, or None at the first.
            prior: `[num_atoms]` or `[T, num_atoms]`, from the instruction.

        Returns:
            `[T, D]`, and `[T, r]`: the mean of the summary and this block's state.
        """
        check_tensor("queryable_lora", "x", x, 2)
        check_shape("queryable_lora", "x", x, (-1, self.lora_a.shape[0]))
        u = one_product(x, self.lora_a)
        summary = torch.zeros_like(u) if summary is None else summary
        check_shape("queryable_lora", "summary", summary, u.shape)
        if prior is not None:
            rows = (x.shape[0], *self.keys.shape[:1]) if prior.dim() == 2 else self.keys.shape[:1]
            check_shape("queryable_lora", "prior", prior, rows)
        query = one_product(torch.cat([u, summary], 1), self.query)
        logits = one_product(query, self.keys.T) * self.rank**-0.5
        alpha = (logits if prior is None else logits + prior).softmax(1)
        by_atom = one_product(u, self.atoms.transpose(0, 1).flatten(1))  # [T, num_atoms r]
        mixed = (alpha[:, :, None] * by_atom.unflatten(1, (-1, self.rank))).sum(1)
        return one_product(mixed, self.lora_b) * self.scaling, (summary + u) / 2


@register("same_projection", row="R70", source="arXiv:2602.01990", verified="2nd")
def project_update(update: Tensor, kept: Tensor) -> Tensor:
    """SAME: an update of a router without its part in directions that old tasks need.

    `update - U (U^T update)` with `U` an orthonormal basis of `kept`; apply it to the gradient or
    the step of a router weight `[H, E]`. `kept_directions` finds `U`.

    Args:
        update: `[H, E]`.
        kept: `[H, r]`, columns that span the kept subspace; of any length, dependent or 0 as well.

    Returns:
        `[H, E]` with `U^T result = 0`; differentiable in `update`.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("project_update", "update", update, 2)
    check_shape("project_update", "kept", kept, (update.shape[0], -1))
    basis, s, _ = torch.linalg.svd(kept, full_matrices=False)
    noise = torch.finfo(s.dtype).eps * max(kept.shape)
    basis = basis * (s > noise * s.amax()) if s.numel() else basis
    rest: Tensor = update - basis @ (basis.T @ update)
    return rest


def kept_directions(inputs: Tensor, energy: float = 0.99) -> Tensor:
    """The leading singular directions of old inputs that hold a share of their energy.

    SAME (arXiv:2602.01990) keeps them from being unlearned.

    Args:
        inputs: `[N, H]` hidden states of an old task.
        energy: share of the squared singular values to keep, in (0, 1].

    Returns:
        `[H, r]`, orthonormal columns; differentiable as far as singular vectors are.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("kept_directions", "inputs", inputs, 2)
    check_number("kept_directions", "energy", energy, high=1, above=0)
    _, s, v = torch.linalg.svd(inputs, full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum()
    rank = int((share < energy).sum()) + 1
    directions: Tensor = v[: min(rank, s.shape[0])].T
    return directions


def precondition_update(grad: Tensor, covariance: Tensor, damping: float = 1e-3) -> Tensor:
    """SAME's step of an expert (arXiv:2602.01990): `(C + damping I)^-1 grad`.

    Small where old inputs were strong.

    Args:
        grad: `[H, D]`, gradient of an expert's weight.
        covariance: `[H, H]` of the inputs the expert has seen.
        damping: keeps unseen directions finite.

    Returns:
        `[H, D]`, differentiable.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("precondition_update", "grad", grad, 2)
    check_shape("precondition_update", "covariance", covariance, (grad.shape[0], grad.shape[0]))
    check_number("precondition_update", "damping", damping, 0)
    eye = torch.eye(grad.shape[0], dtype=grad.dtype, device=grad.device)
    step: Tensor = torch.linalg.solve(covariance + damping * eye, grad)
    return step


def freeze_experts(weight: Tensor, frozen: Tensor) -> RemovableHandle:
    """Zeroes the gradient of some experts of a weight whenever it is computed (arXiv:2602.01990).

    Args:
        weight: `[E, ...]`, a leaf that requires a gradient, one slice per expert.
        frozen: bool `[E]`, True where the gradient becomes 0: experts that are little used.

    Returns:
        A handle whose `remove` thaws them.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    check_tensor("freeze_experts", "weight", weight)
    if not weight.requires_grad:
        fail(ValueError, "freeze_experts", "weight", "require a gradient", describe(weight))
    check_shape("freeze_experts", "frozen", frozen, weight.shape[:1])
    check_dtype("freeze_experts", "frozen", frozen, (torch.bool,))
    shape = (-1, *[1] * (weight.dim() - 1))
    handle: RemovableHandle = weight.register_hook(
        lambda grad: grad.masked_fill(frozen.view(shape), 0.0)
    )
    return handle
