"""Verdicts: what a paper claims, held against the rows measured here.

A claims file (`claims/<paper>.yaml`) holds the paper's tables as data with an address
(`reported`) and its claims, each with the setting it speaks of and a tolerance fixed beforehand.
`load` reads it strictly, `judge` turns claims and rows into verdicts, `write_verdict` stores
them.

Kinds of claim: `value` (an absolute number, or a table of them along one column), `ordering` (a
metric at `setting` above the same metric at `versus`), `threshold` (every matching row is above,
below or equal to `bound`) and `trend` (a metric rises, falls or stays flat along a column).

A value counts only at the tier, and on the target, that it was reported for; below that its
verdict is `proxy`. The other kinds are judged at any tier from `tier_needed` up, by where the 95
% interval lies. An ordering reads its interval from a row of quantity `paired_difference`
(columns `method`, `versus`, `metric`, `value`, `value_low`, `value_high`) where there is one,
else from the two rows' intervals. Rows of different sources are never mixed in one verdict: those
measured now go first; of an audit those that failed, then those of most prompts.

Not done here: measuring, and correcting for the number of claims judged.
"""

import json
import math
import os
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

TIERS = ("smoke", "laptop", "full", "paper")
VERDICTS = (
    "reproduced",
    "better",
    "direction holds",
    "not reproduced",
    "inconclusive",
    "proxy",
    "not tested",
)
MEASURED_NOW = "measured here now"
CLAIMS_FOLDER = Path(__file__).resolve().parents[1] / "claims"

_FILE_KEYS = {"paper", "title", "arxiv", "models", "reported", "claims"}
_TABLE_KEYS = {"table", "keys", "along", "heads", "cells", "rows"}
_OPTIONAL_TABLE_KEYS = {"quantity", "setting", "by", "approximate", "note", "grade"}
_ALWAYS = {"id", "kind", "statement", "where", "metric", "setting", "tier_needed"}
_SOMETIMES = {"quote", "model", "reported", "untested_why", "grade"}
# how what the paper says was read: in the paper itself, in transcriptions of it, in a summary; or
# derived here from what was read
GRADES = ("A", "B", "C", "D")
_REQUIRED_BY_KIND = {
    "value": {"reported", "tolerance"},
    "ordering": {"versus"},
    "threshold": {"direction", "bound"},
    "trend": {"direction", "along"},
}
_OPTIONAL_BY_KIND = {"value": {"along"}, "trend": {"tolerance"}}
_DIRECTIONS = {"threshold": ("above", "below", "equals"), "trend": ("rises", "falls", "flat")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One statement of a paper that rows can support or contradict."""

    id: str
    kind: str  # value, ordering, threshold, trend
    statement: str
    where: str  # table, figure or section
    metric: str  # the column that is read
    setting: dict[str, Any]  # column -> value, or list of admissible values
    tier_needed: str  # below it the verdict is `proxy`
    reported: float | dict[Any, float] | None = None  # a table's last cell is its headline
    quote: str | None = None
    model: str | None = None  # as the paper names it
    target: str | None = None  # the same model's Hub id
    versus: dict[str, Any] = field(default_factory=dict)  # replaces parts of `setting`
    direction: str | None = None
    bound: float | None = None
    along: str | None = None  # the column a table or a trend runs along
    tolerance: float | None = None  # relative, fixed before measuring
    untested_why: str | None = None  # said when no row matches
    grade: str = "A"  # one of GRADES


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one claim; for an ordering, `reported` and `measured` are differences."""

    id: str
    statement: str
    where: str
    reported: float | None
    measured: float | None
    low: float | None
    high: float | None
    num_prompts: int | None
    verdict: str  # one of VERDICTS
    why: str


@dataclass(frozen=True, slots=True)
class _Reading:
    """A measured quantity with its 95 % interval, and the row it came from."""

    measured: float
    low: float
    high: float
    num_prompts: float
    row: pd.Series

    @property
    def has_interval(self) -> bool:
        return not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def ends(self) -> str:
        """What lies between low and high, in words: a row may say that it is something else."""
        if self.row["quantity"] == "losslessness":
            return "the count"
        if self.low == self.high:
            return "the one number there is"
        told = self.row.get("ends")
        return "the 95 % interval" if told is None or pd.isna(told) else f"the range ({told})"


class _Untested(Exception):
    """No verdict can be given; the message says why."""


def load(path: str | Path) -> list[Claim]:
    """Read a claims file (a path or a paper's name); what is unknown or missing is a ValueError."""
    path = _claims_file(path)
    document = _read(path)
    tables = _reported_rows(document, path)
    claims = [_claim(entry, document["models"], tables, path) for entry in document["claims"]]
    for claim_id, count in Counter(claim.id for claim in claims).items():
        if count > 1:
            raise ValueError(f"{path}: claim {claim_id}: key 'id' is used {count} times")
    return claims


def reported(path: str | Path) -> pd.DataFrame:
    """The paper's tables as rows, one per cell, with `table`, `by` and `approximate` columns."""
    path = _claims_file(path)
    return _reported_rows(_read(path), path)


def _claims_file(path: str | Path) -> Path:
    """A path as given; a bare paper name means its file in the claims folder."""
    path = Path(path)
    return path if path.suffix else CLAIMS_FOLDER / f"{path.name}.yaml"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CLAIMS_FOLDER.glob("*.yaml")))
        raise ValueError(f"no claims file {path}; papers with one: {known or 'none'}")
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    _check_keys(document, _FILE_KEYS, _FILE_KEYS, f"{path}: top level")
    return document


def _check_keys(entry: Any, required: set[str], allowed: set[str], place: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: expected keys and values, found {entry!r}")
    for key in sorted(entry.keys() - allowed, key=str):
        raise ValueError(f"{place}: unknown key {key!r}; known: {', '.join(sorted(allowed))}")
    for key in sorted(required - entry.keys()):
        raise ValueError(f"{place}: missing key {key!r}")


def _claim(entry: Any, models: dict[str, str], tables: pd.DataFrame, path: Path) -> Claim:
    name = entry.get("id", "without an id") if isinstance(entry, dict) else "not a mapping"
    place = f"{path}: claim {name}"
    _check_claim(entry, models, place)
    claim = Claim(**entry, target=models.get(entry.get("model")))
    if not isinstance(claim.reported, str):
        return claim
    fetched = _fetch_reported(claim, tables, place)
    return Claim(**{f.name: getattr(claim, f.name) for f in fields(claim)} | {"reported": fetched})


def _check_claim(entry: Any, models: dict[str, str], place: str) -> None:
    if not isinstance(entry, dict) or "kind" not in entry:
        raise ValueError(f"{place}: missing key 'kind'")
    _check_choice(entry, "kind", tuple(_REQUIRED_BY_KIND), place)
    required = _ALWAYS | _REQUIRED_BY_KIND[entry["kind"]]
    allowed = required | _SOMETIMES | _OPTIONAL_BY_KIND.get(entry["kind"], set())
    _check_keys(entry, required, allowed, place)
    if entry.get("direction") == "flat":
        _check_keys(entry, required | {"tolerance"}, allowed, place)
    _check_choice(entry, "tier_needed", TIERS, place)
    _check_choice(entry, "direction", _DIRECTIONS.get(entry["kind"], ()), place)
    _check_choice(entry, "model", tuple(models), place)
    _check_choice(entry, "grade", GRADES, place)


def _check_choice(entry: dict[str, Any], key: str, choices: tuple[str, ...], place: str) -> None:
    if key in entry and entry[key] not in choices:
        known = ", ".join(choices)
        raise ValueError(f"{place}: key {key!r} is {entry[key]!r}; choose one of {known}")


def _fetch_reported(
    claim: Claim, tables: pd.DataFrame, place: str
) -> float | dict[Any, float] | None:
    """The number, or the table along `along`, that a claim's `reported: <table>` refers to."""
    # the table says which cells are meant; what is measured against them may go by another quantity
    table = tables[tables["table"] == claim.reported]
    here = claim.setting | {"quantity": table["quantity"].unique().tolist()}
    here |= {"model": claim.model} if claim.model else {}
    found = _matching(table, _only_known(here, table)).dropna(subset=[claim.metric])
    if claim.kind == "ordering":
        there = _matching(table, _only_known(here | claim.versus, table))
        return round(_lone(found, claim, place) - _lone(there, claim, place), 4)
    if claim.kind == "trend":
        ends = found.sort_values(claim.along)[claim.metric]
        return round(float(ends.iloc[-1] - ends.iloc[0]), 4)
    if claim.kind == "value" and claim.along:
        cells = dict(zip(found[claim.along], found[claim.metric].astype(float), strict=True))
        if not cells or len(cells) != len(found):
            raise ValueError(f"{place}: key 'reported': {claim.reported} gives {len(found)} cells")
        return cells
    return _lone(found, claim, place)


def _only_known(setting: dict[str, Any], table: pd.DataFrame) -> dict[str, Any]:
    """The part of a setting that a reported table has columns for."""
    known = table.columns[table.notna().any()]
    return {column: wanted for column, wanted in setting.items() if column in known}


def _lone(found: pd.DataFrame, claim: Claim, place: str) -> float:
    values = found[claim.metric].dropna()
    if len(values) != 1:
        raise ValueError(
            f"{place}: key 'reported': {claim.reported!r} has {len(values)} matching cells, not one"
        )
    return float(values.iloc[0])


def _reported_rows(document: dict[str, Any], path: Path) -> pd.DataFrame:
    return pd.DataFrame([row for table in document["reported"] for row in _cells_of(table, path)])


def _cells_of(table: Any, path: Path) -> list[dict[str, Any]]:
    """Spread one reported table: a row per cell that holds a number."""
    place = f"{path}: table {table.get('table') if isinstance(table, dict) else table}"
    _check_keys(table, _TABLE_KEYS, _TABLE_KEYS | _OPTIONAL_TABLE_KEYS, place)
    common = {"table": table["table"], "quantity": table.get("quantity", "decode")}
    common |= {"by": table.get("by", "authors"), "approximate": table.get("approximate", False)}
    common |= {"grade": table.get("grade", "A")}
    _check_choice(common, "grade", GRADES, place)
    cells = []
    for line in table["rows"]:
        if len(line) != len(table["keys"]) + len(table["heads"]):
            raise ValueError(f"{place}: key 'rows': {line} does not fit the keys and heads")
        keys = dict(zip(table["keys"], line, strict=False))
        for head, cell in zip(table["heads"], line[len(keys) :], strict=True):
            place_of = common | table.get("setting", {}) | keys | {table["along"]: head}
            cells.append(place_of | _numbers(cell, table["cells"], f"{place}: {line}"))
    return [cell for cell in cells if any(metric in cell for metric in table["cells"])]


def _numbers(cell: Any, metrics: list[str], place: str) -> dict[str, float]:
    """Split `1.93/2.27` over its metrics; `-` and an empty cell mean not reported."""
    parts = ["-"] * len(metrics) if cell is None else str(cell).split("/")
    if len(parts) != len(metrics):
        raise ValueError(f"{place}: cell {cell!r} should hold {'/'.join(metrics)}")
    return {m: float(part) for m, part in zip(metrics, parts, strict=True) if part != "-"}


def judge(claims: list[Claim], rows: pd.DataFrame, tier: str) -> list[Verdict]:
    """One verdict per claim, in the claims' order; `rows` may be empty."""
    if tier not in TIERS:
        raise ValueError(f"unknown tier {tier!r}; choose one of {', '.join(TIERS)}")
    rows = _with_every_column(rows, tier)
    strange = sorted(set(rows["tier"]) - set(TIERS), key=str)
    if strange:
        raise ValueError(f"rows of unknown tiers {strange}; known: {', '.join(TIERS)}")
    verdicts = [_judge_one(claim, rows, tier) for claim in claims]
    if not _a_losslessness_check_failed(rows):
        return verdicts
    return [_void(*pair) for pair in zip(claims, verdicts, strict=True)]


def _with_every_column(rows: pd.DataFrame, tier: str) -> pd.DataFrame:
    """Rows with the columns that judging reads, filled with what their absence means."""
    defaults = {"quantity": "decode", "source": MEASURED_NOW, "tier": tier}
    empty = dict.fromkeys(("target", "device", "dtype", "num_prompts", "value"))
    missing = {name: value for name, value in (defaults | empty).items() if name not in rows}
    return rows.assign(**missing).fillna(defaults)


def _a_losslessness_check_failed(rows: pd.DataFrame) -> bool:
    """A prompt that differs in float32, or that parted at more than a near tie below that."""
    is_exact = (rows["quantity"] == "losslessness") & (rows["dtype"] == "float32")
    checks = rows[is_exact | (rows["quantity"] == "near_tie")]
    return bool((checks["value"].astype(float) > 0).any())


def _void(claim: Claim, verdict: Verdict) -> Verdict:
    """Nothing counts of methods that are not lossless, but that they are not."""
    is_about_it = claim.setting.get("quantity") in ("losslessness", "near_tie")
    if is_about_it or verdict.verdict == "not tested":
        return verdict
    return replace(verdict, verdict="inconclusive", why="a losslessness check failed")


def _judge_one(claim: Claim, rows: pd.DataFrame, tier: str) -> Verdict:
    """Judge on the rows measured now; where they do not reach the claim, on each other source."""
    reasons = []
    for source in _sources(claim, rows):
        try:
            return _JUDGES[claim.kind](claim, rows[rows["source"] == source], tier)
        except _Untested as reason:
            reasons.append(str(reason))
    telling = [one for one in reasons if "rows match" in one or one.startswith("no row for")]
    why = telling[0] if telling else claim.untested_why or _no_row(claim.setting)
    return _verdict(claim, None, "not tested", why)


def _sources(claim: Claim, rows: pd.DataFrame) -> list[str]:
    """Where rows come from, those measured now first; of an audit, those that failed, then those
    of most prompts.
    """
    is_audit = claim.setting.get("quantity") == "losslessness"
    audited = _matching(rows, claim.setting) if is_audit else rows.head(0)
    worst, most = (audited.groupby("source")[name].max() for name in ("value", "num_prompts"))

    def rank(source: str) -> tuple:
        return -worst.get(source, 0), -most.get(source, 0), source != MEASURED_NOW, source

    return sorted(rows["source"].unique(), key=rank)


def _judge_value(claim: Claim, rows: pd.DataFrame, tier: str) -> Verdict:
    """Every cell of the claim against its row; the headline cell's numbers go into the verdict."""
    cells = claim.reported if isinstance(claim.reported, dict) else {None: claim.reported}
    found = {cell: _reading_of_cell(claim, rows, cell) for cell in cells}
    readings = {cell: reading for cell, reading in found.items() if reading is not None}
    if not readings:
        raise _Untested(_no_row(claim.setting))
    headline = readings.get(list(cells)[-1])
    differences = [_why_only_a_proxy(claim, reading, tier) for reading in readings.values()]
    if any(differences):
        return _verdict(claim, headline, "proxy", next(filter(None, differences)))
    outcomes = {cell: _compare(reading, cells[cell], claim) for cell, reading in readings.items()}
    return _verdict(claim, headline, *_combine(claim, outcomes, cells, readings))


def _reading_of_cell(claim: Claim, rows: pd.DataFrame, cell: Any) -> _Reading | None:
    setting = claim.setting if cell is None else claim.setting | {claim.along: cell}
    if _matching(rows, setting).get(claim.metric, pd.Series(dtype=float)).notna().sum() == 0:
        return None
    return _read_one(claim, rows, setting)


def _compare(reading: _Reading, reported_value: float, claim: Claim) -> str:
    """One number: is the interval within the band of `tolerance` around the reported value?"""
    lowest, highest = (reported_value * (1 + sign * claim.tolerance) for sign in (-1, 1))
    if not reading.has_interval:
        return "inconclusive"
    if reading.low > highest:
        return "better"
    if reading.high < lowest:
        return "not reproduced"
    return "reproduced" if lowest <= reading.low and reading.high <= highest else "inconclusive"


def _combine(
    claim: Claim,
    outcomes: dict[Any, str],
    cells: dict[Any, float],
    readings: dict[Any, _Reading],
) -> tuple[str, str]:
    """One verdict for a table: its worst cell decides, and a missing cell leaves it open."""
    order = ("not reproduced", "inconclusive", "reproduced", "better")
    worst = min(outcomes.values(), key=order.index)
    absent = [_cell_name(cell) for cell in cells if cell not in outcomes]
    if absent and worst != "not reproduced":
        return "inconclusive", f"no row for {claim.along} {', '.join(absent)}"
    behind = [
        f"{_cell_name(cell)} {_number(readings[cell].measured)} for {_number(cells[cell])}"
        for cell, outcome in outcomes.items()
        if outcome == worst
    ]
    reasons = {
        "not reproduced": "the interval lies below the tolerance band: ",
        "inconclusive": "no interval, or one that leaves the tolerance band: ",
        "reproduced": "the interval lies within the tolerance band: ",
        "better": "the interval lies above the tolerance band: ",
    }
    return worst, reasons[worst] + ", ".join(text.strip() for text in behind)


def _cell_name(cell: Any) -> str:
    """A prompt set's name, or a number without needless decimals; nothing for a lone value."""
    if cell is None:
        return ""
    return f"{cell:g}" if isinstance(cell, int | float) else str(cell)


def _judge_ordering(claim: Claim, rows: pd.DataFrame, tier: str) -> Verdict:
    """`setting` above `versus`: where does the interval of the difference lie?"""
    paired = _paired_difference(claim, rows)
    reading = paired or _difference(
        _read_one(claim, rows, claim.setting), _read_one(claim, rows, claim.setting | claim.versus)
    )
    how = "paired over prompts" if paired else "from two separate intervals"
    return _directional(claim, reading, "above", 0.0, tier, f"difference, {how}: ")


def _paired_difference(claim: Claim, rows: pd.DataFrame) -> _Reading | None:
    if set(claim.versus) != {"method"}:
        return None
    setting = claim.setting | {"quantity": "paired_difference", "metric": claim.metric}
    found = _matching(rows, setting | {"versus": claim.versus["method"]}).dropna(subset=["value"])
    if len(found) != 1:
        return None
    return _reading(found.iloc[0], "value")


def _difference(here: _Reading, there: _Reading) -> _Reading:
    """The difference of two readings; its interval reaches between their farthest ends."""
    return _Reading(
        here.measured - there.measured,
        here.low - there.high,
        here.high - there.low,
        min(here.num_prompts, there.num_prompts),
        min(here.row, there.row, key=lambda row: TIERS.index(row["tier"])),
    )


def _judge_threshold(claim: Claim, rows: pd.DataFrame, tier: str) -> Verdict:
    """Every matching row against the bound; the row nearest to failing speaks for all.

    Of methods, temperatures or batch sizes that are listed each must have a row, or one must fail.
    """
    readings = _read_all(claim, rows, claim.setting)
    distance = {
        "above": lambda reading: reading.measured - claim.bound,
        "below": lambda reading: claim.bound - reading.measured,
        "equals": lambda reading: -abs(reading.measured - claim.bound),
    }[claim.direction]
    sides = [_side(reading, claim.direction, claim.bound) for reading in readings]
    worst = min(zip(sides, readings, strict=True), key=lambda pair: (pair[0], distance(pair[1])))[1]
    absent = _absent(claim.setting, readings)
    if absent and min(sides) > -1:
        raise _Untested(f"no row for {', '.join(absent)}")
    prompts = f" ({worst.row['prompts']})" if pd.notna(worst.row.get("prompts")) else ""
    named = f"worst of {len(readings)} rows{prompts}: " if len(readings) > 1 else ""
    return _directional(claim, worst, claim.direction, claim.bound, tier, named)


def _absent(setting: dict[str, Any], readings: list[_Reading]) -> list[str]:
    """What a setting lists and no row has; prompt sets differ from tier to tier."""
    lists = {name: value for name, value in setting.items() if isinstance(value, list)}
    lists.pop("prompts", None)
    found = {name: {one.row[name] for one in readings} for name in lists}
    return [f"{name} {v}" for name, values in lists.items() for v in values if v not in found[name]]


def _judge_trend(claim: Claim, rows: pd.DataFrame, tier: str) -> Verdict:
    """First against last along the column; no step may clearly go the other way."""
    readings = _read_all(claim, rows, claim.setting, along=claim.along)
    if len(readings) < 2:
        raise _Untested(f"one row only along {claim.along}, and a trend needs two")
    if claim.direction == "flat":
        return _judge_flat(claim, readings, tier)
    wanted = "above" if claim.direction == "rises" else "below"
    whole = _difference(readings[-1], readings[0])
    steps = [_difference(b, a) for a, b in zip(readings, readings[1:], strict=False)]
    against = next((step for step in steps if _side(step, wanted, 0.0) == -1), None)
    named = f"change over {len(readings)} points along {claim.along}: "
    if against is not None:
        named = f"a step along {claim.along} goes the other way: "
    return _directional(claim, against or whole, wanted, 0.0, tier, named)


def _judge_flat(claim: Claim, readings: list[_Reading], tier: str) -> Verdict:
    """Flat: every point stays within `tolerance` of the first, by its whole interval."""
    first, *others = readings
    slack = claim.tolerance * abs(first.measured)
    changes = [_difference(other, first) for other in others]
    farthest = max(changes, key=lambda change: abs(change.measured))
    outside = [c for c in changes if c.has_interval and (c.low > slack or c.high < -slack)]
    inside = all(c.has_interval and -slack <= c.low and c.high <= slack for c in changes)
    side = -1 if outside else int(inside)
    named = f"largest change along {claim.along}, with {_number(slack)} allowed: "
    return _from_side(claim, outside[0] if outside else farthest, side, tier, named)


def _directional(
    claim: Claim, reading: _Reading, direction: str, bound: float, tier: str, named: str
) -> Verdict:
    return _from_side(claim, reading, _side(reading, direction, bound), tier, named)


def _side(reading: _Reading, direction: str, bound: float) -> int:
    """1 when the whole interval lies on the claimed side of the bound, -1 on the other, else 0."""
    if not reading.has_interval:
        return 0
    if direction == "equals":
        outside = not reading.low <= bound <= reading.high
        return -1 if outside else int(reading.low == reading.high)
    above, below = reading.low > bound, reading.high < bound
    return int(above) - int(below) if direction == "above" else int(below) - int(above)


def _from_side(claim: Claim, reading: _Reading, side: int, tier: str, named: str) -> Verdict:
    difference = _why_only_a_proxy(claim, reading, tier) if claim.tier_needed != "smoke" else ""
    if difference:
        return _verdict(claim, reading, "proxy", difference)
    if not reading.has_interval:
        return _verdict(claim, reading, "inconclusive", f"{named}the row carries no 95 % interval")
    verdict = {1: "direction holds", 0: "inconclusive", -1: "not reproduced"}[side]
    where = {1: "on the claimed side", 0: "on both sides", -1: "on the other side"}[side]
    return _verdict(claim, reading, verdict, f"{named}{reading.ends} lies {where}")


def _why_only_a_proxy(claim: Claim, reading: _Reading, tier: str) -> str:
    """Empty when the row was measured at the tier, and on the target, that the claim needs."""
    row = reading.row
    reached = min(TIERS.index(tier), TIERS.index(row["tier"]))
    wanted_target = claim.target if claim.tier_needed == "paper" else None
    is_same_target = wanted_target is None or _model_name(row["target"]) == _model_name(
        claim.target
    )
    if reached >= TIERS.index(claim.tier_needed) and is_same_target:
        return ""
    target = row["target"] if pd.notna(row["target"]) else "a target that the row does not name"
    details = ", ".join(str(part) for part in (row["device"], row["dtype"]) if pd.notna(part))
    return (
        f"{target} at tier {TIERS[reached]}{f' ({details})' if details else ''}: not comparable "
        f"with {claim.model or 'the model'} in the paper"
    )


def _model_name(target: Any) -> str:
    """The last part of a Hub id or folder, so that a local copy counts as the same model."""
    return Path(str(target)).name.lower()


_JUDGES = {
    "value": _judge_value,
    "ordering": _judge_ordering,
    "threshold": _judge_threshold,
    "trend": _judge_trend,
}


def _matching(rows: pd.DataFrame, setting: dict[str, Any]) -> pd.DataFrame:
    """The rows that agree with every column of a setting; without `quantity`, decoding rows."""
    keep = pd.Series(True, index=rows.index)
    for column, wanted in ({"quantity": "decode"} | setting).items():
        if column not in rows:
            return rows.iloc[:0]
        keep &= rows[column].isin(wanted if isinstance(wanted, list) else [wanted])
    return rows[keep]


def _read_all(
    claim: Claim, rows: pd.DataFrame, setting: dict[str, Any], along: str | None = None
) -> list[_Reading]:
    """Every matching row that holds the metric, in the order of `along`."""
    found = _matching(rows, setting)
    needed = [claim.metric] + ([along] if along else [])
    if found.empty or any(column not in found for column in needed):
        raise _Untested(_no_row(setting))
    found = found.dropna(subset=needed)
    if found.empty:
        raise _Untested(_no_row(setting))
    if along:
        found = found.sort_values(along)
        _refuse_repeats(found, along)
    return [_reading(row, claim.metric) for _, row in found.iterrows()]


def _read_one(claim: Claim, rows: pd.DataFrame, setting: dict[str, Any]) -> _Reading:
    readings = _read_all(claim, rows, setting)
    if len(readings) > 1:
        raise _Untested(_too_many(pd.DataFrame([reading.row for reading in readings])))
    return readings[0]


def _refuse_repeats(found: pd.DataFrame, along: str) -> None:
    repeated = found[found.duplicated(along, keep=False)]
    if not repeated.empty:
        raise _Untested(_too_many(repeated[repeated[along] == repeated[along].iloc[0]]))


def _too_many(found: pd.DataFrame) -> str:
    descriptive = ("method", "prompts", "temperature", "batch", "dtype", "tier", "seed", "device")
    others = ("target", "commit", "total_tokens", "draft_depth", "top_k", "part", "num_tokens")
    columns = [name for name in descriptive + others if name in found]
    differing = [name for name in columns if found[name].nunique(dropna=False) > 1]
    return f"{len(found)} rows match; they differ in {', '.join(differing) or 'no known column'}"


def _reading(row: pd.Series, metric: str) -> _Reading:
    """A row's metric and its interval; a count of differing prompts is exact."""
    measured = float(row[metric])
    if row["quantity"] == "losslessness":
        low = high = measured
    else:
        low, high = (float(_or_nan(row.get(f"{metric}_{end}"))) for end in ("low", "high"))
    return _Reading(measured, low, high, float(_or_nan(row["num_prompts"])), row)


def _or_nan(value: Any) -> Any:
    return math.nan if value is None or pd.isna(value) else value


def _no_row(setting: dict[str, Any]) -> str:
    return "no row with " + ", ".join(f"{column} = {value}" for column, value in setting.items())


def _verdict(claim: Claim, reading: _Reading | None, verdict: str, why: str) -> Verdict:
    assert verdict in VERDICTS, f"{verdict!r} is not in the vocabulary"
    reported_value = claim.reported
    if isinstance(reported_value, dict):
        reported_value = list(reported_value.values())[-1]
    if reported_value is None and claim.kind == "threshold":
        reported_value = claim.bound
    numbers = (None,) * 4
    if reading is not None:
        numbers = (reading.measured, reading.low, reading.high, reading.num_prompts)
        numbers = tuple(None if math.isnan(number) else number for number in numbers)
    *interval, num_prompts = numbers
    num_prompts = None if num_prompts is None else int(num_prompts)
    return Verdict(
        claim.id, claim.statement, claim.where, reported_value, *interval, num_prompts, verdict, why
    )


def write_verdict(path: str | Path, paper: str, tier: str, verdicts: list[Verdict]) -> Path:
    """Write verdict.json whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"paper": paper, "tier": tier, "claims": [asdict(verdict) for verdict in verdicts]}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def as_table(verdicts: list[Verdict], width: int = 120) -> str:
    """Verdicts for the terminal: a statement with its numbers, and below it where and why.

    Claims that were not tested follow by id, under each reason once.
    """
    num_columns = (("reported", 10), ("measured [95 %]", 22), ("prompts", 9))
    text_width = width - 17 - sum(size for _, size in num_columns)
    heading = f"{'verdict':17}{'claim':{text_width}}"
    heading += "".join(f"{name:>{size}}" for name, size in num_columns)
    lines = [heading, "-" * width]
    for verdict in verdicts:
        if verdict.verdict != "not tested":
            lines += _terminal_lines(verdict, text_width, [size for _, size in num_columns])
    lines += _not_tested_lines(verdicts, width)
    return "\n".join([*lines, "-" * width, summary(verdicts)])


def _terminal_lines(verdict: Verdict, text_width: int, sizes: list[int]) -> list[str]:
    statement = textwrap.wrap(verdict.statement, text_width - 1)
    reason = textwrap.wrap(f"{verdict.where}: {verdict.why}", text_width + sum(sizes) - 3)
    numbers = (_number(verdict.reported), _interval(verdict), _number(verdict.num_prompts))
    right = "".join(f"{cell:>{size}}" for cell, size in zip(numbers, sizes, strict=True))
    first = f"{verdict.verdict:17}{statement[0]:{text_width}}{right}".rstrip()
    return [first, *(" " * 17 + s for s in statement[1:]), *(" " * 19 + line for line in reason)]


def _not_tested_lines(verdicts: list[Verdict], width: int) -> list[str]:
    """The claims that were not tested, by their ids, under each reason once."""
    lines = []
    for why, ids in untested(verdicts).items():
        first = textwrap.wrap(why, width - 17, break_on_hyphens=False)
        others = textwrap.wrap(", ".join(ids), width - 19, break_on_hyphens=False)
        lines += [f"{'not tested':17}{first[0]}", *(" " * 17 + text for text in first[1:])]
        lines += [" " * 19 + text for text in others]
    return lines


def untested(verdicts: list[Verdict]) -> dict[str, list[str]]:
    """Ids of the claims that were not tested, by the reason why."""
    reasons: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.verdict == "not tested":
            reasons.setdefault(verdict.why, []).append(verdict.id)
    return reasons


def summary(verdicts: list[Verdict]) -> str:
    """How many claims met which verdict, in the vocabulary's order."""
    counts = Counter(verdict.verdict for verdict in verdicts)
    return " · ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name]) or "no claims"


def as_markdown(verdicts: list[Verdict]) -> str:
    """Verdicts as one Markdown table."""
    lines = [
        "| claim | where | reported | measured [95 %] | prompts | verdict | why |",
        "|---|---|--:|--:|--:|---|---|",
    ]
    for verdict in verdicts:
        numbers = (_number(verdict.reported), _interval(verdict), _number(verdict.num_prompts))
        cells = (verdict.statement, verdict.where, *numbers, f"**{verdict.verdict}**", verdict.why)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _interval(verdict: Verdict) -> str:
    if None in (verdict.measured, verdict.low, verdict.high) or verdict.low == verdict.high:
        return _number(verdict.measured)
    numbers = verdict.measured, verdict.low, verdict.high
    decimals = 2 if max(map(abs, numbers)) >= 0.05 else 4
    value, low, high = (_number(number, decimals) for number in numbers)
    return f"{value} [{low}, {high}]"


def _number(number: float | None, decimals: int = 2) -> str:
    """So many decimals, none from 100 up; whole counts as they are; empty when missing."""
    if number is None:
        return ""
    if isinstance(number, int) or abs(number) >= 100:
        return f"{number:.0f}"
    # adding zero turns a rounded -0.00 into 0.00
    return f"{round(number, decimals) + 0.0:.{decimals}f}"
