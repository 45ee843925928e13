"""The registry of published methods: all that the package implements, by name.

Routers are classes, losses and softmax variants are functions; all are entered by `register`, so
that the command line, the documentation and the tests see one list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from fastmoe_route._arguments import check_choice, fail
from fastmoe_route.invariance import INVARIANCE

T = TypeVar("T", bound=Callable[..., Any])

DECODE = {
    "ok": "can decode causally",
    "leak": "training or prefill looks at later tokens, so decoding cannot reproduce it",
    "pre": "decided once from the prompt, then frozen",
    "n/a": "not a causal method",
}
VERIFIED = {
    "code": "checked against the authors' code",
    "paper": "checked against the paper",
    "2nd": "after a third-party implementation or text",
    "mem": "unverified: after the abstract or from memory",
}
_MODULES = ("routers", "losses", "softmax_variants", "adapters", "audit")


@dataclass(frozen=True)
class Method:
    """What the registry knows of one method.

    Attributes:
        name: the name `build` takes, in snake case.
        row: its row in docs/methods.md, such as `R1`; methods that belong together share one.
        source: where it is published, `arXiv:...` where there is one.
        verified: how the formula was checked, a key of `VERIFIED`.
        invariance: what a token's result depends on, a key of `INVARIANCE`.
        decode: whether it can decode causally, a key of `DECODE`.
        needs: the arguments of `forward` besides `x` that it cannot do without.
        target: the class or function.
    """

    name: str
    row: str
    source: str
    verified: str
    invariance: str
    decode: str
    needs: tuple[str, ...]
    target: Any

    @property
    def kind(self) -> str:
        """`router` for a class of `fastmoe_route.routers`, else the module of the function."""
        module = str(self.target.__module__).removeprefix("fastmoe_route.").split(".")[0]
        return {"routers": "router", "losses": "loss", "softmax_variants": "softmax"}.get(
            module, module
        )

    @property
    def title(self) -> str:
        """The first line of the docstring, without its full stop."""
        return (inspect.getdoc(self.target) or "").split("\n")[0].rstrip(".")


_methods: dict[str, Method] = {}


def register(
    name: str,
    *,
    row: str,
    source: str,
    verified: str,
    invariance: str = "I",
    decode: str = "ok",
    needs: tuple[str, ...] = (),
) -> Callable[[T], T]:
    """Enters a class or function under `name`; see `Method` for the fields.

    Args:
        name: unique, in snake case.
        row: its row in docs/methods.md.
        source: where it is published.
        verified: a key of `VERIFIED`.
        invariance: a key of `INVARIANCE`.
        decode: a key of `DECODE`.
        needs: arguments of `forward` that must be given.

    Returns:
        A decorator that returns its argument, with the entry as attribute `method`, and its source
        at the end of its docstring.

    Raises:
        ValueError: a key that is not known, or a name that is taken.
    """
    check_choice("register", "verified", verified, tuple(VERIFIED))
    check_choice("register", "invariance", invariance, tuple(INVARIANCE))
    check_choice("register", "decode", decode, tuple(DECODE))

    def enter(target: T) -> T:
        if name in _methods:
            fail(ValueError, "register", "name", "be new", repr(name))
        _methods[name] = Method(name, row, source, verified, invariance, decode, needs, target)
        target.method = _methods[name]  # type: ignore[attr-defined]
        if target.__doc__:
            told = f"Source: {source}, {VERIFIED[verified]}. Row {row} of docs/methods.md."
            target.__doc__ = f"{inspect.cleandoc(target.__doc__)}\n\n{told}"
        return target

    return enter


def _row_order(method: Method) -> tuple[int, int]:
    """R rows, then L, then X, each by number; inside a row in order of registration."""
    return "RLX".find(method.row[0]), int(method.row[1:])


def methods(kind: str | None = None) -> list[Method]:
    """Every method in the order of docs/methods.md, or those of one kind.

    Args:
        kind: `router`, `loss`, `softmax`, `adapters` or `audit`; None for all.

    Returns:
        The entries; a kind that nothing has gives none.
    """
    for module in _MODULES:
        import_module(f"fastmoe_route.{module}")
    found: Iterator[Method] = iter(_methods.values())
    return sorted((m for m in found if kind in (None, m.kind)), key=_row_order)


def find(name: str) -> Method:
    """The method of that name.

    Args:
        name: as `build` takes it.

    Returns:
        The entry of the registry.

    Raises:
        TypeError: the name is no string.
        ValueError: there is none; the message lists names that are close.
    """
    methods()
    if not isinstance(name, str):
        fail(TypeError, "routers", "name", "be a str", repr(name))
    if name not in _methods:
        from difflib import get_close_matches

        near = ", ".join(get_close_matches(name, _methods, cutoff=0.5)) or "none is close"
        rule = f"be a method of `python -m fastmoe_route routers` ({near})"
        fail(ValueError, "routers", "name", rule, repr(name))
    return _methods[name]
