"""The benchmark's notebook on a tiny target: rows for every claim and figure, replays that hold."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from test_eagle3 import make_head
from test_tts_sessions import QUESTIONS

from specrepro import claims, eagle3, experiment, sessions, tts, tts_figures, tts_lab
from specrepro.eagle3 import TreeConfig
from specrepro.target_model import Target
from specrepro.tts import Size
from specrepro.tts_rows import OVERALL, REPLAYED

NOTEBOOK = experiment.ROOT / "notebooks" / "tts.ipynb"
NUM_NEW = 32
SMALL = Size(
    2, NUM_NEW, tts.HEADLINE, ("EAGLE-3", "SAM", "Recycling"), num_warm=1, times_samples=False,
    has_store=False, audited=("SAM", "EAGLE-3"), num_audited=1, num_cost_rounds=2,
)  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:the load average is"),
    pytest.mark.filterwarnings("ignore:IProgress not found"),
]


@pytest.fixture(scope="module")
def names(quick_target: Target, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the notebook knows after its last cell."""
    folder = tmp_path_factory.mktemp("tts")
    head = eagle3.save_head(make_head(quick_target), folder / "head", TreeConfig(2, 3, 8))
    given = {"tier": "smoke", "target": "quick", "dtype": "float32"}
    given |= {"checkpoint": str(head), "figures_dir": str(folder)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(experiment.targets, "load", lambda *_, **options: quick_target)
        patched.setitem(tts.SIZES, "smoke", SMALL)
        # nothing is passed on, so the second turn is the first once more
        patched.setattr(sessions, "final_answer", lambda tokenizer, tokens: "")
        asked = [*QUESTIONS, replace(QUESTIONS[1], id="q3", text="is it so?")]
        patched.setattr(tts, "questions", lambda *_: asked)
        patched.setattr(
            experiment.Run, "questions", lambda self, name, n: [("a", [40, 50, 60]), ("b", [5, 9])]
        )
        return executed(given)


def executed(given: dict[str, object]) -> dict[str, object]:
    notebook = json.loads(NOTEBOOK.read_text())
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            names |= given if "tags" in cell["metadata"] else {}
    return names


@pytest.fixture(scope="module")
def rows(names: dict[str, object]) -> pd.DataFrame:
    return names["run"].rows


def test_every_figure_is_drawn_with_units_on_its_axes(names: dict[str, object]) -> None:
    drawn = {path.stem for path in names["run"].folder.glob("fig_*.png")}
    assert drawn == {*tts_figures.DRAWINGS, "fig_10_time_per_round"}
    rows = pd.read_csv(names["run"].folder / "results.csv")
    assert pd.api.types.is_numeric_dtype(rows["repeated"]), "a column with two meanings"
    for name, draw in tts_figures.DRAWINGS.items():
        figure = draw(rows)
        assert isinstance(figure, Figure) and figure.legends, name
        assert all(axes.has_data() for axes in figure.axes), name
        lowest = [axes for axes in figure.axes if axes.get_subplotspec().is_last_row()]
        assert all(axes.get_xlabel() for axes in lowest), name
        leftmost = [axes for axes in figure.axes if axes.get_subplotspec().is_first_col()]
        assert name == "fig_1_radar" or all(axes.get_ylabel() for axes in leftmost), name


def hollow(axes: Axes) -> set[float]:
    return {
        round(float(line.get_ydata()[0]), 2)
        for line in axes.lines
        if line.get_markerfacecolor() == "none"
    }


def test_the_papers_values_stand_beside_ours_as_hollow_marks(rows: pd.DataFrame) -> None:
    reported = claims.reported("tts").query("model == 'Qwen3-8B'")
    tau, speedup = tts_figures.radar(rows, reported).axes
    assert {4.38, 4.76, 2.37, 3.01, 2.05} <= hollow(tau), "Table A's totals"
    assert hollow(speedup) == {2.91, 3.49, 2.28, 2.15}, "of what was timed"
    greedy, _ = tts_figures.speedup_by_turn(rows, reported).axes
    assert hollow(greedy) == {2.13, 2.83}, "Figure 2a"
    _, fall = tts_figures.temperature(rows, reported).axes
    methods = [text.get_text() for text in tts_figures.temperature(rows).axes[0].get_yticklabels()]
    places = {methods.index(name) for name in ("SAM", "Recycling", "EAGLE-3")}
    assert hollow(fall) == places and not hollow(tts_figures.temperature(rows).axes[1])


def test_what_is_missing_is_named(rows: pd.DataFrame) -> None:
    for draw in tts_figures.DRAWINGS.values():
        with pytest.raises(ValueError, match="no row"):
            draw(rows[rows["quantity"] == "failed"])


# --- rows


def test_fewer_questions_of_each_set_are_asked_where_answers_are_sampled(
    names: dict[str, object], rows: pd.DataFrame
) -> None:
    assert [question.id for question in names["lab"].asked(0.6)] == ["q0", "q1"]
    decoded = rows[(rows["quantity"] == "decode") & (rows["prompts"] == OVERALL)]
    counts = decoded.groupby("temperature")["num_prompts"].unique()
    assert [list(counts[t]) for t in tts.TEMPERATURES] == [[4], [2]]
    fallen = rows[rows["quantity"] == "fall_off"]
    assert set(fallen["num_prompts"]) == {2}, "of the questions asked at both"


def test_taus_are_drawn_of_the_same_words_where_they_were_replayed(rows: pd.DataFrame) -> None:
    """A method that loops in its own words would stand above one that was replayed on others."""
    tau, _ = tts_figures.radar(rows).axes
    drawn = {line.get_color(): line for line in tau.lines if line.get_linestyle() == ":"}
    assert {tts_figures.COLOURS[name] for name in ("SAM", "EAGLE-3", "PLD")} <= drawn.keys()
    replayed = rows[(rows["quantity"] == "replay") & (rows["prompts"] == OVERALL)]
    replayed = replayed[(replayed["temperature"] == 0) & (replayed["paradigm"] == "multi-round")]
    expected = replayed.set_index("method")["tau"]["SAM"]
    assert expected in drawn[tts_figures.COLOURS["SAM"]].get_ydata()


def test_what_memory_adds_is_told_of_the_same_words(rows: pd.DataFrame) -> None:
    found = rows[(rows["quantity"] == "memory") & (rows["metric"] == "tau")]
    assert {"SAM", "PIA", "SuffixDecoding"} == set(found["method"])
    turns = rows[(rows["quantity"] == "replay_by_turn") & (rows["prompts"] == OVERALL)]
    turns = turns[(turns["temperature"] == 0) & (turns["turn"] == 2)].set_index("method")["tau"]
    one = found[(found["temperature"] == 0) & (found["method"] == "SAM")].iloc[0]
    assert one["value"] == pytest.approx(turns["SAM"] / turns["SAM, forgetting"] - 1)
    assert one["value"] != 0, "nothing was forgotten"


def test_what_is_replayed_says_so_and_has_no_time(rows: pd.DataFrame) -> None:
    is_replay = rows["quantity"].isin(["replay", "replay_by_turn", "threshold", "generation"])
    assert set(rows[is_replay]["source"]) == {REPLAYED}
    assert rows[is_replay]["speedup"].isna().all() and rows[is_replay]["seconds"].isna().all()
    timed = rows[rows["quantity"].isin(["decode", "decode_by_turn", "gain", "source"])]
    assert set(timed["source"]) == {claims.MEASURED_NOW}


def overall(rows: pd.DataFrame, quantity: str) -> pd.Series:
    found = rows[(rows["quantity"] == quantity) & (rows["prompts"] == OVERALL)]
    found = found[(found["paradigm"] == "multi-round") & (found["temperature"] == 0)]
    return found.set_index("method")["tau"]


def test_replays_of_the_baselines_answers_have_the_tau_of_decoding(rows: pd.DataFrame) -> None:
    """In float32 all methods say the same, so also the head's and the hybrid's rounds agree."""
    replayed, decoded = overall(rows, "replay"), overall(rows, "decode")
    for name in ("SAM", "EAGLE-3", "SAM[EAGLE-3]"):
        assert replayed[name] == pytest.approx(decoded[name]), name
    assert decoded["SAM"] > 1.2, "nothing was accepted, so nothing was compared"
    assert {"PLD", "PIA", "SuffixDecoding", "PLD, any length"} <= set(replayed.index)


def test_every_timed_text_drafter_is_replayed_from_its_own_answers(rows: pd.DataFrame) -> None:
    found = rows[rows["quantity"] == "replay_check"].set_index(["method", "temperature"])
    assert found["value"].to_dict() == {("SAM", 0.0): 0, ("SAM", 0.6): 0}
    assert found["num_prompts"].to_dict() == {("SAM", 0.0): 8, ("SAM", 0.6): 4}


def test_no_threshold_beats_the_best_switch(rows: pd.DataFrame) -> None:
    found = rows[(rows["quantity"] == "threshold") & (rows["prompts"] == OVERALL)]
    for name in tts_lab.HYBRIDS:
        swept = found[found["method"] == name].set_index("threshold")["tau"]
        (best,) = found.loc[found["method"] == f"{name}, oracle", "tau"]
        assert len(swept) == 12 and swept.max() <= best
    at_five = found.set_index(["method", "threshold"]).loc[("SAM[EAGLE-3]", 5.0), "tau"]
    assert at_five == pytest.approx(overall(rows, "decode")["SAM[EAGLE-3]"])


def test_samples_of_a_batch_are_replayed_as_if_drawn_in_turn(
    names: dict[str, object], rows: pd.DataFrame
) -> None:
    by_turn = rows[(rows["quantity"] == "replay_by_turn") & (rows["prompts"] == OVERALL)]
    samples = by_turn[by_turn["paradigm"] == "best-of-n"]
    assert set(samples["sample"]) == {1, 2, 3, 4} and set(samples["turn"]) == {1}
    said = {one.sample: one.tokens for one in names["lab"].samples if one.session == "q0"}
    in_turn = names["lab"].answers(tts.BEST_OF_N, 0.6)[0]
    assert {one.record.sample: one.answer for one in in_turn} == said
    assert {(one.record.batch, one.record.paradigm) for one in in_turn} == {(1, "best-of-n")}


def test_what_a_head_has_right_is_found_once(
    names: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tts, "head_acceptance", lambda *_: pytest.fail("asked again"))
    lab = names["lab"]
    heads = lab.heads(tts.MULTI_ROUND, 0.0)
    places = [set(one) for session in heads for one in session]
    assert places == [
        set(range(1, len(one.answer))) for s in lab.cases[tts.MULTI_ROUND, 0.0] for one in s
    ]
    assert lab.heads(tts.MULTI_ROUND, 0.6) is None, "this size does not ask for it"


def test_accuracy_stands_beside_speed(names: dict[str, object]) -> None:
    found = names["lab"].accuracy()
    assert found["accuracy"].between(0, 1).all() and (found["accuracy"] <= 1).any()
    assert (found["accuracy_any"] >= found["accuracy"]).all()
    lengths = ["tau", "tau_per_round", "tau_per_request"]
    assert found.set_index("method").loc["SAM", lengths].notna().all(axis=None)


def test_the_export_has_a_file_per_method_and_setting(names: dict[str, object]) -> None:
    files = {path.stem for path in (names["run"].records / "export").glob("*.jsonl")}
    assert "SAM[EAGLE-3]-multi-round-temperature-0" in files
    assert "Autoregressive-best-of-n-batched-temperature-0.6" in files
    assert "requests" in files and len(files) == 5 + 4 + 1 + 1


# --- claims


def test_claims_find_their_rows_and_none_finds_two(rows: pd.DataFrame) -> None:
    verdicts = {one.id: one for one in claims.judge(claims.load("tts"), rows, "full")}
    ambiguous = [(one.id, one.why) for one in verdicts.values() if "rows match" in one.why]
    assert not ambiguous
    untested = {name for name, one in verdicts.items() if one.verdict == "not tested"}
    needs_more = {  # what this size does not time, and sets and targets of the paper alone
        "sps", "pia-accelerates", "pld-flat", "hybrid-gain-shrinks", "recycling-above", "gpqa",
        "hybrid-above-head-everywhere", "qwen3", "ds-r1",
    }  # fmt: skip
    assert not [name for name in untested if not name.startswith(tuple(needs_more))]
    for name in ("lossless-greedy", "lossless-sampling", "own-replay", "stores-rise-in-tau"):
        assert verdicts[name].verdict == "direction holds", name


def test_claims_hold_what_the_tables_say() -> None:
    table = claims.reported("tts").query("quantity == 'decode'").set_index(["table", "method"])
    a = table.loc["Table A"].query("prompts == 'overall'")
    assert (a["speedup"].idxmax(), a["tau"].idxmax()) == ("SAM[EAGLE-3]", "SpS")
    assert a["speedup"].idxmin() == "SpS" and a.loc["SpS", "speedup"] < 1
    hybrid, b = a.loc["SAM[EAGLE-3]", "speedup"], table.loc["Table B"]["speedup"]
    gains = [hybrid / a.loc[name, "speedup"] - 1 for name in ("EAGLE-3", "SAM")]
    assert [round(100 * gain) for gain in gains] == [20, 53], "as the paper's text has it"
    assert round(100 * (b["SAM"] / b["EAGLE-3"] - 1)) == 38
    warm = table.loc["Table C, temperature 0.6"]["speedup"]
    derived = claims.reported("tts").set_index(["table", "method"])["value"]
    for name in ("SAM", "Recycling"):
        loss = warm[name] / a.loc[name, "speedup"] - 1
        assert derived["Table C, loss by temperature", name] == pytest.approx(loss, abs=6e-4)
    turns = claims.reported("tts").query("table == 'Figure 2a'")
    turns = turns.pivot_table(index="method", columns="turn", values="speedup")
    for name, gain in (turns[2] / turns[1] - 1).items():
        assert derived["Figure 2a, gain", name] == pytest.approx(gain, abs=6e-4)
    cells = claims.reported("tts").query("table == 'Table A'")
    assert len(cells) == 45 and cells["approximate"].all()


def test_every_tier_times_what_its_claims_and_figures_need() -> None:
    for name, size in tts.SIZES.items():
        assert experiment.tier_named(name)
        for methods in (size.timed, size.audited):
            assert not methods or set(tts.HEADLINE) <= set(methods)
        assert (tts.MULTI_ROUND.name, 0.0) in size.with_head
