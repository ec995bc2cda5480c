"""EAGLE-3's experiments beside its own Table 1: baselines, ablations, data, batches, sensitivity.

Each is a stage that gives rows. What needs heads trained alike (`eagle3_variants`) is trained and
measured at tier `full`; `laptop` and `smoke` draw the rows that `full` left in the repository, and
where there are none they say by which command they are made. `python -m specrepro.eagle3_lab
STAGE ...` measures single stages as `full` does, on what is trained, and puts their rows into
figures/eagle3/results.csv.

Rows of heads that were trained on one budget carry `budget` "equal" and say what it was
(`trained_tokens`, `steps`, `trained_positions`); they are never mixed with those of the committed
head, and outlive it. Every stage has a file of records of its own, so what its rows compare was
timed in turns; heads that are to be compared by the clock have to be there when it is taken.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from specrepro import (
    checkpoints,
    commands,
    coupled,
    draft_lm,
    eagle2,
    eagle3,
    eagle3_figures,
    experiment,
    losslessness,
    measure,
    medusa,
    ngram,
    recipes,
    recycling,
    rows,
)
from specrepro.coupled import COUPLED, CoupledDrafter
from specrepro.decoding import Drafter, Sampling
from specrepro.eagle3 import TreeConfig
from specrepro.eagle3_variants import OVER_TRAINING, SCALES, VARIANTS, WORK, Workshop
from specrepro.headroom import SelfDrafter
from specrepro.measure import AUTOREGRESSIVE, Record
from specrepro.target_model import EMBEDDED, Target
from specrepro.training_cards import budget_of, card_of, training_rows

OURS, EQUAL = "EAGLE-3", "equal"
SHARED, LONG = "equal epochs", "as many steps as on all"
ITSELF = "the target itself"
Load = Callable[[Target], Drafter]
ALL_SETS = ("chat", "humaneval", "maths", "instruction", "summarisation")
TRAINED: dict[str, Callable[..., dict[str, Load]]] = {  # of a folder, and sizes of a tree
    "eagle2": lambda *a, **tree: {m: eagle2.drafters(*a, **tree)[m] for m in ("EAGLE", "EAGLE-2")},
    "medusa": medusa.drafters,
    "draft_lm": draft_lm.drafters,
}
UNTRAINED: dict[str, Load] = {
    "PLD": ngram.DRAFTERS["PLD"],
    "Lookahead": recycling.DRAFTERS["Lookahead"],
}
ABLATED = {  # variant -> its name in tables
    "eagle3": OURS,
    "eagle3_final": "EAGLE-3 (top feature only)",
    "eagle3_no_ttt": "EAGLE-3 (no training-time test)",
    "eagle3_final_no_ttt": "EAGLE-3 (top feature only, no training-time test)",
    "eagle3_target_head": "EAGLE-3 (output head begun as the target's)",
    "eagle2_no_feature_loss": "EAGLE-2 (no feature loss)",
}
CHAINS = {  # variants whose n-alpha is measured -> their loader of a chain, and their name
    **{name: (eagle3, "EAGLE-3 chain", method) for name, method in ABLATED.items()},
    "eagle3_ttt_5": (eagle3, "EAGLE-3 chain", "EAGLE-3 (5 steps of training-time test)"),
    "eagle2": (eagle2, "EAGLE chain", "EAGLE"),
    "eagle2_no_feature_loss": (eagle2, "EAGLE chain", "EAGLE (no feature loss)"),
}
FIRST_BY_DEPTH = (OURS, "EAGLE", "EAGLE (no feature loss)")  # less every other, by depth
VARIED = {  # variant -> what is varied, and its level
    "eagle3_no_ttt": ("training-time-test steps", 1),
    "eagle3_ttt_2": ("training-time-test steps", 2),
    "eagle3_ttt_5": ("training-time-test steps", 5),
    "eagle3_vocab_2048": ("draft vocabulary", 2048),
    "eagle3_vocab_16384": ("draft vocabulary", 16384),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much a tier measures of the stages."""

    measures: tuple[str, ...]  # stages; others are recalled
    num_prompts: int = 10  # of each set
    sets: tuple[str, ...] = ALL_SETS  # of the baselines
    temperatures: tuple[float, ...] = (0.0, 1.0)
    untrained: tuple[str, ...] = ("PLD", "Lookahead")
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    depths: tuple[int, ...] = (1, 2, 4, 6)
    widths: tuple[int, ...] = (4, 8)
    sizes: tuple[int, ...] = (8, 16, 24, 32)


STAGES = (
    "baselines", "ablation", "ablation_by_depth", "data_scaling", "sensitivity", "throughput",
    "sweep", "papers_tree", "headroom", "training", "audit_greedy", "audit_sampled",
)  # fmt: skip
AUDITS = STAGES[-2:]
ALIKE_CHAIN = "chain of 3, trained alike"
ALIKE = ("ablation", "ablation_by_depth", "data_scaling", "sensitivity")  # the committed head aside
FEWEST_BATCHES = 3  # of more than one sequence: an interval wants as many
PLANS = {
    "smoke": Plan(
        ("baselines", "throughput", "sweep", "training"), 1, ("chat", "maths"), (0.0,),
        batches=(1,), depths=(2,), widths=(8,), sizes=(8,),
    ),
    "laptop": Plan(
        ("baselines", "sweep", "training"), 2, temperatures=(0.0,), untrained=("PLD",),
        depths=(2, 4), widths=(8,), sizes=(8, 16, 32),
    ),
    "full": Plan(STAGES),
    "paper": Plan(
        ("baselines", "throughput", "sweep", "training"), 80, depths=(3, 7), widths=(10,),
        sizes=(16, 32, 60), batches=(1, 2, 4, 8, 16, 24),  # MT-bench has 80 prompts, three times 24
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One drafter to measure."""

    method: str  # as tables name it
    load: Load
    columns: Mapping[str, Any] = field(default_factory=dict)  # of its rows
    checkpoint: Path | None = None  # where the run's own identity does not cover it

    @property
    def key(self) -> str:
        """Its name among the records: a head that was trained anew is another drafter."""
        digest = checkpoints.digest(self.checkpoint)[:8] if self.checkpoint else ""
        varied = (f"{name} {value}" for name, value in self.columns.items() if name in _VARYING)
        return ", ".join(filter(None, [self.method, *varied, digest]))


_VARYING = ("draft_depth", "total_tokens", "top_k", "shape", "variant")


@dataclass
class Lab:
    """What EAGLE-3's notebook asks for beside its own head's Table 1."""

    run: experiment.Run
    checkpoint: Path  # of the head
    load: Load  # the head with the tree that Table 1 is measured with
    plan: Plan | None = None
    workshop: Workshop | None = None
    committed: Path | None = None  # the baselines' checkpoints; None is where `_baseline` says
    trains: bool = True  # what a stage of tier `full` lacks

    stages: ClassVar[tuple[str, ...]] = STAGES
    alike: ClassVar[tuple[str, ...]] = ALIKE  # stages that the head itself has no part in
    plans: ClassVar[Mapping[str, Any]] = PLANS
    drawings: ClassVar[Mapping[str, Any]] = eagle3_figures.DRAWINGS

    def __post_init__(self) -> None:
        self.plan = self.plan or self.plans[self.run.tier_name]
        self.checkpoint = Path(self.checkpoint)

    # --- stages

    def show(self, stage: str, reported: pd.DataFrame | None = None) -> Figure | None:
        """Take a stage and draw it; where it has no rows, print how they are made."""
        if not self.take(stage):
            print(f"{stage}: {self.remedy(stage)}")
            return None
        name, draw = self.drawings[stage]
        beside = () if reported is None else (reported,)
        return self.run.save(draw(self.run.rows, *beside), name)

    def take(self, stage: str) -> bool:
        """Add the stage's rows to the run's: recalled, measured, or, with False, none."""
        if stage not in self.stages:
            raise ValueError(f"unknown stage {stage!r}; choose one of {', '.join(self.stages)}")
        is_measured = stage in self.plan.measures
        is_recalled = self.run.tier_name == "laptop" or not is_measured
        if is_recalled and self.run.recall(stage, self._digest):
            return True
        found = getattr(self, stage)() if is_measured else pd.DataFrame()
        if len(found):
            named = {} if stage in self.alike else {"checkpoint": self._digest}
            self.run.keep(found.assign(stage=stage, **named))
        return len(found) > 0

    @property
    def num_prompts(self) -> int:
        """Of each set: what the run was asked for, or else the plan's."""
        return self.run.asked_prompts or self.plan.num_prompts

    @cached_property
    def _digest(self) -> str:
        """Of the head, as rows name it."""
        return checkpoints.digest(self.checkpoint)[:12]

    def remedy(self, stage: str) -> str:
        """How rows of a stage are made."""
        measured = f"python -m specrepro.eagle3_lab {stage}{self._command_options}"
        if stage in ("throughput", "sweep", "papers_tree", "baselines", "headroom", *AUDITS):
            return f"no rows; {measured} makes them"
        if stage == "training":
            return f"no card of {self.checkpoint} says how its tau grew; train it anew"
        answers = self._of_target or " --committed --share 0.25"
        return (
            f"no rows; python -m specrepro.corpus runs/corpus{answers}, then python"
            f" -m specrepro.eagle3_variants runs/corpus --share 1{self._of_target} trains the heads"
            f" that are compared (hours, it can be stopped), and {measured} measures them"
        )

    @property
    def _command_options(self) -> str:
        is_paper = self.run.tier_name == "paper"
        of_tier = f" --tier paper --checkpoint {self.checkpoint}" if is_paper else ""
        return self._of_target + of_tier

    def baselines(self) -> pd.DataFrame:
        """Rows of quantity "baselines": Table 1's methods, untrained and of committed checkpoints.

        EAGLE-3's own head is among them, timed in turns with them; trees are of its tree's size.
        """
        others = [Entry(name, UNTRAINED[name]) for name in self.plan.untrained] + self._trained()
        ours = Entry(OURS, self.load, budget_of(card_of(self.checkpoint)))
        records, found = self._measure(
            "baselines", [ours, *others], self.plan.sets, self.plan.temperatures
        )
        pairs = [(OURS, entry.key) for entry in others]
        return pd.concat([found, self._paired(records, pairs, others)])

    def ablation(self) -> pd.DataFrame:
        """Rows of quantity "ablation": heads of one budget, EAGLE-3's and its baselines'."""
        entries = self._alike(ABLATED) + self._alike_baselines()
        if not entries:
            return pd.DataFrame()
        records, found = self._measure("ablation", entries, ALL_SETS, self.plan.temperatures)
        better = [entry for entry in entries if entry.method in (OURS, ABLATED["eagle3_final"])]
        pairs = [(one.key, other.key) for one in better for other in entries if one != other]
        differences = self._paired(records, pairs, entries)
        return pd.concat([found, differences]).assign(budget=EQUAL)

    def ablation_by_depth(self) -> pd.DataFrame:
        """Rows of quantity "ablation_by_depth": n-alpha on chains, of heads of one budget."""
        entries = []
        for name, folder in self._same_budget(self._folders(CHAINS)).items():
            module, chain, method = CHAINS[name]
            columns = self._budget_of(name) | {"shape": "chain"}
            entries.append(Entry(method, module.drafters(folder)[chain], columns, folder))
        if not entries:
            return pd.DataFrame()
        records, _ = self._measure("ablation_by_depth", entries, ("chat",), (0.0,))
        drafted = [record for record in records if record.method != AUTOREGRESSIVE]
        levels = max(num for record in drafted for num in record.drafted)  # of a chain, its length
        found = rows.acceptance_by_depth(drafted, levels).assign(quantity="ablation_by_depth")
        firsts = [one.key for one in entries if one.method in FIRST_BY_DEPTH]
        pairs = [(key, one.key) for key in firsts for one in entries if key != one.key]
        differences = rows.paired_by_depth(drafted, pairs, levels)
        both = self._named(pd.concat([found, differences], ignore_index=True), entries)
        return both.assign(top_k=1, budget=EQUAL)

    def data_scaling(self) -> pd.DataFrame:
        """Rows of quantity "data_scaling", `data_scale` relative to the smallest share.

        And of quantity "paired_gain": how much more EAGLE-3 gains from data than EAGLE-2.
        """
        entries = []
        for method in (OURS, "EAGLE-2"):
            base = "eagle3" if method == OURS else "eagle2"
            scales = {base if scale == 1 else f"{base}_x{scale:g}": scale for scale in SCALES}
            for name, folder in self._folders(scales).items():
                columns = {"data_scale": scales[name] / min(SCALES), "budget": SHARED}
                columns |= self._budget_of(name)
                entries.append(Entry(method, _tree(folder, name), columns, folder))
        for name, folder in self._folders([OVER_TRAINING.name]).items():
            columns = {"data_scale": 1.0, "budget": LONG} | self._budget_of(name)
            entries.append(Entry(f"{OURS} ({LONG})", _tree(folder, name), columns, folder))
        if not entries:
            return pd.DataFrame()
        records, found = self._measure("data_scaling", entries, ("chat",), (0.0,))
        return pd.concat([found, _gains_from_data(records, entries)])

    def sensitivity(self) -> pd.DataFrame:
        """Rows of quantity "sensitivity": tau by draft vocabulary and training-time-test steps."""
        own = recipes.Recipe.of(eagle3.Eagle3, self.run.target).method
        at_default = {"training-time-test steps": own.training.steps}
        at_default["draft vocabulary"] = own.draft_vocab_size
        others = [name for name, level in VARIED.items() if level not in at_default.items()]
        entries = self._alike(dict.fromkeys(["eagle3", *others], OURS))
        if len(entries) < 2:
            return pd.DataFrame()
        _, found = self._measure("sensitivity", entries, ("chat",), (0.0,))
        parts = []
        for row in found[found["method"] == OURS].to_dict("records"):
            varied = [VARIED[row["variant"]]] if row["variant"] in VARIED else at_default.items()
            parts += [row | {"setting": setting, "level": level} for setting, level in varied]
        return pd.DataFrame(parts).assign(budget=EQUAL)

    def throughput(self) -> pd.DataFrame:
        """Rows of quantity "throughput": chains of 3, as serving engines draft, and the tree.

        With EAGLE's chains beside EAGLE-3's, of heads of one budget, where the tier has such heads.
        """
        chain = TreeConfig(depth=2, top_k=1, total_tokens=4)
        alike = []
        if "ablation" in self.plan.measures:
            alike = self._alike({"eagle3": OURS, "eagle2": "EAGLE"}, chain, shape=ALIKE_CHAIN)
        entries = [
            Entry(OURS, _tree(self.checkpoint, tree=chain), {"shape": "chain of 3"}),
            Entry(OURS, self.load, {"shape": "tree"}),
            *alike,
        ]
        tables = []
        for batch in (size for size in self.plan.batches if size <= self.run.num_prompts):
            records, found = self._measure("throughput", entries, ("chat",), (0.0,), batch=batch)
            tables += [found, self._paired(records, [tuple(one.key for one in alike)], entries)]
        return pd.concat(tables)

    def sweep(self) -> pd.DataFrame:
        """Rows of quantity "sweep": the tree's depth, width and size, and the tree in use."""
        varied = itertools.product(self.plan.depths, self.plan.widths, self.plan.sizes)
        trees = [TreeConfig(*sizes) for sizes in varied] + [self.load(self.run.target).tree]
        entries = [self._of_tree(tree) for tree in dict.fromkeys(trees)]
        _, found = self._measure("sweep", entries, ("chat",), (0.0,))
        return found[found["method"] == OURS]

    def papers_tree(self) -> pd.DataFrame:
        """Rows of quantity "papers_tree": Table 1 with the paper's own tree, however slow here."""
        entries = [self._of_tree(TreeConfig())]
        return self._measure("papers_tree", entries, ALL_SETS, self.plan.temperatures)[1]

    def headroom(self) -> pd.DataFrame:
        """Rows of quantity "headroom": sampled tau of the head and of the target, by tree size.

        Who knows the distribution of every word to come, and no more, accepts that much; the
        coupled head also knows the dice.
        """
        own, entries = self.load(self.run.target).tree, []
        for size in sorted({own.total_tokens, *self.plan.sizes}):
            tree = replace(own, total_tokens=size)
            head, itself = self._of_tree(tree), partial(SelfDrafter, tree=tree)
            seeing = partial(CoupledDrafter.load, self.checkpoint, tree=tree)
            entries += [head, replace(head, method=COUPLED, load=seeing)]
            entries += [replace(head, method=ITSELF, load=itself)]
        found = self._measure("headroom", entries, ALL_SETS[:3], (1.0,))[1]
        timed = [name for name in found if name.startswith(("speedup", "tokens_per", "seconds"))]
        return found[found["method"] != AUTOREGRESSIVE].drop(columns=timed)

    def _of_tree(self, tree: TreeConfig) -> Entry:
        columns = {"draft_depth": tree.depth, "total_tokens": tree.total_tokens}
        load = _tree(self.checkpoint, tree=tree)
        return Entry(OURS, load, columns | {"top_k": tree.top_k})

    def training(self) -> pd.DataFrame:
        """Rows of quantity "training": held-out tau by training step, as the cards tell it."""
        found = training_rows(card_of(self.checkpoint)).assign(head="the head of Table 1")
        long = self._folders([OVER_TRAINING.name]) if self.run.tier_name == "full" else {}
        tables = [
            training_rows(card_of(folder)).assign(head="a head trained on little for long")
            for folder in long.values()
        ]
        return pd.concat([found, *tables])

    def audit_greedy(self) -> pd.DataFrame:
        """Rows of the audit of greedy decoding: exact in float32, near ties in half precision."""
        return self._audited(losslessness.GREEDY)

    def audit_sampled(self) -> pd.DataFrame:
        """Rows of the audit of decoding at temperature 1, in float32."""
        return self._audited(losslessness.SAMPLED)

    def _audited(self, sampling: Sampling) -> pd.DataFrame:
        loaders, others = drafters(self.checkpoint), controls(self.checkpoint)
        return self.run.audited(loaders, others, samplings=(sampling,))

    def audit(self, loaders: Mapping[str, Load]) -> pd.DataFrame:
        """This tier's own audit, and the larger ones that `full` left in the repository."""
        if self.run.tier_name == "full":
            for stage in AUDITS:
                self.take(stage)
            return self.run.of("losslessness", "near_tie")
        for stage in AUDITS:
            self.run.recall(stage, self._digest)
        return self.run.audit(loaders, controls(self.checkpoint))

    # --- drafters

    def _trained(self) -> list[Entry]:
        """The baselines that have a checkpoint for this target, with trees of our size.

        At tier `paper` EAGLE-2's are as deep as its own checkpoint says: six levels, not eight.
        """
        if self._remakes:
            for name in TRAINED:
                self._remake(name)
        tree, entries = asdict(self.load(self.run.target).tree), []
        alike = {name: tree[name] for name in ("top_k", "total_tokens")}
        eagle2s = alike if self.run.tier_name == "paper" else tree
        sizes = {"eagle2": eagle2s, "medusa": {"total_tokens": tree["total_tokens"]}}
        for name in filter(self._is_there, TRAINED):
            folder = self._baseline(name)
            loaders = TRAINED[name](folder, **sizes.get(name, {}))
            columns = budget_of(card_of(folder))
            entries += [Entry(m, load, columns, folder) for m, load in loaders.items()]
        return entries

    @property
    def _remakes(self) -> bool:
        """Tier `full` trains the baselines too, as the recipes of what is committed say."""
        return self.run.tier_name == "full" and self.trains and self.committed is None

    def _remake(self, name: str) -> None:
        work = self._baseline(name).parent
        method = VARIANTS[name].method
        recipes.obtain_checkpoint(method, self.run.target, from_scratch=True, work=work)

    def _baseline(self, name: str) -> Path:
        """Folder of a baseline's checkpoint: committed, or below runs where it is made here.

        As it is at tier `full`, and for every target but the embedded one.
        """
        if self.committed is None and (self._remakes or self.run.target_name != EMBEDDED):
            return self.run.work.parent / name / "checkpoint"
        return (self.committed or recipes.COMMITTED) / name

    def _is_there(self, name: str) -> bool:
        own = measure.target_name(self.run.target)
        return card_of(self._baseline(name)).get("target") == own

    def left_out(self) -> list[str]:
        """A line for every baseline without a checkpoint, with the remedy."""
        absent = [] if self._remakes else [name for name in TRAINED if not self._is_there(name)]
        return [self._line_without(name) for name in absent]

    def _line_without(self, name: str) -> str:
        folder = self._baseline(name)
        if folder.is_relative_to(experiment.ROOT):
            folder = folder.relative_to(experiment.ROOT)
        return (
            f"{', '.join(TRAINED[name](Path()))} left out: no checkpoint for this target in"
            f" {folder}; python -m specrepro.{name} CORPUS {folder}{self._of_target} trains one"
        )

    @property
    def _of_target(self) -> str:
        """The option that a command needs for a target of one's own."""
        name = self.run.target_name
        return "" if name == EMBEDDED else f" --target {name}"

    def _folders(self, names: Sequence[str] | Mapping[str, Any]) -> dict[str, Path]:
        """Checkpoints of variants by name; those that are not there are trained, or left out."""
        if self.workshop is None:
            self.workshop = Workshop(self.run.target, self.run.work / "variants")
        variants = [VARIANTS[name] for name in names]
        absent = [one for one in variants if self.workshop.card(one) is None]
        if self.trains:
            for variant in absent:
                self.workshop.train(variant, self._features())
        elif absent:
            print(f"left out, not trained yet: {', '.join(one.name for one in absent)}")
        kept = variants if self.trains else [one for one in variants if one not in absent]
        return {one.name: self.workshop.folder(one) for one in kept}

    def _features(self) -> Path:
        return recipes.features_of(self.run.target, self.run.work.parent / "features")

    def _alike(
        self, names: Mapping[str, str], tree: TreeConfig | None = None, **columns: object
    ) -> list[Entry]:
        """Variants that draft trees of their own, or one, which must have had one budget."""
        return [
            Entry(names[name], _tree(folder, name, tree), self._budget_of(name) | columns, folder)
            for name, folder in self._same_budget(self._folders(names)).items()
        ]

    def _alike_baselines(self) -> list[Entry]:
        found = self._same_budget(self._folders(["eagle3", *TRAINED]))
        return [
            Entry(method, load, self._budget_of(name), folder)
            for name, folder in found.items()
            if name in TRAINED
            for method, load in TRAINED[name](folder).items()
        ]

    def _same_budget(self, folders: dict[str, Path]) -> dict[str, Path]:
        budgets = {name: budget_of(card_of(folder)) for name, folder in folders.items()}
        if any(one != next(iter(budgets.values())) for one in budgets.values()):
            told = "\n".join(f"{name}: {budget}" for name, budget in budgets.items())
            raise ValueError(
                "these heads were not trained alike; move those that differ away and train them"
                f" again:\n{told}"
            )
        return folders

    def _budget_of(self, name: str) -> dict[str, Any]:
        return {"variant": name} | budget_of(self.workshop.card(VARIANTS[name]))

    # --- measuring

    def _measure(
        self,
        quantity: str,
        entries: Sequence[Entry],
        sets: Sequence[str],
        temperatures: Sequence[float],
        *,
        batch: int = 1,
    ) -> tuple[list[Record], pd.DataFrame]:
        """Records of every entry, by its key, timed in turns, and its rows, by its method."""
        methods = {one.key: lambda one=one: one.load(self.run.target) for one in entries}
        fewest = 1 if batch == 1 else FEWEST_BATCHES
        num_prompts, records = batch * max(fewest, self.num_prompts // batch), []
        for name in sets:
            for temperature in temperatures:
                records += measure.compare(
                    self.run.target, methods, self.run.questions(name, num_prompts), prompts=name,
                    path=self.run.records / f"{quantity}.jsonl", temperature=temperature,
                    max_new_tokens=self.run.max_new_tokens, batch=batch, seed=self.run.seed,
                )  # fmt: skip
        found = self._named(self.run.decode_rows(records), entries)
        is_failed = found["quantity"] == "failed"
        return records, found.assign(quantity=found["quantity"].where(is_failed, quantity))

    def _named(self, found: pd.DataFrame, entries: Sequence[Entry]) -> pd.DataFrame:
        """Rows under their methods' names, with the columns that their entries add."""
        by_key = {one.key: one for one in entries}
        columns = [by_key[key].columns if key in by_key else {} for key in found["method"]]
        extra = pd.DataFrame([dict(one) for one in columns], index=found.index)
        named = found.drop(columns=[name for name in extra if name in found]).join(extra)
        for column in ("method", "versus"):
            if column in named:
                named[column] = named[column].map(
                    lambda key: by_key[key].method if key in by_key else key
                )
        return named

    def _paired(
        self,
        records: Sequence[Record],
        pairs: Sequence[tuple[str, str]],
        entries: Sequence[Entry],
    ) -> pd.DataFrame:
        found = rows.paired_differences(records, pairs)
        return self._named(found, entries) if len(found) else found


def _gains_from_data(records: Sequence[Record], entries: Sequence[Entry]) -> pd.DataFrame:
    """EAGLE-3's gain from the least data to all of it, less EAGLE-2's, where all four are there."""
    keys = {(one.method, one.columns["data_scale"]): one.key for one in entries}
    most = max(SCALES) / min(SCALES)
    ours, theirs = (
        tuple(keys.get((method, scale), "") for scale in (most, 1.0))
        for method in (OURS, "EAGLE-2")
    )
    return rows.paired_gains(records, ours, theirs).assign(method=OURS, versus="EAGLE-2")


def _tree(folder: Path, variant: str = "eagle3", tree: TreeConfig | None = None) -> Load:
    """The drafter of a checkpoint with its own dynamic tree, or another."""
    module = {"eagle3": eagle3, "eagle2": eagle2}[VARIANTS[variant].method.name]
    return lambda target: module.Drafter.load(folder, target, tree)


def drafters(checkpoint: Path | str, **tree: int) -> dict[str, Load]:
    """The paper's own and the coupled one; `tree` overrides the checkpoint's sizes where not 0."""
    return eagle3.drafters(checkpoint, **tree) | coupled.drafters(checkpoint, **tree)


def controls(checkpoint: Path | str) -> dict[str, Load]:
    """A head of the checkpoint's shape that has learnt nothing: it must be as lossless."""

    def untrained(target: Target) -> eagle3.Drafter:
        head, own = eagle3.load_head(checkpoint)
        return eagle3.Drafter(unlearnt(head), target, own)

    return {"EAGLE-3, random weights": untrained}


def unlearnt(module: nn.Module) -> nn.Module:
    """The module itself, with random weights, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for weight in module.parameters():
            weight.data = torch.randn_like(weight) / weight.shape[-1] ** 0.5
    return module


# --- single stages


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m specrepro.eagle3_lab STAGE ...`: measure stages as tier `full` does."""
    parser = stage_parser("eagle3", __doc__, STAGES, eagle3.CHECKPOINT, WORK)
    parser.add_argument("--tier", choices=("full", "paper"), default="full")
    options = parser.parse_args(arguments)
    run, plan = run_and_plan("eagle3", options, replace(PLANS[options.tier], measures=STAGES))
    workshop = Workshop(run.target, options.work)
    load = eagle3.drafters(options.checkpoint)[OURS]
    lab = Lab(run, options.checkpoint, load, plan, workshop, trains=False)
    run.depends_on(**identity(load(run.target), options.checkpoint))
    take_stages(lab, options.stages)


def stage_parser(
    paper: str, about: str, stages: Sequence[str], checkpoint: Path, work: Path
) -> argparse.ArgumentParser:
    """The command line of a paper's single stages."""
    parser = argparse.ArgumentParser(prog=f"python -m specrepro.{paper}_lab", description=about)
    parser.add_argument("stages", nargs="+", choices=stages, metavar="STAGE",
                        help=", ".join(stages))  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, default=checkpoint, help="of what is measured")
    parser.add_argument("--work", type=Path, default=work, help="where what is trained alike is")
    parser.add_argument("--target", default=EMBEDDED, help="smollm2, a Hub id or a folder")
    parser.add_argument(
        "--num-prompts", type=int, default=0, help="of each set; 0 is the stage's own"
    )
    parser.add_argument("--figures-dir", type=Path, default=Path("figures"))
    return parser


def run_and_plan(paper: str, options: argparse.Namespace, plan: Any) -> tuple[experiment.Run, Any]:
    """What the options ask for: a run, at tier `full` where they name none, and its plan."""
    if options.num_prompts < 0:
        raise ValueError(f"--num-prompts is {options.num_prompts}; give at least 0")
    tier = getattr(options, "tier", "full")
    run = experiment.Run(paper, tier=tier, target=options.target, figures_dir=options.figures_dir)
    return run, replace(plan, num_prompts=options.num_prompts or plan.num_prompts)


def take_stages(lab: Lab, stages: Sequence[str]) -> None:
    """Measure each stage and put its rows in place, or say how what it lacks is made."""
    for stage in stages:
        if is_done := lab.take(stage):
            replace_stage(lab.run.folder / "results.csv", lab.run.rows, stage)
        print(f"{stage}: {'done' if is_done else lab.remedy(stage)}")


def identity(drafter: eagle3.Drafter, checkpoint: Path) -> dict[str, Any]:
    """What the records of a run depend on."""
    return {"checkpoint": checkpoints.digest(checkpoint), "tree": asdict(drafter.tree)}


def replace_stage(path: Path, table: pd.DataFrame, stage: str) -> None:
    """Put the rows of one stage in place of those that a results file has of the same tier."""
    new = table[table["stage"] == stage]
    if path.is_file():
        old = pd.read_csv(path)
        is_kept = old.get("stage", pd.Series(index=old.index)) != stage
        is_kept |= ~old["tier"].isin(new["tier"])
        new = pd.concat([old[is_kept], new], ignore_index=True)
    checkpoints.write_text(path, new.to_csv(index=False))


if __name__ == "__main__":
    commands.run(main)
