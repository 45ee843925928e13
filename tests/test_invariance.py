"""The tag of a layer: what its router depends on, and what its dispatch adds."""

from __future__ import annotations

import fastmoe_route as fr
import pytest


@pytest.mark.parametrize(
    ("arguments", "tag"),
    [
        ({}, "I"),
        ({"routing": "S"}, "S"),
        ({"capacity": 3}, "C"),
        ({"capacity": 3, "overflow": "next"}, "C"),
        ({"capacity": 3, "drop_policy": "score"}, "B"),
        ({"capacity": 3, "fill": "any"}, "B"),
        ({"capacity": 3, "scoped": True, "fill": "any"}, "S"),
        ({"capacity": 3, "routing": "B*"}, "B"),
        ({"capacity": 3, "routing": "B*", "scoped": True}, "B*"),
        ({"capacity": 3, "routing": "B", "scoped": True}, "B"),
        ({"fill": "any", "routing": "I"}, "I"),
    ],
)
def test_dispatch_invariance(arguments: dict, tag: str) -> None:
    assert fr.dispatch_invariance(**arguments) == tag
    if tag in ("C", "B"):
        with pytest.raises(ValueError, match="the layer must be I, S or B"):
            fr.check_servable(tag)
    else:
        fr.check_servable(tag)


def test_arguments() -> None:
    for call, kind, message in (
        (lambda: fr.dispatch_invariance("X"), ValueError, "dispatch_invariance: routing must be"),
        (lambda: fr.dispatch_invariance(capacity=0), ValueError, "capacity must be at least 1"),
        (lambda: fr.dispatch_invariance(fill="x"), ValueError, "fill must be None"),
        (lambda: fr.check_servable(None), ValueError, "the layer must be I, S or B"),
    ):
        with pytest.raises(kind, match=message):
            call()
