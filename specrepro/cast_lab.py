"""CAST's experiments at a tier: cost tables, traces, chosen trees, and the rows drawn from them.

Everything is measured once per configuration and kept beside the run's records. Costs and traces
are measured; sweeps, ablation, batch sizes and other machines are replayed under a cost table
(`replay`) and say so in their columns: `costs` is "table" under the measured table of this run,
"other table" under one measured with another number format or number of threads, "modelled" under
one of a GPU that is not here; "clock" marks what was timed while decoding.

What is reported is never what was chosen on: fixed trees, tree sizes and the start of the running
speedup are chosen on prompts that come behind the reported ones in each set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from specrepro import cast, checkpoints, cost_model, cost_table, eagle3, replay
from specrepro import target_model as targets
from specrepro.cast_plan import PLANS, Plan
from specrepro.cast_rows import ALL, choice_rows, confidence_rows, gains
from specrepro.cost_table import CostTable, Grid
from specrepro.decoding import Drafter
from specrepro.eagle3 import TreeConfig
from specrepro.experiment import Run
from specrepro.measure import AUTOREGRESSIVE, Question, Record, dtype_name
from specrepro.replay import REPLAYED, MakeDrafter, Trace
from specrepro.target_model import Target

DEFAULT, BEST = "EAGLE-3", "EAGLE-3, best fixed tree"
CAST, BY_HAND = "CAST", "CAST, thresholds by hand"
WITHOUT = {
    "prunes_breadth": "CAST without breadth pruning",
    "prunes_depth": "CAST without depth pruning",
    "reranks": "CAST without reranking",
}
ALONE = {
    "reranks": "reranking",
    "prunes_depth": "depth pruning",
    "prunes_breadth": "breadth pruning",
}
STRICTNESS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)

Settings = Mapping[str, tuple[MakeDrafter | TreeConfig, dict[str, Any]]]


@dataclass
class Lab:
    """What CAST's notebook asks for, each thing made once."""

    run: Run
    checkpoint: Path  # of EAGLE-3's head
    default: TreeConfig = field(default_factory=TreeConfig)  # EAGLE-3's, and CAST's K
    plan: Plan | None = None

    def __post_init__(self) -> None:
        self.plan = self.plan or PLANS[self.run.tier_name]
        recorded = self.plan.recorded
        fits = min(self.default.top_k, recorded.top_k), min(self.default.depth, recorded.depth)
        self.default = replace(self.default, top_k=fits[0], depth=fits[1])
        self.plain_config = cast.Config(self.default, depth=recorded.depth)
        self.by_hand = replace(self.plain_config, thresholds=cast.PAPER_THRESHOLDS)
        self._configs: dict[tuple[str, int], cast.Config] = {}
        self._best: dict[tuple[str, int], TreeConfig] = {}

    def draft(self, target: Target | None = None, tree: TreeConfig | None = None) -> eagle3.Drafter:
        """A drafter of the checkpoint."""
        return eagle3.Drafter.load(self.checkpoint, target or self.run.target, tree)

    @classmethod
    def of(cls, run: Run, checkpoint: Path | str, **tree: int) -> Lab:
        """With sizes of EAGLE-3's default tree where they are not 0, else the paper's."""
        sizes = {name: size for name, size in run.tree(**tree).items() if size}
        return cls(run, Path(checkpoint), TreeConfig(**sizes))

    @property
    def identity(self) -> dict[str, Any]:
        """What records depend on besides the run's own settings."""
        digest = checkpoints.digest(self.checkpoint)
        return {"checkpoint": digest, "tree": asdict(self.default), "plan": asdict(self.plan)}

    @property
    def batches(self) -> list[int]:
        """Batch sizes that the run's own cost table knows."""
        return self.costs.batches

    # --- cost tables

    @cached_property
    def costs(self) -> CostTable:
        """The table of this run's number format and threads."""
        own = dtype_name(self.run.target), torch.get_num_threads()
        return self._table(*own, self.plan.grid, "costs")

    def machines(self) -> list[CostTable]:
        """The run's own table, and those of the plan's other formats and numbers of threads."""
        tables = [self.costs]
        for dtype, num_threads in self.plan.machines:
            is_here = (dtype, num_threads) == (self.costs.header["dtype"], torch.get_num_threads())
            is_possible = num_threads <= (os.cpu_count() or 1) and not is_here
            if is_possible and self.run.target.device.type == "cpu":
                tables.append(self._table(dtype, num_threads, self.plan.other_grid))
        return tables

    def modelled(self) -> list[CostTable]:
        """Floors of the paper's cards and one more, for a target of eight billion parameters."""
        sizes = {"batches": self.costs.batches, "widest": self.default.top_k}
        return [cost_model.table(card, **sizes) for card in cost_model.CARDS]

    def _table(self, dtype: str, num_threads: int, grid: Grid, name: str = "") -> CostTable:
        name = name or f"costs_{dtype}_{num_threads}"
        drafter = checkpoints.digest(self.checkpoint)[:12]
        with cost_table.threads(num_threads):
            header = cost_table.header_of(self.run.target, drafter, self.default.top_k)
            header |= {"dtype": dtype}
            measure = partial(self._profile, header, grid)
            return cost_table.obtain(self.run.records / f"{name}.json", header, measure)

    def _profile(self, header: Mapping[str, Any], grid: Grid) -> CostTable:
        target = self.run.target
        if header["dtype"] != dtype_name(target):
            target = targets.load(self.run.target_name, dtype=header["dtype"])
        words = [token for _, ids in self._chosen_on("chat") for token in ids]
        return cost_table.profile(target, self.draft(target), header, grid, words)

    def cost_rows(self, tables: Sequence[CostTable]) -> pd.DataFrame:
        """Rows of quantity "cost": every point that was timed; of modelled tables a few."""
        sizes, found = list(self.plan.grid.sizes), []
        for table in tables:
            points = table.rows().assign(costs=self._kind(table))
            if table.is_modelled:
                is_shown = points["num_tokens"].isin(sizes) & (points["part"] == "target")
                points = points[is_shown & (points["context"] == points["context"].min())]
                points = points.assign(source="modelled")
            found.append(points)
        return pd.concat(found, ignore_index=True)

    def _kind(self, costs: CostTable) -> str:
        if costs.is_modelled:
            return "modelled"
        return "table" if costs is self.costs else "other table"

    # --- prompts and traces

    def _num_asked(self, name: str) -> int:
        """Prompts of a set that are reported on, decoded or recorded."""
        together = self.plan.batch if name in self.plan.sets_together else 0
        return max(self.run.num_prompts, together, self.plan.num_traces)

    def _chosen_on(self, name: str) -> list[Question]:
        """Prompts of a set that trees and thresholds are chosen on, behind the reported ones."""
        num_asked = self._num_asked(name)
        return self.run.questions(name, num_asked + self.plan.num_chosen_on)[num_asked:]

    @cached_property
    def traces(self) -> list[Trace]:
        """Of the prompts that are reported on."""
        asked = {name: self.run.questions(name, self._num_asked(name)) for name in self.plan.sets}
        return self._recorded("traces", asked)

    @cached_property
    def traces_to_choose_on(self) -> list[Trace]:
        asked = {name: self._chosen_on(name) for name in self.plan.sets}
        return self._recorded("traces_to_choose_on", asked)

    def _recorded(self, name: str, asked: Mapping[str, Sequence[Question]]) -> list[Trace]:
        def make() -> list[Trace]:
            found = [
                replay.record(
                    self.run.target, self.draft(), questions, self.plan.recorded, prompts=prompts,
                    max_new_tokens=self.run.max_new_tokens, seed=self.run.seed,
                )
                for prompts, questions in asked.items()
            ]  # fmt: skip
            return sum(found, [])

        return replay.obtain(self.run.records / name, make)

    # --- what is chosen, on other prompts than the reported

    def best_fixed(self, batch: int, costs: CostTable | None = None) -> TreeConfig:
        """The fixed tree that brings most tokens a second on other prompts than the reported."""
        costs = costs or self.costs
        key = costs.machine, batch
        if key not in self._best:
            self._best[key] = self._best_on(self.traces_to_choose_on, batch, costs)
        return self._best[key]

    def _best_on(self, traces: Sequence[Trace], batch: int, costs: CostTable) -> TreeConfig:
        """Of equally fast trees the smallest."""
        traces = _of_one_set(traces, batch)
        sizes, rates = [size for size in self.sizes(batch, costs) if size > 1], {}
        for depth, top_k in product(self.plan.depths, self.plan.widths):
            ranks = replay.path_ranks(traces, depth, top_k)
            for size in sizes:
                tree = TreeConfig(depth, top_k, size)
                rates[tree] = _rate(traces, tree, costs, batch, ranks)
        return max(rates, key=lambda tree: (rates[tree], -tree.total_tokens, -tree.depth))

    def sizes(self, batch: int, costs: CostTable | None = None) -> list[int]:
        """Tree sizes that were timed at this batch size."""
        largest = (costs or self.costs).num_tokens(batch)
        return [size for size in self.plan.grid.sizes if size <= largest]

    def config(self, batch: int, costs: CostTable | None = None) -> cast.Config:
        """CAST with the running speedup started where it settles on other prompts."""
        costs = costs or self.costs
        key = costs.machine, batch
        if key not in self._configs:
            traces = _of_one_set(self.traces_to_choose_on, batch)
            self._configs[key] = cast.with_running_speedup(traces, costs, self.plain_config, batch)
        return self._configs[key]

    def drafters(self, batch: int) -> dict[str, Drafter]:
        """What is decoded and timed at a batch size, by the names of tables."""
        return {
            DEFAULT: self.draft(tree=self.default),
            BEST: self.draft(tree=self.best_fixed(batch)),
            CAST: cast.Drafter(self.draft(), self.costs, self.config(batch)),
            BY_HAND: cast.Drafter(self.draft(), self.costs, self.by_hand),
        }

    def loaders(self) -> dict[str, Any]:
        """For the losslessness check, which decodes in another number format too.

        Costs shape a tree and no word depends on that, so the table of the run serves all.
        """
        config = self.config(1)
        return {CAST: lambda target: cast.Drafter(self.draft(target), self.costs, config)}

    def extreme_loaders(self) -> dict[str, Any]:
        """Trees as large and as small as CAST could ever draft, for the same check."""
        return {
            f"CAST, thresholds {x:g}": lambda target, x=x: cast.Drafter(
                self.draft(target), self.costs, replace(self.plain_config, thresholds=(x,) * 3)
            )
            for x in (0.0, 99.0)
        }

    # --- rows of what was decoded

    def compare(self, batch: int) -> list[Record]:
        """Decode and time every method, in batches of this size."""
        sets = self.plan.sets if batch == 1 else self.plan.sets_together
        num_prompts = self.run.num_prompts if batch == 1 else max(batch, self.run.num_prompts)
        temperatures = self.plan.temperatures if batch == 1 else (0.0,)
        return self.run.compare(self.drafters(batch), sets, temperatures, batch, num_prompts)

    def agreement(self, records: Sequence[Record], batch: int) -> pd.DataFrame:
        """Rows of quantity "replay_check": replays of what was just decoded, against the clock."""
        greedy = [record for record in records if record.temperature == 0]
        decoded = {(record.prompts, record.prompt_id) for record in greedy}
        traces = [t for t in self.traces if (t.prompts, t.prompt_id) in decoded]
        predicted = []
        for name, draft in self._drafts(batch).items():
            for prompts in dict.fromkeys(trace.prompts for trace in traces):
                mine = [trace for trace in traces if trace.prompts == prompts]
                predicted += replay.replay(mine, draft, self.costs, method=name, batch=batch)
        return replay.agreement(greedy, predicted)

    def _drafts(
        self, batch: int, costs: CostTable | None = None
    ) -> dict[str, MakeDrafter | TreeConfig | None]:
        """The methods of `drafters`, as replays take them."""
        costs = costs or self.costs
        return {
            AUTOREGRESSIVE: None,
            DEFAULT: self.default,
            BEST: self.best_fixed(batch, costs),
            CAST: cast.shaped(costs, self.config(batch, costs)),
            BY_HAND: cast.shaped(costs, self.by_hand),
        }

    # --- rows of what was replayed

    def replays(self, tables: Sequence[CostTable]) -> pd.DataFrame:
        """The same under several tables, each at the batch sizes that it knows."""
        found = [self.replayed(costs, costs.batches) for costs in tables]
        return pd.concat(found, ignore_index=True)

    def replayed(self, costs: CostTable, batches: Sequence[int]) -> pd.DataFrame:
        """Rows of quantity "replay": every method at every batch size under one table."""
        tables = []
        for batch in batches:
            settings = {name: (draft, {}) for name, draft in self._drafts(batch, costs).items()}
            tables.append(self._rows("replay", settings, costs, batch))
        return pd.concat(tables, ignore_index=True)

    def sweep(self, batches: Sequence[int]) -> pd.DataFrame:
        """Rows of quantity "replay_sweep": fixed trees of growing size, and what CAST chose.

        Their depth and width are those of the best tree at that batch size. Rows of quantity
        "gain" set the size chosen on other prompts against the largest.
        """
        tables = []
        for batch in batches:
            best = self.best_fixed(batch)
            settings: dict[str, Any] = {
                f"{size} nodes": (replace(best, total_tokens=size), _sizes_of(best, size))
                for size in self.sizes(batch)
                if size > 1
            }
            settings[CAST] = (self._drafts(batch)[CAST], {})
            records = self._replays(settings, self.costs, batch)
            drafted = [num for r in records if r.method == CAST for num in r.drafted]
            settings[CAST] = (None, {"total_tokens": 1 + float(np.mean(drafted))})
            tables.append(self._as_rows("replay_sweep", records, settings, self.costs, batch))
            names = {f"{best.total_tokens} nodes": "EAGLE-3, chosen size"}
            names |= {f"{max(self.sizes(batch))} nodes": "EAGLE-3, largest size"}
            if len(names) == 2:
                pair = [replace(r, method=names[r.method]) for r in records if r.method in names]
                tables.append(gains(pair, *names.values()).assign(costs="table"))
        return pd.concat(tables, ignore_index=True)

    def ablation(self, batches: Sequence[int]) -> pd.DataFrame:
        """Rows of quantity "ablation": EAGLE-3's tree, each part alone, all but one, all."""
        tables = []
        for batch in batches:
            whole = self.config(batch)
            nothing = replace(whole, **dict.fromkeys(ALONE, False))
            variants = {DEFAULT: nothing}
            variants |= {f"{ALONE[p]} alone": replace(nothing, **{p: True}) for p in ALONE}
            variants |= {WITHOUT[p]: replace(whole, **{p: False}) for p in WITHOUT}
            variants |= {CAST: whole, "CAST, verified-set utility": _verified_set(whole)}
            settings = {name: (cast.shaped(self.costs, c), {}) for name, c in variants.items()}
            tables.append(self._rows("ablation", settings, self.costs, batch))
        return pd.concat(tables, ignore_index=True)

    def sensitivity(
        self, batches: Sequence[int], factors: Sequence[float] = STRICTNESS
    ) -> pd.DataFrame:
        """Rows of quantity "sensitivity": thresholds times each factor, running and by hand."""
        tables = []
        for batch in batches:
            own = self.config(batch)
            kinds = {CAST: own, BY_HAND: replace(own, thresholds=cast.PAPER_THRESHOLDS)}
            settings = {
                f"{name} x {x:g}": (
                    cast.shaped(self.costs, replace(config, strictness=x)),
                    {"method": name, "strictness": x},
                )
                for name, config in kinds.items()
                for x in factors
            }
            tables.append(self._rows("sensitivity", settings, self.costs, batch))
        return pd.concat(tables, ignore_index=True)

    def choices(self, batches: Sequence[int]) -> pd.DataFrame:
        """Rows of quantity "choice": how often CAST drafted so deep, so wide, and kept so many."""
        tables = [choice_rows(self._cast_rounds(batch)).assign(batch=batch) for batch in batches]
        common = {"method": CAST, "prompts": ALL, "temperature": 0.0, "machine": self.costs.machine}
        return pd.concat(tables, ignore_index=True).assign(**common, source=REPLAYED)

    def _cast_rounds(self, batch: int) -> list[cast.Round]:
        made: list[cast.Drafter] = []

        def watched(recorded: Drafter) -> cast.Drafter:
            made.append(cast.Drafter(recorded, self.costs, self.config(batch)))
            return made[-1]

        traces = _of_one_set(self.traces, batch)
        replay.replay(traces, watched, self.costs, method=CAST, batch=batch)
        return [now for drafter in made for now in drafter.shape.rounds]

    def confidence(self) -> pd.DataFrame:
        """Rows of how path confidences foretell what is accepted, in EAGLE-3's default tree."""
        tree = self.default
        ranks = replay.path_ranks(self.traces, tree.depth, tree.top_k)
        units = np.repeat(np.arange(len(self.traces)), [len(t.drafted) for t in self.traces])
        found = confidence_rows(*ranks, tree.total_tokens - 1, units)
        common = {"method": DEFAULT, "prompts": ALL, "temperature": 0.0, "batch": 1}
        return found.assign(**common, num_prompts=len(self.traces), source=REPLAYED)

    def _rows(
        self, quantity: str, settings: Settings, costs: CostTable, batch: int
    ) -> pd.DataFrame:
        records = self._replays(settings, costs, batch)
        return self._as_rows(quantity, records, settings, costs, batch)

    def _replays(self, settings: Settings, costs: CostTable, batch: int) -> list[Record]:
        """Replays of all reported prompts as one set, autoregressive decoding among them."""
        traces = _of_one_set(self.traces, batch)
        drafts = {AUTOREGRESSIVE: None} | {name: draft for name, (draft, _) in settings.items()}
        ranks = _Ranks(traces)
        return sum(
            (
                replay.replay(traces, d, costs, method=name, batch=batch, ranks=ranks.of(d))
                for name, d in drafts.items()
            ),
            [],
        )

    def _as_rows(
        self,
        quantity: str,
        records: Sequence[Record],
        settings: Settings,
        costs: CostTable,
        batch: int,
    ) -> pd.DataFrame:
        found = self.run.decode_rows(records)
        columns = [settings.get(method, (None, {}))[1] for method in found["method"]]
        extra = pd.DataFrame(columns, index=found.index)
        if "method" in extra:
            extra["method"] = extra["method"].fillna(found["method"])
        where = {name: costs.header.get(name) for name in ("device", "dtype", "threads")}
        where |= {"machine": costs.machine, "costs": self._kind(costs), "source": REPLAYED}
        found = found.drop(columns=[*extra.columns, *where, "quantity"], errors="ignore")
        return found.assign(quantity=quantity, **where, **extra)


class _Ranks:
    """Path ranks of fixed trees, found once for all sizes of one depth and width."""

    def __init__(self, traces: Sequence[Trace]):
        self.traces, self.known = traces, {}

    def of(self, draft: MakeDrafter | TreeConfig | None) -> Any:
        if draft is None or callable(draft):
            return None
        key = draft.depth, draft.top_k
        if key not in self.known:
            self.known[key] = replay.path_ranks(self.traces, *key)
        return self.known[key]


def _verified_set(config: cast.Config) -> cast.Config:
    return replace(config, utility="pool_gain")


def _sizes_of(tree: TreeConfig, size: int) -> dict[str, Any]:
    columns = {"method": DEFAULT, "total_tokens": size}
    return columns | {"draft_depth": tree.depth, "top_k": tree.top_k}


def _of_one_set(traces: Sequence[Trace], batch: int) -> list[Trace]:
    """All traces as one prompt set, said again under other names where they fill no batch."""
    times = -(-batch // len(traces))
    names = [""] + [f" ({turn})" for turn in range(2, times + 1)]
    return [
        replace(trace, prompts=ALL, prompt_id=f"{trace.prompts}/{trace.prompt_id}{name}")
        for name in names
        for trace in traces
    ]


def _rate(
    traces: Sequence[Trace], tree: TreeConfig, costs: CostTable, batch: int, ranks: Any
) -> float:
    records = replay.replay(traces, tree, costs, method="", batch=batch, ranks=ranks)
    return replay.tokens_per_second(records)
