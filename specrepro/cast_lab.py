"""CAST's experiments at a tier: what is measured, and what is chosen on it.

Costs, traces and the headline comparisons are measured, once per configuration, and kept beside the
run's records; `cast_rows` replays the rest under the cost tables. Its column `costs` says which:
"table" is the measured table of this run, "other table" one measured here with another number
format or number of threads, "modelled" one of a GPU that is not here; "clock" and "other clock"
mark what was timed while decoding, on this machine as it is and as those other machines. Replays
are checked twice: under costs timed in turn with the decoding ("clock"), and under those of the
run's own table, which were timed some minutes before ("clock, earlier costs").

The best fixed tree is chosen with hindsight, on all texts that are replayed: no fixed tree of the
grid is faster on them, though one may be on the few of them that are decoded and timed. What CAST
starts from, and the tree size that is held against the largest, are chosen on prompts that come
behind the reported ones in each set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import chain, cycle, islice, product, zip_longest
from pathlib import Path
from typing import Any

import torch

from specrepro import cast, checkpoints, cost_model, cost_table, eagle3, measure, replay
from specrepro import target_model as targets
from specrepro.cost_table import CostTable, Grid, Profiler
from specrepro.decoding import Drafter
from specrepro.eagle3 import TreeConfig
from specrepro.experiment import Run, sizes_of
from specrepro.measure import AUTOREGRESSIVE, Question, Record, dtype_name
from specrepro.replay import MakeDrafter, Trace
from specrepro.target_model import Target

ALL = "all"  # prompts of every set together
DEFAULT, BEST = "EAGLE-3", "EAGLE-3, best fixed tree"
EAGLE2, EAGLE2_TREE = "EAGLE-3, EAGLE-2's tree", TreeConfig(depth=5, top_k=10, total_tokens=60)
CAST, BY_HAND = "CAST", "CAST, thresholds by hand"
NET = "CAST, net of verification"  # a utility of our own
Sets = tuple[str, ...]


# --- how much a tier measures


@dataclass(frozen=True, slots=True)
class Plan:
    """How much a tier measures; sets of prompts are named by the batch size they are decoded at."""

    greedy: dict[int, Sets]
    sampled: dict[int, Sets]  # of those, the ones decoded at temperature 1 too
    elsewhere: dict[int, Sets]  # of those, the ones decoded as other machines too
    batch: int  # the batch size that is looked at beside 1 in ablation and sensitivity
    num_together: int  # prompts of each set that is decoded in batches, at least
    num_traces: int  # prompts of each set whose rounds are replayed
    num_chosen_on: int  # prompts of each set behind the reported ones
    grid: Grid  # of the run's own cost table
    other_grid: Grid  # of the tables of other number formats and threads
    modelled: tuple[int, ...]  # batch sizes of the modelled tables
    recorded: TreeConfig = TreeConfig(7, 10, 2)  # how deep and wide traces are drafted
    replayed: tuple[float, ...] = (0.0,)  # temperatures of the traces
    num_prompts: int = 0  # of each set, decoded one by one, and
    max_new_tokens: int = 0  # of each prompt; 0 takes the tier's
    num_elsewhere: int = 1  # prompts of each set decoded as other machines
    depths: tuple[int, ...] = (0, 1, 2, 3, 5, 7)  # of the fixed trees to choose from
    widths: tuple[int, ...] = (1, 2, 4, 6, 10)
    factors: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)  # on the thresholds
    machines: tuple[tuple[str, int], ...] = (("bfloat16", 2), ("bfloat16", 1), ("float32", 2))

    @property
    def sets(self) -> Sets:
        """Every set that is decoded at some batch size."""
        return tuple(dict.fromkeys(chain(*self.greedy.values())))


_SETS = ("chat", "humaneval", "maths")
_ALL_SETS = (*_SETS, "instruction", "summarisation")
_BATCHES = (1, 2, 4, 8, 16, 32)
_MANY = dict.fromkeys(_BATCHES, ("chat",)) | {1: _ALL_SETS, 8: _ALL_SETS}
_FEW_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 60)  # EAGLE-3's default among them, at batch 8 too
_FEW = Grid(_BATCHES, 256, 1, _FEW_SIZES, max_rows=480, warm_up=2, repeats=10)
_FULL = Grid(sizes=(1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 60, 96), max_rows=960, repeats=20)
_PAPER_SETS = (*_ALL_SETS, "questions")
PLANS = {
    "smoke": Plan(
        greedy={1: ("chat", "humaneval"), 2: ("chat",)}, sampled={1: ("chat",)},
        elsewhere={1: ("chat",)}, batch=2, num_together=2, num_traces=1, num_chosen_on=1,
        grid=Grid((1, 2), 256, 1, (1, 2, 4, 8), (1, 4), 8, warm_up=1, repeats=1),
        other_grid=Grid((1,), 256, 1, (1, 8), (1, 4), warm_up=1, repeats=1), modelled=(1, 2),
        recorded=TreeConfig(2, 4, 2), depths=(1, 2), widths=(1, 4), factors=(0.5, 1.0, 2.0),
        machines=(("bfloat16", 1),),
    ),
    "laptop": Plan(
        greedy={1: _SETS, 8: ("chat",)}, sampled={1: ("chat",)}, elsewhere={1: _SETS}, batch=8,
        num_together=24, num_traces=8, num_chosen_on=2, grid=_FEW,
        other_grid=replace(_FEW, batches=(1, 8), repeats=4), modelled=(1, 8, 32),
        num_prompts=2, max_new_tokens=40, depths=(0, 1, 2, 4, 7),
        factors=(0.25, 0.5, 1.0, 2.0, 4.0),
    ),
    "full": Plan(
        greedy=_MANY, sampled={1: _ALL_SETS, 8: _ALL_SETS}, elsewhere={1: _SETS, 8: _SETS}, batch=8,
        num_together=40, num_traces=16, num_chosen_on=6, grid=_FULL,
        other_grid=replace(_FULL, batches=(1, 8, 32), repeats=10), modelled=_BATCHES,
        recorded=TreeConfig(9, 10, 2), replayed=(0.0, 1.0), num_elsewhere=16,
    ),
    "paper": Plan(
        greedy=dict.fromkeys(_BATCHES, _PAPER_SETS), sampled=dict.fromkeys((1, 8), _PAPER_SETS),
        elsewhere={}, batch=8, num_together=80, num_traces=24, num_chosen_on=8,
        grid=Grid(num_buckets=8, max_rows=4128), other_grid=Grid(), modelled=_BATCHES,
        recorded=TreeConfig(9, 10, 2), replayed=(0.0, 1.0), machines=(),
    ),
}  # fmt: skip


sizes = partial(sizes_of, PLANS)  # of a tier: prompts of each set and their lengths


def decodes(tier: str) -> dict[str, Any]:
    """What a tier decodes first, where it is not what other papers do."""
    plan = PLANS[tier]
    in_batches = [f"{plan.num_together} at batch {size}" for size in plan.greedy if size > 1]
    sampled = f" (chat at 1 too; {', '.join(in_batches)})"
    return sizes(tier) | {"sets": plan.greedy[1], "sampled": sampled}


@dataclass
class Lab:
    """What CAST's notebook asks for, each thing made once."""

    run: Run
    checkpoint: Path  # of EAGLE-3's head
    default: TreeConfig = field(default_factory=TreeConfig)  # EAGLE-3's, and CAST's K
    plan: Plan | None = None

    def __post_init__(self) -> None:
        self.plan = self.plan or PLANS[self.run.tier_name]
        self.default, self.eagle2 = map(self._within_records, (self.default, EAGLE2_TREE))
        self.plain_config = cast.Config(self.default, depth=self.plan.recorded.depth)
        self.by_hand = replace(self.plain_config, thresholds=cast.PAPER_THRESHOLDS)
        self.config, self.best_fixed = cache(self.config), cache(self.best_fixed)
        self.net_config, self._target = cache(self.net_config), cache(self._target)

    def _within_records(self, tree: TreeConfig) -> TreeConfig:
        """No deeper and wider than traces are drafted."""
        most = self.plan.recorded
        return replace(tree, top_k=min(tree.top_k, most.top_k), depth=min(tree.depth, most.depth))

    @classmethod
    def of(cls, run: Run, checkpoint: Path | str, **tree: int) -> Lab:
        """With sizes of EAGLE-3's default tree where they are not 0, else the paper's."""
        chosen = {name: size for name, size in run.tree(**tree).items() if size}
        return cls(run, Path(checkpoint), TreeConfig(**chosen))

    @property
    def identity(self) -> dict[str, Any]:
        """What records depend on besides the run's own settings."""
        digest = checkpoints.digest(self.checkpoint)
        return {"checkpoint": digest, "tree": asdict(self.default), "plan": asdict(self.plan)}

    def draft(self, target: Target | None = None, tree: TreeConfig | None = None) -> eagle3.Drafter:
        """A drafter of the checkpoint."""
        return eagle3.Drafter.load(self.checkpoint, target or self.run.target, tree)

    # --- cost tables

    @cached_property
    def costs(self) -> CostTable:
        """The table of this run's number format and threads."""
        own = dtype_name(self.run.target), torch.get_num_threads()
        return self._table(*own, self.plan.grid, "costs")

    @cached_property
    def machines(self) -> list[CostTable]:
        """The run's own table, and those of the plan's other formats and numbers of threads."""
        tables = [self.costs]
        for dtype, num_threads in self.plan.machines:
            is_here = (dtype, num_threads) == (self.costs.header["dtype"], torch.get_num_threads())
            is_possible = num_threads <= (os.cpu_count() or 1) and not is_here
            if is_possible and self.run.target.device.type == "cpu":
                name = f"costs_{dtype}_{num_threads}"
                tables.append(self._table(dtype, num_threads, self.plan.other_grid, name))
        return tables

    @cached_property
    def modelled(self) -> list[CostTable]:
        """Floors of the paper's cards and one more, for a target of eight billion parameters."""
        common = {"batches": self.plan.modelled, "widest": self.default.top_k}
        return [cost_model.table(card, **common) for card in cost_model.CARDS]

    def _table(self, dtype: str, num_threads: int, grid: Grid, name: str) -> CostTable:
        drafter = checkpoints.digest(self.checkpoint)[:12]
        with cost_table.threads(num_threads):
            header = cost_table.header_of(self.run.target, drafter, self.default.top_k)
            header |= {"dtype": dtype}
            measure_it = partial(self._profile, header, grid)
            return cost_table.obtain(self.run.records / f"{name}.json", header, measure_it)

    def _profile(self, header: dict[str, Any], grid: Grid) -> CostTable:
        target = self._target(header["dtype"])
        return cost_table.profile(target, self.draft(target), header, grid, self._words)

    @property
    def _words(self) -> list[int]:
        """What costs are timed behind."""
        return [token for _, ids in self._chosen_on("chat") for token in ids]

    def costs_meanwhile(self, batch: int) -> CostTable:
        """What this machine's costs were while `compare` decoded: its speed drifts in minutes."""
        return CostTable.load(self._meanwhile(batch), self.costs.header)

    def _meanwhile(self, batch: int) -> Path:
        return self.run.records / f"costs_meanwhile_{batch}.json"

    def _target(self, dtype: str) -> Target:
        """The run's target in a number format."""
        if dtype == dtype_name(self.run.target):
            return self.run.target
        return targets.load(self.run.target_name, dtype=dtype)

    def kind(self, costs: CostTable) -> str:
        """What rows replayed under a table have in their column `costs`."""
        if costs.is_modelled:
            return "modelled"
        return "table" if costs is self.costs else "other table"

    # --- prompts and traces

    def _num_decoded(self, batch: int) -> int:
        """Prompts of a set that are decoded in batches of this size: whole batches."""
        least = self.plan.num_together if batch > 1 else 1
        return -(-max(self.run.num_prompts, least) // batch) * batch

    def _num_elsewhere(self, batch: int) -> int:
        return -(-self.plan.num_elsewhere // batch) * batch

    def _num_asked(self, name: str) -> int:
        """Prompts of a set that are reported on, decoded or recorded."""
        decoded = [self._num_decoded(b) for b, names in self.plan.greedy.items() if name in names]
        others = [
            self._num_elsewhere(b) for b, names in self.plan.elsewhere.items() if name in names
        ]
        return max(*decoded, *others, self.plan.num_traces)

    def _chosen_on(self, name: str) -> list[Question]:
        """Prompts of a set that CAST starts from, behind the reported ones."""
        num_asked = self._num_asked(name)
        return self.run.questions(name, num_asked + self.plan.num_chosen_on)[num_asked:]

    @cached_property
    def _recorded(self) -> list[Trace]:
        return replay.obtain(self.run.records / "traces", self._record)

    def _record(self) -> list[Trace]:
        found = []
        for name, temperature in product(self.plan.sets, self.plan.replayed):
            asked = self.run.questions(name, self._num_asked(name) + self.plan.num_chosen_on)
            found += replay.record(
                self.run.target, self.draft(), asked, self.plan.recorded, prompts=name,
                max_new_tokens=self.run.max_new_tokens, temperature=temperature, batch=24,
                seed=self.run.seed,
            )  # fmt: skip
        return found

    @cached_property
    def traces(self) -> list[Trace]:
        """Of all prompts that are reported on."""
        others = {(trace.prompts, trace.prompt_id) for trace in self.traces_to_choose_on}
        return [t for t in self._recorded if (t.prompts, t.prompt_id) not in others]

    @cached_property
    def traces_to_choose_on(self) -> list[Trace]:
        """Greedy ones of other prompts."""
        others = {(name, one) for name in self.plan.sets for one, _ in self._chosen_on(name)}
        chosen = [t for t in self._recorded if (t.prompts, t.prompt_id) in others]
        return [trace for trace in chosen if trace.temperature == 0]

    def replayed(self, temperature: float = 0.0) -> list[Trace]:
        """The first traces of every set, the sets by turns."""
        mine = [trace for trace in self.traces if trace.temperature == temperature]
        by_set = [[t for t in mine if t.prompts == name] for name in self.plan.sets]
        turns = zip_longest(*(found[: self.plan.num_traces] for found in by_set))
        return [trace for turn in turns for trace in turn if trace is not None]

    # --- what is chosen

    def best_fixed(self, batch: int, costs: CostTable) -> TreeConfig:
        """The fixed tree that brings most tokens a second on all replayed texts, with hindsight."""
        return self.fastest(self.replayed(), batch, costs)

    def fastest(
        self, traces: Sequence[Trace], batch: int, costs: CostTable, room: int = 0
    ) -> TreeConfig:
        """The fastest of the plan's fixed trees on these texts, by replay.

        With `room`, of those whose shape can hold so many nodes, and that have fewer.
        """
        grid = product(self.plan.depths, self.plan.widths, self.sizes(batch, costs)[1:])
        trees = [TreeConfig(*one) for one in grid]
        if room:
            trees = [one for one in trees if one.total_tokens < room <= one.num_pooled]
        return replay.fastest(of_one_set(traces, batch), trees, costs, batch)

    def sizes(self, batch: int, costs: CostTable) -> list[int]:
        """Tree sizes that were timed at this batch size, from 1."""
        largest = costs.num_tokens(batch)
        return [size for size in self.plan.grid.sizes if size <= largest]

    def config(self, batch: int, costs: CostTable) -> cast.Config:
        """CAST, its running threshold tuned on other prompts."""
        traces = of_one_set(self.traces_to_choose_on, batch)
        return cast.tuned(traces, costs, self.plain_config, batch)

    def net_config(self, batch: int, costs: CostTable) -> cast.Config:
        """The same with the utility of our own."""
        traces = of_one_set(self.traces_to_choose_on, batch)
        return cast.tuned(traces, costs, replace(self.plain_config, utility="net_gain"), batch)

    def _trees(self, batch: int, costs: CostTable) -> dict[str, TreeConfig | cast.Config]:
        """What is decoded and replayed at a batch size, by the names of tables."""
        return {
            DEFAULT: self.default,
            BEST: self.best_fixed(batch, costs),
            CAST: self.config(batch, costs),
            NET: self.net_config(batch, costs),
        }

    def drafters(
        self, batch: int, costs: CostTable | None = None, target: Target | None = None
    ) -> dict[str, Drafter]:
        """What is decoded and timed at a batch size."""
        costs = costs or self.costs
        return {
            name: self.draft(target, tree)
            if isinstance(tree, TreeConfig)
            else cast.Drafter(self.draft(target), costs, tree)
            for name, tree in self._trees(batch, costs).items()
        }

    def drafts(self, batch: int, costs: CostTable) -> dict[str, MakeDrafter | TreeConfig | None]:
        """The same as replays take it; the baseline, EAGLE-2's tree and hand-set thresholds too."""
        drafts = {AUTOREGRESSIVE: None, EAGLE2: self.eagle2}
        for name, tree in (self._trees(batch, costs) | {BY_HAND: self.by_hand}).items():
            is_fixed = isinstance(tree, TreeConfig)
            drafts[name] = tree if is_fixed else cast.shaped(costs, tree)
        return drafts

    def loaders(self) -> dict[str, Any]:
        """For the losslessness check, which decodes in another number format too.

        Costs shape a tree and no word depends on that, so the table of the run serves all.
        """
        config = self.config(1, self.costs)
        return {CAST: lambda target: cast.Drafter(self.draft(target), self.costs, config)}

    def more_loaders(self) -> dict[str, Any]:
        """Our variant, and trees as large and as small as CAST could ever draft, for the same."""
        configs = {NET: self.net_config(1, self.costs)}
        configs |= {
            f"CAST, thresholds {x:g}": replace(self.plain_config, thresholds=(x,) * 3)
            for x in (0.0, 99.0)
        }
        return {
            name: lambda target, c=config: cast.Drafter(self.draft(target), self.costs, c)
            for name, config in configs.items()
        }

    # --- what is decoded

    def compare(self, batch: int) -> list[Record]:
        """Decode and time every method, in batches of this size, and costs in between."""
        drafters, found, path = self.drafters(batch), {}, self._meanwhile(batch)
        profiler = None if path.is_file() else self._profiler(batch)
        for name, temperature, num_prompts in self._pieces(batch):
            for size, context in profiler.grid.cases if profiler else ():
                profiler.repeat(size, context)
            one = (name,), (temperature,), batch, num_prompts
            found[name, temperature] = self.run.compare(drafters, *one)
        if profiler:
            profiler.table().save(path)
        return sum(found.values(), [])

    def _pieces(self, batch: int) -> Iterator[tuple[str, float, int]]:
        """Sets, temperatures and numbers of prompts, some batches more each time."""
        step, num_prompts = max(batch, 2), self._num_decoded(batch)
        up_to = [*range(step, num_prompts, step), num_prompts]
        for sets, temperature in ((self.plan.greedy, 0.0), (self.plan.sampled, 1.0)):
            yield from product(sets.get(batch, ()), (temperature,), up_to)

    def _profiler(self, batch: int) -> Profiler:
        """Of what batches of this size meet until their last sequence ends."""
        asked = [self.run.questions(n, self._num_decoded(batch)) for n in self.plan.greedy[batch]]
        longest = max(len(ids) for _, ids in chain(*asked)) + self.run.max_new_tokens
        own = self.plan.grid
        sizes = tuple(size for size in own.batches if size <= batch)
        grid = replace(own, batches=sizes, num_buckets=longest // own.bucket + 1)
        target = self.run.target
        return Profiler(target, self.draft(), self.costs.header, grid, self._words)

    def compare_as(self, costs: CostTable, batch: int) -> list[Record]:
        """The same as another machine, greedy and on fewer prompts."""
        dtype, num_threads = costs.header["dtype"], costs.header["threads"]
        path = self.run.records / f"decoded_{dtype}_{num_threads}.jsonl"
        common = {"max_new_tokens": self.run.max_new_tokens, "repeats": self.run.tier.repeats}
        common |= {"batch": batch, "seed": self.run.seed, "path": path}
        found: list[Record] = []
        with cost_table.threads(num_threads):
            target = self._target(dtype)
            drafters = self.drafters(batch, costs, target)
            for name in self.plan.elsewhere[batch]:
                asked = self.run.questions(name, self._num_elsewhere(batch))
                found += measure.compare(target, drafters, asked, prompts=name, **common)
        return found


def of_one_set(traces: Sequence[Trace], batch: int) -> list[Trace]:
    """All traces as one prompt set of whole batches, two at least.

    What fills no whole batch is left out; where two are not filled, which have no interval, the
    first traces are said again under other names.
    """
    num_batches = max(2, len(traces) // batch) if batch > 1 else len(traces)
    named = islice(enumerate(cycle(traces)), num_batches * batch)
    return [
        replace(trace, prompts=ALL, prompt_id=f"{trace.prompts}/{trace.prompt_id} ({place})")
        for place, trace in named
    ]


def of_text(prompt_id: str) -> str:
    """Which text a prompt is, of `of_one_set` or not."""
    return prompt_id.rpartition(" (")[0] or prompt_id
