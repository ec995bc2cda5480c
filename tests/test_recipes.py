"""A checkpoint is made from the target's own features, by one road for every paper."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from drafter_cases import (
    RECIPE,
    assert_says_what_the_target_says,
    trained,
)

from specrepro import checkpoints, corpus, draft_training, recipes, target_model
from specrepro.eagle3 import Drafter, Eagle3
from specrepro.recipes import Recipe

pytestmark = pytest.mark.usefixtures("training_prompts")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_from_features_leaves_a_checkpoint_that_drafts(
    tiny_chat_folder, features, tmp_path, dtype
):
    target = target_model.load(str(tiny_chat_folder), dtype=dtype, device="cpu")
    out, card, _ = trained(replace(RECIPE, epochs=3), target, features, tmp_path)
    assert card["corpus"] == corpus.FeatureCache(features, target.hidden_size).hash
    assert card["processes"] == 1
    drafter = Drafter.load(out, target)
    assert drafter.tree == RECIPE.method.tree
    assert_says_what_the_target_says(target, drafter)


def test_a_packed_corpus_trains_as_its_kept_features_do(chat_target, features, tmp_path):
    packed = corpus.pack(features, tmp_path / "packed", {})
    losses, recipe = {}, replace(RECIPE, epochs=4)
    for name, folder in (("kept", features), ("live", packed)):
        work = tmp_path / name
        recipes.make_checkpoint(recipe, chat_target, folder, work, tmp_path / f"{name}-head")
        lines = map(json.loads, (work / "log.jsonl").read_text().splitlines())
        losses[name] = [line["loss"] for line in lines if "loss" in line]
    assert len(losses["live"]) > 1
    assert losses["live"] == pytest.approx(losses["kept"], rel=0.02), "rounding is bfloat16's"
    cards = [json.loads((tmp_path / f"{x}-head" / "card.json").read_text()) for x in losses]
    assert cards[0]["corpus"] == cards[1]["corpus"]
    assert cards[0]["answer_tokens"] == cards[1]["answer_tokens"]


def test_another_draft_vocabulary_refuses_to_resume(chat_target, features, tmp_path):
    folders = features, tmp_path / "work", tmp_path / "out"
    recipes.make_checkpoint(RECIPE, chat_target, *folders)
    changed = replace(RECIPE, method=replace(RECIPE.method, draft_vocab_size=30))
    with pytest.raises(ValueError, match=r"method\.draft_vocab_size was 40 and is 30"):
        recipes.make_checkpoint(changed, chat_target, *folders, resume=True)


def test_training_goes_on_from_another_checkpoint_and_the_card_says_so(
    chat_target, features, tmp_path
):
    first = recipes.make_checkpoint(
        RECIPE, chat_target, features, tmp_path / "a", tmp_path / "first"
    )
    still = replace(RECIPE, loop=replace(RECIPE.loop, learning_rate=0.0))
    second = tmp_path / "second"
    recipes.make_checkpoint(still, chat_target, features, tmp_path / "b", second, start=first)
    assert checkpoints.digest(second) == checkpoints.digest(first), "nothing was learnt on top"
    card = json.loads((second / "card.json").read_text())
    assert card["start"]["sha256"] == checkpoints.digest(first)
    assert card["start"]["recipe"] == json.loads((first / "card.json").read_text())["recipe"]


def test_processes_share_the_batches_of_each_step(chat_target, features, tmp_path, monkeypatch):
    """Two processes see in one step what one process sees in two."""

    def batches_of(rank: int, num_ranks: int, num_steps: int) -> list[list[list[int]]]:
        seen = []
        monkeypatch.setattr(draft_training, "join_processes", lambda: (rank, num_ranks))
        monkeypatch.setattr(
            draft_training, "train", lambda head, batch_at, *_, **__: seen.append(batch_at)
        )
        recipe = replace(RECIPE, loop=replace(RECIPE.loop, total_steps=num_steps))
        recipes.train(
            recipe, chat_target, corpus.FeatureCache(features, chat_target.hidden_size), tmp_path
        )
        return [seen[0](step).tokens.tolist() for step in range(num_steps)]

    alone = batches_of(0, 1, 6)
    assert alone[::2] == batches_of(0, 2, 3) and alone[1::2] == batches_of(1, 2, 3)
    assert alone[0] != alone[1]


def test_variants_differ_in_one_setting_and_in_their_share_of_one_corpus(
    chat_target, features, tmp_path, monkeypatch
):
    monkeypatch.setattr(Recipe, "of", lambda method, target: RECIPE)
    whole = corpus.FeatureCache(features, chat_target.hidden_size)
    cards = {}
    for name, settings, share in (
        ("all", {}, 1.0),
        ("half", {}, 0.5),
        ("final", {"features": "final"}, 1.0),
    ):
        made = recipes.variant(
            Eagle3, chat_target, features, tmp_path / name, settings, share=share, epochs=2.0
        )
        cards[name] = json.loads((made / "card.json").read_text())
    assert cards["all"]["corpus"] == cards["final"]["corpus"] == whole.hash
    assert 0 < cards["half"]["answer_tokens"] < cards["all"]["answer_tokens"]
    methods = {name: card["recipe"]["method"] for name, card in cards.items()}
    assert methods["all"] == methods["half"] == methods["final"] | {"features": None}
    assert Drafter.load(made, chat_target).head.config.features == "final"


def test_a_variant_keeps_its_last_state_though_an_earlier_look_was_better(
    chat_target, features, tmp_path, monkeypatch
):
    monkeypatch.setattr(Recipe, "of", lambda method, target: RECIPE)
    falling = iter(range(99, 0, -1))
    monkeypatch.setattr(recipes, "held_out_tau", lambda *_: float(next(falling)))
    made = recipes.variant(
        Eagle3, chat_target, features, tmp_path / "one", epochs=2.0, evaluations=2
    )
    card = json.loads((made / "card.json").read_text())
    looks = [*card["held_out_tau_by_step"].values()]
    assert len(looks) > 1 and card["held_out_tau"] == looks[-1] < looks[0]


def test_each_batch_is_read_once_and_a_failed_read_stops_its_own_step():
    seen = []

    def batch_at(step: int) -> int:
        seen.append(step)
        if step == 3:
            raise OSError("the disk is gone")
        return 10 * step

    ahead = recipes._Ahead(batch_at, num_steps=5)
    assert [ahead(step) for step in (0, 1, 2)] == [0, 10, 20]
    with pytest.raises(OSError, match="the disk is gone"):
        ahead(3)
    assert ahead(4) == 40, "a step that was not read before, as after a resume"
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "option", ["--epochs", "--learning-rate", "--batch-tokens", "--evaluations"]
)
def test_no_number_of_the_command_line_stands_for_another(option, capsys):
    with pytest.raises(SystemExit):
        recipes.main(Eagle3, ["corpus", "out", option, "0"])
    assert f"argument {option}: 0 is" in capsys.readouterr().err


def test_layers_that_are_spread_are_not_asked_for_features_while_training(
    chat_target, tmp_path, monkeypatch
):
    monkeypatch.setattr(recipes, "load_sharded", lambda name: chat_target)
    with pytest.raises(ValueError, match="has no features.*python -m specrepro.corpus"):
        recipes.main(Eagle3, [str(tmp_path), "out", "--shard-target"])


def test_a_gpu_keeps_no_features_which_it_has_sooner_than_a_disk(
    chat_target, tmp_path, monkeypatch
):
    monkeypatch.setattr(recipes.prompts, "training_prompts", lambda: [])
    kept = []
    monkeypatch.setattr(corpus, "generate", lambda *_, keep_features: kept.append(keep_features))
    for device in ("cpu", "cuda"):
        own = SimpleNamespace(name="a/b", device=torch.device(device))
        recipes.features_of(own, tmp_path)
    assert kept == [True, False]


def test_overrides_are_for_the_embedded_target_alone(chat_target, monkeypatch):
    papers = Recipe.of(Eagle3, chat_target)
    assert papers == Recipe(Eagle3())
    assert (papers.method.training.steps, papers.loop.learning_rate) == (5, 5e-5)
    monkeypatch.setattr(chat_target, "name", "smollm2")
    own = Recipe.of(Eagle3, chat_target)
    assert own.method.draft_vocab_size < 32000 and own.method.tree.total_tokens < 60
    assert own.loop.learning_rate > 5e-5 and own.method.training.step_decay == 0.8


def test_a_checkpoint_is_the_named_one_the_committed_one_or_made_here(chat_target, tmp_path):
    assert recipes.obtain_checkpoint(Eagle3, chat_target, "elsewhere") == Path("elsewhere")
    assert checkpoints.digest(recipes.obtain_checkpoint(Eagle3, chat_target))
    work = tmp_path / "runs" / "eagle3"
    how = {"from_scratch": True, "work": work, "recipe": RECIPE}
    made = recipes.obtain_checkpoint(Eagle3, chat_target, **how)
    assert Drafter.load(made, chat_target).tree == RECIPE.method.tree
    once = checkpoints.digest(made)
    recipes.obtain_checkpoint(Eagle3, chat_target, **how)
    assert checkpoints.digest(made) == once, "a second call goes on where the first ended"
