"""The house itself: every op is complete, the build lists what is there, levels do not leak."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FunctionType

import fastmoe_route
import pytest
import torch
from fastmoe_route import reference

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PYTHON = ROOT / "python" / "fastmoe_route"
PTXVM = ROOT / "tools" / "ptxvm"
NAMESPACE = "fastmoe_route"
LEVELS = ("portable", "avx2", "avx512", "bf16")
SUFFIXES = ("_forward", "_backward", "_wgrad", "_out")

MAX_LINES = 600
MAX_FUNCTION_LINES = 75
MAX_COLUMNS = {".cpp": 120, ".h": 120, ".cu": 120, ".cuh": 120, ".py": 100, ".sh": 120}
HEADINGS = ("literals", "reference", "gradients", "registration", "edges", "layouts", "errors")


def sources(*suffixes: str) -> list[Path]:
    folders = ("csrc", "python", "tests", "tools", "bench", "examples", "docs")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(path for path in found if path.suffix in suffixes and path.is_file())


@cache
def schemas() -> dict[str, str]:
    """The ops of csrc/library.cpp, each with the types it returns."""
    found = re.findall(
        r'm\.def\(\s*"(\w+)\([^"]*\) -> ([^"]+)"', (CSRC / "library.cpp").read_text()
    )
    assert found
    assert len(found) == len(dict(found))
    return dict(found)


@cache
def stem_of() -> dict[str, str]:
    """The host file that registers each op, without its ending."""
    stems = {}
    for path in sorted((CSRC / "ops").glob("*.cpp")):
        for name in re.findall(r'm\.impl\(\s*"(\w+)"', path.read_text()):
            assert stems.get(name, path.stem) == path.stem, f"{name} is registered in two files"
            stems[name] = path.stem
    return stems


def public_ops() -> list[str]:
    """The ops that users call: no twins, no backward passes, no probes of the machine."""
    return [
        name
        for name in schemas()
        if not name.endswith(SUFFIXES) and not name.startswith("machine_")
    ]


# ---- every op is complete ----------------------------------------------------------------------


@pytest.mark.parametrize("name", schemas())
def test_op_has_contract_and_host_file(name: str) -> None:
    assert name in stem_of(), "no host file registers it"
    header = CSRC / "ops" / f"{stem_of()[name]}.h"
    assert header.exists()
    assert re.search(r"namespace cpu \{", header.read_text()), "the header declares no entry point"


@pytest.mark.parametrize("name", schemas())
def test_op_has_a_kernel_where_it_says(name: str) -> None:
    keys = ("CPU", "CompositeExplicitAutograd")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert any(has(f"{NAMESPACE}::{name}", key) for key in keys)


@pytest.mark.parametrize("name", [name for name, types in schemas().items() if "Tensor" in types])
def test_op_has_a_fake_kernel(name: str) -> None:
    entry = torch._library.simple_registry.singleton.find(f"{NAMESPACE}::{name}")
    assert entry.fake_impl.kernel is not None


@pytest.mark.parametrize("name", [name for name in schemas() if f"{name}_forward" in schemas()])
def test_op_with_a_bare_twin_has_autograd(name: str) -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"{NAMESPACE}::{name}", "Autograd")
    assert not has(f"{NAMESPACE}::{name}_forward", "Autograd")


@pytest.mark.parametrize("name", public_ops())
def test_op_is_public_and_has_a_reference(name: str) -> None:
    function = getattr(fastmoe_route, name)
    assert name in fastmoe_route.__all__
    assert callable(getattr(reference, name))
    for part in ("Args:", "Returns:", "Raises:", ">>> "):
        assert part in (function.__doc__ or ""), f"the docstring has no {part}"


@pytest.mark.parametrize("name", public_ops())
def test_op_has_kernel_and_test_files(name: str) -> None:
    stem = stem_of()[name]
    assert (CSRC / "cpu" / f"{stem}.cpp").exists()
    tests = [*(ROOT / "tests").glob(f"test_{stem}*.py"), *(ROOT / "tests").glob(f"test_{name}*.py")]
    assert tests, f"no tests/test_{stem}*.py"
    text = "".join(path.read_text().lower() for path in tests)
    headings = " ".join(re.findall(r"^# ---- .*", text, re.M))
    wanted = set(HEADINGS) if f"{name}_forward" in schemas() else {*HEADINGS} - {"gradients"}
    assert {word for word in wanted if word not in headings} == set()
    assert re.search(rf"\b{name}\b", text)


@pytest.mark.parametrize("name", public_ops())
def test_op_has_a_row_in_the_readme(name: str) -> None:
    assert f"\n| `{name}` |" in (ROOT / "README.md").read_text()


def test_python_registers_only_ops_that_exist() -> None:
    text = "".join(path.read_text() for path in PYTHON.rglob("*.py"))
    named = re.findall(r'register_(?:fake|autograd)\(\s*"(?:fastmoe_route::)?(\w+)"', text)
    in_python = re.findall(r'define\(\s*"(\w+)\(', text)  # in plain torch, for every device
    assert set(in_python).isdisjoint(schemas())
    assert set(named) <= {*schemas(), *in_python}


# ---- every public function says what it takes, returns and raises -------------------------------

MODULES = (
    *("adapters", "audit", "distributed", "integrations.transformers", "invariance", "losses"),
    *("methods", "nn", "routers", "routers.estimators", "softmax_variants"),
)
RAISES_NOTHING = {"methods"}


def public_functions() -> dict[str, FunctionType]:
    found = {}
    for module in (import_module(f"{NAMESPACE}.{name}") for name in MODULES):
        own = [name for name, value in vars(module).items() if not name.startswith("_")]
        for name in getattr(module, "__all__", own):
            value = getattr(module, name)
            if inspect.isfunction(value) and value.__module__.startswith(module.__name__):
                found[f"{value.__module__}.{name}".removeprefix(f"{NAMESPACE}.")] = value
    return found


@pytest.mark.parametrize("name", public_functions())
def test_function_says_what_it_takes_returns_and_raises(name: str) -> None:
    function = public_functions()[name]
    text, signature = inspect.getdoc(function) or "", inspect.signature(function)
    missing = []
    if signature.parameters and "Args:" not in text:
        missing.append("Args")
    if signature.return_annotation not in (None, "None") and "Returns:" not in text:
        missing.append("Returns")
    if "Raises:" not in text and function.__name__ not in RAISES_NOTHING:
        missing.append("Raises")
    assert missing == []


# ---- the build lists what is there -------------------------------------------------------------


def test_cmake_lists_every_source() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    listed = set(re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", text))
    found = sources(".cpp", ".cu")
    assert listed == {str(path.relative_to(ROOT)) for path in found if CSRC in path.parents}
    text = (PTXVM / "CMakeLists.txt").read_text()
    listed = set(re.findall(r"\b[\w/]+\.(?:cpp|cu)\b", text))
    assert listed == {
        str(path.relative_to(PTXVM))
        for path in found
        if PTXVM in path.parents and path.parent.name != "tests"
    }


def test_every_header_is_included_somewhere() -> None:
    text = "".join(path.read_text() for path in sources(".cpp", ".h", ".cu", ".cuh"))
    included = set(re.findall(r'#include "([\w/]+\.(?:h|cuh))"', text))
    roots = (CSRC, PTXVM)
    found = {
        str(path.relative_to(root))
        for path in sources(".h", ".cuh")
        for root in roots
        if root in path.parents
    }
    assert found == included


def test_host_files_are_the_only_ones_that_know_torch() -> None:
    folders = (CSRC / "cpu", CSRC / "cuda")
    kernels = [*(path for f in folders for path in f.rglob("*")), *(CSRC / "ops").glob("*.h")]
    for path in kernels:
        if path.is_file():
            assert not re.search(
                r"#include [<\"](torch/|common/(check|tensor|launch))", path.read_text()
            ), path


def test_every_cuda_return_code_is_looked_at() -> None:
    """Runtime and CUB calls give their code to `status_of`; `launched()` follows every launch."""
    found = []
    for path in sources(".cu", ".cuh"):
        if CSRC not in path.parents:
            continue
        code = re.sub(r"//.*", "", path.read_text())
        taken = re.compile(r"(status_of\(|\(void\)|const cudaError_t error =)\s*$")
        for call in re.finditer(r"\b(cuda[A-Z]\w+|cub::Device\w+::\w+)\(", code):
            if call[1] != "cudaGetErrorString" and not taken.search(code[: call.start()]):
                found.append(f"{path.name}: {call[1]}")
        for launch in re.finditer("<<<", code):
            if "launched()" not in code[launch.end() : code.find("\n}\n", launch.end())]:
                found.append(f"{path.name}:{code.count(chr(10), 0, launch.start()) + 1}")
    assert found == []


# ---- levels do not leak ------------------------------------------------------------------------
# Each level is compiled from the same sources with its own instructions. A symbol that two levels
# define under one name is merged by the linker, and a small processor might run wide instructions.


@cache
def level_objects() -> dict[str, list[Path]]:
    """The objects of the newest build tree, by level."""
    trees = [ROOT / "build" / "Release", *sorted((ROOT / "build").glob("*"))]
    for tree in trees:
        found = {
            level: sorted((tree / "CMakeFiles" / f"cpu_{level}.dir").rglob("*.o"))
            for level in LEVELS
        }
        if found["portable"]:
            return found
    return {}


def defined_symbols(path: Path) -> list[str]:
    """The mangled names of every external symbol that an object defines, each with its kind."""
    command = ["nm", "--extern-only", "--defined-only", str(path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split(" ", 1)[1] for line in lines if " " in line]


@pytest.mark.parametrize("level", LEVELS)
def test_level_defines_nothing_outside_its_namespace(level: str) -> None:
    if not shutil.which("nm"):
        pytest.skip("no nm: binutils is not installed")
    if not level_objects().get(level):
        pytest.skip(f"no objects of {level} under build/: the package was not built in this tree")
    own = re.compile(rf"13{NAMESPACE}{len(level)}{level}|NS_{len(level)}{level}")
    leaks = [
        f"{path.name}: {symbol}"
        for path in level_objects()[level]
        for symbol in defined_symbols(path)
        if not own.search(symbol) and "DW.ref." not in symbol
    ]
    assert leaks == []


# ---- size and language -------------------------------------------------------------------------


def test_no_file_is_long() -> None:
    kinds = (".cpp", ".h", ".cu", ".cuh", ".py")
    lengths = {path: len(path.read_text().splitlines()) for path in sources(*kinds)}
    assert {path.name: n for path, n in lengths.items() if n > MAX_LINES} == {}


def test_no_function_is_long() -> None:
    """Lines of a Python function's body; a docstring may be as long as it has to say."""
    long = {}
    for path in sources(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                if lines > MAX_FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}: {node.name}"] = lines
    assert long == {}


def test_no_line_is_wide() -> None:
    wide = []
    for path in sources(*MAX_COLUMNS):
        if path.name == "library.cpp":  # a schema is one line
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > MAX_COLUMNS[path.suffix]:
                wide.append(f"{path.relative_to(ROOT)}:{number}")
    assert wide == []


def test_comments_hold_no_plans() -> None:
    marks = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources(".cpp", ".h", ".cu", ".cuh", ".py", ".sh")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if marks.search(line)
    ]
    assert found == []


def test_comments_say_what_is_true_not_what_changed() -> None:
    change = re.compile(r"(//|#).*\b(used to be|was changed|formerly|at the moment)\b", re.I)
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources(".cpp", ".h", ".cu", ".cuh", ".py")
        if path.name != Path(__file__).name
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if change.search(line)
    ]
    assert found == []


def test_one_version_everywhere() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert fastmoe_route.__version__ == version
    assert f"## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
