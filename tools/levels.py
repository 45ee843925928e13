"""Prints the instruction sets this processor has besides the one in use."""

from __future__ import annotations

from fastmoe_route.bench.machine import LEVELS, library_info


def main() -> None:
    info = library_info()
    offered = LEVELS[: LEVELS.index(info["best_level"]) + 1]
    print(*(level for level in offered if level != info["level"]))


if __name__ == "__main__":
    main()
