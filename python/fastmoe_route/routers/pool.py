"""One pool of experts for all layers, and how it is divided among them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from fastmoe_route._arguments import check_dtype, check_number, check_shape, check_tensor, fail
from fastmoe_route.gate import gate
from fastmoe_route.methods import register
from fastmoe_route.routers.base import Common, Context, Routed
from fastmoe_route.routers.linear import LinearRouter


@register("uni_pool", row="R34", source="arXiv:2605.06665", verified="2nd")
class UniPool(LinearRouter):
    """UniPool: one pool of experts for all layers, scores of unit length.

    NormRouter: `s = g relu(z / |z|)` with a learned `g`; the best one, `w = s`, so scaling `z`
    changes nothing. Every layer has its own router and all share the experts: pass the same
    `Experts` everywhere, nothing is copied. Balance the pool, not the layer: the result keeps
    statistics in training for `fastmoe_route.losses.pool_balance([routing of each layer])`.

    After a short first phase (the authors: 2,000 steps) the pool may be locked: `pool_partition`
    gives every expert to one layer, and `lock` fades the others' scores out along a cosine, then
    bars them. Their logits stay in `|z|`, so the end of the fade and the lock score alike. Until
    then `losses.entropy_target(routing, E)`, times 5e-3 over the number of layers, keeps a layer
    to about `E` experts. After the authors' README.

    Args:
        hidden_size: `H`.
        num_experts: `M`, the size of the pool; the paper has 0.42 to 1 times layers times `E`.
        top_k: experts per token.
        common: see `Common`.
    """

    share: Tensor

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 1, **common: Unpack[Common]
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.gain = nn.Parameter(torch.empty(1))
        self.register_buffer("share", torch.empty(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the gain to 1, and unlocks the layer."""
        nn.init.ones_(self.gain)
        nn.init.ones_(self.share)

    @property
    def stats(self) -> bool:
        """Statistics are for the loss of the pool, too."""
        return self.training

    def lock(self, owned: Tensor, progress: float = 1.0) -> None:
        """Leaves this layer its own experts.

        Args:
            owned: bool `[M]`, a row of `pool_partition`.
            progress: how far the others are faded out, in [0, 1]; at 1 they are barred.
        """
        check_tensor(self.name, "owned", owned, 1)
        check_shape(self.name, "owned", owned, (self.num_experts,))
        check_dtype(self.name, "owned", owned, (torch.bool,))
        self.check_number("progress", progress, 0, 1)
        rest = (1 + math.cos(math.pi * progress)) / 2
        self.share.copy_(torch.where(owned, 1.0, rest))

    def route(self, x: Tensor, context: Context) -> Routed:
        scores = F.normalize(self.score(x), dim=1).relu()
        scores = scores * (self.gain * self.share).to(scores.dtype)
        routing = gate(scores, self.top_k, score="identity", mask=self.share > 0, stats=self.stats)
        return self.routed(routing, context)


def pool_partition(counts: Tensor, coverage: float = 0.95) -> Tensor:
    """Gives every expert of a pool to one layer, each layer equally many (UniPool's lock).

    A mixed-integer program, solved exactly by SciPy: layers should keep at least `coverage` of
    their routed tokens. The total by which they miss it is least, and among such partitions the
    tokens kept are most.

    Args:
        counts: `[L, M]`, tokens that each layer sent to each expert, such as summed `demand`; not
            negative. `L` divides `M`.
        coverage: in [0, 1].

    Returns:
        bool `[L, M]`: one True in a column, `M / L` in a row; rows are for `UniPool.lock`.

    Raises:
        ValueError: a shape or a value does not fit.
        ImportError: without SciPy.

    >>> pool_partition(torch.tensor([[9, 1, 8, 0], [2, 7, 9, 9]])).long()
    tensor([[1, 0, 1, 0],
            [0, 1, 0, 1]])
    """
    name = "pool_partition"
    check_tensor(name, "counts", counts, 2)
    num_layers, num_experts = counts.shape
    if num_layers == 0 or num_experts % num_layers != 0:
        fail(ValueError, name, "counts", "have a multiple of as many columns as rows", counts.shape)
    if not bool(torch.isfinite(counts).all() and (counts >= 0).all()):
        fail(ValueError, name, "counts", "be finite and not negative", "an entry that is not")
    check_number(name, "coverage", coverage, 0, 1)
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        text = f"{name}: needs SciPy: pip install fastmoe-route[routers]"
        raise ImportError(text) from error
    # The variables: who owns what, [L, M], and then by how much each layer misses its share, [L].
    share = (counts.double() / counts.double().sum(1, keepdim=True).clamp(min=1e-300)).cpu().numpy()
    eye, none = np.eye(num_layers), np.zeros((num_experts, num_layers))
    of_layer = np.kron(eye, np.ones(num_experts))
    owners = np.hstack([np.tile(np.eye(num_experts), num_layers), none])
    sizes = np.hstack([of_layer, 0 * eye])
    kept = np.hstack([of_layer * share.flatten(), eye])
    size = num_experts // num_layers
    found = milp(
        np.append(-1e-3 / num_layers * share, np.ones(num_layers)),
        integrality=np.repeat([1, 0], [share.size, num_layers]),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(owners, 1, 1),
            LinearConstraint(sizes, size, size),
            LinearConstraint(kept, coverage, np.inf),
        ],
    )
    owner = torch.from_numpy(found.x[: share.size]).view(num_layers, num_experts)
    return (owner > 0.5).to(counts.device)
