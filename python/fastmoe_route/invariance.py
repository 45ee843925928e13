"""What the result of a token may depend on, as a tag that routers and plans carry."""

from __future__ import annotations

from typing import Any

from fastmoe_route._arguments import check_choice, check_flag, check_int, fail
from fastmoe_route.dispatch import DROP_POLICIES
from fastmoe_route.reroute import OVERFLOWS, check_fill

# The tags, from the most independent to the least.
INVARIANCE = {
    "I": "a token's result depends on the token and on frozen state only",
    "S": "depends on the token's own sequence",
    "C": "as I, unless a capacity binds",
    "B*": "depends on the batch in training only",
    "B": "depends on the batch",
}
_ALLOWED_IN_SERVING = ("I", "S", "B*")


def dispatch_invariance(
    routing: str = "I",
    *,
    capacity: int | None = None,
    scoped: bool = False,
    drop_policy: str = "position",
    overflow: str = "drop",
    fill: str | None = None,
) -> str:
    """The tag of a layer: what its router depends on, and what its dispatch adds.

    | tag | the result of a token depends on |
    |---|---|
    | `I` | the token itself |
    | `S` | its own sequence, or request |
    | `C` | the batch, where a capacity binds |
    | `B*` | the batch, in training only |
    | `B` | the batch |

    Without capacity dispatch adds nothing. A capacity per request adds `S`. A shared one adds `C`,
    or `B` where later tokens of the batch decide about earlier ones (`drop_policy="score"`) or
    free room is filled. The worse of the two tags is the result, in the order of the table; `C`
    and `B*` together are `B`.

    Args:
        routing: the tag of the router.
        capacity: as given to `plan_dispatch` or `reroute`; None for none.
        scoped: whether every request has a scope of its own.
        drop_policy: `position` or `score`.
        overflow: of `reroute`: `drop`, `next` or `local`. None of them changes the tag.
        fill: of `reroute`: None, `turned_away` or `any`.

    Returns:
        One of `I`, `S`, `C`, `B*`, `B`.

    Raises:
        TypeError: `capacity` is no int, or `scoped` no bool.
        ValueError: an argument is out of range.

    >>> dispatch_invariance("I"), dispatch_invariance("I", capacity=4)
    ('I', 'C')
    >>> dispatch_invariance("I", capacity=4, scoped=True)
    'S'
    """
    op = "dispatch_invariance"
    check_choice(op, "routing", routing, tuple(INVARIANCE))
    check_choice(op, "drop_policy", drop_policy, DROP_POLICIES)
    check_choice(op, "overflow", overflow, OVERFLOWS)
    check_fill(op, fill)
    check_flag(op, "scoped", scoped)
    if capacity is None:
        return routing
    check_int(op, "capacity", capacity, 1)
    if scoped:
        added = "S"
    elif drop_policy == "score" or fill is not None:
        added = "B"
    else:
        added = "C"
    if {routing, added} == {"B*", "C"}:
        return "B"
    return max(routing, added, key=list(INVARIANCE).index)


def check_servable(tag: Any, what: str = "the layer") -> None:
    """Refuses what lets one request change another's result.

    Args:
        tag: from a router or `dispatch_invariance`.
        what: named in the error.

    Raises:
        ValueError: the tag is `C` or `B`, or none at all.

    >>> check_servable("S")
    >>> check_servable("C", "Switch")
    Traceback (most recent call last):
    ValueError: check_servable: Switch must be I, S or B* to serve several requests in one \
batch, got 'C': use capacity=None or one scope per request
    """
    if tag not in _ALLOWED_IN_SERVING:
        rule = "be I, S or B* to serve several requests in one batch"
        fix = "use capacity=None or one scope per request"
        fail(ValueError, "check_servable", what, rule, f"{tag!r}: {fix}")
