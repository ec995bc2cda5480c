"""CAST's rows: what its figures draw and its claims read, from what a `Lab` measured.

Costs; what was timed while decoding; what was replayed under cost tables: every batch size, machine
and modelled card, growing trees, ablation, sensitivity, choices; how well confidences foretell.
Bare rows; a `Run` stamps where they come from. Intervals are 95 %, by bootstrap over what was
decoded together, or over whole texts; `num_prompts` counts texts, said again or not.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch

from specrepro import cast, replay, rows
from specrepro.cast_lab import ALL, BEST, BY_HAND, CAST, DEFAULT, NET, Lab, of_one_set, of_text
from specrepro.cost_table import CostTable
from specrepro.decoding import Drafter
from specrepro.draft_tree import take_shape
from specrepro.eagle3 import TreeConfig
from specrepro.measure import AUTOREGRESSIVE, Record
from specrepro.replay import REPLAYED, MakeDrafter
from specrepro.rows import bootstrap, interval

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
NUM_BINS = 10

Settings = Mapping[str, tuple[MakeDrafter | TreeConfig | None, dict[str, Any]]]
Variants = Iterator[tuple[str, cast.Config, dict[str, Any]]]


# --- what was measured


def costs(lab: Lab) -> pd.DataFrame:
    """Rows of quantity "cost": every point that was timed, of modelled tables those sizes.

    And of "profile_seconds", what timing them took.
    """
    found = []
    for table in [*lab.machines, *lab.modelled]:
        points, where = table.rows(), {"machine": table.machine, "costs": lab.kind(table)}
        if table.is_modelled:
            is_shown = points["num_tokens"].isin(lab.plan.grid.sizes) & (points["part"] == "target")
            is_shown &= points["context"] == points["context"].min()
            points = points[is_shown].assign(source="modelled")
        found.append(points.assign(costs=where["costs"]))
        if table.seconds:
            took = {"quantity": "profile_seconds", "value": table.seconds}
            took |= dict.fromkeys(("value_low", "value_high"), table.seconds)  # no estimate
            found.append(pd.DataFrame([took | where]))
    return pd.concat(found, ignore_index=True)


def timed(lab: Lab, batch: int) -> list[pd.DataFrame]:
    """Rows of what was decoded: speedups, differences, gains, and how near the replay came."""
    records, checked = lab.compare(batch), partial(agreement, lab, batch=batch)
    return [
        lab.run.decode_rows(records),
        rows.paired_differences(records),
        _cast_gains(records, lab.costs, "clock"),
        checked(records, lab.costs, lab.costs_meanwhile(batch)).assign(costs="clock"),
        checked(records, lab.costs, lab.costs).assign(costs="clock, earlier costs"),
    ]


def elsewhere(lab: Lab) -> pd.DataFrame:
    """The same of the other machines: rows of quantity "decode_elsewhere", "gain" and so on."""
    cases = product(lab.machines[1:], lab.plan.elsewhere)
    tables = [
        table
        for machine, batch in cases
        if batch in machine.batches
        for table in _elsewhere(lab, machine, batch)
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _elsewhere(lab: Lab, costs: CostTable, batch: int) -> Iterator[pd.DataFrame]:
    where = {name: costs.header[name] for name in ("device", "dtype", "threads")}
    where |= {"machine": costs.machine, "costs": "other clock"}
    records = lab.compare_as(costs, batch)
    decoded = lab.run.decode_rows(records).replace({"quantity": {"decode": "decode_elsewhere"}})
    checked = agreement(lab, records, costs, costs, batch)
    for table in (decoded, _cast_gains(records, costs, "other clock"), checked):
        yield table.assign(**where)


def _cast_gains(records: Sequence[Record], costs: CostTable, kind: str) -> pd.DataFrame:
    """Rows of quantity "gain": CAST and our variant against the default tree and the best one."""
    found = [gains(records, *pair) for pair in product((CAST, NET), (DEFAULT, BEST))]
    return pd.concat(found, ignore_index=True).assign(machine=costs.machine, costs=kind)


def agreement(
    lab: Lab, records: Sequence[Record], costs: CostTable, charged: CostTable, batch: int
) -> pd.DataFrame:
    """Rows of quantity "replay_check": replays of what was just decoded, against the clock.

    Trees were chosen under `costs`; rounds are charged what `charged` says.
    """
    greedy = [record for record in records if record.temperature == 0]
    decoded = dict.fromkeys((record.prompts, record.prompt_id) for record in greedy)
    traces = {(t.prompts, t.prompt_id): t for t in lab.traces if t.temperature == 0}
    mine = [traces[key] for key in decoded]
    predicted = []
    for name, draft in lab.drafts(batch, costs).items():
        for prompts in dict.fromkeys(trace.prompts for trace in mine):
            group = [trace for trace in mine if trace.prompts == prompts]
            predicted += replay.replay(group, draft, charged, method=name, batch=batch)
    return replay.agreement(greedy, predicted).assign(machine=costs.machine)


# --- what was replayed


def replays(lab: Lab) -> pd.DataFrame:
    """Rows of quantity "replay": every method at every batch size that a table knows.

    And of "gain", by table, and "best_gain".
    """
    tables = []
    for costs in [*lab.machines, *lab.modelled]:
        for batch, temperature in product(costs.batches, lab.plan.replayed):
            settings = {name: (draft, {}) for name, draft in lab.drafts(batch, costs).items()}
            records = _replays(lab, settings, costs, batch, temperature)
            gained = _cast_gains(records, costs, lab.kind(costs)).assign(source=REPLAYED)
            tables += [_as_rows(lab, "replay", records, settings, costs), gained]
    found = pd.concat(tables, ignore_index=True)
    return pd.concat([found, best_gains(found)], ignore_index=True)


def sweep(lab: Lab) -> pd.DataFrame:
    """Rows of quantity "replay_sweep": fixed trees of growing size, and what CAST chose.

    Their depth and width are those of the best tree at that batch size on other prompts, of the
    shapes that can hold the largest size. Rows of quantity "gain" set the smaller size that was
    best there against the largest: below 0 where growing still pays.
    """
    tables = [table for batch in lab.costs.batches for table in _sweep(lab, batch)]
    return pd.concat(tables, ignore_index=True)


def _sweep(lab: Lab, batch: int) -> Iterator[pd.DataFrame]:
    sizes = lab.sizes(batch, lab.costs)[1:]
    best = lab.fastest(lab.traces_to_choose_on, batch, lab.costs, room=sizes[-1])
    settings: dict[str, Any] = {
        f"{size} nodes": (replace(best, total_tokens=size), _sizes_of(best, size)) for size in sizes
    }
    settings[CAST] = (lab.drafts(batch, lab.costs)[CAST], {})
    records = _replays(lab, settings, lab.costs, batch)
    drafted = [num for r in records if r.method == CAST for num in r.drafted]
    settings[CAST] = (None, {"total_tokens": 1 + float(np.mean(drafted))})
    yield _as_rows(lab, "replay_sweep", records, settings, lab.costs)
    names = {f"{best.total_tokens} nodes": "EAGLE-3, chosen size"}
    names |= {f"{sizes[-1]} nodes": "EAGLE-3, largest size"}
    pair = [replace(r, method=names[r.method]) for r in records if r.method in names]
    yield gains(pair, *names.values()).assign(costs="table", source=REPLAYED)


def _sizes_of(tree: TreeConfig, size: int) -> dict[str, Any]:
    columns = {"method": DEFAULT, "total_tokens": size}
    return columns | {"draft_depth": tree.depth, "top_k": tree.top_k}


def ablation(lab: Lab) -> pd.DataFrame:
    """Rows of quantity "ablation": EAGLE-3's tree, each part alone, all but one, all."""

    def variants(batch: int, whole: cast.Config) -> Variants:
        nothing = replace(whole, **dict.fromkeys(ALONE, False))
        yield DEFAULT, nothing, {}
        for part in ALONE:
            yield f"{ALONE[part]} alone", replace(nothing, **{part: True}), {}
        for part in WITHOUT:
            yield WITHOUT[part], replace(whole, **{part: False}), {}
        yield CAST, whole, {}
        yield "CAST, verified-set utility", replace(whole, utility="pool_gain"), {}
        yield NET, lab.net_config(batch, lab.costs), {}

    return _varied(lab, "ablation", variants)


def sensitivity(lab: Lab) -> pd.DataFrame:
    """Rows of quantity "sensitivity": thresholds times each factor, running and by hand."""

    def variants(_: int, own: cast.Config) -> Variants:
        kinds = {CAST: own, BY_HAND: replace(own, thresholds=cast.PAPER_THRESHOLDS)}
        for (name, config), x in product(kinds.items(), lab.plan.factors):
            yield (
                f"{name} x {x:g}",
                replace(config, strictness=x),
                {"method": name, "strictness": x},
            )

    return _varied(lab, "sensitivity", variants)


def _varied(
    lab: Lab, quantity: str, variants: Callable[[int, cast.Config], Variants]
) -> pd.DataFrame:
    """Rows of variants of CAST's configuration, at batch 1 and the plan's."""
    tables = []
    for batch in (1, lab.plan.batch):
        settings = {
            name: (cast.shaped(lab.costs, config), columns)
            for name, config, columns in variants(batch, lab.config(batch, lab.costs))
        }
        records = _replays(lab, settings, lab.costs, batch)
        tables.append(_as_rows(lab, quantity, records, settings, lab.costs))
    return pd.concat(tables, ignore_index=True)


def _replays(
    lab: Lab, settings: Settings, costs: CostTable, batch: int, temperature: float = 0.0
) -> list[Record]:
    """Replays of the reported prompts as one set, autoregressive decoding among them."""
    traces = of_one_set(lab.replayed(temperature), batch)
    ranks, found = cache(partial(replay.path_ranks, traces)), []
    drafts = {AUTOREGRESSIVE: None} | {name: draft for name, (draft, _) in settings.items()}
    for name, d in drafts.items():
        known = ranks(d.depth, d.top_k) if isinstance(d, TreeConfig) else None
        found += replay.replay(traces, d, costs, method=name, batch=batch, ranks=known)
    return found


def _as_rows(
    lab: Lab, quantity: str, records: Sequence[Record], settings: Settings, costs: CostTable
) -> pd.DataFrame:
    found = lab.run.decode_rows(records)
    found["num_prompts"] = len({of_text(record.prompt_id) for record in records})
    columns = [settings.get(method, (None, {}))[1] for method in found["method"]]
    extra = pd.DataFrame(columns, index=found.index)
    if "method" in extra:
        extra["method"] = extra["method"].fillna(found["method"])
    where = {name: costs.header.get(name) for name in ("device", "dtype", "threads")}
    where |= {"machine": costs.machine, "costs": lab.kind(costs), "source": REPLAYED}
    found = found.drop(columns=[*extra.columns, *where, "quantity"], errors="ignore")
    return found.assign(quantity=quantity, **where, **extra)


def choices(lab: Lab) -> pd.DataFrame:
    """What CAST chose by batch size, and what choosing took.

    Rows of quantity "choice": how often it drafted so deep, so wide, and kept so many. Of
    "policy_ms": milliseconds of processor time that its decisions take in a round.
    """
    tables = []
    for batch in lab.costs.batches:
        watched = _watched(lab, batch)
        rounds = [now for drafter in watched for now in drafter.shape.rounds]
        spent = [drafter.shape.spent for drafter in watched]
        policy = {"quantity": "policy_ms", "num_rounds": sum(map(len, spent))}
        policy |= _mean_of_units([(1e3 * sum(one), len(one)) for one in spent])
        tables.append(choice_rows(rounds).assign(batch=batch))
        tables.append(pd.DataFrame([policy | {"batch": batch}]))
    common = {"method": CAST, "prompts": ALL, "temperature": 0.0, "machine": lab.costs.machine}
    return pd.concat(tables, ignore_index=True).assign(**common, source=REPLAYED)


def _watched(lab: Lab, batch: int) -> list[cast.Drafter]:
    """The drafters of a replay of CAST, with their rounds and the time of their decisions."""
    made: list[cast.Drafter] = []

    def watched(recorded: Drafter) -> cast.Drafter:
        made.append(cast.Drafter(recorded, lab.costs, lab.config(batch, lab.costs)))
        made[-1].shape = TimedShape(lab.costs, made[-1].shape.config)
        take_shape(recorded, made[-1].shape)
        return made[-1]

    traces = of_one_set(lab.replayed(), batch)
    replay.replay(traces, watched, lab.costs, method=CAST, batch=batch)
    return made


def _clocked(decide: Callable[..., Any]) -> Callable[..., Any]:
    def clocked(shape: TimedShape, *arguments: Any) -> Any:
        began = time.thread_time()
        decided = decide(shape, *arguments)
        shape.spent[-1] += time.thread_time() - began
        return decided

    return clocked


class TimedShape(cast.Shape):
    """Notes the processor time of its decisions by round; drafting and pruning do not count."""

    choose = _clocked(cast.Shape.choose)
    num_kept = _clocked(cast.Shape.num_kept)
    learn = _clocked(cast.Shape.learn)

    def begin(self) -> None:
        self.spent: list[float] = []  # seconds
        super().begin()

    def start_round(self, batch: int, context: int, num_rows: int) -> None:
        self.spent.append(0.0)
        super().start_round(batch, context, num_rows)


def confidence(lab: Lab) -> pd.DataFrame:
    """Rows of how path confidences foretell what is accepted, in EAGLE-3's default tree."""
    tree, traces = lab.default, lab.replayed()
    ranks = replay.path_ranks(traces, tree.depth, tree.top_k)
    units = np.repeat(np.arange(len(traces)), [len(trace.drafted) for trace in traces])
    found = confidence_rows(*ranks, tree.total_tokens - 1, units)
    common = {"method": DEFAULT, "prompts": ALL, "temperature": 0.0, "batch": 1}
    return found.assign(**common, num_prompts=len(traces), source=REPLAYED)


# --- rows from records, rounds and ranks


def gains(records: Sequence[Record], method: str, versus: str) -> pd.DataFrame:
    """Rows of quantity "gain": how much faster `method` decodes than `versus`, as a share.

    Of all tokens over all seconds, prefill included, on what both decoded, every prompt set
    together; resampled by what was decoded together. One row for each batch size and temperature.
    """
    rows = []
    told = [one for one in records if one.error is None and one.method in (method, versus)]
    for batch, temperature in dict.fromkeys((one.batch, one.temperature) for one in told):
        here = [one for one in told if (one.batch, one.temperature) == (batch, temperature)]
        units, num_texts = _tokens_and_seconds(here, method)
        low, high = interval(_gain(bootstrap(units)))
        row = {"quantity": "gain", "method": method, "versus": versus, "prompts": ALL}
        row |= {"batch": batch, "temperature": temperature, "num_prompts": num_texts}
        row |= {"value": float(_gain(units.sum(0))), "value_low": low, "value_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def _tokens_and_seconds(records: Sequence[Record], method: str) -> tuple[np.ndarray, int]:
    """(n, 4) of what both decoded together, the method's and the other's; of how many texts."""
    sums: dict[tuple[str, str], np.ndarray] = {}
    texts: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for one in records:
        own, key = [one.new_tokens, one.seconds], (one.prompts, one.group)
        here = [*own, 0, 0] if one.method == method else [0, 0, *own]
        sums[key] = sums.get(key, 0) + np.array(here, float)
        texts[key].add(of_text(one.prompt_id))
    shared = [key for key, sum_ in sums.items() if (sum_ > 0).all()]
    units = np.reshape([sums[key] for key in shared], (-1, 4))
    return units, len(set().union(*(texts[key] for key in shared)))


def _gain(sums: np.ndarray) -> np.ndarray:
    """Relative gain of tokens and seconds (..., 4): the method's, then the other's."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3]) - 1


def best_gains(found: pd.DataFrame) -> pd.DataFrame:
    """Rows of quantity "best_gain": CAST's gain on whichever machine here it is largest.

    One for each batch size, variant and method it is held against; modelled machines are left out.
    """
    mine = found[(found["quantity"] == "gain") & (found["costs"] != "modelled")]
    mine = mine[mine["temperature"] == 0].reset_index(drop=True)
    largest = mine.groupby(["batch", "method", "versus"])["value"].idxmax()
    return mine.loc[largest].assign(quantity="best_gain")


def choice_rows(rounds: Sequence[cast.Round]) -> pd.DataFrame:
    """How often each depth, width and number of verified tokens was chosen, as shares."""
    chosen = {
        "depth": [len(now.widths) + 1 for now in rounds],  # levels drafted
        "width": [width for now in rounds for width in now.widths],
        "verified": [now.num_tokens - 1 for now in rounds],
    }
    return pd.DataFrame(
        [
            {"quantity": "choice", "part": part, "chosen": value, "value": count / len(values)}
            | {"num_rounds": len(values)}
            for part, values in chosen.items()
            if values
            for value, count in zip(*np.unique(values, return_counts=True), strict=True)
        ]
    )


def confidence_rows(
    ranks: torch.Tensor,  # (P, D) as of `replay.path_ranks`
    confidence: torch.Tensor,  # (P, pool) ranked
    num_drafted: int,
    units: np.ndarray,  # (P,) which trace a position belongs to
) -> pd.DataFrame:
    """Summed confidence against accepted length, and each node's confidence against its fate.

    Rows of quantities "confidence" (trees in ten equal parts by their sum: `predicted` and `value`
    are means), "calibration" (nodes by tenths of their confidence: how often accepted) and
    "confidence_fit" (slope and share of variance explained, of trees and of the ten parts).
    """
    accepted = (ranks <= num_drafted).sum(1).double().numpy()
    kept = confidence[:, :num_drafted].double()
    return pd.DataFrame(
        [
            *_binned(kept.sum(1).numpy(), accepted),
            *_calibration(kept.numpy(), ranks.numpy(), num_drafted),
            *_fits(kept.sum(1).numpy(), accepted, units),
        ]
    )


def _tenths(values: np.ndarray) -> np.ndarray:
    """Which of ten equally large parts each value falls into."""
    return np.argsort(np.argsort(values, kind="stable")) * NUM_BINS // len(values)


def _binned(predicted: np.ndarray, accepted: np.ndarray) -> list[dict[str, Any]]:
    parts = _tenths(predicted)
    return [
        {"quantity": "confidence", "predicted": predicted[mine].mean(), "num_rounds": mine.sum()}
        | {"value": accepted[mine].mean()}
        | dict(zip(("value_low", "value_high"), _mean_interval(accepted[mine]), strict=True))
        for mine in (parts == part for part in np.unique(parts))
    ]


def _mean_interval(values: np.ndarray) -> tuple[float, float]:
    sums = np.stack([values, np.ones_like(values)], 1)
    draws = bootstrap(sums) if len(values) < 2000 else None
    if draws is None:
        spread = 1.96 * values.std() / len(values) ** 0.5
        return values.mean() - spread, values.mean() + spread
    return interval(draws[:, 0] / draws[:, 1])


def _mean_of_units(sums: Sequence[tuple[float, int]]) -> dict[str, float]:
    """The mean of what units sum up to, and its interval over units: what was decoded together."""
    units = np.array(sums, float)
    draws = bootstrap(units)
    low, high = interval(draws[:, 0] / draws[:, 1])
    return {"value": units[:, 0].sum() / units[:, 1].sum(), "value_low": low, "value_high": high}


def _calibration(
    confidence: np.ndarray, ranks: np.ndarray, num_drafted: int
) -> list[dict[str, Any]]:
    """Nodes by tenths of their confidence, and the share of them on the accepted path."""
    on_path = np.zeros_like(confidence, dtype=bool)
    rows, columns = np.nonzero(ranks <= num_drafted)
    on_path[rows, ranks[rows, columns] - 1] = True
    edges = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    return [
        {"quantity": "calibration", "predicted": confidence[mine].mean()}
        | {"value": on_path[mine].mean(), "num_rounds": int(mine.sum())}
        for mine in (edges == edge for edge in np.unique(edges))
    ]


def _fits(predicted: np.ndarray, accepted: np.ndarray, units: np.ndarray) -> list[dict[str, Any]]:
    """Slope and r squared over trees, and r squared over the means of ten parts, by traces."""
    draws = np.random.default_rng(0)
    places = [np.nonzero(units == unit)[0] for unit in np.unique(units)]
    found = []
    for _ in range(500 if len(places) > 1 else 0):
        chosen = np.concatenate([places[i] for i in draws.integers(len(places), size=len(places))])
        found.append(_fit(predicted[chosen], accepted[chosen]))
    values = _fit(predicted, accepted)
    return [
        {"quantity": "confidence_fit", "metric": metric, "value": values[metric]}
        | dict(zip(("value_low", "value_high"), _ends([one[metric] for one in found]), strict=True))
        for metric in values
    ]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of the draws in which there was something to fit."""
    fitted = [value for value in values if not np.isnan(value)]
    return interval(np.array(fitted)) if fitted else (np.nan, np.nan)


def _fit(predicted: np.ndarray, accepted: np.ndarray) -> dict[str, float]:
    """Missing where everything was accepted alike."""
    if np.ptp(accepted) == 0 or np.ptp(predicted) == 0:
        return dict.fromkeys(("slope", "r2", "r2_of_bins"), np.nan)
    parts = _tenths(predicted)
    means = [[x[parts == part].mean() for part in np.unique(parts)] for x in (predicted, accepted)]
    return {
        "slope": np.polyfit(predicted, accepted, 1)[0],
        "r2": np.corrcoef(predicted, accepted)[0, 1] ** 2,
        "r2_of_bins": np.corrcoef(*means)[0, 1] ** 2,
    }
