"""Examples and tools of the checkout as modules: files to run, which are no part of the package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def script(folder: str, name: str) -> Iterator[ModuleType]:
    """`folder/name.py` as a module; what it imports from beside itself goes with it."""
    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(ROOT / folder))
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    own = {file.stem for file in (ROOT / folder).glob("*.py")}
    for stem in (own & set(sys.modules)) - known:
        del sys.modules[stem]
