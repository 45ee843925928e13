"""Cases that multiply by expert weights: grouped_mm, moe_mlp, layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmoe_route as fr
from fastmoe_route.bench import baselines
from fastmoe_route.bench.case import MULTIPLY, READ, Case, Function, backward, compare
from fastmoe_route.bench.check import TOLERANCE, Finding, bound, rms_bound
from fastmoe_route.bench.machine import DTYPE_CODES
from fastmoe_route.bench.shapes import Row
from fastmoe_route.bench.timing import Call
from fastmoe_route.bench.workload import (
    Tokens,
    Weights,
    make_tokens,
    random_tensor,
    require_memory,
)

_LEAST_FLOPS = 1e9  # of the row: of shorter loops the start of threads would be a part
_MULTIPLY_FLOPS = 1e10  # at most, of the yardstick beside: long beside a burst at a higher clock
_CHECKED_TOKENS = 4
_CHECKED_EXPERTS = 4
_READ_BYTES = 128 << 20  # at most, of the yardstick beside


def _add_yardsticks(case: Case, weights: Weights) -> Case:
    """Adds those that do as many operations and read as many bytes as the case declares.

    Both up to a limit; the bytes are of the weights themselves, another part in every call.
    """
    if case.row.dtype in DTYPE_CODES and case.flops >= _LEAST_FLOPS:
        case.multiply_flops = min(case.flops, _MULTIPLY_FLOPS)
        multiply, code = torch.ops.fastmoe_route.machine_peak, DTYPE_CODES[case.row.dtype]
        case.yardsticks[MULTIPLY] = lambda _: multiply(code, case.multiply_flops)
    if not case.cached:
        flat = [up.detach().view(-1).view(torch.float32) for up in weights.ups]
        count = min(case.num_bytes, _READ_BYTES, 4 * flat[0].numel()) // 4
        parts = [part for up in flat for part in up.split(count) if part.numel() == count]
        case.read_bytes = 4 * count
        read = torch.ops.fastmoe_route.machine_read
        case.yardsticks[READ] = lambda i: read(parts[i % len(parts)], 1)
    return case


def grouped_mm_case(row: Row, seed: int, weights: Weights) -> Case:
    """The up projection alone: `[R, H] x [E, H, 2I]`."""
    shape = row.shape
    dtype: torch.dtype = getattr(torch, row.dtype)
    num_rows, width = row.tokens * shape.top_k, 2 * shape.intermediate
    tokens = make_tokens(shape, row.tokens, dtype, seed)
    slots = baselines.sort_slots(tokens.experts.long(), shape.num_experts)
    offsets = slots.offsets
    x = random_tensor((num_rows, shape.hidden), dtype, seed + 2, 1.0)
    grad = random_tensor((num_rows, width), dtype, seed + 3, 1.0)
    active = int((offsets.diff() > 0).sum())
    one_expert = shape.hidden * width * dtype.itemsize
    rows_bytes = num_rows * (shape.hidden + width) * dtype.itemsize
    num_bytes = active * one_expert + rows_bytes
    if row.training:
        num_bytes = 2 * active * one_expert + shape.num_experts * one_expert + 3 * rows_bytes
        require_memory(2 * shape.num_experts * one_expert + 4 * rows_bytes, str(row))

    def run(function: Function, i: int) -> tuple[Tensor, ...]:
        w = weights.ups[i % weights.copies]
        if not row.training:
            return (function(x, w, offsets),)
        leaf = x.detach().requires_grad_()
        return backward(function(leaf, w, offsets), [leaf, w], grad)

    def ours(rows: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
        return fr.grouped_mm(rows, w.transpose(1, 2), offsets)

    plain: dict[str, Function] = {"loop of linear": baselines.grouped_mm_loop}
    if baselines.has_grouped_mm():
        plain["torch grouped_mm"] = baselines.grouped_mm_torch

    def check() -> list[Finding]:
        tolerance = TOLERANCE[dtype]
        findings = []
        if not row.training:
            got, theirs = run(ours, 0), run(baselines.grouped_mm_loop, 0)
            picked, expert = _sample_rows(offsets)
            w = weights.ups[0].detach()
            wanted = torch.stack(
                [w[e].double() @ x[r].double() for r, e in zip(picked, expert, strict=True)]
            )
            findings += compare(
                "sampled rows", got[0][picked], theirs[0][picked], wanted, tolerance
            )
            return [*findings, *compare("values", got[0], theirs[0], None, tolerance)]
        chosen = _some_experts(offsets)
        got = _keep_experts(run(ours, 0), 1, chosen)
        theirs = _keep_experts(run(baselines.grouped_mm_loop, 0), 1, chosen)
        findings += compare("gradient of x", got[0], theirs[0], None, tolerance)
        return [*findings, _compare_experts("gradient of w", got[1], theirs[1], tolerance)]

    contenders: dict[str, Call] = {"fastmoe_route": lambda i: run(ours, i)}
    for name, function in plain.items():
        contenders[name] = lambda i, function=function: run(function, i)  # type: ignore[misc]
    flops = 2.0 * num_rows * shape.hidden * width * (3 if row.training else 1)
    case = Case(row, contenders, num_bytes, flops, weights.copies, weights.cached, check)
    return _add_yardsticks(case, weights)


def _sample_rows(offsets: Tensor) -> tuple[list[int], list[int]]:
    """A few rows from first to last, and the expert of each."""
    num_rows = int(offsets[-1])
    picked = sorted({round(i * (num_rows - 1) / 7) for i in range(8)})
    experts = torch.searchsorted(offsets[1:].contiguous(), torch.tensor(picked), right=True)
    return picked, experts.tolist()


def _some_experts(offsets: Tensor) -> list[int]:
    """A few experts, the busiest and an idle one among them."""
    falling = offsets.diff().argsort(descending=True).tolist()
    step = max(1, len(falling) // _CHECKED_EXPERTS)
    return sorted({falling[0], falling[-1], *falling[::step]})


def _keep_experts(
    gradients: tuple[Tensor, ...], first: int, experts: list[int]
) -> tuple[Tensor, ...]:
    """Of the gradients from `first` on, which are those of weights, only some experts.

    Of all experts they take as much memory as the weights; two contenders' need not fit at a time.
    """
    return (*gradients[:first], *(gradient[experts] for gradient in gradients[first:]))


def _compare_experts(what: str, got: Tensor, plain: Tensor, tolerance: float) -> Finding:
    """Weight gradients, every value beside the rms of its expert."""
    return bound(f"{what} beside plain PyTorch", got.flatten(1), plain.flatten(1), 2 * tolerance)


def _experts_in_double(
    x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """The expert layer in float64, one slot at a time: for a handful of tokens."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, choices in enumerate(experts.tolist()):
        for j, expert in enumerate(choices):
            gate_half, up_half = (up[expert].double() @ x[t].double()).chunk(2)
            result = down[expert].double() @ (F.silu(gate_half) * up_half)
            out[t] += weights[t, j].double() * result
    return out


class _Layer:
    """Data and contenders of moe_mlp (routing given) and layer (router product, gate, experts)."""

    def __init__(self, row: Row, seed: int, weights: Weights) -> None:
        self.row, self.weights, self.is_layer = row, weights, row.op == "layer"
        shape = row.shape
        self.dtype: torch.dtype = getattr(torch, row.dtype)
        # Several sets of tokens, so that few tokens do not meet the same experts in every call.
        count = max(1, min(32, 64 // row.tokens))
        self.sets = [
            make_tokens(shape, row.tokens, self.dtype, seed + 10 * i) for i in range(count)
        ]
        # Logits are float32 in any dtype, or ties would make the choice a matter of taste.
        self.router = random_tensor(
            (shape.num_experts, shape.hidden), torch.float32, seed, shape.hidden**-0.5
        ).requires_grad_(row.training)
        if self.is_layer:
            for tokens in self.sets:
                w, ids = baselines.gate_softmax(
                    F.linear(tokens.x.float(), self.router), shape.top_k
                )
                tokens.weights, tokens.experts = w.detach(), ids.int()
        self.grad = random_tensor((row.tokens, shape.hidden), self.dtype, seed + 3, 1.0)

    def ours(self, tokens: Tokens, x: Tensor, w: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
        """With fastmoe_route; `w` None asks for the gate as well."""
        up, down = up.transpose(1, 2), down.transpose(1, 2)
        if w is not None:
            return fr.moe_mlp(x, (tokens.experts, w), up, down)
        logits = F.linear(x.float(), self.router)
        return fr.moe_mlp(x, fr.gate(logits, self.row.shape.top_k, normalize=True), up, down)

    def plain(self, experts_of: Function) -> Function:
        """With a plain PyTorch form of the experts."""

        def run(tokens: Tokens, x: Tensor, w: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
            if w is not None:
                return experts_of(x, tokens.experts, w, up, down)
            logits = F.linear(x.float(), self.router)
            w, ids = baselines.gate_softmax(logits, self.row.shape.top_k)
            return experts_of(x, ids, w, up, down)

        return run

    def run(self, function: Function, i: int) -> tuple[Tensor, ...]:
        """Call number `i`: the output, or the gradients of x, router or weights, w_up, w_down."""
        tokens = self.sets[i % len(self.sets)]
        copy = i % self.weights.copies
        up, down = self.weights.ups[copy], self.weights.downs[copy]
        if not self.row.training:
            w = None if self.is_layer else tokens.weights
            return (function(tokens, tokens.x, w, up, down),)
        x = tokens.x.detach().requires_grad_()
        last = self.router if self.is_layer else tokens.weights.detach().requires_grad_()
        out = function(tokens, x, None if self.is_layer else last, up, down)
        return backward(out, [x, last, up, down], self.grad)

    def cost(self) -> tuple[int, float]:
        """Declared bytes and operations."""
        row, shape = self.row, self.row.shape
        slots, size = row.tokens * shape.top_k, self.dtype.itemsize
        one_expert = shape.expert_elements * size
        active = sum(tokens.experts.unique().numel() for tokens in self.sets) / len(self.sets)
        activations = 2 * row.tokens * shape.hidden * size
        flops = 2.0 * slots * shape.expert_elements
        if not row.training:
            return int(active * one_expert) + activations, flops
        saved = 2 * slots * 2 * shape.intermediate * size
        # The loop holds the gradient of every expert twice: by itself, and where they are joined.
        peak = 2 * shape.num_experts * one_expert + 8 * saved + 4 * activations * shape.top_k
        require_memory(peak, str(row))
        num_bytes = int((2 * active + shape.num_experts) * one_expert) + 2 * activations + saved
        return num_bytes, 3 * flops

    def check(self) -> list[Finding]:
        """Some tokens against float64, all of them (or the gradients) against the plain loop."""
        tokens, tolerance = self.sets[0], TOLERANCE[self.dtype]
        if not self.row.training:
            got = self.run(self.ours, 0)
            theirs = self.run(self.plain(baselines.experts_loop), 0)
            few = slice(0, _CHECKED_TOKENS)
            wanted = _experts_in_double(
                tokens.x[few],
                tokens.experts[few],
                tokens.weights[few],
                self.weights.ups[0].detach(),
                self.weights.downs[0].detach(),
            )
            return [
                *compare("sampled tokens", got[0][few], theirs[0][few], wanted, tolerance),
                *compare("values", got[0], theirs[0], None, tolerance),
            ]
        counts = torch.bincount(tokens.experts.flatten(), minlength=self.row.shape.num_experts)
        offsets = F.pad(counts.cumsum(0), (1, 0))
        chosen = _some_experts(offsets)
        got = _keep_experts(self.run(self.ours, 0), 2, chosen)
        theirs = _keep_experts(self.run(self.plain(baselines.experts_loop), 0), 2, chosen)
        last = "gradient of the router" if self.is_layer else "gradient of weights"
        findings = compare("gradient of x", got[0], theirs[0], None, tolerance)
        findings.append(rms_bound(f"{last} beside plain PyTorch", got[1], theirs[1], 2 * tolerance))
        for i, name in ((2, "gradient of w_up"), (3, "gradient of w_down")):
            findings.append(_compare_experts(name, got[i], theirs[i], tolerance))
        return findings


def layer_case(row: Row, seed: int, weights: Weights) -> Case:
    """moe_mlp and layer."""
    layer = _Layer(row, seed, weights)
    num_bytes, flops = layer.cost()
    functions: dict[str, Function] = {
        "fastmoe_route": layer.ours,
        "expert loop": layer.plain(baselines.experts_loop),
    }
    if baselines.has_grouped_mm():
        functions["torch grouped_mm"] = layer.plain(baselines.experts_grouped)
    contenders: dict[str, Call] = {}
    for name, function in functions.items():
        contenders[name] = lambda i, function=function: layer.run(function, i)  # type: ignore[misc]
    notes = list(weights.notes)
    if row.op == "moe_mlp" and not row.training:
        for name, packed in weights.peers.items():
            call = _peer_call(layer, packed)
            reason = _peer_fault(layer, call)
            if reason:
                notes.append(f"{name} is left out: {reason}")
            else:
                contenders[name] = call
    case = Case(row, contenders, num_bytes, flops, weights.copies, weights.cached, layer.check)
    case.notes = notes
    return _add_yardsticks(case, weights)


def _peer_call(layer: _Layer, packed: Sequence[Function]) -> Call:
    """Call number `i` of a peer, on the tokens and the copy of the weights that ours takes."""

    def call(i: int) -> Tensor:
        tokens = layer.sets[i % len(layer.sets)]
        return packed[i % len(packed)](tokens.x, tokens.experts, tokens.weights)

    return call


def _peer_fault(layer: _Layer, call: Call) -> str:
    """Why a peer cannot be compared; empty if it can.

    What is asked is only that it does the same work, so the limit is wide.
    """
    try:
        got = call(0)
    except Exception as error:  # whatever another library raises
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    assert isinstance(got, Tensor)
    wanted = layer.run(layer.ours, 0)[0].double()
    off = float((got.double() - wanted).norm() / wanted.norm())
    allowed = 1e-4 if layer.dtype == torch.float32 else 0.05
    return "" if off <= allowed else f"its result is off by {off:.2g}"
