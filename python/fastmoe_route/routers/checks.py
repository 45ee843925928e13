"""The argument checks of `_arguments`, in the name of a method and its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastmoe_route import _arguments as arguments


class Checks:
    """Checks of a method's arguments, as a base of `Router`; most return what they accept."""

    num_experts: int

    @property
    def name(self) -> str:
        """What errors begin with."""
        raise NotImplementedError

    def fail(self, argument: str, rule: str, got: object) -> NoReturn:
        """Raises a ValueError."""
        arguments.fail(ValueError, self.name, argument, rule, got)

    def check_int(self, argument: str, value: Any, low: int, high: int | None = None) -> int:
        """An int in [low, high]."""
        return arguments.check_int(self.name, argument, value, low, high)

    def check_divisor(self, argument: str, value: Any) -> int:
        """A positive divisor of the number of experts."""
        what = "number of experts"
        return arguments.check_divides(self.name, argument, value, self.num_experts, what)

    def check_number(
        self, argument: str, value: Any, *limits: float, **open_limits: float
    ) -> float:
        """A finite number within limits, see `_arguments.check_number`."""
        return arguments.check_number(self.name, argument, value, *limits, **open_limits)

    def check_numbers(self, argument: str, values: Any, count: int, **limits: float) -> list[float]:
        """A list of `count` numbers within limits."""
        if isinstance(values, Tensor):
            values = values.tolist()
        if not isinstance(values, (list, tuple)):
            arguments.fail(TypeError, self.name, argument, "be a list of numbers", repr(values))
        if len(values) != count:
            self.fail(argument, f"have {count} entries", len(values))
        return [self.check_number(argument, value, **limits) for value in values]

    def check_flag(self, argument: str, value: Any) -> bool:
        """A bool."""
        arguments.check_flag(self.name, argument, value)
        return value  # type: ignore[no-any-return]

    def check_choice(self, argument: str, value: Any, choices: Sequence[str]) -> str:
        """One of `choices`."""
        return choices[arguments.check_choice(self.name, argument, value, choices)]

    def check_state(self, state: Tensor, *shape: int) -> Tensor:
        """A `state` of this shape."""
        arguments.check_shape(self.name, "state", state, shape)
        return state

    def check_ids(self, argument: str, ids: Tensor, size: int) -> None:
        """Ids in `[0, size)`, where looking costs no wait for a device."""
        arguments.check_ends(self.name, argument, ids, 0, size - 1)

    def check_finite(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Tensors without inf and NaN, which may wait for a device."""
        for argument, value in named:
            has_values = value.is_floating_point() and not value.is_meta
            if has_values and not bool(torch.isfinite(value).all()):
                self.fail(argument, "be finite", "inf or NaN")
