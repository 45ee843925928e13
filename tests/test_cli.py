"""The command line: help, info, exit codes."""

import json
import subprocess
import sys

import fastmoe_route as fr
import pytest
import torch
from fastmoe_route import cli
from fastmoe_route.bench import runner


@pytest.fixture
def fast_limits(monkeypatch):
    """Spares the bench the measurement of the machine."""

    def probe(self, seconds=0.0):
        self.peak = {"float32": 1e11, "bfloat16": 1e11}
        self.read = self.copy = self.level1 = self.level2 = 1e10

    monkeypatch.setattr(runner.Limits, "probe", probe)
    monkeypatch.setattr(runner.Limits, "probe_torch", lambda self: None)


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return int(stop.value.code)


@pytest.mark.parametrize("arguments", [("--help",), ("bench", "--help"), ("info", "--help")])
def test_help(arguments, capsys):
    assert exit_code(*arguments) == 0
    assert "usage: python -m fastmoe_route" in capsys.readouterr().out


def test_bench_help_names_shapes_and_examples(capsys):
    exit_code("bench", "--help")
    text = capsys.readouterr().out
    for word in ("--quick", "--json FILE", "qwen3 (2048,768,128,8)", "examples:", "moe_mlp",
                 "e256-dsv3 (256 columns, 8 taken; DeepSeek-V3's gate)"):  # fmt: skip
        assert word in text
    assert "time per row (default 1.5, quick 0.25)" in text


def test_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "fastmoe_route", "info", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report["fastmoe_route"] == fr.__version__
    assert report["torch"] == torch.__version__
    assert report["instruction_set"]
    assert report["cpu_library"].endswith("fastmoe_route_cpu.so")


def test_info_as_text(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"fastmoe_route {' ' * 11}{fr.__version__}\n")
    for word in ("instruction set", "threads", "cuda library", "cpu library", "python"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required"),
        (("bench", "--shape", "nonesuch"), "shape must be one of mixtral"),
        (("bench", "--tokens", "0"), "tokens must be positive"),
        (("bench", "--op", "conv"), "invalid choice: 'conv'"),
        (("bench", "--threads", "0"), "must be a positive whole number, got '0'"),
        (("bench", "--seconds", "nan"), "must be a positive number, got 'nan'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert exit_code(*arguments) == 2
    assert message in capsys.readouterr().err


def test_bench_writes_json(fast_limits, tmp_path, capsys):
    path = tmp_path / "deep" / "report.json"
    code = cli.main(
        ["bench", "--op", "gate", "--shape", "64,32,8,2", "--tokens", "8", "--dtype", "float32",
         "--seconds", "0.01", "--json", str(path)]
    )  # fmt: skip
    assert code == 0
    report = json.loads(path.read_text())
    assert [row["pass"] for row in report["rows"]] == ["forward", "training"]
    assert "2 rows right and timed, 0 wrong" in capsys.readouterr().out


def test_wrong_result_gives_exit_code_1(fast_limits, monkeypatch, capsys):
    right = fr.plan_dispatch

    def wrong(*arguments, **options):
        plan = right(*arguments, **options)
        return plan._replace(row_to_slot=plan.row_to_slot.flip(0))

    monkeypatch.setattr(fr, "plan_dispatch", wrong)
    code = cli.main(
        ["bench", "--op", "plan_dispatch", "--shape", "64,32,8,2", "--tokens", "8", "--dtype",
         "float32"]
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 1
    assert "WRONG: row_to_slot" in out
    assert "*** 1 WRONG RESULT(S)" in err


def test_nothing_to_run(fast_limits, capsys):
    assert cli.main(["bench", "--op", "moe_mlp", "--shape", "e64"]) == 2
    assert "nothing to run" in capsys.readouterr().err


def test_plot_without_matplotlib(fast_limits, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["bench", "--op", "gate", "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install 'fastmoe-route[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--plot", "x.xyz", "bench: --plot must end in one of ."),
        ("--plot", "x", "bench: --plot must end in one of ."),
        ("--json", ".", "Is a directory"),
    ],
)
def test_files_are_refused_before_anything_is_measured(
    option, name, message, monkeypatch, capsys, tmp_path
):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(runner, "Limits", None)
    assert cli.main(["bench", "--op", "gate", option, str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_plot_of_wrong_rows_leaves_the_file(fast_limits, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "old.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(runner, "run_row", lambda row, *a, **k: runner.Result(row, skipped="why"))
    arguments = ["--op", "gate", "--shape", "e8", "--dtype", "float32", "--plot", str(path)]
    assert cli.main(["bench", *arguments]) == 0
    assert path.read_bytes() == b"old"
    assert "written" not in capsys.readouterr().out


# ---- routers -----------------------------------------------------------------------------------


def test_routers_lists_and_describes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["routers"]) == 0
    listed = capsys.readouterr().out
    assert "switch" in listed
    assert "arXiv:2101.03961" in listed
    assert cli.main(["routers", "--describe", "switch"]) == 0
    described = capsys.readouterr().out
    assert "invariance  C: as I, unless a capacity binds" in described
    assert "Args:" in described
    assert cli.main(["routers", "--describe", "swich"]) == 2
    assert "switch" in capsys.readouterr().err


def test_a_kind_that_no_method_has_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["routers", "--kind", "audit"]) == 0
    assert "isolation" in capsys.readouterr().out
    assert cli.main(["routers", "--kind", "routers"]) == 2
    wanted = "--kind must be one of adapters, audit, loss, router, softmax, got 'routers'"
    assert wanted in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "fastmoe_route", "routers"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
