"""Environment variables of the package: which there are, and the log level."""

from __future__ import annotations

import difflib
import logging
import os
import warnings

PREFIX = "FASTMOE_ROUTE_"
VARIABLES = {
    "FASTMOE_ROUTE_CUDA_GEMM": "sm80: products as on every GPU; native: sm_100a's own as well",
    "FASTMOE_ROUTE_CUTLASS_DIR": "where a build of the CUDA library finds CUTLASS",
    "FASTMOE_ROUTE_ISA": "the kernels' instruction set: portable, avx2, avx512, avx512_bf16 or amx",
    "FASTMOE_ROUTE_LIBRARY_DIR": "a folder to look in first for the compiled libraries",
    "FASTMOE_ROUTE_LOG_LEVEL": "debug, info, warning or error: messages on stderr",
    "FASTMOE_ROUTE_TORCH_DIR": "where a build of the package finds torch",
}
LEVELS = ("debug", "info", "warning", "error")

logger = logging.getLogger("fastmoe_route")


def read_environment() -> None:
    """Sets the log level and warns of variables that nothing reads.

    Raises:
        ValueError: `FASTMOE_ROUTE_LOG_LEVEL` names no level.
    """
    for name in os.environ:
        if name.startswith(PREFIX) and name not in VARIABLES:
            ends = [known.removeprefix(PREFIX) for known in VARIABLES]
            near = difflib.get_close_matches(name.removeprefix(PREFIX).upper(), ends, n=1)
            hint = f"did you mean {PREFIX}{near[0]}?" if near else "known: " + ", ".join(VARIABLES)
            warnings.warn(f"fastmoe_route: nothing reads {name}; {hint}", stacklevel=3)
    level = os.environ.get("FASTMOE_ROUTE_LOG_LEVEL", "")
    if level:
        if level.lower() not in LEVELS:
            raise ValueError(
                f"fastmoe_route: FASTMOE_ROUTE_LOG_LEVEL must be one of {', '.join(LEVELS)}, "
                f"got {level}"
            )
        logger.setLevel(level.upper())
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("fastmoe_route %(levelname)s: %(message)s"))
            logger.addHandler(handler)
            logger.propagate = False
