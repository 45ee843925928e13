"""Prints the instruction sets this processor has besides the one the library chooses by itself."""

from __future__ import annotations

from fastmoe_route.bench.machine import LEVELS, library_info


def main() -> None:
    print(*LEVELS[: LEVELS.index(library_info()["best_level"])])


if __name__ == "__main__":
    main()
