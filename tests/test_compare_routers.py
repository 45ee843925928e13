"""The gallery of routers in a short form: it trains, resumes, and says what it left out."""

from __future__ import annotations

import json

import pytest
import torch
from scripts import script

SMALL = ["--steps", "3", "--layers", "1", "--experts", "4", "--hidden", "32", "--heads", "2",
         "--expert-width", "16", "--context", "16", "--batch", "2",
         "--threads", str(torch.get_num_threads())]  # fmt: skip


@pytest.fixture(scope="module")
def gallery():
    with script("examples", "compare_routers") as module:
        yield module


def test_gallery_trains_writes_and_resumes(gallery, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    names = ["topk_softmax", "switch", "mindskip"]
    results = gallery.main([*names, *SMALL, "--out", str(tmp_path)])
    assert list(results) == names
    for found in results.values():
        assert len(found["train_loss"]) == len(found["violation"]) == 3
    assert results["topk_softmax"]["experts_per_token"] == [2.0] * 3
    assert results["switch"]["experts_per_token"] == [1.0] * 3
    table = (tmp_path / "table.md").read_text()
    assert "| `mindskip`* | R41 |" in table  # sees later tokens of its sequence
    assert "| `switch` | R1 |" in table
    assert (tmp_path / "compare_routers.png").stat().st_size > 10_000
    monkeypatch.setattr(gallery, "train", None)  # nothing is trained again
    again = gallery.main([*names, *SMALL, "--out", str(tmp_path), "--no-plot"])
    assert again == results
    assert "3 routers, 3 of them done before" in capsys.readouterr().out


def test_gallery_names_what_it_leaves_out(gallery, tmp_path, capsys):
    def refuse(method, config):
        raise ValueError("switch: top_k must be even, got 1")

    original, gallery.build = gallery.build, refuse
    try:
        gallery.main(["switch", *SMALL, "--out", str(tmp_path)])
    finally:
        gallery.build = original
    assert "left out: switch: top_k must be even" in (tmp_path / "table.md").read_text()
    assert "error" in json.loads((tmp_path / "results.json").read_text())["results"]["switch"]
    with pytest.raises(SystemExit):
        gallery.main(["swich", *SMALL])
    assert "switch" in capsys.readouterr().err
