"""Tests against transformers and its companions: `make test-clients` makes their environment."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

if find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def registered() -> None:
    from fastmoe_route.integrations.transformers import register

    assert register() == "fastmoe_route"
