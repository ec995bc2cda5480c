"""CAST's eight figures, in the one plotting style (`figures`), from rows alone.

Numbers that were replayed under a cost table say so in the footnote, and modelled machines in
their panel's label. A star is what CAST chose for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from specrepro.figures import (
    _DASHED,
    PALETTE,
    PROMPT_SETS,
    SPEEDUP,
    TAU,
    _banded_line,
    _colours,
    _figure,
    _footnote,
    _grouped_bars,
    _hollow_over_bars,
    _interval,
    _legend,
    _method_handles,
    _model_handles,
    _of_quantity,
    _reported_beside,
    style,
)

PARTS = {"target": "a pass of the target (ms)", "level": "one drafted level (ms)"}
CHOSEN = {
    "depth": "levels drafted",
    "width": "nodes expanded at a level",
    "verified": "drafted nodes verified",
}
AUTOREGRESSIVE, CAST = "Autoregressive", "CAST"
PAPERS_BATCHES = [1, 8]  # of its two tables
_SHADES = "viridis_r"


def cost_curves(rows: pd.DataFrame) -> Figure:
    """What a target pass and a drafted level cost here by batch size and context, and what a pass
    costs elsewhere relative to one token.
    """
    ours = _of_quantity(rows, "cost", ["part", "batch", "context", "num_tokens", "value"])
    own = ours[ours["costs"] == "table"]
    with style():
        figure = _figure(10.4, 3.3)
        panels = figure.subplots(1, 3)
        for axes, (part, label) in zip(panels, PARTS.items(), strict=False):
            handles = _cost_lines(axes, own[own["part"] == part])
            axes.set_ylabel(label)
        others = _relative_lines(panels[2], ours[ours["part"] == "target"])
        for axes in panels:
            _doublings(axes, "nodes for each sequence")
            axes.set_ylim(bottom=0)
        panels[2].legend(handles=others, fontsize=7)
        _legend(figure, handles, columns=6)
        _footnote(figure, own)
    return figure


def _cost_lines(axes: Axes, rows: pd.DataFrame) -> list[Line2D]:
    """Larger batches are darker; longer contexts have finer dashes."""
    dashes, handles = ["-", "--", "-.", ":"], []
    contexts, shades = sorted(rows["context"].unique()), _shades(rows["batch"])
    for batch, shade in shades.items():
        for place, context in enumerate(contexts):
            line = rows[(rows["batch"] == batch) & (rows["context"] == context)]
            name = f"batch {batch:g}, context {context:g}"
            handles.append(_banded_line(axes, line, "num_tokens", "value", shade, name))
            handles[-1].set_linestyle(dashes[place % len(dashes)])
    return handles


def _relative_lines(axes: Axes, rows: pd.DataFrame) -> list[Line2D]:
    """One line a machine at the largest batch that all have; what is modelled is dashed."""
    batch = max(set.intersection(*(set(one["batch"]) for _, one in rows.groupby("machine"))))
    here = rows[(rows["batch"] == batch) & (rows["context"] == rows["context"].min())]
    handles = []
    colours = _colours(here["machine"])
    for machine, line in here.groupby("machine", sort=False):
        line = line.sort_values("num_tokens")
        look = {"color": colours[machine], "linestyle": "--" if line["modelled"].all() else "-"}
        relative = line["value"] / line["value"].iloc[0]
        handles += axes.plot(line["num_tokens"], relative, label=machine, **look)
    axes.axhline(1, **_DASHED)
    axes.set_ylabel(f"a pass at batch {batch:g} (times one node)")
    return handles


def _shades(values: Sequence[float]) -> dict[float, str]:
    """A colour for each value, larger ones darker."""
    distinct = sorted(set(values))
    colours = seaborn.color_palette(_SHADES, len(distinct) + 1).as_hex()[1:]
    return dict(zip(distinct, colours, strict=True))


def _doublings(axes: Axes, label: str) -> None:
    low, high = axes.get_xlim()
    axes.set_xscale("log", base=2)
    ticks = [2.0**k for k in range(-2, 9) if low * 0.9 <= 2.0**k <= high * 1.1]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def confidence(rows: pd.DataFrame) -> Figure:
    """Accepted length against the summed confidence of a tree, with the fitted line, and how often
    nodes of a confidence are accepted.
    """
    trees = _of_quantity(rows, "confidence", ["predicted", "value"]).sort_values("predicted")
    nodes = _of_quantity(rows, "calibration", ["predicted", "value"]).sort_values("predicted")
    fits = rows[rows["quantity"] == "confidence_fit"].set_index("metric")["value"]
    with style():
        figure = _figure(8.2, 3.4)
        left, right = figure.subplots(1, 2)
        _with_whiskers(left, trees, PALETTE[0])
        x = np.array([trees["predicted"].min(), trees["predicted"].max()])
        middle = [np.average(trees[c], weights=trees["num_rounds"]) for c in ("predicted", "value")]
        left.plot(x, middle[1] + fits["slope"] * (x - middle[0]), color=PALETTE[1])
        left.set_xlabel("summed confidence of the verified nodes (tokens)")
        left.set_ylabel("drafted tokens accepted")
        right.plot(nodes["predicted"], nodes["value"], "o-", color=PALETTE[0])
        right.set_xlabel("path confidence of a node (probability)")
        right.set_ylabel("how often it is accepted (fraction)")
        for axes in (left, right):
            ends = axes.get_xlim()
            axes.plot(ends, ends, **_DASHED)
            axes.set_xlim(*ends)
        fit = f"fitted slope {fits['slope']:.2f}, r2 {fits['r2']:.2f} over trees"
        _legend(
            figure,
            [
                Line2D(
                    [],
                    [],
                    marker="o",
                    linestyle="none",
                    color=PALETTE[0],
                    label="a tenth of the trees",
                ),
                Line2D([], [], color=PALETTE[1], label=fit),
                Line2D([], [], label="confidence as good as its word", **_DASHED),
            ],
        )
        _footnote(figure, trees)
    return figure


def _with_whiskers(axes: Axes, rows: pd.DataFrame, colour: str) -> None:
    low, high = _interval(rows, "value")
    errors = np.clip([rows["value"] - low, high - rows["value"]], 0, None)
    axes.errorbar(rows["predicted"], rows["value"], errors, fmt="o", color=colour, elinewidth=0.9)


def size_sweep(rows: pd.DataFrame) -> Figure:
    """tau and speedup against the nodes that are verified, a line per batch size; CAST as stars."""
    ours = _of_quantity(rows, "replay_sweep", ["total_tokens", "batch", "tau", "speedup"])
    labels = {"tau": TAU, "speedup": SPEEDUP}
    shades = _shades(ours["batch"])
    with style():
        figure = _figure(8.4, 3.4)
        panels = figure.subplots(1, 2)
        for axes, (metric, label) in zip(panels, labels.items(), strict=True):
            handles = []
            for batch, shade in shades.items():
                here = ours[ours["batch"] == batch]
                fixed, chosen = here[here["method"] != CAST], here[here["method"] == CAST]
                name = f"batch {batch:g}"
                handles.append(_banded_line(axes, fixed, "total_tokens", metric, shade, name))
                look = {"markeredgecolor": "black", "markersize": 11, "zorder": 5}
                axes.plot(chosen["total_tokens"], chosen[metric], "*", color=shade, **look)
            _doublings(axes, "nodes verified, root included (of CAST: their mean)")
            axes.set_ylabel(label)
        panels[1].axhline(1, **_DASHED)
        star = Line2D([], [], marker="*", color="white", markeredgecolor="black", markersize=11)
        star.set_label("CAST's own choice")
        _legend(figure, [*handles, star], columns=6)
        _footnote(figure, ours)
    return figure


def speedup_bars(rows: pd.DataFrame, reported: pd.DataFrame | None = None) -> Figure:
    """Speedup per prompt set, a panel for each batch size, the paper's values as hollow marks."""
    ours = _of_quantity(rows, "decode", ["method", "prompts", "batch", "speedup"])
    ours = ours[(ours["method"] != AUTOREGRESSIVE) & (ours["temperature"] == 0)]
    measured = sorted(ours["batch"].unique())
    batches = PAPERS_BATCHES if {*PAPERS_BATCHES} <= {*measured} else measured
    with style():
        figure = _figure(1.2 + 4.4 * len(batches), 3.6)
        panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
        shown = []
        for axes, batch in zip(panels, batches, strict=True):
            here = ours[ours["batch"] == batch]
            present = set(here["prompts"])
            prompts = sorted(present - {*PROMPT_SETS}) + [n for n in PROMPT_SETS if n in present]
            colours, theirs = _colours(ours["method"]), _reported_at(here, reported, batch)
            _grouped_bars(axes, here, "speedup", prompts, colours)
            _hollow_over_bars(axes, theirs, "speedup", prompts, colours, theirs)
            axes.set_xlabel(f"prompt set (batch {batch:g})")
            shown.append(theirs)
        panels[0].set_ylabel(SPEEDUP)
        models = _model_handles(pd.concat(shown).drop_duplicates(["model"]))
        _legend(figure, _method_handles(ours) + models, 3)
        _footnote(figure, ours)
    return figure


def _reported_at(ours: pd.DataFrame, reported: pd.DataFrame | None, batch: float) -> pd.DataFrame:
    if reported is not None:
        reported = reported[reported["batch"] == batch]
    return _reported_beside(ours, reported)


def ablation(rows: pd.DataFrame) -> Figure:
    """Speedup without, with one, with two and with all of the three parts, by batch size."""
    ours = _of_quantity(rows, "ablation", ["method", "batch", "speedup"])
    ours = ours[(ours["method"] != AUTOREGRESSIVE) & (ours["prompts"] == "all")]
    methods, batches = list(dict.fromkeys(ours["method"])), sorted(ours["batch"].unique())
    with style():
        figure = _figure(2.6 + 3.0 * len(batches), 0.9 + 0.34 * len(methods))
        panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
        for axes, batch in zip(panels, batches, strict=True):
            here = ours[ours["batch"] == batch].set_index("method").reindex(methods)
            low, high = _interval(here, "speedup")
            errors = np.clip([here["speedup"] - low, high - here["speedup"]], 0, None)
            colours = [PALETTE[0] if method == CAST else "#a9b8c9" for method in methods]
            axes.barh(range(len(methods)), here["speedup"], 0.66, color=colours)
            look = {"fmt": "none", "ecolor": "black", "elinewidth": 0.9}
            axes.errorbar(here["speedup"], range(len(methods)), xerr=errors, **look)
            axes.axvline(1, **_DASHED)
            axes.set_xlabel(f"speedup at batch {batch:g} (times autoregressive)")
            axes.set_ylim(len(methods) - 0.4, -0.6)
            axes.grid(False, axis="y")
        panels[0].set_yticks(range(len(methods)), methods)
        panels[0].set_ylabel("parts of CAST")
        _footnote(figure, ours)
    return figure


def by_batch_size(rows: pd.DataFrame, panels_in_a_row: int = 4) -> Figure:
    """Speedup against batch size by machine, replayed; what was timed while decoding as squares."""
    ours = _of_quantity(rows, "replay", ["method", "batch", "machine", "speedup"])
    ours = ours[(ours["method"] != AUTOREGRESSIVE) & (ours["prompts"] == "all")]
    ours = ours[ours["temperature"] == 0]
    machines = list(dict.fromkeys(ours["machine"]))
    num_rows = -(-len(machines) // panels_in_a_row)
    with style():
        figure = _figure(10.4, 0.9 + 2.4 * num_rows)
        grid = figure.subplots(num_rows, min(len(machines), panels_in_a_row), squeeze=False)
        for axes in grid.flat[len(machines) :]:
            axes.set_axis_off()
        for axes, machine in zip(grid.flat, machines, strict=False):
            here = ours[ours["machine"] == machine]
            handles = _lines_by(axes, here, "batch", "speedup")
            _timed_squares(axes, rows, here)
            _doublings(axes, f"batch size (sequences)\n{machine}")
            axes.axhline(1, **_DASHED)
        for line in grid:
            line[0].set_ylabel(SPEEDUP)
        square = Line2D([], [], marker="s", linestyle="none", color="#606060")
        square.set_label("timed while decoding")
        _legend(figure, [*handles, square], columns=5)
        _footnote(figure, ours)
    return figure


def _lines_by(axes: Axes, rows: pd.DataFrame, along: str, metric: str) -> list[Line2D]:
    """One line a method."""
    return [
        _banded_line(axes, rows[rows["method"] == method], along, metric, colour, method)
        for method, colour in _colours(rows["method"]).items()
    ]


def _timed_squares(axes: Axes, rows: pd.DataFrame, replayed: pd.DataFrame) -> None:
    """Speedups of decoding itself, the mean of prompt sets where there are several."""
    is_own = (replayed["costs"] == "table").all()
    decoded = rows[rows["quantity"] == ("decode" if is_own else "decode_elsewhere")]
    if not is_own:
        decoded = decoded[decoded["machine"] == replayed["machine"].iloc[0]]
    decoded = decoded[decoded["temperature"] == 0]
    for method, colour in _colours(replayed["method"]).items():
        for batch, found in decoded[decoded["method"] == method].groupby("batch"):
            mean = found[found["prompts"] == "mean"]
            value = (mean if len(mean) else found)["speedup"].iloc[0]
            axes.plot(batch, value, "s", color=colour, markeredgecolor="black", zorder=5)


def choices(rows: pd.DataFrame) -> Figure:
    """How deep CAST drafted, how wide, and how many nodes it verified, by batch size."""
    ours = _of_quantity(rows, "choice", ["part", "chosen", "batch", "value"])
    shades = _shades(ours["batch"])
    with style():
        figure = _figure(9.2, 3.0)
        panels = figure.subplots(1, len(CHOSEN))
        for axes, (part, label) in zip(panels, CHOSEN.items(), strict=True):
            here = ours[ours["part"] == part]
            width = 0.8 / len(shades)
            for place, (batch, shade) in enumerate(shades.items()):
                bars = here[here["batch"] == batch]
                aside = (place - (len(shades) - 1) / 2) * width
                axes.bar(bars["chosen"] + aside, bars["value"], width, color=shade)
            axes.set_xlabel(label)
            axes.grid(False, axis="x")
        panels[0].set_ylabel("share of what was chosen (fraction)")
        _legend(figure, [Patch(color=s, label=f"batch {b:g}") for b, s in shades.items()], 6)
        _footnote(figure, ours)
    return figure


def sensitivity(rows: pd.DataFrame) -> Figure:
    """Speedup against a factor on all three thresholds, running and set by hand."""
    ours = _of_quantity(rows, "sensitivity", ["method", "batch", "strictness", "speedup"])
    ours = ours[ours["prompts"] == "all"]
    batches = sorted(ours["batch"].unique())
    with style():
        figure = _figure(1.2 + 3.4 * len(batches), 3.2)
        panels = figure.subplots(1, len(batches), squeeze=False)[0]
        for axes, batch in zip(panels, batches, strict=True):
            here = ours[ours["batch"] == batch]
            handles = _lines_by(axes, here, "strictness", "speedup")
            _doublings(axes, f"factor on the thresholds (batch {batch:g})")
            axes.axhline(1, **_DASHED)
        panels[0].set_ylabel(SPEEDUP)
        _legend(figure, handles)
        _footnote(figure, ours)
    return figure


DRAWINGS: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "fig_1_costs": cost_curves,
    "fig_2_confidence": confidence,
    "fig_3_tree_size": size_sweep,
    "fig_4_speedup": speedup_bars,
    "fig_5_ablation": ablation,
    "fig_6_batch_size": by_batch_size,
    "fig_7_choices": choices,
    "fig_8_thresholds": sensitivity,
}
