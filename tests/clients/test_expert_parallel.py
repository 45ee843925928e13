"""transformers' expert parallelism with `ep_implementation="fastmoe_route"`, on two ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from transformers.distributed.expert_parallel import EPImplementationInterface

TESTS = Path(__file__).parent.parent


def test_registered():
    assert "fastmoe_route" in EPImplementationInterface()


def test_two_ranks_equal_one(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "clients.ep_worker", str(rank), "2", str(tmp_path)],
            cwd=TESTS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    logs = [process.communicate(timeout=120)[0] for process in ranks]
    for rank, log in enumerate(logs):
        path = tmp_path / f"rank{rank}.txt"
        assert path.exists(), log[-3000:]
        assert path.read_text() == "", path.read_text()
    assert torch.distributed.is_available()
