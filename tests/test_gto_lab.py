"""GTO's experiments: greedy paths, rewards, arms of one budget, pooled seeds, figures, claims."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from drafter_cases import PROMPT, small_corpus, world_of
from test_eagle3 import make_head

from specrepro import (
    checkpoints,
    claims,
    corpus,
    eagle3,
    experiment,
    gto,
    gto_arms,
    gto_figures,
    gto_lab,
)
from specrepro.decoding import decode
from specrepro.draft_training import LoopConfig
from specrepro.draft_tree import DraftTree
from specrepro.eagle3 import TrainingConfig, TreeConfig
from specrepro.gto import Gto, TuningConfig
from specrepro.gto_arms import ABLATION, ARMS, HEADLINE, SEEDS, Budget, Workshop
from specrepro.gto_lab import Lab, Plan, pool_seeds
from specrepro.gto_rows import (
    PATH_COUNTS,
    TREE_VALUES,
    PathWatch,
    greedy_path,
    held_out_gains,
    held_out_levels,
    tree_values,
)
from specrepro.measure import Record
from specrepro.recipes import Recipe
from specrepro.rows import paired_differences
from specrepro.tree_verify import Verdict

TREE = TreeConfig(2, 3, 8)
METHOD = Gto("", TREE, TrainingConfig(steps=2), TuningConfig(num_groups=2, group_size=3))
BUDGET = Budget(share=0.4, steps=2, evaluations=1, num_held_out=2)
COSTS = {
    "GTO": {"seconds": 3.0, "words": 60, "trees": 12, "peak": 5e8},
    "Token loss only": {"seconds": 1.0, "words": 60, "trees": 0, "peak": 2e8},
}
PLAN = Plan(gto_lab.STAGES, 1, (0.0,), ((0, 0), (1, 4)))


def little(method: type, target: object) -> Recipe:
    return Recipe(METHOD, LoopConfig(learning_rate=1e-3, warmup_steps=1), batch_tokens=60)


@pytest.fixture(scope="module")
def small_world() -> Iterator[pytest.MonkeyPatch]:
    with world_of(little) as patch:
        yield patch


@pytest.fixture(scope="module")
def answers(chat_target, small_world, tmp_path_factory) -> Path:
    return small_corpus(chat_target, tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def start(chat_target, tmp_path_factory) -> Path:
    return eagle3.save_head(make_head(chat_target), tmp_path_factory.mktemp("start"), TREE)


@pytest.fixture(scope="module")
def workshop(chat_target, answers, start, tmp_path_factory) -> Workshop:
    """All arms tuned, by what the command calls."""
    found = Workshop(chat_target, tmp_path_factory.mktemp("arms"), start, BUDGET)
    checkpoints.write_text(found.work / "cost.json", json.dumps(COSTS))
    gto_arms.tune_all(found, list(ARMS.values()), answers)
    return found


@pytest.fixture(scope="module")
def lab(workshop, start, tmp_path_factory) -> Lab:
    """Every stage taken."""
    folder = tmp_path_factory.mktemp("lab")
    run = experiment.Run(
        "gto", tier="full", target=workshop.target.name, dtype="float32", figures_dir=folder
    )
    asked = torch.randint(5, 90, (40, 12), generator=torch.Generator().manual_seed(0)).tolist()
    run.questions = lambda name, n=0: [(f"{name}/{i}", asked[i + len(name)]) for i in range(n or 1)]
    run.max_new_tokens = 24
    head = workshop.folder(HEADLINE[0])
    load = gto.drafters(head)["GTO"]
    found = Lab(run, head, load, PLAN, workshop, start=start)
    run.depends_on(**gto_lab.identity(load(run.target), head, start))
    both = {"EAGLE-3": found._first(), "GTO": load(run.target)}
    greedy = run.decode_rows(run.compare(both, gto_lab.SETS, (0.0,)))
    run.keep(greedy)
    assert all(found.take(stage) for stage in gto_lab.STAGES)
    return found


# --- greedy paths


def test_the_greedy_path_follows_first_children():
    tree = DraftTree(torch.tensor([[9, 1, 2, 3, 4, 5]]), torch.tensor([[-1, 0, 0, 2, 1, 4]]))
    assert greedy_path(tree) == [1, 4, 5]
    assert greedy_path(DraftTree.root_only(torch.tensor([7]))) == []


def test_counts_of_paths_add_up_to_the_tokens_that_were_decoded(chat_target, start):
    drafter = eagle3.Drafter.load(start, chat_target, TreeConfig(2, 6, 30))
    watch = PathWatch(drafter, levels=3)
    run = decode(chat_target, watch, PROMPT, max_new_tokens=40)
    assert run.tokens == decode(chat_target, drafter, PROMPT, max_new_tokens=40).tokens
    counts = watch.counts
    assert counts["rounds"] == run.num_passes
    assert counts["tokens"] == sum(run.accepted) + run.num_passes
    assert counts["rounds"] <= counts["greedy_tokens"] <= counts["tokens"]
    assert counts["accepting"] == sum(accepted > 0 for accepted in run.accepted)
    assert 0 <= counts["on_greedy_path"] <= counts["accepting"]


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [([1, 4], (0, 1, 1, 3, 3)), ([1], (0, 1, 1, 2, 2)), ([], (0, 0, 0, 1, 1)),
     ([2, 3], (0, 1, 0, 1, 3)), ([1, 6], (0, 1, 0, 2, 3))],
)  # fmt: skip
def test_a_round_is_on_the_greedy_path_until_another_node_is_accepted(accepted, expected):
    class Fixed:
        max_nodes = 7

        def observe(self, *_: object) -> None:
            pass

    watch = PathWatch(Fixed(), levels=3)
    watch.counts = dict.fromkeys(PATH_COUNTS, 0)
    watch.tree = DraftTree(
        torch.tensor([[9, 1, 2, 3, 4, 5, 6]]), torch.tensor([[-1, 0, 0, 2, 1, 4, 1]])
    )
    path = torch.tensor([[0, *accepted]])
    watch.observe(Verdict(path, torch.tensor([len(accepted)]), path, path[:, -1]), None)
    assert tuple(watch.counts.values())[1:] == expected


# --- arms


def test_arms_differ_from_the_recipe_in_what_they_say(workshop):
    methods = {name: workshop.card(arm)["recipe"]["method"] for name, arm in ARMS.items()}
    own = methods["gto_0"]["tuning"]
    assert methods["no_debias"]["tuning"] == own | {"debias": False}
    assert methods["groups_4"]["tuning"] == own | {"group_size": 4}
    assert methods["tokens_1"]["tuning"] == own | {"weight": 0.0}
    loops = {name: workshop.card(arm)["recipe"]["loop"] for name, arm in ARMS.items()}
    assert [loops[f"gto_{seed}"]["seed"] for seed in SEEDS] == list(SEEDS)
    assert loops["tokens_0"]["total_steps"] == loops["gto_0"]["total_steps"] == 2
    assert loops["tokens_time_0"]["total_steps"] == 6, "three times as long where a step is cheaper"


def test_the_command_tunes_by_its_own_budget(workshop, answers, monkeypatch):
    asked = []
    monkeypatch.setattr(gto_arms, "load_target", lambda name: workshop.target)
    monkeypatch.setattr(gto_arms, "tune_all", lambda *given: asked.append(given))
    gto_arms.main([str(answers), "--only", "tokens_0", "gto_1", "--start", str(workshop.start)])
    ((made, arms, features),) = asked
    assert (made.budget, made.work, made.start) == (Budget(), gto_arms.WORK, workshop.start)
    assert [arm.name for arm in arms] == ["tokens_0", "gto_1"] and features == answers


def test_all_arms_begin_from_one_head_and_leave_the_held_out_answers_alone(workshop, answers):
    cards = [workshop.card(arm) for arm in ARMS.values()]
    digest = checkpoints.digest(workshop.start)
    assert {card["start"]["sha256"] for card in cards} == {digest}
    assert len({card["corpus"] for card in cards}) == 1
    whole = corpus.FeatureCache(answers, workshop.target.hidden_size)
    trained_on = corpus.FeatureCache(
        answers, workshop.target.hidden_size, workshop._num_answers(answers)
    )
    assert cards[0]["corpus"] == trained_on.hash
    held_out = {answer.prompt_id for answer in whole.answers[-2:]}
    assert not held_out & {answer.prompt_id for answer in trained_on.answers}
    assert len(workshop.held_out(answers)) == 2


def test_looks_hold_tau_and_reward_by_step(workshop):
    looks = workshop.looks(ARMS["gto_0"])
    taus = list(workshop.card(ARMS["gto_0"])["held_out_tau_by_step"].values())
    assert looks[-1]["step"] == 2 and looks[-1]["tau"] == taus[-1] > 1
    assert all(math.isfinite(look["reward_gap"]) for look in looks)


def test_what_a_step_costs_is_measured(workshop, answers):
    fresh = replace(workshop, work=workshop.work / "fresh")
    ratio, costs = fresh.cost_ratio(answers), fresh.costs()
    assert ratio == costs["GTO"]["seconds"] / costs["Token loss only"]["seconds"] > 1
    assert costs["GTO"]["words"] == costs["Token loss only"]["words"] > 0
    assert costs["GTO"]["trees"] > 0 == costs["Token loss only"]["trees"]
    assert all(1e7 < cost["peak"] < 1e11 for cost in costs.values())


def test_another_setting_or_head_is_refused(workshop, answers, tmp_path, chat_target):
    other = eagle3.save_head(make_head(chat_target, seed=1), tmp_path, TREE)
    with pytest.raises(ValueError, match="tuned with other settings or from another head"):
        replace(workshop, start=other).tune(HEADLINE[0], answers)
    with pytest.raises(ValueError, match="share is 2"):
        Budget(share=2)


# --- rows


def record(method: str, prompt: str, tokens: int, passes: int) -> Record:
    return Record(
        method=method, prompts="chat", prompt_id=prompt, temperature=0.0, seed=0, batch=1, repeat=0,
        group=prompt, max_new_tokens=8, top_p=1.0, top_k=0, target="t", dtype="float32",
        new_tokens=tokens + 1, tokens=[1] * (tokens + 1), seconds=1.0, prefill_seconds=0.1,
        target_passes=passes, accepted=[tokens // passes - 1] * passes, drafted=[3] * passes,
    )  # fmt: skip


def test_seeds_are_pooled_prompt_by_prompt():
    """tau is 3 and 2 by the seeds of one arm, 2 by the first head: 12 / 5 - 2 over both."""
    records = []
    for prompt in ("a", "b", "c"):
        records += [record("Autoregressive", prompt, 6, 6), record("first", prompt, 6, 3)]
        records += [record("one", prompt, 6, 2), record("two", prompt, 6, 3)]
    arms = {"one": ARMS["gto_0"], "two": ARMS["gto_1"]}
    pooled = pool_seeds(records, arms, "first")
    assert {one.prompts for one in pooled} == {"all"} and len({one.unit for one in pooled}) == 3
    found = paired_differences(pooled, [("GTO", "EAGLE-3")], ["tau"])
    assert found["value"].tolist() == [pytest.approx(12 / 5 - 2)]
    assert found["value_low"].tolist() == found["value_high"].tolist(), "prompts are alike"
    assert found["num_prompts"].tolist() == [3], "not six: two seeds answer the same questions"


def test_rows_hold_what_each_stage_is_for(lab):
    found = lab.run.rows
    assert {"paths", "path_gain", "reward", "reward_gap", "ratio", "shapes", "shape_gain", "arms",
            "ablation", "held_out_gain", "learning", "statistics", "paired_difference"} <= set(
        found["quantity"]
    )  # fmt: skip
    arms = found[(found["quantity"] == "arms") & (found["prompts"] == "all")]
    assert {arm.method for arm in HEADLINE} | {"EAGLE-3"} <= set(arms["method"])
    by_seed = found[(found["quantity"] == "arms") & (found["prompts"] == "chat")]
    assert len(by_seed[by_seed["method"] == "GTO"]) == len(SEEDS)
    ablated = found[(found["quantity"] == "ablation") & (found["prompts"] == "mean")]
    assert {arm.method for arm in ABLATION} | {gto_arms.GROUPS_OF_1} <= set(ablated["method"])
    shares = found[(found["quantity"] == "ratio") & (found["metric"] == "share")]
    sums = shares.groupby("prompts")["value"].sum()
    assert all(total == 0 or total == pytest.approx(1) for total in sums), "of accepted paths"
    assert set(found[found["quantity"] == "statistics"]["method"]) >= {"GTO"}
    cost = found[found["quantity"] == "training_cost"].set_index("method").loc["GTO"]
    assert (cost["words_per_second"], cost["trees_per_second"]) == (20, 4)
    assert cost["bytes_per_tree"] == 3e8 / 12


def test_at_every_position_a_tree_is_judged_as_training_and_decoding_judge_it(lab):
    """The rewards are those of training's own rollout, and what is accepted is what decoding
    accepts in its first round from there."""
    target, head = lab.run.target, eagle3.load_head(lab.checkpoint)[0]
    tree = TreeConfig(2, 10, 60)  # an untrained head guesses right with many nodes alone
    answered = lab._answered("chat")[0]
    batch, drafter = answered.batch(target), gto.GroupDrafter(head, target, tree)
    found = dict(zip(("positions", *TREE_VALUES), tree_values(target, drafter, batch), strict=True))
    assert found["positions"] == len(answered.tokens) - 1
    alone = TuningConfig(num_groups=99, group_size=1, debias=False)
    rollout = gto.GroupTreeLoss(head, target, tree, METHOD.training, alone).sample(batch)
    assert rollout.is_row.sum() == found["positions"]
    assert found["log-sum-exp"] == pytest.approx(rollout.rewards.sum().item(), rel=1e-5)
    text = [*answered.prompt_ids, *answered.tokens]
    ends = range(len(answered.prompt_ids), len(text) - 1)
    decoding = eagle3.Drafter.load(lab.checkpoint, target, tree)
    rounds = [decode(target, decoding, text[:end], 3 + tree.depth) for end in ends]
    assert found["accepted"] == sum(one.accepted[0] for one in rounds) > 0


def test_gains_are_paired_answer_by_answer():
    """A head that has one tenth more accepted of every answer is so for certain, though answers
    differ by far more."""
    generator = np.random.default_rng(0)
    first = generator.uniform(1, 9, (12, 1 + len(TREE_VALUES)))
    first[:, 0] = 4
    better = first * np.array([1, *[1.1] * len(TREE_VALUES)])
    heads = {"GTO": [better, better], "EAGLE-3": [first]}
    row = held_out_gains(heads, [("GTO", "EAGLE-3")]).set_index("metric").loc["accepted"]
    assert row["value"] == pytest.approx(0.1 * first[:, 1].sum() / first[:, 0].sum())
    assert 0 < row["value_low"] < row["value"] < row["value_high"]
    assert (row["num_prompts"], row["num_seeds"]) == (12, 2)
    levels = held_out_levels(heads).query("metric == 'accepted'").set_index("method")["value"]
    assert levels["GTO"] - levels["EAGLE-3"] == pytest.approx(row["value"])


def test_looks_begin_with_the_first_head(lab):
    found = lab.run.of("learning")
    assert set(found.groupby("variant")["step"].min()) == {0}
    assert set(found[found["step"] == 0]["reward_gap"]) == {0}


def test_every_stage_is_drawn_beside_what_is_reported(lab, tmp_path):
    assert set(gto_figures.DRAWINGS) == set(gto_lab.STAGES)
    reported = claims.reported("gto").query("model == 'Llama-3.1-8B'")
    for name, draw in gto_figures.DRAWINGS.values():
        experiment.figures.save(draw(lab.run.rows, reported), tmp_path, name)
    experiment.figures.save(gto_figures.ratios(lab.run.rows), tmp_path, "fig_4_ratios")
    assert len(list(tmp_path.glob("fig_*.png"))) == 9


def test_every_claim_of_arms_and_paths_finds_its_row(lab):
    verdicts = {v.id: v for v in claims.judge(claims.load("gto"), lab.run.rows, "full")}
    for name in (
        "gain-is-not-more-training", "gain-is-not-more-time", "more-training-gains-little",
        "debiasing-helps", "smooth-above-max", "groups-of-8-above-16", "other-trees-gain-too",
        "tree-above-greedy-path", "greedy-path-seldom", "reward-rises",
        "more-accepted-than-first", "more-accepted-than-by-tokens",
    ):  # fmt: skip
        assert verdicts[name].verdict != "not tested", f"{name}: {verdicts[name].why}"


# --- what is missing


def test_without_arms_a_stage_says_how_they_are_made(
    chat_target, start, tmp_path, small_world, capsys
):
    run = experiment.Run("gto", tier="laptop", target=chat_target.name, dtype="float32",
                         figures_dir=tmp_path)  # fmt: skip
    found = Lab(run, start, None, start=start)
    assert found.show("ablation") is None
    assert "python -m specrepro.gto_arms runs/corpus" in capsys.readouterr().out
    with pytest.raises(ValueError, match="unknown stage 'sweep'; choose one of paths, rewards"):
        found.take("sweep")


def test_without_a_tuned_head_the_remedy_is_named(chat_target, tmp_path):
    run = experiment.Run("gto", tier="laptop", target=chat_target.name, dtype="float32",
                         figures_dir=tmp_path)  # fmt: skip
    assert gto_lab.obtain_head(run, "somewhere") == Path("somewhere")
    with pytest.raises(ValueError, match="no tuned head .* python -m specrepro.gto CORPUS"):
        gto_lab.obtain_head(run)


def test_claims_without_rows_are_not_tested():
    verdicts = claims.judge(claims.load("gto"), pd.DataFrame(), "smoke")
    assert {verdict.verdict for verdict in verdicts} == {"not tested"} and len(verdicts) > 30
