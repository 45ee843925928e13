"""Published variants of softmax and of the losses around it, in plain torch.

The exact softmax and its two fast algorithms are `fastmoe_route.softmax`: `method="two_pass"`
(arXiv:2001.04438) and `method="online"` (arXiv:1805.02867); fused with top-k it is
`fastmoe_route.softmax_topk`. Here are the functions that change what is computed, and the
normaliser as a value that can be merged across blocks and machines. A logit of -inf is masked, in
every function. All work along the last dimension unless they take `dim`.
"""

from fastmoe_route.softmax_variants.distributions import (
    adaptive_temperature_softmax,
    noisy_sparse_softmax,
    softpick,
    sparse_softmax,
    sparse_softmax_loss,
    stablemax,
    stablemax_cross_entropy,
    two_pass_softmax,
    unified_max_softmax,
)
from fastmoe_route.softmax_variants.objectives import (
    pairwise_softmax_loss,
    sample_classes,
    sharded_cross_entropy,
    topk_softmax_loss,
)
from fastmoe_route.softmax_variants.online import merge_normalizers, normalizer
from fastmoe_route.softmax_variants.probabilities import (
    early_exit,
    entropy_tolerance,
    quantization_bias,
    quantize_probabilities,
)
from fastmoe_route.softmax_variants.temperature import (
    entropy_temperature,
    polytope_weights,
    temperature_schedule,
)

__all__ = [
    "adaptive_temperature_softmax",
    "early_exit",
    "entropy_temperature",
    "entropy_tolerance",
    "merge_normalizers",
    "noisy_sparse_softmax",
    "normalizer",
    "pairwise_softmax_loss",
    "polytope_weights",
    "quantization_bias",
    "quantize_probabilities",
    "sample_classes",
    "sharded_cross_entropy",
    "softpick",
    "sparse_softmax",
    "sparse_softmax_loss",
    "stablemax",
    "stablemax_cross_entropy",
    "temperature_schedule",
    "topk_softmax_loss",
    "two_pass_softmax",
    "unified_max_softmax",
]
