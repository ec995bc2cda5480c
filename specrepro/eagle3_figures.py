"""EAGLE-3's figures beside Table 1, in the one plotting style (`figures`), from rows alone.

Each takes all rows of a run and the paper's reported cells, drawn as hollow marks. Heads trained on
one budget are compared with each other; what that budget was, the rows say.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from specrepro.figures import (
    SPEEDUP,
    TAU,
    _banded_line,
    _colours,
    _figure,
    _footnote,
    _legend,
    _lines_along,
    _of_quantity,
    _of_table,
    _tick_at,
    acceptance_by_depth,
    speedup_and_tau,
    style,
    tree_sweep,
)

Reported = pd.DataFrame | None
LABELS = {
    "tau": TAU,
    "speedup": SPEEDUP,
    "tokens_per_second": "throughput (tokens per second)",
}
TABLE_2 = ("chat", "maths", "mean")  # the last is ours, of all five sets


def baselines(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """Table 1's methods on every prompt set, timed in turns."""
    return _table_1_of("baselines", rows, reported)


def papers_tree(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """Table 1 with the paper's own tree."""
    return _table_1_of("papers_tree", rows, reported)


def _table_1_of(quantity: str, rows: pd.DataFrame, reported: Reported) -> Figure:
    ours = _of_quantity(rows, quantity, ["method", "prompts", "tau"])
    return speedup_and_tau(ours.assign(quantity="decode"), reported)


def ablation(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """Table 2, and what drafting without training-time test gives: greedy, on its sets."""
    ours = _of_quantity(rows, "ablation", ["method", "prompts", "tau"])
    ours = ours[ours["prompts"].isin(TABLE_2) & (ours["temperature"] == 0)]
    return speedup_and_tau(ours.assign(quantity="decode"), _of_table(reported, "Table 2", "decode"))


def ablation_by_depth(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """n-alpha of chains with and without training-time test, and EAGLE's."""
    ours = _of_quantity(rows, "ablation_by_depth", ["method", "depth", "value"])
    return acceptance_by_depth(ours.assign(quantity="acceptance_by_depth"), reported)


def data_scaling(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """Tau and speedup by the amount of training data, on a scale of doublings."""
    ours = _of_quantity(rows, "data_scaling", ["method", "data_scale", "tau"])
    theirs = _of_table(reported, "data scaling figure")
    smallest = ours.loc[ours["data_scale"] == 1, "trained_tokens"].min() / 1e6
    label = f"training data (times {smallest:.2g} million answer tokens)"
    metrics = _labels("tau", "speedup")
    return _lines_along(ours, "data_scale", label, metrics, "method", theirs)


def throughput(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """Speedup and throughput by batch size, of chains of 3 and of trees, EAGLE's named so."""
    ours = _of_quantity(rows, "throughput", ["method", "batch", "speedup"])
    is_eagle = ours["method"] == "EAGLE"
    shape = ours["shape"].where(~is_eagle, "EAGLE, " + ours["shape"].astype(str))
    ours = ours.assign(shape=shape.fillna("no draft"))
    theirs = _of_table(reported, "SGLang batch table")
    if theirs is not None:  # beyond what is measured here there is nothing to compare
        theirs = theirs[theirs["batch"] <= ours["batch"].max()]
    drafted = ours[ours["shape"] != "no draft"].assign(tokens_per_second=None)
    both = pd.concat([drafted, ours.assign(speedup=None)])
    metrics = _labels("speedup", "tokens_per_second")
    return _lines_along(both, "batch", "batch (sequences)", metrics, "shape", theirs)


def sensitivity(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """Tau by what is varied in training: a panel for each setting."""
    ours = _of_quantity(rows, "sensitivity", ["setting", "level", "tau"])
    with style():
        settings = list(ours["setting"].unique())
        figure = _figure(0.6 + 3.4 * len(settings), 3.0)
        panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
        for axes, setting in zip(panels, settings, strict=True):
            line = ours[ours["setting"] == setting]
            _banded_line(axes, line, "level", "tau", _colours(ours["method"])["EAGLE-3"], "")
            _tick_at(axes, line["level"])
            axes.set_xlabel(f"{setting} (number)")
        panels[0].set_ylabel(LABELS["tau"])
        _footnote(figure, ours)
    return figure


def sweep(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """The tree's depth, width and size."""
    return tree_sweep(rows)


def headroom(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """What the head accepts of what can be foretold at all, at temperature 1."""
    ours = _of_quantity(rows, "headroom", ["method", "total_tokens", "tau"])
    ours = ours[ours["prompts"] == "mean"]
    named = {"tau": f"{LABELS['tau']},\ntemperature 1"}
    return _lines_along(
        ours, "total_tokens", "tree (nodes, root included)", named, "method", is_doubling=False
    )


def training(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """Held-out tau as training goes on: where it falls again, the head is over-trained.

    A new line is a new stretch: the learning rate begins anew.
    """
    ours = _of_quantity(rows, "training", ["positions", "tau", "stretch"])
    names = ours["head"] + [f", {nodes:g} nodes" for nodes in ours["total_tokens"]]
    colours = _colours(names)
    with style():
        figure = _figure(6.0, 3.0)
        axes = figure.subplots()
        for (name, _), line in ours.groupby([names, "stretch"], sort=False):
            line = line.assign(millions=line["positions"] / 1e6)
            _banded_line(axes, line, "millions", "tau", colours[name], name)
        axes.set_xlabel("positions read in training (millions; prompts and padding included)")
        axes.set_ylabel(f"{LABELS['tau']},\nheld-out prompts")
        _legend(figure, [Line2D([], [], color=c, marker="o", label=n) for n, c in colours.items()])
        _footnote(figure, ours)
    return figure


def _labels(*metrics: str) -> dict[str, str]:
    return {metric: LABELS[metric] for metric in metrics}


DRAWINGS: dict[str, tuple[str, Callable[[pd.DataFrame, Reported], Figure]]] = {
    "sweep": ("fig_5_tree_size_and_depth", sweep),
    "baselines": ("fig_6_baselines", baselines),
    "ablation": ("fig_7_ablation", ablation),
    "ablation_by_depth": ("fig_8_ablation_by_depth", ablation_by_depth),
    "data_scaling": ("fig_9_data_scaling", data_scaling),
    "throughput": ("fig_10_throughput", throughput),
    "sensitivity": ("fig_11_sensitivity", sensitivity),
    "training": ("fig_12_training", training),
    "headroom": ("fig_13_headroom", headroom),
    "papers_tree": ("fig_14_papers_tree", papers_tree),
}
