"""Figures draw what the rows say, the paper's values beside them, the same bytes every time."""

from io import StringIO

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from specrepro import figures

COMMON = {"batch": 1, "dtype": "float32", "tier": "laptop", "num_prompts": 8, "device": "CPU"}
COMMON |= {"source": figures.MEASURED_NOW, "target": "tiny"}


def decoding(method: str, prompts: str, temperature: float, tau: float, **columns) -> dict:
    row = {"quantity": "decode", "method": method, "prompts": prompts, "temperature": temperature}
    row |= {"tau": tau, "tau_low": 0.9 * tau, "tau_high": 1.2 * tau}
    row |= {"speedup": tau / 2, "speedup_low": 0.4 * tau, "speedup_high": 0.6 * tau}
    return COMMON | row | columns


def measured(quantity: str, value: float, **columns) -> dict:
    ends = {"value": value, "value_low": 0.9 * value, "value_high": 1.1 * value}
    where = {"quantity": quantity, "method": "EAGLE-3", "prompts": "chat", "temperature": 0}
    return COMMON | where | ends | columns


ROWS = pd.DataFrame(
    [
        decoding(method, prompts, temperature, tau + place / 4)
        for method, tau in (("Autoregressive", 1), ("EAGLE-3", 3), ("PLD", 2))
        for place, prompts in enumerate(("chat", "humaneval", "mean"))
        for temperature in (0, 1)
    ]
    + [measured("acceptance_by_depth", 0.8 - depth / 20, depth=depth) for depth in (1, 2, 3)]
    + [
        measured("round_seconds", milliseconds, part=part)
        for part, milliseconds in {"target": 60, "draft": 20, "tree": 3, "verify": 1}.items()
    ]
    + [measured("pass_cost", 50 + tokens, num_tokens=tokens) for tokens in (1, 4, 16, 24)]
    + [
        decoding("EAGLE-3", "mean", 0, depth + tokens / 20, quantity="sweep")
        | {"draft_depth": depth, "total_tokens": tokens, "top_k": 8}
        for depth in (3, 5)
        for tokens in (8, 16, 32)
    ]
)
REPORTED = pd.DataFrame(
    [
        {"quantity": "decode", "by": "authors", "model": model, "method": "EAGLE-3"}
        | {"prompts": prompts, "temperature": 0, "speedup": 4.4, "tau": 6.1, "approximate": False}
        for model in ("Llama-3.1-8B", "Vicuna-13B")
        for prompts in ("chat", "mean", "instruction")
    ]
    + [
        {"quantity": "acceptance_by_depth", "by": "authors", "model": "Llama-3.1-8B"}
        | {"method": method, "depth": depth, "value": 0.8, "approximate": True}
        for method in ("EAGLE-3", "EAGLE")
        for depth in (1, 8)
    ]
)
DRAWINGS = {
    "speedup_and_tau": (figures.speedup_and_tau, "decode"),
    "acceptance_by_depth": (figures.acceptance_by_depth, "acceptance_by_depth"),
    "round_parts": (figures.round_parts, "round_seconds"),
    "pass_cost": (figures.pass_cost, "pass_cost"),
    "tree_sweep": (figures.tree_sweep, "sweep"),
}


def hollow_marks(figure: Figure) -> list[tuple[float, float]]:
    """The places of the coloured outlines without a filling."""
    lines = [line for axes in figure.axes for line in axes.lines]
    hollow = [line for line in lines if line.get_markerfacecolor() == "none"]
    outlines = [line for line in hollow if line.get_markeredgecolor() != "white"]
    return [place for line in outlines for place in zip(*line.get_data(), strict=True)]


def legend_labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def bar_heights(figure: Figure, panel: int) -> list[list[float]]:
    containers = figure.axes[panel].containers
    bars = [container for container in containers if isinstance(container, BarContainer)]
    return [[round(patch.get_height(), 6) for patch in container] for container in bars]


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_figure_draws_from_rows_that_went_through_csv(name):
    rows = pd.read_csv(StringIO(ROWS.to_csv(index=False)))
    figure = DRAWINGS[name][0](rows)
    assert isinstance(figure, Figure) and figure.legends, "the legend stands outside the panels"
    for axes in figure.axes:
        leftmost = axes.get_subplotspec().is_first_col()  # the others may share its scale
        assert axes.has_data() and axes.get_xlabel()
        assert axes.get_ylabel() or not leftmost
        assert not axes.get_title() and axes.get_legend() is None


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_same_rows_give_the_same_bytes(name, tmp_path):
    draw, _ = DRAWINGS[name]
    first = figures.save(draw(ROWS), tmp_path / "a", name)
    second = figures.save(draw(ROWS.copy()), tmp_path / "b", name)
    assert first == tmp_path / "a" / f"{name}.png"
    assert first.read_bytes() == second.read_bytes()
    assert b"matplotlib" not in first.read_bytes().lower()


def test_other_rows_give_other_bytes(tmp_path):
    changed = ROWS.assign(tau=ROWS["tau"] * 1.1)
    before = figures.save(figures.speedup_and_tau(ROWS), tmp_path, "before")
    after = figures.save(figures.speedup_and_tau(changed), tmp_path, "after")
    assert before.read_bytes() != after.read_bytes()


@pytest.mark.parametrize("name", DRAWINGS)
def test_missing_rows_are_named(name):
    draw, quantity = DRAWINGS[name]
    others = ROWS[ROWS["quantity"] != quantity]
    with pytest.raises(ValueError, match=f"no rows of quantity '{quantity}'"):
        draw(others)
    with pytest.raises(ValueError, match="these rows hold nothing"):
        draw(pd.DataFrame({"quantity": []}))


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="quantity 'sweep' lack draft_depth"):
        figures.tree_sweep(ROWS.drop(columns="draft_depth"))


def test_bars_are_as_high_as_the_rows_and_leave_out_autoregressive_decoding():
    figure = figures.speedup_and_tau(ROWS)
    assert len(figure.axes) == 4, "speedup and tau, at two temperatures"
    assert bar_heights(figure, 0) == [[1.5, 1.625, 1.75], [1.0, 1.125, 1.25]]
    assert bar_heights(figure, 2) == [[3.0, 3.25, 3.5], [2.0, 2.25, 2.5]]


def test_whiskers_are_the_95_percent_interval():
    figure = figures.speedup_and_tau(ROWS[ROWS["method"] == "EAGLE-3"])
    (whiskers,) = figure.axes[2].collections[:1]
    lowest, highest = whiskers.get_segments()[0][:, 1]
    assert (lowest, highest) == pytest.approx((0.9 * 3, 1.2 * 3))


def test_the_papers_value_is_a_hollow_marker_and_the_legend_names_its_model():
    assert hollow_marks(figures.speedup_and_tau(ROWS)) == []
    figure = figures.speedup_and_tau(ROWS, REPORTED)
    # two models, chat and mean, speedup and tau; we measured no instruction prompts
    assert sorted(y for _, y in hollow_marks(figure)) == [4.4] * 4 + [6.1] * 4
    labels = legend_labels(figure)
    assert "paper, Llama-3.1-8B" in labels and "paper, Vicuna-13B" in labels


def test_a_method_of_one_temperature_leaves_no_gap_at_another_but_for_the_papers_values():
    both = ROWS[(ROWS["method"] != "PLD") | (ROWS["temperature"] == 1)]
    one, other = (figures.speedup_and_tau(part).axes[0].patches for part in (both, ROWS))
    (lone,) = {round(patch.get_width(), 3) for patch in one}
    assert lone > {round(patch.get_width(), 3) for patch in other}.pop() - 1e-9
    assert [round(p.get_x() + lone / 2, 6) for p in one] == [0, 1, 2], "where the labels are"
    theirs = REPORTED.assign(method="PLD")
    places = hollow_marks(figures.speedup_and_tau(both, theirs))
    assert sorted(y for _, y in places) == [4.4] * 4 + [6.1] * 4


def test_hollow_markers_of_two_models_do_not_hide_each_other():
    places = hollow_marks(figures.speedup_and_tau(ROWS, REPORTED))
    assert len({x for x, y in places if y == 4.4}) == 4


def test_what_others_measured_is_not_drawn_as_the_papers():
    others = REPORTED.assign(by="others")
    assert hollow_marks(figures.speedup_and_tau(ROWS, others)) == []


def test_acceptance_shows_the_papers_curves_hollow_and_says_they_were_read_off():
    figure = figures.acceptance_by_depth(ROWS, REPORTED)
    assert sorted(x for x, _ in hollow_marks(figure)) == [1, 1, 8, 8]
    labels = legend_labels(figure)
    assert "EAGLE-3" in labels
    assert "paper: EAGLE\n(Llama-3.1-8B, read off)" in labels


def test_two_rows_for_one_bar_are_refused_and_the_difference_named():
    doubled = pd.DataFrame(
        [decoding("EAGLE-3", "chat", 0, 3), decoding("EAGLE-3", "chat", 0, 2, dtype="bfloat16")]
    )
    with pytest.raises(ValueError, match="2 rows for method EAGLE-3.* differ in dtype"):
        figures.speedup_and_tau(doubled)


def test_rows_measured_now_replace_committed_ones_and_the_rest_is_hatched():
    committed = {"source": "committed full rows"}
    rows = pd.DataFrame(
        [
            decoding("EAGLE-3", "chat", 0, 3),
            decoding("EAGLE-3", "chat", 0, 9, **committed),
            decoding("EAGLE-3", "mean", 0, 4, **committed),
        ]
    )
    figure = figures.speedup_and_tau(rows)
    assert bar_heights(figure, 1) == [[3.0, 4.0]]
    assert [bool(patch.get_hatch()) for patch in figure.axes[1].containers[0]] == [False, True]
    assert "not measured in this run" in legend_labels(figure)


def test_a_smoke_run_of_one_row_without_an_interval_is_drawn():
    lone = decoding("EAGLE-3", "chat", 0, 3)
    bare = {name: value for name, value in lone.items() if not name.endswith(("_low", "_high"))}
    figure = figures.speedup_and_tau(pd.DataFrame([bare]), REPORTED)
    assert bar_heights(figure, 1) == [[3.0]]


def test_a_smoke_run_of_one_point_is_drawn(tmp_path):
    for quantity, draw in (("pass_cost", figures.pass_cost), ("sweep", figures.tree_sweep)):
        figure = draw(ROWS[ROWS["quantity"] == quantity].head(1))
        assert figures.save(figure, tmp_path, quantity).stat().st_size > 5000


def test_the_parts_of_a_round_add_up_to_the_written_total():
    axes = figures.round_parts(ROWS).axes[0]
    assert sum(patch.get_width() for patch in axes.patches) == pytest.approx(84)
    assert [text.get_text() for text in axes.texts] == ["84"]


def test_an_unknown_part_of_a_round_is_refused():
    rows = pd.DataFrame([measured("round_seconds", 3.0, part="tea")])
    with pytest.raises(ValueError, match=r"unknown parts of a round \['tea'\]"):
        figures.round_parts(rows)


def test_the_cost_of_a_pass_is_also_read_relative_to_one_token():
    absolute, relative = figures.pass_cost(ROWS).axes
    assert list(absolute.lines[0].get_ydata()) == [51, 54, 66, 74]
    assert list(relative.lines[0].get_ydata()) == pytest.approx([1, 54 / 51, 66 / 51, 74 / 51])


def test_the_sweep_draws_a_line_per_depth_and_leaves_out_what_was_not_timed():
    assert len(figures.tree_sweep(ROWS).axes) == 2
    untimed = figures.tree_sweep(ROWS.drop(columns="speedup"))
    (panel,) = untimed.axes
    assert legend_labels(untimed) == ["4 levels", "6 levels"]
    assert [list(line.get_xdata()) for line in panel.lines] == [[8, 16, 32]] * 2


def test_a_series_that_differs_by_temperature_says_so():
    rows = pd.DataFrame(
        [measured("acceptance_by_depth", 0.7, depth=1, temperature=t) for t in (0, 1)]
    )
    labels = legend_labels(figures.acceptance_by_depth(rows))
    assert labels == ["EAGLE-3, T = 0", "EAGLE-3, T = 1"]


def test_a_notebook_can_show_a_figure():
    assert figures.round_parts(ROWS)._repr_png_().startswith(b"\x89PNG")


def test_drawing_leaves_the_callers_style_alone():
    with matplotlib.rc_context({"font.size": 31}):
        before = dict(matplotlib.rcParams)
        figures.tree_sweep(ROWS)
        assert dict(matplotlib.rcParams) == before


PARENTS = [-1, 0, 0, 1, -2]
MASK = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [0] * 5])


def drawn_tree() -> Figure:
    return figures.drafted_tree(["a", "b", "c", "d", ""], PARENTS, [0, 1, 3], MASK)


def test_a_drafted_tree_shows_its_tokens_by_depth_and_its_accepted_path():
    graph, _ = drawn_tree().axes
    places = {text.get_text(): text.xy for text in graph.texts}
    assert {label: depth for label, (_, depth) in places.items()} == {
        "a": 0,
        "b": 1,
        "c": 1,
        "d": 2,
    }
    assert places["b"][0] < places["c"][0] and places["b"][0] == places["d"][0]
    assert places["a"][0] == (places["b"][0] + places["c"][0]) / 2, (
        "a parent stands over the middle"
    )
    edges = {(*line.get_xdata(), *line.get_ydata()): line.get_color() for line in graph.lines}
    accepted = {pair for pair, colour in edges.items() if colour == figures.PALETTE[0]}
    steps = [("a", "b"), ("b", "d")]
    assert accepted == {(places[a][0], places[b][0], places[a][1], places[b][1]) for a, b in steps}
    assert len(edges) == 3, "an edge to every drafted node, none to padding"
    inks = {text.get_text(): text.get_color() for text in graph.texts}
    assert inks == {"a": "white", "b": "white", "c": "black", "d": "white"}


def test_the_mask_beside_the_tree_is_the_one_given():
    _, matrix = drawn_tree().axes
    assert (matrix.images[0].get_array() == MASK).all()
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("key of node", "query of node")
    assert legend_labels(drawn_tree()) == ["accepted path", "sees"]


def test_every_step_of_a_residual_has_a_panel_with_its_masses():
    steps = {"target p": np.array([0.2, 0.5, 0.3]), "after one": np.array([0.0, 0.4, 0.6])}
    figure = figures.residuals(["x", "y", "z"], steps)
    assert [bar_heights(figure, panel) for panel in (0, 1)] == [
        [[0.2, 0.5, 0.3]],
        [[0.0, 0.4, 0.6]],
    ]
    for axes, name in zip(figure.axes, steps, strict=True):
        assert axes.get_xlabel() == f"token\n{name}"
        assert [text.get_text() for text in axes.get_xticklabels()] == ["x", "y", "z"]
    first, second = figure.axes
    assert first.get_ylim() == second.get_ylim(), "panels must be comparable"


def test_the_shares_of_the_splits_are_stacked_row_by_row():
    shares = np.array([[0.75, 0.25, 0.0], [0.5, 0.25, 0.25]])
    figure = figures.split_shares([0, 256, 512], shares)
    assert bar_heights(figure, 0) == [[0.75, 0.5], [0.25, 0.25], [0.0, 0.25]]
    tops = [patch.get_y() + patch.get_height() for patch in figure.axes[0].containers[-1]]
    assert tops == [1, 1]
    assert legend_labels(figure) == ["from slot 0", "from slot 256", "from slot 512"]
    assert legend_labels(figures.split_shares([3], shares[:, :1], unit="page")) == ["from page 3"]


def test_bytes_operations_and_floors_of_every_card_are_drawn_line_by_line():
    rows = pd.DataFrame(
        [
            {"card": card, "context": context, "attention": name}
            | {"megabytes": 10 * floor, "gigaoperations": 100 * floor, "modelled_floor_us": floor}
            for card, scale in (("A", 1), ("B", 2))
            for name, floors in (("ours", (1, 3)), ("theirs", (2, 5)))
            for context, floor in zip((512, 2048), np.array(floors) * scale, strict=True)
        ]
    )
    figure = figures.modelled_roofline(rows)
    below = [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]
    assert below == ["cached tokens\nA", "cached tokens\nB"]
    beside = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert beside == list(figures.MODELLED.values()) and "modelled" in beside[2]
    assert legend_labels(figure) == ["ours", "theirs"]
    drawn = [[list(line.get_ydata()) for line in axes.lines] for axes in figure.axes]
    floors = np.array([[[1, 3], [2, 5]], [[2, 6], [4, 10]]])
    assert drawn == [*(10 * floors).tolist(), *(100 * floors).tolist(), *floors.tolist()]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.drafted_tree([], [], [], np.zeros((0, 0))),
        lambda: figures.residuals(["x"], {}),
        lambda: figures.split_shares([], np.zeros((2, 0))),
        lambda: figures.split_shares([0], np.zeros((0, 1))),
        lambda: figures.modelled_roofline(pd.DataFrame()),
    ],
    ids=["tree", "residuals", "splits", "rows", "floors"],
)
def test_nothing_to_draw_is_refused(draw):
    with pytest.raises(ValueError, match="there are no .* to draw"):
        draw()
