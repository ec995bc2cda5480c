"""EAGLE-3's other experiments: heads trained alike give rows that figures draw and claims find."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from drafter_cases import RECIPE, small_corpus, world_of
from matplotlib.figure import Figure
from test_eagle3 import make_head
from test_measure import record

from specrepro import (
    checkpoints,
    claims,
    draft_training,
    eagle2,
    eagle3,
    eagle3_figures,
    eagle3_lab,
    eagle3_variants,
    experiment,
    recipes,
    training_cards,
)
from specrepro import rows as rows_module
from specrepro.draft_lm import DraftLM
from specrepro.eagle2 import Eagle2
from specrepro.eagle3 import Drafter, Eagle3, TrainingConfig, TreeConfig
from specrepro.eagle3_lab import Lab, Plan
from specrepro.eagle3_variants import ABLATION, VARIANTS, Budget, Workshop
from specrepro.measure import AUTOREGRESSIVE
from specrepro.medusa import Medusa
from specrepro.target_model import EMBEDDED, Target

METHODS = {
    Eagle3: replace(RECIPE.method, training=TrainingConfig(steps=3)),
    Eagle2: Eagle2(TreeConfig(1, 2, 5)),
    Medusa: Medusa(num_heads=2, total_tokens=6),
    DraftLM: DraftLM(32, 32, 1, 2, num_drafted=2),
}
BUDGET = Budget(share=1.0, steps=8)
DRAWN = [stage for stage in eagle3_lab.STAGES if stage not in eagle3_lab.AUDITS]
PLAN = Plan(
    eagle3_lab.STAGES, 1, temperatures=(0.0,), batches=(1, 2), depths=(1, 2), widths=(3,),
    sizes=(4, 6),
)  # fmt: skip


def little(method, target):
    return replace(RECIPE, method=METHODS[method], batch_tokens=60)


@pytest.fixture(scope="module")
def small_world() -> Iterator[pytest.MonkeyPatch]:
    with world_of(little) as patch:
        yield patch


@pytest.fixture(scope="module")
def answers(chat_target, small_world, tmp_path_factory) -> Path:
    return small_corpus(chat_target, tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def workshop(chat_target, answers, tmp_path_factory) -> Workshop:
    """All variants trained, by what the command calls."""
    found = Workshop(chat_target, tmp_path_factory.mktemp("variants"), BUDGET)
    eagle3_variants.train_all(found, list(VARIANTS.values()), answers)
    return found


def lab_of(workshop: Workshop, folder: Path, tier: str = "full", plan: Plan | None = PLAN) -> Lab:
    run = experiment.Run(
        "eagle3", tier=tier, target=workshop.target.name, dtype="float32", figures_dir=folder
    )
    draws = torch.Generator().manual_seed(0)
    asked = torch.randint(5, 90, (40, 12), generator=draws).tolist()
    run.questions = lambda name, n=0: [(f"{name}/{i}", asked[i + len(name)]) for i in range(n or 1)]
    run.max_new_tokens = 8
    head = eagle3.save_head(make_head(run.target), folder / "head", TreeConfig(2, 3, 8))
    card = json.dumps(workshop.card(VARIANTS["eagle3"]))
    checkpoints.write_text(head / "card.json", card)
    load = eagle3.drafters(head)["EAGLE-3"]
    found = Lab(run, head, load, plan, workshop, folder / "committed")
    run.depends_on(**eagle3_lab.identity(load(run.target), head))
    return found


@pytest.fixture(scope="module")
def lab(workshop, small_world, tmp_path_factory) -> Iterator[Lab]:
    """Every stage taken, with one of three baselines' checkpoints committed."""
    rows_module._resamples.cache_clear()
    small_world.setattr(rows_module, "NUM_RESAMPLES", 50)
    small_world.setattr(eagle3_lab, "ALL_SETS", ("chat", "maths"))
    found = lab_of(workshop, tmp_path_factory.mktemp("lab"))
    made = workshop.folder(VARIANTS["eagle2"])
    (found.committed / "eagle2").mkdir(parents=True)
    for path in made.iterdir():
        (found.committed / "eagle2" / path.name).write_bytes(path.read_bytes())
    assert all(found.take(stage) for stage in DRAWN)
    yield found
    rows_module._resamples.cache_clear()


@pytest.fixture(scope="module")
def rows(lab) -> pd.DataFrame:
    return lab.run.rows


# --- training alike


def test_variants_to_be_compared_have_one_budget_and_differ_in_what_they_are_named_for(workshop):
    cards = {name: workshop.card(one) for name, one in VARIANTS.items()}
    alike = {name: training_cards.budget_of(cards[name]) for name in (v.name for v in ABLATION)}
    assert len({tuple(budget.items()) for budget in alike.values()}) == 1
    steps = {name: card["recipe"]["loop"]["total_steps"] for name, card in cards.items()}
    assert {steps[one.name] for one in ABLATION} == {BUDGET.steps}
    methods = {name: card["recipe"]["method"] for name, card in cards.items()}
    base = methods["eagle3"]
    assert methods["eagle3_final"] == base | {"features": "final"}
    assert methods["eagle3_no_ttt"]["training"] == base["training"] | {"steps": 1}
    assert methods["eagle3_vocab_2048"]["draft_vocab_size"] == 2048
    losses = [methods[name]["training"] for name in ("eagle2", "eagle2_no_feature_loss")]
    assert losses[1] == losses[0] | {"regression": 0.0, "classification": 1.0}
    epochs = {name: card["recipe"]["epochs"] for name, card in cards.items()}
    assert epochs["eagle3_long"] == 8 * epochs["eagle3"], "of an eighth of the answers"


def test_more_data_is_read_as_many_times(workshop):
    names = ("eagle3_x0.125", "eagle3_x0.25", "eagle3_x0.5", "eagle3")
    cards = [workshop.card(VARIANTS[name]) for name in names]
    tokens = [card["answer_tokens"] for card in cards]
    assert tokens == sorted(set(tokens)), "a larger share holds more answers"
    assert len({card["recipe"]["epochs"] for card in cards}) == 1
    steps = [card["recipe"]["loop"]["total_steps"] for card in cards]
    assert steps[-1] == pytest.approx(2 * steps[-2], abs=1), "twice the share, as many epochs"


def test_what_is_trained_is_left_alone_and_another_budget_is_refused(workshop, answers, capsys):
    before = checkpoints.digest(workshop.folder(VARIANTS["eagle3"]))
    eagle3_variants.train_all(workshop, [VARIANTS["eagle3"]], answers)
    assert "eagle3: there already" in capsys.readouterr().out
    assert checkpoints.digest(workshop.folder(VARIANTS["eagle3"])) == before
    other = replace(workshop, budget=replace(BUDGET, steps=3))
    with pytest.raises(ValueError, match="trained with another epochs; choose another folder"):
        other.train(VARIANTS["eagle3"], answers)
    other = replace(workshop, budget=replace(BUDGET, share=0.5))
    with pytest.raises(ValueError, match="another corpus and epochs"):
        other.train(VARIANTS["eagle3"], answers)


def test_a_head_that_was_trained_at_another_rate_is_not_trained_alike(
    workshop, answers, monkeypatch
):
    honest = recipes.Recipe.of

    def faster(method: type[recipes.Method], target: Target) -> recipes.Recipe:
        recipe = honest(method, target)
        return replace(recipe, loop=replace(recipe.loop, learning_rate=3e-3, clip=9.0))

    monkeypatch.setattr(recipes.Recipe, "of", faster)
    with pytest.raises(ValueError, match="trained with another learning_rate and clip"):
        workshop.train(VARIANTS["eagle3"], answers)


def test_a_killed_variant_goes_on_and_ends_as_one_that_was_not(
    workshop, answers, tmp_path, small_world, monkeypatch, capsys
):
    often = replace(RECIPE.loop, save_seconds=0.0)
    monkeypatch.setattr(
        recipes.Recipe, "of", lambda method, target: replace(little(method, target), loop=often)
    )
    killed = replace(workshop, work=tmp_path / "killed")
    whole = replace(workshop, work=tmp_path / "whole")
    step, seen = draft_training._step, []

    def dying(*arguments):
        seen.append(arguments[-1])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(draft_training, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        eagle3_variants.train_all(killed, [VARIANTS["eagle3"]], answers)
    assert killed.card(VARIANTS["eagle3"]) is None
    eagle3_variants.train_all(killed, [VARIANTS["eagle3"]], answers)
    assert seen == [0, 1, *range(1, BUDGET.steps)], "one step was not saved, and is done again"
    whole.train(VARIANTS["eagle3"], answers)
    digests = {checkpoints.digest(one.folder(VARIANTS["eagle3"])) for one in (killed, whole)}
    assert len(digests) == 1
    assert f"eagle3: {BUDGET.steps} steps" in capsys.readouterr().out


def test_two_processes_never_train_the_same_variant(workshop, answers, tmp_path, capsys):
    fresh = replace(workshop, work=tmp_path)
    with eagle3_variants.claimed(tmp_path / "eagle3") as is_ours:
        assert is_ours
        eagle3_variants.train_all(fresh, [VARIANTS["eagle3"]], answers)
    assert "eagle3: another process is training it" in capsys.readouterr().out
    assert fresh.card(VARIANTS["eagle3"]) is None
    with eagle3_variants.claimed(tmp_path / "eagle3") as is_ours:
        assert is_ours, "a claim ends with its block"


# --- rows


def test_every_stage_draws_and_the_papers_values_are_hollow_marks(lab, rows):
    reported = claims.reported("eagle3").query("model == 'Llama-3.1-8B'")
    assert eagle3_figures.DRAWINGS.keys() == set(DRAWN)
    hollow, places = {}, {}
    for stage, (name, draw) in eagle3_figures.DRAWINGS.items():
        figure = draw(rows, reported)
        assert isinstance(figure, Figure), name
        drawn = [axes for axes in figure.axes if axes.axison]
        assert drawn and all(axes.has_data() and axes.get_xlabel() for axes in drawn), name
        lines = [line for axes in figure.axes for line in axes.lines]
        marks = [line.get_ydata() for line in lines if line.get_markerfacecolor() == "none"]
        hollow[stage] = {round(float(y), 2) for mark in marks for y in mark}
        places[stage] = {label.get_text() for axes in drawn for label in axes.get_xticklabels()}
    assert {3.82, 5.37, 4.40, 6.13} <= hollow["ablation"], "Table 2's chat"
    assert places["ablation"] == {"chat", "maths", "mean"}
    assert {3.7, 4.4, 5.2, 6.1} <= hollow["data_scaling"]
    assert 1.81 in hollow["throughput"] and 1.38 not in hollow["throughput"], "only up to batch 2"


def test_claims_find_their_rows_and_none_finds_two(rows):
    first = rows[(rows["quantity"] == "ablation_by_depth") & (rows["depth"] == 1)]
    rows = pd.concat([rows[rows["depth"] != 2], first.assign(depth=2)])  # few got so far
    verdicts = {one.id: one for one in claims.judge(claims.load("eagle3"), rows, "full")}
    assert not [one.id for one in verdicts.values() if "rows match" in one.why]
    for name in (
        "tau-above-eagle2-greedy", "tau-above-eagle-greedy", "tau-above-medusa-greedy",
        "tau-above-sps-greedy", "tau-above-pld-greedy", "tau-above-lookahead-greedy",
        "ablation-ttt-chat", "ablation-fusion-maths", "n-alpha-eagle-falls", "n-alpha-no-ttt",
        "n-alpha-no-feature-loss", "n-alpha-collapse", "scaling-tau", "scaling-eagle2-flat",
        "batch-speedup-falls",
    ):  # fmt: skip
        assert verdicts[name].verdict != "not tested", f"{name}: {verdicts[name].why}"


def test_every_stage_times_its_own_baseline_in_turn_with_what_it_compares(lab):
    """Speedups against a baseline of another hour are of the machine, not of the method."""
    for stage in ("ablation", "data_scaling", "sensitivity", "sweep", "throughput", "headroom"):
        lines = (lab.run.records / f"{stage}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        methods = [one["method"] for one in records if "method" in one]
        assert AUTOREGRESSIVE in methods and len(set(methods)) > 1, stage


def test_batches_are_enough_for_an_interval(rows):
    found = rows[(rows["quantity"] == "throughput") & (rows["batch"] == 2)]
    assert (found["num_prompts"] == 6).all() and found["speedup_low"].notna().all()


def test_eagles_chains_stand_beside_eagle_3s_of_one_budget_at_every_batch(rows):
    found = rows[(rows["stage"] == "throughput") & (rows["shape"] == eagle3_lab.ALIKE_CHAIN)]
    timed = found[found["quantity"] == "throughput"]
    for _, of_batch in timed.groupby("batch"):
        assert set(of_batch["method"]) == {"EAGLE-3", "EAGLE"}
        assert of_batch["trained_positions"].nunique() == 1
    pairs = found[found["quantity"] == "paired_difference"]
    assert set(pairs["batch"]) == set(timed["batch"])
    assert set(zip(pairs["method"], pairs["versus"], strict=True)) == {("EAGLE-3", "EAGLE")}


def test_rows_of_heads_trained_alike_are_not_the_committed_heads(rows):
    is_alike = rows["stage"].isin(eagle3_lab.ALIKE)
    assert rows[is_alike]["checkpoint"].isna().all() and is_alike.any()
    assert rows[rows["stage"] == "sweep"]["checkpoint"].notna().all()


def test_heads_of_one_budget_are_paired_with_each_other_alone(rows):
    paired = rows[rows["quantity"] == "paired_difference"]
    alike = paired[paired["budget"] == "equal"]
    assert {"EAGLE", "EAGLE-2", "Medusa", "SpS", "EAGLE-3 (top feature only)"} <= set(
        alike["versus"]
    )
    of_table_1 = paired[paired["budget"].isna()]
    assert set(of_table_1["versus"]) == {"PLD", "Lookahead", "EAGLE", "EAGLE-2"}
    ablation = rows[rows["quantity"] == "ablation"]
    heads = ablation[ablation["method"] != AUTOREGRESSIVE]
    assert heads["trained_tokens"].nunique() == 1, "rows say what their heads were trained on"


def test_a_committed_baseline_of_this_target_is_measured_and_the_others_named(lab, rows):
    table_1 = rows[rows["quantity"] == "baselines"]
    assert {"EAGLE-3", "EAGLE", "EAGLE-2", "PLD", "Lookahead"} <= set(table_1["method"])
    assert not {"Medusa", "SpS"} & set(table_1["method"])
    medusa, sps = lab.left_out()
    assert medusa.startswith("Medusa left out") and "python -m specrepro.medusa" in medusa
    assert sps.startswith("SpS left out") and "committed/draft_lm" in sps


def test_tier_full_makes_the_baselines_too(workshop, answers, tmp_path, monkeypatch):
    lab = lab_of(workshop, tmp_path)
    lab.committed, lab.run.work = None, tmp_path / "whole" / "eagle3"
    monkeypatch.setattr(recipes, "features_of", lambda *_: answers)
    assert lab.left_out() == []
    assert {one.method for one in lab._trained()} == {"EAGLE", "EAGLE-2", "Medusa", "SpS"}
    assert (tmp_path / "whole" / "medusa" / "checkpoint" / "model.safetensors").is_file()
    lab.trains = False
    assert lab.left_out() == [], "what was made for this target is found"


def test_what_is_not_committed_is_named_without_a_path_of_this_machine(workshop, tmp_path):
    lab = lab_of(workshop, tmp_path, tier="laptop", plan=None)
    lab.committed, lab.run.target_name = None, EMBEDDED
    medusa = next(line for line in lab.left_out() if line.startswith("Medusa"))
    assert medusa.endswith(" in checkpoints/medusa; python -m specrepro.medusa CORPUS"
                           " checkpoints/medusa trains one")  # fmt: skip


def test_baselines_of_another_target_are_looked_for_apart_from_the_committed_ones(
    workshop, tmp_path
):
    lab = lab_of(workshop, tmp_path, tier="laptop", plan=None)
    lab.committed, name = None, lab.run.target_name
    assert not lab._trained()
    for line in (*lab.left_out(), lab.remedy("ablation")):
        assert "checkpoints/" not in line and f"--target {name}" in line


def test_each_level_of_what_is_varied_has_one_row(rows):
    found = rows[rows["quantity"] == "sensitivity"]
    assert not found.duplicated(["setting", "level"]).any()
    levels = found.groupby("setting")["level"].agg(sorted).to_dict()
    assert levels == {
        "draft vocabulary": [40, 2048, 16384],
        "training-time-test steps": [1, 2, 3, 5],
    }


def test_the_data_axis_is_relative_to_the_smallest_share(rows):
    found = rows[rows["quantity"] == "data_scaling"]
    for method in ("EAGLE-3", "EAGLE-2"):
        mine = found[found["method"] == method].sort_values("data_scale")
        assert mine["data_scale"].tolist() == [1, 2, 4, 8]
        assert mine["trained_tokens"].is_monotonic_increasing
    assert set(rows.loc[rows["quantity"] == "paired_gain", "metric"]) == {"tau", "speedup"}


def test_the_gain_from_data_is_that_of_all_of_it_beyond_eagle_2s():
    accepted = {("EAGLE-3", 1): 1, ("EAGLE-3", 8): 3, ("EAGLE-2", 1): 1, ("EAGLE-2", 8): 2}
    columns = [{"data_scale": float(scale), "variant": f"{scale}"} for _, scale in accepted]
    entries = [
        eagle3_lab.Entry(method, eagle3.DRAFTERS["EAGLE-3"], column)
        for (method, _), column in zip(accepted, columns, strict=True)
    ]
    told = {one.key: num for one, num in zip(entries, accepted.values(), strict=True)}
    told[AUTOREGRESSIVE] = 0
    records = [record(key, f"q{i}", [num] * 3, 1.0) for key, num in told.items() for i in range(3)]
    found = eagle3_lab._gains_from_data(records, entries).set_index("metric")
    assert found.loc["tau", "value"] == pytest.approx((4 - 2) - (3 - 2))
    assert eagle3_lab._gains_from_data(records, entries[1:]).empty


def test_a_head_trained_for_long_is_in_its_last_state_and_of_a_budget_of_its_own(rows, workshop):
    card = workshop.card(VARIANTS["eagle3_long"])
    looks = card["held_out_tau_by_step"]
    taus = [*looks.values()]
    assert card["held_out_tau"] == pytest.approx(taus[-1], abs=1e-3) != max(taus)
    found = rows[rows["quantity"] == "data_scaling"].set_index("method")["budget"]
    assert set(found.filter(like="EAGLE-3 (").to_numpy()) == {eagle3_lab.LONG}
    assert set(found[["EAGLE-3", "EAGLE-2"]]) == {eagle3_lab.SHARED}


def test_a_level_that_is_the_recipes_own_is_measured_once(workshop, tmp_path, small_world):
    with small_world.context() as patch:
        same = replace(METHODS[Eagle3], training=TrainingConfig(steps=5))
        recipe = lambda method, target: replace(little(method, target), method=same)  # noqa: E731
        patch.setattr(recipes.Recipe, "of", recipe)
        found = lab_of(workshop, tmp_path).sensitivity()
    assert not found.duplicated(["setting", "level"]).any()


def test_a_head_that_was_trained_anew_is_measured_anew(workshop, tmp_path):
    folder = workshop.folder(VARIANTS["eagle3"])
    entry = eagle3_lab.Entry("EAGLE-3", eagle3.DRAFTERS["EAGLE-3"], {}, folder)
    (tmp_path / "other").mkdir()
    for path in folder.iterdir():
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    assert replace(entry, checkpoint=tmp_path / "other").key == entry.key
    head, tree = eagle3.load_head(folder)
    head.norm.weight.data.add_(1)
    eagle3.save_head(head, tmp_path / "other", tree)
    assert replace(entry, checkpoint=tmp_path / "other").key != entry.key


def test_baselines_draft_trees_of_the_heads_own_size(lab):
    own = lab.load(lab.run.target).tree
    drafters = {one.method: one.load(lab.run.target) for one in lab._trained()}
    assert drafters["EAGLE-2"].tree == own
    assert drafters["EAGLE"].tree.total_tokens <= own.total_tokens


def test_at_tier_paper_eagle_2_is_as_deep_as_its_own_checkpoint_says(lab):
    """Its released trees have six levels where EAGLE-3's have eight."""
    found, own = replace(lab, plan=PLAN), lab.load(lab.run.target).tree
    found.run = copy.copy(lab.run)
    found.run.tier_name = "paper"
    tree = {one.method: one.load(lab.run.target) for one in found._trained()}["EAGLE-2"].tree
    assert tree == replace(own, depth=eagle2.load_head(found._baseline("eagle2"))[1].depth)
    assert tree.depth != own.depth, "nothing is shown"


def test_the_sweep_holds_the_tree_in_use(lab, rows):
    own = lab.load(lab.run.target).tree
    found = rows[rows["quantity"] == "sweep"]
    sizes = found[["draft_depth", "top_k", "total_tokens"]].astype(int)
    assert (sizes == [own.depth, own.top_k, own.total_tokens]).all(axis=1).any()


def test_as_many_prompts_as_were_asked_for(lab):
    asked = replace(lab)
    assert asked.num_prompts == PLAN.num_prompts
    asked.run = copy.copy(lab.run)
    asked.run.asked_prompts = 7
    assert asked.num_prompts == 7, "more than the stage's own"


def test_heads_that_were_not_trained_alike_are_refused(workshop, answers, tmp_path):
    own = Workshop(workshop.target, tmp_path / "variants", BUDGET)
    other = replace(own, budget=replace(BUDGET, steps=3))
    own.train(VARIANTS["eagle3"], answers)
    other.train(VARIANTS["eagle3_final"], answers)
    found = replace(lab_of(own, tmp_path), trains=False)
    with pytest.raises(ValueError, match="not trained alike(.|\n)*eagle3_final: "):
        found.ablation()


def test_what_the_target_foretells_of_itself_bounds_the_head_and_tells_no_speed(rows):
    found = rows[(rows["quantity"] == "headroom") & (rows["prompts"] == "mean")]
    assert set(found["temperature"]) == {1.0}
    assert found[["speedup", "tokens_per_second"]].isna().all(axis=None), "it is no way to decode"
    tau = found.pivot(index="total_tokens", columns="method", values="tau")
    assert len(tau) == len({*PLAN.sizes, 8}) and (tau[eagle3_lab.ITSELF] >= tau["EAGLE-3"]).all()
    assert tau[eagle3_lab.ITSELF].min() > 1.2, "nothing was foretold"


# --- tiers and single stages


def test_a_tier_without_rows_says_by_which_command_they_are_made(workshop, tmp_path, capsys):
    found = lab_of(workshop, tmp_path, "laptop", None)
    assert found.show("ablation") is None
    said = capsys.readouterr().out
    assert "python -m specrepro.eagle3_variants" in said
    assert "python -m specrepro.eagle3_lab ablation" in said
    assert not len(found.run.rows), "nothing was invented"


def test_laptop_draws_the_rows_that_full_left_and_marks_them(
    lab, rows, workshop, tmp_path, monkeypatch
):
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    path = tmp_path / "figures" / "eagle3" / "results.csv"
    eagle3_lab.replace_stage(path, rows, "ablation")
    found = lab_of(workshop, tmp_path / "run", "laptop", None)
    assert isinstance(found.show("ablation"), Figure)
    recalled = found.run.of("ablation")
    assert set(recalled["source"]) == {experiment.COMMITTED}
    assert len(recalled) == len(lab.run.of("ablation"))
    assert len(found.run.rows) == (rows["stage"] == "ablation").sum(), "differences among them"
    written = pd.read_csv(path)
    for column, why in (("checkpoint", "another head"), ("target", "another target")):
        written.assign(**{column: "another"}).to_csv(path, index=False)
        assert not found.take("ablation"), f"rows of {why} are not drawn"
    written.drop(columns="checkpoint").to_csv(path, index=False)
    assert found.take("ablation"), "older rows do not say whose they are"


def test_the_long_audit_is_shown_at_other_tiers_beside_their_own(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    labs = {tier: lab_of(workshop, tmp_path / tier, tier) for tier in ("full", "laptop")}
    for found, num_prompts in zip(labs.values(), (4, 2), strict=True):
        found.run.tier = replace(found.run.tier, audited_prompts=num_prompts, exact_tokens=4)
    for stage in eagle3_lab.AUDITS:
        assert labs["full"].take(stage)
        path = tmp_path / "figures" / "eagle3" / "results.csv"
        eagle3_lab.replace_stage(path, labs["full"].run.rows, stage)
    shown = labs["laptop"].audit(eagle3_lab.drafters(labs["laptop"].checkpoint))
    assert (shown["value"] == 0).all() and set(shown["temperature"]) == {0, 1}
    assert dict(shown.groupby("tier")["num_prompts"].max()) == {"full": 2, "laptop": 1}
    names = shown.groupby("tier")["method"].agg(set)
    assert names["full"] == names["laptop"] > {"EAGLE-3", "EAGLE-3 chain", eagle3_lab.COUPLED}


def test_a_single_stage_replaces_its_own_rows_of_tier_full_alone(tmp_path):
    path = tmp_path / "results.csv"
    old = {"tier": ["full", "full", "laptop"], "stage": ["sweep", "ablation", "sweep"]}
    pd.DataFrame(old | {"tau": [1.0, 2.0, 3.0]}).to_csv(path, index=False)
    new = pd.DataFrame({"tier": ["full", "full"], "stage": ["sweep", "x"], "tau": [4.0, 5.0]})
    eagle3_lab.replace_stage(path, new, "sweep")
    found = pd.read_csv(path)
    assert list(zip(found["tier"], found["stage"], found["tau"], strict=True)) == [
        ("full", "ablation", 2.0),
        ("laptop", "sweep", 3.0),
        ("full", "sweep", 4.0),
    ]


def test_the_command_measures_what_is_trained_and_names_what_is_not(
    workshop, tmp_path, monkeypatch, capsys
):
    prepared = lab_of(workshop, tmp_path)
    monkeypatch.setattr(experiment, "Run", lambda *_, **__: prepared.run)
    monkeypatch.setitem(eagle3_lab.PLANS, "full", PLAN)
    empty = ["--work", str(tmp_path / "none"), "--checkpoint", str(prepared.checkpoint)]
    eagle3_lab.main(["ablation", "sweep", *empty, "--num-prompts", "1"])
    said = capsys.readouterr().out
    assert "ablation: no rows; python -m specrepro.corpus" in said
    assert "sweep: done" in said
    found = pd.read_csv(prepared.run.folder / "results.csv")
    assert set(found["stage"]) == {"sweep"} and (found["tier"] == "full").all()
    assert set(found["num_prompts"]) == {1}


def test_fewer_than_no_prompts_are_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="--num-prompts is -3; give at least 0"):
        eagle3_lab.main(["sweep", "--target", "nowhere", "--num-prompts", "-3"])


# --- cards, and the control


def test_tau_by_training_goes_on_where_the_first_head_stopped():
    def card(**more):
        recipe = {"loop": {"total_steps": 100}, "batch_tokens": 10, "method": {"tree": {}}}
        held_out = {"held_out_tau_by_step": {"50": 1.5, "100": 1.7}, "held_out_prompts": 3}
        return {"recipe": recipe, "processes": 2, "answer_tokens": 7, "corpus": "c" * 64} | (
            held_out | more
        )

    first = card(stopped_after_step=80, held_out_tau_by_step={"40": 1.2})
    found = training_cards.training_rows(card(start=first))
    assert found["positions"].tolist() == [800, 1600 + 1000, 1600 + 2000]
    assert found["tau"].tolist() == [1.2, 1.5, 1.7] and found["stretch"].tolist() == [1, 2, 2]
    assert training_cards.budget_of(card(start=first))["trained_positions"] == 3600


def test_the_committed_card_tells_how_its_head_was_trained():
    card = training_cards.card_of(eagle3.CHECKPOINT)
    found = training_cards.training_rows(card)
    assert found["positions"].is_monotonic_increasing and len(found) > 5
    assert found["tau"].between(1, 5).all()


def test_the_control_has_the_shape_of_the_head_and_none_of_its_weights(chat_target, tmp_path):
    eagle3.save_head(make_head(chat_target), tmp_path, TreeConfig(2, 5, 11))
    ours, theirs = Drafter.load(tmp_path, chat_target), eagle3_lab.controls(tmp_path)
    (control,) = (load(chat_target) for load in theirs.values())
    again = theirs["EAGLE-3, random weights"](chat_target)
    assert control.tree == ours.tree and torch.equal(control.token_ids, ours.token_ids)
    assert torch.equal(control.head.fc.weight, again.head.fc.weight)
    pairs = zip(control.head.parameters(), ours.head.parameters(), strict=True)
    assert not any(torch.equal(mine, learnt) for mine, learnt in pairs)


def test_the_command_trains_every_variant_on_the_default_budget(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(eagle3_variants, "load_target", lambda name: None)
    monkeypatch.setattr(eagle3_variants, "train_all", lambda *arguments: asked.append(arguments))
    eagle3_variants.main([str(tmp_path)])
    (workshop, variants, folder) = asked[0]
    assert workshop.budget == eagle3_variants.Budget() and folder == tmp_path
    assert variants == list(eagle3_variants.VARIANTS.values())
