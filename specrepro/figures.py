"""Figures as functions of rows, in one style, with the paper's values beside ours.

Every drawing function takes rows (a DataFrame as in `figures/<paper>/results.csv`) and returns a
matplotlib Figure; `save` writes it as PNG, the same bytes for the same rows. A filled mark is
measured here, a hollow one is the paper's. Bars, bands and whiskers are 95 % intervals (for the
cost of a pass, its 10 and 90 % quantiles), left out where a row carries none. Depth 1 is the first
drafted token.

Where a quantity is absent the function raises a ValueError that says what is missing. Rows that
differ in a column that the figure does not show are refused too: choose among them first.

Not done here: computing intervals, and choosing which rows a paper's figure should show.
"""

from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image

MEASURED_NOW = "measured here now"
PALETTE = seaborn.color_palette("colorblind", 10).as_hex()
HOLLOW_MARKERS = "oDs^vP"
TAU, SPEEDUP = "tau (tokens per target pass)", "speedup (times autoregressive)"
PROMPT_SETS = {
    "chat": "chat",
    "humaneval": "HumanEval",
    "maths": "maths",
    "instruction": "instruc-\ntion",
    "summarisation": "summari-\nsation",
    "mean": "mean",
}
ROUND_PARTS = {
    "target": ("target pass", PALETTE[0]),
    "draft": ("drafting", PALETTE[1]),
    "tree": ("building the tree", PALETTE[2]),
    "verify": ("acceptance, cache", PALETTE[4]),
    "rest": ("the rest", "#949494"),
}
_FIXED_COLOURS = {"EAGLE-3": PALETTE[0], "EAGLE-2": PALETTE[1], "EAGLE": PALETTE[2]}
_DESCRIPTIVE = ("method", "prompts", "temperature", "batch", "dtype", "device", "target", "source")
_UNDATED = {"Software": None}  # or the version of matplotlib is written into the file
_DASHED = {"color": "black", "linewidth": 0.8, "linestyle": (0, (4, 2))}
_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


class _ShownInNotebooks(Figure):
    """A Figure that a notebook shows as the value of a cell, without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        with style():
            self.savefig(buffer, format="png", dpi=100, bbox_inches="tight", metadata=_UNDATED)
        return buffer.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """The one plotting style, for as long as the block lasts."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def save(figure: Figure, folder: str | Path, name: str) -> Path:
    """Write <folder>/<name>.png, for example figures/eagle3/fig_1_speedup_and_tau.png.

    In a palette of 256 colours, which takes a third of the room: figures are committed.
    """
    path, drawn = Path(folder) / f"{name}.png", BytesIO()
    path.parent.mkdir(parents=True, exist_ok=True)
    with style():
        figure.savefig(drawn, format="png", dpi=200, bbox_inches="tight", metadata=_UNDATED)
    colours = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    colours.save(path, optimize=True, dpi=(200, 200))
    return path


def speedup_and_tau(rows: pd.DataFrame, reported: pd.DataFrame | None = None) -> Figure:
    """Speedup (above) and tau (below) per prompt set, a column of panels per temperature."""
    ours = _of_quantity(rows, "decode", ["method", "prompts", "temperature"])
    ours = ours[ours["method"] != "Autoregressive"]
    metrics = [name for name in ("speedup", "tau") if name in ours and ours[name].notna().any()]
    if not metrics:
        raise ValueError("no rows with a speedup or a tau: measure a method first")
    ours = _measured_now_first(ours, ["method", "prompts", "temperature"])
    _refuse_repeats(ours, ["method", "prompts", "temperature"])
    theirs = _reported_beside(ours, reported)
    with style():
        return _draw_speedup_and_tau(ours, theirs, metrics)


def _draw_speedup_and_tau(ours: pd.DataFrame, theirs: pd.DataFrame, metrics: list[str]) -> Figure:
    labels = {"speedup": SPEEDUP, "tau": TAU}
    temperatures = sorted(ours["temperature"].unique())
    figure = _figure(0.6 + 4.2 * len(temperatures), 0.8 + 2.5 * len(metrics))
    panels = figure.subplots(len(metrics), len(temperatures), sharey="row", squeeze=False)
    prompts = [name for name in PROMPT_SETS if name in set(ours["prompts"])]
    prompts += sorted(set(ours["prompts"]) - set(prompts))
    for line, metric in zip(panels, metrics, strict=True):
        for axes, temperature in zip(line, temperatures, strict=True):
            here = ours[ours["temperature"] == temperature]
            there = theirs[theirs["temperature"] == temperature]
            # no room for methods that nothing is told of at this temperature
            told_of = {*here["method"], *there["method"]}
            colours = {m: c for m, c in _colours(ours["method"]).items() if m in told_of}
            _grouped_bars(axes, here, metric, prompts, colours)
            _hollow_over_bars(axes, there, metric, prompts, colours, theirs)
            axes.set_xlabel(f"prompt set (temperature {temperature:g})")
        line[0].set_ylabel(labels[metric])
    _legend(figure, _method_handles(ours) + _model_handles(theirs), 3 * len(temperatures))
    _footnote(figure, ours)
    return figure


def _grouped_bars(
    axes: Axes, rows: pd.DataFrame, metric: str, prompts: list[str], colours: dict[str, str]
) -> None:
    """One bar per method at every prompt set, side by side, with its interval."""
    for index, (method, colour) in enumerate(colours.items()):
        mine = rows[rows["method"] == method].set_index("prompts").reindex(prompts)
        width = _bar_width(len(colours))
        positions = np.arange(len(prompts)) + (index - (len(colours) - 1) / 2) * width
        heights = mine[metric].astype(float)
        hatches = ["////" if committed else "" for committed in _is_committed(mine)]
        look = {"color": colour, "edgecolor": "white", "linewidth": 0.5, "hatch": hatches}
        axes.bar(positions, heights, width, **look)
        low, high = _interval(mine, metric)
        errors = np.clip([heights - low, high - heights], 0, None)
        axes.errorbar(positions, heights, errors, fmt="none", ecolor="black", elinewidth=0.9)
    axes.axhline(1, **_DASHED)
    axes.set_xticks(range(len(prompts)), [PROMPT_SETS.get(name, name) for name in prompts])
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    axes.set_xlim(-0.6, len(prompts) - 0.4)
    if prompts[-1] == "mean" and len(prompts) > 1:
        axes.axvline(len(prompts) - 1.5, color="#c8c8c8", linewidth=0.8)


def _bar_width(num_methods: int) -> float:
    return min(0.8 / num_methods, 0.36)


def _is_committed(rows: pd.DataFrame) -> pd.Series:
    """Rows that were not measured in this run; they are hatched."""
    source = rows["source"] if "source" in rows else pd.Series(MEASURED_NOW, index=rows.index)
    return source.fillna(MEASURED_NOW) != MEASURED_NOW


def _measured_now_first(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Where a mark was measured in this run, leave out the committed rows for it."""
    is_now = ~_is_committed(rows)
    has_now = is_now.groupby([rows[key] for key in keys]).transform("any")
    return rows[is_now | ~has_now]


def _hollow_over_bars(
    axes: Axes,
    reported: pd.DataFrame,
    metric: str,
    prompts: list[str],
    colours: dict[str, str],
    theirs: pd.DataFrame,
) -> None:
    """The paper's values where our bars stand; the marker says which model they are from."""
    models, width = _models(theirs), _bar_width(len(colours))
    for _, cell in reported.dropna(subset=[metric]).iterrows():
        if cell["prompts"] in prompts:
            bar = (list(colours).index(cell["method"]) - (len(colours) - 1) / 2) * width
            beside = list(dict.fromkeys(theirs["model"][theirs["method"] == cell["method"]]))
            aside = (beside.index(cell["model"]) + 0.5) / len(beside) - 0.5
            place = prompts.index(cell["prompts"]) + bar + aside * 0.8 * width
            _hollow_mark(axes, place, cell[metric], models[cell["model"]], colours[cell["method"]])


def _hollow_mark(axes: Axes, x: float, y: float, marker: str, colour: str) -> None:
    """White beneath, so that a mark is seen on a bar of its own colour."""
    look = {"markerfacecolor": "none", "markersize": 5.5, "zorder": 5}
    for edge, width in (("white", 3.0), (_darker(colour), 1.3)):
        axes.plot(x, y, marker, markeredgecolor=edge, markeredgewidth=width, **look)


def _reported_beside(ours: pd.DataFrame, reported: pd.DataFrame | None) -> pd.DataFrame:
    """The paper's own decoding cells for the methods, prompt sets and temperatures we measured."""
    keys = ["model", "method", "prompts", "temperature"]
    if reported is None or reported.empty:
        return pd.DataFrame(columns=[*keys, "speedup", "tau"])
    theirs = reported.reindex(columns=[*keys, "speedup", "tau", "quantity", "by"])
    is_decoding = theirs["quantity"].fillna("decode") == "decode"
    theirs = theirs[is_decoding & (theirs["by"].fillna("authors") == "authors")]
    for column in ("method", "prompts", "temperature"):
        theirs = theirs[theirs[column].isin(ours[column].unique())]
    return theirs.drop_duplicates(keys)


def acceptance_by_depth(rows: pd.DataFrame, reported: pd.DataFrame | None = None) -> Figure:
    """How often the token drafted at each depth is accepted, once those above it were."""
    ours = _of_quantity(rows, "acceptance_by_depth", ["method", "depth", "value"])
    with style():
        figure = _figure(6.8, 3.2)
        axes = figure.subplots()
        handles = _banded_lines(axes, ours, "depth", "value")
        if reported is not None and "depth" in reported:
            theirs = reported[reported["quantity"] == "acceptance_by_depth"]
            handles += _hollow_lines(axes, theirs, "depth", "value", handles)
        deepest = max(max(line.get_xdata()) for line in handles)
        axes.set_xticks(range(1, int(deepest) + 1))
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("depth of the drafted token (1 is the first drafted)")
        axes.set_ylabel("acceptance rate (fraction)")
        _legend_beside(figure, handles)
        _footnote(figure, ours)
    return figure


def _hollow_lines(
    axes: Axes, theirs: pd.DataFrame, along: str, metric: str, measured: list[Line2D]
) -> list[Line2D]:
    """The paper's curves, dotted between hollow marks; grey for a method not measured here."""
    handles = []
    curves = theirs.dropna(subset=[along, metric]).groupby(["model", "method"], sort=False)
    for (model, method), curve in curves:
        curve = curve.sort_values(along)
        about = ", read off" if curve["approximate"].any() else ""
        own = [line for line in measured if str(line.get_label()).split(", ")[0] == method]
        colour = own[0].get_color() if own else "#606060"
        marker = HOLLOW_MARKERS[len(handles) % len(HOLLOW_MARKERS)]
        look = {"color": colour, "marker": marker, "markerfacecolor": "none", "markersize": 6}
        label = f"paper: {method}\n({model}{about})"
        handles += axes.plot(curve[along], curve[metric], linestyle=":", label=label, **look)
    return handles


def round_parts(rows: pd.DataFrame) -> Figure:
    """Where the time of one round goes, a stacked bar per method."""
    ours = _of_quantity(rows, "round_seconds", ["method", "part", "value"])
    unknown = sorted(set(ours["part"]) - set(ROUND_PARTS))
    if unknown:
        raise ValueError(f"unknown parts of a round {unknown}; known: {', '.join(ROUND_PARTS)}")
    with style():
        series = dict(_series(ours))
        figure = _figure(6.4, 1.25 + 0.42 * len(series))
        axes = figure.subplots()
        for position, line in enumerate(series.values()):
            _refuse_repeats(line, ["part"])
            _stacked_bar(axes, position, line.set_index("part")["value"])
        axes.set_yticks(range(len(series)), list(series))
        axes.set_ylim(len(series) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.set_xlabel("time per round (ms)")
        axes.set_ylabel("method")
        axes.grid(False, axis="y")
        present = [part for part in ROUND_PARTS if part in set(ours["part"])]
        _legend(figure, [_patch(*ROUND_PARTS[part]) for part in present], columns=len(present))
        _footnote(figure, ours)
    return figure


def _stacked_bar(axes: Axes, position: int, milliseconds: pd.Series) -> None:
    """Parts in the order of a round, the total written behind the bar."""
    start = 0.0
    for part, (_, colour) in ROUND_PARTS.items():
        width = float(milliseconds.get(part, 0.0))
        look = {"color": colour, "edgecolor": "white", "linewidth": 0.3}
        axes.barh(position, width, 0.62, left=start, **look)
        start += width
    axes.annotate(
        f"{start:.3g}", (start, position), (4, 0), textcoords="offset points", va="center"
    )


def pass_cost(rows: pd.DataFrame) -> Figure:
    """What a target pass costs against its number of tokens: in ms, and relative to one token."""
    ours = _of_quantity(rows, "pass_cost", ["num_tokens", "value"])
    with style():
        figure = _figure(8.2, 3.0)
        absolute, relative = figure.subplots(1, 2)
        handles = _banded_lines(absolute, ours, "num_tokens", "value", leave_out=("method",))
        fewest = ours["num_tokens"].min()
        scaled = _relative_to_fewest(ours)
        _banded_lines(relative, scaled, "num_tokens", "relative", leave_out=("method",))
        _token_axis(absolute, ours)
        _token_axis(relative, ours)
        absolute.set_ylabel("time of a target pass (ms)")
        absolute.set_ylim(bottom=0)
        one = "one token" if fewest == 1 else f"{fewest:g} tokens"
        relative.set_ylabel(f"cost (times that of {one})")
        relative.set_ylim(bottom=0)
        relative.axhline(1, **_DASHED)
        _legend(figure, [*handles, Line2D([], [], label=f"as cheap as {one}", **_DASHED)])
        _footnote(figure, ours)
    return figure


def _relative_to_fewest(rows: pd.DataFrame) -> pd.DataFrame:
    """Each series divided by its own value at the fewest tokens."""
    parts = []
    for _, line in _series(rows, leave_out=("method",)):
        one = line.sort_values("num_tokens")["value"].iloc[0]
        low, high = _interval(line, "value")
        columns = {"relative": line["value"], "relative_low": low, "relative_high": high}
        parts.append(line.assign(**{name: column / one for name, column in columns.items()}))
    return pd.concat(parts)


def _token_axis(axes: Axes, rows: pd.DataFrame) -> None:
    """Tokens on a scale of doublings, a tick at each measured power of two."""
    measured = sorted(rows["num_tokens"].unique())
    ticks = [number for number in measured if float(np.log2(number)).is_integer()] or measured
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens in the pass")


def tree_sweep(rows: pd.DataFrame) -> Figure:
    """Tau, and speedup where measured, against the size of the tree, a line per depth."""
    ours = _of_quantity(rows, "sweep", ["total_tokens", "draft_depth", "tau"])
    labels = {"tau": TAU, "speedup": SPEEDUP}
    metrics = [name for name in labels if name in ours and ours[name].notna().any()]
    with style():
        figure = _figure(0.6 + 3.8 * len(metrics), 3.2)
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        handles = [_depth_lines(*pair, ours) for pair in zip(panels, metrics, strict=True)][0]
        for axes, metric in zip(panels, metrics, strict=True):
            axes.set_xticks(sorted(ours["total_tokens"].unique()))
            axes.set_xlabel("tokens in the tree, root included")
            axes.set_ylabel(labels[metric])
        if "speedup" in metrics:
            panels[-1].axhline(1, **_DASHED)
            handles.append(Line2D([], [], label="autoregressive decoding", **_DASHED))
        _legend(figure, handles)
        _footnote(figure, ours)
    return figure


def _depth_lines(axes: Axes, metric: str, rows: pd.DataFrame) -> list[Line2D]:
    """Deeper is darker; what else varies (branching, method, ...) changes the dashes.

    `draft_depth` counts what follows the first level, as the papers' code does.
    """
    depths = sorted(rows["draft_depth"].unique())
    shades = seaborn.color_palette("viridis_r", len(depths) + 1).as_hex()[1:]
    dashes, handles = ["-", "--", ":", "-."], []
    leave_out = ("method",) if rows["method"].nunique() == 1 else ()
    for index, (label, line) in enumerate(_series(rows, ("top_k",), leave_out)):
        for depth, shade in zip(depths, shades, strict=True):
            curve = line[line["draft_depth"] == depth].dropna(subset=[metric])
            if curve.empty:
                continue
            name = f"{depth + 1:g} levels" + (f", {label}" if label else "")
            handles.append(_banded_line(axes, curve, "total_tokens", metric, shade, name))
            handles[-1].set_linestyle(dashes[index % len(dashes)])
    return handles


def _banded_lines(
    axes: Axes, rows: pd.DataFrame, along: str, metric: str, leave_out: tuple[str, ...] = ()
) -> list[Line2D]:
    """A line with its band for every combination of the descriptive columns that vary."""
    series = list(_series(rows, leave_out=leave_out))
    colours = _colours(pd.Series([label for label, _ in series]))
    return [
        _banded_line(axes, line, along, metric, colours[label], label or "measured here")
        for label, line in series
    ]


def _banded_line(
    axes: Axes, rows: pd.DataFrame, along: str, metric: str, colour: str, label: str
) -> Line2D:
    rows = rows.sort_values(along)
    _refuse_repeats(rows, [along])
    low, high = _interval(rows, metric)
    axes.fill_between(rows[along], low, high, color=colour, alpha=0.18, linewidth=0)
    return axes.plot(rows[along], rows[metric], marker="o", color=colour, label=label)[0]


def _series(
    rows: pd.DataFrame, more: tuple[str, ...] = (), leave_out: tuple[str, ...] = ()
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Split rows by the method and the descriptive columns that vary; the label names those."""
    columns = [c for c in (*_DESCRIPTIVE, *more) if c in rows and c not in leave_out]
    varying = [c for c in columns if c == "method" or rows[c].nunique(dropna=False) > 1]
    if not varying:
        yield "", rows
        return
    for values, line in rows.groupby(varying, sort=False, dropna=False):
        named = zip(varying, values, strict=True)
        yield ", ".join(_words(column, value) for column, value in named), line


def _words(column: str, value: Any) -> str:
    """A value as a legend says it."""
    short = {"temperature": "T = ", "batch": "batch ", "top_k": "top "}
    if column in short and pd.notna(value):
        return f"{short[column]}{value:g}"
    return str(value) if pd.notna(value) else f"no {column}"


def _of_quantity(rows: pd.DataFrame, quantity: str, needed: list[str]) -> pd.DataFrame:
    """The rows that measure one quantity, complete in the columns that are drawn."""
    if "quantity" not in rows:
        rows = rows.assign(quantity="decode")
    found = rows[rows["quantity"].fillna("decode") == quantity]
    if found.empty:
        have = ", ".join(sorted(rows["quantity"].dropna().unique())) or "nothing"
        raise ValueError(f"no rows of quantity {quantity!r}; these rows hold {have}")
    absent = [name for name in needed if name not in found or found[name].isna().all()]
    if absent:
        raise ValueError(f"rows of quantity {quantity!r} lack {', '.join(absent)}")
    found = found.dropna(subset=needed).dropna(axis="columns", how="all")
    if found.empty:
        raise ValueError(f"no row of quantity {quantity!r} holds all of {', '.join(needed)}")
    return found if "method" in found else found.assign(method="target")


def _refuse_repeats(rows: pd.DataFrame, keys: list[str]) -> None:
    """Two values for one mark cannot both be drawn, and choosing silently would mislead."""
    repeated = rows[rows.duplicated(keys, keep=False)]
    if repeated.empty:
        return
    clash = repeated[(repeated[keys] == repeated[keys].iloc[0]).all(axis="columns")]
    names = ("batch", "dtype", "tier", "seed", "device", "target", "source", "commit", "top_k")
    differing = [name for name in names if name in clash and clash[name].nunique(dropna=False) > 1]
    where = ", ".join(f"{key} {clash[key].iloc[0]}" for key in keys)
    raise ValueError(
        f"{len(clash)} rows for {where}: they differ in "
        f"{', '.join(differing) or 'no known column'}; choose among them before drawing"
    )


def _interval(rows: pd.DataFrame, metric: str) -> tuple[pd.Series, pd.Series]:
    """The 95 % interval, missing where the rows carry none."""
    bounds = rows.reindex(columns=[f"{metric}_low", f"{metric}_high"]).astype(float)
    return bounds.iloc[:, 0], bounds.iloc[:, 1]


def _colours(names: pd.Series) -> dict[str, str]:
    """A colour per name in order of appearance; a few methods keep theirs in every figure."""
    distinct = list(dict.fromkeys(names))
    fixed = {name: _FIXED_COLOURS[name] for name in distinct if name in _FIXED_COLOURS}
    free = [colour for colour in PALETTE if colour not in fixed.values()]
    others = [name for name in distinct if name not in fixed]
    given = {name: free[index % len(free)] for index, name in enumerate(others)}
    return {name: (fixed | given)[name] for name in distinct}


def _darker(colour: str) -> tuple[float, ...]:
    return tuple(0.55 * part for part in matplotlib.colors.to_rgb(colour))


def _models(reported: pd.DataFrame) -> dict[str, str]:
    """A hollow marker for every model of the paper."""
    distinct = dict.fromkeys(reported["model"])
    return {name: HOLLOW_MARKERS[i % len(HOLLOW_MARKERS)] for i, name in enumerate(distinct)}


def _patch(label: str, colour: str) -> Patch:
    return Patch(facecolor=colour, edgecolor="white", label=label)


def _method_handles(rows: pd.DataFrame) -> list[Patch | Line2D]:
    handles: list[Patch | Line2D] = [_patch(*item) for item in _colours(rows["method"]).items()]
    if _is_committed(rows).any():
        hatched = {"facecolor": "#b0b0b0", "edgecolor": "white", "hatch": "////"}
        handles.append(Patch(label="not measured in this run", **hatched))
    return [*handles, Line2D([], [], label="autoregressive decoding", **_DASHED)]


def _model_handles(reported: pd.DataFrame) -> list[Line2D]:
    look = {"linestyle": "none", "markersize": 5.5, "markerfacecolor": "none"}
    look |= {"markeredgecolor": "#404040", "markeredgewidth": 1.3}
    return [
        Line2D([], [], marker=marker, label=f"paper, {model}", **look)
        for model, marker in _models(reported).items()
    ]


def _figure(width: float, height: float) -> Figure:
    """An empty figure (inches) whose panels, labels and legends make room for each other."""
    figure = _ShownInNotebooks(figsize=(width, height))
    figure.set_layout_engine("constrained", wspace=0.05, hspace=0.05)
    return figure


def _legend(figure: Figure, handles: list[Any], columns: int = 4) -> None:
    """Above the panels, where it hides no data."""
    columns = min(columns, len(handles))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)


def _legend_beside(figure: Figure, handles: list[Any]) -> None:
    figure.legend(handles=handles, loc="outside right center")


def _lines_along(
    ours: pd.DataFrame,
    along: str,
    label: str,
    metrics: Mapping[str, str],
    series: str,
    theirs: pd.DataFrame | None = None,
    is_doubling: bool = True,
) -> Figure:
    """A panel for each metric (column -> label), a line for each value of the column `series`."""
    colours = _colours(ours[series])
    with style():
        figure = _figure(0.6 + 3.8 * len(metrics), 3.4)
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        handles: dict[str, Line2D] = {}
        for axes, (metric, named) in zip(panels, metrics.items(), strict=True):
            for name, line in ours.dropna(subset=[metric]).groupby(series, sort=False):
                handles[name] = _banded_line(axes, line, along, metric, colours[name], name)
            if theirs is not None and metric in theirs:
                drawn = _hollow_lines(axes, theirs, along, metric, list(handles.values()))
                handles |= {line.get_label(): line for line in drawn}
            if metric == "speedup":
                axes.axhline(1, **_DASHED)
            _tick_at(axes, ours[along], is_doubling)
            axes.set_xlabel(label)
            axes.set_ylabel(named)
        _legend(figure, list(handles.values()))
        _footnote(figure, ours)
    return figure


def _of_table(
    reported: pd.DataFrame | None, table: str, quantity: str | None = None
) -> pd.DataFrame | None:
    """One reported table, under another quantity where it is drawn as such."""
    if reported is None or not len(found := reported[reported["table"] == table]):
        return None
    return found.assign(quantity=quantity) if quantity else found


def _tick_at(axes: Axes, values: pd.Series, is_doubling: bool = True) -> None:
    """Ticks at the values that there are, on a scale of doublings or an even one."""
    ticks = sorted(values.dropna().unique())
    if is_doubling:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _footnote(figure: Figure, rows: pd.DataFrame) -> None:
    """Where the rows come from: source, tier, device, dtype, and how many prompts."""
    parts = []
    for column in ("source", "tier", "target", "device", "dtype"):
        values = rows[column].dropna().unique() if column in rows else []
        named = " and ".join(str(value) for value in values)
        parts += [f"tier {named}" if column == "tier" else named] if named else []
    counts = rows["num_prompts"].dropna() if "num_prompts" in rows else pd.Series(dtype=float)
    if len(counts):
        fewest, most = int(counts.min()), int(counts.max())
        parts.append(f"{fewest} prompts" if fewest == most else f"{fewest} to {most} prompts")
    if parts:
        figure.supxlabel(" · ".join(parts), fontsize=7, color="#555555")


def drafted_tree(
    labels: list[str], parents: list[int], path: list[int], mask: np.ndarray
) -> Figure:
    """A drafted tree with its accepted path, and beside it which node sees which.

    `labels` and `parents` name each node and its parent (-1 at the root, -2 at padding), `path` the
    accepted nodes, root included; `mask` (nodes, nodes) is true where the row's node sees the
    column's.
    """
    nodes = [node for node, parent in enumerate(parents) if parent >= -1]
    _refuse_nothing("nodes", nodes)
    across, down = _tree_layout([parents[node] for node in nodes])
    with style():
        figure = _figure(8.2, 3.4)
        graph, matrix = figure.subplots(1, 2, width_ratios=[1.5, 1])
        for node in nodes[1:]:
            parent, is_kept = parents[node], node in path
            line = {"color": PALETTE[0] if is_kept else "#b0b0b0", "linewidth": 2 if is_kept else 1}
            graph.plot([across[parent], across[node]], [down[parent], down[node]], zorder=1, **line)
        for node in nodes:
            face = PALETTE[0] if node in path else "white"
            graph.scatter(across[node], down[node], 330, face, edgecolors="#606060", zorder=2)
            ink = "white" if node in path else "black"
            look = {"ha": "center", "va": "center", "fontsize": 7, "color": ink, "zorder": 3}
            graph.annotate(labels[node], (across[node], down[node]), **look)
        graph.set_ylim(max(down) + 0.6, -0.6)
        graph.set_yticks(range(int(max(down)) + 1))
        graph.set_xticks([])
        graph.set_ylabel("depth (tokens behind the root)")
        graph.grid(False)
        matrix.imshow(mask, cmap="Blues", vmin=0, vmax=1.6)
        matrix.set_xlabel("key of node")
        matrix.set_ylabel("query of node")
        matrix.grid(False)
        kept = Line2D([], [], color=PALETTE[0], linewidth=2, label="accepted path")
        _legend(figure, [kept, _patch("sees", matplotlib.colormaps["Blues"](0.62))])
    return figure


def _refuse_nothing(what: str, things: Sized) -> None:
    if len(things) == 0:
        raise ValueError(f"there are no {what} to draw")


def _tree_layout(parents: list[int]) -> tuple[list[float], list[int]]:
    """Leaves side by side in the order of a walk, every parent over the middle of its children."""
    children: list[list[int]] = [[] for _ in parents]
    down = [0] * len(parents)
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
        down[node] = down[parent] + 1
    across, open_nodes, num_leaves = [0.0] * len(parents), [0], 0
    while open_nodes:
        node = open_nodes.pop()
        open_nodes += reversed(children[node])
        if not children[node]:
            across[node] = num_leaves
            num_leaves += 1
    for node in reversed(range(len(parents))):
        if children[node]:
            across[node] = float(np.mean([across[child] for child in children[node]]))
    return across, down


def residuals(labels: list[str], steps: dict[str, np.ndarray]) -> Figure:
    """A target's distribution and what rejected drafts leave of it, a panel for each step."""
    _refuse_nothing("steps", steps)
    with style():
        figure = _figure(1.2 + 2.2 * len(steps), 2.6)
        panels = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
        for axes, (name, masses), colour in zip(panels, steps.items(), PALETTE * 3, strict=False):
            axes.bar(range(len(labels)), masses, 0.75, color=colour)
            axes.set_xticks(range(len(labels)), labels)
            axes.set_xlabel(f"token\n{name}")
            axes.grid(False, axis="x")
        panels[0].set_ylabel("probability")
    return figure


def split_shares(starts: list[int], shares: np.ndarray, unit: str = "slot") -> Figure:
    """How much of each query row's attention falls into each split of the keys."""
    _refuse_nothing("splits", starts)
    _refuse_nothing("query rows", shares)
    with style():
        figure = _figure(6.4, 2.6)
        axes = figure.subplots()
        bottom = np.zeros(shares.shape[0])
        for place, start in enumerate(starts):
            label = f"from {unit} {start}"
            axes.bar(range(len(bottom)), shares[:, place], 0.8, bottom, label=label)
            bottom = bottom + shares[:, place]
        axes.set_xlabel("node")
        axes.set_ylabel("share of the attention")
        _legend(figure, axes.get_legend_handles_labels()[0], columns=6)
    return figure


MODELLED = {  # columns of `kernel_report.roofline`, and what they say
    "megabytes": "moved, partial\nresults too (MB)",
    "gigaoperations": "operations (billions)",
    "modelled_floor_us": "modelled floor (µs)",
}


def modelled_roofline(rows: pd.DataFrame) -> Figure:
    """What one attention layer moves and computes, and the least time that it can take.

    A column of panels for each card, a line for each way to attend. `rows` as from
    `kernel_report.roofline`: what the numbers say is modelled, never measured.
    """
    _refuse_nothing("rows", rows)
    with style():
        cards = list(rows["card"].unique())
        figure = _figure(1.2 + 2.4 * len(cards), 1.0 + 1.8 * len(MODELLED))
        panels = figure.subplots(
            len(MODELLED), len(cards), sharex=True, sharey="row", squeeze=False
        )
        for row, (column, label) in zip(panels, MODELLED.items(), strict=True):
            for axes, card in zip(row, cards, strict=True):
                _lines_by_context(axes, rows[rows["card"] == card], column)
            row[0].set_ylabel(label)
        for axes, card in zip(panels[-1], cards, strict=True):
            axes.set_xlabel(f"cached tokens\n{card}")
        _legend(figure, panels[0, 0].get_legend_handles_labels()[0], columns=2)
    return figure


def _lines_by_context(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    """A line for each way to attend, both axes logarithmic."""
    contexts = sorted(rows["context"].unique())
    lines = rows.groupby("attention", sort=False)
    for (name, line), colour in zip(lines, PALETTE * 3, strict=False):
        look = {"color": colour, "marker": "o", "markersize": 4, "label": name}
        axes.plot(line["context"], line[column], **look)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, contexts)
