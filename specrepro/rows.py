"""What records add up to: rows with provenance, ratios with intervals, and where the time went.

A decode row covers one method on one prompt set at one temperature and batch size, over the
prompts that both it and the autoregressive baseline finished. Ratios are of totals: `tau` is tokens
over target passes after prefill (the prefill's own token left out, a last round cut where the
sequence ended), `tokens_per_second` is tokens over wall time with prefill, `speedup` is that of the
method over that of the baseline, `speedup_decode` the same with prefill out. Beside them stand
`tau_per_round` (rounds that drafted), `tau_per_request` and `speedup_mean_of_prompts`. Where a
prompt was repeated, its time is the median of the repeats.

`*_low` and `*_high` are 95 % intervals from a paired bootstrap over prompts: one resample draws the
same prompts for every method (whole batches where batch > 1, since a batch shares its time). They
are widened as Student's t is for few of them; one or two prompts have none, and a mean over sets
has one where its spread is known as well as that of three.

A row of prompts "mean" averages a method's prompt sets, each resampled within itself; a method that
lacks one of the sets has none. Functions return bare rows; `stamp` adds where they come from.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from specrepro import provenance
from specrepro.measure import AUTOREGRESSIVE, Record, dtype_name, target_name
from specrepro.target_model import Target

MEASURED_NOW = "measured here now"
NUM_RESAMPLES = 10_000
FEWEST_UNITS = 3  # that have an interval; of two it would reach from nothing to nine times as much
COLUMNS = [
    "paper", "quantity", "method", "prompts", "temperature", "batch", "dtype", "tier", "seed",
    "num_prompts", "new_tokens", "seconds", "target_passes", "tau", "tokens_per_second", "speedup",
    "speedup_low", "speedup_high", "device", "torch", "transformers", "triton", "commit", "when",
]  # fmt: skip
SLICE = ["prompts", "temperature", "batch", "seed"]  # what a row never mixes
ABOUT_RUN = ["paper", "tier", "commit", "when", "target", "torch", "transformers", "triton"]
SUMS = ["new_tokens", "seconds", "emitted", "target_passes", "decode_seconds"]
PARTS = {  # of a round -> what Generation times
    "target": ("target",),
    "draft": ("draft", "observe"),
    "tree": ("tree",),
    "verify": ("verify", "keep"),
}

Totals = dict[str, Any]  # a method's sums: one number each, or one per resample


def _per_pass(own: Totals, _: Totals) -> Any:
    return own["emitted"] / own["target_passes"]


def _per_second(own: Totals, _: Totals) -> Any:
    return own["new_tokens"] / own["seconds"]


def _speedup(own: Totals, base: Totals) -> Any:
    return _per_second(own, base) / _per_second(base, base)


def _speedup_decode(own: Totals, base: Totals) -> Any:
    rates = [totals["emitted"] / totals["decode_seconds"] for totals in (own, base)]
    return rates[0] / rates[1]


METRICS: dict[str, Callable[[Totals, Totals], Any]] = {
    "tau": _per_pass,
    "tokens_per_second": _per_second,
    "speedup": _speedup,
    "speedup_decode": _speedup_decode,
}


def environment(target: Target) -> dict[str, Any]:
    """Where a measurement was made: the columns that every row of it carries."""
    return {
        "target": target_name(target),
        "dtype": dtype_name(target),
        **provenance.machine(target.device),
        "commit": provenance.commit(),
        "when": provenance.now(),
    }


def stamp(
    rows: pd.DataFrame,
    environment: dict[str, Any],
    tier: str,
    source: str = MEASURED_NOW,
    paper: str | None = None,
) -> pd.DataFrame:
    """Rows with their provenance, the fixed columns first; what a row says itself is kept.

    A row without provenance beside others that have one is told the run, not the machine: it may
    have been drawn from the rows of another.
    """
    added = environment | {"tier": tier, "source": source, "paper": paper}
    rows = rows.assign(**{name: value for name, value in added.items() if name not in rows})
    of_run = [name for name in ABOUT_RUN if added.get(name) is not None]
    rows = rows.assign(
        **{name: rows[name].where(rows[name].notna(), added[name]) for name in of_run}
    )
    others = [name for name in rows.columns if name not in COLUMNS]
    return rows.reindex(columns=COLUMNS + others)


def rows_of(
    records: Sequence[Record],
    environment: dict[str, Any],
    tier: str,
    source: str = MEASURED_NOW,
    paper: str | None = None,
) -> pd.DataFrame:
    """Every decode row of the records, the means, and a row of quantity "failed" per failure.

    They are of the code that decoded, whatever code adds them up.
    """
    rows = _decode_rows(_lines(records)) + [_failed_row(r) for r in records if r.error is not None]
    return stamp(pd.DataFrame(rows), environment | _decoded_by(records), tier, source, paper)


def _decoded_by(records: Sequence[Record]) -> dict[str, str]:
    """The commit of the records and when the last was taken; all commits where they are several."""
    if not (made := {record.when: record.commit for record in records if record.when}):
        return {}
    commits = list(dict.fromkeys(made[when] for when in sorted(made)))
    return {"commit": " and ".join(commits), "when": max(made)}


def _failed_row(record: Record) -> dict[str, Any]:
    names = [*SLICE, "method", "prompt_id", "repeat"]
    place = {name: getattr(record, name) for name in names}
    return place | {"quantity": "failed", "detail": record.error}


def _lines(records: Sequence[Record]) -> pd.DataFrame:
    """One line per prompt and method; a prompt of which every repeat failed has `is_ok` False."""
    keys = [*SLICE, "method", "prompt_id", "group", "question"]
    lines = pd.DataFrame([_line(record) for record in records])
    ok = lines[lines["is_ok"]]
    counted = ok.groupby(keys, sort=False).first()
    timed = ok.groupby(keys, sort=False)[["seconds", "decode_seconds"]].median()
    asked = lines.drop_duplicates(keys)[keys]
    merged = asked.merge(counted.assign(**timed).reset_index(), how="left", on=keys)
    return merged.assign(is_ok=merged["is_ok"].eq(True))


def _line(record: Record) -> dict[str, Any]:
    """The countable part of a record."""
    drafted = [num for num, nodes in zip(record.emitted, record.drafted, strict=True) if nodes]
    is_ok = record.error is None
    return {name: getattr(record, name) for name in (*SLICE, "method", "prompt_id")} | {
        "group": record.unit,
        "question": record.session or record.prompt_id,
        "is_ok": is_ok,
        "new_tokens": record.new_tokens,
        "seconds": record.seconds,
        "decode_seconds": record.seconds - record.prefill_seconds if is_ok else None,
        "emitted": sum(record.emitted) if is_ok else None,
        "target_passes": record.target_passes,
        "drafted_tokens": sum(drafted),
        "drafted_rounds": len(drafted),
        "load": record.load,
    }


@dataclass(frozen=True, slots=True)
class _Measured:
    """Ratios on one prompt set, or the mean of several, with their bootstrap draws."""

    named: dict[str, Any]  # the slice, and the method or the pair of methods
    values: dict[str, float]
    draws: Callable[[float], dict[str, np.ndarray]]  # of each metric, that reach so many errors
    counts: dict[str, float]  # what adds up over prompt sets
    degrees: dict[str, float]  # of freedom that each metric's spread is known with

    @property
    def intervals(self) -> dict[str, float]:
        named = {}
        for metric in METRICS:
            named[f"{metric}_low"], named[f"{metric}_high"] = self.interval(metric)
        return named

    def interval(self, metric: str) -> tuple[float, float]:
        if self.degrees[metric] < FEWEST_UNITS - 1:
            return np.nan, np.nan
        return interval(self.draws(reach(self.degrees[metric]))[metric])


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap draws; missing where a draw is."""
    low, high = np.quantile(draws, (0.025, 0.975)).tolist()
    return low, high


@lru_cache(maxsize=16)
def _resamples(num_units: int, seed: int) -> np.ndarray:
    """(resamples, units) how often each unit is drawn."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(num_units, np.full(num_units, 1 / num_units), NUM_RESAMPLES)
    return counts.astype(float)


def bootstrap(sums: np.ndarray, seed: int = 0) -> np.ndarray:
    """(resamples, C) totals of per-unit sums (units, C); one seed draws the same units.

    Missing below `FEWEST_UNITS`. Their middle 95 % is as wide as a t interval.
    """
    if len(sums) < FEWEST_UNITS:
        return np.full((NUM_RESAMPLES, *sums.shape[1:]), np.nan)
    return _widened(sums, seed, reach(len(sums) - 1))


def _widened(sums: np.ndarray, seed: int, errors: float) -> np.ndarray:
    """Resampled totals whose middle 95 % reaches so many standard errors.

    They are drawn too close to the real ones, as a sample's own spread is too small, and moved away
    by a factor: in the logarithm, which moves ratios of totals alike, or as they are where a sum is
    negative.
    """
    n = len(sums)
    totals, draws = sums.sum(0), _resamples(n, seed) @ sums
    factor = np.sqrt(n / (n - 1)) * errors / reach(np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = totals * (draws / totals) ** factor
    has_log = (sums >= 0).all(0) & (totals > 0)
    return np.where(has_log, moved, totals + factor * (draws - totals))


def reach(degrees: float) -> float:
    """How many standard errors a 95 % interval reaches, by the degrees of freedom (Student)."""
    return float(stats.t.ppf(0.975, degrees))


def _decode_rows(lines: pd.DataFrame, quantity: str = "decode") -> list[dict[str, Any]]:
    cases = []
    for _, part in lines.groupby(SLICE, sort=False):
        for method in part["method"].unique():
            cases.append(_measure(_finished(part, {method, AUTOREGRESSIVE}), part, method))
    return [
        case.named | {"quantity": quantity} | case.counts | case.values | case.intervals
        for case in [*cases, *_means(cases)]
    ]


def _finished(part: pd.DataFrame, methods: set[str]) -> pd.DataFrame:
    """The lines of `methods` on the prompts that all of them finished; absent ones do not count."""
    mine = part[part["method"].isin(methods)]
    num_methods, finished = mine["method"].nunique(), mine[mine["is_ok"]]
    num_finished = finished.groupby("prompt_id")["method"].transform("nunique")
    return finished[num_finished == num_methods]


def _measure(lines: pd.DataFrame, part: pd.DataFrame, method: str) -> _Measured:
    """One method against the baseline on `lines`, prompts that both finished, out of `part`."""
    own, base = _unit_sums(lines, method), _unit_sums(lines, AUTOREGRESSIVE)
    if not (part["method"] == AUTOREGRESSIVE).any():
        base = np.full_like(own, np.nan)
    seed = zlib.crc32(str(part["prompts"].iloc[0]).encode())
    values = _ratios(own.sum(0), base.sum(0)) | _side_values(lines, method)

    def draws(errors: float) -> dict[str, np.ndarray]:
        return _ratios(*(_widened(sums, seed, errors) for sums in (own, base)))

    named = part[SLICE].iloc[0].to_dict() | {"method": method}
    degrees = dict.fromkeys(METRICS, len(own) - 1.0)
    return _Measured(named, values, draws, _counts(lines, part, method), degrees)


def _unit_sums(lines: pd.DataFrame, method: str) -> np.ndarray:
    """(units, sums) in the order of the units' names, the same for every method."""
    own = lines[lines["method"] == method]
    return own.groupby("group")[SUMS].sum().to_numpy(float)


def _ratios(own: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    totals = [dict(zip(SUMS, np.moveaxis(sums, -1, 0), strict=True)) for sums in (own, base)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return {metric: ratio(*totals) for metric, ratio in METRICS.items()}


def _side_values(lines: pd.DataFrame, method: str) -> dict[str, float]:
    """The other ways to average, printed beside the ratios of totals."""
    own = lines[lines["method"] == method].set_index("prompt_id").astype({"target_passes": float})
    base = lines[lines["method"] == AUTOREGRESSIVE].set_index("prompt_id")
    rates = [side["new_tokens"] / side["seconds"] for side in (own, base)]
    num_rounds = own["drafted_rounds"].sum()
    # a prompt that ended with its first token has no pass to count per
    per_request = own["emitted"] / own["target_passes"].replace(0, np.nan)
    return {
        "tau_per_round": own["drafted_tokens"].sum() / num_rounds if num_rounds else np.nan,
        "tau_per_request": per_request.mean(),
        "speedup_mean_of_prompts": (rates[0] / rates[1]).mean(),
    }


def _counts(lines: pd.DataFrame, part: pd.DataFrame, method: str) -> dict[str, float]:
    own = lines[lines["method"] == method]
    num_asked = part.loc[part["method"] == method, "prompt_id"].nunique()
    sums = own[["new_tokens", "seconds", "target_passes"]].sum().to_dict() if len(own) else {}
    load = {"load": own["load"].max()}
    num_prompts = own["question"].nunique()
    return {"num_prompts": num_prompts, "num_failed": num_asked - len(own)} | sums | load


def _means(cases: list[_Measured]) -> list[_Measured]:
    """A case of prompts "mean" for everything that was measured on every one of several sets."""
    sets: dict[Any, set[str]] = defaultdict(set)
    alike: dict[Any, list[_Measured]] = defaultdict(list)
    for case in cases:
        rest = {name: value for name, value in case.named.items() if name != "prompts"}
        sets[tuple(rest[name] for name in SLICE[1:])].add(case.named["prompts"])
        alike[tuple(rest.values())].append(case)
    wanted = {key: len(sets[key[: len(SLICE) - 1]]) for key in alike}
    return [_mean(group) for key, group in alike.items() if len(group) == wanted[key] > 1]


def _mean(cases: list[_Measured]) -> _Measured:
    """The mean of the sets' values; counts add up, and the load is the highest."""
    values = {name: np.mean([c.values[name] for c in cases]) for name in cases[0].values}

    def draws(errors: float) -> dict[str, np.ndarray]:
        drawn = [case.draws(errors) for case in cases]
        return {name: np.mean([one[name] for one in drawn], 0) for name in METRICS}

    counts = {name: sum(c.counts.get(name, 0) for c in cases) for name in cases[0].counts}
    if "load" in counts:
        counts["load"] = max(case.counts["load"] for case in cases)
    named = cases[0].named | {"prompts": "mean"}
    return _Measured(named, values, draws, counts, _degrees_of_mean(cases))


def _degrees_of_mean(cases: list[_Measured]) -> dict[str, float]:
    """Degrees of freedom of a mean of independent means (Welch and Satterthwaite)."""
    own = np.array([min(case.degrees.values()) for case in cases])
    if own.min() < 1:
        return dict.fromkeys(METRICS, 0.0)
    drawn = [case.draws(reach(np.inf)) for case in cases]
    found = {}
    for metric in METRICS:
        shares = np.array([one[metric].var() for one in drawn])
        is_spread = np.isfinite(shares).all() and shares.sum() > 0
        found[metric] = shares.sum() ** 2 / (shares**2 / own).sum() if is_spread else own.sum()
    return found


def paired_differences(
    records: Sequence[Record],
    pairs: Sequence[tuple[str, str]] | None = None,
    metrics: Sequence[str] = ("tau", "speedup"),
) -> pd.DataFrame:
    """`method` less `versus` on the prompts that both finished, with its interval.

    Without `pairs`, every method against every other. Rows of quantity "paired_difference" with
    columns `metric`, `value`, `value_low` and `value_high`, and their means over prompt sets.
    """
    cases = []
    for _, part in _lines(records).groupby(SLICE, sort=False):
        for pair in permutations(part["method"].unique(), 2):
            if pairs is None or pair in pairs:
                cases.append(_difference(part, *pair))
    return pd.DataFrame(
        [
            case.named | {"quantity": "paired_difference", "metric": metric} | row
            for case in [*cases, *_means(cases)]
            for metric in metrics
            if not np.isnan((row := _value_row(case, metric))["value"])
        ]
    )


def paired_gains(
    records: Sequence[Record], gain: tuple[str, str], versus: tuple[str, str]
) -> pd.DataFrame:
    """How much more lies between the two methods of `gain` than between those of `versus`.

    Each a method and what it is held against; on the prompts that all four finished. Rows of
    quantity "paired_gain", otherwise like those of `paired_differences`.
    """
    names, found = {*gain, *versus}, []
    for _, part in _lines(records).groupby(SLICE, sort=False):
        if not names <= set(part["method"]):
            continue
        lines = _finished(part, names | {AUTOREGRESSIVE})
        of = {name: _measure(lines, part, name) for name in names}
        first, second = (_less(of[ours], of[theirs]) for ours, theirs in (gain, versus))
        case = _less(first, second)
        named = case.named | {"quantity": "paired_gain"}
        found += [named | {"metric": one} | _value_row(case, one) for one in ("tau", "speedup")]
    return pd.DataFrame(found)


def _difference(part: pd.DataFrame, method: str, versus: str) -> _Measured:
    lines = _finished(part, {method, versus, AUTOREGRESSIVE})
    return _less(*(_measure(lines, part, name) for name in (method, versus)))


def _less(one: _Measured, other: _Measured) -> _Measured:
    """What one has more than the other, measured on the same prompts."""
    values = {name: one.values[name] - other.values[name] for name in METRICS}

    def draws(errors: float) -> dict[str, np.ndarray]:
        ours, theirs = one.draws(errors), other.draws(errors)
        return {name: ours[name] - theirs[name] for name in METRICS}

    counts = {"num_prompts": one.counts["num_prompts"]}
    named = one.named | {"versus": other.named["method"]}
    return _Measured(named, values, draws, counts, one.degrees)


def _value_row(case: _Measured, metric: str) -> dict[str, Any]:
    low, high = case.interval(metric)
    return {"value": case.values[metric], "value_low": low, "value_high": high} | case.counts


@dataclass(frozen=True, slots=True)
class _ByDepth:
    """How often one method's tokens are accepted at depths 1, 2, ..., with bootstrap draws."""

    offered: np.ndarray  # (depths,) rounds that could accept there
    values: np.ndarray  # (depths,)
    draws: np.ndarray  # (resamples, depths)
    num_prompts: int

    @classmethod
    def of(cls, records: Sequence[Record], num_levels: int, fewest_rounds: int) -> _ByDepth:
        """Down to the last depth that enough rounds reached; units are in the order of names."""
        mine = sorted(records, key=lambda record: record.unit)
        units = _by_unit([(record.unit, _reached(record, num_levels)) for record in mine])
        totals, draws = units.sum(0), bootstrap(units)
        offered = totals[:num_levels]
        deep = max(int(offered[0] > 0), int((offered >= fewest_rounds).sum()))
        with np.errstate(divide="ignore", invalid="ignore"):
            rates = np.minimum(draws[:, num_levels:] / draws[:, :num_levels], 1)
            values = totals[num_levels:] / offered
        return cls(offered[:deep], values[:deep], rates[:, :deep], len(mine))

    def less(self, other: _ByDepth) -> _ByDepth:
        """The difference, of two methods on the same units."""
        deep = min(len(self.offered), len(other.offered))
        offered = np.minimum(self.offered[:deep], other.offered[:deep])
        values = self.values[:deep] - other.values[:deep]
        return _ByDepth(
            offered, values, self.draws[:, :deep] - other.draws[:, :deep], self.num_prompts
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row of each depth."""
        for place, (offered, value) in enumerate(zip(self.offered, self.values, strict=True)):
            low, high = interval(self.draws[:, place])
            row = {"depth": place + 1, "num_rounds": int(offered), "num_prompts": self.num_prompts}
            yield row | {"value": value, "value_low": low, "value_high": high}


def acceptance_by_depth(
    records: Sequence[Record], levels: int | None = None, fewest_rounds: int = 10
) -> pd.DataFrame:
    """How often the token drafted at each depth is accepted once those above it were.

    Rows of quantity "acceptance_by_depth", `depth` from 1. A round counts at a depth if its draft
    was large enough to reach it; in a tree, a branch that ends above counts as a rejection. A
    record does not know how deep its trees were: without `levels`, the deepest acceptance ends it.
    So does the depth, below the first, that fewer than `fewest_rounds` reached: it shows nothing.
    """
    found = []
    for named, mine in _by_method([r for r in _first_repeats(records) if any(r.drafted)]):
        num_levels = levels or max(1, max(max(r.accepted) for r in mine if r.accepted))
        rates = _ByDepth.of(mine, num_levels, fewest_rounds)
        found += [named | {"quantity": "acceptance_by_depth"} | row for row in rates.rows()]
    return pd.DataFrame(found)


def paired_by_depth(
    records: Sequence[Record],
    pairs: Sequence[tuple[str, str]],
    levels: int,
    fewest_rounds: int = 10,
) -> pd.DataFrame:
    """That acceptance of `method` less that of `versus`, on the prompts that both answered.

    Rows of quantity "paired_difference" by `depth`, of the `metric` "value", as the rates are in.
    """
    of: dict[Any, dict[str, list[Record]]] = defaultdict(dict)
    for named, mine in _by_method([r for r in _first_repeats(records) if any(r.drafted)]):
        of[tuple(named[name] for name in SLICE)][named["method"]] = mine
    found = []
    for place, methods in of.items():
        for pair in (pair for pair in pairs if set(pair) <= methods.keys()):
            one, other = (
                _ByDepth.of(mine, levels, fewest_rounds) for mine in _shared(methods, *pair)
            )
            named = dict(zip([*SLICE, "method", "versus"], [*place, *pair], strict=True))
            named |= {"quantity": "paired_difference", "metric": "value"}
            found += [named | row for row in one.less(other).rows()]
    return pd.DataFrame(found)


def _shared(of: Mapping[str, list[Record]], *methods: str) -> list[list[Record]]:
    """The records of some methods on the prompts that all of them have."""
    ids = set.intersection(*({record.prompt_id for record in of[name]} for name in methods))
    return [[record for record in of[name] if record.prompt_id in ids] for name in methods]


def _reached(record: Record, num_levels: int) -> np.ndarray:
    """Rounds that could accept at depth 1, 2, ..., then rounds that did."""
    depths = np.arange(1, num_levels + 1)
    accepted = np.array(record.accepted)[:, None]
    offered = (accepted >= depths - 1) & (np.array(record.drafted)[:, None] >= depths)
    return np.concatenate([offered.sum(0), (accepted >= depths).sum(0)]).astype(float)


def round_parts(records: Sequence[Record]) -> pd.DataFrame:
    """Milliseconds of a round by part: rows of quantity "round_seconds", column `part`.

    "target" is the target's pass; "draft" is proposing and learning from the verdict (`draft` and
    `observe` of a Generation); "verify" is the walk and moving what was kept in the cache (`verify`
    and `keep`); "tree" is building the tree, where a decoder times it apart from drafting; "rest"
    is what is left of the wall time after prefill. A batch shares its rounds, so a round is one
    pass of the whole batch. Methods whose parts are not timed have no rows.
    """
    rows = []
    ok = [record for record in records if record.error is None and record.seconds_by_part]
    for named, mine in _by_method(ok):
        parts = [part for part in PARTS if any(_part_seconds(r, part) is not None for r in mine)]
        units = _by_unit(_timed_rounds(mine, parts))
        if not units[:, 0].sum():
            continue
        per_round = 1e3 * units.sum(0)[1:] / units[:, 0].sum()
        draws = bootstrap(units)
        for place, part in enumerate([*parts, "rest"]):
            with np.errstate(divide="ignore", invalid="ignore"):
                low, high = interval(1e3 * draws[:, place + 1] / draws[:, 0])
            row = {"quantity": "round_seconds", "part": part, "value": per_round[place]}
            row |= {"value_low": low, "value_high": high, "num_prompts": _num_prompts(mine)}
            rows.append(named | row)
    return pd.DataFrame(rows)


def _timed_rounds(records: list[Record], parts: list[str]) -> list[tuple[str, np.ndarray]]:
    """Per run of a batch: its rounds, then the seconds of each part and of the rest."""
    runs: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        runs[record.group, record.repeat].append(record)
    timed = []
    for together in runs.values():
        seconds = [sum(_part_seconds(r, part) or 0.0 for r in together) for part in parts]
        whole = sum(record.seconds - record.prefill_seconds for record in together)
        num_rounds = max(record.target_passes for record in together)
        sums = np.array([num_rounds, *seconds, whole - sum(seconds)], float)
        timed.append((together[0].unit, sums))
    return timed


def _part_seconds(record: Record, part: str) -> float | None:
    found = [record.seconds_by_part[n] for n in PARTS[part] if n in record.seconds_by_part]
    return sum(found) if found else None


def _first_repeats(records: Sequence[Record]) -> list[Record]:
    """The first repeat of each prompt and method that did not fail."""
    first: dict[Any, Record] = {}
    for record in sorted(records, key=lambda record: record.repeat):
        if record.error is None:
            first.setdefault(record.key[:-1], record)
    return list(first.values())


def _by_method(records: Sequence[Record]) -> Iterator[tuple[dict[str, Any], list[Record]]]:
    """The records of each method in each slice, with the columns that name them."""
    alike: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        alike[tuple(getattr(record, name) for name in [*SLICE, "method"])].append(record)
    for values, mine in alike.items():
        yield dict(zip([*SLICE, "method"], values, strict=True)), mine


def _by_unit(parts: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """(units, ...) sums over what was decoded together."""
    sums: dict[str, np.ndarray] = {}
    for unit, values in parts:
        sums[unit] = sums.get(unit, 0) + values
    return np.stack(list(sums.values()))


def _num_prompts(records: list[Record]) -> int:
    return len({record.session or record.prompt_id for record in records})


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """The share of a text's n-grams that occurred before in it; 0 where it has none."""
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def split_by_repetition(records: Sequence[Record], n: int = 4) -> pd.DataFrame:
    """Decode rows apart for prompts whose baseline output repeats itself less, and more.

    Rows of quantity "decode_by_repetition", so that they never mix with the whole; the column
    `repetition` is "low" or "high", split at the middle of each slice's prompts.
    """
    halves = _halves(records, n)
    rows = []
    for half in ("low", "high"):
        mine = [r for r in records if halves.get((*_slice(r), r.prompt_id)) == half]
        if mine:
            found = _decode_rows(_lines(mine), "decode_by_repetition")
            rows += [row | {"repetition": half} for row in found]
    return pd.DataFrame(rows)


def _halves(records: Sequence[Record], n: int) -> dict[tuple[Any, ...], str]:
    """Per slice and prompt, whether the baseline's output is in the low or the high half."""
    slices: dict[Any, list[tuple[float, str]]] = defaultdict(list)
    for record in _first_repeats(records):
        if record.method == AUTOREGRESSIVE:
            slices[_slice(record)].append((repetition(record.tokens, n), record.prompt_id))
    return {
        (*key, prompt_id): "low" if rank < len(scored) / 2 else "high"
        for key, scored in slices.items()
        for rank, (_, prompt_id) in enumerate(sorted(scored))
    }


def _slice(record: Record) -> tuple[Any, ...]:
    return tuple(getattr(record, name) for name in SLICE)
