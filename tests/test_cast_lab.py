"""CAST's experiments give rows that its figures draw and its claims find, on a tiny target."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from test_eagle3 import make_head
from tree_drafters import Knowing

from specrepro import cast, cast_figures, cast_lab, cast_rows, claims, eagle3, experiment, replay
from specrepro.cast_lab import BEST, CAST, DEFAULT, NET, PLANS, Lab, Plan
from specrepro.cost_table import Grid
from specrepro.decoding import decode_autoregressively
from specrepro.eagle3 import TreeConfig
from specrepro.measure import Record

PLAN = Plan(
    greedy={1: ("chat", "humaneval"), 2: ("chat",)}, sampled={1: ("chat",)},
    elsewhere={1: ("chat",)}, batch=2, num_together=2, num_traces=2, num_chosen_on=2,
    grid=Grid((1, 2), 64, 1, (1, 2, 4, 9), (1, 4), warm_up=1, repeats=2),
    other_grid=Grid((1,), 64, 1, (1, 9), (1, 4), warm_up=1, repeats=2), modelled=(1, 2),
    recorded=TreeConfig(2, 4, 2), replayed=(0.0, 1.0), depths=(1, 2), widths=(1, 4),
    factors=(0.5, 1.0), machines=(("float32", 1), ("bfloat16", 1)),
)  # fmt: skip


@pytest.fixture(scope="module")
def lab(tiny_chat_folder, tmp_path_factory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    run = experiment.Run(
        "cast", tier="smoke", target=str(tiny_chat_folder), dtype="float32", figures_dir=folder
    )
    draws = torch.Generator().manual_seed(0)
    asked = torch.randint(5, 90, (20, 12), generator=draws).tolist()
    run.questions = lambda name, n=0: [
        (f"{name}/{i}", asked[i + 7 * (name == "chat")]) for i in range(n or 1)
    ]
    run.max_new_tokens = 14
    prompts = [ids for name in PLAN.sets for _, ids in run.questions(name, 4)]
    said = decode_autoregressively(run.target, prompts, max_new_tokens=40)
    answers = {tuple(ids): one.tokens for ids, one in zip(prompts, said, strict=True)}
    head = eagle3.save_head(make_head(run.target), folder / "head")
    found = Lab(run, head, TreeConfig(3, 6, 12), PLAN)
    found.draft = lambda target=None, tree=None: Knowing(answers, 100, tree)
    found.modelled = found.modelled[:1]
    run.depends_on(**found.identity)
    return found


@pytest.fixture(scope="module")
def rows(lab) -> pd.DataFrame:
    """All that the notebook keeps, but for the losslessness check."""
    run = lab.run
    for batch in PLAN.greedy:
        run.keep(*cast_rows.timed(lab, batch))
    for name, make in (
        ("cost", cast_rows.costs),
        ("confidence", cast_rows.confidence),
        ("elsewhere", cast_rows.elsewhere),
        ("replay_sweep", cast_rows.sweep),
        ("replay", cast_rows.replays),
        ("ablation", cast_rows.ablation),
        ("choice", cast_rows.choices),
        ("sensitivity", cast_rows.sensitivity),
    ):
        run.stage(name, lambda make=make: make(lab))
    return run.rows


def test_every_figure_draws_with_units_on_its_axes(rows):
    for name, draw in cast_figures.DRAWINGS.items():
        figure = draw(rows)
        assert isinstance(figure, Figure), name
        drawn = [axes for axes in figure.axes if axes.axison]
        assert drawn and all(axes.has_data() and axes.get_xlabel() for axes in drawn), name
        first = [axes for axes in drawn if axes.get_subplotspec().is_first_col()]
        assert all(axes.get_ylabel() for axes in first), name


def test_the_papers_values_stand_beside_ours_as_hollow_marks(rows):
    reported = claims.reported("cast").query("model == 'Llama-3.1-8B'").assign(batch=1)
    figure = cast_figures.speedup_bars(rows, reported)
    heights = {
        round(float(line.get_ydata()[0]), 2)
        for axes in figure.axes
        for line in axes.lines
        if line.get_markerfacecolor() == "none"
    }
    assert {3.77, 4.51} <= heights, "Table 1's cells of chat and HumanEval"


def test_what_is_replayed_and_what_is_modelled_says_so(rows):
    replayed = rows[rows["quantity"].isin(["replay", "ablation", "sensitivity", "replay_sweep"])]
    assert (replayed["source"] != claims.MEASURED_NOW).all()
    modelled = rows[rows["machine"].fillna("").str.contains("modelled")]
    assert set(modelled["costs"]) == {"modelled"} and len(modelled)
    assert set(rows.loc[rows["costs"] == "modelled", "machine"]) == set(modelled["machine"])
    assert rows.loc[rows["quantity"] == "decode", "costs"].isna().all()
    own = rows[(rows["quantity"] == "replay") & (rows["costs"] == "table")]
    assert own["machine"].nunique() == 1 and set(own["batch"]) == {1, 2}


def test_claims_find_their_rows_and_none_finds_two(rows):
    verdicts = {one.id: one for one in claims.judge(claims.load("cast"), rows, "full")}
    ambiguous = [one.id for one in verdicts.values() if "rows match" in one.why]
    assert not ambiguous
    for name in (
        "above-eagle3-batch-1", "tau-rises-with-size",
        "confidence-is-linear", "own-replay-batch-1", "llama-3.1-8b-cast", "own-policy-time",
        "own-profile-time", "own-best-fixed-batch-1",
    ):  # fmt: skip
        assert verdicts[name].verdict != "not tested", f"{name}: {verdicts[name].why}"
    assert verdicts["faster"].why == "no row for batch 8", "it speaks of both batch sizes"


def test_claims_hold_what_the_tables_say():
    table = claims.reported("cast").query("by == 'authors'")
    assert set(table["grade"]) == {"B"}
    cells = table[table["prompts"] != "mean"].groupby(["model", "method", "batch"])["speedup"]
    means = table[table["prompts"] == "mean"].set_index(["model", "method", "batch"])["speedup"]
    assert len(means) == 10 and (cells.size() == 6).all()
    assert (cells.mean() - means).abs().max() < 0.0051, "each mean is derived from its six cells"
    gain = means.xs("CAST", level="method") / means.drop("CAST", level="method").droplevel("method")
    assert [round(100 * (x - 1), 1) for x in gain] == [3.6, 2.6, 3.6, 48.9, 26.0]
    below = table.pivot_table(
        index=["model", "batch", "prompts"], columns="method", values="speedup", dropna=False
    )
    assert (below["CAST"] < below["EAGLE-3"]).sum() == 3


def test_cast_starts_from_other_prompts_than_the_reported(lab):
    reported = {(trace.prompts, trace.prompt_id) for trace in lab.traces}
    chosen_on = {(trace.prompts, trace.prompt_id) for trace in lab.traces_to_choose_on}
    decoded = {(r.prompts, r.prompt_id) for batch in (1, 2) for r in lab.compare(batch)}
    assert len(chosen_on) == 4 and not chosen_on & (reported | decoded)
    assert decoded <= reported
    assert {trace.temperature for trace in lab.traces} == {0.0, 1.0}
    assert {trace.temperature for trace in lab.traces_to_choose_on} == {0.0}


@pytest.mark.parametrize("batch", [1, 2])
def test_no_fixed_tree_of_the_grid_beats_the_one_chosen_with_hindsight(lab, batch):
    """On the very prompts that are reported, so that it flatters the baseline alone."""
    best, speeds = lab.best_fixed(batch, lab.costs), {}
    traces = cast_lab.of_one_set(lab.replayed(), batch)
    for depth in PLAN.depths:
        for top_k in PLAN.widths:
            for size in (2, 4, 9):
                tree = TreeConfig(depth, top_k, size)
                records = replay.replay(traces, tree, lab.costs, method="", batch=batch)
                speeds[tree] = replay.tokens_per_second(records)
    assert speeds[best] == max(speeds.values()) > min(speeds.values())


def test_other_machines_are_profiled_and_decoded_as_what_they_are(lab, rows):
    machines = {table.machine: table.header for table in lab.machines}
    assert machines["bfloat16, 1 thread"]["dtype"] == "bfloat16"
    assert lab.costs.header["dtype"] == "float32" and lab.costs.header["threads"] == 1
    assert len(machines) == 2, "the run's own machine is measured once"
    decoded = rows[rows["quantity"] == "decode_elsewhere"]
    assert set(decoded["dtype"]) == {"bfloat16"} and set(decoded["method"]) >= {CAST, BEST}
    records = lab.compare_as(lab.machines[1], 1)
    assert {record.dtype for record in records} == {"bfloat16"}
    assert set(rows.loc[rows["costs"] == "other clock", "quantity"]) == {
        "decode_elsewhere", "gain", "replay_check",
    }  # fmt: skip


KEYS = ("batch", "method", "versus")


def test_the_largest_gain_here_is_found_and_no_modelled_one_counts(rows):
    gained = rows[(rows["quantity"] == "gain") & (rows["temperature"] == 0)]
    best = rows[rows["quantity"] == "best_gain"]
    assert len(best) == 8, "two batch sizes, two variants, two to hold them against"
    for row in best.to_dict("records"):
        same = gained[[all(row[k] == one[k] for k in KEYS) for one in gained.to_dict("records")]]
        here = same[same["costs"].isin(["table", "other table"])]
        assert row["value"] == here["value"].max() and row["costs"] != "modelled"
    assert (gained["costs"] == "modelled").any()


def test_the_replay_counts_the_tokens_that_decoding_counts(lab, rows):
    """In float32 its rounds are those of decoding, so only seconds can differ."""
    for batch in (1, 2):
        decoded = {
            (r.method, r.prompt_id): sum(r.emitted) / r.target_passes
            for r in lab.compare(batch)
            if not r.temperature
        }
        for name, draft in lab.drafts(batch, lab.costs).items():
            if name == cast_lab.EAGLE2:
                continue
            traces = [t for t in lab.traces if (name, t.prompt_id) in decoded and not t.temperature]
            for prompts in dict.fromkeys(trace.prompts for trace in traces):
                mine = [t for t in traces if t.prompts == prompts]
                for one in replay.replay(mine, draft, lab.costs, method=name, batch=batch):
                    expected = decoded[name, one.prompt_id]
                    assert sum(one.emitted) / one.target_passes == expected, (name, batch)
    check = rows[(rows["quantity"] == "replay_check") & (rows["costs"] == "clock")]
    assert {*check["method"]} == {*lab.drafters(1), "Autoregressive"}
    assert {*check["batch"]} == {1, 2}


def test_costs_are_timed_in_turn_with_every_batch_that_is_decoded(lab, rows):
    """A machine's speed drifts: replays are held against costs of the same minutes."""
    for batch, num_pieces in ((1, 3), (2, 1)):  # sets and temperatures, two prompts of each
        table = lab.costs_meanwhile(batch)
        assert table.batches == list(range(1, batch + 1)) and table.header == lab.costs.header
        wanted = table.points[table.points["part"] == "target"]
        assert {*wanted["num_tokens"]} == {*PLAN.grid.sizes}
        assert (wanted["repeats"] >= num_pieces).all()
        before = lab._meanwhile(batch).read_text()
        lab.compare(batch)
        assert lab._meanwhile(batch).read_text() == before, "timed again beside nothing"


def test_replays_fill_whole_batches_and_two_at_least(lab):
    """A lone batch has no interval, and a batch that is not full is another batch size."""
    for batch, expected in ((1, 4), (3, 6), (4, 8), (8, 16)):
        traces = cast_lab.of_one_set(lab.replayed(), batch)
        assert len(traces) == expected == len({trace.prompt_id for trace in traces})
        assert {trace.prompts for trace in traces} == {"all"}
    first = [trace.prompts for trace in lab.replayed()]
    assert first == ["chat", "humaneval"] * 2, "sets by turns, so that batches are mixed"


def test_trees_of_the_sweep_have_the_sizes_they_are_drawn_at(rows, lab):
    """A shape that cannot hold the largest would draw one small tree at every size."""
    swept = rows[(rows["quantity"] == "replay_sweep") & (rows["method"] == DEFAULT)]
    shapes = swept[["draft_depth", "top_k", "total_tokens"]].drop_duplicates().astype(int)
    for depth, top_k, size in shapes.itertuples(index=False):
        assert TreeConfig(depth, top_k, size).num_pooled >= size
    gained = rows[(rows["quantity"] == "gain") & (rows["method"] == "EAGLE-3, chosen size")]
    assert set(gained["batch"]) == set(swept["batch"]), "none where growing pays would be left out"


def test_a_text_that_is_said_again_counts_once(lab, monkeypatch):
    three = lab.replayed()[:3]
    monkeypatch.setattr(lab, "replayed", lambda temperature=0.0: three)
    assert len(cast_lab.of_one_set(three, 2)) == 4
    found = cast_rows.ablation(lab)
    assert set(found.loc[found["batch"] == 2, "num_prompts"]) == {3}


def test_ablations_end_at_eagle_3_and_at_cast(rows, lab):
    found = rows[(rows["quantity"] == "ablation") & (rows["batch"] == 1)].set_index("method")
    replayed = rows[
        (rows["quantity"] == "replay") & (rows["batch"] == 1) & (rows["costs"] == "table")
        & (rows["temperature"] == 0)
    ].set_index("method")  # fmt: skip
    for name in (DEFAULT, CAST, NET):
        assert found.loc[name, "speedup"] == pytest.approx(replayed.loc[name, "speedup"])
    assert set(cast_rows.WITHOUT.values()) <= set(found.index)


# --- rows from records and rounds


def record(method: str, group: str, seconds: float, tokens: int = 10) -> Record:
    return Record(
        method=method, prompts="chat", prompt_id=group, temperature=0.0, seed=0, batch=1, repeat=0,
        group=group, max_new_tokens=99, top_p=1.0, top_k=0, target="t", dtype="float32",
        new_tokens=tokens, seconds=seconds, prefill_seconds=0.0, tokens=[1] * tokens,
    )  # fmt: skip


def test_a_gain_is_the_ratio_of_rates_less_one():
    records = [record("a", f"{i}", 1.0 + i) for i in range(3)]
    records += [record("b", f"{i}", 1.5 * (1.0 + i)) for i in range(3)]
    records += [record("b", "alone", 1.0), record("c", "0", 9.0)]
    (row,) = cast_rows.gains(records, "a", "b").to_dict("records")
    assert [row[name] for name in ("value", "value_low", "value_high")] == pytest.approx([0.5] * 3)
    assert row["num_prompts"] == 3, "a prompt that one of them lacks counts for neither"
    records += [replace(one, prompt_id="other") for one in records if one.group == "2"]
    (row,) = cast_rows.gains(records, "a", "b").to_dict("records")
    assert row["num_prompts"] == 4, "of two decoded together both count"


def test_choices_are_shares_of_rounds_and_of_levels():
    rounds = [cast.Round(1, 9, 1, widths=[4, 2], num_tokens=7) for _ in range(3)]
    rounds.append(cast.Round(1, 9, 1, widths=[], num_tokens=2))
    found = cast_rows.choice_rows(rounds).set_index(["part", "chosen"])["value"]
    assert found["depth"].to_dict() == {1: 0.25, 3: 0.75}
    assert found["width"].to_dict() == {2: 0.5, 4: 0.5}
    assert found["verified"].to_dict() == {1: 0.25, 6: 0.75}


def test_confidence_that_is_true_lies_on_the_diagonal_and_doubled_confidence_does_not():
    draws = torch.Generator().manual_seed(0)
    confidence = torch.rand(2000, 6, generator=draws).sort(1, descending=True).values
    fate = torch.rand(2000, 6, generator=draws) < confidence
    # here every node is a depth of its own
    ranks = torch.where(fate, torch.arange(1, 7), replay.NOT_DRAFTED)
    units = np.arange(2000) // 100
    found = cast_rows.confidence_rows(ranks, confidence, 6, units)
    fits = found[found["quantity"] == "confidence_fit"].set_index("metric")
    assert fits.loc["slope", "value"] == pytest.approx(1, abs=0.08)
    assert fits.loc["slope", "value_low"] < 1 < fits.loc["slope", "value_high"]
    assert fits.loc["r2_of_bins", "value"] > 0.98
    nodes = found[found["quantity"] == "calibration"]
    assert (nodes["value"] - nodes["predicted"]).abs().max() < 0.05
    assert nodes["num_rounds"].sum() == 12_000
    halved = cast_rows.confidence_rows(ranks, confidence / 2, 6, units)
    slope = halved.query("metric == 'slope'")["value"].iloc[0]
    assert slope == pytest.approx(2, abs=0.1)
    more = cast_rows.confidence_rows(ranks, confidence, 60, units)
    assert more.equals(found), "a tree that keeps more than there is keeps what there is"
    few = cast_rows.confidence_rows(ranks, confidence, 2, units)
    trees = few[few["quantity"] == "confidence"]
    assert (trees["value"] - trees["predicted"]).abs().max() < 0.1 and trees["value"].max() < 2


def test_plans_of_all_tiers_fit_their_tables():
    for tier, plan in PLANS.items():
        assert experiment.tier_named(tier) and {*plan.greedy, plan.batch} <= {*plan.grid.batches}
        assert max(plan.widths) <= plan.recorded.top_k and max(plan.depths) <= plan.recorded.depth
        assert all({*sets} <= {*plan.greedy[b]} for b, sets in plan.sampled.items())
        assert {name for sets in plan.elsewhere.values() for name in sets} <= {*plan.sets}
        # whatever is decoded was timed: EAGLE-3's default too, or its replay would be a guess
        largest = min(eagle3.TreeConfig().total_tokens, max(plan.grid.sizes))
        for batch in (1, plan.batch):
            assert largest in plan.grid.sizes_of(batch) or tier == "smoke", f"{tier}, batch {batch}"
    for tier in ("laptop", "full", "paper"):
        assert PLANS[tier].grid.batches == (1, 2, 4, 8, 16, 32)


def test_a_run_is_as_large_as_asked_for_or_as_its_plan_says():
    assert cast_lab.sizes("laptop", 7, 9) == {"num_prompts": 7, "max_new_tokens": 9}
    plan = PLANS["laptop"]
    assert cast_lab.sizes("laptop") == {
        "num_prompts": plan.num_prompts, "max_new_tokens": plan.max_new_tokens,
    }  # fmt: skip
    assert cast_lab.sizes("full") == {"num_prompts": 0, "max_new_tokens": 0}


def test_a_grade_that_nobody_gives_is_refused(tmp_path):
    text = (claims.CLAIMS_FOLDER / "cast.yaml").read_text()
    for wrong in (
        text.replace("grade: C", "grade: E"),
        text.replace("    grade: B\n    set", "    grade: F\n    set"),
    ):
        assert wrong != text
        (tmp_path / "cast.yaml").write_text(wrong)
        with pytest.raises(ValueError, match="key 'grade' is '[EF]'; choose one of A, B, C, D"):
            claims.load(tmp_path / "cast.yaml")
