"""What the bench runs: named shapes, token counts, and the rows of the full and the quick form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastmoe_route.gate import MAX_EXPERTS
from fastmoe_route.softmax import MAX_K

DTYPES = ("float32", "bfloat16", "float16")
OPS = (
    "softmax",
    "softmax_topk",
    "gate",
    "plan_dispatch",
    "permute",
    "unpermute",
    "grouped_mm",
    "moe_mlp",
    "layer",
)
TRAINABLE = tuple(op for op in OPS if op != "plan_dispatch")
EXPERT_OPS = ("plan_dispatch", "permute", "unpermute", "grouped_mm", "moe_mlp", "layer")
WEIGHT_OPS = ("grouped_mm", "moe_mlp", "layer")
ROW_SECONDS, QUICK_ROW_SECONDS = 1.5, 0.25
_RECIPES = {"dsv3": "DeepSeek-V3's gate", "stats": "with statistics"}


@dataclass(frozen=True)
class Shape:
    """One layer: sizes of the experts, their number, slots per token, and the gate's recipe.

    A shape without experts to multiply (`hidden == 0`) has only columns: `num_experts` is the
    length of a row for gate and softmax, `top_k` how many are taken.
    """

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    gate: str = "softmax"

    @property
    def expert_elements(self) -> int:
        """Weights of one SwiGLU expert."""
        return 3 * self.hidden * self.intermediate

    def __str__(self) -> str:
        """Name and sizes."""
        if self.hidden == 0:
            recipe = "" if self.gate == "softmax" else f"; {_RECIPES[self.gate]}"
            return f"{self.name} ({self.num_experts} columns, {self.top_k} taken{recipe})"
        return f"{self.name} ({self.hidden},{self.intermediate},{self.num_experts},{self.top_k})"


LAYERS = {
    shape.name: shape
    for shape in (
        Shape("mixtral", 1024, 3584, 8, 2),
        Shape("qwen3", 2048, 768, 128, 8),
        Shape("dsv3", 2048, 512, 256, 8, gate="dsv3"),
        Shape("olmoe", 2048, 1024, 64, 8),
        Shape("switch", 768, 3072, 128, 1),
    )
}
GATES = {
    shape.name: shape
    for shape in (
        Shape("e8", 0, 0, 8, 2),
        Shape("e64", 0, 0, 64, 8),
        Shape("e128", 0, 0, 128, 8),
        Shape("e256", 0, 0, 256, 8),
        Shape("e256-dsv3", 0, 0, 256, 8, gate="dsv3"),
        Shape("e64-stats", 0, 0, 64, 8, gate="stats"),
        Shape("e256-stats", 0, 0, 256, 8, gate="stats"),
    )
}
# The rows whose nanoseconds on one thread are quoted: `--shape e64-k5 --shape e128-k5 --threads 1`.
FEW_SLOTS = {
    shape.name: shape
    for shape in (
        Shape("e64-k5", 0, 0, 64, 5),
        Shape("e128-k5", 0, 0, 128, 5),
        Shape("e256-k5", 0, 0, 256, 5),
    )
}
VOCABULARIES = {
    shape.name: shape
    for shape in (
        Shape("vocab25k", 0, 0, 25_600, 5),
        Shape("vocab32k", 0, 0, 32_000, 50),
        Shape("vocab128k", 0, 0, 128_256, 5),
        Shape("vocab152k", 0, 0, 151_936, 50),
    )
}
LONG_ROWS = {shape.name: shape for shape in (Shape("row16m", 0, 0, 1 << 24, 1),)}
SHAPES = {**LAYERS, **GATES, **FEW_SLOTS, **VOCABULARIES, **LONG_ROWS}
LAYER_TOKENS = (1, 4, 16, 64, 512, 2048)
GATE_TOKENS = (1, 2048)
VOCABULARY_TOKENS = (1, 16, 64)
TRAINING_TOKENS = (64, 512, 2048)


@dataclass(frozen=True)
class Row:
    """One line of the result: an op on a shape, `tokens` tokens, one dtype, forward or training."""

    op: str
    shape: Shape
    tokens: int
    dtype: str
    training: bool

    def __str__(self) -> str:
        """What is run, in a few words."""
        passes = "fwd+bwd" if self.training else "fwd"
        return f"{self.op} {self.shape.name} T={self.tokens} {self.dtype} {passes}"


def parse_shape(text: str) -> Shape:
    """A named shape, or `H,I,E,K`.

    >>> parse_shape("qwen3").num_experts
    128
    >>> parse_shape("64,32,8,2").intermediate
    32
    """
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
        names = ", ".join(SHAPES)
        raise ValueError(f"shape must be one of {names}, or four numbers H,I,E,K, got {text!r}")
    hidden, intermediate, num_experts, top_k = (int(part) for part in parts)
    if min(hidden, intermediate, num_experts, top_k) < 1 or top_k > num_experts:
        raise ValueError(f"shape H,I,E,K must be positive with K <= E, got {text!r}")
    return Shape(text.replace(" ", ""), hidden, intermediate, num_experts, top_k)


def parse_tokens(text: str) -> list[int]:
    """Token counts, separated by commas."""
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"tokens must be positive numbers separated by commas, got {text!r}")
    return [int(part) for part in parts]


def applies(op: str, shape: Shape) -> bool:
    """Whether the op has a meaning on the shape."""
    if op in EXPERT_OPS:
        return shape.hidden > 0
    if op == "gate":
        return shape.num_experts <= MAX_EXPERTS
    if op == "softmax_topk":
        return shape.top_k <= MAX_K and shape.num_experts > 1
    return True


def _default_shapes(op: str) -> list[Shape]:
    if op == "gate":
        return list(GATES.values())
    if op == "softmax":
        return [GATES["e64"], GATES["e256"], *VOCABULARIES.values(), *LONG_ROWS.values()]
    if op == "softmax_topk":
        return list(VOCABULARIES.values())
    return list(LAYERS.values())


def _default_tokens(shape: Shape) -> Sequence[int]:
    if shape.name in LONG_ROWS:
        return (1,)
    if shape.name in VOCABULARIES:
        return VOCABULARY_TOKENS
    return GATE_TOKENS if shape.hidden == 0 else LAYER_TOKENS


def select_rows(
    ops: Sequence[str],
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    dtypes: Sequence[str],
    passes: str,
) -> list[Row]:
    """Every row asked for; whatever is left empty takes its default.

    Rows of one shape and dtype stand together, so that weights are made once.
    """
    rows: list[Row] = []
    for op in ops or OPS:
        for shape in shapes or _default_shapes(op):
            if not applies(op, shape):
                continue
            for dtype in dtypes or DTYPES[:2]:
                for count in tokens or _default_tokens(shape):
                    if passes != "training":
                        rows.append(Row(op, shape, count, dtype, training=False))
                    is_wanted = passes == "training" or (
                        passes == "both"
                        and (bool(tokens) or shape.hidden == 0 or count in TRAINING_TOKENS)
                    )
                    if is_wanted and op in TRAINABLE:
                        rows.append(Row(op, shape, count, dtype, training=True))
    return _grouped(rows)


def _grouped(rows: list[Row]) -> list[Row]:
    """Light rows first, then shape by shape and dtype by dtype; the order inside is kept."""
    groups: dict[tuple[bool, str, str], list[Row]] = {}
    for row in rows:
        heavy = row.op in WEIGHT_OPS
        key = (heavy, row.shape.name if heavy else "", row.dtype if heavy else "")
        groups.setdefault(key, []).append(row)
    light = groups.pop((False, "", ""), [])
    return light + [row for group in groups.values() for row in group]


# The quick form: one or two rows of every op, and the layers where dispatch costs most.
_QUICK: tuple[tuple[str, str, str, tuple[int, ...], str], ...] = (
    ("softmax", "e256", "float32", (2048,), "forward"),
    ("softmax", "vocab32k", "float32", (64,), "forward"),
    ("softmax_topk", "vocab152k", "float32", (16,), "forward"),
    ("gate", "e8", "float32", (2048,), "forward"),
    ("gate", "e64", "float32", (2048,), "both"),
    ("gate", "e128", "float32", (2048,), "forward"),
    ("gate", "e256", "float32", (2048,), "both"),
    ("gate", "e256-dsv3", "float32", (2048,), "forward"),
    ("plan_dispatch", "qwen3", "float32", (16, 2048), "forward"),
    ("permute", "qwen3", "bfloat16", (512,), "both"),
    ("unpermute", "qwen3", "bfloat16", (512,), "both"),
    ("grouped_mm", "mixtral", "float32", (512,), "forward"),
    ("moe_mlp", "mixtral", "float32", (1, 16, 512), "forward"),
    ("layer", "mixtral", "float32", (256,), "training"),
    ("moe_mlp", "qwen3", "bfloat16", (1, 16, 512), "forward"),
    ("layer", "qwen3", "bfloat16", (256,), "training"),
)


def quick_rows(
    ops: Sequence[str], shapes: Sequence[Shape], tokens: Sequence[int], dtypes: Sequence[str]
) -> list[Row]:
    """The quick form's rows, or those of them that fit what was asked for."""
    rows: list[Row] = []
    for op, name, dtype, counts, passes in _QUICK:
        for count in counts:
            if passes != "training":
                rows.append(Row(op, SHAPES[name], count, dtype, training=False))
            if passes != "forward":
                rows.append(Row(op, SHAPES[name], count, dtype, training=True))
    return _grouped(
        [
            row
            for row in rows
            if (not ops or row.op in ops)
            and (not shapes or row.shape in shapes)
            and (not tokens or row.tokens in tokens)
            and (not dtypes or row.dtype in dtypes)
        ]
    )
