"""tools/gpu_check.py where there is no GPU: what it says, what it would run, and its rehearsal."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import vm_backend

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import gpu_bench  # noqa: E402
import gpu_check  # noqa: E402

# Test files that need no tensors on a GPU, or the engine of the PTX virtual machine.
NOT_FOR_A_GPU = {"native_products"}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    return gpu_check.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 2
    said = capsys.readouterr()
    assert "gpu-check needs a CUDA GPU, and torch sees none here" in said.err
    assert "Nothing was checked." in said.err
    assert said.out == ""


def test_the_suite_is_that_of_every_op_with_a_cuda_path() -> None:
    wanted = {*vm_backend.stems(), *vm_backend.MORE_FILES} - NOT_FOR_A_GPU
    named = {re.fullmatch(r"tests/test_(\w+)\.py", path)[1] for path in gpu_check.SUITE}
    assert named == wanted
    assert all((ROOT / path).exists() for path in gpu_check.SUITE)


@pytest.mark.parametrize("sanitizer", ["/usr/bin/compute-sanitizer", None])
def test_every_part_runs_even_if_others_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sanitizer: str | None
) -> None:
    """On a GPU that is not there: the parts themselves are replaced by what notes them."""
    ran: list[str] = []

    def note(name: str, result: object = True) -> object:
        ran.append(name)
        if name == "dispatcher":
            raise RuntimeError("broken")
        return result

    def pytest_run(arguments: list[str], prefix: list[str] | None = None, **given: str) -> bool:
        return bool(note(" ".join(prefix[:3]) if prefix else f"suite {given}", arguments != []))

    monkeypatch.setattr(gpu_check, "find_no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: sanitizer)
    monkeypatch.setattr(gpu_check, "pytest_run", pytest_run)
    monkeypatch.setattr(gpu_check, "check_dispatcher", lambda device: note("dispatcher"))
    monkeypatch.setattr(gpu_check, "check_races", lambda tool: note(f"{tool} --tool racecheck"))
    monkeypatch.setattr(gpu_check, "check_graphs", lambda shape: note("graphs"))
    monkeypatch.setattr(gpu_check, "check_products", lambda folder: note("products"))
    monkeypatch.setattr(gpu_check, "check_routers", lambda device: note("routers"))
    monkeypatch.setattr(gpu_check, "check_compile", lambda device: note("compile"))
    monkeypatch.setattr(gpu_check, "check_nccl", lambda: note("nccl"))
    monkeypatch.setattr(gpu_check, "run_bench", lambda *_: note("bench", {}))
    assert run(monkeypatch) == 1
    tools = [f"{sanitizer} --tool {kind}" for kind in ("memcheck", "racecheck") if sanitizer]
    suites = ["suite {}", "suite {'FASTMOE_ROUTE_CUDA_GEMM': 'sm80'}"]
    own = ["graphs", "routers", "compile", "nccl", "products", "bench"]
    assert ran == ["dispatcher", *suites, *tools, *own]
    printed = capsys.readouterr().out
    assert "FAILED  dispatcher" in printed
    assert printed.count("passed  ") == len(ran) - 1
    assert ("compute-sanitizer is left out: not installed" in printed) == (sanitizer is None)


def test_the_nccl_part_has_a_test_to_run() -> None:
    """Which is skipped without a GPU; an error code would say that none was chosen."""
    assert gpu_check.check_nccl()


def test_rehearsal_on_the_processor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every function that would be captured in a graph, its gradient, and the bench."""
    assert run(monkeypatch, "--rehearse", "--json", str(tmp_path / "report.json")) == 0
    printed = capsys.readouterr().out
    assert "FAILED" not in printed
    for part in ("dispatcher", "gradients", "bench"):
        assert f"passed  {part}" in printed
    assert (tmp_path / "report.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_part_of_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--rehearse", "--only", "dispatcher") == 0
    assert capsys.readouterr().out.count("passed  ") == 1
    with pytest.raises(SystemExit):
        run(monkeypatch, "--rehearse", "--only", "graph")
    assert "--only must name parts of dispatcher, gradients, bench" in capsys.readouterr().err


def test_the_page_holds_the_report_and_the_figure_can_be_drawn(tmp_path: Path) -> None:
    """docs/gpu.md is what tools/gpu_bench.py makes of the recorded report."""
    report = json.loads((ROOT / "bench/results/h200-bfloat16.json").read_text())
    page = (ROOT / "docs/gpu.md").read_text()
    assert gpu_bench.pages.fill(page, "numbers", gpu_bench.table(report)) == page
    gpu_bench.plot(report, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
