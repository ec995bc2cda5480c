"""SpecTTS-Bench's figures, in the one plotting style (`figures`), from rows alone.

A method keeps its colour in all of them, and its marker says which category it is of. Hatched bars
and dashed lines are replayed from recorded answers; hollow marks are the paper's.
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
    MEASURED_NOW,
    SPEEDUP,
    TAU,
    _darker,
    _figure,
    _footnote,
    _interval,
    _is_committed,
    _legend,
    _measured_now_first,
    _of_quantity,
    style,
)

MARKERS = {  # method -> marker of its category
    "EAGLE-3": "s",
    "SpS": "D",
    "SAM[EAGLE-3]": "^",
    "Suffix[EAGLE-3]": "^",
    "SAM": "o",
    "SuffixDecoding": "o",
    "Recycling": "o",
    "PLD": "o",
    "PIA": "o",
    "Lookahead": "o",
    "REST": "o",
}
_SHADES = [*seaborn.color_palette("colorblind", 10).as_hex(), "#303030"]
COLOURS = dict(zip(MARKERS, _SHADES, strict=True))
_LABELS = {"tau": TAU, "speedup": SPEEDUP}


def _chosen(
    rows: pd.DataFrame, quantities: Sequence[str], keys: list[str], metric: str, **where: object
) -> pd.DataFrame:
    """One row per mark: of methods of the benchmark, what was measured now before what was not.

    But where a tau was replayed that is the one, so that methods are compared on the same words.
    """
    found = rows[rows["quantity"].isin(quantities) & rows["method"].isin(MARKERS)]
    for column, wanted in where.items():
        found = found[found[column] == wanted]
    found = found.dropna(subset=[metric])
    if found.empty:
        raise ValueError(f"no row of {' or '.join(quantities)} with a {metric} and {where}")
    is_replayed = _is_tau(found, metric) & found["source"].astype(str).str.startswith("replayed")
    has_replay = is_replayed.groupby([found[key] for key in keys]).transform("any")
    found = found[is_replayed | ~has_replay]
    return _measured_now_first(found, keys).drop_duplicates(keys)


def _is_tau(rows: pd.DataFrame, metric: str) -> pd.Series:
    """Which rows tell a tau: in their column of that name, or as the value of a change."""
    told = rows["metric"] if metric == "value" else pd.Series(metric, index=rows.index)
    return told.eq("tau")


def _in_order(methods: pd.Series) -> list[str]:
    present = set(methods)
    return [name for name in MARKERS if name in present]


def _handles(methods: Sequence[str], reported: pd.DataFrame | None = None) -> list[Line2D]:
    found = [
        Line2D([], [], color=COLOURS[name], marker=MARKERS[name], label=name) for name in methods
    ]
    if reported is not None and len(reported):
        look = {"linestyle": "none", "markerfacecolor": "none", "markeredgecolor": "#404040"}
        models = " and ".join(dict.fromkeys(reported["model"]))
        found.append(Line2D([], [], marker="o", label=f"paper, {models}", **look))
    return found


def _hollow(axes: Axes, x: float, y: float, method: str) -> None:
    look = {"markerfacecolor": "none", "markeredgecolor": _darker(COLOURS[method]), "zorder": 5}
    axes.plot(x, y, MARKERS[method], markersize=6.5, markeredgewidth=1.2, **look)


def _beside(reported: pd.DataFrame | None, quantity: str, methods: Sequence[str]) -> pd.DataFrame:
    """The paper's cells of one quantity for the methods that are drawn."""
    if reported is None:
        columns = ["model", "method", "prompts", "temperature", "metric", *_LABELS]
        return pd.DataFrame(columns=columns)
    is_wanted = (reported["quantity"] == quantity) & reported["method"].isin(methods)
    return reported[is_wanted]


def radar(rows: pd.DataFrame, reported: pd.DataFrame | None = None) -> Figure:
    """tau and speedup of every method on each data set and on all, greedy, in two turns."""
    with style():
        figure = _figure(9.6, 6.0)
        panels = figure.subplots(1, 2, subplot_kw={"projection": "polar"})
        drawn = []
        for axes, metric in zip(panels, _LABELS, strict=True):
            quantities = ["decode", "replay"] if metric == "tau" else ["decode"]
            ours = _chosen(
                rows, quantities, ["method", "prompts"], metric,
                paradigm="multi-round", temperature=0.0,
            )  # fmt: skip
            ours = ours[ours["prompts"] != "mean"]
            _spokes(axes, ours, metric, _beside(reported, "decode", list(ours["method"])))
            drawn.append(ours)
        both = pd.concat(drawn)
        methods = _in_order(both["method"])
        replayed = Line2D(
            [], [], color="#606060", linestyle=":", label="replayed, on the same words"
        )
        _legend(figure, [*_handles(methods, _beside(reported, "decode", methods)), replayed], 5)
        _footnote(figure, both)
    return figure


def _spokes(axes: Axes, rows: pd.DataFrame, metric: str, reported: pd.DataFrame) -> None:
    sets = sorted(set(rows["prompts"]) - {"overall"}) + ["overall"]
    angles = np.linspace(0, 2 * np.pi, len(sets), endpoint=False)
    for method in _in_order(rows["method"]):
        own = rows[rows["method"] == method].set_index("prompts").reindex(sets)
        dots = ":" if _is_committed(own.dropna(subset=["method"])).all() else "-"
        look = {"color": COLOURS[method], "marker": MARKERS[method], "linestyle": dots}
        axes.plot([*angles, angles[0]], [*own[metric], own[metric].iloc[0]], **look)
    for _, cell in reported.dropna(subset=[metric]).iterrows():
        if cell["prompts"] in sets and cell["temperature"] == 0:
            _hollow(axes, angles[sets.index(cell["prompts"])], cell[metric], cell["method"])
    axes.set_xticks(angles, sets)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(_LABELS[metric])


def speedup_by_turn(rows: pd.DataFrame, reported: pd.DataFrame | None = None) -> Figure:
    """Speedup at each turn, a panel for each temperature, the paper's as hollow marks."""
    keys = ["method", "temperature", "turn"]
    ours = _chosen(
        rows, ["decode_by_turn"], keys, "speedup", paradigm="multi-round", prompts="overall"
    )
    temperatures = sorted(ours["temperature"].unique())
    theirs = _beside(reported, "decode_by_turn", list(ours["method"]))
    with style():
        figure = _figure(1.0 + 3.6 * len(temperatures), 3.4)
        panels = figure.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
        for axes, temperature in zip(panels, temperatures, strict=True):
            here = ours[ours["temperature"] == temperature]
            for method in _in_order(here["method"]):
                _whiskered(axes, here[here["method"] == method], "turn", "speedup", method)
            for _, cell in theirs[theirs["temperature"] == temperature].iterrows():
                _hollow(axes, cell["turn"], cell["speedup"], cell["method"])
            axes.axhline(1, **_DASHED)
            axes.set_xticks(sorted(ours["turn"].unique()))
            axes.margins(x=0.2)
            axes.set_xlabel(f"turn (temperature {temperature:g})")
        panels[0].set_ylabel(SPEEDUP)
        _legend(figure, _handles(_in_order(ours["method"]), theirs), 5)
        _footnote(figure, ours)
    return figure


def _whiskered(axes: Axes, rows: pd.DataFrame, along: str, metric: str, method: str) -> None:
    rows = rows.sort_values(along)
    errors = _errors(rows, metric)
    look = {"color": COLOURS[method], "marker": MARKERS[method], "elinewidth": 0.9}
    axes.errorbar(rows[along], rows[metric], errors, **look)


def _errors(rows: pd.DataFrame, metric: str) -> np.ndarray:
    low, high = _interval(rows, metric)
    return np.clip([rows[metric] - low, high - rows[metric]], 0, None)


def sources(rows: pd.DataFrame) -> Figure:
    """What the hybrids drafted from: share of the rounds, and tau of those rounds."""
    ours = _of_quantity(rows, "source", ["method", "drafted_from", "share", "tau"])
    ours = ours[ours["method"].str.contains("[", regex=False)]
    cases = ["method", "paradigm", "temperature"]
    names = list(dict.fromkeys(ours["drafted_from"]))
    with style():
        groups = list(ours.groupby(cases, sort=False))
        figure = _figure(8.6, 1.3 + 0.5 * len(groups))
        shares, taus = figure.subplots(1, 2, sharey=True)
        palette = dict(zip(names, _SHADES, strict=False))
        for place, (_, own) in enumerate(groups):
            own = own.set_index("drafted_from").reindex(names)
            left, height = 0.0, 0.7 / len(names)
            for rank, (name, one) in enumerate(own.iterrows()):
                shares.barh(place, one["share"], 0.6, left=left, color=palette[name])
                left += 0.0 if np.isnan(one["share"]) else one["share"]
                y = place + (rank - (len(names) - 1) / 2) * height
                low, high = one["tau_low"], one["tau_high"]
                ends = np.clip([[one["tau"] - low], [high - one["tau"]]], 0, None)
                look = {"color": palette[name], "error_kw": {"elinewidth": 0.9}}
                taus.barh(y, one["tau"], height, xerr=ends, **look)
        labels = [f"{method}\n{paradigm}, T = {t:g}" for (method, paradigm, t), _ in groups]
        shares.set_yticks(range(len(groups)), labels)
        shares.set_ylim(len(groups) - 0.4, -0.6)
        shares.set_ylabel("method")
        shares.set_xlabel("share of the rounds (fraction)")
        taus.set_xlabel("tau of these rounds (tokens per target pass)")
        _legend(figure, [Patch(color=palette[name], label=f"from {name}") for name in names])
        _footnote(figure, ours)
    return figure


def tau_against_speedup(rows: pd.DataFrame, reported: pd.DataFrame | None = None) -> Figure:
    """Every method on all questions, greedy: what a longer acceptance is worth in time."""
    ours = _chosen(
        rows, ["decode"], ["method"], "speedup",
        paradigm="multi-round", temperature=0.0, prompts="overall",
    )  # fmt: skip
    theirs = _beside(reported, "decode", list(ours["method"]))
    theirs = theirs[(theirs["prompts"] == "overall") & (theirs["temperature"] == 0)]
    with style():
        figure = _figure(6.0, 4.2)
        axes = figure.subplots()
        for method in _in_order(ours["method"]):
            one = ours[ours["method"] == method]
            look = {"color": COLOURS[method], "marker": MARKERS[method], "elinewidth": 0.9}
            axes.errorbar(
                one["tau"], one["speedup"], _errors(one, "speedup"), _errors(one, "tau"), **look
            )
        for _, cell in theirs.dropna(subset=["tau", "speedup"]).iterrows():
            _hollow(axes, cell["tau"], cell["speedup"], cell["method"])
        most = max(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot([0, most], [0, most], **_DASHED)
        axes.set_xlim(0, axes.get_xlim()[1])
        axes.set_ylim(0, most)
        axes.set_xlabel(TAU)
        axes.set_ylabel(SPEEDUP)
        free = Line2D([], [], label="a round as cheap as a pass", **_DASHED)
        _legend(figure, [*_handles(_in_order(ours["method"]), theirs), free])
        _footnote(figure, ours)
    return figure


def temperature(rows: pd.DataFrame, reported: pd.DataFrame | None = None) -> Figure:
    """What sampling costs each method: relative change of tau and speedup."""
    keys = ["method", "metric"]
    ours = _chosen(rows, ["fall_off"], keys, "value", paradigm="multi-round")
    methods = _in_order(ours["method"])
    theirs = _beside(reported, "fall_off", methods)
    with style():
        figure = _figure(8.2, 1.2 + 0.3 * len(methods))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, metric in zip(panels, _LABELS, strict=True):
            own = ours[ours["metric"] == metric].set_index("method").reindex(methods)
            percent = 100 * own[["value", "value_low", "value_high"]].astype(float)
            colours = [COLOURS[name] for name in methods]
            hatches = ["////" if one else "" for one in _is_committed(own)]
            look = {"color": colours, "hatch": hatches, "edgecolor": "white"}
            errors = _errors(percent, "value")
            axes.barh(range(len(methods)), percent["value"], 0.66, **look)
            look = {"fmt": "none", "ecolor": "black", "elinewidth": 0.9}
            axes.errorbar(percent["value"], range(len(methods)), xerr=errors, **look)
            for _, cell in theirs[theirs["metric"] == metric].iterrows():
                _hollow(axes, 100 * cell["value"], methods.index(cell["method"]), cell["method"])
            axes.axvline(0, **_DASHED)
            axes.set_xlabel(f"change of {metric} from T = 0 to 0.6 (%)")
            axes.set_ylim(len(methods) - 0.4, -0.6)
        panels[0].set_yticks(range(len(methods)), methods)
        panels[0].set_ylabel("method")
        _legend(figure, _bar_handles(ours, theirs))
        _footnote(figure, ours)
    return figure


def _bar_handles(ours: pd.DataFrame, reported: pd.DataFrame) -> list[Patch | Line2D]:
    found: list[Patch | Line2D] = [Patch(color="#8a8a8a", label=MEASURED_NOW)]
    if _is_committed(ours).any():
        look = {"facecolor": "#8a8a8a", "edgecolor": "white", "hatch": "////"}
        found.append(Patch(label="replayed, or committed rows", **look))
    return found + _handles([], reported)


def thresholds(rows: pd.DataFrame) -> Figure:
    """tau of both hybrids against the score from which a text draft is taken, and their oracles."""
    ours = rows[(rows["quantity"] == "threshold") & (rows["prompts"] == "overall")]
    if ours.empty:
        raise ValueError("no rows of quantity 'threshold': they need what a head has right")
    swept = ours.dropna(subset=["threshold"])
    with style():
        figure = _figure(6.6, 3.6)
        axes = figure.subplots()
        for method, line in swept.groupby("method", sort=False):
            line = line.sort_values("threshold")
            low, high = _interval(line, "tau")
            colour = COLOURS[method]
            axes.fill_between(line["threshold"], low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(line["threshold"], line["tau"], "o-", color=colour, label=method)
            best = ours[ours["method"] == f"{method}, oracle"]["tau"]
            name = f"{method}, the best switch there is"
            axes.axhline(best.iloc[0], color=colour, linestyle="--", label=name)
        axes.set_xticks(sorted(swept["threshold"].unique()))
        axes.set_xlabel("threshold (matched, or expected, tokens)")
        axes.set_ylabel(TAU)
        _legend(figure, axes.get_legend_handles_labels()[0], 2)
        _footnote(figure, ours)
    return figure


def repetition(rows: pd.DataFrame) -> Figure:
    """tau of each answer against how much of it was said before in it."""
    ours = _of_quantity(rows, "generation", ["method", "repeated", "tau", "temperature"])
    ours = ours[ours["method"].isin(MARKERS) & (ours["paradigm"] == "multi-round")]
    temperatures = sorted(ours["temperature"].unique())
    with style():
        figure = _figure(1.0 + 3.8 * len(temperatures), 3.4)
        panels = figure.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
        for axes, t in zip(panels, temperatures, strict=True):
            here = ours[ours["temperature"] == t]
            for method in _in_order(here["method"]):
                one = here[here["method"] == method]
                look = {"color": COLOURS[method], "markersize": 3.5}
                axes.plot(one["repeated"], one["tau"], MARKERS[method], **look)
            axes.set_yscale("log", base=2)
            axes.set_xlim(-0.04, 1.04)
            axes.set_xlabel(f"repeated 4-grams (fraction), T = {t:g}")
        panels[0].set_ylabel(TAU)
        _legend(figure, _handles(_in_order(ours["method"])), 5)
        _footnote(figure, ours)
    return figure


def tau_by_turn(rows: pd.DataFrame) -> Figure:
    """tau at each turn, and at each sample of best-of-N drawn in turn, as bars."""
    keys = ["method", "paradigm", "temperature", "turn", "sample"]
    quantities = ["decode_by_turn", "replay_by_turn"]
    ours = _chosen(rows, quantities, keys, "tau", prompts="overall", batch=1)
    methods = _in_order(ours["method"])
    with style():
        cases = list(ours.groupby(["paradigm", "temperature"], sort=False))
        figure = _figure(9.0, 0.6 + 2.2 * len(cases))
        panels = figure.subplots(len(cases), 1, sharex=True, squeeze=False)[:, 0]
        for axes, ((paradigm, t), own) in zip(panels, cases, strict=True):
            _turn_bars(axes, own, methods)
            axes.set_ylabel(f"tau (tokens a pass)\n{paradigm}, T = {t:g}")
            axes.axhline(1, **_DASHED)
            axes.grid(False, axis="x")
        panels[-1].set_xticks(range(len(methods)), methods, rotation=20)
        panels[-1].set_xlabel("method; a bar for each turn or sample, the first on the left")
        _legend(figure, _bar_handles(ours, pd.DataFrame()))
        _footnote(figure, ours)
    return figure


def _turn_bars(axes: Axes, rows: pd.DataFrame, methods: Sequence[str]) -> None:
    """Later turns are darker."""
    numbers = rows[["turn", "sample"]].max(axis=1)
    shades = seaborn.color_palette("crest", numbers.nunique()).as_hex()
    for place, (number, shade) in enumerate(zip(sorted(numbers.unique()), shades, strict=True)):
        own = rows[numbers == number].set_index("method").reindex(methods)
        width = 0.8 / len(shades)
        x = np.arange(len(methods)) + (place - (len(shades) - 1) / 2) * width
        hatches = ["////" if one else "" for one in _is_committed(own)]
        axes.bar(x, own["tau"], width, color=shade, hatch=hatches, edgecolor="white", linewidth=0.3)
        axes.errorbar(
            x, own["tau"], _errors(own, "tau"), fmt="none", ecolor="black", elinewidth=0.7
        )


def drafting_cost(rows: pd.DataFrame) -> Figure:
    """Milliseconds a round spends on each drafter without a model, and the limits set for some."""
    ours = _of_quantity(rows, "drafting_cost", ["method", "text", "value"])
    methods, texts = (list(dict.fromkeys(ours[name])) for name in ("method", "text"))
    with style():
        figure = _figure(6.8, 1.2 + 0.34 * len(methods))
        axes = figure.subplots()
        for place, text in enumerate(texts):
            own = ours[ours["text"] == text].set_index("method").reindex(methods)
            y = np.arange(len(methods)) + (place - 0.5) * 0.36
            name = f"behind {own['prefix'].iloc[0]:g} tokens, {text}"
            look = {"color": _SHADES[place], "label": name, "error_kw": {"elinewidth": 0.9}}
            axes.barh(y, own["value"], 0.36, xerr=_errors(own, "value"), **look)
        limits = own["limit"].reindex(methods)
        axes.plot(limits, range(len(methods)), "|", color="black", markersize=18, label="limit")
        axes.set_xscale("log")
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.4, -0.6)
        axes.set_ylabel("drafter")
        axes.set_xlabel("drafting per round (ms; whiskers from 10 to 90 % of the rounds)")
        _legend(figure, axes.get_legend_handles_labels()[0])
        _footnote(figure, ours)
    return figure


DRAWINGS: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "fig_1_radar": radar,
    "fig_2_speedup_by_turn": speedup_by_turn,
    "fig_3_sources": sources,
    "fig_4_tau_against_speedup": tau_against_speedup,
    "fig_5_temperature": temperature,
    "fig_6_thresholds": thresholds,
    "fig_7_repetition": repetition,
    "fig_8_tau_by_turn": tau_by_turn,
    "fig_9_drafting_cost": drafting_cost,
}
