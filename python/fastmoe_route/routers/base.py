"""What every router is: its arguments, its result, its checks and its serve mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastmoe_route import losses
from fastmoe_route._arguments import (
    FLOAT_DTYPES,
    ID_DTYPES,
    check_device,
    check_dtype,
    check_factor,
    check_shape,
    check_tensor,
    fail,
    may_look,
)
from fastmoe_route.dispatch import DROP_POLICIES
from fastmoe_route.invariance import dispatch_invariance
from fastmoe_route.methods import Method
from fastmoe_route.results import DispatchPlan, Routing
from fastmoe_route.routers.capacity import ROUNDINGS, Capacity, capacity_plan
from fastmoe_route.routers.checks import Checks
from fastmoe_route.routers.experts import Experts

_HALVES = (torch.bfloat16, torch.float16)


class Context(NamedTuple):
    """What a router is told beside the hidden states `[T, H]`; see `Router.forward`."""

    token_ids: Tensor | None = None
    sequence_ids: Tensor | None = None
    num_sequences: int = 1
    scope_ids: Tensor | None = None
    num_scopes: int = 1
    attention_mass: Tensor | None = None
    state: Tensor | None = None
    positions: Tensor | None = None
    seed: int | None = None
    experts: Experts | None = None

    def sequences(self, x: Tensor) -> tuple[Tensor, int]:
        """The sequence of each token of `x`, int64 `[T]`, and how many; one if none are told."""
        return _segments(self.sequence_ids, self.num_sequences, x)

    def scopes(self, x: Tensor) -> tuple[Tensor, int]:
        """The scope of each token of `x`, int64 `[T]`, and how many; one if none are told."""
        return _segments(self.scope_ids, self.num_scopes, x)


def _segments(ids: Tensor | None, number: int, x: Tensor) -> tuple[Tensor, int]:
    if ids is None:
        return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), 1
    return ids.long(), number


class Routed(NamedTuple):
    """What a router decided.

    Attributes:
        routing: the experts and weights of every token.
        losses: auxiliary losses of this call, scalars by name, each already times its coefficient.
            Empty outside training.
        plan: the dispatch plan where capacity is part of the method; None for one that drops
            nothing, which `moe_mlp` makes itself.
        residual: `[T]`, the weight of a token's own input in its output; None for 0.
        state: what the router of the next layer takes as `state`.
        extra: further tensors that a method hands out, by name; its docstring lists them.
    """

    routing: Routing
    losses: dict[str, Tensor]
    plan: DispatchPlan | None = None
    residual: Tensor | None = None
    state: Tensor | None = None
    extra: dict[str, Tensor] | None = None

    @property
    def aux_loss(self) -> Tensor:
        """The sum of the losses, a scalar to add to the loss of the task."""
        if not self.losses:  # torch.compile takes the empty view of a dict for true, the dict not
            return self.routing.weights.new_zeros(())
        first, *others = self.losses.values()
        return sum(others, first)


class Common(TypedDict, total=False):
    """The keyword arguments that every router takes beside its own.

    Methods that drop by no plan look at no capacity: expert choice, soft mixtures, merged experts.

    Attributes:
        aux_coef: coefficient of the loss `balance`, `fastmoe_route.losses.load_balancing`.
        z_coef: coefficient of the loss `z`, `fastmoe_route.losses.z_loss`.
        capacity_factor: capacity of an expert over its even share, in training; None drops nothing.
        eval_capacity_factor: the same in evaluation.
        drop_policy: `position` or `score`, see `plan_dispatch`.
        min_capacity: the least capacity of an expert.
        rounding: how a capacity is made whole, see `Capacity`.
    """

    aux_coef: float
    z_coef: float
    capacity_factor: float | None
    eval_capacity_factor: float | None
    drop_policy: str
    min_capacity: int
    rounding: str


def with_defaults(common: Common, **defaults: Unpack[Common]) -> Common:
    """The common arguments of a method: its own defaults, then what the caller gave."""
    return {**defaults, **common}


class Router(Checks, nn.Module):
    """Base of all routers: hidden states in, experts and weights out.

    A method overrides `route`, and `mix` where its output is more than a weighted sum of experts.
    One that owns parameters or buffers fills them in `reset_parameters`, which its constructor
    calls.

    Args:
        hidden_size: `H`, the size of a hidden state.
        num_experts: `E`.
        top_k: experts per token, at most `E`; None for `E`.
        common: see `Common`; a method may have other defaults.

    Attributes:
        method: the entry of the registry: row, source, invariance, needs. A class that is
            not registered is taken for one of invariance I, and goes by its class name.
        unused: common losses that a method has nothing to compute from, and therefore refuses.
        serving: whether calls that could leak from one request to another are refused.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name; so for every
            method, when it is made and when it is called.
    """

    method: ClassVar[Method] = Method("", "", "", "mem", "I", "ok", (), None)
    unused: ClassVar[tuple[str, ...]] = ()
    serving: bool

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int | None = None, **common: Unpack[Common]
    ) -> None:
        super().__init__()
        unknown = common.keys() - Common.__annotations__.keys()
        if unknown:
            name = min(unknown)
            value = dict(common)[name]
            fail(TypeError, self.name, name, "be an argument of the method", repr(value))
        self.hidden_size = self.check_int("hidden_size", hidden_size, 1)
        self.num_experts = num_experts = self.check_int("num_experts", num_experts, 1)
        self.top_k = num_experts
        if top_k is not None:
            self.top_k = self.check_int("top_k", top_k, 1, num_experts)
        self.aux_coef = common.get("aux_coef", 0.0)
        self.z_coef = common.get("z_coef", 0.0)
        for argument in ("aux_coef", "z_coef"):
            self.check_number(argument, getattr(self, argument))
            if argument in self.unused and getattr(self, argument) != 0:
                rule = "be 0: the method has no scores for that loss"
                self.fail(argument, rule, getattr(self, argument))
        self.capacity_factor = common.get("capacity_factor")
        self.eval_capacity_factor = common.get("eval_capacity_factor")
        self.drop_policy = common.get("drop_policy", "position")
        self.min_capacity = common.get("min_capacity", 1)
        self.rounding = common.get("rounding", "ceil")
        self.serving = False
        self._check_capacity()
        self.register_load_state_dict_post_hook(_check_loaded)

    @property
    def name(self) -> str:
        """The registered name, or the class name of a class that is not registered."""
        return self.method.name or type(self).__name__

    @property
    def factor(self) -> float | None:
        """The capacity factor of the mode the router is in."""
        return self.capacity_factor if self.training else self.eval_capacity_factor

    @property
    def invariance(self) -> str:
        """What a token's result depends on as this router is set up; a key of `INVARIANCE`.

        The tag of `fastmoe_route.dispatch_invariance`: a method of class C is I as long as nothing
        can be dropped, and one of class I with a capacity is C, or B if slots are kept by score.
        """
        own = "I" if self.method.invariance == "C" else self.method.invariance
        capacity = None if self.factor is None else 1
        return dispatch_invariance(own, capacity=capacity, drop_policy=self.drop_policy)

    def forward(
        self,
        x: Tensor,
        *,
        token_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        num_sequences: int = 1,
        scope_ids: Tensor | None = None,
        num_scopes: int = 1,
        attention_mass: Tensor | None = None,
        state: Tensor | None = None,
        positions: Tensor | None = None,
        seed: int | None = None,
        experts: Experts | None = None,
    ) -> Routed:
        """Routes every token. Methods read what they need and ignore the rest.

        Args:
            x: float `[T, H]`, the hidden states.
            token_ids: int `[T]`, the vocabulary id of each token.
            sequence_ids: int `[T]` in `[0, num_sequences)`, the sequence of each token; None for
                one sequence.
            num_sequences: the number of sequences.
            scope_ids: int32 `[T]` in `[0, num_scopes)`, the request of each token: capacity and
                balancing stay inside it. None for one scope.
            num_scopes: the number of scopes.
            attention_mass: float `[T]`, the attention each token received.
            state: the `state` of the previous layer's result, or None at the first layer.
            positions: int `[T]`, each token's place in its own request; keys the random numbers.
            seed: makes random choices a function of `(seed, position)`, whatever the batch.
            experts: the experts, for methods that look at their weights or outputs.

        Returns:
            `Routed`.

        Raises:
            TypeError, ValueError: an argument that is missing or does not fit, by method and name;
                a call that serve mode refuses.
        """
        num_sequences = self.check_int("num_sequences", num_sequences, 1)
        num_scopes = self.check_int("num_scopes", num_scopes, 1)
        if seed is not None:
            seed = self.check_int("seed", seed, -(2**63), 2**63 - 1)
        context = Context(
            token_ids,
            sequence_ids,
            num_sequences,
            scope_ids,
            num_scopes,
            attention_mass,
            state,
            positions,
            seed,
            experts,
        )
        self._check(x, context)
        return self.route(x, context)

    def route(self, x: Tensor, context: Context) -> Routed:
        """The method itself; `x` and `context` are checked."""
        raise NotImplementedError

    def routed(self, routing: Routing, context: Context, **parts: Any) -> Routed:
        """The result for a routing: with the common losses in training, and the plan if any.

        `parts` are fields of `Routed`; `losses` among them are added to the common ones.
        """
        found = self._common_losses(routing)
        found.update(parts.pop("losses", {}))
        if "plan" not in parts:
            parts["plan"] = self.plan(routing, context)
        return Routed(routing, found, **parts)

    def plan(self, routing: Routing, context: Context) -> DispatchPlan | None:
        """The plan of a routing under the capacity of the mode; None if nothing is dropped."""
        if self.factor is None:
            return None
        scopes = None if context.scope_ids is None else (context.scope_ids, context.num_scopes)
        limit = Capacity(self.factor, self.min_capacity, self.drop_policy, self.rounding)
        return capacity_plan(self.name, routing, limit, scopes, self.even_slots(routing))

    def even_slots(self, routing: Routing) -> int:
        """Slots per token in the even share that a capacity is a multiple of: all there are."""
        return routing.experts.shape[1]

    def _common_losses(self, routing: Routing) -> dict[str, Tensor]:
        if not self.stats:
            return {}
        found = {}
        if self.aux_coef != 0:
            found["balance"] = self.aux_coef * losses.load_balancing(routing)
        if self.z_coef != 0:
            found["z"] = self.z_coef * losses.z_loss(routing)
        return found

    @property
    def stats(self) -> bool:
        """Whether the gate has to return statistics for the common losses."""
        return self.training and (self.aux_coef != 0 or self.z_coef != 0)

    def mix(self, x: Tensor, routed: Routed, experts: Experts) -> Tensor:
        """The layer's output `[T, H]`: the weighted experts, plus the residual share of `x`."""
        y = experts(x, routed.routing, routed.plan)
        if routed.residual is not None:
            y = y + (routed.residual[:, None] * x).to(y.dtype)
        return y

    def update(self) -> None:
        """Moves what learns from the counts of finished batches; most methods have nothing there.

        To be called after each optimizer step, on all ranks alike; `fastmoe_route.routers.update`
        does so for a whole model.
        """

    def serve(self) -> Router:
        """Eval mode, in which calls that mix requests are refused; `train()` and `eval()` end it.

        A method of invariance B, or C with a capacity, then needs `scope_ids`, one of invariance S
        `sequence_ids`.

        Raises:
            ValueError: a parameter or buffer is not finite.
        """
        self.eval()
        self.check_finite(self.state_dict().items())
        self.serving = True
        return self

    def train(self, mode: bool = True) -> Router:
        """Training or evaluation; ends serve mode."""
        self.serving = False
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # Buffers add up steps and counts that 16 bits would lose, whatever the parameters are.
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype in _HALVES and buffer.dtype not in _HALVES:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """The sizes, for `print`."""
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"

    def _check_capacity(self) -> None:
        for argument in ("capacity_factor", "eval_capacity_factor"):
            check_factor(self.name, argument, getattr(self, argument))
        self.check_choice("drop_policy", self.drop_policy, DROP_POLICIES)
        self.check_choice("rounding", self.rounding, ROUNDINGS)
        self.min_capacity = self.check_int("min_capacity", self.min_capacity, 1)

    def _check(self, x: Tensor, context: Context) -> None:
        name = self.name
        check_tensor(name, "x", x, 2)
        check_dtype(name, "x", x, FLOAT_DTYPES)
        if x.shape[1] != self.hidden_size:
            check_shape(name, "x", x, (-1, self.hidden_size))
        for need in self.method.needs:
            if getattr(context, need) is None:
                self.fail(need, "be given", None)
        for argument in ("token_ids", "sequence_ids", "scope_ids", "attention_mass", "positions"):
            value = getattr(context, argument)
            if value is not None:
                _check_per_token(name, argument, value, x)
        for argument in ("state", "attention_mass"):
            value = getattr(context, argument)
            if value is not None:
                check_tensor(name, argument, value)
                if may_look(value):
                    self.check_finite([(argument, value)])
        if context.experts is not None and not hasattr(context.experts, "each"):
            rule = "be an Experts, such as layer.experts.tensors()"
            fail(TypeError, name, "experts", rule, type(context.experts).__name__)
        if context.sequence_ids is not None:
            self.check_ids("sequence_ids", context.sequence_ids, context.num_sequences)
        if context.scope_ids is not None:
            self.check_ids("scope_ids", context.scope_ids, context.num_scopes)
        if self.serving:
            self._check_served(context)

    def _check_served(self, context: Context) -> None:
        invariance = self.invariance
        if invariance in ("B", "C") and context.scope_ids is None:
            rule = f"be given in serve mode, because the invariance is {invariance}"
            self.fail("scope_ids", rule, None)
        if invariance == "S" and context.sequence_ids is None:
            rule = "be given in serve mode, because the invariance is S"
            self.fail("sequence_ids", rule, None)


def _check_per_token(name: str, argument: str, value: Any, x: Tensor) -> None:
    check_tensor(name, argument, value, 1)
    check_shape(name, argument, value, (x.shape[0],))
    check_device(name, argument, value, x)
    if argument == "attention_mass":
        check_dtype(name, argument, value, FLOAT_DTYPES)
    elif argument == "scope_ids":
        check_dtype(name, argument, value, (torch.int32,))
    else:
        check_dtype(name, argument, value, ID_DTYPES)


def _check_loaded(router: nn.Module, _: Any) -> None:
    assert isinstance(router, Router)
    router.check_finite(router.state_dict().items())
