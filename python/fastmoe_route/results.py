"""The two named results every routing op of the package hands on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weight.

    `T` tokens, `E` experts, `K` slots per token; slot `t * K + j` is choice `j` of token `t`.
    The weights and statistics are float64 instead of float32 when the logits were.

    Attributes:
        experts: int32 `[T, K]`, the expert of each slot, -1 for none. A token's real experts come
            first, best first (except from `expert_choice`, where slot `j` holds expert `j` or -1).
        weights: float32 `[T, K]`, the combine weight, exactly 0 where `experts` is -1;
            differentiable.
        demand: int32 `[E]`, the number of slots that ask for each expert.
        score_sum: float32 `[E]` or None, the sum over tokens of every expert's score;
            differentiable. Asked for with `stats=True`.
        logsumexp: float32 `[T]` or None, the logsumexp of the raw logits; differentiable.
            Asked for with `stats=True`.
        scores: float32 `[T, E]` or None, the score of every expert before bias and mask;
            differentiable. Asked for with `keep_scores=True`.
    """

    experts: Tensor
    weights: Tensor
    demand: Tensor
    score_sum: Tensor | None = None
    logsumexp: Tensor | None = None
    scores: Tensor | None = None


class DispatchPlan(NamedTuple):
    """Where each slot sits once the slots are grouped by expert. `R` rows, `E` experts.

    Attributes:
        offsets: int32 `[E + 1]`, rows `offsets[e] : offsets[e + 1]` belong to expert `e`.
        row_to_slot: int32 `[R]`, the slot held by each row, -1 for padding and for rows past
            `offsets[E]`.
        slot_to_row: int32 `[T, K]`, the row of each slot, -1 when the slot is unused or dropped.
        kept: int32 `[E]`, the rows in use per expert.
        dropped: int32 `[E]`, the slots turned away per expert.
    """

    offsets: Tensor
    row_to_slot: Tensor
    slot_to_row: Tensor
    kept: Tensor
    dropped: Tensor
