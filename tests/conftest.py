"""Options, the backend parameter, poisoned memory and guard zones of every test."""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cuda_backend
import pytest
import torch
import vm_backend
from torch import Tensor

# Files about the package as a whole, the same for every instruction set; beside these, tests of
# torch's own machinery around an op (vm_backend.NOT_KERNELS) are left out.
PACKAGE_FILES = {
    f"test_{name}.py"
    for name in (
        *("structure", "package", "readme", "bench", "cli", "example", "compare_routers"),
        *("environment", "nn", "distributed", "reference", "reference_gate", "tolerance"),
    )
}
# Tests that start every level themselves: running on every level does that already.
EVERY_LEVEL = "every_instruction_set"

GUARD_BYTES = 256


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--large", action="store_true", help="run the tests marked large as well")
    parser.addoption(
        "--kernels",
        action="store_true",
        help="run only what depends on the kernels: no package files, no compile, export, opcheck",
    )
    parser.addoption(
        "--backend",
        choices=("cpu", "vm", "cuda"),
        default="cpu",
        help="vm: the CUDA path in the PTX virtual machine, for the ops that have one; cuda: a GPU",
    )
    parser.addoption("--vm-seed", type=int, default=1, help="of the schedules of the vm backend")
    parser.addoption("--vm-shard", default="0/1", help="I/N: every N-th test of the vm, from I on")
    parser.addoption("--vm-record", type=Path, help="file for what the vm launched, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Fills fresh memory with 0x7f bytes: the largest float32 or bfloat16, NaN as float16.

    An output, a scratch buffer or padding that is read before it is written then wins every
    maximum and spoils every sum. glibc only; a sanitizer brings its own filling.
    """
    m_perturb, fill = -6, 0x7F
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(m_perturb, fill ^ 0xFF)
    if config.getoption("--backend") == "vm":
        vm_backend.load()
    if config.getoption("--backend") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--backend cuda needs a GPU and a torch that is built for it")
    if config.getoption("--backend") == "cuda":
        cuda_backend.load()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--large"):
        skip = pytest.mark.skip(reason="needs --large")
        for item in items:
            if "large" in item.keywords:
                item.add_marker(skip)
    if config.getoption("--backend") != "cpu":
        _select(config, items, vm_backend.takes)
        first, step = map(int, config.getoption("--vm-shard").split("/"))
        items[:] = items[first::step]
    elif config.getoption("--kernels"):
        _select(config, items, _tests_kernels)


def _select(
    config: pytest.Config, items: list[pytest.Item], takes: Callable[[pytest.Item], bool]
) -> None:
    chosen = [item for item in items if takes(item)]
    config.hook.pytest_deselected(items=[item for item in items if not takes(item)])
    items[:] = chosen


def pytest_sessionfinish(session: pytest.Session) -> None:
    record = session.config.getoption("--vm-record")
    if record is not None:
        record.write_text(json.dumps(vm_backend.record()))


def _tests_kernels(item: pytest.Item) -> bool:
    name = item.name.lower()
    return item.path.name not in PACKAGE_FILES and not any(
        word in name for word in (*vm_backend.NOT_KERNELS, EVERY_LEVEL)
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` is the device type of a test's tensors; those of the vm lie on the CPU."""
    if "backend" in metafunc.fixturenames:
        name = metafunc.config.getoption("--backend")
        metafunc.parametrize("backend", ["cuda" if name == "cuda" else "cpu"], ids=[name])


@pytest.fixture(autouse=True)
def no_reports(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the vm, a test fails on whatever the engine reported, also if the op's error was eaten."""
    if request.config.getoption("--backend") != "vm":
        yield
        return
    vm_backend.start(request.config.getoption("--vm-seed"))
    yield
    assert vm_backend.reports() == []


@pytest.fixture(params=["older", "newer"])
def allow_tf32(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """`allow_tf32()` lets torch's float32 products round to tf32 until the end of the test.

    By each of torch's two settings; a program that has used the newer may not read the older.
    """
    products = torch.backends.cuda.matmul
    if request.param == "older":
        yield lambda: torch.set_float32_matmul_precision("high")
        torch.set_float32_matmul_precision("highest")
    else:
        before = products.fp32_precision

        def allow() -> None:
            products.fp32_precision = "tf32"

        yield allow
        products.fp32_precision = before


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`threads(n)` sets the number of torch's threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def guarded() -> Iterator[Callable[[Tensor], Tensor]]:
    """`guarded(x)` is `x` between two poisoned zones; at the end nothing may have been written.

    The zones hold the largest value of the dtype, so reading them shows as well. The start is one
    element past an aligned address.
    """
    kept: list[tuple[Tensor, Tensor]] = []

    def guard(x: Tensor) -> Tensor:
        pad = GUARD_BYTES // x.element_size()
        info = torch.finfo if x.is_floating_point() else torch.iinfo
        largest = 1 if x.dtype == torch.bool else info(x.dtype).max
        store = torch.full((x.numel() + 2 * pad + 1,), largest, dtype=x.dtype, device=x.device)
        view = store[pad + 1 : pad + 1 + x.numel()].view(x.shape)
        view.copy_(x)
        kept.append((store, store.clone()))
        return view.requires_grad_(x.requires_grad)

    yield guard
    for store, before in kept:
        assert torch.equal(store.view(torch.uint8), before.view(torch.uint8)), (
            "an input or the memory around it was written"
        )


def _beside_hole(behind: bool) -> Iterator[Callable[[Tensor], Tensor]]:
    libc = ctypes.CDLL(None, use_errno=True)
    kept = []

    def place(x: Tensor) -> Tensor:
        size = x.numel() * x.element_size()
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
        hole = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + (0 if behind else pages)
        assert libc.mprotect(ctypes.c_void_p(hole), mmap.PAGESIZE, 0) == 0
        kept.append((memory, hole))
        offset = mmap.PAGESIZE if behind else pages - size
        flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset)
        return flat.view(x.shape).copy_(x)

    yield place
    for _, hole in kept:
        libc.mprotect(ctypes.c_void_p(hole), mmap.PAGESIZE, 3)


@pytest.fixture
def hole_after() -> Iterator[Callable[[Tensor], Tensor]]:
    """Copies a tensor so that its last byte is the last before a page nobody may touch."""
    yield from _beside_hole(behind=False)


@pytest.fixture
def hole_before() -> Iterator[Callable[[Tensor], Tensor]]:
    """Copies a tensor so that its first byte is the first behind a page nobody may touch."""
    yield from _beside_hole(behind=True)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent
