"""Everything the documentation shows is run: snippets, docstring examples, commands it names."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shutil
from pathlib import Path

import fastmoe_route
import pytest
import torch
from scripts import script

ROOT = Path(__file__).resolve().parent.parent
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md")]
PAGES = sorted([*TOP, *(ROOT / "docs").rglob("*.md")])
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules() -> list[str]:
    """Every module of the package whose import does not start a program."""
    found = pkgutil.walk_packages(fastmoe_route.__path__, "fastmoe_route.")
    names = [module.name for module in found]
    return ["fastmoe_route", *(n for n in names if not n.endswith(("__main__", "_cpu", "_cuda")))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_snippets(page: Path) -> None:
    results = doctest.testfile(str(page), module_relative=False, optionflags=OPTIONS)
    assert results.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_snippet_is_a_doctest(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        assert block.startswith(">>> "), block
        assert block.endswith("\n\n") or not block.rstrip().splitlines()[-1], block


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    torch.manual_seed(0)
    results = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert results.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_targets_and_files_exist(page: Path) -> None:
    text = page.read_text()
    makefile = (ROOT / "Makefile").read_text()
    commands = " ".join(re.findall(r"`[^`]+`|^make .*", text, re.M))
    for target in re.findall(r"\bmake ([a-z][a-z-]+)", commands):
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
    for path in re.findall(r"`((?:csrc|python|tests|tools|bench|examples|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(?:results/)?([\w-]+\.json)`", text):
        assert (ROOT / "bench" / "results" / name).exists(), name


@pytest.mark.parametrize(
    ("page", "tool"), [("README.md", "readme_numbers"), ("docs/experts.md", "experts_numbers")]
)
def test_numbers_of_a_page_are_those_of_its_reports(page: str, tool: str) -> None:
    """If they are not, run the tool; tests/test_gpu_check.py has that of docs/gpu.md."""
    text = (ROOT / page).read_text()
    with script("tools", tool) as numbers:
        assert numbers.filled(text) == text


def test_the_headline_has_a_line_for_every_processor_with_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with script("tools", "readme_numbers") as numbers:
        for name in (numbers.QUICK, *numbers.GPUS):
            shutil.copy(numbers.RESULTS / name, tmp_path)
        monkeypatch.setattr(numbers, "RESULTS", tmp_path)
        assert "Intel Xeon" not in numbers.headline()
        shutil.copy(tmp_path / numbers.QUICK, tmp_path / "xeon-2t-gate.json")
        amd, intel, h100, h200 = numbers.headline().splitlines()[-4:]
    assert h100.startswith("| GPU: NVIDIA H100 80GB HBM3, bfloat16 | ")
    assert h200.startswith("| GPU: NVIDIA H200, bfloat16 | ")
    label = "CPU: Intel Xeon, 2 threads"
    assert intel == amd.replace("CPU: AMD EPYC, 2 threads", label) != amd


def test_a_page_without_the_place_is_refused() -> None:
    with script("tools", "pages") as pages:
        assert pages.fill("a <!-- x:begin -->old<!-- x:end --> b", "x", "new\n") == (
            "a <!-- x:begin -->\n\nnew\n\n<!-- x:end --> b"
        )
        for text in ("nothing", "<!-- x:begin --> never ends"):
            with pytest.raises(ValueError, match="the page has no place `x`"):
                pages.fill(text, "x", "new")


def test_commands_in_the_readme_are_understood() -> None:
    from fastmoe_route import cli

    parser = cli.parser()
    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"^python -m fastmoe_route (.*)$", text, re.M)
    assert lines
    for line in lines:
        parser.parse_args(line.split("#")[0].split())
