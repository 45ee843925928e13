"""The examples in a short form: equal logits, equal losses, tables and files."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["olmoe", "mixtral", "qwen3_moe", "gpt_oss"])
def test_speed_up(model, tmp_path, capsys):
    path = tmp_path / "report.json"
    report = load("speed_up_hf_model").main(
        [*("--model", model, "--hidden", "64", "--layers", "2", "--experts", "8"),
         *("--width", "32", "--prompt", "24", "--decode", "3", "--repeats", "1"),
         *("--json", str(path))]
    )  # fmt: skip
    assert json.loads(path.read_text())["runs"].keys() == report["runs"].keys()
    assert report["memory_gb_per_s"] > 0
    assert all(row["logits_difference"] <= 2e-5 for row in report["runs"].values())
    for row in report["runs"].values():
        assert 0 < row["experts_prompt_s"] < row["prompt_s"]
        assert 0 < row["experts_decode_s"] < row["decode_s"]
    assert "x eager" in capsys.readouterr().out


def test_speed_up_bfloat16():
    report = load("speed_up_hf_model").main(
        [*("--hidden", "64", "--layers", "1", "--experts", "8", "--width", "32"),
         *("--prompt", "16", "--decode", "2", "--repeats", "1", "--dtype", "bfloat16")]
    )  # fmt: skip
    assert len(report["runs"]) == 4


def test_finetune(tmp_path):
    pytest.importorskip("peft")
    report = load("finetune_lora_experts").main(
        [*("--base-steps", "3", "--steps", "6", "--hidden", "32", "--experts", "4", "--batch", "4"),
         *("--context", "24", "--json", str(tmp_path / "report.json"))]
    )  # fmt: skip
    assert report["largest_difference"] < 1e-3
    losses = report["losses"]["fastmoe_route"]
    assert losses[-1] < losses[0]


def test_expert_parallel_under_torchrun(tmp_path):
    pytest.importorskip("scipy")
    path = tmp_path / "report.json"
    done = subprocess.run(
        [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
         *(str(FOLDER / "expert_parallel.py"), "--steps", "4", "--experts", "8", "--top-k", "2"),
         *("--hidden", "32", "--batch", "2", "--context", "16", "--planning", "2"),
         *("--json", str(path))],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(path.read_text())
    assert report["processes"] == 2
    assert report["difference"] <= 1e-5
    assert report["losses"][-1] < report["losses"][0]
    assert 0 < report["neighbours"]["rows_sent"] < report["neighbours"]["rows_one_by_one"]
    assert sorted(report["placement"]["rank_of_expert"]) == [0] * 4 + [1] * 4
    assert "rows between processes" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("speed_up_hf_model", ["--hidden", "100"], "--hidden must be a multiple of 64, got 100"),
        ("speed_up_hf_model", ["--repeats", "0"], "--repeats must be at least 1, got 0"),
        ("speed_up_hf_model", ["--experts", "3"], "--experts must be at least 8 for olmoe, got 3"),
        ("speed_up_hf_model", ["--width", "0"], "--width must be at least 1, got 0"),
        ("speed_up_hf_model", ["--path", "nowhere"], "a folder with a config.json, got nowhere"),
        ("expert_parallel", ["--hidden", "30"], "--hidden must be a multiple of 4, got 30"),
        ("expert_parallel", ["--top-k", "33"], "--top-k must be at most 32, got 33"),
        ("expert_parallel", ["--planning", "0"], "--planning must be positive, got 0.0"),
        ("finetune_lora_experts", ["--rank", "0"], "--rank must be at least 1, got 0"),
    ],
)
def test_bad_arguments(name, arguments, message, capsys):
    with pytest.raises(SystemExit):
        load(name).main(arguments)
    assert message in capsys.readouterr().err


def test_experts_that_ranks_do_not_divide(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        load("expert_parallel").main([])
    assert "--experts must be a multiple of the 3 processes, got 32" in capsys.readouterr().err
