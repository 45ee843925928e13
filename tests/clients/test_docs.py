"""The snippets of docs/clients.md that need transformers run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

from clients.models import causal_model

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"


def test_transformers_snippet_runs():
    blocks = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.S)
    (block,) = [block for block in blocks if "integrations.transformers" in block]
    names = {"model": causal_model("mixtral")}
    exec(block, names)
    assert names["model"].config._experts_implementation == "fastmoe_route"
    assert set(names["explain"](names["model"]).values()) == {"fused swiglu"}
