"""Loads the compiled library that lies beside this package."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from fastmoe_route._environment import logger


def find_library(name: str) -> Path | None:
    """The file of a library along the package's paths (an editable install has two).

    The environment variable FASTMOE_ROUTE_LIBRARY_DIR names a folder to look in first: a sanitizer
    build, say, or a build tree.
    """
    import fastmoe_route

    override = os.environ.get("FASTMOE_ROUTE_LIBRARY_DIR")
    for folder in [*([override] if override else []), *fastmoe_route.__path__]:
        path = Path(folder) / f"{name}.so"
        if path.exists():
            return path
    return None


def cuda_policy(library: Path) -> tuple[list[str], list[list[str]]]:
    """What a CUDA library was compiled for, and which kernel multiplies what there.

    Asks the library itself, which loads where there is no GPU.

    Returns:
        architectures, and rows `[device, dtype, product, shape, kernel]`.
    """
    loaded = ctypes.CDLL(str(library))
    texts = []
    for name in ("fastmoe_route_cuda_architectures", "fastmoe_route_cuda_policy"):
        function = getattr(loaded, name)
        function.restype = ctypes.c_char_p
        texts.append(function().decode())
    return texts[0].split(), [line.split("\t") for line in texts[1].splitlines()]


def load_libraries() -> None:
    """Registers the operators: the CPU library always, the CUDA one where torch has CUDA.

    Raises:
        ImportError: if the CPU library is missing, with what to do about it.
    """
    cpu = find_library("fastmoe_route_cpu")
    if cpu is None:
        raise ImportError(
            "fastmoe_route: the compiled library fastmoe_route_cpu.so is missing.\n"
            "Install the wheel, or build in place with: pip install --no-build-isolation -e ."
        )
    torch.ops.load_library(str(cpu))
    logger.info("loaded %s", cpu)
    if torch.version.cuda is not None:
        cuda = find_library("fastmoe_route_cuda")
        if cuda is not None:
            torch.ops.load_library(str(cuda))
            logger.info("loaded %s", cuda)
