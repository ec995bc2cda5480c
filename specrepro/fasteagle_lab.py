"""FastEagle's experiments beside the comparison with EAGLE-3: cost, accuracy, ablations, batches.

Each is a stage that gives rows. What needs cascades trained alike (`fasteagle_variants`) is trained
and measured at tier `full`; `laptop` and `smoke` draw the rows that `full` left in the repository,
and where there are none they say by which command they are made. `python -m specrepro.fasteagle_lab
STAGE ...` measures single stages as `full` does and puts their rows into
figures/fasteagle/results.csv.

What drafting costs is timed on untrained weights: it does not depend on what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from specrepro import (
    cast,
    checkpoints,
    commands,
    compiled_drafting,
    eagle3,
    eagle3_lab,
    fasteagle,
    fasteagle_figures,
    fasteagle_rows,
    fasteagle_variants,
    measure,
    recipes,
    target_model,
)
from specrepro.backbone import Backbone, BestFirst
from specrepro.cost_table import CostTable
from specrepro.decoding import Drafter, decode, decode_autoregressively
from specrepro.eagle3 import TreeConfig
from specrepro.eagle3_lab import EQUAL, Entry
from specrepro.fasteagle_variants import ABLATED, EAGLE3, OURS, SAME_TIME, WORK, Bench
from specrepro.target_model import Target
from specrepro.training_cards import budget_of, card_of

SAMPLED = "FastEagle, drawn siblings"
CAST = "FastEagle, shaped by CAST"
GUESSING = {  # variant -> its name among the accuracies
    "fasteagle": OURS,
    "fasteagle_shared": ABLATED["fasteagle_shared"],
    "fasteagle_parallel": ABLATED["fasteagle_parallel"],
    "eagle3": "EAGLE-3, given the words between",
}
STAGES = (
    "drafting", "sweep", "shapes", "throughput", "compiled", "accuracy", "layers", "ablation",
)  # fmt: skip
UNTRAINED = STAGES[:5]  # which need the checkpoint alone, or nothing
ALIKE = "eagle3"  # folder, in a cascade's own, of an EAGLE-3 head of the same training


@dataclass(frozen=True, slots=True)
class Plan:
    """How much a tier measures of the stages."""

    measures: tuple[str, ...]  # stages; others are recalled
    num_prompts: int = 10  # of each set
    max_new_tokens: int = 0  # of each prompt, in the comparison too; 0 takes the tier's
    temperatures: tuple[float, ...] = (0.0, 1.0)
    levels: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)  # that drafting is timed for
    repeats: int = 20
    widths: tuple[int, ...] = (1, 2, 3, 4, 8)  # k
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    casts: bool = True  # takes a cost table, some minutes


PLANS = {
    "smoke": Plan(
        UNTRAINED[:4], 1, 0, (0.0,), levels=(1, 2, 4), repeats=3, widths=(2,),
        batches=(1,), casts=False,
    ),
    "laptop": Plan(
        UNTRAINED[:4], 2, 64, (0.0,), levels=(1, 2, 3, 5, 7), repeats=10, widths=(1, 3, 6),
        batches=(1, 2), casts=False,
    ),
    "full": Plan(STAGES),
    "paper": Plan(UNTRAINED, 80, widths=(1, 2, 4, 8, 10)),
}  # fmt: skip


def decodes(tier: str) -> dict[str, int]:
    """What a tier decodes, where it is not what other papers do."""
    return {"max_new_tokens": tokens_of(tier)}


def tokens_of(tier: str, max_new_tokens: int = 0) -> int:
    """To decode of each prompt: as asked, or the plan's; 0 is the tier's."""
    return max_new_tokens or (PLANS[tier].max_new_tokens if tier in PLANS else 0)


@dataclass
class Lab(eagle3_lab.Lab):
    """What FastEagle's notebook asks for; measured as EAGLE-3's lab measures."""

    eagle3_head: Path = eagle3.CHECKPOINT  # to compare with
    bench: Bench | None = None

    stages: ClassVar[tuple[str, ...]] = STAGES
    alike: ClassVar[tuple[str, ...]] = ()
    plans: ClassVar[Mapping[str, Plan]] = PLANS
    drawings: ClassVar[Mapping[str, Any]] = fasteagle_figures.DRAWINGS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.eagle3_head = Path(self.eagle3_head)
        self.bench = self.bench or Bench(self.run.target, self.run.work / "variants")

    def remedy(self, stage: str) -> str:
        """How rows of a stage are made."""
        measured = f"python -m specrepro.fasteagle_lab {stage}"
        if stage in UNTRAINED:
            return f"no rows; {measured} makes them"
        return (
            "no rows; python -m specrepro.fasteagle_variants runs/corpus trains the cascades that"
            f" are compared (hours, it can be stopped), and {measured} measures them"
        )

    def drafting(self) -> pd.DataFrame:
        """Rows "drafter_cost" by number of levels, of both methods, and their ratios."""
        return self.run.once("drafting", self._drafting)

    def _drafting(self) -> pd.DataFrame:
        own, found = self._backbone(), []
        prompt = self.run.questions("chat", 1)[0][1]
        for levels in self.plan.levels:
            for method, drafter in self._untrained(levels, own.top_k).items():
                times = measure.drafter_cost(
                    self.run.target, method, drafter, prompt, self.plan.repeats
                )
                found.append(times.assign(num_levels=levels, top_k=own.top_k))
        times = pd.concat(found, ignore_index=True)
        return pd.concat([times, fasteagle_rows.drafting_ratios(times, OURS, EAGLE3)])

    def _untrained(self, levels: int, top_k: int) -> dict[str, Drafter]:
        """Both methods with trees of as many levels and nodes, over as many words."""
        target, tree = self.run.target, Backbone(levels, top_k)
        words = recipes.Recipe.of(fasteagle.FastEagle, target).method.draft_vocab_size
        ours = fasteagle.FastEagle(levels, words, top_k)
        same = TreeConfig(levels - 1, top_k, tree.total_tokens)
        theirs = eagle3.Eagle3(words or target.vocab_size, same)
        return {
            name: one.drafter(one.new_module(target, []), target)
            for name, one in ((OURS, ours), (EAGLE3, theirs))
        }

    def sweep(self) -> pd.DataFrame:
        """Rows "sweep": how many levels are used, of how many words each."""
        levels = range(1, self._backbone().num_levels + 1)
        trees = [Backbone(n, k) for n in levels for k in self.plan.widths]
        entries = [Entry(OURS, self._of(tree), _columns(tree)) for tree in trees]
        found = self._measure("sweep", entries, ("chat",), (0.0,))[1]
        return found[found["method"] == OURS]

    def shapes(self) -> pd.DataFrame:
        """Rows "shapes": other trees over the same distributions, and siblings that are drawn."""
        own, methods = self._backbone(), fasteagle.drafters(self.checkpoint)
        shapes = {
            "backbone": own, "chain": replace(own, top_k=1), "best first": BestFirst.like(own),
        }  # fmt: skip
        entries = [Entry(OURS, self._of(tree), {"shape": name}) for name, tree in shapes.items()]
        entries.append(Entry(SAMPLED, methods["FastEagle sampled"], {"shape": "backbone"}))
        if self.plan.casts:
            entries.append(Entry(CAST, self._cast, {"shape": "by cost"}))
        return self._measure("shapes", entries, ("chat",), self.plan.temperatures)[1]

    def _cast(self, target: Target) -> Drafter:
        """The cascade with the tree that CAST would cut from all its levels; an extension.

        Passes cost what EAGLE-3's table of this machine says, levels nothing: no layer runs for
        them, so what is left to choose is how many nodes are verified.
        """
        own = self._backbone()
        costs = cast.costs_here(target, self.eagle3_head, own.top_k)
        is_level = costs.points["part"] == "level"
        free = costs.points.assign(value=costs.points["value"].where(~is_level, 0.0))
        tree = TreeConfig(own.depth, own.top_k, own.total_tokens)
        return cast.Drafter(
            fasteagle.Drafter.load(self.checkpoint, target),
            CostTable(costs.header, free, costs.seconds),
            cast.Config(tree, depth=own.depth),
        )

    def throughput(self) -> pd.DataFrame:
        """Rows "throughput" by batch size, with the bytes that the draft cache takes."""
        entries = [
            Entry(OURS, self.load, {"cache_bytes": self._bytes(self.load)}),
            Entry(EAGLE3, self._eagle3, {"cache_bytes": self._bytes(self._eagle3)}),
        ]
        tables = [
            self._measure("throughput", entries, ("chat",), (0.0,), batch=batch)[1]
            for batch in self.plan.batches
            if batch <= self.run.num_prompts
        ]
        return pd.concat(tables)

    def _eagle3(self, target: Target) -> Drafter:
        return eagle3.Drafter.load(self.eagle3_head, target)

    def _bytes(self, load: Callable[[Target], Drafter]) -> int:
        config = load(self.run.target).head.config
        return fasteagle_rows.cache_bytes_per_token(config, self.run.target.dtype)

    def compiled(self) -> pd.DataFrame:
        """Rows "compiled_round": a round as it is and through `torch.compile`, part by part.

        Target and drafter both; with the speedup that is left, and the ratio of drafting times.
        """
        own, fast = self.run.target, self._compiled_target()
        as_is = {OURS: self.load(own), EAGLE3: self._eagle3(own)}
        through = {OURS: self.load(fast), EAGLE3: self._eagle3(fast)}
        through = {name: compiled_drafting.compiled(one) for name, one in through.items()}
        tables = [self._rounds("eager", own, as_is), self._rounds("torch.compile", fast, through)]
        return pd.concat(tables)

    def _compiled_target(self) -> Target:
        return target_model.load(self.run.target_name, self.run.target.dtype, compile=True)

    def _rounds(self, way: str, target: Target, drafters: Mapping[str, Drafter]) -> pd.DataFrame:
        run = self.run
        asked = run.questions("chat", self.num_prompts)
        for drafter, (_, ids) in product(drafters.values(), asked):  # or compiling would be timed
            decode(target, drafter, ids, run.max_new_tokens)
        records = measure.compare(
            target, drafters, asked, prompts="chat", path=run.records / f"{way}.jsonl",
            max_new_tokens=run.max_new_tokens, seed=run.seed,
        )  # fmt: skip
        decoded = run.decode_rows(records).assign(quantity="compiled")
        rounds = fasteagle_rows.rounds_of_both(records, OURS, EAGLE3)
        return pd.concat([decoded, *rounds]).assign(execution=way)

    def accuracy(self) -> pd.DataFrame:
        """Rows "accuracy_by_depth": cascade, shared layer, parallel layers, and EAGLE-3's head."""
        folders, texts = self._folders(list(GUESSING)), self._texts()
        own = recipes.Recipe.of(fasteagle.FastEagle, self.run.target).method.tree
        tables = []
        for name, folder in folders.items():
            guesses = self._guesses(name, folder, own)
            found = fasteagle_rows.accuracy_by_depth(
                guesses, self.run.target, texts, sorted({1, own.top_k})
            )
            named = {"method": GUESSING[name], "prompts": "chat"} | self._of_card(name)
            tables.append(found.assign(**named))
        return pd.concat(tables) if tables else pd.DataFrame()

    def _guesses(self, name: str, folder: Path, tree: Backbone) -> fasteagle_rows.Guesses:
        if name == "eagle3":
            head, _ = eagle3.load_head(folder)
            return fasteagle_rows.guesses_of_eagle3(
                head, self.run.target, tree.top_k, tree.num_levels
            )
        made, _ = fasteagle.load_cascade(folder)
        return fasteagle_rows.guesses_of_cascade(made, self.run.target, tree.top_k)

    def _texts(self) -> list[fasteagle_rows.Text]:
        """Questions with the target's own greedy answers."""
        questions = self.run.questions("chat", self.num_prompts)
        limit = self.run.max_new_tokens
        return [
            (ids, decode_autoregressively(self.run.target, ids, max_new_tokens=limit).tokens)
            for _, ids in questions
        ]

    def layers(self) -> pd.DataFrame:
        """Rows "layers": cascades of other lengths, each with as many words a level."""
        names = ["fasteagle", *(f"fasteagle_{n}_layers" for n in fasteagle_variants.LAYERS)]
        entries = [
            replace(entry, columns={**entry.columns, "draft_depth": self._length(entry)})
            for entry in self._alike(dict.fromkeys(names, OURS))
        ]
        if not entries:
            return pd.DataFrame()
        found = self._measure("layers", entries, ("chat",), (0.0,))[1]
        return found[found["method"] == OURS].assign(budget=EQUAL)

    def ablation(self) -> pd.DataFrame:
        """Rows "ablation": cascades of one budget, and EAGLE-3's head; then one of its time."""
        entries = self._alike(ABLATED)
        for folder in self._folders([SAME_TIME]).values():
            columns = {"variant": SAME_TIME} | budget_of(card_of(folder))
            entries.append(Entry(f"{OURS}, in EAGLE-3's time", self._at(folder), columns, folder))
        if not entries:
            return pd.DataFrame()
        records, found = self._measure("ablation", entries, ("chat",), self.plan.temperatures)
        ours = [entry.key for entry in entries if entry.method == OURS]
        pairs = [(one, other.key) for one in ours for other in entries if other.key != one]
        return pd.concat([found, self._paired(records, pairs, entries)]).assign(budget=EQUAL)

    # --- drafters

    def _backbone(self) -> Backbone:
        """The checkpoint's own."""
        return fasteagle.load_cascade(self.checkpoint)[1]

    def _of(self, tree: Any) -> Callable[[Target], Drafter]:
        return lambda target: fasteagle.Drafter.load(self.checkpoint, target, tree)

    def _at(self, folder: Path) -> Callable[[Target], Drafter]:
        if folder.parent.name == "eagle3":
            return lambda target: eagle3.Drafter.load(folder, target)
        return lambda target: fasteagle.Drafter.load(folder, target)

    def _length(self, entry: Entry) -> int:
        return fasteagle.load_cascade(entry.checkpoint)[1].num_levels

    def _alike(self, names: Mapping[str, str]) -> list[Entry]:
        """Variants that must have had one budget."""
        return [
            Entry(names[name], self._at(folder), self._of_card(name), folder)
            for name, folder in self._same_budget(self._folders(list(names))).items()
        ]

    def _of_card(self, name: str) -> dict[str, Any]:
        return {"variant": name} | budget_of(card_of(self._folder(name)))

    def _folder(self, name: str) -> Path:
        return self.bench.work / name / "checkpoint"

    def _folders(self, names: Sequence[str]) -> dict[str, Path]:
        """Checkpoints of variants by name; those that are not there are trained, or left out."""
        absent = [name for name in names if not card_of(self._folder(name))]
        if absent and self.trains:
            fasteagle_variants.train(self.bench, absent, self._features())
            absent = []
        elif absent:
            print(f"left out, not trained yet: {', '.join(absent)}")
        return {name: self._folder(name) for name in names if name not in absent}


def _columns(tree: Backbone) -> dict[str, int]:
    named = {"draft_depth": tree.num_levels, "top_k": tree.top_k}
    return named | {"total_tokens": tree.total_tokens}


def controls(checkpoint: Path | str) -> dict[str, Callable[[Target], Drafter]]:
    """A cascade of the checkpoint's shape that has learnt nothing: it must be as lossless."""

    def untrained(target: Target) -> fasteagle.Drafter:
        made, own = fasteagle.load_cascade(checkpoint)
        return fasteagle.Drafter(eagle3_lab.unlearnt(made), target, own)

    return {"FastEagle, random weights": untrained}


def head_beside(cascade: Path | str) -> Path:
    """EAGLE-3's head to compare a cascade with.

    The one in its own folder, which was trained alike; or, where that is absent, the committed one,
    which was trained for longer.
    """
    alike = Path(cascade) / ALIKE
    return alike if card_of(alike) else eagle3.CHECKPOINT


def budgets(folders: Mapping[str, Path | str]) -> pd.DataFrame:
    """What each checkpoint was trained on and, at least, for how many minutes."""
    cards = {name: card_of(Path(folder)) for name, folder in folders.items()}
    named = "minutes_of_the_last_stretch"
    return pd.DataFrame.from_dict(
        {name: budget_of(card) | {named: card.get(named)} for name, card in cards.items()},
        orient="index",
    )


def identity(
    drafter: fasteagle.Drafter, checkpoint: Path | str, other: Path | str
) -> dict[str, Any]:
    """What the records of a run depend on."""
    digests = {"checkpoint": checkpoints.digest(checkpoint), "eagle3": checkpoints.digest(other)}
    return digests | {"tree": asdict(drafter.tree)}


# --- single stages


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m specrepro.fasteagle_lab STAGE ...`: measure stages as tier `full` does."""
    parser = eagle3_lab.stage_parser("fasteagle", __doc__, STAGES, fasteagle.CHECKPOINT, WORK)
    parser.add_argument("--eagle3", type=Path, help="EAGLE-3's head; that in the cascade's folder,"
                        " which was trained alike, if left out")  # fmt: skip
    options = parser.parse_args(arguments)
    options.eagle3 = options.eagle3 or head_beside(options.checkpoint)
    run, plan = eagle3_lab.run_and_plan("fasteagle", options, PLANS["full"])
    load = fasteagle.drafters(options.checkpoint)[OURS]
    bench = Bench(run.target, options.work)
    lab = Lab(
        run, options.checkpoint, load, plan, trains=False, eagle3_head=options.eagle3, bench=bench
    )
    run.depends_on(**identity(load(run.target), options.checkpoint, options.eagle3))
    eagle3_lab.take_stages(lab, options.stages)


if __name__ == "__main__":
    commands.run(main)
