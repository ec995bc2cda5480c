"""FastEagle's figures, in the one plotting style (`figures`), from rows alone.

The paper's own figures and cells could not be read, so nothing of it is drawn beside ours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from specrepro.figures import (
    _DASHED,
    SPEEDUP,
    TAU,
    _banded_line,
    _colours,
    _figure,
    _footnote,
    _interval,
    _legend,
    _lines_along,
    _of_quantity,
    _refuse_repeats,
    round_parts,
    style,
)

AUTOREGRESSIVE = "Autoregressive"
LABELS = {
    "tau": TAU,
    "speedup": SPEEDUP,
    "tokens_per_second": "throughput (tokens per second)",
    "megabytes": "draft cache at 1024 tokens (MB)",
    "value": "time to draft (ms)",
}


def drafting(rows: pd.DataFrame) -> Figure:
    """Milliseconds to draft a tree by its number of levels: what a layer costs, and what a step."""
    ours = _of_quantity(rows, "drafter_cost", ["method", "num_levels", "value"])
    return _lines(ours, "num_levels", ("value",), "method", "levels of the tree (number)")


def compiled(rows: pd.DataFrame) -> Figure:
    """Where the time of a round goes, as it is and through `torch.compile`."""
    ours = _of_quantity(rows, "compiled_round", ["method", "execution", "part", "value"])
    named = ours["method"] + ", " + ours["execution"]
    return round_parts(
        ours.assign(quantity="round_seconds", method=named).drop(columns="execution")
    )


def accuracy(rows: pd.DataFrame) -> Figure:
    """How often the answer's word is the best guess, or among the best, by how far ahead it is."""
    ours = _of_quantity(rows, "accuracy_by_depth", ["method", "depth", "top_k", "value"])
    colours, sizes = _colours(ours["method"]), sorted(ours["top_k"].unique())
    with style():
        figure = _figure(0.6 + 3.6 * len(sizes), 3.4)
        panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
        for axes, top_k in zip(panels, sizes, strict=True):
            for method, line in ours[ours["top_k"] == top_k].groupby("method", sort=False):
                _banded_line(axes, line, "depth", "value", colours[method], method)
            axes.set_xticks(sorted(ours["depth"].unique()))
            axes.set_ylim(0, 1.02)
            axes.set_xlabel("depth of the word (1 is the first drafted)")
            named = "the best guess" if top_k == 1 else f"the best {top_k:g} guesses"
            axes.set_ylabel(f"words among {named} (fraction)")
        _legend(figure, [Line2D([], [], color=c, marker="o", label=n) for n, c in colours.items()])
        _footnote(figure, ours)
    return figure


def layers(rows: pd.DataFrame) -> Figure:
    """Tau and speedup by the number of layers, of cascades trained alike."""
    ours = _of_quantity(rows, "layers", ["draft_depth", "tau"])
    return _lines(ours, "draft_depth", ("tau", "speedup"), "method", "layers (number)")


def sweep(rows: pd.DataFrame) -> Figure:
    """Tau and speedup by the number of words a level, a line for each number of levels used."""
    ours = _of_quantity(rows, "sweep", ["draft_depth", "top_k", "tau"])
    named = ours["draft_depth"].map(lambda n: f"{n:g} level{'s' * (n != 1)}")
    return _lines(
        ours.assign(levels=named), "top_k", ("tau", "speedup"), "levels", "words a level (number)"
    )


def shapes(rows: pd.DataFrame) -> Figure:
    """Speedup and tau of other trees over the same distributions."""
    ours = _of_quantity(rows, "shapes", ["method", "shape", "temperature", "tau"])
    ours = ours[ours["method"] != AUTOREGRESSIVE]
    return _bars(ours.assign(series=ours["method"] + ", " + ours["shape"]))


def ablation(rows: pd.DataFrame) -> Figure:
    """Speedup and tau of cascades trained otherwise, and of EAGLE-3's head, on one budget."""
    ours = _of_quantity(rows, "ablation", ["method", "temperature", "tau"])
    ours = ours[ours["method"] != AUTOREGRESSIVE]
    return _bars(ours.assign(series=ours["method"]))


def throughput(rows: pd.DataFrame) -> Figure:
    """Speedup, throughput and the size of the draft cache by batch size."""
    ours = _of_quantity(rows, "throughput", ["method", "batch", "speedup"])
    ours = ours.assign(megabytes=ours["cache_bytes"] * ours["batch"] * 1024 / 1e6)
    drafted = ours["method"] != AUTOREGRESSIVE
    ours = ours.assign(speedup=ours["speedup"].where(drafted))
    metrics = ("speedup", "tokens_per_second", "megabytes")
    return _lines(ours, "batch", metrics, "method", "batch (sequences)", is_doubling=True)


def _lines(
    ours: pd.DataFrame,
    along: str,
    metrics: tuple[str, ...],
    series: str,
    label: str,
    is_doubling: bool = False,
) -> Figure:
    labels = {metric: LABELS[metric] for metric in metrics}
    return _lines_along(ours, along, label, labels, series, is_doubling=is_doubling)


def _bars(ours: pd.DataFrame) -> Figure:
    """A bar for each of the column `series`; speedup beside tau, a line of panels a temperature."""
    temperatures, names = sorted(ours["temperature"].unique()), list(ours["series"].unique())
    with style():
        figure = _figure(8.4, 0.9 + (0.6 + 0.26 * len(names)) * len(temperatures))
        panels = figure.subplots(len(temperatures), 2, sharey=True, squeeze=False)
        for line, temperature in zip(panels, temperatures, strict=True):
            here = ours[ours["temperature"] == temperature].set_index("series", drop=False)
            for axes, metric in zip(line, ("speedup", "tau"), strict=True):
                _horizontal_bars(axes, here, metric, names)
                axes.set_xlabel(f"{LABELS[metric]}, T = {temperature:g}")
        _footnote(figure, ours)
    return figure


def _horizontal_bars(axes: Axes, here: pd.DataFrame, metric: str, names: list[str]) -> None:
    _refuse_repeats(here.reset_index(drop=True), ["series"])
    mine, colours = here.reindex(names), _colours(pd.Series(names))
    lengths, places = mine[metric].astype(float), np.arange(len(names))
    axes.barh(places, lengths, 0.7, color=[colours[name] for name in names])
    low, high = _interval(mine, metric)
    errors = np.clip([lengths - low, high - lengths], 0, None)
    axes.errorbar(lengths, places, xerr=errors, fmt="none", ecolor="black", elinewidth=0.9)
    axes.axvline(1, **_DASHED)
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")


DRAWINGS: dict[str, tuple[str, Callable[[pd.DataFrame], Figure]]] = {
    "drafting": ("fig_3_time_to_draft", drafting),
    "sweep": ("fig_5_levels_and_words", sweep),
    "shapes": ("fig_6_trees", shapes),
    "throughput": ("fig_7_batches", throughput),
    "accuracy": ("fig_8_accuracy_by_depth", accuracy),
    "layers": ("fig_9_layers", layers),
    "ablation": ("fig_10_ablation", ablation),
    "compiled": ("fig_11_compiled_rounds", compiled),
}
