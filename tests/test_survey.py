"""The survey is complete: every row is registered, and elementwise scores keep a token's bits."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from fastmoe_route.methods import methods
from fastmoe_route.routers import scores
from tolerance import assert_bound

ROWS = (
    *(f"R{i}" for i in range(1, 71)),
    *(f"L{i}" for i in range(1, 10)),
    *(f"X{i}" for i in range(1, 15)),
)


def test_every_row_has_a_method():
    found = {method.row for method in methods()}
    assert [row for row in ROWS if row not in found] == []
    assert found <= set(ROWS)


def test_sources_are_given():
    sources = {method.name: method.source for method in methods()}
    odd = {n: s for n, s in sources.items() if not re.fullmatch(r"arXiv:\d{4}\.\d{4,5}", s)}
    assert all(odd.values()), odd
    for method in methods():
        text = inspect.getdoc(method.target)
        assert f"Source: {method.source}" in text, method.name
        assert "Args:" in text, method.name


@pytest.mark.parametrize(
    ("ours", "torchs"), [(scores.sigmoid, torch.sigmoid), (scores.gelu, torch.nn.functional.gelu)]
)
def test_elements_have_the_same_bits_in_any_tensor(ours, torchs):
    x = 3 * torch.randn(4099, generator=torch.Generator().manual_seed(0))
    whole = ours(x)
    assert torch.equal(whole, torch.cat([ours(part) for part in x.split(7)]))
    assert_bound(whole, torchs(x.double()), 5e-7)
    wide = torch.tensor([-200.0, 0.0, 200.0], requires_grad=True)
    ours(wide).sum().backward()
    assert wide.grad.isfinite().all()
    assert torch.autograd.gradcheck(ours, (x[:9].double().requires_grad_(),))
