"""FastEagle's experiments: what its rows say, and that every stage gives rows to draw and judge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from drafter_cases import RECIPE
from matplotlib.figure import Figure
from test_eagle3 import make_head
from test_fasteagle import make_cascade

from specrepro import (
    checkpoints,
    claims,
    cost_model,
    eagle3,
    experiment,
    fasteagle,
    fasteagle_figures,
    fasteagle_lab,
    fasteagle_rows,
    fasteagle_variants,
    prompts,
    recipes,
    target_model,
)
from specrepro import rows as rows_module
from specrepro.backbone import Backbone
from specrepro.cascade import CascadeConfig
from specrepro.eagle3 import Eagle3, TrainingConfig, TreeConfig
from specrepro.eagle3_variants import Budget
from specrepro.fasteagle import FastEagle
from specrepro.fasteagle_lab import STAGES, Lab, Plan
from specrepro.fasteagle_variants import Bench
from specrepro.measure import Record
from specrepro.target_model import Target

METHODS = {
    FastEagle: FastEagle(2, 40, 2),
    Eagle3: replace(RECIPE.method, training=TrainingConfig(steps=2)),
}
PLAN = Plan(
    STAGES, 2, 0, (0.0,), levels=(1, 2, 3), repeats=2, widths=(1, 2), batches=(1, 2), casts=False
)
FEW = ("fasteagle", "fasteagle_last", "fasteagle_from_eagle3", "eagle3")


# --- rows


def record(method: str, prompt_id: str, emitted: int, passes: int, seconds: float) -> Record:
    """A record of `emitted` tokens behind the prefill's own."""
    accepted = [emitted // passes - 1] * passes
    return Record(
        method=method, prompts="chat", prompt_id=prompt_id, temperature=0.0, seed=0, batch=1,
        repeat=0, group=prompt_id, max_new_tokens=99, top_p=1.0, top_k=0, target="t",
        dtype="float32", new_tokens=emitted + 1, tokens=[5] * (emitted + 1), seconds=seconds,
        prefill_seconds=0.0, target_passes=passes, accepted=accepted, drafted=[9] * passes,
    )  # fmt: skip


def test_tau_and_latency_are_compared_on_prompts_that_both_finished():
    ours = [record("FastEagle", name, *rest) for name, *rest in (
        ("a", 20, 10, 1.0), ("b", 40, 10, 2.0), ("c", 30, 10, 1.5)
    )]  # fmt: skip
    theirs = [record("EAGLE-3", name, *rest) for name, *rest in (
        ("a", 20, 5, 2.0), ("b", 40, 10, 4.0), ("c", 30, 10, 3.0)
    )]  # fmt: skip
    lone = [record("FastEagle", "d", 40, 1, 0.001)]
    found = fasteagle_rows.against([*ours, *theirs, *lone], "FastEagle", "EAGLE-3")
    values = found.set_index("quantity")["value"]
    assert values["tau_ratio"] == pytest.approx((90 / 30) / (90 / 25))
    assert values["latency_saved"] == pytest.approx(0.5)
    row = found.iloc[0]
    assert row["value_low"] < row["value"] < row["value_high"] and row["num_prompts"] == 3


def test_drafting_is_compared_level_by_level_and_by_slope():
    times = pd.DataFrame(
        {"method": method, "num_levels": n, "value": v, "value_low": v - 0.5, "value_high": v + 0.5}
        for method, step in (("FastEagle", 1.0), ("EAGLE-3", 4.0))
        for n, v in ((n, 2 + step * n) for n in (1, 2, 4))
    )
    found = fasteagle_rows.drafting_ratios(times, "FastEagle", "EAGLE-3")
    ratios = found[found["quantity"] == "drafting_ratio"].set_index("num_levels")
    assert ratios["value"].to_dict() == pytest.approx({2: 4 / 10, 4: 6 / 18})
    assert ratios.loc[2, "value_low"] == pytest.approx(3.5 / 10.5)
    assert ratios.loc[2, "value_high"] == pytest.approx(4.5 / 9.5)
    (slope,) = found[found["quantity"] == "level_cost_ratio"].to_dict("records")
    ends = [slope[name] for name in ("value", "value_low", "value_high")]
    assert ends == pytest.approx([0.25] * 3)


DRAFTING = {
    "FastEagle": fasteagle_rows.Drafting(cascade=3), "EAGLE-3": fasteagle_rows.Drafting((6, 6)),
}  # fmt: skip


def test_as_well_accepted_a_cascade_gains_on_every_card_what_its_one_pass_saves():
    ours, theirs = (
        [record(method, name, 30, 10, 1.0) for name in "ab"] for method in ("FastEagle", "EAGLE-3")
    )
    lone = [record("EAGLE-3", "c", 40, 1, 0.001)]
    found = fasteagle_rows.on_cards([*ours, *theirs, *lone], DRAFTING, "FastEagle", "EAGLE-3")
    assert set(found["source"]) == {"modelled"} and set(found["num_prompts"]) == {2}
    assert found["machine"].str.contains("modelled").all() and found["machine"].nunique() == 4
    by_quantity = dict(list(found.groupby("quantity")["value"]))
    assert by_quantity["modelled_gain"].between(0, 0.1).all()
    assert (by_quantity["break_even_ms"] < 0).all(), "it is ahead at the floor already"
    assert by_quantity["modelled_speedup"].between(2, 3).all(), "three tokens a round, not for free"


def test_at_the_break_even_both_are_equally_fast():
    """Worse accepted, it needs launches that cost something: exactly so much a level."""
    records = [record("FastEagle", "a", 20, 10, 1.0), record("EAGLE-3", "a", 30, 10, 1.0)]
    found = fasteagle_rows.on_cards(records, DRAFTING, "FastEagle", "EAGLE-3")
    for card in cost_model.CARDS:
        name = f"{cost_model.CARDS[card].name} (modelled)"
        mine = found[found["machine"] == name].set_index(["quantity", "method"])["value"]
        assert mine["modelled_gain", "FastEagle"] < 0
        plain = cost_model.table(card, batches=(1,)).cost("target", 1, 512, 1)
        ours = 20 * plain / mine["modelled_speedup", "FastEagle"]
        theirs = 30 * plain / mine["modelled_speedup", "EAGLE-3"]
        slower = theirs + 10 * 2 * mine["break_even_ms", "FastEagle"]
        assert 30 / slower == pytest.approx(20 / ours, rel=1e-3)


def test_a_guess_counts_where_all_words_up_to_it_are_the_answers(chat_target):
    prompt, answer = [40, 71, 70], [10, 11, 12, 13, 14]

    def guesses(tokens: torch.Tensor, taps: torch.Tensor) -> list[torch.Tensor]:
        """Best guess wrong but for one place, second guess right everywhere."""
        tables = []
        for depth in (1, 2):
            right = torch.nn.functional.pad(tokens[0], (0, depth + 1))[depth + 1 :]
            first = torch.where(torch.arange(len(right)) == 3, right, 0)
            tables.append(torch.stack([first, right], 1))
        return tables

    found = fasteagle_rows.accuracy_by_depth(guesses, chat_target, [(prompt, answer)] * 2, (1, 2))
    values = found.set_index(["depth", "top_k"])["value"]
    # the known word is at 3 to 6, so row 2 to 5, and one fewer at depth 2
    assert values.to_dict() == pytest.approx({(1, 1): 1 / 4, (1, 2): 1, (2, 1): 1 / 3, (2, 2): 1})


def test_both_kinds_of_heads_are_asked_over_the_same_words(chat_target):
    texts = [([40, 71, 70], [10, 11, 12, 13, 14])]
    made, head = make_cascade(chat_target), make_head(chat_target)
    for guesses in (
        fasteagle_rows.guesses_of_cascade(made, chat_target, 40),
        fasteagle_rows.guesses_of_eagle3(head, chat_target, 40, 3),
    ):
        found = fasteagle_rows.accuracy_by_depth(guesses, chat_target, texts, (1, 40))
        spoken = found[found["top_k"] == 40]["value"]
        assert ((spoken >= 0) & (spoken <= 1)).all() and found["depth"].max() >= 3


def test_the_draft_cache_grows_with_layers():
    config = CascadeConfig(576, 1536, 9, 3, 64, 49152, num_hidden_layers=3)
    assert fasteagle_rows.cache_bytes_per_token(config, torch.bfloat16) == 2 * 3 * 3 * 64 * 2
    head = eagle3.HeadConfig(576, 1536, 9, 3, 64, 49152)
    assert fasteagle_rows.cache_bytes_per_token(head, torch.float32) == 2 * 3 * 64 * 4


# --- stages


def little(method: type, target: Target) -> recipes.Recipe:
    return replace(RECIPE, method=METHODS[method], batch_tokens=60)


@pytest.fixture(scope="module")
def lab(tiny_chat_folder, tmp_path_factory) -> Iterator[Lab]:
    """Every stage taken, on a tiny target with heads of two steps."""
    questions = [
        prompts.Prompt(f"q{n}", "training", ({"role": "user", "content": "word " * (1 + n % 3)},))
        for n in range(12)
    ]
    rows_module._resamples.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "training_prompts", lambda: iter(questions))
        patch.setattr(recipes, "held_out_questions", lambda target: [])
        patch.setattr(recipes, "held_out_tau", lambda *_: 1.5)
        patch.setattr(recipes.Recipe, "of", little)
        patch.setattr(rows_module, "NUM_RESAMPLES", 50)
        patch.setattr(fasteagle_lab, "ABLATED", {n: fasteagle_lab.ABLATED[n] for n in FEW})
        patch.setattr(fasteagle_variants, "LAYERS", (1,))
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        yield lab_of(tiny_chat_folder, tmp_path_factory.mktemp("lab"))
    rows_module._resamples.cache_clear()


def lab_of(target_folder: Path, folder: Path) -> Lab:
    run = experiment.Run(
        "fasteagle", tier="full", target=str(target_folder), dtype="float32",
        figures_dir=folder, max_new_tokens=8,
    )  # fmt: skip
    run.work = folder / "work" / "fasteagle"
    draws = torch.Generator().manual_seed(0)
    asked = torch.randint(5, 90, (8, 12), generator=draws).tolist()
    run.questions = lambda name, n=0: [(f"{name}/{i}", asked[i]) for i in range(n or 2)]
    made = fasteagle.save_cascade(make_cascade(run.target), folder / "cascade", Backbone(3, 2))
    head = eagle3.save_head(make_head(run.target), folder / "head", TreeConfig(2, 3, 7))
    load = fasteagle.drafters(made)["FastEagle"]
    bench = Bench(run.target, folder / "variants", Budget(share=0.5, steps=2))
    found = Lab(run, made, load, PLAN, eagle3_head=head, bench=bench)
    run.depends_on(**fasteagle_lab.identity(load(run.target), made, head))
    taken = {stage: found.take(stage) for stage in STAGES}
    assert all(taken.values()), taken
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_drawn(lab, stage):
    assert isinstance(fasteagle_figures.DRAWINGS[stage][1](lab.run.rows), Figure)


def test_variants_differ_in_what_they_are_named_for_and_had_one_budget(lab):
    cards = {name: checkpoints_card(lab, name) for name in FEW}
    methods = {name: card["recipe"]["method"] for name, card in cards.items()}
    base = methods["fasteagle"]
    assert methods["fasteagle_last"]["training"] == base["training"] | {"supervision": "last"}
    begun = methods["fasteagle_from_eagle3"]["training"]["init"]
    assert Path(begun) == lab.bench.work / "eagle3" / "checkpoint"
    assert {card["recipe"]["loop"]["total_steps"] for card in cards.values()} == {2}


def checkpoints_card(lab: Lab, name: str) -> dict:
    return fasteagle_lab.card_of(lab.bench.work / name / "checkpoint")


def test_one_variant_had_eagle3s_time_in_place_of_its_steps(lab):
    seconds = lab.bench.measure(Path())  # kept, so no features are needed
    steps = checkpoints_card(lab, fasteagle_variants.SAME_TIME)["recipe"]["loop"]["total_steps"]
    wanted = 2 * seconds["EAGLE-3"] / seconds["FastEagle"]
    assert steps == pytest.approx(max(1, wanted), abs=1)
    other = replace(lab.bench, work=lab.bench.work / "elsewhere")
    with pytest.raises(ValueError, match="training_seconds.json is missing: python -m"):
        other.variant(fasteagle_variants.SAME_TIME)


def test_rows_tell_what_was_varied(lab):
    found = lab.run.rows
    swept = found[found["quantity"] == "sweep"]
    assert set(zip(swept["draft_depth"], swept["top_k"], strict=True)) == {
        (n, k) for n in (1, 2, 3) for k in (1, 2)
    }
    assert (swept["total_tokens"] == 1 + swept["draft_depth"] * swept["top_k"]).all()
    shapes = set(found[found["quantity"] == "shapes"]["shape"].dropna())
    assert shapes == {"backbone", "chain", "best first"}
    assert set(found[found["quantity"] == "layers"]["draft_depth"]) == {1, 2}
    cached = found[found["quantity"] == "throughput"].groupby("method")["cache_bytes"].first()
    assert cached["FastEagle"] == 4 * cached["EAGLE-3"], "the tiny cascade has four layers"


def test_drafting_is_timed_once(lab):
    """Or a run that is resumed beside other work would time it again."""
    before = lab.run.of("drafter_cost")["value"].tolist()
    again = lab.drafting()
    assert again.loc[again["quantity"] == "drafter_cost", "value"].tolist() == before


def test_rounds_are_told_apart_by_how_they_were_run(lab):
    found = lab.run.rows
    rounds = found[found["quantity"] == "compiled_round"]
    parts = rounds.groupby(["execution", "method"])["part"].agg(set)
    assert set(parts.index) == {
        (way, name) for way in ("eager", "torch.compile") for name in ("FastEagle", "EAGLE-3")
    }
    assert all(mine == {"target", "draft", "verify", "rest"} for mine in parts)
    draft = rounds[rounds["part"] == "draft"].set_index(["execution", "method"])["value"]
    ratios = found[(found["quantity"] == "drafting_ratio") & found["execution"].notna()]
    for way, ratio in zip(ratios["execution"], ratios["value"], strict=True):
        assert ratio == pytest.approx(draft[way, "FastEagle"] / draft[way, "EAGLE-3"])
    assert len(ratios) == 2


def test_a_head_in_the_cascades_folder_is_the_one_beside_it(tmp_path):
    assert fasteagle_lab.head_beside(tmp_path) == eagle3.CHECKPOINT
    checkpoints.write_text(tmp_path / "eagle3" / "card.json", '{"answer_tokens": 1}')
    assert fasteagle_lab.head_beside(tmp_path) == tmp_path / "eagle3"


def test_claims_find_their_rows(lab):
    verdicts = {one.id: one for one in claims.judge(claims.load("fasteagle"), lab.run.rows, "full")}
    measured = (
        "above-eagle3-same-data", "one-pass-is-cheaper", "a-layer-is-cheaper-than-a-step",
        "supervision-helps", "tree-helps", "gain-falls-with-batch",
    )  # fmt: skip
    for name in measured:
        assert verdicts[name].verdict != "not tested", verdicts[name].why
    assert verdicts["lossless-greedy"].verdict == "not tested"


def test_a_stage_that_nobody_measured_says_how_it_is_made(lab, capsys):
    lone = replace(lab, plan=replace(PLAN, measures=()))
    assert lone.show("layers") is None
    said = capsys.readouterr().out
    assert "fasteagle_variants runs/corpus trains" in said and "fasteagle_lab layers" in said
    with pytest.raises(ValueError, match="unknown stage 'nothing'; choose one of drafting"):
        lab.take("nothing")


def test_an_untrained_cascade_is_a_control(lab):
    (load,) = fasteagle_lab.controls(lab.checkpoint).values()
    target = target_model.load(lab.run.target_name, dtype="float32", device="cpu")
    drafter = load(target)
    assert drafter.tree == Backbone(3, 2)
    own, _ = fasteagle.load_cascade(lab.checkpoint)
    assert not torch.equal(drafter.head.fc.weight, own.fc.weight)


def test_budgets_stand_beside_each_other(lab):
    folders = {name: lab.bench.work / name / "checkpoint" for name in ("fasteagle", "eagle3")}
    found = fasteagle_lab.budgets(folders)
    assert found["trained_positions"].nunique() == 1 and found.index.tolist() == list(folders)
    assert checkpoints.digest(folders["fasteagle"]) != checkpoints.digest(folders["eagle3"])
