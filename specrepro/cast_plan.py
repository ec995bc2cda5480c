"""How much of CAST each tier measures: sets, batch sizes, grids of the cost tables, traces."""

from __future__ import annotations

from dataclasses import dataclass, replace

from specrepro.cost_table import Grid
from specrepro.eagle3 import TreeConfig


@dataclass(frozen=True, slots=True)
class Plan:
    """How much a tier measures."""

    sets: tuple[str, ...]  # decoded one by one
    sets_together: tuple[str, ...]  # decoded in a batch
    batch: int  # sequences of that batch
    num_traces: int  # prompts of each set that are recorded, the decoded ones first
    num_chosen_on: int  # prompts of each set behind those
    grid: Grid  # of the run's own cost table
    other_grid: Grid  # of the tables of other number formats and threads
    recorded: TreeConfig  # how wide and deep traces are drafted
    depths: tuple[int, ...] = (0, 1, 2, 3, 5, 7)  # of the fixed trees to choose from
    widths: tuple[int, ...] = (1, 2, 4, 6, 10)
    machines: tuple[tuple[str, int], ...] = (("bfloat16", 2), ("bfloat16", 1), ("float32", 2))
    temperatures: tuple[float, ...] = (0.0,)


_SETS = ("chat", "humaneval", "maths")
_LARGE = Grid(sizes=(1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64), max_rows=256)
PLANS = {
    "smoke": Plan(
        ("chat", "humaneval"), ("chat",), 2, 2, 1,
        Grid((1, 2), 256, 1, (1, 2, 4, 8), (1, 4), 8, warm_up=1, repeats=1),
        Grid((1,), 256, 1, (1, 8), (1, 4), warm_up=1, repeats=1),
        TreeConfig(2, 4, 2), (1, 2), (1, 4), (("bfloat16", 1),),
    ),
    "laptop": Plan(
        _SETS, ("chat",), 8, 8, 3, replace(_LARGE, batches=(1, 4, 8), num_buckets=2, repeats=8),
        replace(_LARGE, batches=(1, 8), num_buckets=1, repeats=5), TreeConfig(7, 10, 2),
    ),
    "full": Plan(
        (*_SETS, "instruction", "summarisation"), (*_SETS, "instruction", "summarisation"), 8, 16,
        6, replace(_LARGE, num_buckets=4, repeats=20), replace(_LARGE, num_buckets=2, repeats=10),
        TreeConfig(9, 10, 2), temperatures=(0.0, 1.0),
    ),
    "paper": Plan(
        (*_SETS, "instruction", "summarisation"), (*_SETS, "instruction", "summarisation"), 8, 24,
        8, Grid(num_buckets=8, max_rows=4128), Grid(num_buckets=8, max_rows=4128),
        TreeConfig(9, 10, 2), machines=(), temperatures=(0.0, 1.0),
    ),
}  # fmt: skip
