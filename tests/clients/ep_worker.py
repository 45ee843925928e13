"""One rank of the test of transformers' expert parallelism.

python -m clients.ep_worker RANK SIZE FOLDER
"""

from __future__ import annotations

import copy
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from fastmoe_route.integrations.transformers import register
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed.expert_parallel import EpDispatchExpertsParallel

from clients.models import E, make_experts, routing

TOKENS = (9, 0)


def shard(module: torch.nn.Module, rank: int, size: int) -> None:
    """Keeps this rank's experts, as transformers' `MoEParamShard` does."""
    share = E // size
    for name, value in list(module.named_parameters(recurse=False)):
        own = value.detach()[rank * share : (rank + 1) * share].clone()
        setattr(module, name, torch.nn.Parameter(own))
    module.num_experts = share
    module._is_expert_parallel = True


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got - want).norm() / want.norm().clamp(min=1e-12)
    assert not want.numel() or error <= 1e-6, error


def run(rank: int, size: int, name: str, implementation: str, shares_batch: bool) -> None:
    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("ep", "tp"))
    single = make_experts(name)
    module = copy.deepcopy(single)
    module.config._experts_implementation = implementation
    shard(module, rank, size)
    tp_mesh = mesh["ep"] if shares_batch else mesh["tp"]
    EpDispatchExpertsParallel().install_forward(
        module, mesh["ep"], tp_mesh=tp_mesh, ep_implementation="fastmoe_route"
    )
    batches = [routing(7 if shares_batch else TOKENS[r], seed=0 if shares_batch else r)
               for r in range(size)]  # fmt: skip
    x, index, weights = batches[rank]
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = module(x, index, weights)
    (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
    for r, (other, ids, scale) in enumerate(batches[:1] if shares_batch else batches):
        other, scale = other.clone().requires_grad_(), scale.clone().requires_grad_()
        expected = type(single).forward(single, other, ids, scale)
        if expected.numel():
            (expected * torch.arange(expected.numel()).view_as(expected).cos()).sum().backward()
        if r == rank or shares_batch:
            close(y.detach(), expected.detach())
            if expected.numel():
                close(x.grad, other.grad)
                close(weights.grad, scale.grad)
    share = E // size
    for key, value in module.named_parameters(recurse=False):
        close(value.grad, single.get_parameter(key).grad[rank * share : (rank + 1) * share])


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=30),
    )
    register()
    text = ""
    try:
        for name in ("MixtralExperts", "MuseSparkExperts"):
            for implementation in ("eager", "fastmoe_route"):
                run(rank, size, name, implementation, shares_batch=False)
        run(rank, size, "MixtralExperts", "fastmoe_route", shares_batch=True)
    except Exception:
        text = traceback.format_exc()
    (folder / f"rank{rank}.txt").write_text(text)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
