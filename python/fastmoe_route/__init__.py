"""Fast Mixture-of-Experts dispatch for PyTorch."""

from fastmoe_route._load import load_libraries

load_libraries()

__version__ = "0.1.0"
