"""The buffer overflow of arXiv:2402.05526, both ways: it works where it must, and fails here.

The example that readers run is the demonstration; the smallest form of it is worked out by hand.
"""

from __future__ import annotations

import re

import fastmoe_route as fr
import pytest
import torch
from scripts import script
from torch import Tensor


@pytest.fixture(scope="module")
def example():
    with script("examples", "buffer_overflow") as module:
        yield module


# ---- by hand -----------------------------------------------------------------------------------

VICTIM, ATTACKER = 8, 24


def served(num_attackers: int, *, scoped: bool) -> tuple[Tensor, Tensor]:
    """The victim's outputs and who of it holds a row; everybody wants expert 0 of 4."""
    generator = torch.Generator().manual_seed(5)
    victim = torch.randn(VICTIM, 6, generator=generator)
    w_up = torch.randn(4, 6, 10, generator=generator)
    w_down = torch.randn(4, 5, 6, generator=generator)
    rows = torch.cat([torch.randn(num_attackers, 6, generator=generator), victim])
    num_tokens = rows.shape[0]
    experts = torch.zeros(num_tokens, 1, dtype=torch.int32)
    scopes = (torch.arange(num_tokens) >= num_attackers).int()
    plan = fr.plan_dispatch(
        experts,
        4,
        capacity=fr.expert_capacity(VICTIM if scoped else num_tokens, 4, 1, 1.0),
        scope_ids=scopes if scoped else None,
        num_scopes=2 if scoped else 1,
    )
    y = fr.moe_mlp(rows, (experts, torch.ones(num_tokens, 1)), w_up, w_down, plan=plan)
    counts = fr.drop_counts(experts, plan, scope_ids=scopes, num_scopes=2)
    assert counts.dropped[1, 0] == VICTIM - int((plan.slot_to_row[num_attackers:] >= 0).sum())
    return y[num_attackers:], plan.slot_to_row[num_attackers:, 0] >= 0


def test_shared_capacity_is_attacked() -> None:
    """Alone C = 2 and rows 0 and 1 are served; behind 24 attackers C = 8 and none is."""
    _, alone = served(0, scoped=False)
    assert alone.tolist() == [True, True] + [False] * 6
    y, kept = served(ATTACKER, scoped=False)
    assert not kept.any()
    assert not y.any()  # nothing is left but the residual


def test_scopes_are_not() -> None:
    alone, _ = served(0, scoped=True)
    assert alone[:2].any()
    for num_attackers in (1, ATTACKER):
        y, kept = served(num_attackers, scoped=True)
        assert kept.tolist() == [True, True] + [False] * 6
        assert torch.equal(y, alone)


def test_attack_changes_no_bit_behind_scopes() -> None:
    """Other requests before, behind and between the victim's tokens, which keep their own order."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(48, 16, generator=generator)
    routing = fr.gate(x @ torch.randn(16, 8, generator=generator), 8)
    w_up = torch.randn(8, 16, 24, generator=generator)
    w_down = torch.randn(8, 12, 16, generator=generator)
    victim = torch.arange(12)

    def outputs(rows: Tensor, rules: dict, scoped: bool = True) -> Tensor:
        own = (routing.experts[rows], routing.weights[rows])
        scopes = torch.where(rows < 12, 7, rows % 4).int()
        options = {"scope_ids": scopes, "num_scopes": 9} if scoped else {}
        routed = fr.reroute(own, 8, 2, 3, **options, **rules)
        return fr.moe_mlp(x[rows], routed, w_up, w_down)[rows < 12]

    others = torch.arange(12, 48)
    between = torch.cat([torch.stack([others[:12], victim], 1).flatten(), others[12:]])
    for rules in ({}, {"fill": "any"}, {"drop_policy": "score"}, {"overflow": "drop"}):
        alone = outputs(victim, rules)
        for rows in (torch.cat([others, victim]), torch.cat([victim, others.flip(0)]), between):
            assert torch.equal(outputs(rows, rules), alone)
        assert not torch.equal(outputs(between, rules, scoped=False), alone)


# ---- the example -------------------------------------------------------------------------------


def test_example_shows_the_attack_and_its_failure(example, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    outcomes = example.main(["--attackers", "0", "2", "8", "--out", str(path)])
    assert path.stat().st_size > 10_000
    text = capsys.readouterr().out
    for outcome in outcomes:
        assert outcome.rule.name in text
        assert outcome.same_bits[0], "without attackers nothing may change"
        assert outcome.change[0] == 0.0
        if outcome.rule.shared and outcome.rule.capacity:
            assert outcome.rule.tag in ("C", "B")
            assert outcome.kept[2] < outcome.kept[0] - 0.2
            assert outcome.change[2] > 0.5
            assert not any(outcome.same_bits[1:])
            with pytest.raises(ValueError, match="one scope per request"):
                fr.check_servable(outcome.rule.tag)
        else:
            assert all(outcome.same_bits)
            assert outcome.kept == [outcome.kept[0]] * 3
            fr.check_servable(outcome.rule.tag)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "0"], "--length must be at least 1, got 0"),
        (["--experts", "4", "--top-k", "5"], r"--top-k must be in \[1, 4\], got 5"),
        (["--attackers", "-1"], "--attackers must be at least 0, got -1"),
    ],
)
def test_example_refuses(example, arguments, message, capsys) -> None:
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert re.search(message, capsys.readouterr().err)
