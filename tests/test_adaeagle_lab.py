"""AdaEAGLE's experiments give rows that its figures draw and its claims find, on a tiny target."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from test_eagle2 import make_head as make_eagle_head
from test_eagle3 import make_head as make_eagle3_head

from specrepro import adaeagle_figures, adaeagle_lab, claims, eagle3, experiment, prompts
from specrepro.adaeagle_lab import BOTH, CLASSES, DDD, NO_PENALTY, ORACLE, OURS, Lab, Plan
from specrepro.cost_table import Grid

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "adaeagle.ipynb"
PLAN = Plan(
    ("chat", "humaneval"), ("chat",), ("chat",), (1, 2, 3, 4), (1.0, 4.0), (-0.2, -0.6),
    num_answers=6, epochs=1.0,
    grid=Grid((1,), 64, 1, (1, 2, 5, 7), (1,), warm_up=1, repeats=1),
)  # fmt: skip


def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short questions in place of the prompt sets and of the training prompts."""

    def load(name: str, num_prompts: int, seed: int = 0) -> list[prompts.Prompt]:
        asked = [({"role": "user", "content": f"{name} {n}?"},) for n in range(num_prompts)]
        return [prompts.Prompt(f"{name}/{n}", name, words) for n, words in enumerate(asked)]

    monkeypatch.setattr(prompts, "load", load)
    monkeypatch.setattr(prompts, "training_prompts", lambda: iter(load("training", 6)))


@pytest.fixture(scope="module")
def lab(tiny_chat_folder, tmp_path_factory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patched:
        few_prompts(patched)
        run = experiment.Run(
            "adaeagle", tier="smoke", target=str(tiny_chat_folder), dtype="float32",
            figures_dir=folder, num_prompts=2, max_new_tokens=14,
        )  # fmt: skip
        run.work = folder / "work" / "adaeagle"
        heads = [
            eagle3.save_head(make_eagle_head(run.target), folder / "eagle"),
            eagle3.save_head(make_eagle3_head(run.target), folder / "eagle3"),
        ]
        found = Lab(run, *heads, most=6, plan=PLAN)
        run.depends_on(**found.identity)
        yield found


@pytest.fixture(scope="module")
def rows(lab) -> pd.DataFrame:
    """All that the notebook keeps, but for the losslessness check."""
    lab.run.keep(*adaeagle_lab.timed(lab))
    lab.run.stage("second", lambda: adaeagle_lab.second(lab))
    lab.run.stage("replayed", lambda: adaeagle_lab.replayed(lab))
    return lab.run.rows


def test_every_figure_draws_with_units_on_its_axes(rows):
    for name, draw in adaeagle_figures.DRAWINGS.items():
        figure = draw(rows)
        assert isinstance(figure, Figure), name
        drawn = [axes for axes in figure.axes if axes.get_subplotspec() is not None]
        assert drawn and all(axes.has_data() for axes in drawn), name
        first = [axes for axes in drawn if axes.get_subplotspec().is_first_col()]
        last = [axes for axes in drawn if axes.get_subplotspec().is_last_row()]
        assert all(axes.get_ylabel() for axes in first), name
        assert all(axes.get_xlabel() for axes in last), name


def hollow_heights(figure: Figure) -> set[float]:
    return {
        round(float(line.get_ydata()[0]), 3)
        for axes in figure.axes
        for line in axes.lines
        if line.get_markerfacecolor() == "none"
    }


def test_the_papers_values_stand_beside_ours_as_hollow_marks(rows):
    reported = claims.reported("adaeagle")
    heights = hollow_heights(adaeagle_figures.methods(rows, reported))
    assert {2.93, 3.0, round(64.44 / 40.5567, 3)} <= heights, "means of Table 3, over its own cells"
    heights = hollow_heights(adaeagle_figures.variants(rows, reported))
    assert {1.0, round(64.62 / 66.35, 3), round(64.27 / 66.35, 3)} <= heights, "Table 4"
    gains = adaeagle_figures._reported_gains(reported)
    assert gains[OURS] == pytest.approx(0.026, abs=1e-3)
    assert gains[ORACLE] == pytest.approx(0.29, abs=2e-3)


def test_replays_are_marked_and_the_second_base_says_its_number_format(rows):
    told = ["sweep", "ablation", "threshold", "length", "coverage", "calibration"]
    replayed = rows[rows["quantity"].isin(told)]
    assert set(replayed["quantity"]) == set(told)
    assert (replayed["source"] != claims.MEASURED_NOW).all()
    second = rows[rows["base"] == "EAGLE-3"]
    assert set(second["dtype"]) == {"bfloat16"}
    named = {f"{name}[EAGLE-3]" for name in (OURS, BOTH, DDD)} | {"EAGLE-3 4"}
    assert named <= set(second["method"])
    first = rows[rows["quantity"] == "decode"]
    assert set(first["dtype"]) == {"float32"} and ORACLE in set(first["method"])


def test_rows_hold_every_penalty_variant_and_threshold(rows):
    of = {name: found for name, found in rows.groupby("quantity")}
    assert set(of["sweep"]["penalty"]) == set(of["coverage"]["penalty"]) == {1.0, 4.0}
    assert set(of["ablation"]["method"]) == {OURS, NO_PENALTY, CLASSES}
    assert set(map(tuple, of["threshold"][["method", "threshold"]].to_numpy())) == {
        (name, x) for name in (BOTH, DDD) for x in PLAN.thresholds
    }
    assert of["length"].groupby("method")["value"].sum().to_numpy() == pytest.approx(1.0)
    assert of["round"].query("method == @ORACLE").eval("value == drafted")[:-1].all()
    assert set(of["fixed"]["fixed_length"]) == {1, 2, 3, 4}
    assert (of["break_even"]["probability"] > 0).all() and len(of["break_even"]) == 2


def test_headroom_is_told_at_three_costs_with_shares_of_the_oracles(rows):
    found = rows[(rows["quantity"] == "headroom") & (rows["base"] == "EAGLE")]
    assert set(found["costs"]) == {"clock", "table", "paper's"}
    for _, part in found.groupby("costs"):
        assert part["versus"].nunique() == 1, "one fixed length is the best"
        assert {OURS, BOTH, DDD, ORACLE} <= set(part["method"])
    asked = found[found["method"].str.contains("penalty")]
    assert set(asked["method"]) <= {f"{OURS}, penalty {x:g}" for x in PLAN.penalties}
    assert set(asked["costs"]) == {"table", "paper's"}


def test_the_penalty_that_costs_ask_for_is_the_nearest_that_was_trained(lab, monkeypatch):
    for asked, nearest in ((0.0, 1.0), (1.9, 1.0), (2.1, 4.0), (30.0, 4.0)):
        told = pd.DataFrame({"value": [99.0, asked]})
        monkeypatch.setattr(adaeagle_lab.tables, "break_even_rows", lambda *_, x=told: x)
        assert adaeagle_lab.asked_penalty(lab) == nearest


def test_claims_find_their_rows_and_none_finds_two(rows):
    verdicts = {one.id: one for one in claims.judge(claims.load("adaeagle"), rows, "full")}
    ambiguous = [one.id for one in verdicts.values() if "rows match" in one.why]
    assert not ambiguous
    audits = {"lossless-greedy", "lossless-sampling"}  # not among these rows
    untested = {name for name, one in verdicts.items() if one.verdict == "not tested"}
    assert untested <= audits, {name: verdicts[name].why for name in untested - audits}
    for name in ("oracle-wastes-nothing", "oracle-fewest-passes"):
        assert verdicts[name].measured is not None


def test_a_predictor_is_trained_once_and_leaves_a_card(lab, rows):
    folder = lab.predictor("penalty 1")
    card = json.loads((folder / "card.json").read_text())
    assert card["recipe"]["method"]["penalty"] == 1.0 and card["dtype"] == "float32"
    before = (folder / "model.safetensors").read_bytes()
    again = Lab(lab.run, lab.head, lab.second_head, most=6, plan=PLAN)
    assert again.predictor("penalty 1") == folder
    assert (folder / "model.safetensors").read_bytes() == before


def test_what_is_reported_on_was_never_trained_on(lab, rows):
    """Split by dialogue: the predictor's texts answer other prompts than those decoded."""
    features = lab.run.work.parent / "features"
    lines = [x for path in features.rglob("answers.jsonl") for x in path.read_text().splitlines()]
    trained = {json.loads(line)["prompt_id"] for line in lines}
    reported = {prompt_id for _, prompt_id in lab.asked}
    assert trained and reported and not trained & reported
