"""The training example in a short form: both runs learn, and learn the same."""

import re

import pytest
import torch
from scripts import script
from tolerance import assert_bound


@pytest.fixture(scope="module")
def example():
    with script("examples", "train_moe_lm") as module:
        yield module


SMALL = ["--steps", "10", "--layers", "1", "--experts", "8", "--top-k", "2", "--hidden", "64",
         "--expert-width", "32", "--context", "32", "--batch", "4",
         "--threads", str(torch.get_num_threads())]  # fmt: skip


def test_both_runs_learn_the_same(example, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    fast, plain = example.main([*SMALL, "--out", str(path)])
    assert len(fast.train_loss) == len(plain.train_loss) == 10
    assert fast.valid_loss[10] < fast.valid_loss[0] - 0.1
    for ours, theirs in zip(fast.train_loss, plain.train_loss, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)
    assert_bound(fast.load.sum(1), torch.full((1,), 8.0), 8 * 8 * 2**-24)
    assert path.stat().st_size > 10_000
    text = capsys.readouterr().out
    for word in ("tokens/s", "expert load by layer", "validation loss", "written:"):
        assert word in text


def test_same_seed_same_losses(example, capsys):
    once = example.main([*SMALL, "--steps", "2"])[0].train_loss
    assert once == example.main([*SMALL, "--steps", "2"])[0].train_loss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--experts", "4", "--top-k", "5"], r"--top-k must be in \[1, 4\], got 5"),
        (["--hidden", "30"], "--hidden must be a multiple of --heads, got 30"),
    ],
)
def test_bad_arguments(example, arguments, message, capsys):
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert re.search(message, capsys.readouterr().err)
