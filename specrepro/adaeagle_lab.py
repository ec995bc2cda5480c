"""AdaEAGLE's experiments at a tier: what is trained, decoded, timed and replayed.

Decoded and timed on EAGLE's head: every fixed length, DDD, AdaEAGLE, AdaEAGLE-DDD and the oracle,
which knows from recorded chains what is right; and on EAGLE-3's head in bfloat16 the same but the
oracle. Replayed under a cost table: the penalties, Table 4's variants, Table 5's thresholds, whose
predictors are trained alike (`adaeagle_predictors`). The penalty of AdaEAGLE is fixed beforehand;
what the costs measured here would ask for is drawn beside the sweep, not chosen.

The best fixed length is chosen with hindsight, on the very prompts it is reported on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from specrepro import adaeagle, checkpoints, claims, cost_table, measure, recipes, replay, rows
from specrepro import adaeagle_predictors as predictors
from specrepro import adaeagle_rows as tables
from specrepro import target_model as targets
from specrepro.adaeagle import AdaEagle, Drafter, Fixed, Known, Predicted
from specrepro.adaeagle_predictors import Budget
from specrepro.adaeagle_rows import ALL, FIXED, ORACLE, AtPlaces
from specrepro.cost_table import CostTable, Grid
from specrepro.eagle3 import TreeConfig
from specrepro.experiment import Run, sizes_of
from specrepro.measure import AUTOREGRESSIVE, Record, dtype_name
from specrepro.recipes import Recipe
from specrepro.replay import REPLAYED, Trace
from specrepro.target_model import Target

OURS, BOTH, DDD = "AdaEAGLE", "AdaEAGLE-DDD", "DDD"
NO_PENALTY, CLASSES = "AdaEAGLE, no penalty", "AdaEAGLE, classes"
# compared prompt by prompt; fixed drafts as long as the paper's and about as long as those here
PAIRS = ((OURS, "EAGLE 4"), (OURS, "EAGLE 2"), (BOTH, OURS), (BOTH, DDD))
WARM_UP, REPEATS = 20, 200  # predictions that are timed alone
Sets = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much a tier measures."""

    sets: Sets  # decoded greedily
    sampled: Sets  # at temperature 1 too
    second: Sets  # with EAGLE-3's head in bfloat16
    numbers: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)  # fixed lengths
    penalties: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
    thresholds: tuple[float, ...] = (-0.2, -0.4, -0.6, -0.8, -1.0)  # Table 5's
    num_answers: int | None = 4000  # of the corpus that predictors made here see; None is all
    epochs: float = 5.0
    grid: Grid = Grid((1,), 256, 1, (1, 2, 3, 4, 5, 6, 7, 8, 9, 11), (1,), repeats=12)
    num_prompts: int = 0  # of each set, and
    max_new_tokens: int = 0  # of each prompt; 0 takes the tier's


_SETS = ("chat", "humaneval", "maths")
_ALL_SETS = (*_SETS, "instruction", "summarisation")
PLANS = {
    "smoke": Plan(
        ("chat", "humaneval"), ("chat",), ("chat",), (1, 3, 4), (1.0, 4.0), (-0.2, -0.6),
        num_answers=48, epochs=1.0,
        grid=Grid((1,), 256, 1, (1, 2, 5, 11), (1,), warm_up=1, repeats=1),
    ),
    "laptop": Plan(
        _SETS, ("chat",), ("chat",), num_answers=300, epochs=2.0, num_prompts=3, max_new_tokens=48,
    ),
    "full": Plan(_ALL_SETS, _ALL_SETS, _ALL_SETS),
    "paper": Plan((*_ALL_SETS, "questions"), ("chat",), (), num_answers=None),
}  # fmt: skip


sizes = partial(sizes_of, PLANS)  # of a tier: prompts of each set and their lengths


def decodes(tier: str) -> dict[str, Any]:
    """What a tier decodes, where it is not what other papers do."""
    plan = PLANS[tier]
    return sizes(tier) | {"sets": plan.sets, "sampled": f" ({', '.join(plan.sampled)} at 1 too)"}


@dataclass
class Lab:
    """What the notebook asks for, each thing made once."""

    run: Run
    head: Path  # of EAGLE's head
    second_head: Path  # of EAGLE-3's
    checkpoint: str = ""  # of a predictor; empty is the committed one, or one made here
    penalty: float = AdaEagle().penalty
    threshold: float = adaeagle.DDD_THRESHOLD
    most: int = adaeagle.MOST
    plan: Plan | None = None
    variants: dict[str, dict[str, Any]] = field(init=False)  # settings by name, to train alike

    def __post_init__(self) -> None:
        self.plan = self.plan or PLANS[self.run.tier_name]
        penalties = dict.fromkeys((*self.plan.penalties, 1.0, self.penalty))
        self.variants = {f"penalty {x:g}": {"penalty": x} for x in penalties}
        self.variants[CLASSES] = {"is_classifier": True}
        self.predictor = cache(self.predictor)
        self.outputs = cache(self.outputs)

    @property
    def identity(self) -> dict[str, Any]:
        """What records depend on besides the run's own settings."""
        heads = {"head": self.head, "second_head": self.second_head, "predictor": self.predictor()}
        named = {name: checkpoints.digest(folder) for name, folder in heads.items()}
        named |= {"plan": asdict(self.plan), "threshold": self.threshold, "most": self.most}
        return named | {"penalty": self.penalty, "num_prompts": self.run.num_prompts}

    # --- predictors

    def predictor(self, variant: str = "", base: str = "EAGLE") -> Path:
        """Folder of AdaEAGLE's own or of a variant: named, committed, or made here."""
        if self.checkpoint and (variant, base) == ("", "EAGLE"):
            return Path(self.checkpoint)
        recipe = self._recipe(variant, base)
        return predictors.committed(recipe.method) or self._train(recipe)

    def _recipe(self, variant: str, base: str) -> Recipe:
        head = self.head if base == "EAGLE" else self.second_head
        own = {"base": base, "head": str(head), "most": self.most}
        settings = self.variants[variant or f"penalty {self.penalty:g}"]
        return predictors.recipe_of(self._target(base), own | settings)

    def _train(self, recipe: Recipe) -> Path:
        method, share = recipe.method, self.plan.num_answers
        target = self._target(method.base)
        features = recipes.features_of(target, self.run.work.parent / "features", share)
        # a predictor is of one head, and what a tier trains is no start for another
        work = self.run.work / self.run.tier_name / checkpoints.digest(method.head_folder)[:12]
        work, budget = work / predictors.name_of(method), Budget(share, self.plan.epochs)
        folders = {"work": work / "training", "destination": work / "checkpoint"}
        return predictors.train_alike(recipe, target, features, **folders, budget=budget)

    def _target(self, base: str = "EAGLE") -> Target:
        return self.run.target if base == "EAGLE" else self._second_target

    @cached_property
    def _second_target(self) -> Target:
        if dtype_name(self.run.target) == "bfloat16":
            return self.run.target
        return targets.load(self.run.target_name, dtype="bfloat16")

    # --- recorded chains

    @cached_property
    def traces(self) -> list[Trace]:
        """Chains drafted at every place of the greedy texts of all prompts that are decoded."""
        return replay.obtain(self.run.records / "traces", self._record)

    def _record(self) -> list[Trace]:
        chain, found = TreeConfig(self.most - 1, 1, 2), []
        for name in self.plan.sets:
            drafter = AdaEagle("EAGLE", str(self.head), most=self.most).load_head(self.run.target)
            found += replay.record(
                self.run.target, drafter, self.run.questions(name), chain, prompts=name,
                max_new_tokens=self.run.max_new_tokens, seed=self.run.seed,
            )  # fmt: skip
        return found

    @cached_property
    def asked(self) -> dict[tables.Place, Sequence[int]]:
        """Token ids of the prompts behind the traces."""
        return {(s, name): ids for s in self.plan.sets for name, ids in self.run.questions(s)}

    @cached_property
    def true(self) -> AtPlaces:
        return tables.true_lengths(self.traces)

    @cached_property
    def oracle(self) -> AtPlaces:
        return tables.oracle_lengths(self.traces)

    def outputs(self, variant: str = "") -> AtPlaces:
        """What a predictor says at every place of the traces, not rounded."""
        predictor, _ = adaeagle.load_predictor(self.predictor(variant))
        target = self.run.target
        predictor = predictor.to(target.device, target.dtype).eval()
        named = {(t.prompts, t.prompt_id): t for t in self.traces}
        return {
            place: tables.outputs_at(predictor, target, self.asked[place], trace)
            for place, trace in named.items()
        }

    def lengths(self, variant: str = "") -> AtPlaces:
        """The same as lengths."""
        found = self.outputs(variant)
        return {place: adaeagle.lengths_of(x, self.most) for place, x in found.items()}

    @cached_property
    def costs(self) -> CostTable:
        """Of chains on this machine; a prediction is not in it."""
        header = cost_table.header_of(self.run.target, checkpoints.digest(self.head)[:12], 1)
        words = [token for ids in self.asked.values() for token in ids]

        def measure_it() -> CostTable:
            drafter = AdaEagle("EAGLE", str(self.head), most=self.most).load_head(self.run.target)
            return cost_table.profile(self.run.target, drafter, header, self.plan.grid, words)

        return cost_table.obtain(self.run.records / "costs.json", header, measure_it)

    # --- what is decoded

    def drafters(self, base: str = "EAGLE") -> dict[str, Drafter]:
        """What is decoded and timed with a base, by the names of tables."""
        target, head = self._target(base), self.head if base == "EAGLE" else self.second_head
        common = {"base": base, "head": head}
        found = {
            FIXED.format(base, n): adaeagle.fixed(target, n, **common) for n in self.plan.numbers
        }
        folder, named = self.predictor("", base), "" if base == "EAGLE" else f"[{base}]"
        found[DDD + named] = adaeagle.fixed(
            target, 0, **common, most=self.most, threshold=self.threshold
        )
        found[OURS + named] = adaeagle.load(target, folder, head)
        found[BOTH + named] = adaeagle.load(target, folder, head, self.threshold)
        return found

    def _oracle(self) -> Drafter:
        known = {tuple(self.asked[place]): x.tolist() for place, x in self.oracle.items()}
        head = AdaEagle("EAGLE", str(self.head), most=self.most).load_head(self.run.target)
        return Drafter(head, Known(known), self.most)

    def loaders(self) -> dict[str, Any]:
        """For the losslessness check, which decodes in another number format too."""
        folder = self.predictor()
        return {
            OURS: lambda target: adaeagle.load(target, folder, self.head),
            BOTH: lambda target: adaeagle.load(target, folder, self.head, self.threshold),
        }

    def more_loaders(self) -> dict[str, Any]:
        """Nothing ever and the most always, for the same."""
        return {
            f"AdaEAGLE, always {n}": lambda target, n=n: Drafter(
                AdaEagle("EAGLE", str(self.head), most=self.most).load_head(target),
                Fixed(n), self.most,
            )
            for n in (0, self.most)
        }  # fmt: skip

    @cached_property
    def records(self) -> list[Record]:
        """Greedy decoding with every method, the oracle among them."""
        methods = self.drafters() | {ORACLE: self._oracle()}
        return self.run.compare(methods, self.plan.sets, (0.0,))

    def sampled(self) -> list[Record]:
        """At temperature 1; there nobody knows the right length beforehand."""
        chosen = {name: one for name, one in self.drafters().items() if name in (OURS, BOTH, DDD)}
        return self.run.compare(chosen, self.plan.sampled, (1.0,))

    def second(self) -> list[Record]:
        """Greedy decoding with EAGLE-3's head in bfloat16."""
        drafters, found = self.drafters("EAGLE-3") if self.plan.second else {}, []
        for name in self.plan.second:
            found += measure.compare(
                self._second_target, drafters, self.run.questions(name), prompts=name,
                path=self.run.records / "decoded_second.jsonl", seed=self.run.seed,
                max_new_tokens=self.run.max_new_tokens, repeats=self.run.tier.repeats,
            )  # fmt: skip
        return found


# --- rows


def timed(lab: Lab) -> list[pd.DataFrame]:
    """Rows of what was decoded: speedups, differences, Table 2's accounts, and what they say."""
    records, sampled = lab.records, lab.sampled()
    accounts = tables.accounts(records)
    pooled = accounts[accounts["prompts"] == ALL]
    methods = (DDD, OURS, BOTH, ORACLE)
    return [
        lab.run.decode_rows([*records, *sampled]),
        rows.paired_differences(records, PAIRS),
        accounts.assign(base="EAGLE"),
        fixed_rows(pooled, "EAGLE"),
        tables.headroom(records, methods).assign(costs="clock", base="EAGLE"),
        oracle_rows(records),
        tables.break_even_rows(pooled, OURS),
        round_rows(records, (OURS, ORACLE)),
        predictor_rows(lab, pooled),
        agreement(lab),
    ]


def second(lab: Lab) -> pd.DataFrame:
    """Rows of the second base: decoding, accounts and headroom, in bfloat16."""
    records = lab.second()
    if not records:
        return pd.DataFrame()
    accounts = tables.accounts(records)
    methods = [f"{name}[EAGLE-3]" for name in (DDD, OURS, BOTH)]
    decoded = lab.run.decode_rows(records).replace({"quantity": {"decode": "decode_second"}})
    found = [decoded, accounts, fixed_rows(accounts[accounts["prompts"] == ALL], "EAGLE-3")]
    found.append(tables.headroom(records, methods).assign(costs="clock"))
    return pd.concat(found, ignore_index=True).assign(base="EAGLE-3", dtype="bfloat16")


def fixed_rows(pooled: pd.DataFrame, base: str) -> pd.DataFrame:
    """Rows of quantity "fixed": the accounts of fixed lengths, by `fixed_length`."""
    found = pooled[pooled["method"].str.fullmatch(tables.IS_FIXED)]
    numbers = found["method"].str.extract(r"(\d+)$")[0].astype(int)
    return found.assign(quantity="fixed", base=base, fixed_length=numbers)


def oracle_rows(records: Sequence[Record]) -> pd.DataFrame:
    """Rows of quantity "waste", what the oracle drafted in vain, and of "oracle_violations": on how
    many prompts a fixed length took fewer passes. Both are counts.
    """
    passes = {(r.method, r.prompts, r.prompt_id): r.target_passes for r in records}
    prompts = sorted({key[1:] for key in passes})
    others = {key[0] for key in passes if key[0].startswith("EAGLE ")}
    fewer = [any(passes[m, *p] < passes[ORACLE, *p] for m in others) for p in prompts]
    wasted = sum(tables.sums_of(r)["wasted_drafts"] for r in records if r.method == ORACLE)
    common = {"method": ORACLE, "prompts": ALL, "temperature": 0.0, "batch": 1}
    common |= {"num_prompts": len(prompts)}
    waste = dict.fromkeys(("wasted_drafts", "wasted_drafts_low", "wasted_drafts_high"), wasted)
    violations = dict.fromkeys(("value", "value_low", "value_high"), sum(fewer))
    return pd.DataFrame(
        [
            {"quantity": "waste"} | common | waste,
            {"quantity": "oracle_violations"} | common | violations,
        ]
    )


def round_rows(records: Sequence[Record], methods: Sequence[str]) -> pd.DataFrame:
    """Rows of quantity "round": what each round of the first text drafted and accepted (Fig. 2)."""
    first = {r.method: r for r in reversed(records) if r.method in methods}
    return pd.DataFrame(
        [
            {"quantity": "round", "method": method, "prompts": r.prompts, "round": number}
            | {"value": accepted, "drafted": drafted, "num_prompts": 1, "temperature": 0.0}
            for method, r in first.items()
            for number, (accepted, drafted) in enumerate(zip(r.accepted, r.drafted, strict=True), 1)
        ]
    )


def predictor_rows(lab: Lab, pooled: pd.DataFrame) -> pd.DataFrame:
    """Rows of quantity "predictor_ms" and "predictor_share": a prediction, and its part of a round.

    The median of predictions timed alone, with their 10 and 90 % quantiles.
    """
    target, own = lab.run.target, pooled[pooled["method"] == OURS].iloc[0]
    lengths = Predicted(adaeagle.load_predictor(lab.predictor())[0], target, lab.most)
    like = target.model.get_input_embeddings().weight
    lengths.states = like.new_zeros(1, 2 * target.hidden_size)
    spent = []
    for turn in range(WARM_UP + REPEATS):
        began = time.perf_counter()
        lengths.wanted().tolist()  # which waits for the device
        spent += [1e3 * (time.perf_counter() - began)] * (turn >= WARM_UP)
    names = ("value_low", "value", "value_high")
    found = dict(zip(names, np.quantile(spent, (0.1, 0.5, 0.9)).tolist(), strict=True))
    round_ms = 1e3 * own["seconds"] / own["target_passes"]
    common = {"method": OURS, "prompts": ALL, "temperature": 0.0, "batch": 1, "repeats": REPEATS}
    common["ends"] = f"10 to 90 % of {REPEATS} repeats"
    share = {name: value / round_ms for name, value in found.items()}
    return pd.DataFrame(
        [
            {"quantity": "predictor_ms"} | common | found,
            {"quantity": "predictor_share"} | common | share,
        ]
    )


def methods_at(lab: Lab) -> dict[str, Any]:
    """The methods that are decoded, as replays take them."""
    found: dict[str, Any] = {AUTOREGRESSIVE: None}
    found |= {FIXED.format("EAGLE", n): tables.repeated(n, n) for n in lab.plan.numbers}
    found[DDD] = tables.repeated(0, lab.most, lab.threshold)
    found[OURS] = tables.recalled(lab.lengths(), lab.most)
    found[BOTH] = tables.recalled(lab.lengths(), lab.most, lab.threshold)
    found[ORACLE] = tables.recalled(lab.oracle, lab.most)
    return found


def agreement(lab: Lab) -> pd.DataFrame:
    """Rows of quantity "replay_check": replays of what was just decoded, against the clock."""
    predicted = tables.replays(lab.traces, methods_at(lab), lab.costs)
    return replay.agreement(lab.records, predicted)


def replayed(lab: Lab) -> pd.DataFrame:
    """Rows of all that is told by replay: quantities "sweep" (by penalty), "ablation", "threshold",
    "headroom", "length", "coverage" and "calibration".
    """
    found = [_sweep(lab), _ablation(lab), _thresholds(lab), _headroom(lab), _lengths(lab)]
    return pd.concat(found, ignore_index=True).assign(source=REPLAYED)


def _accounts(lab: Lab, methods: Mapping[str, Any], quantity: str) -> pd.DataFrame:
    """Accounts of replays over all prompts; a replay knows no parts of a round."""
    found = tables.accounts(tables.replays(lab.traces, methods, lab.costs), quantity)
    return found[found["prompts"] == ALL].drop(columns=["draft_seconds", "target_seconds"])


def _sweep(lab: Lab) -> pd.DataFrame:
    penalties = {f"penalty {x:g}": x for x in lab.plan.penalties}
    methods = {name: tables.recalled(lab.lengths(name), lab.most) for name in penalties}
    found = _accounts(lab, methods, "sweep")
    return found.assign(penalty=found["method"].map(penalties), method=OURS)


def _ablation(lab: Lab) -> pd.DataFrame:
    """Table 4, with predictors that were trained alike."""
    variants = {OURS: f"penalty {lab.penalty:g}", NO_PENALTY: "penalty 1", CLASSES: CLASSES}
    methods = {
        name: tables.recalled(lab.lengths(variant), lab.most) for name, variant in variants.items()
    }
    return _accounts(lab, methods, "ablation")


def _thresholds(lab: Lab) -> pd.DataFrame:
    """Table 5, and the same of DDD alone."""
    named, methods = {}, {}
    for x in lab.plan.thresholds:
        for name, lengths in ((BOTH, tables.recalled(lab.lengths(), lab.most, x)),
                              (DDD, tables.repeated(0, lab.most, x))):  # fmt: skip
            named[f"{name} {x:g}"], methods[f"{name} {x:g}"] = (name, x), lengths
    found = _accounts(lab, methods, "threshold")
    pairs = found["method"].map(named)
    return found.assign(method=pairs.str[0], threshold=pairs.str[1])


def _headroom(lab: Lab) -> pd.DataFrame:
    """Gains under the costs measured here ("table") and under those of the paper's Table 2.

    With the penalty that the costs measured here ask for too, the nearest that was trained.
    """
    methods, penalty = methods_at(lab), asked_penalty(lab)
    named = f"{OURS}, penalty {penalty:g}"
    methods[named] = tables.recalled(lab.lengths(f"penalty {penalty:g}"), lab.most)
    tables_of = {"table": lab.costs, "paper's": tables.paper_costs(claims.reported("adaeagle"))}
    found = []
    for costs, table in tables_of.items():
        records = tables.replays(lab.traces, methods, table)
        rows_of = tables.headroom(records, (DDD, OURS, named, BOTH, ORACLE))
        found.append(rows_of.assign(costs=costs, base="EAGLE"))
    return pd.concat(found, ignore_index=True)


def asked_penalty(lab: Lab) -> float:
    """The compared penalty nearest to the one that breaks even at the costs measured here."""
    accounts = tables.accounts(lab.records)
    asked = tables.break_even_rows(accounts[accounts["prompts"] == ALL], OURS)["value"].iloc[-1]
    return min(lab.plan.penalties, key=lambda x: abs(np.log(x) - np.log(max(asked, 1e-9))))


def _lengths(lab: Lab) -> pd.DataFrame:
    """Predicted beside true lengths, with and without the penalty; coverage; calibration."""
    named = {OURS: f"penalty {lab.penalty:g}", NO_PENALTY: "penalty 1"}
    predicted = {name: lab.lengths(variant) for name, variant in named.items()}
    covered = {x: lab.lengths(f"penalty {x:g}") for x in lab.plan.penalties}
    outputs = {place: x[:, 0] for place, x in lab.outputs(named[OURS]).items()}
    found = [tables.length_rows(predicted, lab.true), tables.coverage_rows(covered, lab.true)]
    return pd.concat([*found, tables.calibration_rows(outputs, lab.true)], ignore_index=True)
