"""AdaEAGLE's eight figures, in the one plotting style (`figures`), from rows alone.

Hollow marks are the paper's. Where its numbers are tokens a second on another machine, both sides
are drawn relative to something of their own: autoregressive decoding, or AdaEAGLE itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from specrepro.figures import (
    _DASHED,
    PALETTE,
    SPEEDUP,
    TAU,
    _banded_line,
    _colours,
    _figure,
    _footnote,
    _hollow_mark,
    _interval,
    _legend,
    _of_quantity,
    style,
)

AUTOREGRESSIVE, OURS, NO_PENALTY = "Autoregressive", "AdaEAGLE", "AdaEAGLE, no penalty"
METRICS = {"tau": TAU, "speedup": SPEEDUP}
GREY = "#a9b8c9"


def rounds(rows: pd.DataFrame) -> Figure:
    """Drafted and accepted tokens of each round of one text (Figure 2)."""
    ours = _of_quantity(rows, "round", ["method", "round", "value", "drafted"])
    methods = list(dict.fromkeys(ours["method"]))
    with style():
        figure = _figure(8.0, 1.0 + 1.7 * len(methods))
        panels = figure.subplots(len(methods), 1, sharey=True, squeeze=False)[:, 0]
        for axes, method in zip(panels, methods, strict=True):
            mine = ours[ours["method"] == method]
            axes.bar(mine["round"], mine["drafted"], 0.8, color="white", edgecolor="#808080")
            axes.bar(mine["round"], mine["value"], 0.8, color=PALETTE[0])
            axes.set_ylabel(f"tokens\n({method})")
            axes.grid(False, axis="x")
        panels[-1].set_xlabel("round of one text")
        _legend(
            figure,
            [
                Patch(facecolor="white", edgecolor="#808080", label="drafted"),
                Patch(facecolor=PALETTE[0], label="accepted"),
            ],
        )
        _footnote(figure, ours)
    return figure


def predictions(rows: pd.DataFrame) -> Figure:
    """How often each length is predicted with and without the penalty, and is true (Figure 4)."""
    ours = _of_quantity(rows, "length", ["method", "predicted", "true", "value"])
    sides = {m: _shares(ours[ours["method"] == m], "predicted") for m in (NO_PENALTY, OURS)}
    sides["right, of the drafted chain"] = _shares(ours[ours["method"] == OURS], "true")
    with style():
        figure = _figure(6.4, 3.0)
        axes = figure.subplots()
        colours = dict(zip(sides, (PALETTE[1], PALETTE[0], GREY), strict=True))
        for place, (name, shares) in enumerate(sides.items()):
            axes.bar(shares.index + (place - 1) * 0.27, shares, 0.27, color=colours[name])
        axes.set_xlabel("draft length (tokens)")
        axes.set_ylabel("share of all places (fraction)")
        axes.set_xticks(range(int(max(shares.index.max() for shares in sides.values())) + 1))
        axes.grid(False, axis="x")
        _legend(figure, [Patch(color=colour, label=name) for name, colour in colours.items()])
        _footnote(figure, ours)
    return figure


def _shares(rows: pd.DataFrame, column: str) -> pd.Series:
    return rows.groupby(column)["value"].sum()


def methods(rows: pd.DataFrame, reported: pd.DataFrame | None = None) -> Figure:
    """tau and speedup of every method on the mean of prompt sets (Table 3)."""
    ours = _of_quantity(rows, "decode", ["method", "prompts", "temperature", "tau", "speedup"])
    ours = ours[(ours["temperature"] == 0) & (ours["batch"] == 1)]
    where = "mean" if "mean" in set(ours["prompts"]) else ours["prompts"].iloc[0]
    ours = ours[(ours["prompts"] == where) & (ours["method"] != AUTOREGRESSIVE)]
    theirs = _relative_to_plain(reported, where)
    names = list(dict.fromkeys(ours["method"]))
    with style():
        figure = _figure(9.0, 3.4)
        for axes, (metric, label) in zip(figure.subplots(1, 2), METRICS.items(), strict=True):
            _bars_of(axes, ours.set_index("method").loc[names], metric)
            for method, row in theirs.iterrows():
                if method in names:
                    _hollow_mark(axes, names.index(method), row[metric], "o", PALETTE[0])
            axes.axhline(1, **_DASHED)
            axes.set_ylabel(label)
            axes.set_xlabel(f"method (prompts: {where})")
        _legend(figure, [_paper_handle()])
        _footnote(figure, ours)
    return figure


def _relative_to_plain(reported: pd.DataFrame | None, where: str) -> pd.DataFrame:
    """Table 3's cells by method, tokens a second as speedups of the paper's own baseline.

    The baseline's printed mean is a misprint, so that mean is taken of its cells.
    """
    if reported is None or reported.empty:
        return pd.DataFrame(columns=list(METRICS))
    table = reported[(reported["table"] == "Table 3") & (reported["by"] == "authors")]
    plain = table[table["method"] == AUTOREGRESSIVE].set_index("prompts")["tokens_per_second"]
    base = plain.drop("mean").mean() if where == "mean" else plain.get(where, np.nan)
    here = table[table["prompts"] == where].set_index("method")
    return here.assign(speedup=here["tokens_per_second"] / base)


def _bars_of(axes: Axes, rows: pd.DataFrame, metric: str) -> None:
    """One bar a row, with its interval; what adapts is darker."""
    is_fixed = rows.index.str.startswith("EAGLE")
    colours = [GREY if fixed else PALETTE[0] for fixed in is_fixed]
    axes.bar(range(len(rows)), rows[metric], 0.7, color=colours)
    low, high = _interval(rows, metric)
    errors = np.clip([rows[metric] - low, high - rows[metric]], 0, None)
    look = {"fmt": "none", "ecolor": "black", "elinewidth": 0.9}
    axes.errorbar(range(len(rows)), rows[metric], errors, **look)
    axes.set_xticks(range(len(rows)), rows.index, rotation=45, ha="right")
    axes.grid(False, axis="x")


def _paper_handle() -> Line2D:
    look = {"linestyle": "none", "markersize": 5.5, "markerfacecolor": "none"}
    return Line2D([], [], marker="o", label="paper, Vicuna-7B", markeredgecolor="#404040", **look)


def variants(rows: pd.DataFrame, reported: pd.DataFrame | None = None) -> Figure:
    """Table 4's variants and Table 5's thresholds, in speed relative to AdaEAGLE's own."""
    ablated = _of_quantity(rows, "ablation", ["method", "tokens_per_second"])
    swept = _of_quantity(rows, "threshold", ["method", "threshold", "tokens_per_second"])
    with style():
        figure = _figure(9.0, 3.4)
        left, right = figure.subplots(1, 2)
        _bars_of(left, _relative(ablated.set_index("method")), "relative")
        names, theirs = list(ablated["method"]), _table(reported, "Table 4")
        theirs = theirs[theirs["prompts"] == "chat"] if len(theirs) else theirs
        for row in _relative(theirs.set_index("method")).itertuples() if len(theirs) else ():
            _hollow_mark(left, names.index(row.Index), row.relative, "o", PALETTE[0])
        left.axhline(1, **_DASHED)
        left.set_ylabel("tokens a second (AdaEAGLE 1)")
        left.set_xlabel("variant")
        handles = _threshold_lines(right, swept, _table(reported, "Table 5"))
        right.set_ylabel("tokens a second (mean 1)")
        right.set_xlabel("threshold on the log probability of a chain (natural logarithm)")
        _legend(figure, [*handles, _paper_handle()])
        _footnote(figure, pd.concat([ablated, swept]))
    return figure


def _table(reported: pd.DataFrame | None, name: str) -> pd.DataFrame:
    return pd.DataFrame() if reported is None else reported[reported["table"] == name]


def _relative(rows: pd.DataFrame) -> pd.DataFrame:
    """Tokens a second of rows by method, with intervals, over AdaEAGLE's own."""
    base = rows.loc[OURS, "tokens_per_second"]
    low, high = _interval(rows, "tokens_per_second")
    ratios = {"relative": rows["tokens_per_second"], "relative_low": low, "relative_high": high}
    return rows.assign(**{name: column / base for name, column in ratios.items()})


def _threshold_lines(axes: Axes, swept: pd.DataFrame, theirs: pd.DataFrame) -> list[Line2D]:
    """A line a method; the paper's as hollow marks."""
    handles = []
    for method, colour in _colours(swept["method"]).items():
        line = swept[swept["method"] == method].sort_values("threshold")
        relative = line["tokens_per_second"] / line["tokens_per_second"].mean()
        handles += axes.plot(line["threshold"], relative, "o-", color=colour, label=method)
    if theirs.empty:
        return handles
    relative = theirs["tokens_per_second"] / theirs["tokens_per_second"].mean()
    for x, y in zip(theirs["threshold"], relative, strict=True):
        _hollow_mark(axes, x, y, "o", PALETTE[0])
    return handles


def true_lengths(rows: pd.DataFrame) -> Figure:
    """How often a length is predicted where another is true, without and with the penalty."""
    ours = _of_quantity(rows, "length", ["method", "predicted", "true", "value"])
    shown = [method for method in (NO_PENALTY, OURS) if method in set(ours["method"])]
    longest = int(max(ours["predicted"].max(), ours["true"].max()))
    with style():
        figure = _figure(4.2 * len(shown), 3.6)
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, method in zip(panels, shown, strict=True):
            mine = ours[ours["method"] == method]
            shares = np.zeros((longest + 1, longest + 1))
            shares[mine["true"].astype(int), mine["predicted"].astype(int)] = mine["value"]
            look = {"origin": "lower", "cmap": "Blues", "vmin": 0, "vmax": ours["value"].max()}
            image = axes.imshow(shares, **look)
            axes.plot([-0.5, longest + 0.5], [-0.5, longest + 0.5], **_DASHED)
            axes.set_xlabel(f"predicted length (tokens)\n{method}")
            axes.grid(False)
        panels[0].set_ylabel("true length (tokens)")
        figure.colorbar(image, ax=list(panels), label="share of all places (fraction)")
        _footnote(figure, ours)
    return figure


def calibration(rows: pd.DataFrame) -> Figure:
    """Which share of true lengths a prediction covers, by penalty, and true against predicted."""
    covered = _of_quantity(rows, "coverage", ["penalty", "expected", "value"])
    parts = _of_quantity(rows, "calibration", ["predicted", "value", "quantile_high"])
    with style():
        figure = _figure(8.4, 3.4)
        left, right = figure.subplots(1, 2)
        handles = [_banded_line(left, covered, "expected", "value", PALETTE[0], "measured here")]
        left.plot([0.4, 1], [0.4, 1], **_DASHED)
        left.set_xlabel("quantile that the penalty asks for, lambda / (1 + lambda)")
        left.set_ylabel("true lengths at most as long as predicted (fraction)")
        parts = parts.sort_values("predicted")
        for column, label, colour in (
            ("value", "mean true length", PALETTE[1]),
            ("quantile_high", "9 in 10 are no longer", PALETTE[2]),
        ):
            handles += right.plot(
                parts["predicted"], parts[column], "o-", color=colour, label=label
            )
        ends = right.get_xlim()
        right.plot(ends, ends, **_DASHED)
        right.set_xlabel("predicted length, a tenth of the places each (tokens)")
        right.set_ylabel("true length (tokens)")
        _legend(figure, [*handles, Line2D([], [], label="as asked for", **_DASHED)])
        _footnote(figure, covered)
    return figure


def headroom(rows: pd.DataFrame, reported: pd.DataFrame | None = None) -> Figure:
    """What each method gains over the best fixed length, decoded and replayed, base by base."""
    ours = _of_quantity(rows, "headroom", ["method", "versus", "costs", "value"])
    labels = [f"{r.method}\nover {r.versus}" for r in ours.itertuples()]
    colours = {"clock": PALETTE[0], "table": GREY, "paper's": PALETTE[1]}
    theirs = _reported_gains(reported)
    with style():
        figure = _figure(7.4, 1.0 + 0.42 * len(ours))
        axes = figure.subplots()
        places = np.arange(len(ours))
        axes.barh(places, 100 * ours["value"], 0.66, color=[colours[c] for c in ours["costs"]])
        low, high = _interval(ours, "value")
        errors = 100 * np.clip([ours["value"] - low, high - ours["value"]], 0, None)
        axes.errorbar(
            100 * ours["value"], places, xerr=errors, fmt="none", ecolor="black", elinewidth=0.9
        )
        for place, method in zip(places, ours["method"], strict=True):
            if method in theirs:
                _hollow_mark(axes, 100 * theirs[method], place, "o", PALETTE[0])
        axes.axvline(0, **_DASHED)
        axes.set_yticks(places, labels)
        axes.set_ylim(len(ours) - 0.4, -0.6)
        axes.set_xlabel("tokens a second gained over the best fixed length (%)")
        axes.set_ylabel("method")
        axes.grid(False, axis="y")
        names = {"clock": "timed while decoding", "table": "replayed"}
        names["paper's"] = "replayed at the costs of the paper's GPU"
        present = [name for name in names if name in set(ours["costs"])]
        handles = [Patch(color=colours[name], label=names[name]) for name in present]
        _legend(figure, [*handles, _paper_handle()])
        _footnote(figure, ours)
    return figure


def _reported_gains(reported: pd.DataFrame | None) -> dict[str, float]:
    """Gains over the paper's best fixed length on MT-Bench, the oracle's of Table 2."""
    if reported is None or reported.empty:
        return {}
    is_shown = reported["table"].isin(["Table 2", "Table 3"])
    chat = reported[(reported["prompts"] == "chat") & is_shown]
    rates = chat.drop_duplicates("method").set_index("method")["tokens_per_second"]
    best = rates[rates.index.str.fullmatch(r"EAGLE \d+")].max()
    return (rates / best - 1).to_dict()


def penalty_sweep(rows: pd.DataFrame) -> Figure:
    """Speed and mean length against the penalty, and where a last token breaks even."""
    ours = _of_quantity(rows, "sweep", ["penalty", "tokens_per_second", "mean_length"])
    marks = rows[rows["quantity"] == "break_even"].drop_duplicates("part")
    panels_of = {
        "tokens_per_second": "tokens a second",
        "tau": TAU,
        "mean_length": "tokens drafted a round",
    }
    with style():
        figure = _figure(10.2, 3.2)
        handles: list[Line2D] = []
        for axes, (metric, label) in zip(figure.subplots(1, 3), panels_of.items(), strict=True):
            line = _banded_line(axes, ours, "penalty", metric, PALETTE[0], OURS)
            handles = [line, *_break_even_lines(axes, marks, ours["penalty"])]
            axes.set_xlabel("penalty lambda on drafts that are too short")
            axes.set_ylabel(label)
        _legend(figure, handles)
        _footnote(figure, ours)
    return figure


def _break_even_lines(axes: Axes, marks: pd.DataFrame, penalties: Sequence[float]) -> list[Line2D]:
    """Vertical lines; one beyond the sweep is named with its value and left out of the panel."""
    handles = []
    for mark, dashes in zip(marks.itertuples(), ("--", ":"), strict=False):
        label = f"breaks even, {mark.part}: {mark.value:.1f}"
        look = {"color": PALETTE[1], "linestyle": dashes, "linewidth": 1.2}
        if mark.value <= 1.2 * max(penalties):
            axes.axvline(mark.value, **look)
        handles.append(Line2D([], [], label=label, **look))
    return handles


DRAWINGS: dict[str, Callable[..., Figure]] = {
    "fig_1_methods": methods,
    "fig_2_rounds": rounds,
    "fig_3_headroom": headroom,
    "fig_4_predictions": predictions,
    "fig_5_true_lengths": true_lengths,
    "fig_6_calibration": calibration,
    "fig_7_variants": variants,
    "fig_8_penalty": penalty_sweep,
}
