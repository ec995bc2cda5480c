"""GTO's experiments beside its own Table 1: greedy paths, rewards, tree shapes, arms, ablations.

Each is a stage that gives rows. What needs heads tuned alike (`gto_arms`) is tuned and measured at
tier `full`; `laptop` and `smoke` draw the rows that `full` left in the repository, and where there
are none they say by which command they are made. `python -m specrepro.gto_lab STAGE ...` measures
single stages as `full` does, on what is tuned, and puts their rows into figures/gto/results.csv.

Rows of arms carry the seed of their training (`train_seed`). Pooled over seeds (prompts "all"),
each prompt counts once for every seed, and intervals are over prompts: how far seeds lie apart, the
rows of each say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from tqdm import tqdm

from specrepro import (
    checkpoints,
    commands,
    corpus,
    eagle3,
    eagle3_lab,
    experiment,
    gto,
    gto_figures,
    recipes,
    rows,
)
from specrepro.eagle3 import TreeConfig
from specrepro.eagle3_lab import Entry
from specrepro.gto_arms import ABLATION, ARMS, GROUPS_OF_1, HEADLINE, WORK, Arm, Workshop
from specrepro.gto_rows import (
    TREE_VALUES,
    Answered,
    held_out_gains,
    held_out_levels,
    path_rows,
    reward_rows,
    tree_values,
)
from specrepro.measure import AUTOREGRESSIVE, Record, target_name
from specrepro.recipes import Recipe
from specrepro.training_cards import card_of

OURS, FIRST = "GTO", "EAGLE-3"
AS_PAPER = "EAGLE-3, 60 nodes"  # the first head with the tree that Figure 2 is about
SETS = ("chat", "humaneval", "maths")  # the paper's

STAGES = ("paths", "rewards", "shapes", "arms", "ablation", "held_out", "learning", "statistics")
LOGGED = ("clipped", "silent_groups", "ratio_deviation", "reward_gap")


def decodes(tier: str) -> dict[str, Any]:
    """What a tier decodes, where it is not what other papers do."""
    return {"sets": SETS}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much a tier measures of the stages."""

    measures: tuple[str, ...]  # stages; others are recalled
    num_prompts: int = 10  # of each set
    temperatures: tuple[float, ...] = (0.0, 1.0)
    # expansions and nodes, relative to the tree that was tuned for (Table 7)
    shapes: tuple[tuple[int, int], ...] = ((-1, -2), (0, 0), (0, 4), (1, 0), (1, 4))


NOW = ("paths", "rewards", "shapes")
PLANS = {
    "smoke": Plan(NOW, 1, (0.0,), ((0, 0), (1, 0))),
    "laptop": Plan(NOW, 4, (0.0,), ((0, 0), (0, 4), (1, 0))),
    "full": Plan(STAGES),
    "paper": Plan(NOW, 80, shapes=((-1, -10), (-1, 10), (0, 0), (0, 10), (1, 0), (1, 10))),
}


@dataclass
class Lab(eagle3_lab.Lab):
    """What GTO's notebook asks for beside Table 1; `checkpoint` and `load` are the tuned head's."""

    start: Path = eagle3.CHECKPOINT  # of the head that it began from
    workshop: Workshop | None = None

    stages: ClassVar[tuple[str, ...]] = STAGES
    alike: ClassVar[tuple[str, ...]] = ()
    plans: ClassVar[Mapping[str, Plan]] = PLANS
    drawings: ClassVar[Mapping[str, Any]] = gto_figures.DRAWINGS

    def remedy(self, stage: str) -> str:
        """How rows of a stage are made."""
        measured = f"python -m specrepro.gto_lab {stage}"
        if stage in NOW:
            return f"no rows; {measured} makes them"
        return (
            "no rows; python -m specrepro.gto_arms runs/corpus tunes the heads that are compared"
            f" (hours, it can be stopped), and {measured} measures them"
        )

    def paths(self) -> pd.DataFrame:
        """Rows of Figure 2, of both heads with the tuned head's tree, and of the paper's tree."""
        drafters = {FIRST: self._first(), OURS: self.load(self.run.target)}
        drafters[AS_PAPER] = eagle3.Drafter.load(self.start, self.run.target, eagle3.TreeConfig())
        tables = [
            path_rows(
                self.run.target, drafters, self.run.questions(name, self.num_prompts),
                prompts=name, max_new_tokens=self.run.max_new_tokens,
            )
            for name in SETS
        ]  # fmt: skip
        return pd.concat(tables)

    def rewards(self) -> pd.DataFrame:
        """Rewards of both heads' trees, and ratios, on the target's own greedy answers."""
        method, loss = self._ruler(), self._loss()
        tables = [reward_rows(loss, self._answered(name), prompts=name) for name in SETS]
        return pd.concat(tables).assign(reward=method.tuning.reward)

    def _answered(self, name: str) -> list[Answered]:
        """The prompts of a set that the target has answered greedily."""
        questions = self.run.questions(name, self.num_prompts)
        records = self._measure("rewards", [], (name,), (0.0,))[0]
        answers = {one.prompt_id: one.tokens for one in records if one.error is None}
        return [Answered(ids, answers[key]) for key, ids in questions if key in answers]

    def shapes(self) -> pd.DataFrame:
        """Rows of quantity "shapes": both heads on trees of other shapes, and the gain there."""
        tuned_for, pairs, entries = eagle3.load_head(self.checkpoint)[1], [], []
        for depth, nodes in self.plan.shapes:
            wanted = max(0, tuned_for.depth + depth), max(2, tuned_for.total_tokens + nodes)
            tree = TreeConfig(wanted[0], tuned_for.top_k, wanted[1])
            columns = {"draft_depth": tree.depth, "total_tokens": tree.total_tokens}
            both = [
                Entry(method, _with_tree(folder, tree), columns)
                for method, folder in ((OURS, self.checkpoint), (FIRST, self.start))
            ]
            entries += both
            pairs.append((both[0].key, both[1].key))
        records, found = self._measure("shapes", entries, SETS[:1], self.plan.temperatures)
        gains = self._paired(records, pairs, entries)
        gains = gains[gains["metric"] == "tau"].assign(quantity="shape_gain")
        return pd.concat([found[found["method"] != AUTOREGRESSIVE], gains])

    def arms(self) -> pd.DataFrame:
        """Rows of quantity "arms": heads of as many steps, or as much time, for every seed."""
        folders = self._folders([arm.name for arm in HEADLINE])
        entries = [self._of_arm(ARMS[name], folder) for name, folder in folders.items()]
        first = Entry(FIRST, _with_tree(self.start, self._ruler().tree), {"variant": "start"})
        if not entries:
            return pd.DataFrame()
        records, found = self._measure("arms", [first, *entries], SETS, self.plan.temperatures)
        pooled = pool_seeds(records, {e.key: _arm_of(e) for e in entries}, first.key)
        methods = dict.fromkeys(arm.method for arm in HEADLINE)
        pairs = [(OURS, other) for other in (*methods, FIRST) if other != OURS]
        pairs += [(other, FIRST) for other in methods if other != OURS]
        together = self.run.decode_rows(pooled).assign(quantity="arms")
        is_drawn = (found["prompts"] != "mean") & (found["method"] != AUTOREGRESSIVE)
        return pd.concat([found[is_drawn], together, rows.paired_differences(pooled, pairs)])

    def ablation(self) -> pd.DataFrame:
        """Rows of quantity "ablation": GTO of the first seed, and its variants (Tables 3 to 5)."""
        folders = self._folders([arm.name for arm in (*HEADLINE[:2], *ABLATION)])
        entries = [self._of_arm(ARMS[name], folder) for name, folder in folders.items()]
        entries = [
            replace(one, method=GROUPS_OF_1) if one.method == HEADLINE[1].method else one
            for one in entries
        ]
        if not entries or entries[0].method != OURS:
            return pd.DataFrame()
        records, found = self._measure("ablation", entries, SETS, self.plan.temperatures)
        pairs = [(entries[0].key, other.key) for other in entries[1:]]
        return pd.concat([found, self._paired(records, pairs, entries)])

    def held_out(self) -> pd.DataFrame:
        """Rows of quantities "held_out" and "held_out_gain": trees at every position of answers.

        Of each arm (`variant`) over the first head, and of methods, seeds pooled, over each other.
        """
        folders = self._folders(list(ARMS))
        if not folders:
            return pd.DataFrame()
        first, tables, pooled = self._sums("start", self.start), [], {}
        for name, folder in folders.items():
            arm, own = ARMS[name], self._sums(name, folder)
            pooled.setdefault(arm.method, []).append(own)
            gains = held_out_gains({arm.method: [own], FIRST: [first]}, [(arm.method, FIRST)])
            tables.append(gains.assign(variant=name, train_seed=arm.seed, prompts="by arm"))
        heads = pooled | {FIRST: [first]}
        methods = [arm.method for arm in HEADLINE[:3] if arm.method in pooled]
        pairs = [(method, FIRST) for method in methods]
        pairs += [(OURS, other) for other in methods[1:] if OURS in methods]
        together = [held_out_levels(heads), held_out_gains(heads, pairs)]
        return pd.concat([*together, *tables]).assign(temperature=0.0)

    def _sums(self, name: str, folder: Path) -> np.ndarray:
        """(answers, 1 + TREE_VALUES) of the head in a folder; taken once."""
        digest = checkpoints.digest(folder)[:8]
        place = f"held_out_{name}_{digest}_{self.num_prompts}"
        table = self.run.once(place, lambda: self._tree_values(folder))
        return table[["positions", *TREE_VALUES]].to_numpy(float)

    def _tree_values(self, folder: Path) -> pd.DataFrame:
        head, target = eagle3.load_head(folder)[0], self.run.target
        drafter = gto.GroupDrafter(head, target, self._ruler().tree)
        batches = tqdm(self._held_out_batches, desc=f"trees of {folder}")
        found = [tree_values(target, drafter, batch) for batch in batches]
        return pd.DataFrame(found, columns=["positions", *TREE_VALUES])

    @cached_property
    def _held_out_batches(self) -> list[corpus.Batch]:
        """The answers of all sets with their features, which every head reads."""
        return [one.batch(self.run.target) for name in SETS for one in self._answered(name)]

    def learning(self) -> pd.DataFrame:
        """Rows of quantity "learning": held-out tau and gain in reward as training went on.

        And of "training_cost": what a step took, where it was measured.
        """
        found = []
        for name in self._folders(list(ARMS)):
            named = self._named_arm("learning", ARMS[name])
            start = self.workshop.card(ARMS[name])["start"]  # itself, so its gain is none
            first = {"step": 0, "tau": start.get("held_out_tau"), "reward_gap": 0.0}
            found += [named | look for look in (first, *self.workshop.looks(ARMS[name]))]
        return pd.DataFrame(found + (_cost_rows(self.workshop.costs()) if found else []))

    def statistics(self, every: int = 50) -> pd.DataFrame:
        """Rows of quantity "statistics": what training logged, a mean of `every` steps a row."""
        found = []
        for name in self._folders(list(ARMS)):
            log = pd.DataFrame(self.workshop.log(ARMS[name]))
            if "clipped" not in log:  # the token loss alone drafts no trees
                continue
            means = log.groupby(log["step"] // every * every)[list(LOGGED)].mean()
            named = self._named_arm("statistics", ARMS[name])
            for step, values in means.iterrows():
                found += [
                    named | {"step": step, "metric": metric, "value": value}
                    for metric, value in values.dropna().items()
                ]
        return pd.DataFrame(found)

    # --- drafters

    def _first(self) -> eagle3.Drafter:
        """The head that the tuned one began from, with the tuned one's tree."""
        tree = self.load(self.run.target).tree
        return eagle3.Drafter.load(self.start, self.run.target, tree)

    def _ruler(self) -> gto.Gto:
        """The method whose reward is measured: the recipe's own for this target."""
        return Recipe.of(gto.Gto, self.run.target).method

    def _loss(self) -> gto.GroupTreeLoss:
        """The tuned head against the first one; groups of 4 fit into short answers."""
        head, tree = eagle3.load_head(self.checkpoint)
        first, _ = eagle3.load_head(self.start)
        method, device = self._ruler(), self.run.target.device
        tuning = replace(method.tuning, group_size=4, num_groups=8)
        heads = [one.to(device, self.run.target.dtype) for one in (head, first)]
        return gto.GroupTreeLoss(heads[0], self.run.target, tree, method.training, tuning, heads[1])

    def _folders(self, names: Sequence[str] | Mapping[str, Any]) -> dict[str, Path]:
        """Checkpoints of arms by name; those that are not there are tuned, or left out."""
        if self.workshop is None:
            self.workshop = Workshop(self.run.target, self.run.work / "arms", self.start)
        chosen = [ARMS[name] for name in names]
        absent = [arm for arm in chosen if self.workshop.card(arm) is None]
        if self.trains:
            for arm in absent:
                self.workshop.tune(arm, self._features())
        elif absent:
            print(f"left out, not tuned yet: {', '.join(arm.name for arm in absent)}")
        kept = chosen if self.trains else [arm for arm in chosen if arm not in absent]
        return {arm.name: self.workshop.folder(arm) for arm in kept}

    def _of_arm(self, arm: Arm, folder: Path) -> Entry:
        columns = {"variant": arm.name, "train_seed": arm.seed}
        return Entry(arm.method, _with_tree(folder), columns, folder)

    def _named_arm(self, quantity: str, arm: Arm) -> dict[str, Any]:
        named = {"quantity": quantity, "method": arm.method, "prompts": "held out"}
        return named | {"temperature": 0.0, "variant": arm.name, "train_seed": arm.seed}


def pool_seeds(records: Sequence[Record], arms: Mapping[str, Arm], first: str) -> list[Record]:
    """Records of all sets and seeds as one set "all", each prompt a session of every seed's answer.

    Of what was decoded once, the baseline and the `first` head, every seed has the same record.
    """
    seeds = sorted({arm.seed for arm in arms.values()})
    found = []
    for record in records:
        arm = arms.get(record.method)
        method = arm.method if arm else FIRST if record.method == first else record.method
        for seed in [arm.seed] if arm else seeds:
            place = f"{record.prompts}/{record.prompt_id}"
            own = {"prompts": "all", "prompt_id": f"{place}, seed {seed}", "session": place}
            found.append(replace(record, method=method, **own))
    return found


def _cost_rows(costs: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Throughput of training by method, and the memory that a tree of GTO's adds."""
    found = []
    for method, cost in costs.items():
        row = {"quantity": "training_cost", "method": method, "value": cost["seconds"]}
        row |= {"words_per_second": cost["words"] / cost["seconds"], "peak_bytes": cost["peak"]}
        if cost["trees"]:
            added = cost["peak"] - min(one["peak"] for one in costs.values())
            row |= {"trees_per_second": cost["trees"] / cost["seconds"]}
            row |= {"bytes_per_tree": added / cost["trees"]}
        found.append(row)
    return found


def _arm_of(entry: Entry) -> Arm:
    return ARMS[entry.columns["variant"]]


def _with_tree(folder: Path, tree: TreeConfig | None = None) -> eagle3_lab.Load:
    """The drafter of a checkpoint with its own tree, or another."""
    return lambda target: eagle3.Drafter.load(folder, target, tree)


def obtain_head(
    run: experiment.Run, named: str = "", from_scratch: bool = False, start: str = ""
) -> Path:
    """The tuned head to measure: the folder named, the committed one, or one tuned from `start`.

    At tier `smoke`, where no head is committed for this target, a little tuning stands in for it.
    Elsewhere that is a ValueError with the remedy.
    """
    committed = gto.CHECKPOINT
    is_there = card_of(committed).get("target") == target_name(run.target)
    if named and not from_scratch:
        return Path(named)
    if is_there and not from_scratch:
        return committed
    if not from_scratch and run.tier_name != "smoke":
        raise ValueError(
            f"no tuned head for target {run.target_name!r} in checkpoints/gto; make one with"
            " python -m specrepro.gto CORPUS checkpoints/gto, name one with -p checkpoint, or give"
            " --from-scratch"
        )
    recipe = recipes.changed(Recipe.of(gto.Gto, run.target), {"start": start})
    return recipes.obtain_checkpoint(
        gto.Gto,
        run.target,
        from_scratch=True,
        work=run.work,
        recipe=recipe,
        num_answers=run.tier.num_answers,
    )


# --- single stages


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m specrepro.gto_lab STAGE ...`: measure stages as tier `full` does."""
    parser = eagle3_lab.stage_parser("gto", __doc__, STAGES, gto.CHECKPOINT, WORK)
    parser.add_argument("--start", type=Path, default=eagle3.CHECKPOINT, help="head to begin from")
    options = parser.parse_args(arguments)
    run, plan = eagle3_lab.run_and_plan("gto", options, PLANS["full"])
    workshop = Workshop(run.target, options.work, options.start)
    load = gto.drafters(options.checkpoint)[OURS]
    lab = Lab(run, options.checkpoint, load, plan, workshop, trains=False, start=options.start)
    run.depends_on(**identity(load(run.target), options.checkpoint, options.start))
    eagle3_lab.take_stages(lab, options.stages)


def identity(drafter: eagle3.Drafter, checkpoint: Path, start: Path) -> dict[str, Any]:
    """What the records of a run depend on."""
    return eagle3_lab.identity(drafter, checkpoint) | {"start": checkpoints.digest(start)}


if __name__ == "__main__":
    commands.run(main)
