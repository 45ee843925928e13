"""use_huge_pages: the same weights in the same place."""

from __future__ import annotations

from pathlib import Path

import fastmoe_route as fr
import pytest
import torch

MEGABYTE = 1 << 20


def on_huge_pages() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages"))


def test_values_and_addresses_stay():
    layer = torch.nn.Linear(1024, 4096)  # 16 MB
    before = layer.weight.detach().clone()
    address, huge = layer.weight.data_ptr(), on_huge_pages()
    moved = fr.use_huge_pages(layer)
    assert layer.weight.data_ptr() == address
    assert torch.equal(layer.weight, before)
    assert moved % (2 * MEGABYTE) == 0
    assert moved <= 16 * MEGABYTE
    if moved:  # the system has huge pages to give
        assert on_huge_pages() - huge >= moved // 2
        assert fr.use_huge_pages(layer.weight) == moved


def test_a_storage_counts_once():
    weight = torch.zeros(8, 1024, 512)
    assert fr.use_huge_pages(weight, weight.transpose(1, 2), weight[3]) == fr.use_huge_pages(weight)


@pytest.mark.parametrize(
    "weight",
    [torch.ones(3), torch.empty(0), torch.ones(1 << 20, device="meta"), torch.ones(9).to_sparse()],
    ids=["small", "empty", "meta", "sparse"],
)
def test_nothing_to_move(weight):
    assert fr.use_huge_pages(weight) == 0


def test_errors():
    with pytest.raises(
        TypeError, match="use_huge_pages: weights must be tensors or modules, got 3"
    ):
        fr.use_huge_pages(torch.ones(2), 3)
