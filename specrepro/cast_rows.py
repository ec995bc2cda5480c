"""Rows that CAST's claims and figures read: gains, choices, and how well confidences foretell.

Bare rows; a `Run` stamps where they come from. Intervals are 95 %, by bootstrap over what was
decoded together, or over whole texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from specrepro import cast
from specrepro.measure import Record
from specrepro.rows import bootstrap, interval

ALL = "all"  # prompts of every set together
NUM_BINS = 10


def gains(records: Sequence[Record], method: str, versus: str) -> pd.DataFrame:
    """Rows of quantity "gain": how much faster `method` decodes than `versus`, as a share.

    Of all tokens over all seconds, prefill included, on what both decoded, every prompt set
    together; resampled by what was decoded together. One row for each batch size and temperature.
    """
    sums: dict[tuple[Any, ...], np.ndarray] = {}
    for record in records:
        if record.error is None and record.method in (method, versus):
            own = [record.new_tokens, record.seconds]
            here = [*own, 0, 0] if record.method == method else [0, 0, *own]
            key = (record.batch, record.temperature, record.prompts, record.group)
            sums[key] = sums.get(key, 0) + np.array(here, float)
    rows = []
    for batch, temperature in dict.fromkeys(key[:2] for key in sums):
        units = np.array([x for key, x in sums.items() if key[:2] == (batch, temperature)])
        units = units[(units > 0).all(1)]
        low, high = interval(_gain(bootstrap(units)))
        named = {"quantity": "gain", "method": method, "versus": versus, "prompts": ALL}
        row = named | {"batch": batch, "temperature": temperature, "num_prompts": len(units)}
        row |= {"value": float(_gain(units.sum(0))), "value_low": low, "value_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def _gain(sums: np.ndarray) -> np.ndarray:
    """Relative gain of tokens and seconds (..., 4): the method's, then the other's."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3]) - 1


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
