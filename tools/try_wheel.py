"""Runs a whole layer, forward and backward, with nothing installed but torch and the wheel.

Where the wheel holds the CUDA library and torch has CUDA, every op must have a CUDA kernel in the
dispatcher as well, with or without a driver.
"""

from __future__ import annotations

import re
import sys

import torch
from fastmoe_route import _load


def layer_difference() -> float:
    """Largest difference between the package and the definition of the layer, in float64."""
    import fastmoe_route as fr

    torch.manual_seed(0)
    logits, x = torch.randn(33, 8, dtype=torch.float64), torch.randn(33, 16, dtype=torch.float64)
    w_up = torch.randn(8, 16, 24, dtype=torch.float64, requires_grad=True)
    w_down = torch.randn(8, 12, 16, dtype=torch.float64, requires_grad=True)
    routing = fr.gate(logits, 2, normalize=True)
    y = fr.moe_mlp(x, routing, w_up, w_down)
    y.square().sum().backward()
    grads = [w_up.grad, w_down.grad]
    w_up.grad = w_down.grad = None

    weights, experts = logits.softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    gate, up = torch.einsum("th,tkhi->tki", x, w_up[experts]).chunk(2, -1)
    hidden = torch.nn.functional.silu(gate) * up
    wanted = torch.einsum("tki,tkih,tk->th", hidden, w_down[experts], weights)
    wanted.square().sum().backward()
    pairs = zip([y, *grads], [wanted, w_up.grad, w_down.grad], strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def cuda_kernels() -> tuple[int, list[str]]:
    """How many ops have kernels for the CPU and for CUDA, and which of them lack those for CUDA."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastmoe_route::")]
    ops = [n for n in names if has(n, "CPU") and not re.search("assign_balanced|machine_", n)]
    return len(ops), [n for n in ops if not has(n, "CUDA")]


def main() -> None:
    difference = layer_difference()
    print(
        f"Python {sys.version.split()[0]}, torch {torch.__version__}: a layer forward and backward "
        f"in float64, relative difference from plain torch {difference:.1e}"
    )
    if not difference < 1e-12:
        sys.exit("the wheel computes something else")
    if torch.version.cuda is not None and _load.find_library("fastmoe_route_cuda") is not None:
        count, missing = cuda_kernels()
        gpu = "a GPU" if torch.cuda.is_available() else "no GPU"
        print(
            f"torch has CUDA {torch.version.cuda}, the machine {gpu}: "
            f"{count - len(missing)} of {count} ops have a CUDA kernel"
        )
        if missing or not count:
            sys.exit(f"no CUDA kernel: {' '.join(missing)}")


if __name__ == "__main__":
    main()
