"""Initial weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def draw_normal(weight: Tensor, std: float = 1.0, generator: torch.Generator | None = None) -> None:
    """Fills a weight with normal numbers of mean 0, unless it is on the meta device."""
    if not weight.is_meta:  # torch would import its compiler, seconds, to find that out
        nn.init.normal_(weight, std=std, generator=generator)
