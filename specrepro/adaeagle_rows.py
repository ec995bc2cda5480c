"""AdaEAGLE's rows: the accounts of Table 2, and what replays of recorded chains tell of lengths.

An account adds up a method's records: `draft_passes` (N_draft, the tokens that were drafted),
`target_passes` (N_target), `wasted_drafts` (N_waste, those that were not emitted), and the seconds
of all, of the head and of the target. Counted like this tau = 1 + (N_draft - N_waste) / N_target,
exactly: what a last round drafted beyond the end of its answer is waste. A pass of the head that
only takes in tokens of rounds that drafted nothing is in the seconds and not in the count.

Replays take chains that were drafted once at every place of the texts (`replay`), and the lengths
that a predictor wants there. True lengths are what is right of these chains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from specrepro import adaeagle, replay
from specrepro.adaeagle import Drafter, Fixed, Predictor
from specrepro.cost_table import CostTable
from specrepro.decoding import Drafter as AnyDrafter
from specrepro.measure import Record
from specrepro.replay import NOT_DRAFTED, Recorded, Trace
from specrepro.rows import PARTS, bootstrap, interval
from specrepro.target_model import Target

ALL = "all"  # prompts of every set together
ORACLE = "Oracle"
SUMS = (
    "emitted", "new_tokens", "seconds", "draft_seconds", "target_seconds", "draft_passes",
    "target_passes", "wasted_drafts",
)  # fmt: skip
FIXED = "{} {}"  # a method of Table 2 by its base and length
IS_FIXED = r"EAGLE(?:-3)? [1-9]\d*"
Place = tuple[str, str]  # prompt set and prompt id of a text
AtPlaces = Mapping[Place, Tensor]  # (P,) of each place of each text


# --- Table 2


def sums_of(record: Record) -> dict[str, float]:
    """What one record adds to an account."""
    used = sum(record.emitted) - record.target_passes
    parts = record.seconds_by_part
    seconds = {name: sum(parts.get(part, 0.0) for part in PARTS[name]) for name in PARTS}
    return {
        "emitted": sum(record.emitted), "new_tokens": record.new_tokens, "seconds": record.seconds,
        "draft_seconds": seconds["draft"], "target_seconds": seconds["target"],
        "draft_passes": sum(record.drafted), "target_passes": record.target_passes,
        "wasted_drafts": sum(record.drafted) - used,
    }  # fmt: skip


def accounts(records: Sequence[Record], quantity: str = "account") -> pd.DataFrame:
    """Rows of quantity "account" for each method, prompt set, temperature and batch size.

    And of prompts "all", over every set that was decoded at that temperature and batch size. Means
    over repeats; intervals by bootstrap over what was decoded together.
    """
    lines = pd.DataFrame(
        [
            {name: getattr(r, name) for name in ("method", "prompts", "temperature", "batch")}
            | {"unit": f"{r.prompts}/{r.unit}", "prompt_id": r.prompt_id, "repeat": r.repeat}
            | sums_of(r)
            for r in records
            if r.error is None
        ]
    )
    lines = pd.concat([lines, lines.assign(prompts=ALL)], ignore_index=True)
    keys = ["method", "prompts", "temperature", "batch"]
    return pd.DataFrame(
        [
            {"quantity": quantity} | dict(zip(keys, named, strict=True)) | _account(found)
            for named, found in lines.groupby(keys, sort=False)
        ]
    )


def _account(lines: pd.DataFrame) -> dict[str, Any]:
    units = lines.groupby("unit")[list(SUMS)].sum().to_numpy(float) / lines["repeat"].nunique()
    totals, draws = units.sum(0), bootstrap(units)
    row = dict(zip(SUMS, totals.tolist(), strict=True))
    row |= {"num_prompts": lines.groupby("unit")["prompt_id"].nunique().sum()}
    row |= {name: float(value) for name, value in _ratios(totals).items()}
    for name, values in _ratios(draws).items():
        row[f"{name}_low"], row[f"{name}_high"] = interval(values)
    return row


def _ratios(sums: np.ndarray) -> dict[str, np.ndarray]:
    """tau, tokens a second and drafted tokens a round of sums (..., names)."""
    own = {name: sums[..., place] for place, name in enumerate(SUMS)}
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "tau": own["emitted"] / own["target_passes"],
            "tokens_per_second": own["new_tokens"] / own["seconds"],
            "mean_length": own["draft_passes"] / own["target_passes"],
        }


def costs_of(accounts: pd.DataFrame, method: str) -> dict[str, float]:
    """Seconds of a drafted token, of another token in a pass, and of an emitted token.

    As the paper's Table 2 gives them: the first of all fixed lengths together, the second from how
    the pass grows between the shortest and the longest of them, the third of `method`.
    """
    fixed = accounts[accounts["method"].str.fullmatch(IS_FIXED)]
    lengths = fixed["method"].str.extract(r"(\d+)$")[0].astype(int).to_numpy()
    passes = (fixed["target_seconds"] / fixed["target_passes"]).to_numpy()
    first, last = lengths.argmin(), lengths.argmax()
    own = accounts[accounts["method"] == method].iloc[0]
    return {
        "draft": fixed["draft_seconds"].sum() / fixed["draft_passes"].sum(),
        "verify": max(0.0, (passes[last] - passes[first]) / (lengths[last] - lengths[first])),
        "token": own["seconds"] / own["emitted"],
    }


def break_even_rows(accounts: pd.DataFrame, method: str) -> pd.DataFrame:
    """Rows of quantity "break_even": the penalty that the costs ask for, with and without what a
    longer pass costs (`part`), and the probability of acceptance behind it (`probability`).
    """
    costs, found = costs_of(accounts, method), []
    for part, verify in (("drafting alone", 0.0), ("drafting and verifying", costs["verify"])):
        given = costs | {"verify": verify}
        row = {"quantity": "break_even", "method": method, "part": part}
        row |= {"probability": adaeagle.break_even(**given)}
        found.append(row | {"value": adaeagle.break_even_penalty(**given)})
    return pd.DataFrame(found)


def best_fixed(accounts: pd.DataFrame) -> str:
    """The fixed length with most tokens a second on these very prompts: chosen with hindsight."""
    fixed = accounts[accounts["method"].str.fullmatch(IS_FIXED)]
    return fixed.loc[fixed["tokens_per_second"].idxmax(), "method"]


def headroom(records: Sequence[Record], methods: Sequence[str]) -> pd.DataFrame:
    """Rows of quantity "headroom": how much faster `methods` are than the best fixed length.

    `value` is the relative gain in tokens a second over all prompts; `versus` the fixed length;
    `share` what part of the oracle's gain it is, where the oracle was asked.
    """
    pooled = accounts(records)
    pooled = pooled[pooled["prompts"] == ALL]
    versus, present = best_fixed(pooled), set(pooled["method"])
    rows = [gain(records, method, versus) for method in methods if method in present]
    return pd.DataFrame([row | {"quantity": "headroom"} for row in rows])


def gain(records: Sequence[Record], method: str, versus: str) -> dict[str, Any]:
    """Relative gain in tokens a second of `method` over `versus`, and its share of the oracle's."""
    names = [method, versus, *({ORACLE} & {record.method for record in records})]
    num_prompts, speeds = _speeds(records, names)
    gains = speeds / speeds[:, 1:2] - 1
    found = {"value": gains[:, 0]}
    if names[2:]:  # an oracle that gains nothing leaves no share
        found["share"] = gains[:, 0] / np.where(gains[:, 2] > 0, gains[:, 2], np.nan)
    row = {"method": method, "versus": versus, "prompts": ALL, "num_prompts": num_prompts}
    for name, values in found.items():
        low, high = interval(values[1:])
        row |= {name: float(values[0]), f"{name}_low": low, f"{name}_high": high}
    return row


def _speeds(records: Sequence[Record], names: Sequence[str]) -> tuple[int, np.ndarray]:
    """How many prompts all methods decoded, and (1 + resamples, names) tokens a second on them:
    all together first, then bootstrap draws.
    """
    sums: dict[str, np.ndarray] = {}
    for record in records:
        if record.error is None and record.method in names:
            own = sums.setdefault(f"{record.prompts}/{record.unit}", np.zeros((len(names), 2)))
            own[[name == record.method for name in names]] += record.new_tokens, record.seconds
    units = np.stack([one for one in sums.values() if (one > 0).all()])
    draws = bootstrap(units.reshape(len(units), -1)).reshape(-1, len(names), 2)
    every = np.concatenate([units.sum(0)[None], draws])
    return len(units), every[..., 0] / every[..., 1]


def paper_costs(reported: pd.DataFrame) -> CostTable:
    """Milliseconds that the fixed lengths of the paper's Table 2 tell of: an A800 in float32."""
    is_fixed = reported["method"].str.fullmatch(IS_FIXED)
    fixed = reported[(reported["table"] == "Table 2") & is_fixed]
    lengths = fixed["method"].str.extract(r"(\d+)$")[0].astype(int).to_numpy()
    total, draft, target = (
        1e3 * fixed[name].to_numpy() / fixed["target_passes"].to_numpy()
        for name in ("seconds", "draft_seconds", "target_seconds")
    )
    more_drafted, start = np.polyfit(lengths, draft, 1)
    more_verified, lone = np.polyfit(1 + lengths, target, 1)
    named = [("target", n, lone + more_verified * n) for n in (1, 2, 12)]
    named += [("extend", 1, start + more_drafted), ("level", 1, more_drafted)]
    named += [("rest", 1, (total - draft - target).mean())]
    points = pd.DataFrame(named, columns=["part", "num_tokens", "value"])
    header = {"device": "A800, from the paper's Table 2", "dtype": "float32", "modelled": True}
    return CostTable(header, points.assign(batch=1, context=256))


# --- lengths at every place of recorded texts


def _split(values: Tensor, traces: Sequence[Trace]) -> dict[Place, Tensor]:
    parts = values.split([len(trace.drafted) for trace in traces])
    return {(t.prompts, t.prompt_id): part for t, part in zip(traces, parts, strict=True)}


def true_lengths(traces: Sequence[Trace]) -> dict[Place, Tensor]:
    """How much of the chain drafted at each place is what the text says."""
    ranks, _ = replay.path_ranks(traces, traces[0].depth, 1)
    return _split((ranks < NOT_DRAFTED).sum(1), traces)


def oracle_lengths(traces: Sequence[Trace]) -> dict[Place, Tensor]:
    """The same, with room for the bonus token: nothing is drafted that is not emitted."""
    found = true_lengths(traces)
    return {
        place: torch.minimum(lengths, torch.arange(len(lengths)).flip(0))
        for place, lengths in found.items()
    }


@torch.no_grad()
def outputs_at(predictor: Predictor, target: Target, prompt: Sequence[int], trace: Trace) -> Tensor:
    """(P, outputs) of the predictor at every place of a text, from one pass of the target."""
    ids = torch.tensor([[*prompt, *trace.tokens]], device=target.device)
    hidden, first = target.features(ids)[1][0], len(prompt) - 1
    rows = slice(first, first + len(trace.drafted))  # one behind the place's own token
    embedding = target.model.get_input_embeddings().weight
    dtype = predictor.last.weight.dtype
    states = adaeagle.inputs_of(ids[0, rows], hidden[rows], embedding)
    return predictor(states.to(dtype)).float().cpu()


class Recalled:
    """Lengths that were found before, at the places of a replay."""

    def __init__(self, recorded: Recorded, lengths: AtPlaces):
        self.recorded = recorded
        found = [lengths[trace.prompts, trace.prompt_id] for trace in recorded.traces]
        self.lengths = torch.cat(found).long()

    def begin(self, *_: Any) -> None:
        pass

    def wanted(self) -> Tensor:
        return self.lengths[self.recorded.rows]

    def observe(self, *_: Any) -> None:
        pass

    def select(self, rows: Tensor) -> None:
        pass


def recalled(
    lengths: AtPlaces, most: int, threshold: float | None = None
) -> Callable[[Recorded], AnyDrafter]:
    """Makes a drafter of such lengths of a recorded one, for `replay.replay`."""
    return lambda recorded: Drafter(recorded, Recalled(recorded, lengths), most, threshold)


def repeated(
    number: int, most: int, threshold: float | None = None
) -> Callable[[Recorded], AnyDrafter]:
    """Makes a drafter of one length for all rounds, or with 0 and a threshold DDD."""
    return lambda recorded: Drafter(recorded, Fixed(number), most, threshold)


def replays(traces: Sequence[Trace], methods: Mapping[str, Any], costs: CostTable) -> list[Record]:
    """Records of every method, replayed at batch 1."""
    records: list[Record] = []
    for name, draft in methods.items():
        records += replay.replay(traces, draft, costs, method=name)
    return records


def length_rows(
    predicted: Mapping[str, AtPlaces], true: AtPlaces, temperature: float = 0.0
) -> pd.DataFrame:
    """Rows of quantity "length": how often each method (`method`) wants `predicted` where `true`
    tokens would have been right, as a share of all places.
    """
    found = []
    for method, lengths in predicted.items():
        wanted, right = (torch.cat([x[place] for place in true]).tolist() for x in (lengths, true))
        pairs, counts = np.unique(np.array([wanted, right]), axis=1, return_counts=True)
        common = {"quantity": "length", "method": method, "temperature": temperature}
        common |= {"prompts": ALL, "num_prompts": len(true)}
        found += [
            common | {"predicted": int(a), "true": int(b), "value": count / len(wanted)}
            for (a, b), count in zip(pairs.T, counts, strict=True)
        ]
    return pd.DataFrame(found)


def coverage_rows(
    outputs: Mapping[float, AtPlaces], true: AtPlaces, temperature: float = 0.0
) -> pd.DataFrame:
    """Rows of quantity "coverage": by penalty, how often the true length is at most the predicted.

    A predictor that found its quantile covers lambda / (1 + lambda) of the lengths (`expected`).
    """
    found = []
    for penalty, lengths in outputs.items():
        units = np.array(
            [
                [int((true[p] <= lengths[p]).sum()), int(lengths[p].sum()), len(true[p])]
                for p in true
            ],
            float,
        )
        totals, draws = units.sum(0), bootstrap(units)
        low, high = interval(draws[:, 0] / draws[:, 2])
        lengths_low, lengths_high = interval(draws[:, 1] / draws[:, 2])
        row = {"quantity": "coverage", "method": "AdaEAGLE", "penalty": penalty, "prompts": ALL}
        row |= {"expected": adaeagle.quantile_of(penalty), "value": totals[0] / totals[2]}
        row |= {"value_low": low, "value_high": high, "mean_length": totals[1] / totals[2]}
        row |= {"mean_length_low": lengths_low, "mean_length_high": lengths_high}
        found.append(row | {"num_prompts": len(true), "temperature": temperature})
    return pd.DataFrame(found)


def calibration_rows(outputs: AtPlaces, true: AtPlaces, num_bins: int = 10) -> pd.DataFrame:
    """Rows of quantity "calibration": places in equal parts by what was predicted, unrounded.

    `predicted` is the mean of a part, `value` the mean true length, `quantile_high` the length that
    9 in 10 true ones do not exceed.
    """
    predicted, right = (
        torch.cat([x[place] for place in true]).double().numpy() for x in (outputs, true)
    )
    parts = np.argsort(np.argsort(predicted, kind="stable")) * num_bins // len(predicted)
    found = []
    for part in np.unique(parts):
        mine = right[parts == part]
        row = {"quantity": "calibration", "method": "AdaEAGLE", "prompts": ALL}
        row |= {"predicted": predicted[parts == part].mean(), "value": mine.mean()}
        row |= {"quantile_high": float(np.quantile(mine, 0.9)), "num_rounds": len(mine)}
        found.append(row | {"num_prompts": len(true), "temperature": 0.0})
    return pd.DataFrame(found)
