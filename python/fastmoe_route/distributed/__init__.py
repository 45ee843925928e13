"""The same layer over `torch.distributed`: experts on many ranks, tokens sent to them and back."""

from fastmoe_route.distributed.exchange import ExchangeError
from fastmoe_route.distributed.expert_parallel import ExpertParallel
from fastmoe_route.distributed.placement import Placement, plan_placement
from fastmoe_route.distributed.sharding import Shards, Volume, run_sharded

__all__ = [
    "ExchangeError",
    "ExpertParallel",
    "Placement",
    "Shards",
    "Volume",
    "plan_placement",
    "run_sharded",
]
