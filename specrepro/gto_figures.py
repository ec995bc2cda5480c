"""GTO's figures beside Table 1, in the one plotting style (`figures`), from rows alone.

Each takes all rows of a run and the paper's reported cells, drawn as hollow marks. Heads tuned for
one number of steps, or one time, are compared with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from specrepro.figures import (
    _DASHED,
    PROMPT_SETS,
    SPEEDUP,
    TAU,
    _colours,
    _figure,
    _footnote,
    _hollow_mark,
    _interval,
    _legend,
    _of_quantity,
    _of_table,
    style,
)

Reported = pd.DataFrame | None
PATHS = {  # column of rows -> what it is
    "pruned": "greedy paths pruned (share)",
    "on_greedy_path": "accepted on the greedy path (share)",
    "greedy_tau": "tokens along the greedy path",
    "tau": "tokens in the tree",
}

GAINS = {  # metric of rows -> what it is, at a position
    "accepted": "accepted tokens",
    "log-sum-exp": "draft tree reward",
    "expected": "tokens that sampling accepts",
}


def paths(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """Figure 2: how often trees lose or leave the greedy path, and what they win beside it."""
    ours = _of_quantity(rows, "paths", ["method", "prompts", "tau"])
    theirs = _of_table(reported, "Figure 2")
    with style():
        figure = _figure(12.0, 3.2)
        panels = figure.subplots(1, len(PATHS))
        for axes, (metric, label) in zip(panels, PATHS.items(), strict=True):
            _dots(axes, ours, metric, "prompts", theirs)
            axes.set_ylabel(label)
        return _finished(figure, ours)


def rewards(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """Reward of the trees of both heads, and its gain against that of tau, by prompt set."""
    ours = _of_quantity(rows, "reward", ["method", "prompts", "value"])
    gaps = _of_quantity(rows, "reward_gap", ["prompts", "value"]).set_index("prompts")["value"]
    gains = _gains_of_tau(rows)
    with style():
        figure = _figure(8.4, 3.2)
        left, right = figure.subplots(1, 2)
        _dots(left, ours, "value", "prompts")
        left.set_ylabel("draft tree reward")
        for prompts in gaps.index.intersection(gains.index):
            right.plot(gaps[prompts], gains[prompts], "o", color="black")
            right.annotate(prompts, (gaps[prompts], gains[prompts]), fontsize=7)
        right.axhline(0, **_DASHED)
        right.axvline(0, **_DASHED)
        right.set_xlabel("gain in reward over the first head")
        right.set_ylabel("gain in tau")
        return _finished(figure, ours)


def ratios(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """How far the tuned head has gone from the first: s of accepted paths, and where it clips."""
    ours = _of_quantity(rows, "ratio", ["method", "prompts", "value"])
    shares = ours[ours["metric"] == "share"]
    clipped = ours[ours["metric"] == "clipped"].set_index("prompts")["value"]
    colours = _colours(shares["prompts"])
    with style():
        figure = _figure(6.0, 3.0)
        axes = figure.subplots()
        for prompts, line in shares.groupby("prompts", sort=False):
            line, named = line.sort_values("level"), PROMPT_SETS.get(prompts, prompts)
            label = f"{named} ({clipped.get(prompts, float('nan')):.0%} clipped)"
            look = {"color": colours[prompts], "label": label}
            axes.step(line["level"], line["value"], where="post", **look)
        for bound in (0.8, 1.2):
            axes.axvline(bound, **_DASHED)
        axes.set_xlabel("ratio s of accepted paths (tuned head over first head, per token)")
        axes.set_ylabel("share of positions")
        _legend(figure, axes.get_legend_handles_labels()[0])
        _footnote(figure, ours)
        return figure


def shapes(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """Table 7: trees of other shapes than the one that was tuned for."""
    ours = _of_quantity(rows, "shapes", ["method", "draft_depth", "total_tokens", "tau"])
    return _by_name(ours.assign(shape=_shape_names(ours)), "shape", ("tau", "speedup"))


def arms(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """Heads of as many steps or as much time; a dot for each seed."""
    ours = _of_quantity(rows, "arms", ["method", "prompts", "tau"])
    return _by_name(ours[ours["prompts"] != "all"], "prompts", ("tau", "speedup"))


def ablation(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """Tables 3 to 5 at temperature 0 and 1, relative to GTO, beside the paper's."""
    ours = _of_quantity(rows, "ablation", ["method", "temperature", "tau"])
    ours = ours[(ours["prompts"] == "mean") & (ours["method"] != "Autoregressive")]
    theirs = _of_table(reported, "Tables 3 to 5")
    temperatures = sorted(ours["temperature"].unique())
    with style():
        figure = _figure(0.6 + 5.0 * len(temperatures), 3.6)
        panels = figure.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
        methods = list(dict.fromkeys(ours["method"]))[::-1]
        for axes, temperature in zip(panels, temperatures, strict=True):
            _relative(axes, ours[ours["temperature"] == temperature], methods, hollow=False)
            if theirs is not None:
                there = theirs[theirs["temperature"] == temperature]
                _relative(axes, there[there["method"].isin(methods)], methods, hollow=True)
            axes.axvline(1, **_DASHED)
            axes.set_xlabel(f"tau, relative to GTO (temperature {temperature:g})")
        panels[0].set_yticks(range(len(methods)), methods)
        _footnote(figure, ours)
        return figure


def held_out(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """What each arm gains over the first head at every position; a dot for each seed."""
    ours = _of_quantity(rows, "held_out_gain", ["method", "metric", "value"])
    ours = ours[ours["prompts"] == "by arm"]
    methods = list(dict.fromkeys(ours["method"]))[::-1]
    with style():
        figure = _figure(0.6 + 3.4 * len(GAINS), 0.8 + 0.3 * len(methods))
        panels = figure.subplots(1, len(GAINS), sharey=True)
        for axes, (metric, label) in zip(panels, GAINS.items(), strict=True):
            mine = ours[ours["metric"] == metric]
            places = mine["method"].map(methods.index) + 0.15 * (1 - mine["train_seed"])
            low, high = _interval(mine, "value")
            axes.hlines(places, low, high, color="black", linewidth=1.0)
            axes.plot(mine["value"], places, "o", color="black", markersize=3)
            axes.axvline(0, **_DASHED)
            axes.set_xlabel(f"{label}, less the first head's")
            axes.locator_params(axis="x", nbins=4)
        panels[0].set_yticks(range(len(methods)), methods)
        _footnote(figure, ours)
        return figure


def learning(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """Held-out tau and reward by step, and tau against reward."""
    ours = _of_quantity(rows, "learning", ["method", "step", "tau", "reward_gap"])
    colours = _colours(ours["method"])
    axes_of = (("step", "tau"), ("step", "reward_gap"), ("reward_gap", "tau"))
    labels = {"step": "step", "tau": TAU, "reward_gap": "gain in reward"}
    with style():
        figure = _figure(12.0, 3.2)
        for axes, (x, y) in zip(figure.subplots(1, 3), axes_of, strict=True):
            for (method, _), line in ours.groupby(["method", "variant"], sort=False):
                line = line.sort_values("step")
                axes.plot(line[x], line[y], marker="o", color=colours[method])
            axes.set_xlabel(labels[x])
            axes.set_ylabel(labels[y])
        return _finished(figure, ours)


def statistics(rows: pd.DataFrame, reported: Reported = None) -> Figure:
    """What training logged: clipped positions, groups without an advantage, the ratios' spread."""
    ours = _of_quantity(rows, "statistics", ["method", "step", "metric", "value"])
    colours, metrics = _colours(ours["method"]), list(ours["metric"].unique())
    with style():
        figure = _figure(3.6 * len(metrics), 3.0)
        for axes, metric in zip(figure.subplots(1, len(metrics)), metrics, strict=True):
            for (method, _), line in ours[ours["metric"] == metric].groupby(
                ["method", "variant"], sort=False
            ):
                axes.plot(line["step"], line["value"], color=colours[method])
            axes.set_xlabel("step")
            axes.set_ylabel(metric.replace("_", " "))
        return _finished(figure, ours)


def _shape_names(ours: pd.DataFrame) -> pd.Series:
    """Expansions and nodes of each tree."""
    return ours["draft_depth"].map("{:g}".format) + "/" + ours["total_tokens"].map("{:g}".format)


def _gains_of_tau(rows: pd.DataFrame) -> pd.Series:
    """GTO's tau less EAGLE-3's by prompt set, greedily decoding."""
    found = rows[rows["quantity"] == "decode"]
    greedy = found[found["temperature"] == 0]
    taus = {
        method: greedy[greedy["method"] == method].drop_duplicates("prompts").set_index("prompts")
        for method in ("GTO", "EAGLE-3")
    }
    return (taus["GTO"]["tau"] - taus["EAGLE-3"]["tau"]).dropna()


def _by_name(ours: pd.DataFrame, along: str, metrics: Sequence[str]) -> Figure:
    """A panel for each metric and temperature, methods side by side at each value of `along`."""
    temperatures = sorted(ours["temperature"].unique())
    with style():
        figure = _figure(0.6 + 4.6 * len(temperatures), 2.6 * len(metrics))
        panels = figure.subplots(len(metrics), len(temperatures), sharey="row", squeeze=False)
        for line, metric in zip(panels, metrics, strict=True):
            for axes, temperature in zip(line, temperatures, strict=True):
                _dots(axes, ours[ours["temperature"] == temperature], metric, along)
                axes.set_xlabel(f"{along} (temperature {temperature:g})")
            line[0].set_ylabel(TAU if metric == "tau" else SPEEDUP)
        return _finished(figure, ours)


def _dots(axes: Axes, ours: pd.DataFrame, metric: str, along: str, theirs: Reported = None) -> None:
    """A dot with its interval for each row, methods side by side at each name."""
    names, colours = list(dict.fromkeys(ours[along])), _colours(ours["method"])
    for number, (method, colour) in enumerate(colours.items()):
        mine = ours[ours["method"] == method]
        aside = (number - (len(colours) - 1) / 2) * 0.7 / len(colours)
        places = [names.index(name) + aside for name in mine[along]]
        low, high = _interval(mine, metric)
        axes.vlines(places, low, high, color=colour, linewidth=1.0)
        axes.plot(places, mine[metric], "o", color=colour)
        if theirs is not None:
            for cell in theirs[theirs["method"] == method].to_dict("records"):
                if cell[along] in names:
                    _hollow_mark(axes, names.index(cell[along]) + aside, cell[metric], "D", colour)
    axes.set_xticks(range(len(names)), [PROMPT_SETS.get(name, name) for name in names])
    axes.margins(x=0.2)


def _relative(axes: Axes, rows: pd.DataFrame, methods: list[str], hollow: bool) -> None:
    """tau of each method over GTO's, at the method's line."""
    base = rows[rows["method"] == "GTO"]["tau"]
    if not len(base):
        return
    for row in rows.to_dict("records"):
        place = row["tau"] / base.iloc[0], methods.index(row["method"])
        if hollow:
            _hollow_mark(axes, *place, "D", "#404040")
        else:
            axes.plot(*place, "o", color="black")


def _finished(figure: Figure, ours: pd.DataFrame) -> Figure:
    """With a legend of methods and a footnote."""
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="none", label=method)
        for method, colour in _colours(ours["method"]).items()
    ]
    _legend(figure, handles)
    _footnote(figure, ours)
    return figure


DRAWINGS: dict[str, tuple[str, Callable[[pd.DataFrame, Reported], Figure]]] = {
    "paths": ("fig_2_greedy_path", paths),
    "rewards": ("fig_3_reward", rewards),
    "shapes": ("fig_5_tree_shapes", shapes),
    "arms": ("fig_6_equal_steps_and_time", arms),
    "ablation": ("fig_7_ablation", ablation),
    "held_out": ("fig_10_held_out_trees", held_out),
    "learning": ("fig_8_learning", learning),
    "statistics": ("fig_9_training_statistics", statistics),
}
