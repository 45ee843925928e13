"""The benchmark behind `python -m fastmoe_route bench`.

Correctness comes first, then time. Every contender of a row runs in this process, in turns, on
inputs that rotate through more memory than the caches hold; the ratio is taken turn by turn. The
limits the times are held against are measured on this machine in the same run.

Read in this order: `shapes` (what is run), `baselines` (what it is compared with), `workload`
(the data), `case`, `score_cases`, `row_cases` and `expert_cases` (one op each), `check`, `timing`,
`machine` (the limits), `runner`, `report`, `plot`.
"""

from fastmoe_route.bench.runner import Options, run

__all__ = ["Options", "run"]
