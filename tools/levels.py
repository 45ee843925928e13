"""Prints the instruction sets this processor has besides the one the library chooses by itself."""

from __future__ import annotations

import fastmoe_route  # noqa: F401  registers the operators
import torch

LEVELS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]


def main() -> None:
    info = dict(item.split("=") for item in torch.ops.fastmoe_route.machine_info().split(";"))
    print(*LEVELS[: LEVELS.index(info["best_level"])])


if __name__ == "__main__":
    main()
