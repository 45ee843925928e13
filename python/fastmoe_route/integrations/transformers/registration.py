"""Entering the package into the registries of transformers, all of them or none."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import version

from fastmoe_route._environment import logger
from fastmoe_route.integrations.transformers.experts import experts_forward

NAME = "fastmoe_route"
_OLDEST = (5, 8)  # the first transformers whose models accept any registered name


def register() -> str:
    """Makes `"fastmoe_route"` an implementation of experts, and of expert parallelism, there.

    May be called any number of times. Everything needed is imported before anything is registered.

    Returns:
        The name, for `experts_implementation=` and `DistributedConfig(ep_implementation=...)`.

    Raises:
        ImportError: transformers is missing, older than 5.8, or does not import.
    """
    installed = _installed_version()
    needs = "fastmoe_route.integrations.transformers needs transformers 5.8 or newer, got "
    install = "; install it with: pip install 'transformers>=5.8'"
    try:
        interface = import_module("transformers.integrations.moe").ExpertsInterface
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{needs}{installed} ({error}){install}") from error
    numbers = tuple(map(int, re.findall(r"\d+", installed)[:2]))
    if numbers and numbers < _OLDEST:  # none: a transformers without its metadata
        raise ImportError(f"{needs}{installed}{install}")
    try:
        parallel = import_module("transformers.distributed.expert_parallel")
        from fastmoe_route.integrations.transformers.expert_parallel import implementation

        parallel_class = implementation()
    except (ImportError, AttributeError):
        parallel_class = None
        logger.info("this transformers has no registry of expert-parallel implementations")
    interface.register(NAME, experts_forward)
    if parallel_class is not None:
        parallel.EPImplementationInterface.register(NAME, parallel_class)
    return NAME


def _installed_version() -> str:
    try:
        return version("transformers")
    except ModuleNotFoundError:
        return "none"
