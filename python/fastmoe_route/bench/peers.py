"""The expert kernels of others, where they are installed: inference only, weights packed before.

- *vLLM*: `cpu_fused_moe` with its vector kernels, and *SGLang*'s `fused_experts_cpu`, which the
  same library carries (bfloat16 only). The library is loaded alone; vLLM's Python is not imported.
- *zentorch*: `zentorch_fused_moe`, which packs and keeps the weights at its first call.
- *ONNX Runtime*: the `MoE` operator on float32. It routes by itself, so it gets logits whose
  softmax is the routing; its weights are graph inputs, in its own interleaved order.

All take SwiGLU experts `up [E, 2I, H]`, `down [E, H, I]`. `make bench-peers` installs the versions
these calls were written for; another version that raises or errs is left out with a note.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoe_route.bench.workload import require_memory

# peer(x [T, H], experts int32 [T, K], weights float32 [T, K]) -> [T, H]
Peer = Callable[[Tensor, Tensor, Tensor], Tensor]
# Packs one copy of the weights; None for a dtype the peer has no kernel for.
Packer = Callable[[Tensor, Tensor], Peer | None]

MODULES = {"vLLM": "vllm", "SGLang": "vllm", "zentorch": "zentorch", "ONNX Runtime": "onnxruntime"}


def installed() -> list[str]:
    """Names of the peers whose packages are there."""
    return [name for name, module in MODULES.items() if importlib.util.find_spec(module)]


def _load_vllm() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    torch.ops.load_library(Path(spec.submodule_search_locations[0], "_C.abi3.so"))


def _vllm(up: Tensor, down: Tensor) -> Peer:
    _load_vllm()
    op = torch.ops._C

    def pack(w: Tensor) -> Tensor:
        packed = torch.empty_like(w)
        op.prepack_moe_weight(w, packed, "vec")
        return packed

    packed_up, packed_down = pack(up), pack(down)

    def run(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(x)
        op.cpu_fused_moe(
            out, x, packed_up, packed_down, None, None, weights, experts, False, "silu", "vec"
        )
        return out

    return run


def _sglang(up: Tensor, down: Tensor) -> Peer | None:
    if up.dtype != torch.bfloat16:
        return None
    _load_vllm()
    op = torch.ops._C
    packed_up, packed_down = op.convert_weight_packed(up), op.convert_weight_packed(down)
    nothing = (None,) * 9  # scales, zero points, block size, biases, alpha, limit

    def run(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(x)
        op.fused_experts_cpu(
            out, x, packed_up, packed_down, weights, experts, 0, *nothing, None, True
        )
        return out

    return run


def _zentorch(up: Tensor, down: Tensor) -> Peer:
    importlib.import_module("zentorch")
    op = torch.ops.zentorch
    op.zentorch_flush_moe_weight_cache()  # what it kept of weights that are gone

    def run(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(x)
        op.zentorch_fused_moe(out, x, up, down, None, None, weights, experts, False, "silu")
        return out

    return run


def _onnx_model(num_experts: int, hidden: int, inter: int, top_k: int) -> bytes:
    """One `MoE` node whose inputs are all graph inputs."""
    onnx: Any = importlib.import_module("onnx")
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = make.make_node(
        "MoE",
        ["x", "logits", "up", "", "down"],
        ["y"],
        domain="com.microsoft",
        k=top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=1,
    )
    sizes: dict[str, list[int | str]] = {
        "x": ["T", hidden],
        "logits": ["T", num_experts],
        "up": [num_experts, 2 * inter, hidden],
        "down": [num_experts, hidden, inter],
        "y": ["T", hidden],
    }
    values = {name: make.make_tensor_value_info(name, kind, size) for name, size in sizes.items()}
    result = values.pop("y")
    graph = make.make_graph([node], "moe", list(values.values()), [result])
    opsets = [make.make_opsetid("", 17), make.make_opsetid("com.microsoft", 1)]
    model: bytes = make.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return model


def _onnx(up: Tensor, down: Tensor) -> Peer | None:
    if up.dtype != torch.float32:
        return None
    runtime: Any = importlib.import_module("onnxruntime")
    num_experts, width, hidden = up.shape
    pairs = up.detach().view(num_experts, 2, width // 2, hidden).transpose(1, 2)
    given = {"up": pairs.reshape(num_experts, width, hidden), "down": down.detach()}
    sessions: dict[int, Any] = {}

    def session(top_k: int) -> Any:
        if top_k not in sessions:
            options = runtime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            model = _onnx_model(num_experts, hidden, width // 2, top_k)
            sessions[top_k] = runtime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        return sessions[top_k]

    def run(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        logits = torch.full((x.shape[0], num_experts), -torch.inf)
        logits.scatter_(1, experts.long(), weights.log())
        out = torch.empty_like(x)
        here = session(experts.shape[1])
        binding = here.io_binding()
        for name, value in {"x": x, "logits": logits, **given}.items():
            binding.bind_input(name, "cpu", 0, "float32", tuple(value.shape), value.data_ptr())
        binding.bind_output("y", "cpu", 0, "float32", tuple(out.shape), out.data_ptr())
        here.run_with_iobinding(binding)
        return out

    return run


_PACKERS: dict[str, Packer] = {
    "vLLM": _vllm,
    "SGLang": _sglang,
    "zentorch": _zentorch,
    "ONNX Runtime": _onnx,
}


def pack(name: str, ups: list[Tensor], downs: list[Tensor]) -> list[Peer] | None:
    """The peer on every copy of the weights; None if it has no kernel for their dtype.

    Raises:
        OutOfMemory: a packed copy does not fit.
    """
    require_memory(sum(t.numel() * t.element_size() for t in (*ups, *downs)), f"packing for {name}")
    peers = []
    with torch.no_grad():
        for up, down in zip(ups, downs, strict=True):
            peer = _PACKERS[name](up.detach(), down.detach())
            if peer is None:
                return None
            peers.append(peer)
    return peers
