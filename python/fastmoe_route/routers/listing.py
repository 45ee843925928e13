"""The texts of `python -m fastmoe_route routers`."""

from __future__ import annotations

import inspect
import sys

from fastmoe_route.invariance import INVARIANCE
from fastmoe_route.methods import DECODE, VERIFIED, Method, find, methods


def table(found: list[Method]) -> str:
    """One line per method: name, row, invariance, decoding, needs, source and title."""
    lines = [("name", "row", "kind", "inv", "decode", "needs", "source", "what it does")]
    lines += [
        (
            m.name,
            m.row,
            m.kind,
            m.invariance,
            m.decode,
            ", ".join(m.needs) or "-",
            m.source,
            m.title,
        )
        for m in found
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def description(method: Method) -> str:
    """Everything the package says about one method."""
    facts = {
        "row": f"{method.row} of docs/methods.md",
        "source": f"{method.source} ({VERIFIED[method.verified]})",
        "invariance": f"{method.invariance}: {INVARIANCE[method.invariance]}",
        "decoding": f"{method.decode}: {DECODE[method.decode]}",
        "needs": ", ".join(method.needs) or "hidden states only",
    }
    lines = [f"{method.name} ({method.kind})"]
    lines += [f"  {key:<11} {value}" for key, value in facts.items()]
    call = f"{method.target.__module__}.{method.target.__name__}"
    call += str(inspect.signature(method.target)).replace("fastmoe_route.routers.base.", "")
    return "\n".join([*lines, "", call, "", inspect.getdoc(method.target) or ""])


def print_methods(name: str | None, kind: str | None) -> int:
    """Prints the list, or one description; returns the exit code."""
    if name is None:
        found = methods(kind)
        if not found:
            kinds = ", ".join(sorted({method.kind for method in methods()}))
            print(f"routers: --kind must be one of {kinds}, got {kind!r}", file=sys.stderr)
            return 2
        print(table(found))
        return 0
    try:
        print(description(find(name)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
