"""use_huge_pages: the same weights in the same place."""

from __future__ import annotations

from pathlib import Path

import fastmoe_route as fr
import pytest
import torch

MEGABYTE = 1 << 20


def on_huge_pages(weight: torch.Tensor) -> int:
    """Bytes on huge pages in the mappings of memory where the weight lies."""
    begin, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    found, is_here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            low, high = (int(bound, 16) for bound in first.split("-"))
            is_here = low < end and begin < high
        elif is_here and first == "AnonHugePages:":
            found += int(line.split()[1]) << 10
    return found


def test_values_and_addresses_stay():
    layer = torch.nn.Linear(1024, 4096)  # 16 MB
    before = layer.weight.detach().clone()
    address = layer.weight.data_ptr()
    moved = fr.use_huge_pages(layer)
    assert layer.weight.data_ptr() == address
    assert torch.equal(layer.weight, before)
    assert moved % (2 * MEGABYTE) == 0
    assert moved <= 16 * MEGABYTE
    if moved:  # the system has huge pages to give
        assert on_huge_pages(layer.weight) >= moved // 2
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
