"""What the records of SpecTTS-Bench add up to: rows per paradigm, turn and source.

Decode rows are those of `rows`, per paradigm: `tau` over all rounds, beside it `tau_per_round`
(only rounds that drafted) and `tau_per_request` (the mean of generations), since tools differ in
which they report; `speedup` of total tokens over total seconds, beside it `speedup_legacy`, the
ratio of mean speeds per question that the paper reports. Prompts "overall" pools the questions of
all sets, as its column Overall does; "mean" is the mean of the sets. `accuracy` is the mean score
of the generations, `accuracy_any` that of the best of each question.

A session is what is resampled for intervals: its turns and samples are not independent.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from specrepro import rows
from specrepro.measure import AUTOREGRESSIVE, Record
from specrepro.rows import bootstrap, interval
from specrepro.tts import Replayed

OVERALL = "overall"
REPLAYED = "replayed from recorded answers"
TO_ROWS = Callable[[Sequence[Record]], pd.DataFrame]
SLICE = ["prompts", "temperature", "batch", "method"]


def decode_rows(records: Sequence[Record], to_rows: TO_ROWS) -> pd.DataFrame:
    """Rows of quantity "decode" with a column `paradigm`, and of quantity "failed" where any did.

    `to_rows` is a run's own `decode_rows`.
    """
    found = []
    for paradigm, mine in _by_paradigm(records).items():
        tables = [to_rows(part).assign(paradigm=paradigm) for part in _sets_and_pool(mine)]
        for part, table in zip(_sets_and_pool(mine), tables, strict=True):
            decoded = table[table["quantity"] == "decode"]
            found.append(decoded.merge(side_values(part), how="left", on=SLICE))
        found.append(tables[0][tables[0]["quantity"] == "failed"])
    return pd.concat([table for table in found if len(table)], ignore_index=True)


def turn_rows(records: Sequence[Record], to_rows: TO_ROWS) -> pd.DataFrame:
    """Rows of quantity "decode_by_turn" with columns `paradigm`, `turn` and `sample`."""
    found = []
    for number in sorted({(record.turn, record.sample) for record in records}):
        mine = [record for record in records if (record.turn, record.sample) == number]
        table = decode_rows(mine, to_rows)
        table = table[table["quantity"] == "decode"]
        found.append(table.assign(quantity="decode_by_turn", turn=number[0], sample=number[1]))
    return pd.concat(found, ignore_index=True)


def paired_differences(
    records: Sequence[Record], pairs: Sequence[tuple[str, str]] | None = None
) -> pd.DataFrame:
    """Rows of quantity "paired_difference" with a column `paradigm`, pooled rows among them."""
    found = [
        rows.paired_differences(mine, pairs).assign(paradigm=paradigm)
        for paradigm, mine in _by_paradigm(records).items()
        for mine in _sets_and_pool(mine)
    ]
    return pd.concat(found, ignore_index=True)


def round_rows(records: Sequence[Record]) -> pd.DataFrame:
    """Rows of quantity "round_seconds" over the questions of all sets (`rows.round_parts`)."""
    found = [
        rows.round_parts(_sets_and_pool(mine)[-1]).assign(paradigm=paradigm)
        for paradigm, mine in _by_paradigm(records).items()
    ]
    return pd.concat(found, ignore_index=True)


def _by_paradigm(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[record.paradigm].append(record)
    return found


def _sets_and_pool(records: list[Record]) -> list[list[Record]]:
    """The records, and once more as of one set where they are of several."""
    pool = [replace(record, prompts=OVERALL) for record in records]
    return [records, pool] if len({record.prompts for record in records}) > 1 else [records]


def side_values(records: Sequence[Record]) -> pd.DataFrame:
    """One line per set, temperature, batch size and method, without intervals."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[tuple(getattr(record, name) for name in SLICE)].append(record)
    lines = []
    for key, mine in groups.items():
        base = groups.get((*key[:-1], AUTOREGRESSIVE), [])
        values = _drafting(mine) | _accuracy(mine) | {"speedup_legacy": speedup_legacy(mine, base)}
        lines.append(dict(zip(SLICE, key, strict=True)) | values)
    each = pd.DataFrame(lines)
    means = each.groupby(SLICE[1:], as_index=False, sort=False).mean(numeric_only=True)
    is_several = each["prompts"].nunique() > 1
    return pd.concat([each, means.assign(prompts="mean")]) if is_several else each


def _drafting(records: Sequence[Record]) -> dict[str, float]:
    """Draft acceptance rate, drafted tokens a round, share of rounds without a draft."""
    ok = [record for record in records if record.error is None]
    drafted = np.array([num for record in ok for num in record.drafted], float)
    accepted = sum(sum(record.accepted) for record in ok)
    if not len(drafted):
        return {}
    return {
        "draft_acceptance_rate": accepted / drafted.sum() if drafted.any() else np.nan,
        "drafted_per_round": drafted.mean(),
        "rounds_without_draft": (drafted == 0).mean(),
        "forced_tokens": sum(len(record.forced) for record in ok),
    }


def _accuracy(records: Sequence[Record]) -> dict[str, float]:
    scores: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record.score is not None and record.repeat == 0:
            scores[record.session].append(record.score)
    if not scores:
        return {}
    each = [score for found in scores.values() for score in found]
    return {"accuracy": np.mean(each), "accuracy_any": np.mean([max(s) for s in scores.values()])}


def speedup_legacy(records: Sequence[Record], base: Sequence[Record]) -> float:
    """Mean speed of the questions over the baseline's: how the paper, and Spec-Bench, form it.

    Both sides count token ids; the reference counts the baseline's in its text, tokenised again.
    """
    own, theirs = _speeds(records), _speeds(base)
    shared = own.keys() & theirs.keys()
    if not shared:
        return np.nan
    return float(np.mean([own[q] for q in shared]) / np.mean([theirs[q] for q in shared]))


def _speeds(records: Sequence[Record]) -> dict[tuple[str, int], float]:
    """Tokens per second of each session and repeat that finished, prefill included."""
    sessions: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        sessions[record.unit, record.repeat].append(record)
    return {
        key: sum(record.new_tokens for record in mine) / sum(record.seconds for record in mine)
        for key, mine in sessions.items()
        if all(record.error is None for record in mine)
    }


# --- sources


def source_rows(records: Sequence[Record]) -> pd.DataFrame:
    """Rows of quantity "source": how often each source drafted, and what came of it.

    `share` of the rounds, `tau` tokens a round of that source with its interval, and of its drafted
    tokens those accepted.
    """
    cases: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        if record.sources and record.error is None and record.repeat == 0:
            cases[record.paradigm, record.temperature, record.batch, record.method].append(record)
    found = []
    for key, mine in cases.items():
        named = dict(zip(("paradigm", "temperature", "batch", "method"), key, strict=True))
        found += [
            named | {"quantity": "source", "prompts": OVERALL} | row for row in _by_source(mine)
        ]
    return pd.DataFrame(found)


def _by_source(records: Sequence[Record]) -> list[dict[str, Any]]:
    names = sorted({source for record in records for source in record.sources})
    units = sorted({record.unit for record in records})
    sums = np.zeros((len(units), len(names), 3))  # rounds, tokens emitted, tokens drafted
    for record in records:
        rounds = zip(record.sources, record.emitted, record.drafted, strict=True)
        for source, emitted, drafted in rounds:
            sums[units.index(record.unit), names.index(source)] += 1, emitted, drafted
    totals = sums.sum(0)
    return [
        {"drafted_from": name, "num_prompts": len(units), "share": total[0] / totals[:, 0].sum()}
        | {"tau": total[1] / total[0]}
        | {"draft_acceptance_rate": _over(total[1] - total[0], total[2])}
        | _tau_interval(sums[:, place])
        for place, (name, total) in enumerate(zip(names, totals, strict=True))
    ]


def _tau_interval(sums: np.ndarray) -> dict[str, float]:
    draws = bootstrap(sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        taus = draws[:, 1] / draws[:, 0]
    low, high = interval(taus[np.isfinite(taus)] if np.isfinite(taus).any() else taus)
    return {"tau_low": low, "tau_high": high}


def _over(number: float, of: float) -> float:
    return number / of if of else np.nan


# --- comparisons


def consistency(records: Sequence[Record], method: str) -> tuple[float, float]:
    """The measured speedup after prefill, and what tau and the cost of a round make of it.

    tau times the seconds of an autoregressive round over those of the method's.
    """
    sides = []
    for name in (method, AUTOREGRESSIVE):
        mine = [r for r in records if r.method == name and r.error is None and r.target_passes]
        seconds = sum(record.seconds - record.prefill_seconds for record in mine)
        passes, emitted = (sum(r.target_passes for r in mine), sum(sum(r.emitted) for r in mine))
        parts = sum(sum(r.seconds_by_part.values()) - r.seconds_by_part["prefill"] for r in mine)
        sides.append((emitted / seconds, emitted / passes, parts / passes))
    (own_rate, tau, own_round), (base_rate, _, base_round) = sides
    return own_rate / base_rate, tau * base_round / own_round


def changes(before: Sequence[Record], after: Sequence[Record], quantity: str) -> pd.DataFrame:
    """Rows of `quantity`: how much tau and speedup change from one part of the records to another.

    As a share, of each method of both parts, over the questions that both hold. A speedup needs
    the baseline in both; replayed records have none.
    """
    found = []
    for method in dict.fromkeys(one.method for one in after if one.method != AUTOREGRESSIVE):
        sides = [_session_sums(part, (method, AUTOREGRESSIVE)) for part in (before, after)]
        shared = sorted(sides[0].keys() & sides[1].keys())
        if shared:
            units = np.array([[side[session] for side in sides] for session in shared])
            found += [_named(after) | {"method": method} | row for row in _change_rows(units)]
    return pd.DataFrame(found).assign(quantity=quantity)


def _named(records: Sequence[Record]) -> dict[str, Any]:
    names = ("paradigm", "temperature", "batch")
    return {"prompts": OVERALL} | {name: getattr(records[0], name) for name in names}


def _change_rows(units: np.ndarray) -> list[dict[str, Any]]:
    """Of (questions, 2 parts, 2 methods, 4 sums): a row for tau and one for speedup."""
    draws = bootstrap(units.reshape(len(units), -1)).reshape(-1, *units.shape[1:])
    found = []
    for metric, of in {"tau": _tau, "speedup": _speedup}.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            value, drawn = (
                of(x[..., 1, :, :]) / of(x[..., 0, :, :]) - 1 for x in (units.sum(0), draws)
            )
        low, high = interval(drawn)
        row = {"metric": metric, "value": float(value), "value_low": low, "value_high": high}
        found += [] if np.isnan(value) else [row | {"num_prompts": len(units)}]
    return found


def _tau(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0, 0] / sums[..., 0, 1]


def _speedup(sums: np.ndarray) -> np.ndarray:
    """Of the first methods of (..., methods, 4 sums) over the last, the baseline."""
    rates = sums[..., 2] / sums[..., 3]
    return rates[..., 0] / rates[..., -1]


def _session_sums(records: Sequence[Record], methods: Sequence[str]) -> dict[str, np.ndarray]:
    """(methods, 4) of each question that all finished: tokens behind prefill, rounds, tokens and
    seconds.
    """
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((len(methods), 4)))
    mine = [record for record in records if record.method in methods]
    for record in mine:
        if record.error is None:
            counts = sum(record.emitted), record.target_passes, record.new_tokens
            seconds = np.nan if record.seconds is None else record.seconds
            sums[record.session][methods.index(record.method)] += *counts, seconds
    failed = {record.session for record in mine if record.error is not None}
    return {key: x for key, x in sums.items() if key not in failed and (x[:, 1] > 0).all()}


def gains(
    records: Sequence[Record], method: str, others: Sequence[str], versus: str
) -> pd.DataFrame:
    """Rows of quantity "gain": how much faster a method is than the fastest of others, as a share.

    Per set, over the questions of all, and of the mean of the sets' speedups. `versus` is what the
    others are called.
    """
    methods = (method, *others, AUTOREGRESSIVE)
    sets = {
        name: _units(records, name, methods) for name in dict.fromkeys(r.prompts for r in records)
    }
    units = {name: own for name, own in sets.items() if len(own)}
    found = {name: _speedups(own, name) for name, own in units.items()}
    if len(units) > 1:
        found["mean"] = tuple(np.mean(each, 0) for each in zip(*found.values(), strict=True))
        units["mean"] = units[OVERALL] = np.concatenate(list(units.values()))
        found[OVERALL] = _speedups(units[OVERALL], OVERALL)
    named = _named(records) | {"quantity": "gain", "method": method, "versus": versus}
    lines = []
    for name, (values, draws) in found.items():
        low, high = interval(_gain(draws))
        line = {"value": float(_gain(values)), "value_low": low, "value_high": high}
        lines.append(named | {"prompts": name, "num_prompts": len(units[name])} | line)
    return pd.DataFrame(lines)


def _units(records: Sequence[Record], prompts: str, methods: Sequence[str]) -> np.ndarray:
    """(questions, methods, 4) of one set."""
    sums = _session_sums([record for record in records if record.prompts == prompts], methods)
    return np.array([sums[session] for session in sorted(sums)])


def _speedups(units: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Of (questions, methods, 4 sums), the baseline last: (methods,) and (resamples, methods)."""
    flat = bootstrap(units.reshape(len(units), -1), zlib.crc32(name.encode()))
    found = []
    for sums in (units.sum(0), flat.reshape(-1, *units.shape[1:])):
        rates = sums[..., 2] / sums[..., 3]
        found.append(rates[..., :-1] / rates[..., -1:])
    return found[0], found[1]


def _gain(speedups: np.ndarray) -> np.ndarray:
    return speedups[..., 0] / speedups[..., 1:].max(-1) - 1


def generation_rows(records: Sequence[Record]) -> pd.DataFrame:
    """Rows of quantity "generation": each answer's tau, and how much of it was said before in it.

    `repeated` is the share of its 4-grams that it repeats.
    """
    names = [*SLICE, "paradigm", "session", "turn", "sample", "new_tokens", "score"]
    return pd.DataFrame(
        [
            {name: getattr(one, name) for name in names}
            | {"quantity": "generation", "repeated": rows.repetition(one.tokens)}
            | {"tau": sum(one.emitted) / one.target_passes}
            for one in records
            if one.error is None and one.target_passes and one.repeat == 0
        ]
    )


# --- replays


def replay_check(replayed: Sequence[Sequence[Replayed]]) -> dict[str, Any]:
    """A row of quantity "replay_check": of a method's own answers, how many replay otherwise.

    Each round's source, and what it emitted, must be what decoding recorded.
    """
    ones = [one for session in replayed for one in session]
    records = [one.spoken.record for one in ones]
    differ = [
        record.sources != (again := one.as_record(record.method)).sources
        or record.emitted != again.emitted
        for one, record in zip(ones, records, strict=True)
    ]
    row = _named(records) | {"quantity": "replay_check", "method": records[0].method}
    exact = dict.fromkeys(("value", "value_low", "value_high"), float(sum(differ)))
    return row | exact | {"num_prompts": len(ones)}


def replay_rows(
    replayed: Sequence[Sequence[Replayed]], method: str, **columns: object
) -> pd.DataFrame:
    """Rows of quantity "replay" of one drafter, per set and overall: tau alone, no time.

    `columns` say what was varied, such as `threshold=5`.
    """
    sets: dict[str, list[list[Replayed]]] = defaultdict(list)
    for session in replayed:
        sets[session[0].spoken.record.prompts].append(list(session))
    if len(sets) > 1:
        sets[OVERALL] = [session for own in list(sets.values()) for session in own]
    return pd.DataFrame([_replay_row(name, own, method, columns) for name, own in sets.items()])


def _replay_row(
    name: str, sessions: list[list[Replayed]], method: str, columns: Mapping[str, object]
) -> dict[str, Any]:
    first = sessions[0][0].spoken.record
    sums = np.array(
        [
            (
                sum(len(one.spoken.answer) - 1 for one in session),
                sum(len(one.rounds) for one in session),
            )
            for session in sessions
        ],
        float,
    )
    totals, draws = sums.sum(0), bootstrap(sums)
    low, high = interval(draws[:, 0] / draws[:, 1])
    named = {"quantity": "replay", "method": method, "prompts": name, "paradigm": first.paradigm}
    named |= {"temperature": first.temperature, "batch": 1, "num_prompts": len(sessions)}
    values = {"tau": totals[0] / totals[1], "tau_low": low, "tau_high": high}
    return named | values | dict(columns)
