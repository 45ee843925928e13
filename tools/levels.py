"""Prints the instruction sets this processor has besides the one the library chooses by itself."""

from __future__ import annotations

from fastmoe_route.bench.machine import library_info

LEVELS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]


def main() -> None:
    print(*LEVELS[: LEVELS.index(library_info()["best_level"])])


if __name__ == "__main__":
    main()
